"""Gradient descent after whitening the features.

The attacker multiplies the features by (H + eps h_max I)^{-1/2}, after which the Hessian is the
identity on the row space up to eps, and takes gradient steps of size 1; in the old coordinates

    w <- w - (H + eps h_max I)^+ g(w).

With eps = 0 one step is the solution, whatever the condition number was.
"""

from __future__ import annotations

from typing import NamedTuple

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights

SOURCE = (
    "Kessy, Lewin and Strimmer (2018), Optimal whitening and decorrelation, "
    "https://arxiv.org/abs/1512.00809"
)


class State(NamedTuple):
    """The weights are all there is to carry."""

    weights: Weights


def init(problem: ProbeProblem, hyper: Hyper) -> State:
    """Start at the problem's initial weights."""
    del hyper
    return State(problem.initial_weights)


def update(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """One step."""
    damping = hyper["epsilon"] * problem.largest
    return State(state.weights - problem.solve(problem.gradient(state.weights), damping=damping))


def whitening_cost(n: int, d: int) -> Cost:
    """Covariance, n d^2; its eigen-decomposition, 9 d^3; the product, 2 n d^2; then gradients."""
    setup = 3.0 * n * d**2 + 9.0 * d**3
    return Cost(setup=setup, step=4.0 * n * d + 2.0 * d, setup_shared=setup)


def whitened_gd(*, epsilons: Values = (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1e-1)) -> Attack:
    """Gradient descent with step 1 after whitening the features.

    Args:
      epsilons: damping of the whitening in units of h_max, >= 0.
    """
    return Attack(
        init=init,
        update=update,
        kind="preconditioned",
        title="whitened gradient descent",
        source=SOURCE,
        traits=frozenset({"preconditions", "undoes_defence"}),
        flops=whitening_cost,
        grid=grid(epsilon=(epsilons, "[0, inf)")),
        rotation_equivariant=True,
        natural_bounds=(("epsilon", 0.0),),
    )
