r"""What held-out rows show of an attack: that it reached a level, or that it stayed near another.

Every attack of a bench scores the same n rows under the same s seeds. With a the scores of the
attack, u those of the attack that decides on the undefended model and r those of the reference (a
number where the reference is guessing), the way from the reference to the undefended model is cut
at fractions f, and

    level f is reached where the lower bound of   mean(a - (1 - f) r - f u)   is 0 or more,
    an attack is near the reference where the upper bound of   mean(a - r)   is `MARGIN` or less.

Rows are paired, so what is hard for everybody does not widen the bounds, and what is not known of u
and r does. Intervals are those of `jaximm.measures.intervals`, two-sided at 95 %: each of the two
statements is wrong in at most 2.5 % of cases for one attack that is looked at once. For many
attacks that are looked at more than once see `jaximm.measures.few_rows`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaximm.measures.intervals import Interval, paired_difference, two_level

MARGIN = 0.03
"""Accuracy, or R^2, above the reference or above guessing that is called no more than it."""

FRACTIONS = (0.25, 0.5, 0.75)
"""Of the way from the reference to the undefended model, below that which counts as broken."""

HALF = 0.5
"""An attack that surely gets so far, and does not surely stay below what counts as broken, breaks a
model: rows that cannot tell 0.8 of the way from 0.9 are no defence."""


class Way(NamedTuple):
    """From what the reference reaches to what the undefended model gives.

    Attributes:
      low: scores of the reference, [s, n], or the quality of guessing.
      high: scores of the attack that decides on the undefended model, [s, n].
    """

    low: Float[np.ndarray, "s n"] | float
    high: Float[np.ndarray, "s n"]

    def threshold(self, fraction: float) -> float:
        """The quality at a fraction of the way; NaN where a score is not finite."""
        return float((1 - fraction) * np.mean(self.low) + fraction * np.mean(self.high))

    def beyond(self, scores: Float[np.ndarray, "s n"], fraction: float) -> Interval:
        """Interval of how far an attack is above that point: reached where `lower` >= 0."""
        shape = np.broadcast_shapes(np.shape(scores), self.high.shape)
        point = (1 - fraction) * np.asarray(self.low) + fraction * self.high
        return paired_difference(np.broadcast_to(scores, shape), np.broadcast_to(point, shape))


def above(scores: Float[np.ndarray, "s n"], low: Float[np.ndarray, "s n"] | float) -> Interval:
    """Interval of how far an attack is above the reference, or above guessing."""
    if np.ndim(low) == 0:
        interval = two_level(scores)
        return Interval(*(bound - float(low) for bound in interval))
    shape = np.broadcast_shapes(np.shape(scores), np.shape(low))
    return paired_difference(np.broadcast_to(scores, shape), np.broadcast_to(low, shape))


def rows_needed(found: Interval, rows: int) -> int | None:
    """About how many rows would put `found`, of `above` from so many, below `MARGIN`.

    A half-width falls with the root of the number of rows, at best; None where the mean itself is
    not below the margin, or nothing is known.

    >>> rows_needed(Interval(0.0, -0.06, 0.06), 100)
    400
    >>> rows_needed(Interval(0.04, 0.0, 0.08), 100) is None
    True
    """
    room, half = MARGIN - max(found.mean, 0.0), found.upper - found.mean
    if not (math.isfinite(half) and room > 0):
        return None
    return math.ceil(rows * max(half / room, 1.0) ** 2 - 1e-9)
