"""Reports that are honest about selection, against the null in which no cell is better."""

import math

import numpy as np
import pytest
from scipy import special

from jaximm.measures.intervals import two_level
from jaximm.measures.selection import FRESH_SEEDS, choose, draw_correct, honest, simulate_null


def fresh_scores(s: int = 5, n: int = 60, p: float = 0.7) -> np.ndarray:
    return (np.random.default_rng(0).random((s, n)) < p).astype(float)


def test_choose_takes_the_highest_mean_not_the_highest_score():
    assert choose(np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.5], [0.4, 0.4, 0.4]])) == 1


def test_ties_go_to_the_earlier():
    assert choose(np.array([[0.1, 0.2], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_cell_that_is_not_finite_is_never_chosen(bad):
    assert choose(np.array([[1.0, bad], [0.1, 0.1], [0.0, 0.3]])) == 2
    assert choose(np.array([[bad, bad], [bad, -bad]])) == 0


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 0), (2, 2, 2)])
def test_choose_says_what_came(shape):
    with pytest.raises(ValueError, match=r"selection must have shape \(cells, seeds\)"):
        choose(np.ones(shape))


def test_honest_reports_split_b_and_records_split_a():
    selection, reported = np.array([[0.6, 0.7], [0.9, 0.8], [0.1, 0.2]]), fresh_scores()
    found = honest(selection, reported, level=0.9)
    assert found.chosen == 1
    assert found.reported == two_level(reported, level=0.9)
    np.testing.assert_allclose(found.selected, 0.85, rtol=1e-12)
    np.testing.assert_allclose(found.optimism, 0.85 - np.mean(reported), rtol=1e-12)


@pytest.mark.parametrize("seeds", [1, FRESH_SEEDS - 1])
def test_too_few_fresh_seeds(seeds):
    selection, reported = np.ones((3, 2)), fresh_scores(seeds)
    with pytest.raises(ValueError, match=f"needs 5 fresh seeds or more, got {seeds}"):
        honest(selection, reported)
    assert honest(selection, reported, allow_few=True).reported == two_level(reported)


def test_what_is_not_finite_shows():
    reported = fresh_scores()
    reported[0, 0] = math.nan
    found = honest(np.ones((3, 2)), reported)
    assert (found.chosen, found.selected) == (0, 1.0)
    np.testing.assert_array_equal([*found.reported, found.optimism], math.nan)
    assert honest(np.full((3, 2), math.nan), fresh_scores()).selected == -math.inf


def test_errors_of_the_parts_come_through():
    with pytest.raises(ValueError, match="selection must have shape"):
        honest(np.ones(3), fresh_scores())
    with pytest.raises(ValueError, match="scores must have shape"):
        honest(np.ones((3, 2)), np.ones(9))
    with pytest.raises(ValueError, match="level must be between"):
        honest(np.ones((3, 2)), fresh_scores(), level=95)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_drawn_scores_have_the_moments_they_were_asked_for(correlation):
    found = draw_correct(
        np.random.default_rng(0),
        (4000, 2, 3, 50),
        accuracy=0.9,
        seed_sd=0.05,
        example_correlation=correlation,
    )
    assert found.scores.shape == (4000, 2, 3, 50)
    np.testing.assert_allclose(np.mean(found.scores), 0.9, atol=2e-3)
    np.testing.assert_allclose(np.mean(found.by_seed), 0.9, atol=2e-3)
    np.testing.assert_allclose(np.std(found.by_seed), 0.05, rtol=0.02)
    # Two seeds on one example: the chance that both are right, over how easy it is.
    flat = draw_correct(
        np.random.default_rng(1), (4000, 2, 1, 50), accuracy=0.9, example_correlation=correlation
    ).scores
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    by_easiness = special.ndtr(
        (special.ndtri(0.9) - correlation**0.5 * nodes) / (1 - correlation) ** 0.5
    )
    both = weights @ by_easiness**2 / np.sum(weights)
    np.testing.assert_allclose(np.mean(flat[:, 0] * flat[:, 1]), both, atol=3e-3)


def test_draw_correct_says_what_came():
    rng = np.random.default_rng(0)
    for accuracy, seed_sd in ((0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.9, 0.31)):
        with pytest.raises(ValueError, match="accuracy must be in"):
            draw_correct(rng, (1, 1, 2, 3), accuracy=accuracy, seed_sd=seed_sd)
    with pytest.raises(ValueError, match="example_correlation must be in"):
        draw_correct(rng, (1, 1, 2, 3), accuracy=0.5, example_correlation=1.5)


def test_naive_bias_is_the_expected_maximum():
    # Independent equal cells: standard error times E[largest of g normals], 1.629 for g = 12.
    found = simulate_null(seed_sd=0.0, example_correlation=0.0, repeats=1000)
    np.testing.assert_allclose(found.naive, 1.629 * math.sqrt(0.8 * 0.2 / 600), rtol=0.05)
    assert found.same_seeds == pytest.approx(0.0, abs=1e-12)  # seeds do not differ


def test_honest_reports_are_unbiased_and_naive_ones_are_not():
    found = simulate_null(seed_sd=0.03, repeats=1500)
    assert found.naive > 0.02
    assert found.same_seeds > 0.01  # fresh examples alone do not mend it
    assert abs(found.honest) <= 0.01
    assert abs(found.honest) <= 4 * 0.03 / math.sqrt(1500)
    assert 0.93 <= found.honest_coverage <= 0.97
    assert found.naive_coverage < 0.93


def test_a_simulation_repeats_itself():
    assert simulate_null(repeats=20) == simulate_null(repeats=20)
    assert simulate_null(repeats=20) != simulate_null(repeats=20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed_sd", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("cells", [12, 40])
def test_honest_reports_over_the_design(accuracy, seed_sd, cells):
    found = simulate_null(
        cells=cells, accuracy=accuracy, seed_sd=seed_sd, examples_a=100, repeats=5000, seed=1
    )
    print(cells, accuracy, seed_sd, *(f"{value:.4f}" for value in found))
    assert found.naive > 0.01
    assert abs(found.honest) <= 0.01
    assert 0.93 <= found.honest_coverage <= 0.97
