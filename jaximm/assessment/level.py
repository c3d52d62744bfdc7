"""How hard an assessment tries: steps, seeds, grids."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """How hard attackers try.

    Attributes:
      probes: budgets and grids of the probes: a key of `jaximm.attacks.SUITES`.
      weight_steps: budget of attackers of weights.
      batch_size: rows of a task a step; fewer if a task has fewer.
      select_seeds: on which hyper-parameters are chosen.
      report_seeds: fresh ones, on which the chosen are reported.
      record: points of a curve.
      extensions: how often the sweep of an attacker of weights goes on beyond each end of its grid,
        by the grid's own factor, while what is chosen lies there; so also at both ends, while
        nothing that was tried is better than the model as it came.
      trial: whether a short measured trial decides how many trajectories run at once; otherwise
        all do, of convolutions on a CPU one.
      utility_fraction: an attacked model must keep this part of its utility.
      break_fraction: a model is broken at this part of the way from the reference to the undefended
        model.
      patience: an attacker that breaks the undefended model and not another gets at least this many
        times the steps there that it needed undefended; 1: no more than its budget.
    """

    probes: str
    weight_steps: int
    batch_size: int = 64
    select_seeds: tuple[int, ...] = (0,)
    report_seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    record: int = 16
    extensions: int = 0
    trial: bool = True
    utility_fraction: float = 0.9
    break_fraction: float = 0.9
    patience: float = 10.0

    def __post_init__(self) -> None:
        if set(self.select_seeds) & set(self.report_seeds):
            raise ValueError(
                "seeds that report must be fresh, got "
                f"{sorted(set(self.select_seeds) & set(self.report_seeds))} in both lists."
            )
        for key in ("select_seeds", "report_seeds"):
            seeds = getattr(self, key)
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{key} must differ from each other, got {seeds}.")
        if self.extensions < 0:
            raise ValueError(f"extensions must be >= 0, got {self.extensions}.")
        if not 1 <= self.patience < math.inf:
            raise ValueError(f"patience must be 1 or more and finite, got {self.patience}.")
        for key in ("utility_fraction", "break_fraction"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"{key} must be in (0, 1], got {getattr(self, key)}.")


LEVELS: dict[str, Level] = {
    "quick": Level(probes="quick", weight_steps=60, batch_size=32, trial=False),
    "standard": Level(probes="quick", weight_steps=120, select_seeds=(0, 1)),
    "full": Level(
        probes="standard",
        weight_steps=1000,
        select_seeds=(0, 1, 2),
        report_seeds=tuple(range(101, 111)),
        record=30,
    ),
}
