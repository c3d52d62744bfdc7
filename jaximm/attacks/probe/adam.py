"""Adam on a linear probe, full batch, in the original axes.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,
    w <- w - rate * mhat / (sqrt(vhat) + eps)

Adam is a diagonal preconditioner: it undoes ill-conditioning that is aligned with the axes and
little of what is not, so it is never run in the eigenbasis. Rates are in units of the problem's
`weight_scale` and eps in units of the largest entry of X^T y / n, so that the same grid serves
features of any scale. A constant rate stops at a noise ball of about its own size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights

SOURCE = "Kingma and Ba (2015), Adam, algorithm 1, https://arxiv.org/abs/1412.6980"


class State(NamedTuple):
    """Weights, running moments, and the running powers b1^t and b2^t."""

    weights: Weights
    first: Weights
    second: Weights
    first_power: Float[Array, ""]
    second_power: Float[Array, ""]


def init(problem: ProbeProblem, hyper: Hyper) -> State:
    """Zero moments."""
    del hyper
    zeros = jnp.zeros_like(problem.initial_weights)
    one = jnp.ones((), zeros.dtype)
    return State(problem.initial_weights, zeros, zeros, one, one)


def update(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step."""
    gradient = problem.gradient(state.weights)
    b1, b2 = hyper["first_decay"], hyper["second_decay"]
    first = b1 * state.first + (1.0 - b1) * gradient
    second = b2 * state.second + (1.0 - b2) * gradient**2
    first_power, second_power = b1 * state.first_power, b2 * state.second_power
    # The floor is for zero targets, where every gradient is 0 and 0 / 0 would be NaN.
    epsilon = hyper["epsilon"] * jnp.max(jnp.abs(problem.moment))
    epsilon = jnp.maximum(epsilon, jnp.finfo(gradient.dtype).tiny)
    direction = first / (1.0 - first_power)
    direction = direction / (jnp.sqrt(second / (1.0 - second_power)) + epsilon)
    rate = hyper["learning_rate"] * problem.weight_scale
    return State(state.weights - rate * direction, first, second, first_power, second_power)


def adam_cost(n: int, d: int) -> Cost:
    """A gradient and about 14 operations a weight."""
    return Cost(setup=0.0, step=4.0 * n * d + 14.0 * d)


def adam(
    *,
    learning_rates: Values = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 1e1, 1e2),
    first_decays: Values = (0.9,),
    second_decays: Values = (0.999,),
    epsilon: float = 1e-8,
) -> Attack:
    """Adam over five decades of learning rates.

    Args:
      learning_rates: in units of `problem.weight_scale`, > 0.
      first_decays: values of b1 in [0, 1).
      second_decays: values of b2 in [0, 1).
      epsilon: in units of max |X^T y / n|, > 0.
    """
    return Attack(
        init=init,
        update=update,
        kind="adaptive",
        title="Adam",
        source=SOURCE,
        traits=frozenset({"plain_descent", "plain_user"}),
        flops=adam_cost,
        grid=grid(
            learning_rate=(learning_rates, "(0, inf)"),
            first_decay=(first_decays, "[0, 1)"),
            second_decay=(second_decays, "[0, 1)"),
            epsilon=((epsilon,), "(0, inf)"),
        ),
    )
