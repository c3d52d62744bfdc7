"""Ridge regression in closed form: one solve, whatever the condition number.

    w = (H + lam h_max I)^+ b

lam = 0 is the least-squares solution of minimum norm: every target is met in one step. The other
penalties serve other rows: an assessment chooses among them on selection rows.
"""

from __future__ import annotations

from typing import NamedTuple

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights

SOURCE = (
    "Hoerl and Kennard (1970), Ridge regression, https://doi.org/10.1080/00401706.1970.10488634"
)


class State(NamedTuple):
    """The weights are all there is to carry."""

    weights: Weights


def init(problem: ProbeProblem, hyper: Hyper) -> State:
    """Start at the problem's initial weights, which the solve forgets."""
    del hyper
    return State(problem.initial_weights)


def update(state: State, problem: ProbeProblem, hyper: Hyper) -> State:
    """The solve; every later step repeats it."""
    del state
    return State(problem.solve(problem.moment, damping=hyper["penalty"] * problem.largest))


def solve_cost(n: int, d: int) -> Cost:
    """Gram matrix on the smaller side, n d min(n, d); Cholesky, min(n, d)^3 / 3; two solves."""
    m = min(n, d)
    factor = float(n) * d * m + m**3 / 3
    return Cost(setup=0.0, step=factor + 2.0 * m**2 + 4.0 * n * d, step_shared=factor)


def ridge(*, penalties: Values = (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)) -> Attack:
    """Ridge regression in closed form.

    Args:
      penalties: in units of h_max, >= 0.
    """
    return Attack(
        init=init,
        update=update,
        kind="closed-form",
        title="ridge",
        source=SOURCE,
        traits=frozenset({"solves", "undoes_defence"}),
        flops=solve_cost,
        grid=grid(penalty=(penalties, "[0, inf)")),
        rotation_equivariant=True,
        natural_bounds=(("penalty", 0.0),),
    )
