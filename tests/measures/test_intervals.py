"""Intervals over seeds and examples: closed forms, SciPy, and coverage in simulation."""

import itertools
import json
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from jaximm.measures import intervals
from jaximm.measures.intervals import (
    Interval,
    bounds,
    mean_squares,
    over_seeds,
    paired_difference,
    two_level,
)
from jaximm.measures.selection import draw_correct

NAN = Interval(math.nan, math.nan, math.nan)


def normal_scores(seed: int, s: int = 5, n: int = 23) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(s, n)) + rng.normal(size=(s, 1)) * 0.3 + rng.normal(size=(1, n)) + 0.7


def wilson_edge(n: int) -> float:
    """Upper bound of a part that was never seen in n trials, at 95 %."""
    z2 = float(stats.norm.ppf(0.975)) ** 2
    return z2 / (n + z2)


def covered(scores: np.ndarray, truth: float) -> float:
    found = bounds(scores)
    return float(np.mean((found.lower <= truth) & (truth <= found.upper)))


def crossed(seed, *, repeats, s, n, accuracy, seed_sd, correlation) -> np.ndarray:
    return draw_correct(
        np.random.default_rng(seed),
        (repeats, 1, s, n),
        accuracy=accuracy,
        seed_sd=seed_sd,
        example_correlation=correlation,
    ).scores[:, 0]


def pigeonhole_variance(scores: np.ndarray) -> np.ndarray:
    """Variance of the two-level bootstrap over its draws."""
    s, n = scores.shape[-2:]
    _, seed, example, residual = mean_squares(scores)
    a, b = 1 - 1 / s, 1 - 1 / n
    return (a * seed + b * example + a * b * residual) / (s * n)


def test_mean_squares_by_hand():
    # Row means 2 and 4, column means 1, 3, 5, mean 3; residuals +-1, 0, -+1.
    scores = np.array([[1.0, 2.0, 3.0], [1.0, 4.0, 7.0]])
    found = mean_squares(scores)
    np.testing.assert_allclose(found, (3.0, 3 * 2 / 1, 2 * 8 / 2, 4 / 2), rtol=1e-14)


def test_mean_squares_split_the_sum_of_squares():
    scores = np.stack([normal_scores(seed, 4, 7) for seed in range(3)])
    mean, seed, example, residual = mean_squares(scores)
    total = np.sum((scores - mean[:, None, None]) ** 2, axis=(1, 2))
    np.testing.assert_allclose(3 * seed + 6 * example + 18 * residual, total, rtol=1e-12)


def test_interval_by_hand():
    scores = np.array([[1.0, 2.0, 3.0], [1.0, 4.0, 7.0]])
    # MS 6, 8, 2: V = (6 + 8 - 2) / 6 = 2, df = 12^2 / (36 / 1 + 64 / 2 + 4 / 2) = 144 / 70.
    half = float(stats.t.ppf(0.95, 144 / 70)) * math.sqrt(2)
    found = two_level(scores, level=0.9)
    np.testing.assert_allclose(found, (3, 3 - half, 3 + half), rtol=1e-12)


def test_accuracy_interval_by_hand():
    scores = np.zeros((2, 4))
    scores[0, :3] = scores[1, :2] = 1
    # Row means 3/4, 1/2; column means 1, 1, 1/2, 0: MS 1/8, 11/24, 1/8.
    total = 1 / 8 + 11 / 24 - 1 / 8
    df = total**2 / ((1 / 8) ** 2 / 1 + (11 / 24) ** 2 / 3 + (1 / 8) ** 2 / 3)
    h2 = max(
        stats.t.ppf(0.975, df) ** 2 * total / 8,
        stats.t.ppf(0.975, 3) ** 2 * (1 / 16 + 11 / 24 - 1 / 8) / 8,
    )
    found = two_level(scores)
    for bound in (found.lower, found.upper):  # Wilson's equation: |m - p| = h sqrt(p q / m (1 - m))
        spread = bound * (1 - bound) / (5 / 8 * 3 / 8)
        np.testing.assert_allclose((bound - 5 / 8) ** 2, h2 * spread, rtol=1e-10)


