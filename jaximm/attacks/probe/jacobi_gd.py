"""Gradient descent after dividing every feature by its root mean square (Jacobi scaling).

    w <- w - eta D^{-1} g(w),   D = diag(H),   eta = step_scale / h_max(D^{-1/2} H D^{-1/2})

The cheapest preconditioner there is: columns are brought to one scale, but not centred, since
these probes have no intercept (features with a mean far from zero stay ill-conditioned by it). It
undoes conditioning that lies along the axes and none that has been rotated away from them, so it
runs in the original axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.probe.gradient_descent import POWER_ITERATIONS
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights, per_row

SOURCE = (
    "van der Sluis (1969), Condition numbers and equilibration of matrices, "
    "https://doi.org/10.1007/BF02165096"
)


class State(NamedTuple):
    """Weights and the step of each weight, eta / D_ii."""

    weights: Weights
    rates: Float[Array, "d"]


def init(problem: ProbeProblem, hyper: Hyper) -> State:
    """Scale by the diagonal; a feature that is zero everywhere keeps a rate of 0."""
    if problem.is_diagonal:
        raise ValueError("Jacobi scaling depends on the axes: give the problem in its own axes.")
    diagonal = jnp.diagonal(problem.hessian)
    scale = jnp.where(diagonal > 0, 1.0 / jnp.where(diagonal > 0, diagonal, 1.0), 0.0)
    root = jnp.sqrt(scale)
    largest = jnp.linalg.eigvalsh(root[:, None] * problem.hessian * root[None, :])[-1]
    rates = hyper["step_scale"] * scale / jnp.where(largest > 0, largest, 1.0)
    return State(problem.initial_weights, rates)


def update(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step."""
    del hyper
    gradient = problem.gradient(state.weights)
    weights = state.weights - per_row(state.rates, gradient) * gradient
    return State(weights, state.rates)


def jacobi_cost(n: int, d: int) -> Cost:
    """Energies of the columns (2 n d) and POWER_ITERATIONS products beforehand; then gradients."""
    setup = 2.0 * n * d + POWER_ITERATIONS * 4.0 * n * d
    return Cost(setup=setup, step=4.0 * n * d + 2.0 * d, setup_shared=setup)


def jacobi_gd(*, step_scales: Values = (0.5, 1.0, 1.5, 1.8, 1.95, 2.05)) -> Attack:
    """Gradient descent after scaling every feature to unit energy.

    Args:
      step_scales: steps tried, in units of 1 / h_max of the scaled Hessian, > 0. The default
        grid ends beyond 2, where it diverges.
    """
    return Attack(
        init=init,
        update=update,
        kind="preconditioned",
        title="Jacobi-scaled gradient descent",
        source=SOURCE,
        traits=frozenset({"preconditions"}),
        flops=jacobi_cost,
        grid=grid(step_scale=(step_scales, "(0, inf)")),
    )
