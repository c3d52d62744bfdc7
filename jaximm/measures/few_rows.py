r"""How often few held-out rows call an absent model broken, and how wrong the cheapest attacker is.

Simulated is what decides a verdict. Nothing of the harmful task is in the model: every attack of it
guesses, so that its rows are right with probability c each, the chance of the bench. The undefended
model gives c + g. An attack breaks the model if it seems to reach 0.9 of the way between; the model
is called broken if any of its A attacks does in any of `LOOKS` looks. Two rules are compared:

  mean   as the assessment once did: the mean is at the threshold or above, anywhere on a curve of
         r points, which knows where to stop
  lower  as `jaximm.measures.evidence` says, at the stop that was chosen on other rows and at a
         cheaper one; nothing is judged where the undefended model is not surely above guessing

Rows, threshold and attackers are random: c is 1 / k for 2 to 10 classes, g uniform up to 1 - c, A 1
to 40. Seeds of an attack are taken to agree on every row, as those of closed forms do: seeds that
differ average more out. Attacks err independently of each other, which they do not: the more alike
they are, the fewer there are.

The cheapest attacker: A attackers that all reach the threshold at the same point of their curves.
The least of A noisy costs is too small; how often, and by how much, is `Curse`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special

from jaximm.measures.evidence import MARGIN

FEWEST_ROWS = 20
"""Fewer held-out rows of a task judge nothing; see `python benchmarks/bench_few_rows.py`."""

ALLOWED = 0.05
"""Share of absent models that may be called broken."""

MOST_ATTACKERS, POINTS, LOOKS, FRACTION = 40, 16, 2, 0.9
"""FRACTION: of the rule of the mean, and of the cost of the cheapest attacker."""


class FalseAlarms(NamedTuple):
    """Of absent models: the share that either rule calls broken, and that nothing was judged of.

    `lower` is of those that were judged: the undefended model is surely above guessing.
    """

    rows: int
    mean: float
    lower: float
    unjudged: float


class Curse(NamedTuple):
    """Of A equal attackers: how often the cheapest is credited with less than the true cost.

    `mean_points` and `lower_points`: by how many recorded points, on average where it is.
    """

    rows: int
    mean: float
    mean_points: float
    lower: float
    lower_points: float
    unbroken: float  # by the rule of the lower bound


class _Cases(NamedTuple):
    """Random benches, [repeats] each."""

    chance: np.ndarray
    gap: np.ndarray
    attackers: np.ndarray
    right: np.ndarray  # rows of the undefended model's attack that are right


def _cases(rng: np.random.Generator, repeats: int, rows: int) -> _Cases:
    chance = 1 / rng.integers(2, 11, repeats)
    gap = rng.uniform(0, 1 - chance)
    attackers = rng.integers(1, MOST_ATTACKERS + 1, repeats)
    return _Cases(chance, gap, attackers, rng.binomial(rows, chance + gap))


def _judged(cases: _Cases, rows: int) -> np.ndarray:
    """Where Wilson's lower bound of the undefended model is above guessing by the margin."""
    p, z2 = cases.right / rows, float(special.ndtri(0.975)) ** 2 / rows
    lower = (p + z2 / 2 - np.sqrt(z2 * p * (1 - p) + z2**2 / 4)) / (1 + z2)
    return lower > cases.chance + MARGIN


class _Attacks(NamedTuple):
    """Rows that attacks get right, of those that the undefended model's gets right, and others."""

    both: np.ndarray
    alone: np.ndarray


def _drawn(rng, cases: _Cases, rows: int, accuracy: np.ndarray, shape: tuple[int, ...]) -> _Attacks:
    """Attacks [repeats, *shape] that err independently of the undefended model's."""
    right = cases.right.reshape(-1, *[1] * len(shape))
    size = (len(cases.right), *shape)
    return _Attacks(rng.binomial(right, accuracy, size), rng.binomial(rows - right, accuracy, size))


