"""Immunisers: methods that make fine-tuning for a harmful task hard. One file and one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from jaximm import registry
from jaximm.immunisers import erase, none
from jaximm.immunisers.about import TRAITS, About, MethodConfig
from jaximm.immunisers.adversarial import antidote
from jaximm.immunisers.collapse import booster, ctrap, lox, repnoise, seam, t_vaccine, vaccine
from jaximm.immunisers.conditioning import (
    balanced_gap,
    condition_gap,
    direct_kappa,
    ill_only,
    limit,
)
from jaximm.immunisers.gradient import Weighted, from_objective, from_penalty
from jaximm.immunisers.locks import gradient_routing, pmp
from jaximm.immunisers.meta import imma, mlac, sophon, tar
from jaximm.immunisers.problem import (
    THETA,
    Factors,
    LinearTask,
    ProbeParams,
    Problem,
    init_head,
    init_params,
    linear_features,
    linear_params,
    linear_problem,
    relative_damping,
)
from jaximm.immunisers.unlearning import ilu, mudman, npo, rmu, undo
from jaximm.types import Head, Immuniser, Json

__all__ = [
    "REGISTRY",
    "THETA",
    "TRAITS",
    "About",
    "Factors",
    "Head",
    "LinearTask",
    "ProbeParams",
    "Problem",
    "Weighted",
    "about",
    "describe",
    "from_objective",
    "from_penalty",
    "init_head",
    "init_params",
    "linear_features",
    "linear_params",
    "linear_problem",
    "make_config",
    "make_immuniser",
    "relative_damping",
]

Factory = Callable[[Any, Problem], Immuniser]
"""``factory(config, problem)``, with a configuration of its own class."""

REGISTRY: dict[str, tuple[type, Factory]] = {
    "none": (none.NoneConfig, none.none),
    "condition_gap": (condition_gap.ConditionGapConfig, condition_gap.condition_gap),
    "ill_only": (ill_only.IllOnlyConfig, ill_only.ill_only),
    "imma": (imma.ImmaConfig, imma.imma),
    "tar": (tar.TarConfig, tar.tar),
    "mlac": (mlac.MlacConfig, mlac.mlac),
    "sophon": (sophon.SophonConfig, sophon.sophon),
    "direct_kappa": (direct_kappa.DirectKappaConfig, direct_kappa.direct_kappa),
    "balanced_gap": (balanced_gap.BalancedGapConfig, balanced_gap.balanced_gap),
    "limit": (limit.LimitConfig, limit.limit),
    "npo": (npo.NpoConfig, npo.npo),
    "antidote": (antidote.AntidoteConfig, antidote.antidote),
    "rmu": (rmu.RmuConfig, rmu.rmu),
    "ilu": (ilu.IluConfig, ilu.ilu),
    "undo": (undo.UndoConfig, undo.undo),
    "mudman": (mudman.MudmanConfig, mudman.mudman),
    "lox": (lox.LoxConfig, lox.lox),
    "erase": (erase.EraseConfig, erase.erase),
    "booster": (booster.BoosterConfig, booster.booster),
    "vaccine": (vaccine.VaccineConfig, vaccine.vaccine),
    "t_vaccine": (t_vaccine.TVaccineConfig, t_vaccine.t_vaccine),
    "repnoise": (repnoise.RepnoiseConfig, repnoise.repnoise),
    "seam": (seam.SeamConfig, seam.seam),
    "ctrap": (ctrap.CtrapConfig, ctrap.ctrap),
    "gradient_routing": (
        gradient_routing.GradientRoutingConfig,
        gradient_routing.gradient_routing,
    ),
    "pmp": (pmp.PmpConfig, pmp.pmp),
}


def make_config(name: str, **fields: Any) -> registry.Config:
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


def describe(name: str) -> Json:
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


def make_immuniser(name: str, config: MethodConfig, problem: Problem) -> Immuniser:
    """The method registered as `name`, built for a problem.

    Raises:
      ValueError: an unknown name, a configuration of another method, or no `Problem`.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown method {name!r}; choose from {sorted(REGISTRY)}.")
    config_class, factory = REGISTRY[name]
    if not isinstance(config, config_class):
        raise ValueError(
            f"method {name!r} needs a {config_class.__name__}, got {type(config).__name__}."
        )
    if not isinstance(problem, Problem):
        raise ValueError(
            "expected a Problem, as linear_problem and language_problem return it, got "
            f"{type(problem).__name__}."
        )
    return _with_arrays_as_arguments(lambda problem: factory(config, problem), problem)


_HOLDERS = (
    "features_fn",
    "sites_fn",
    "losses_fn",
    "scaled_losses_fn",
    "scores_fn",
    "weights_fn",
    "lens_fn",
    "perturbed_fn",
    "perturbed_losses_fn",
    "counted_fn",
    "divergences_fn",
    "entropies_fn",
    "reference",
    "harmful_head",
)
"""Fields of a problem that may hold arrays beside what trains, and its rows."""


def _with_arrays_as_arguments(make: Callable[[Problem], Immuniser], problem: Problem) -> Immuniser:
    """A method whose update holds the problem's arrays as leaves, so that programs keep none."""
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    holders = {name: fields.pop(name) for name in _HOLDERS}
    kind = type(problem)
    arrays = jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, holders)
    others = jax.tree.map(lambda leaf: None if _is_array(leaf) else leaf, holders)
    immuniser = make(problem)
    if not jax.tree.leaves(arrays):
        return immuniser

    def update(arrays, state, batch, rng_key):
        whole = jax.tree.map(
            lambda array, other: other if array is None else array,
            arrays,
            others,
            is_leaf=lambda leaf: leaf is None,
        )
        return make(kind(**fields, **whole)).update(state, batch, rng_key)

    return immuniser._replace(update=Partial(update, arrays))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
