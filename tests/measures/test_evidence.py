"""What rows show of an attack, and how many rows and attackers make a false alarm."""

import math

import numpy as np
import pytest

from jaximm.measures import few_rows, selection
from jaximm.measures.cost_to_break import Curve, crossing
from jaximm.measures.evidence import MARGIN, Way, above, rows_needed
from jaximm.measures.intervals import Interval, two_level


def scores(accuracy, rows=400, seeds=5, shift=0):
    right = (np.arange(rows) + shift) % rows < round(accuracy * rows)
    return np.tile(right.astype(float), (seeds, 1))


def test_a_way_is_cut_at_fractions_and_its_ends_are_not_exact():
    way = Way(0.5, scores(0.9))
    assert way.threshold(0.5) == pytest.approx(0.7)
    assert way.beyond(scores(0.9), 0.9).lower > 0  # the undefended attack itself
    # Equal on average to nine tenths, so neither surely there nor surely not.
    found = way.beyond(scores(0.86, shift=20), 0.9)
    assert found.mean == pytest.approx(0.0)
    assert found.lower < 0 < found.upper
    assert way.beyond(scores(0.5), 0.25).upper < 0
    # Rows that are hard for everybody do not widen it; independent ones do.
    widths = [way.beyond(scores(0.88, shift=shift), 0.9) for shift in (0, 200)]
    assert widths[0].upper - widths[0].lower < widths[1].upper - widths[1].lower


def test_a_reference_of_rows_is_paired_and_guessing_is_exact():
    same = above(scores(0.7), scores(0.7))
    assert (same.mean, same.lower < MARGIN, same.upper < MARGIN) == (0.0, True, True)
    guess = above(scores(0.5), 0.5)
    assert guess == pytest.approx([bound - 0.5 for bound in two_level(scores(0.5))])
    assert guess.upper > MARGIN  # 400 rows do not tell
    assert above(scores(0.5, rows=2000), 0.5).upper <= MARGIN
    assert math.isnan(above(np.full((5, 10), np.nan), 0.5).lower)


def test_rows_that_are_needed_are_enough():
    found = above(scores(0.5), 0.5)
    needed = rows_needed(found, 400)
    assert needed is not None
    assert above(scores(0.5, rows=needed + needed % 2), 0.5).upper <= MARGIN + 1e-3
    assert above(scores(0.5, rows=needed // 2 * 2 - 200), 0.5).upper > MARGIN
    assert rows_needed(Interval(math.nan, math.nan, math.nan), 10) is None


def test_the_least_cost_is_that_of_any_cell_and_of_equal_ones_the_better():
    flops = np.array([0.0, 18.0, 18.0, 63.0])
    quality = np.array([[0.5, 0.6, 0.7, 0.99], [0.5, 0.9, 0.92, 0.9], [0.5, np.nan, 0.91, 0.9]])
    assert selection.least_cost(quality, flops, 0.9) == (1, 2)
    assert selection.least_cost(quality, flops, 0.95) == (0, 3)
    assert selection.least_cost(quality, flops, math.nan) is None
    assert selection.least_cost(np.full((2, 4), np.nan), flops, 0.1) is None


def test_a_crossing_lies_between_what_may_and_what_must_be_there():
    curve = Curve(np.array([1.0, 2.0, 4.0, 8.0]), np.array([[0.1, 0.6, 0.7, 0.9]] * 3))
    assert crossing(curve, 0.65, 0.0) == (4.0, 4.0)
    assert crossing(curve, 0.65, 0.1) == (2.0, 8.0)
    assert crossing(curve, 0.65, math.inf) == (1.0, math.inf)
    assert crossing(curve, 0.99, 0.01) == (math.inf, math.inf)
    lost = curve._replace(quality=np.array([[0.1, np.nan, np.nan, np.nan]]))
    assert crossing(lost, 0.05, 0.01) == (1.0, 1.0)
    assert crossing(lost, 0.5, 0.01) == (math.inf, math.inf)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_absent_models_are_called_broken_in_no_more_than_is_allowed(fraction):
    """And by the mean alone they are not: the simulation can tell."""
    found = [few_rows.false_alarms(rows, fraction=fraction, repeats=1500)
             for rows in (few_rows.FEWEST_ROWS, 60, 300)]  # fmt: skip
    assert all(one.lower <= few_rows.ALLOWED for one in found)
    assert found[0].mean > 5 * few_rows.ALLOWED
    assert found[0].unjudged > found[-1].unjudged > 0  # undefended models close to guessing


def test_what_is_left_is_seldom_called_nothing_and_nothing_often_where_rows_are_many():
    assert few_rows.shown_absent(4000) > 0.9
    assert few_rows.shown_absent(200) < 0.2  # not known, which is not wrong
    for rows in (300, 1000, 4000):
        assert few_rows.shown_absent(rows, above=MARGIN) < 0.04


def test_the_fewest_rows_are_those_from_which_the_cheapest_is_not_credited_with_too_little():
    enough = few_rows.cheapest(few_rows.FEWEST_ROWS, repeats=600)
    assert enough.lower <= few_rows.ALLOWED < enough.mean
    assert few_rows.cheapest(10, repeats=600).lower > few_rows.ALLOWED
    assert few_rows.cheapest(60, selection_rows=30, repeats=600).lower <= few_rows.ALLOWED
    with pytest.raises(ValueError, match="rows must be 2 or more, got 1"):
        few_rows.false_alarms(1)
    with pytest.raises(ValueError, match="rows must be 2 or more, got 0"):
        few_rows.cheapest(100, selection_rows=0)
