"""Attackers: what someone who wants the harmful task would run against an immunised backbone.

One file per attacker and one line in REGISTRY: name to (config class, factory), or to a finished
`Attack`. `base` has the problem, the protocol and the shared loop; `suite` the budgets.

>>> import jax.numpy as jnp
>>> problem = probe_problem(jnp.diag(jnp.array([1.0, 0.1])), jnp.array([1.0, 1.0]))
>>> trace = run_attack(make_attack("conjugate_gradients"), problem, steps=10)
>>> int(trace.steps_to_loss_gap[0, 0, 1])
2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaximm.attacks import (
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
from jaximm.attacks.base import (
    KINDS,
    TARGETS,
    Attack,
    AttackTrace,
    Cost,
    ProbeProblem,
    grid_product,
    initial_weights,
    probe_problem,
    recorded_steps,
    run_attack,
)
from jaximm.attacks.suite import SUITES, Suite, run_suite

__all__ = [
    "KINDS",
    "REGISTRY",
    "SUITES",
    "TARGETS",
    "Attack",
    "AttackTrace",
    "Cost",
    "ProbeProblem",
    "Suite",
    "grid_product",
    "initial_weights",
    "make_attack",
    "probe_problem",
    "recorded_steps",
    "run_attack",
    "run_suite",
    "suite_attacks",
    "suite_steps",
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


def make_attack(name: str, config: Any = None) -> Attack:
    """The attacker registered as `name`, with its default configuration if none is given.

    Raises:
      ValueError: an unknown name, a configuration of another attacker, or a configuration for an
        attacker that was registered without one.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown attack {name!r}; choose from {sorted(REGISTRY)}.")
    entry = REGISTRY[name]
    if isinstance(entry, Attack):
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


def _suite(name: str) -> Suite:
    """The suite of that name."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; choose from {sorted(SUITES)}.")
    return SUITES[name]