def test_the_variance_is_the_bootstraps_with_its_three_faults_mended():
    scores = normal_scores(0, 5, 40)
    s, n = scores.shape
    rng = np.random.default_rng(1)
    draws = 40_000
    rows = rng.multinomial(s, np.full(s, 1 / s), draws)
    columns = rng.multinomial(n, np.full(n, 1 / n), draws)
    means = np.einsum("ds,sn,dn->d", rows, scores, columns, optimize=True) / (s * n)
    bootstrap = float(np.var(means))
    np.testing.assert_allclose(bootstrap, pigeonhole_variance(scores), rtol=0.03)
    # The rates 1 - 1/s and 1 - 1/n divided out, and two residuals taken away.
    _, seed, example, residual = mean_squares(scores)
    two_way = (seed + example - residual) / (s * n)
    df = (two_way * s * n) ** 2 / (
        seed**2 / (s - 1) + example**2 / (n - 1) + residual**2 / ((s - 1) * (n - 1))
    )
    half = float(stats.t.ppf(0.975, df)) * math.sqrt(two_way)
    found = two_level(scores)
    np.testing.assert_allclose(found.upper - found.mean, half, rtol=1e-10)


def test_one_seed_is_student_over_examples():
    scores = normal_scores(3, 1, 31)
    expected = stats.ttest_1samp(scores[0], 0.0).confidence_interval(0.9)
    np.testing.assert_allclose(two_level(scores, level=0.9)[1:], expected, rtol=1e-12)


