"""L-BFGS with the exact step, by the two-loop recursion.

    p = -B g  with B built from the last m pairs  s = w' - w,  y = g' - g = H s,
    w <- w + alpha p,   alpha = -(g . p) / (p . H p)

On a quadratic, with exact steps and exact arithmetic, it walks the path of conjugate gradients
whatever its memory; what a longer memory buys is that rounding no longer spoils that path, so
with m >= rank(X) it ends in about rank(X) steps where plain conjugate gradients does not.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.probe.gradient_descent import exact_step
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights, inner

SOURCE = (
    "Nocedal and Wright (2006), Numerical Optimization, algorithm 7.4, "
    "https://doi.org/10.1007/978-0-387-40065-5"
)


class State(NamedTuple):
    """Weights, gradient, and the pairs as flat vectors, oldest first (rho = 0: no pair yet)."""

    weights: Weights
    gradient: Weights
    steps: Float[Array, "m p"]
    changes: Float[Array, "m p"]
    rho: Float[Array, "m"]  # 1 / (s . y)


def update(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step; pairs older than hyper["memory"] count as absent."""
    m = state.rho.shape[0]
    age = jnp.arange(m, 0, -1).astype(state.rho.dtype)
    rho = jnp.where(age <= hyper["memory"], state.rho, 0.0)
    direction = -_two_loop(state.gradient.reshape(-1), state.steps, state.changes, rho)
    direction = direction.reshape(state.weights.shape)
    alpha = exact_step(problem, state.gradient, direction)
    weights = state.weights + alpha * direction
    gradient = problem.gradient(weights)
    step, change = alpha * direction, alpha * problem.hvp(direction)
    product = inner(step, change)

    def push(buffer, row):
        return jnp.concatenate([buffer[1:], row[None]])

    newest = jnp.where(product > 0, 1.0 / jnp.where(product > 0, product, 1.0), 0.0)
    return State(
        weights,
        gradient,
        push(state.steps, step.reshape(-1)),
        push(state.changes, change.reshape(-1)),
        push(state.rho, newest),
    )


def _two_loop(gradient, steps, changes, rho):
    """B g by the two-loop recursion; pairs with rho = 0 are skipped."""

    def backward(q, pair):
        step, change, weight = pair
        coefficient = weight * (step @ q)
        return q - coefficient * change, coefficient

    q, coefficients = jax.lax.scan(backward, gradient, (steps, changes, rho), reverse=True)
    square = changes[-1] @ changes[-1]
    usable = (rho[-1] > 0) & (square > 0)
    scale = 1.0 / jnp.where(usable, rho[-1] * square, 1.0)  # (s . y) / (y . y)

    def forward(r, pair):
        step, change, weight, coefficient = pair
        return r + (coefficient - weight * (change @ r)) * step, None

    return jax.lax.scan(forward, scale * q, (steps, changes, rho, coefficients))[0]


@functools.cache  # the same function object each time, so that jit finds its compiled form again
def _init_for(memory: int):
    """`init` with room for `memory` pairs."""

    def init(problem: ProbeProblem, hyper: Hyper) -> State:
        del hyper
        weights = problem.initial_weights
        pairs = jnp.zeros((memory, weights.size), weights.dtype)
        gradient = problem.gradient(weights)
        return State(weights, gradient, pairs, pairs, jnp.zeros((memory,), weights.dtype))

    return init


@functools.cache
def _cost_for(memory: int):
    """A gradient, a curvature product and 8 m d for the loops, with the largest memory."""

    def cost(n: int, d: int) -> Cost:
        return Cost(setup=4.0 * n * d, step=8.0 * n * d + 8.0 * memory * d)

    return cost


def lbfgs(*, memories: Values = (100, 10)) -> Attack:
    """L-BFGS with exact line search.

    Args:
      memories: numbers of pairs tried, >= 1. The largest sets the size of the state.
    """
    cells = grid(memory=(memories, "whole [1, inf)"))
    largest = int(max(memories))
    return Attack(
        init=_init_for(largest),
        update=update,
        kind="quasi-newton",
        title="L-BFGS",
        source=SOURCE,
        flops=_cost_for(largest),
        grid=cells,
        rotation_equivariant=True,
        natural_bounds=tuple(("memory", float(tried)) for tried in memories),
    )
