"""What fitting the attacked rows takes the fastest cell of a grid: steps, whatever they are worth.

Where an assessment chooses cells on selection rows and reports quality on others, this is the cost
of the optimisation itself, on the rows that are attacked: the steps that conditioning is to raise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaximm.attacks.grid import Hyper, at_edge
from jaximm.attacks.probe.loop import AttackTrace
from jaximm.attacks.probe.problem import TARGETS, Attack
from jaximm.records.files import plain
from jaximm.records.result import TARGETS as TARGET_NAMES

GOAL = TARGET_NAMES.index("1e-2")
"""Place in TARGETS of the excess loss that the fastest cell reaches first."""


def fastest_cell(trace: AttackTrace) -> int:
    """The cell that fits fastest from the first seed.

    Order: whether it misses a relative excess loss of 1e-2, steps to it, final excess (differences
    below 1e-10 are rounding and do not count), and the earlier cell.
    """
    hits = np.asarray(trace.steps_to_loss_gap)[:, 0, GOAL]
    final = np.asarray(trace.final_relative_excess_loss, np.float64)[:, 0]
    final = np.where(np.isfinite(final), np.maximum(final, 1e-10), np.inf)
    return min(range(len(hits)), key=lambda cell: (hits[cell] < 0, hits[cell], final[cell]))


def fit_of(attack: Attack, trace: AttackTrace, cells: Sequence[Hyper] | None = None) -> dict:
    """The `fit` of a row of an assessment: what its fastest cell takes from the first seed.

    Args:
      attack: the attacker.
      trace: of the cells.
      cells: that were run; those of the attacker if None.

    Returns:
      Plain values: hyper-parameters of the cell and whether they are at the edge of the grid, steps
      to each of `TARGETS` in relative excess loss and in relative parameter error (-1 where it is
      not reached within the budget), the curves of both, whether it diverged, and whether its loss
      was still falling.
    """
    cells = tuple(cells if cells is not None else attack.grid) or ({},)
    cell = fastest_cell(trace)

    def of(values: ArrayLike):
        return plain(np.asarray(values)[cell, 0])

    return {
        "hyper_parameters": {key: float(value) for key, value in cells[cell].items()},
        "edge_of_grid": at_edge(attack, cells, cell),
        "steps_to_loss_gap": _named(of(trace.steps_to_loss_gap)),
        "steps_to_parameter_error": _named(of(trace.steps_to_parameter_error)),
        "final_relative_excess_loss": of(trace.final_relative_excess_loss),
        "diverged": of(trace.diverged),
        "still_falling": of(trace.still_falling),
        "curve": {
            "step": plain(np.asarray(trace.step)),
            "relative_excess_loss": of(trace.relative_excess_loss),
            "relative_parameter_error": of(trace.relative_parameter_error),
        },
    }


def _named(steps: Sequence[int]) -> dict[str, int]:
    """Steps to TARGETS under their names."""
    assert len(steps) == len(TARGETS)
    return dict(zip(TARGET_NAMES, steps, strict=True))
