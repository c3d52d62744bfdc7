"""Nesterov's accelerated gradient on a linear probe, tuned for quadratics.

    y_t = w_t + beta (w_t - w_{t-1}),   w_{t+1} = y_t - eta g(y_t)
    eta = 4 / (3 L + m),   beta = (sqrt(3 q + 1) - 2) / (sqrt(3 q + 1) + 2),   q = L / m

with L = h_max: the best constants of the scheme on quadratics with curvature in [m, L] (Lessard,
Recht and Packard, table 1). The grid is over m as in `heavy_ball`.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.probe.heavy_ball import (
    CURVATURES,
    State,
    assumed_curvature,
    momentum_attack,
)
from jaximm.attacks.probe.problem import Attack, ProbeProblem

SOURCE = (
    "Nesterov (1983), A method of solving a convex programming problem with convergence rate "
    "O(1/k^2); constants from Lessard, Recht and Packard (2016), https://arxiv.org/abs/1408.3595"
)


def update(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step."""
    curvature = assumed_curvature(problem, hyper)
    root = jnp.sqrt(3.0 * problem.largest / curvature + 1.0)
    momentum = (root - 2.0) / (root + 2.0)
    ahead = state.weights + momentum * (state.weights - state.previous)
    step_size = 4.0 / (3.0 * problem.largest + curvature)
    return State(ahead - step_size * problem.gradient(ahead), state.weights)


def nesterov(*, curvatures: Values = CURVATURES) -> Attack:
    """Nesterov's accelerated gradient with step and momentum from the spectrum.

    Args:
      curvatures: as for `heavy_ball`.
    """
    return momentum_attack(update, curvatures, title="Nesterov", source=SOURCE)
