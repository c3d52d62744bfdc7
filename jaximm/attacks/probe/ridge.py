"""Ridge regression in closed form: one solve, whatever the condition number.

    w = (H + lam h_max I)^+ b

lam = 0 is the least-squares solution of minimum norm: every target is met in one step. The other
penalties serve held-out rows: `run_suite` lists each one's held-out loss when rows are given, and
`suite.best_held_out_cell` picks by it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaximm.attacks.grid import Hyper, grid_product
from jaximm.attacks.probe.problem import Attack, Cost, ProbeProblem, Weights

SOURCE = (
    "Hoerl and Kennard (1970), Ridge regression, https://doi.org/10.1080/00401706.1970.10488634"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RidgeConfig:
    """Ridge regression in closed form.

    Attributes:
      penalties: in units of h_max, >= 0.
    """

    penalties: tuple[float, ...] = (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def __post_init__(self) -> None:
        check_non_negative("penalties", self.penalties)


def check_non_negative(name: str, values: tuple[float, ...]) -> None:
    """Raise ValueError unless `values` is a non-empty tuple of numbers >= 0."""
    if not values or not all(value >= 0 for value in values):
        raise ValueError(f"{name} must be numbers >= 0, at least one, got {values}.")


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


def ridge(config: RidgeConfig) -> Attack:
    """Ridge regression."""
    return Attack(
        init=init,
        update=update,
        kind="closed-form",
        flops=solve_cost,
        grid=grid_product(penalty=config.penalties),
        rotation_equivariant=True,
        natural_bounds=(("penalty", 0.0),),
    )