@pytest.mark.parametrize("right", [0, 1, 17, 39, 40])
def test_one_seed_of_correctness_is_wilson(right):
    scores = np.zeros((1, 40))
    scores[0, :right] = 1
    expected = stats.binomtest(right, 40).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(two_level(scores)[1:], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("s", [2, 5])
def test_seeds_that_repeat_each_other_count_once(s):
    one = (np.random.default_rng(0).random((1, 400)) < 0.9).astype(float)
    found, single = two_level(np.repeat(one, s, axis=0)), two_level(one)
    np.testing.assert_allclose(found, single, rtol=2e-3)  # t with 399 degrees against z


@pytest.mark.parametrize("s", [1, 2, 5])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_no_error_is_not_certainty(s, value):
    found = two_level(np.full((s, 300), value))
    edge = wilson_edge(300)
    assert edge > 3 / 300  # wider than the rule of three, which is one-sided
    expected = (1.0, 1 - edge, 1.0) if value else (0.0, 0.0, edge)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_seeds_that_happen_to_agree_do_not_give_certainty():
    # Every seed and every example has the same mean: MS_a = MS_b = 0, but the scores do differ.
    scores = np.tile([[1.0, 0.0], [0.0, 1.0]], (1, 50))
    found = two_level(scores)
    assert 0.05 < found.upper - found.lower < 0.2
    assert found.lower < 0.5 < found.upper


def test_other_constants_have_no_width():
    np.testing.assert_allclose(two_level(np.full((5, 30), 0.37)), (0.37,) * 3, rtol=1e-12)


def test_a_batch_is_its_tables():
    scores = crossed(0, repeats=20, s=4, n=30, accuracy=0.9, seed_sd=0.05, correlation=0.3)
    together = np.stack(bounds(scores), axis=1)
    np.testing.assert_allclose(
        together, np.array([two_level(table) for table in scores]), rtol=1e-12
    )


def test_order_does_not_matter():
    scores = normal_scores(5)
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(rng.permutation(scores, axis=0), axis=1)
    np.testing.assert_allclose(two_level(shuffled), two_level(scores), rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_higher_level_is_wider(seed):
    for scores in (normal_scores(seed), (normal_scores(seed) > 0).astype(float)):
        narrow, wide = two_level(scores, level=0.8), two_level(scores, level=0.99)
        assert wide.lower < narrow.lower < narrow.mean < narrow.upper < wide.upper


@hypothesis.given(
    seed=st.integers(0, 50),
    scale=st.floats(0.01, 100) | st.floats(-100, -0.01),
    shift=st.floats(-10, 10),
    s=st.integers(1, 6),
)
def test_shift_and_scale(seed, scale, shift, s):
    scores = normal_scores(seed, s)
    found = two_level(scores)
    expected = [shift + scale * value for value in found]
    if scale < 0:
        expected[1:] = expected[:0:-1]
    atol = 1e-12 * (abs(shift) + abs(scale))
    np.testing.assert_allclose(
        two_level(shift + scale * scores), expected, rtol=1e-10, atol=100 * atol
    )
    difference = paired_difference(shift + scale * scores, np.zeros_like(scores))
    np.testing.assert_allclose(difference, expected, rtol=1e-10, atol=100 * atol)


@hypothesis.given(seed=st.integers(0, 1000), s=st.integers(1, 6), p=st.floats(0.01, 0.99))
def test_right_and_wrong_mirror_each_other_inside_zero_and_one(seed, s, p):
    scores = (np.random.default_rng(seed).random((s, 19)) < p).astype(float)
    found, mirrored = two_level(scores), two_level(1 - scores)
    np.testing.assert_allclose(
        mirrored, (1 - found.mean, 1 - found.upper, 1 - found.lower), rtol=1e-10, atol=1e-14
    )
    assert 0 <= found.lower <= found.mean <= found.upper <= 1
    assert found.lower < found.upper


@hypothesis.given(seed=st.integers(0, 50), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_over_seeds_shift_and_scale(seed, scale, shift):
    values = np.random.default_rng(seed).normal(size=6)
    expected = shift + scale * np.array(over_seeds(values))
    np.testing.assert_allclose(over_seeds(shift + scale * values), expected, atol=1e-10)


def test_paired_difference_is_two_level_of_the_differences():
    first, second = normal_scores(0), normal_scores(1)
    found = paired_difference(first, second, level=0.9)
    np.testing.assert_allclose(found, two_level(first - second, level=0.9), rtol=1e-12)
    back = paired_difference(second, first, level=0.9)
    np.testing.assert_allclose(back, (-found.mean, -found.upper, -found.lower), rtol=1e-12)


def test_pairing_removes_what_both_share():
    shared = normal_scores(0, 5, 200) * 3
    first = shared + 0.1 + 0.01 * normal_scores(1, 5, 200)
    paired, alone = paired_difference(first, shared), two_level(first)
    assert paired.upper - paired.lower < 0.05 * (alone.upper - alone.lower)


def test_paired_correctness_that_never_differs():
    edge = wilson_edge(50)
    right = np.ones((5, 50))
    mixed = (np.arange(250).reshape(5, 50) % 3 == 0).astype(float)
    np.testing.assert_allclose(paired_difference(mixed, mixed), (0, -edge, edge), rtol=1e-12)
    found = paired_difference(right, 0 * right)
    np.testing.assert_allclose(found, (1, 1 - 2 * edge, 1), rtol=1e-12)
    # Contributions that are no correctness claim nothing of the kind.
    assert paired_difference(0.5 * right, 0.5 * right) == Interval(0.0, 0.0, 0.0)


def test_over_seeds_is_student():
    values = np.array([0.3, -1.0, 2.5, 0.7])
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = over_seeds(values)
    np.testing.assert_allclose(found, (0.625, *expected), rtol=1e-12)


def test_over_one_seed_says_nothing_of_spread():
    assert over_seeds(np.array([2.0])) == Interval(2.0, -math.inf, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_give_nan(bad):
    scores = np.ones((3, 4))
    scores[1, 2] = bad
    for found in (
        two_level(scores),
        paired_difference(scores, np.ones((3, 4))),
        paired_difference(np.ones((3, 4)), scores),
        over_seeds(scores[:, 2]),
    ):
        np.testing.assert_array_equal(found, NAN)


def test_as_dict_is_json():
    row = over_seeds(np.array([2.0])).as_dict()
    assert json.loads(json.dumps(row, allow_nan=False)) == {
        "mean": 2.0,
        "lower": None,
        "upper": None,
    }


def test_whole_numbers_and_booleans_are_scores():
    scores = np.arange(60).reshape(5, 12) % 7 < 5
    assert two_level(scores) == two_level(scores.astype(int)) == two_level(scores.astype(float))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (0, 5), (2, 3, 4)])
def test_errors_say_what_came(shape):
    with pytest.raises(ValueError, match=r"scores must have shape \(seeds, examples\)"):
        two_level(np.ones(shape))
    with pytest.raises(ValueError, match="second must have shape"):
        paired_difference(np.ones((5, 4)), np.ones(shape))


def test_more_errors():
    with pytest.raises(ValueError, match=r"same examples, got shapes \(5, 4\) and \(5, 3\)"):
        paired_difference(np.ones((5, 4)), np.ones((5, 3)))
    for shape in ((0,), (2, 2)):
        with pytest.raises(ValueError, match="values must have shape"):
            over_seeds(np.ones(shape))
    for level in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            two_level(np.ones((5, 4)), level=level)
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            paired_difference(np.ones((5, 4)), np.ones((5, 4)), level=level)
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            over_seeds(np.ones(5), level=level)


CORNERS = [
    # seeds, examples, accuracy, sd of seeds, correlation of examples
    (5, 100, 0.5, 0.0, 0.0),
    (5, 100, 0.95, 0.0, 0.7),
    (5, 100, 0.95, 0.03, 0.7),
    (5, 400, 0.8, 0.01, 0.3),
    (5, 1000, 0.8, 0.03, 0.0),
    (10, 100, 0.8, 0.0, 0.0),
    (10, 100, 0.95, 0.03, 0.3),
    (10, 400, 0.5, 0.03, 0.3),
]


@pytest.mark.parametrize(("s", "n", "accuracy", "seed_sd", "correlation"), CORNERS)
def test_coverage(s, n, accuracy, seed_sd, correlation):
    scores = crossed(
        0,
        repeats=1000,
        s=s,
        n=n,
        accuracy=accuracy,
        seed_sd=seed_sd,
        correlation=correlation,
    )
    assert 0.93 <= covered(scores, accuracy) <= 0.97


def plain_coverage(scores: np.ndarray, truth: float, variance: np.ndarray) -> float:
    return float(np.mean(np.abs(np.mean(scores, axis=(1, 2)) - truth) <= 1.96 * variance**0.5))


def test_what_does_not_cover():
    same = {"repeats": 1000, "s": 5, "n": 1000, "accuracy": 0.8, "correlation": 0.0}
    spread, alike = crossed(0, seed_sd=0.08, **same), crossed(0, seed_sd=0.0, **same)
    # The two-level bootstrap as it is, then the binomial variance of s n trials.
    assert plain_coverage(spread, 0.8, pigeonhole_variance(spread)) < 0.88
    assert plain_coverage(alike, 0.8, pigeonhole_variance(alike)) > 0.985
    assert plain_coverage(spread, 0.8, np.full(1000, 0.16 / 5000)) < 0.5
    assert 0.93 <= covered(spread, 0.8) <= 0.97


def test_coverage_of_real_scores():
    rng = np.random.default_rng(0)
    repeats, s, n = 2000, 5, 100
    scores = (
        rng.normal(size=(repeats, s, n))
        + rng.normal(size=(repeats, 1, n))
        + 0.1 * rng.normal(size=(repeats, s, 1))
    )
    assert 0.93 <= covered(scores, 0.0) <= 0.97


def paired_coverage(repeats, *, s, n, first, second, seed_sd, seed=0) -> float:
    """Two attackers on the same examples under the same seeds: draws share both kinds of luck."""
    rng = np.random.default_rng(seed)
    hits = []
    for _ in range(repeats):
        luck = rng.normal(size=(s, 1)) * seed_sd
        own = rng.normal(size=(2, s, 1)) * seed_sd
        easiness, noise = rng.normal(size=(1, n)), rng.normal(size=(2, s, n))
        latent = (easiness + luck + own + noise) / math.sqrt(2 + 2 * seed_sd**2)
        right = (latent < stats.norm.ppf([[[first]], [[second]]])).astype(float)
        found = paired_difference(right[0], right[1])
        hits.append(found.lower <= first - second <= found.upper)
    return float(np.mean(hits))


@pytest.mark.parametrize(("first", "second"), [(0.8, 0.8), (0.95, 0.85)])
def test_coverage_of_paired_differences(first, second):
    found = paired_coverage(1000, s=5, n=200, first=first, second=second, seed_sd=0.05)
    assert 0.93 <= found <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("s", [5, 10])
@pytest.mark.parametrize("n", [100, 400, 1000])
def test_coverage_over_the_whole_design(s, n):
    for accuracy, seed_sd, correlation in itertools.product(
        (0.5, 0.8, 0.95), (0.0, 0.01, 0.03), (0.0, 0.3, 0.7)
    ):
        hits = [
            covered(
                crossed(
                    seed,
                    repeats=500,
                    s=s,
                    n=n,
                    accuracy=accuracy,
                    seed_sd=seed_sd,
                    correlation=correlation,
                ),
                accuracy,
            )
            for seed in range(8)
        ]
        coverage = np.mean(hits)
        print(s, n, accuracy, seed_sd, correlation, f"{coverage:.4f}")
        assert 0.93 <= coverage <= 0.97, (accuracy, seed_sd, correlation)


@pytest.mark.slow
@pytest.mark.parametrize("s", [5, 10])
@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize(("first", "second"), [(0.5, 0.5), (0.8, 0.8), (0.95, 0.85)])
@pytest.mark.parametrize("seed_sd", [0.0, 0.1])
def test_coverage_of_paired_differences_over_the_design(s, n, first, second, seed_sd):
    found = paired_coverage(2500, s=s, n=n, first=first, second=second, seed_sd=seed_sd, seed=1)
    print(s, n, first, second, seed_sd, f"{found:.4f}")
    assert 0.93 <= found <= 0.97


def test_the_floor_is_the_documented_one():
    assert intervals.RESIDUAL_FLOOR == 0.5
