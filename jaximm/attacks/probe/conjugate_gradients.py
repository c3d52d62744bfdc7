"""Linear conjugate gradients on H w = b: the best any Krylov-span attacker can do at each step.

    alpha = (r . r) / (p . H p),  w <- w + alpha p,  r <- r - alpha H p,
    beta = (r' . r') / (r . r),   p <- r' + beta p

in plain floating point, as an attacker would run it: the residual is updated, not recomputed,
and nothing is reorthogonalised, so for large kappa it needs more than rank(X) steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, grid
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights, inner

SOURCE = (
    "Hestenes and Stiefel (1952), Methods of conjugate gradients for solving linear systems, "
    "https://doi.org/10.6028/jres.049.044"
)


class State(NamedTuple):
    """Weights, residual, direction and r . r."""

    weights: Weights
    residual: Weights
    direction: Weights
    square: Float[Array, ""]


def init(problem: ProbeProblem, hyper: Hyper) -> State:
    """The first direction is the residual."""
    del hyper
    residual = -problem.gradient(problem.initial_weights)
    return State(problem.initial_weights, residual, residual, inner(residual, residual))


def update(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step; at an exact zero of the residual it stays where it is."""
    product = problem.hvp(state.direction)
    curvature = inner(state.direction, product)
    moves = (curvature > 0) & (state.square > 0)
    alpha = jnp.where(moves, state.square / jnp.where(moves, curvature, 1.0), 0.0)
    weights = state.weights + alpha * state.direction
    residual = jnp.where(
        hyper["recompute_residual"] > 0,
        -problem.gradient(weights),
        state.residual - alpha * product,
    )
    square = inner(residual, residual)
    beta = jnp.where(moves, square / jnp.where(moves, state.square, 1.0), 0.0)
    return State(weights, residual, residual + beta * state.direction, square)


def conjugate_gradients_cost(n: int, d: int) -> Cost:
    """One product with X and one with X^T a step; the first residual beforehand."""
    return Cost(setup=2.0 * n * d, step=4.0 * n * d + 10.0 * d)


def recomputed_cost(n: int, d: int) -> Cost:
    """The same with a fresh gradient at each step."""
    return Cost(setup=2.0 * n * d, step=8.0 * n * d + 10.0 * d)


def conjugate_gradients(*, recompute_residual: bool = False) -> Attack:
    """Conjugate gradients in plain floating point.

    Args:
      recompute_residual: take r = b - H w afresh at each step (one more product) instead of
        updating it.
    """
    return Attack(
        init=init,
        update=update,
        kind="krylov",
        title="conjugate gradients",
        source=SOURCE,
        flops=recomputed_cost if recompute_residual else conjugate_gradients_cost,
        grid=grid(recompute_residual=((float(recompute_residual),), "[0, 1]")),
        rotation_equivariant=True,
    )
