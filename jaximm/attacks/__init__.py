"""Attackers: what someone who wants the harmful task would run against an immunised backbone.

Two families, for two problems:

  * REGISTRY: probes on frozen features, a quadratic that is solved or descended exactly, in
    `probe/`: an attacker a file; `problem`, `loop`, `fit`, and `suite` with the budgets.
  * WEIGHT_REGISTRY: attackers of the weights themselves, in mini-batches, in `weights/`: an
    attacker a file; `problem`, `loop`, and `descent`, on which most of them are built.

One line registers an attacker: its name, and a factory whose keyword arguments are its grid, or a
finished `Attack` or `WeightAttack`. All else that is asked of it, it says itself (`Attacker`).
Where attackers are named, labels give options too: ``lora@rank=64,learning_rates=1e-4|1e-3``. Any
attacker takes ``harmful_rows=16``, and then has no more rows of the harmful task (``rows_seed``
says which).

>>> import jax.numpy as jnp
>>> problem = probe_problem(jnp.diag(jnp.array([1.0, 0.1])), jnp.array([1.0, 1.0]))
>>> trace = run_attack(make_attack("conjugate_gradients"), problem, steps=10)
>>> int(trace.steps_to_loss_gap[0, 0, 1])
2
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaximm import registry
from jaximm.attacks.grid import KINDS, TRAITS, Attacker, grid, grid_product, recorded_steps
from jaximm.attacks.probe import (
    adam,
    conjugate_gradients,
    gradient_descent,
    heavy_ball,
    jacobi_gd,
    lbfgs,
    nesterov,
    ridge,
    whitened_gd,
)
from jaximm.attacks.probe.fit import fit_of
from jaximm.attacks.probe.loop import AttackTrace, run_attack
from jaximm.attacks.probe.problem import (
    TARGETS,
    Attack,
    Cost,
    ProbeProblem,
    initial_weights,
    probe_problem,
    with_constant,
)
from jaximm.attacks.probe.suite import SUITES, Suite
from jaximm.attacks.weights import (
    benign_drift,
    delta_strip,
    direction_ablation,
    factor_insert,
    fine_tune,
    from_scratch,
    gauss_newton,
    grpo,
    head_only,
    hypernetwork,
    kick,
    last_blocks,
    latent_perturbation,
    logit_rescale,
    lora,
    merge,
    mixed_loss,
    muon,
    norm_only,
    opened,
    poison_mix,
    policy_gradient,
    prune,
    quantise,
    random_subspace,
    rebalance,
    refresh_statistics,
    retain_only,
    shampoo,
    solved_head,
    spectral_rebalance,
    spsa,
    tapped_head,
)
from jaximm.attacks.weights.language import language_problem
from jaximm.attacks.weights.loop import Execution, FineTuneTrace, fastest_execution, run_fine_tune
from jaximm.attacks.weights.problem import (
    Access,
    Batches,
    Benign,
    FineTuneProblem,
    Head,
    ModelWeights,
    WeightAttack,
    fine_tune_problem,
    guessing_loss,
    not_applicable,
    zero_head,
)

__all__ = [
    "KINDS",
    "REGISTRY",
    "SUITES",
    "TARGETS",
    "TRAITS",
    "WEIGHT_REGISTRY",
    "Access",
    "Attack",
    "AttackTrace",
    "Attacker",
    "Batches",
    "Benign",
    "Cost",
    "Execution",
    "FineTuneProblem",
    "FineTuneTrace",
    "Head",
    "ModelWeights",
    "ProbeProblem",
    "Suite",
    "WeightAttack",
    "describe",
    "fastest_execution",
    "fine_tune_problem",
    "fit_of",
    "grid",
    "grid_product",
    "guessing_loss",
    "initial_weights",
    "language_problem",
    "make_attack",
    "not_applicable",
    "probe_problem",
    "recorded_steps",
    "run_attack",
    "run_fine_tune",
    "suite_attacks",
    "suite_steps",
    "with_constant",
    "zero_head",
]

REGISTRY: dict[str, Attack | Callable[..., Attack]] = {
    "gd": gradient_descent.gd,
    "gd_best_step": gradient_descent.gd_best_step,
    "gd_line_search": gradient_descent.gd_line_search,
    "heavy_ball": heavy_ball.heavy_ball,
    "nesterov": nesterov.nesterov,
    "adam": adam.adam,
    "conjugate_gradients": conjugate_gradients.conjugate_gradients,
    "lbfgs": lbfgs.lbfgs,
    "ridge": ridge.ridge,
    "whitened_gd": whitened_gd.whitened_gd,
    "jacobi_gd": jacobi_gd.jacobi_gd,
}
"""Attackers of a probe on frozen features."""

WEIGHT_REGISTRY: dict[str, WeightAttack | Callable[..., WeightAttack]] = {
    "fine_tune_sgd": fine_tune.fine_tune_sgd,
    "fine_tune_adam": fine_tune.fine_tune_adam,
    "fresh_head_sgd": fine_tune.fresh_head_sgd,
    "fresh_head_adam": fine_tune.fresh_head_adam,
    "probe_then_fine_tune": fine_tune.probe_then_fine_tune,
    "shampoo": shampoo.shampoo,
    "muon": muon.muon,
    "gauss_newton": gauss_newton.gauss_newton,
    "last_blocks": last_blocks.last_blocks,
    "norm_only": norm_only.norm_only,
    "head_only": head_only.head_only,
    "lora": lora.lora,
    "random_subspace": random_subspace.random_subspace,
    "latent_perturbation": latent_perturbation.latent_perturbation,
    "kick_then_tune": kick.kick_then_tune,
    "policy_gradient": policy_gradient.policy_gradient,
    "grpo": grpo.grpo,
    "mixed_loss": mixed_loss.mixed_loss,
    "poison_mix": poison_mix.poison_mix,
    "benign_drift": benign_drift.benign_drift,
    "retain_only": retain_only.retain_only,
    "logit_rescale": logit_rescale.logit_rescale,
    "solved_head": solved_head.solved_head,
    "factor_insert": factor_insert.factor_insert,
    "spectral_rebalance": spectral_rebalance.spectral_rebalance,
    "rebalance": rebalance.rebalance,
    "rebalance_sgd": rebalance.rebalance_sgd,
    "from_scratch": from_scratch.from_scratch,
    "direction_ablation": direction_ablation.direction_ablation,
    "quantise_then_tune": quantise.quantise_then_tune,
    "prune_then_tune": prune.prune_then_tune,
    "merge_with_public": merge.merge_with_public,
    "refresh_statistics": refresh_statistics.refresh_statistics,
    "fresh_top": from_scratch.fresh_top,
    "delta_strip": delta_strip.delta_strip,
    "spsa": spsa.spsa,
    "tapped_head": tapped_head.tapped_head,
    "opened": opened.opened,
    "revive": opened.revive,
    "hypernetwork": hypernetwork.hypernetwork,
}
"""Attackers of the weights."""


def make_attack(label: str, **options: Any) -> Any:
    """The attacker of a label: an `Attack` or a `WeightAttack`.

    Args:
      label: a name in REGISTRY or WEIGHT_REGISTRY, or with options ``name@key=value,key=value``,
        of which several values have bars between: ``"lora@rank=64,learning_rates=1e-4|1e-3"``. What
        is a tuple in Python may be one value here; the bars of a text are its commas.
      **options: its grid and whatever else its factory takes; none for a finished attacker. Those
        of the label go before. Every attacker takes `BUDGET`.

    Raises:
      ValueError: a malformed label, an unknown name or option, or a value that the factory refuses.

    >>> make_attack("ridge", penalties=(0.1,)).grid == make_attack("ridge@penalties=0.1").grid
    True
    """
    name, fields = registry.parse_label(label)
    entry = _entry(name)
    budget = {key: fields.pop(key, options.pop(key, None)) for key in BUDGET}
    budget = {key: value for key, value in budget.items() if value is not None}
    if isinstance(entry, Attacker):
        if options or fields:
            raise ValueError(f"attack {name!r} was registered finished and takes no options.")
        return dataclasses.replace(entry, **budget) if budget else entry
    try:
        attacker = entry(**{**options, **_options(entry, fields)})
    except TypeError as error:  # an option that it does not have
        raise ValueError(f"attack {label!r} cannot be made: {error}.") from error
    return dataclasses.replace(attacker, **budget) if budget else attacker


BUDGET = ("harmful_rows", "rows_seed")
"""Options of every attacker, see `Attacker`."""


def _options(entry: Callable[..., Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a label as a factory takes them."""
    known = inspect.signature(entry).parameters

    def one(key: str, value: Any) -> Any:
        usual = known[key].default if key in known else ()  # of **options: values that are tried
        several = value if isinstance(value, tuple) else (value,)
        if isinstance(usual, str):
            return ",".join(map(str, several))
        return several if isinstance(usual, tuple) else value

    return {key: one(key, value) for key, value in fields.items()}


