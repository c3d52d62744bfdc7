r"""Reports that are honest about selection: what chose a cell does not score it.

A grid of g cells (attacks, learning rates, settings) is scored on split A by seeds A, and the best
cell is reported. Its score on A is the largest of g noisy numbers, so it is too good: for cells
that are truly equal and have standard error e, by e times the expected largest of g standard
normals (1.6 e for g = 12). The honest number comes from split B by fresh seeds. Fresh examples
alone do not mend it, since a seed that was lucky on A is lucky on B; `simulate_null` measures all
three.

References:
  Cawley and Talbot (2010), On over-fitting in model selection and subsequent selection bias in
  performance evaluation, Journal of Machine Learning Research 11, 2079-2107.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from jaximm.measures.intervals import Interval, two_level

FRESH_SEEDS = 5
"""Seeds on split B that a report needs: Student's t with fewer makes intervals of little use."""


class Honest(NamedTuple):
    """The chosen cell and what it scores where it was not chosen.

    Attributes:
      chosen: index of the cell.
      reported: its score on split B by fresh seeds.
      selected: its mean score on split A: optimistic, for the record.
      optimism: selected - reported.mean; on average positive.
    """

    chosen: int
    reported: Interval
    selected: float
    optimism: float


class NullBias(NamedTuple):
    """What reporting does to cells that are all equal, over simulated repeats.

    Attributes:
      naive: mean of (score of the chosen cell on split A) - (true accuracy).
      same_seeds: the same for fresh examples under the seeds that chose; expectation over examples.
      honest: the same for fresh examples and fresh seeds.
      naive_coverage: part of the repeats in which the interval from split A holds the truth.
      honest_coverage: the same for split B.
    """

    naive: float
    same_seeds: float
    honest: float
    naive_coverage: float
    honest_coverage: float


def choose(selection: Float[np.ndarray, "g s"]) -> int:
    """The cell with the highest mean over seeds A on split A.

    A cell whose mean is not finite counts as -inf (one seed that failed is enough); of equal cells
    the earlier wins, so where no mean is finite the first does.

    >>> choose(np.array([[0.5, 0.5], [0.9, np.nan], [0.6, 0.8], [0.7, 0.7]]))
    2

    Args:
      selection: [g, s], higher is better: a score of each cell by each seed, mean over split A.

    Raises:
      ValueError: not two axes, or no cell or no seed.
    """
    selection = _grid(selection)
    return int(np.argmax(_finite_means(selection)))


class Cheapest(NamedTuple):
    """Where a level costs least on selection rows: a cell, and the place at which it stops."""

    cell: int
    stop: int


def least_cost(
    quality: Float[np.ndarray, "g r"], flops: Float[np.ndarray, "r"], threshold: float
) -> Cheapest | None:
    """The cheapest point of any cell at or above a threshold; of equal cost, the higher quality.

    An attacker pays for the cell that gets there first, which need not be the one that ends
    highest. The threshold is to hold a margin for what selection rows cannot tell apart.

    >>> quality = np.array([[0.5, 0.6, 0.95], [0.5, 0.92, 0.9]])
    >>> least_cost(quality, np.array([0.0, 18.0, 63.0]), 0.9)
    Cheapest(cell=1, stop=1)
    >>> least_cost(quality, np.array([0.0, 18.0, 63.0]), 0.99) is None
    True

    Args:
      quality: [g, r], mean over seeds A on split A; what is not finite counts as never there.
      flops: [r], what each point costs, never decreasing.
      threshold: in the unit of the quality; NaN is never reached.
    """
    with np.errstate(invalid="ignore"):
        met = np.isfinite(quality) & (quality >= threshold)
    if not met.any():
        return None
    stop = int(np.flatnonzero(met.any(axis=0))[0])
    first = np.flatnonzero(np.asarray(flops) == np.asarray(flops)[stop])
    inside = np.where(met[:, first], quality[:, first], -np.inf)
    cell, place = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return Cheapest(int(cell), int(first[place]))


def honest(
    selection: Float[np.ndarray, "g s_a"],
    reported: Float[np.ndarray, "s_b n"],
    *,
    level: float = 0.95,
    allow_few: bool = False,
) -> Honest:
    """Chooses on split A, reports on split B with a two-level interval.

    Numbers cannot show that the seeds are fresh and the splits disjoint: the caller answers for it.

    Args:
      selection: [g, s_a] as in `choose`.
      reported: [s_b, n], scores of examples of split B under fresh seeds, of the cell that `choose`
        picks.
      level: of confidence, in (0, 1).
      allow_few: accept fewer than `FRESH_SEEDS` fresh seeds (smoke tests); one seed gives an
        interval over examples only.

    Returns:
      `reported` is NaN throughout where a score is not finite; `selected` is -inf where no cell has
      a finite mean.

    Raises:
      ValueError: wrong shapes or level, or too few fresh seeds.
    """
    selection = _grid(selection)
    interval = two_level(reported, level=level)
    seeds = np.shape(reported)[0]
    if seeds < FRESH_SEEDS and not allow_few:
        raise ValueError(
            f"a report needs {FRESH_SEEDS} fresh seeds or more, got {seeds}; run more, or pass "
            "allow_few=True and say so beside the number."
        )
    chosen = choose(selection)
    selected = float(_finite_means(selection)[chosen])
    return Honest(chosen, interval, selected, optimism=selected - interval.mean)


