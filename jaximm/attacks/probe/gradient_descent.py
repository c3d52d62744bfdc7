"""Gradient descent on a linear probe: three rules for the step, one family.

    w <- w - eta g(w),   g(w) = X^T (X w - y) / n + penalty w

- `gd`: eta = 1 / h_max, the safe textbook step;
- `gd_best_step`: a grid around eta = 2 / (h_max + h_min+), the best fixed step for the error;
- `gd_line_search`: eta = (g . g) / (g . H g), exact along the gradient (Cauchy's steepest descent).

With a fixed step every error component is multiplied by (1 - eta h_i) a step, so step t is known
in closed form and a million steps cost what one does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights, inner, per_row

SOURCE = (
    "Nocedal and Wright (2006), Numerical Optimization, section 3.3, "
    "https://doi.org/10.1007/978-0-387-40065-5"
)

POWER_ITERATIONS = 20
"""Gradient-sized products that the cost model charges for an estimate of the extreme curvature."""


class State(NamedTuple):
    """The weights are all there is to carry."""

    weights: Weights


def init(problem: ProbeProblem, hyper: Hyper) -> State:
    """Start at the problem's initial weights."""
    del hyper
    return State(problem.initial_weights)


def _step_safe(problem: ProbeProblem, hyper: Hyper):
    """step_scale / h_max."""
    return hyper["step_scale"] / problem.largest


def _step_best(problem: ProbeProblem, hyper: Hyper):
    """step_scale * 2 / (h_max + h_min+)."""
    return hyper["step_scale"] * 2.0 / (problem.largest + problem.smallest)


def update_safe(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step of `gd`."""
    return State(state.weights - _step_safe(problem, hyper) * problem.gradient(state.weights))


def update_best(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step of `gd_best_step`."""
    return State(state.weights - _step_best(problem, hyper) * problem.gradient(state.weights))


def update_line_search(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step of `gd_line_search`."""
    del hyper
    gradient = problem.gradient(state.weights)
    return State(state.weights + exact_step(problem, gradient, -gradient) * -gradient)


def exact_step(problem: ProbeProblem, gradient, direction) -> Float[Array, ""]:
    """Minimiser of the loss along `direction`: -(g . p) / (p . H p), 0 where p . H p is 0."""
    curvature = inner(direction, problem.hvp(direction))
    safe = jnp.where(curvature > 0, curvature, 1.0)
    return jnp.where(curvature > 0, -inner(gradient, direction) / safe, 0.0)


def errors_after(
    problem: ProbeProblem, step_size: Float[Array, ""], step: Int[Array, ""]
) -> Weights:
    """(1 - eta h)^t times the error coefficients: fixed-step gradient descent in closed form."""
    product = step_size * problem.eigenvalues
    # log1p keeps 1 - eta h exact to relative rounding where eta h is tiny and t is huge.
    below = jnp.log1p(-jnp.where(product < 1, product, 0.0))
    above = jnp.log(jnp.where(product > 1, product - 1.0, 1.0))
    log_factor = jnp.where(product < 1, below, above)
    exponent = step.astype(problem.eigenvalues.dtype)
    at_one = jnp.where(step == 0, 1.0, 0.0).astype(exponent.dtype)
    magnitude = jnp.where(product == 1, at_one, jnp.exp(exponent * log_factor))
    factor = jnp.where((product > 1) & (step % 2 == 1), -magnitude, magnitude)
    errors = problem.error_coefficients
    factor = per_row(factor, errors)
    return jnp.where(errors == 0, 0.0, factor * errors)  # not inf * 0 in a diverging direction


def _errors_safe(problem, hyper, step):
    return errors_after(problem, _step_safe(problem, hyper), step)


def _errors_best(problem, hyper, step):
    return errors_after(problem, _step_best(problem, hyper), step)


def first_order_cost(n: int, d: int) -> Cost:
    """A gradient a step; POWER_ITERATIONS of them beforehand to learn h_max."""
    setup = POWER_ITERATIONS * 4.0 * n * d
    return Cost(setup=setup, step=4.0 * n * d + 2.0 * d, setup_shared=setup)


def line_search_cost(n: int, d: int) -> Cost:
    """A gradient and the curvature |X p|^2 along it (2 n d more) a step."""
    return Cost(setup=0.0, step=6.0 * n * d + 2.0 * n + 4.0 * d)


def gd(*, step_scales: Values = (1.0,)) -> Attack:
    """Gradient descent with the step 1 / h_max.

    Args:
      step_scales: steps tried, in units of 1 / h_max, > 0. Above 2 it diverges.
    """
    return Attack(
        init=init,
        update=update_safe,
        kind="first-order",
        title="gradient descent",
        source=SOURCE,
        traits=frozenset({"textbook", "plain_descent"}),
        flops=first_order_cost,
        grid=grid(step_scale=(step_scales, "(0, inf)")),
        rotation_equivariant=True,
        errors_at=_errors_safe,
    )


def gd_best_step(*, step_scales: Values = (0.25, 0.5, 0.75, 0.9, 0.97, 1.0, 1.03)) -> Attack:
    """Gradient descent with the best fixed step of a grid around 2 / (h_max + h_min).

    Args:
      step_scales: steps tried, in units of 2 / (h_max + h_min+), > 0. The last one diverges when
        kappa > 70, so that the best is inside the grid.
    """
    return Attack(
        init=init,
        update=update_best,
        kind="first-order",
        title="gradient descent, best step",
        source=SOURCE,
        knows="both ends of the spectrum",
        traits=frozenset({"plain_descent", "plain_user"}),
        flops=first_order_cost,
        grid=grid(step_scale=(step_scales, "(0, inf)")),
        rotation_equivariant=True,
        errors_at=_errors_best,
    )


def gd_line_search() -> Attack:
    """Gradient descent with the exact step along each gradient."""
    return Attack(
        init=init,
        update=update_line_search,
        kind="first-order",
        title="gradient descent, line search",
        source=SOURCE,
        traits=frozenset({"plain_descent"}),
        flops=line_search_cost,
        rotation_equivariant=True,
    )