def _beyond(
    attacks: _Attacks, cases: _Cases, rows: int, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half-width of `Way.beyond`, of one seed."""
    extra = [1] * (attacks.both.ndim - 1)
    right, chance = (part.reshape(-1, *extra) for part in (cases.right, cases.chance))
    # d = a - f u - (1 - f) c takes four values.
    low, f = (1 - fraction) * chance, fraction
    counts = (
        (attacks.both, 1 - f), (right - attacks.both, -f),
        (attacks.alone, 1.0), (rows - right - attacks.alone, 0.0),
    )  # fmt: skip
    mean = sum(count * value for count, value in counts) / rows
    square = sum(count * value**2 for count, value in counts) / rows
    variance = (square - mean**2) * rows / (rows - 1)
    half = special.stdtrit(rows - 1, 0.975) * np.sqrt(np.maximum(variance, 0.0) / rows)
    return mean - low, half


def false_alarms(
    rows: int, *, fraction: float = FRACTION, repeats: int = 4000, seed: int = 0
) -> FalseAlarms:
    """How often an absent model is called broken on so many held-out rows.

    Args:
      rows: n >= 2.
      fraction: of the way to the undefended model that is called broken.
      repeats: benches.
      seed: of the simulation.

    Raises:
      ValueError: fewer rows.
    """
    _check(rows)
    rng = np.random.default_rng(seed)
    cases = _cases(rng, repeats, rows)
    there = np.arange(MOST_ATTACKERS)[None] < cases.attackers[:, None]
    chance = cases.chance[:, None, None]
    guesses = rng.binomial(rows, chance, (repeats, MOST_ATTACKERS, POINTS)) / rows
    threshold = cases.chance + fraction * (cases.right / rows - cases.chance)
    naive = (guesses.max(axis=2) >= threshold[:, None]) & there
    naive &= (cases.right / rows > cases.chance)[:, None]
    looks = _drawn(rng, cases, rows, chance, (MOST_ATTACKERS, LOOKS))
    mean, half = _beyond(looks, cases, rows, fraction)
    sure = (mean >= half).any(axis=2) & there
    judged = _judged(cases, rows)
    return FalseAlarms(
        rows,
        mean=float(np.mean(naive.any(axis=1))),
        lower=float(np.mean(sure[judged].any(axis=1))) if judged.any() else 0.0,
        unjudged=float(np.mean(~judged)),
    )


def cheapest(
    rows: int, *, selection_rows: int | None = None, repeats: int = 1000, seed: int = 0
) -> Curse:
    """How far the cheapest of equal attackers is credited with less than it costs.

    Curves rise in a straight line from guessing to what the undefended model gives, at a point of
    `POINTS` that is random, and stay there. The rule of the lower bound takes the first point that
    is above the threshold by the margin on selection rows, if held-out rows confirm it.

    Args:
      rows: held out, n >= 2.
      selection_rows: as many if None.
      repeats: benches.
      seed: of the simulation.

    Raises:
      ValueError: fewer rows.
    """
    chosen_on = rows if selection_rows is None else selection_rows
    _check(rows)
    _check(chosen_on)
    rng = np.random.default_rng(seed)
    cases = _cases(rng, repeats, rows)
    cases = _Cases(*(part[_judged(cases, rows)] for part in cases))
    count = len(cases.chance)
    there = np.arange(MOST_ATTACKERS)[None] < cases.attackers[:, None]
    full = rng.integers(4, POINTS, count)
    rise = np.minimum(np.arange(POINTS)[None] / full[:, None], 1.0)
    accuracy = cases.chance[:, None] + cases.gap[:, None] * rise
    true = np.argmax(rise >= FRACTION, axis=1)
    attacks = _drawn(rng, cases, rows, accuracy[:, None], (MOST_ATTACKERS, POINTS))
    mean, half = _beyond(attacks, cases, rows, FRACTION)
    selected = rng.binomial(chosen_on, accuracy[:, None], mean.shape) / chosen_on
    best = rng.binomial(chosen_on, cases.chance + cases.gap) / chosen_on
    level = cases.chance + FRACTION * (best - cases.chance)
    margin = half[..., -1] * (rows / chosen_on) ** 0.5
    passes = selected - level[:, None, None] >= margin[..., None]
    first = np.argmax(passes, axis=2)
    sure = np.take_along_axis(mean - half, first[..., None], axis=2)[..., 0] >= 0
    credited = np.where(passes.any(axis=2) & sure & there, first, POINTS).min(axis=1)
    over = mean >= 0
    naive = np.where(over.any(axis=2) & there, np.argmax(over, axis=2), POINTS).min(axis=1)

    def early(places) -> tuple[float, float]:
        short = true - places
        return float(np.mean(short > 0)), float(np.mean(short[short > 0])) if any(
            short > 0
        ) else 0.0

    return Curse(rows, *early(naive), *early(credited), float(np.mean(credited == POINTS)))


def shown_absent(
    rows: int, *, classes: int = 2, above: float = 0.0, repeats: int = 4000, seed: int = 0
) -> float:
    """How often one attack is said to be no more than guessing + `MARGIN`.

    Its seeds agree on every row, as those of a closed form do.

    Args:
      rows: held out, n >= 2.
      classes: equally frequent; guessing is right about one in so many.
      above: what the attack truly has beyond guessing: 0 if nothing is left.
      repeats: attacks.
      seed: of the simulation.

    Raises:
      ValueError: fewer rows.
    """
    _check(rows)
    rng, chance = np.random.default_rng(seed), 1 / classes
    p = rng.binomial(rows, chance + above, repeats) / rows
    z2 = float(special.ndtri(0.975)) ** 2 / rows
    upper = (p + z2 / 2 + np.sqrt(z2 * p * (1 - p) + z2**2 / 4)) / (1 + z2)
    return float(np.mean(upper <= chance + MARGIN))


def _check(rows: int) -> None:
    if rows < 2:
        raise ValueError(f"rows must be 2 or more, got {rows}.")