def simulate_null(
    *,
    cells: int = 12,
    accuracy: float = 0.8,
    seeds_a: int = 3,
    examples_a: int = 200,
    seeds_b: int = FRESH_SEEDS,
    examples_b: int = 400,
    seed_sd: float = 0.01,
    example_correlation: float = 0.3,
    level: float = 0.95,
    repeats: int = 1000,
    seed: int = 0,
) -> NullBias:
    """Bias and coverage of naive and honest reports when no cell is better than another.

    Scores are those of `draw_correct`; the cells share the examples of split A, not their seeds'
    luck. The honest report scores the chosen cell alone, as the protocol does.

    Args:
      cells: g.
      accuracy: of every cell, over all seeds and examples.
      seeds_a: that choose.
      examples_a: of split A.
      seeds_b: fresh ones.
      examples_b: of split B.
      seed_sd: standard deviation of accuracy between seeds.
      example_correlation: of the difficulty of examples, 0 for equally hard ones.
      level: of confidence.
      repeats: of the whole protocol.
      seed: of the simulation.

    Raises:
      ValueError: as `draw_correct` and `two_level`.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(repeats):
        split_a, split_b = (
            draw_correct(
                rng,
                shape,
                accuracy=accuracy,
                seed_sd=seed_sd,
                example_correlation=example_correlation,
            )
            for shape in ((1, cells, seeds_a, examples_a), (1, 1, seeds_b, examples_b))
        )
        selection = np.mean(split_a.scores[0], axis=-1)
        report = honest(selection, split_b.scores[0, 0], level=level, allow_few=True)
        naive = two_level(split_a.scores[0, report.chosen], level=level)
        rows.append(
            (
                naive.mean - accuracy,
                np.mean(split_a.by_seed[0, report.chosen]) - accuracy,
                report.reported.mean - accuracy,
                naive.lower <= accuracy <= naive.upper,
                report.reported.lower <= accuracy <= report.reported.upper,
            )
        )
    return NullBias(*(float(value) for value in np.mean(rows, axis=0)))


class Drawn(NamedTuple):
    """Simulated correctness, and the accuracy that each seed has over all examples."""

    scores: Float[np.ndarray, "r g s n"]
    by_seed: Float[np.ndarray, "r g s"]


def draw_correct(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int],
    *,
    accuracy: float,
    seed_sd: float = 0.0,
    example_correlation: float = 0.0,
) -> Drawn:
    r"""Correctness (0 or 1) of r repeats of g cells under s seeds on n examples.

    A seed's accuracy p is Beta distributed, of mean `accuracy` and standard deviation `seed_sd`. It
    is right about an example where sqrt(rho) v + sqrt(1 - rho) e < Phi^-1(p), v and e standard
    normal, v of the example (the same for all cells and seeds of a repeat): rho is how far seeds
    agree about which examples are hard, and any rho leaves p and the mean as they are.

    Args:
      rng: drawn from, and so moved on.
      shape: (r, g, s, n).
      accuracy: in (0, 1).
      seed_sd: in [0, sqrt(accuracy (1 - accuracy))).
      example_correlation: rho in [0, 1].

    Raises:
      ValueError: an argument outside these ranges.
    """
    largest = accuracy * (1 - accuracy)
    if not 0 < accuracy < 1 or not 0 <= seed_sd**2 < largest:
        raise ValueError(
            "accuracy must be in (0, 1) and seed_sd in [0, sqrt(accuracy (1 - accuracy))), "
            f"got {accuracy} and {seed_sd}."
        )
    if not 0 <= example_correlation <= 1:
        raise ValueError(f"example_correlation must be in [0, 1], got {example_correlation}.")
    r, g, s, n = shape
    by_seed = np.full((r, g, s), accuracy)
    if seed_sd > 0:
        size = largest / seed_sd**2 - 1
        by_seed = rng.beta(accuracy * size, (1 - accuracy) * size, (r, g, s))
    easiness = rng.standard_normal((r, 1, 1, n)) * np.sqrt(example_correlation)
    rest = rng.standard_normal(shape) * np.sqrt(1 - example_correlation)
    right = easiness + rest < special.ndtri(by_seed)[..., None]
    return Drawn(right.astype(np.float64), by_seed)


def _finite_means(selection) -> np.ndarray:
    """Mean of each cell, -inf where it is not finite."""
    with np.errstate(invalid="ignore"):  # inf - inf in a cell that has both
        means = np.mean(selection, axis=1)
    return np.where(np.isfinite(means), means, -np.inf)


def _grid(selection) -> np.ndarray:
    """Scores of cells in float64, checked."""
    selection = np.asarray(selection, np.float64)
    if selection.ndim != 2 or selection.size == 0:
        raise ValueError(
            f"selection must have shape (cells, seeds), none empty, got shape {selection.shape}."
        )
    return selection