def describe(label: str) -> dict[str, Any]:
    """What an attacker says of itself, as plain JSON.

    Options of a label stand in the title, so that labels of one attacker are told apart.

    Returns:
      ``{"name", "family", "kind", "title", "what", "source", "threat_model", "traits"}``: `family`
      is "probe" or "weights", `what` the first line of its factory's docstring. Of an attacker with
      a data budget ``"harmful_rows"`` too.

    Raises:
      ValueError: as `make_attack`.

    >>> describe("lora")["threat_model"]
    'has the weights and labelled rows of the harmful task'
    >>> describe("lora@rank=64,learning_rates=1e-4|1e-3")["title"]
    'LoRA (rank 64, 2 learning rates)'
    """
    name, fields = registry.parse_label(label)
    entry, attack = _entry(name), make_attack(label)
    title = attack.title or name.replace("_", " ")
    if fields:
        title += f" ({', '.join(itertools.starmap(_in_words, fields.items()))})"
    text = "" if isinstance(entry, Attacker) else (inspect.getdoc(entry) or "")
    return {
        "name": label,
        "family": "probe" if isinstance(attack, Attack) else "weights",
        "kind": attack.kind,
        "title": title,
        "what": text.partition("\n")[0] or f"{title[0].upper()}{title[1:]}.",
        "source": attack.source or f"module {attack.update.__module__}",
        "threat_model": attack.threat_model,
        "traits": sorted(attack.traits),
        **({} if attack.harmful_rows is None else {"harmful_rows": attack.harmful_rows}),
    }


