"""Immunisers: methods that make fine-tuning for a harmful task hard. One file and one line each."""

from __future__ import annotations

from typing import Any

from jaximm import registry
from jaximm.immunisers import erase, none
from jaximm.immunisers.about import TRAITS, About
from jaximm.immunisers.conditioning import (
    balanced_gap,
    condition_gap,
    direct_kappa,
    ill_only,
    limit,
)
from jaximm.immunisers.meta import imma
from jaximm.immunisers.problem import (
    THETA,
    Factors,
    Objective,
    ProbeParams,
    Problem,
    init_head,
    init_params,
    linear_features,
    linear_params,
    linear_problem,
    relative_damping,
)
from jaximm.types import Head, Immuniser

__all__ = [
    "REGISTRY",
    "THETA",
    "TRAITS",
    "About",
    "Factors",
    "Head",
    "Objective",
    "ProbeParams",
    "Problem",
    "about",
    "describe",
    "init_head",
    "init_params",
    "linear_features",
    "linear_params",
    "linear_problem",
    "make_config",
    "make_immuniser",
    "relative_damping",
]

REGISTRY: dict[str, tuple[type, Any]] = {
    "none": (none.NoneConfig, none.none),
    "condition_gap": (condition_gap.ConditionGapConfig, condition_gap.condition_gap),
    "ill_only": (ill_only.IllOnlyConfig, ill_only.ill_only),
    "imma": (imma.ImmaConfig, imma.imma),
    "direct_kappa": (direct_kappa.DirectKappaConfig, direct_kappa.direct_kappa),
    "balanced_gap": (balanced_gap.BalancedGapConfig, balanced_gap.balanced_gap),
    "limit": (limit.LimitConfig, limit.limit),
    "erase": (erase.EraseConfig, erase.erase),
}


def make_config(name: str, **fields: Any) -> Any:
    """The configuration of a method with the given fields, others at their defaults.

    >>> make_config("limit", t=0.5).t
    0.5

    Raises:
      ValueError: unknown method or field, with the known ones; or a value that the class refuses.
    """
    return registry.make_config(REGISTRY, "method", name, fields)


def about(name: str) -> About:
    """What a method says of itself; an empty `About` where it says nothing, or is not registered.

    >>> sorted(about("limit").traits)
    ['closed_form', 'keeps_logits']
    """
    config_class = REGISTRY[name][0] if name in REGISTRY else None
    return getattr(config_class, "about", About())


def describe(name: str) -> dict[str, Any]:
    """What a method says of itself, as plain JSON.

    Returns:
      ``{"name", "title", "what", "source", "threat_model", "traits"}``: `what` is the first line of
      its configuration's docstring.

    Raises:
      ValueError: an unknown name.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown method {name!r}; choose from {sorted(REGISTRY)}.")
    config_class, said = REGISTRY[name][0], about(name)
    return {
        "name": name,
        "title": said.title or name.replace("_", " "),
        "what": (config_class.__doc__ or "").strip().partition("\n")[0],
        "source": said.source or f"module {config_class.__module__}",
        "threat_model": said.threat_model,
        "traits": sorted(said.traits),
    }


def make_immuniser(name: str, config: Any, problem: Problem) -> Immuniser:
    """The method registered as `name`, built for a problem.

    Raises:
      ValueError: an unknown name, or a configuration of another method.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown method {name!r}; choose from {sorted(REGISTRY)}.")
    config_class, factory = REGISTRY[name]
    if not isinstance(config, config_class):
        raise ValueError(
            f"method {name!r} needs a {config_class.__name__}, got {type(config).__name__}."
        )
    return factory(config, problem)
