"""Polyak's heavy ball on a linear probe, tuned from the spectrum.

    w_{t+1} = w_t - eta g(w_t) + beta (w_t - w_{t-1})
    eta = 4 / (sqrt(L) + sqrt(m))^2,   beta = ((sqrt(L) - sqrt(m)) / (sqrt(L) + sqrt(m)))^2

with L = h_max. For m = h_min+ this is the best momentum for the worst-case error. An attacker who
wants the loss need not resolve the smallest curvatures, so the grid is over the curvature m that
he tunes for: m = h_min^(1 - u) h_max^u, from u = 0 (the optimum above) to u = 1 (no momentum).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.probe.gradient_descent import POWER_ITERATIONS
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights

SOURCE = (
    "Polyak (1964), Some methods of speeding up the convergence of iteration methods, "
    "https://doi.org/10.1016/0041-5553(64)90137-5"
)

CURVATURES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)


class State(NamedTuple):
    """Weights now and one step ago."""

    weights: Weights
    previous: Weights


def assumed_curvature(problem: ProbeProblem, hyper: Hyper) -> Float[Array, ""]:
    """h_min+^(1 - u) h_max^u: the curvature down to which the momentum is tuned."""
    ratio = problem.smallest / problem.largest
    return problem.largest * ratio ** (1.0 - hyper["curvature"])


def init(problem: ProbeProblem, hyper: Hyper) -> State:
    """Start at rest."""
    del hyper
    return State(problem.initial_weights, problem.initial_weights)


def update(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step."""
    high = jnp.sqrt(problem.largest)
    low = jnp.sqrt(assumed_curvature(problem, hyper))
    step_size = 4.0 / (high + low) ** 2
    momentum = ((high - low) / (high + low)) ** 2
    gradient = problem.gradient(state.weights)
    velocity = state.weights - state.previous
    return State(state.weights - step_size * gradient + momentum * velocity, state.weights)


def momentum_cost(n: int, d: int) -> Cost:
    """A gradient a step; beforehand POWER_ITERATIONS products for each end of the spectrum."""
    setup = 2 * POWER_ITERATIONS * 4.0 * n * d
    return Cost(setup=setup, step=4.0 * n * d + 5.0 * d, setup_shared=setup)


def heavy_ball(*, curvatures: Values = CURVATURES) -> Attack:
    """Heavy ball with step and momentum from the spectrum.

    Args:
      curvatures: values of u in [0, 1] tried; the momentum is tuned for the curvature
        h_min^(1 - u) h_max^u.
    """
    return momentum_attack(update, curvatures, title="heavy ball", source=SOURCE)


def momentum_attack(
    update: Callable[..., State], curvatures: Values, *, title: str, source: str
) -> Attack:
    """An attacker with a momentum that is tuned for a curvature."""
    return Attack(
        init=init,
        update=update,
        kind="momentum",
        title=title,
        source=source,
        knows="both ends of the spectrum",
        traits=frozenset({"plain_descent"}),
        flops=momentum_cost,
        grid=grid(curvature=(curvatures, "[0, 1]")),
        rotation_equivariant=True,
        natural_bounds=(("curvature", 0.0), ("curvature", 1.0)),
    )
