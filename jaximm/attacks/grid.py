"""What both families of attackers share: cells of hyper-parameters, recorded steps, kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

KINDS = (
    "first-order",
    "momentum",
    "adaptive",
    "krylov",
    "quasi-newton",
    "closed-form",
    "preconditioned",
)
"""What an attacker needs to know: gradients only, ..., or a solve with the whole Hessian."""

MAX_STEPS = 2**30
"""Largest step budget: step counts are int32, and bisection adds two of them."""


Hyper = Mapping[str, Any]
"""Hyper-parameters of one cell: names to scalars; inside init and update they are traced."""


def grid_product(**values: Sequence[float]) -> tuple[dict[str, float], ...]:
    """Every combination of the values of each hyper-parameter, the last name varying fastest.

    >>> grid_product(step=(0.1, 1.0), momentum=(0.9,))
    ({'step': 0.1, 'momentum': 0.9}, {'step': 1.0, 'momentum': 0.9})
    """
    cells: list[dict[str, float]] = [{}]
    for name, choices in values.items():
        cells = [{**cell, name: float(choice)} for cell in cells for choice in choices]
    return tuple(cells)


def recorded_steps(steps: int, *, points: int = 150) -> np.ndarray:
    """The steps at which curves are kept: 0, a log-spaced grid of at most `points`, the budget.

    The step at nine tenths of the budget is among them: "still falling" compares with it.

    >>> recorded_steps(10, points=4)
    array([ 0,  1,  2,  5,  9, 10], dtype=int32)
    """
    grid = np.round(np.geomspace(1, steps, points)).astype(np.int64)
    return np.unique(np.concatenate([[0, _late_step(steps), steps], grid])).astype(np.int32)


def _late_step(steps: int) -> int:
    """Nine tenths of the budget, and before its end."""
    return (9 * steps) // 10


class Bounded(Protocol):
    """An attacker of either family: values at which a hyper-parameter ends by nature."""

    @property
    def natural_bounds(self) -> tuple[tuple[str, float], ...]:
        """Pairs of name and value."""
        ...


def at_edge(attack: Bounded, cells: Sequence[Hyper], chosen: int) -> bool:
    """Whether a chosen hyper-parameter is the least or greatest tried, natural bounds apart."""
    for name, value in cells[chosen].items():
        tried = {cell[name] for cell in cells}
        if len(tried) == 1 or (name, value) in attack.natural_bounds:
            continue
        if value in (min(tried), max(tried)):
            return True
    return False


def check_positive(name: str, values: tuple[float, ...]) -> None:
    """Raise ValueError unless `values` is a non-empty tuple of positive numbers."""
    if not values or not all(value > 0 for value in values):
        raise ValueError(f"{name} must be positive numbers, at least one, got {values}.")
