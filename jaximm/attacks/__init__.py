"""Attackers: what someone who wants the harmful task would run against an immunised backbone.

Two families, for two problems:

  * REGISTRY: probes on frozen features, a quadratic that is solved or descended exactly. One file
    per attacker; `base` has the problem, the protocol and the shared loop; `suite` the budgets.
  * WEIGHT_REGISTRY: attackers of the weights themselves, in mini-batches. `weights` has the problem
    and the protocol; `weight_run` the loop; `weight_suite` the rows; `fine_tune` the descent on
    which most of them are built.

One line registers an attacker: name to (config class, factory), or to a finished `Attack` or
`WeightAttack`.

>>> import jax.numpy as jnp
>>> problem = probe_problem(jnp.diag(jnp.array([1.0, 0.1])), jnp.array([1.0, 1.0]))
>>> trace = run_attack(make_attack("conjugate_gradients"), problem, steps=10)
>>> int(trace.steps_to_loss_gap[0, 0, 1])
2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaximm.attacks.grid import KINDS, grid_product, recorded_steps
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
from jaximm.attacks.probe.suite import SUITES, Suite, run_suite
from jaximm.attacks.weights import (
    benign_drift,
    direction_ablation,
    factor_insert,
    fine_tune,
    kick,
    last_blocks,
    latent_perturbation,
    logit_rescale,
    lora,
    merge,
    mixed_loss,
    muon,
    norm_only,
    poison_mix,
    policy_gradient,
    prune,
    quantise,
    random_subspace,
    refresh_statistics,
    shampoo,
    solved_head,
    spectral_rebalance,
)
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
from jaximm.attacks.weights.suite import references_of, run_weight_suite

__all__ = [
    "KINDS",
    "REGISTRY",
    "SUITES",
    "TARGETS",
    "WEIGHT_REGISTRY",
    "Access",
    "Attack",
    "AttackTrace",
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
    "grid_product",
    "guessing_loss",
    "initial_weights",
    "make_attack",
    "make_weight_attack",
    "not_applicable",
    "probe_problem",
    "recorded_steps",
    "references_of",
    "run_attack",
    "run_fine_tune",
    "run_fine_tune_suite",
    "run_suite",
    "run_weight_suite",
    "suite_attacks",
    "suite_steps",
    "with_constant",
    "zero_head",
]

REGISTRY: dict[str, Any] = {
    "gd": (gradient_descent.FixedStepConfig, gradient_descent.gd),
    "gd_best_step": (gradient_descent.BestStepConfig, gradient_descent.gd_best_step),
    "gd_line_search": (gradient_descent.LineSearchConfig, gradient_descent.gd_line_search),
    "heavy_ball": (heavy_ball.HeavyBallConfig, heavy_ball.heavy_ball),
    "nesterov": (nesterov.NesterovConfig, nesterov.nesterov),
    "adam": (adam.AdamConfig, adam.adam),
    "conjugate_gradients": (
        conjugate_gradients.ConjugateGradientsConfig,
        conjugate_gradients.conjugate_gradients,
    ),
    "lbfgs": (lbfgs.LBFGSConfig, lbfgs.lbfgs),
    "ridge": (ridge.RidgeConfig, ridge.ridge),
    "whitened_gd": (whitened_gd.WhitenedConfig, whitened_gd.whitened_gd),
    "jacobi_gd": (jacobi_gd.JacobiConfig, jacobi_gd.jacobi_gd),
}
"""Attackers of a probe on frozen features."""

WEIGHT_REGISTRY: dict[str, Any] = {
    "fine_tune_sgd": (fine_tune.FineTuneSGDConfig, fine_tune.fine_tune_sgd),
    "fine_tune_adam": (fine_tune.FineTuneAdamConfig, fine_tune.fine_tune_adam),
    "fresh_head_sgd": (fine_tune.FreshHeadSGDConfig, fine_tune.fine_tune_sgd),
    "fresh_head_adam": (fine_tune.FreshHeadAdamConfig, fine_tune.fine_tune_adam),
    "probe_then_fine_tune": (fine_tune.ProbeThenFineTuneConfig, fine_tune.probe_then_fine_tune),
    "shampoo": (shampoo.ShampooConfig, shampoo.shampoo),
    "muon": (muon.MuonConfig, muon.muon),
    "last_blocks": (last_blocks.LastBlocksConfig, last_blocks.last_blocks),
    "norm_only": (norm_only.NormOnlyConfig, norm_only.norm_only),
    "lora": (lora.LoraConfig, lora.lora),
    "random_subspace": (random_subspace.RandomSubspaceConfig, random_subspace.random_subspace),
    "latent_perturbation": (
        latent_perturbation.LatentPerturbationConfig,
        latent_perturbation.latent_perturbation,
    ),
    "kick_then_tune": (kick.KickThenTuneConfig, kick.kick_then_tune),
    "policy_gradient": (policy_gradient.PolicyGradientConfig, policy_gradient.policy_gradient),
    "mixed_loss": (mixed_loss.MixedLossConfig, mixed_loss.mixed_loss),
    "poison_mix": (poison_mix.PoisonMixConfig, poison_mix.poison_mix),
    "benign_drift": (benign_drift.BenignDriftConfig, benign_drift.benign_drift),
    "logit_rescale": (logit_rescale.LogitRescaleConfig, logit_rescale.logit_rescale),
    "solved_head": (solved_head.SolvedHeadConfig, solved_head.solved_head),
    "factor_insert": (factor_insert.FactorInsertConfig, factor_insert.factor_insert),
    "spectral_rebalance": (
        spectral_rebalance.SpectralRebalanceConfig,
        spectral_rebalance.spectral_rebalance,
    ),
    "direction_ablation": (
        direction_ablation.DirectionAblationConfig,
        direction_ablation.direction_ablation,
    ),
    "quantise_then_tune": (quantise.QuantiseThenTuneConfig, quantise.quantise_then_tune),
    "prune_then_tune": (prune.PruneThenTuneConfig, prune.prune_then_tune),
    "merge_with_public": (merge.MergeWithPublicConfig, merge.merge_with_public),
    "refresh_statistics": (
        refresh_statistics.RefreshStatisticsConfig,
        refresh_statistics.refresh_statistics,
    ),
}
"""Attackers of the weights."""


def make_attack(name: str, config: Any = None) -> Attack:
    """The attacker registered as `name`, with its default configuration if none is given.

    Raises:
      ValueError: an unknown name, a configuration of another attacker, or a configuration for an
        attacker that was registered without one.
    """
    return _make(REGISTRY, Attack, name, config)


def make_weight_attack(name: str, config: Any = None) -> WeightAttack:
    """The attacker of weights registered as `name`, with its default configuration if none is
    given.

    Raises:
      ValueError: as `make_attack`.
    """
    return _make(WEIGHT_REGISTRY, WeightAttack, name, config)


def describe(name: str) -> str:
    """One line on an attacker of either registry: the first of its config's docstring.

    Raises:
      ValueError: an unknown name.
    """
    entry = {**REGISTRY, **WEIGHT_REGISTRY}.get(name)
    if entry is None:
        known = sorted([*REGISTRY, *WEIGHT_REGISTRY])
        raise ValueError(f"unknown attack {name!r}; choose from {known}.")
    if not isinstance(entry, tuple):
        return "an attacker that was registered without a description"
    return (entry[0].__doc__ or "").strip().partition("\n")[0]


def _make(registry: dict[str, Any], kind: type, name: str, config: Any) -> Any:
    """An entry of a registry, built."""
    if name not in registry:
        raise ValueError(f"unknown attack {name!r}; choose from {sorted(registry)}.")
    entry = registry[name]
    if isinstance(entry, kind):
        if config is not None:
            raise ValueError(f"attack {name!r} was registered without a config class; pass None.")
        return entry
    config_class, factory = entry
    if config is None:
        config = config_class()
    elif not isinstance(config, config_class):
        raise ValueError(
            f"attack {name!r} needs a {config_class.__name__}, got {type(config).__name__}."
        )
    return factory(config)


def suite_attacks(suite: str, names: Sequence[str] | None = None) -> dict[str, Attack]:
    """The attackers of a suite with its grids: all of REGISTRY, or those named.

    Raises:
      ValueError: an unknown suite or attack.
    """
    configs = _suite(suite).configs
    attackers = {}
    for name in REGISTRY if names is None else names:
        fields = configs.get(name)
        entry = REGISTRY.get(name)
        config = None if fields is None or not isinstance(entry, tuple) else entry[0](**fields)
        attackers[name] = make_attack(name, config)
    return attackers


def suite_steps(suite: str, names: Sequence[str] | None = None) -> dict[str, int]:
    """The step budgets of a suite: for all of REGISTRY, or for those named.

    Raises:
      ValueError: an unknown suite.
    """
    found = _suite(suite)
    return {name: found.budget(name) for name in (REGISTRY if names is None else names)}


def run_fine_tune_suite(
    problems: Mapping[tuple[str, str], FineTuneProblem],
    names: Sequence[str] | None = None,
    *,
    steps: int | Mapping[str, int],
    **options: Any,
) -> list[dict[str, Any]]:
    """`run_weight_suite` with registered attackers and their default grids.

    Args:
      problems: keyed (task, backbone).
      names: in WEIGHT_REGISTRY; all of it if None.
      steps: one budget for all, or a budget by name.
      **options: those of `run_weight_suite`: seeds, batch_size, record, chunk, margin.

    Raises:
      ValueError: an unknown attack, or what `run_weight_suite` refuses.
    """
    chosen = WEIGHT_REGISTRY if names is None else names
    attackers = {name: make_weight_attack(name) for name in chosen}
    return run_weight_suite(problems, attackers, steps=steps, **options)


def _suite(name: str) -> Suite:
    """The suite of that name."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; choose from {sorted(SUITES)}.")
    return SUITES[name]