def _in_words(key: str, value: Any) -> str:
    words = key.replace("_", " ")
    return f"{len(value)} {words}" if isinstance(value, tuple) else f"{words} {value}"


def _entry(name: str) -> Any:
    """An entry of either registry."""
    entry = REGISTRY.get(name) or WEIGHT_REGISTRY.get(name)
    if entry is None:
        known = sorted([*REGISTRY, *WEIGHT_REGISTRY])
        raise ValueError(f"unknown attack {name!r}; choose from {known}.")
    return entry


def suite_attacks(suite: str, names: Sequence[str] | None = None) -> dict[str, Attack]:
    """The attackers of a suite with its grids: all of REGISTRY, or those of some labels.

    Raises:
      ValueError: an unknown suite or attack.
    """
    settings = _suite(suite)
    chosen = _chosen(names)
    return {label: make_attack(label, **settings.options.get(name, {})) for label, name in chosen}


def suite_steps(suite: str, names: Sequence[str] | None = None) -> dict[str, int]:
    """The step budgets of a suite: for all of REGISTRY, or for those of some labels.

    Raises:
      ValueError: an unknown suite.
    """
    settings = _suite(suite)
    return {label: settings.budget(name) for label, name in _named(names)}


def _chosen(names: Sequence[str] | None) -> list[tuple[str, str]]:
    """Labels of probes with their names: those given, or all of them."""
    pairs = _named(names)
    unknown = sorted({name for _, name in pairs} - set(REGISTRY))
    if unknown:
        raise ValueError(f"unknown attack {unknown[0]!r}; choose from {sorted(REGISTRY)}.")
    return pairs


def _named(labels: Sequence[str] | None) -> list[tuple[str, str]]:
    """Labels of probes, all of them where there are none, with their names."""
    named = REGISTRY if labels is None else labels
    return [(label, registry.parse_label(label)[0]) for label in named]


def _suite(name: str) -> Suite:
    """The suite of that name."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; choose from {sorted(SUITES)}.")
    return SUITES[name]
