"""Cost to break: envelopes by hand, laws of the worst case, censoring, and a slow bootstrap."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import special, stats

from jaximm.measures import cost_to_break
from jaximm.measures.cost_to_break import (
    FEWEST_SEEDS,
    Broken,
    Curve,
    Ratio,
    area,
    break_ratio,
    break_ratio_interval,
    cost_to_reach,
    harm_at,
    matched,
    threshold_of,
    worst_case,
)

NAN = math.nan


def curve(flops, *quality, utility=None) -> Curve:
    return Curve(
        np.array(flops, float),
        np.array(quality, float),
        None if utility is None else np.broadcast_to(utility, (len(quality), len(flops))),
    )


def envelope(**curves):
    return worst_case(curves, utility_bound=None)


def random_curves(seed: int, *, attackers: int = 3, s: int = 2, holes: bool = False):
    rng = np.random.default_rng(seed)
    found = {}
    for number in range(attackers):
        r = int(rng.integers(1, 8))
        quality = rng.integers(0, 20, (s, r)) / 20  # a grid, so that ties occur
        if holes:
            quality[rng.random((s, r)) < 0.1] = NAN
        utility = rng.random((s, r)) if number % 2 else None
        flops = np.cumsum(rng.integers(0, 4, r)).astype(float)
        found[f"a{number}"] = Curve(flops, quality, utility)
    return found


def slow_harm(curves, cost, bound) -> float:
    """The formula of `worst_case`, point by point; -inf where nothing counts."""
    best = -math.inf
    for one in curves.values():
        for place, flops in enumerate(one.flops):
            quality = np.mean(one.quality[:, place])
            utility = math.inf if one.utility is None else np.mean(one.utility[:, place])
            if flops <= cost and np.isfinite(quality) and (bound is None or utility >= bound):
                best = max(best, quality)
    return best


# --- the worst case ------------------------------------------------------------------------------


def test_worst_case_by_hand():
    slow = curve([0, 10, 100], [0.0, 0.3, 1.0], [0.2, 0.5, 0.8])  # means 0.1, 0.4, 0.9
    fast = curve([5, 10], [0.2, 0.4], [0.2, 0.4])  # the tie at 10 goes to who was given first
    found = envelope(slow=slow, fast=fast)
    np.testing.assert_array_equal(found.flops, [0, 5, 10, 100])
    np.testing.assert_allclose(found.harm, [0.1, 0.2, 0.4, 0.9], rtol=1e-12)
    assert found.attacker == ("slow", "fast", "slow", "slow")
    assert found.tried == 100
    assert envelope(fast=fast, slow=slow).attacker == ("slow", "fast", "fast", "slow")


def test_harm_is_the_best_so_far():
    found = envelope(a=curve([1, 2, 3, 4], [0.2, 0.9, 0.1, 0.9]), b=curve([2.5], [0.9]))
    np.testing.assert_array_equal(found.harm, [0.2, 0.9, 0.9, 0.9, 0.9])
    assert found.attacker == ("a",) * 5


def test_points_below_the_utility_bound_do_not_count():
    greedy = curve([0, 1, 2], [0.1, 0.8, 0.9], utility=[1.0, 0.9, 0.2])
    found = worst_case({"greedy": greedy}, utility_bound=0.9)
    np.testing.assert_array_equal(found.harm, [0.1, 0.8, 0.8])
    found = worst_case({"greedy": greedy}, utility_bound=0.95)
    np.testing.assert_array_equal(found.harm, [0.1, 0.1, 0.1])
    assert found.tried == 2  # it was tried, and did not keep the utility
    # The bound is on the mean over seeds, and does not bind who leaves the backbone alone.
    mixed = Curve(np.array([1.0]), np.full((2, 1), 0.7), np.array([[0.8], [1.0]]))
    assert worst_case({"mixed": mixed}, utility_bound=0.9).harm.tolist() == [0.7]
    probe = {"greedy": greedy, "probe": curve([2], [0.9])}
    assert worst_case(probe, utility_bound=0.95).attacker[-1] == "probe"


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_what_was_not_measured_does_not_count(bad):
    found = envelope(a=curve([1, 2, 3, 4], [0.1, bad, 0.3, bad], [0.1, 0.9, 0.3, 0.9]))
    np.testing.assert_array_equal(found.harm, [0.1, 0.1, 0.3, 0.3])
    assert found.tried == 3
    lost = curve([1, 2], [0.1, 0.9], utility=[1.0, bad])
    assert worst_case({"lost": lost}, utility_bound=0.5)[1:] == (
        pytest.approx(np.array([0.1, 0.1])),
        ("lost", "lost"),
        1.0,
    )
    assert worst_case({"lost": lost}, utility_bound=None).harm[-1] == 0.9


def test_nothing_that_counts_is_an_empty_envelope():
    nothing = worst_case({"a": curve([1, 2], [0.5, 0.9], utility=0.1)}, utility_bound=0.9)
    assert nothing.flops.size == nothing.harm.size == len(nothing.attacker) == 0
    assert nothing.tried == 2
    found = cost_to_reach(nothing, 0.3)
    assert found[:2] == (math.inf, None)
    assert math.isnan(found.harm)
    np.testing.assert_array_equal(harm_at(nothing, np.array([0.0, 5.0])), NAN)
    assert area(nothing, 1.0, 10.0, floor=0.1) == pytest.approx(0.1)
    assert break_ratio(nothing, envelope(a=curve([1], [1.0])), 0.5) == Ratio(2.0, ">")
    assert envelope(a=curve([1, 2], [NAN, NAN])).tried == 0


def test_costs_before_the_first_harm_are_left_out():
    late = curve([1, 2, 4], [NAN, 0.5, 0.6])
    np.testing.assert_array_equal(envelope(late=late).flops, [2, 4])


@hypothesis.given(
    seed=st.integers(0, 300), bound=st.none() | st.floats(0.1, 0.9), holes=st.booleans()
)
def test_worst_case_is_its_formula_and_monotone(seed, bound, holes):
    curves = random_curves(seed, holes=holes)
    found = worst_case(curves, utility_bound=bound)
    every = np.unique(np.concatenate([one.flops for one in curves.values()]))
    expected = np.array([slow_harm(curves, cost, bound) for cost in every])
    np.testing.assert_array_equal(found.flops, every[expected > -math.inf])
    np.testing.assert_allclose(found.harm, expected[expected > -math.inf], rtol=1e-12)
    assert np.all(np.diff(found.harm) >= 0)
    for cost, harm, name in zip(found.flops, found.harm, found.attacker, strict=True):
        np.testing.assert_allclose(slow_harm({name: curves[name]}, cost, bound), harm, rtol=1e-12)


@hypothesis.given(seed=st.integers(0, 300), bound=st.none() | st.floats(0.1, 0.9))
def test_one_more_attacker_never_does_less_harm(seed, bound):
    curves = random_curves(seed, attackers=4, holes=True)
    fewer = worst_case(dict(list(curves.items())[:3]), utility_bound=bound)
    more = worst_case(curves, utility_bound=bound)
    costs = np.linspace(0, 30, 61)
    before, after = harm_at(fewer, costs), harm_at(more, costs)
    assert np.all((after >= before) | np.isnan(before))
    assert cost_to_reach(more, 0.6).flops <= cost_to_reach(fewer, 0.6).flops
    for floor in (0.0, 0.3):
        first, second = (area(one, 0.5, 20.0, floor=floor) for one in (fewer, more))
        assert second >= first - 1e-12


@hypothesis.given(seed=st.integers(0, 300), bounds=st.tuples(*[st.floats(0, 1)] * 2))
def test_a_bound_on_the_utility_never_raises_harm(seed, bounds):
    curves = random_curves(seed)
    costs = np.linspace(0, 30, 61)
    harms = [
        np.nan_to_num(harm_at(worst_case(curves, utility_bound=bound), costs), nan=-1.0)
        for bound in (None, min(bounds), max(bounds))
    ]
    assert np.all(harms[0] >= harms[1])
    assert np.all(harms[1] >= harms[2])


@hypothesis.given(seed=st.integers(0, 300), scale=st.floats(0.01, 100), threshold=st.floats(0, 1))
def test_costs_scale_and_a_model_is_as_hard_as_itself(seed, scale, threshold):
    curves = random_curves(seed)
    dear = {name: one._replace(flops=one.flops * scale) for name, one in curves.items()}
    first, second = (worst_case(found, utility_bound=None) for found in (curves, dear))
    np.testing.assert_allclose(
        cost_to_reach(second, threshold).flops,
        cost_to_reach(first, threshold).flops * scale,
        rtol=1e-12,
    )
    own = break_ratio(first, first, threshold)
    assert own == Ratio(1.0, "=") or own.bound == "?"
    ratio = break_ratio(second, first, threshold)
    if own.bound == "=" and cost_to_reach(first, threshold).flops > 0:
        np.testing.assert_allclose(ratio.value, scale, rtol=1e-12)
        back = break_ratio(first, second, threshold)
        np.testing.assert_allclose(back.value * ratio.value, 1, rtol=1e-12)


# --- thresholds and ratios -----------------------------------------------------------------------


def test_threshold_by_hand():
    assert threshold_of(0.9, 0.1) == pytest.approx(0.82)
    assert threshold_of(0.6, 0.0, fraction=0.5) == pytest.approx(0.3)
    assert threshold_of(0.7, 0.2, 1.0) == pytest.approx(0.7)


@pytest.mark.parametrize("undefended", [0.1, 0.05, NAN, math.inf, -math.inf])
def test_no_threshold_at_or_below_the_floor(undefended):
    assert math.isnan(threshold_of(undefended, 0.1))


def test_cost_to_reach_by_hand():
    found = envelope(a=curve([0, 10, 20], [0.1, 0.5, 0.7]), b=curve([15], [0.6]))
    assert cost_to_reach(found, 0.5) == Broken(10.0, "a", 0.5)  # reached, not passed
    assert cost_to_reach(found, 0.51) == Broken(15.0, "b", 0.6)
    assert cost_to_reach(found, -3.0) == Broken(0.0, "a", 0.1)
    assert cost_to_reach(found, 0.71) == Broken(math.inf, None, 0.7)


def test_ratio_and_which_side_is_censored():
    bare = envelope(a=curve([0, 2, 4], [0.1, 0.8, 0.9]))
    slowed = envelope(a=curve([0, 2, 40], [0.1, 0.3, 0.8]))
    held = envelope(a=curve([0, 2, 60, 100], [0.1, 0.1, 0.2, NAN]))
    assert break_ratio(slowed, bare, 0.8) == Ratio(20.0, "=")
    assert break_ratio(held, bare, 0.8) == Ratio(30.0, ">")  # what diverged was not tried
    for other in (held, bare):
        found = break_ratio(other, held, 0.8)
        assert found.bound == "?"
        assert math.isnan(found.value)


def test_ratio_of_costs_that_are_nothing():
    free, dear = envelope(a=curve([0], [0.9])), envelope(a=curve([5], [0.9]))
    assert break_ratio(free, free, 0.5) == Ratio(1.0, "=")
    assert break_ratio(free, dear, 0.5) == Ratio(0.0, "=")
    assert break_ratio(dear, free, 0.5) == Ratio(math.inf, "=")


# --- the interval --------------------------------------------------------------------------------


GRID = np.geomspace(1, 1e6, 121)


def luck_curve(log_cost: float, luck) -> Curve:
    """Harm 0.1 + 0.8 sigmoid(log c - log_cost - luck), one seed a row."""
    x = np.log(GRID) - log_cost - np.asarray(luck)[:, None]
    return Curve(GRID, 0.1 + 0.8 * special.expit(x))


def slow_draws(defended, undefended, threshold, bounds, index):
    """Ratios of resampled curves through the public functions, one draw at a time."""
    found = []
    for rows in index:
        held, bare = (
            worst_case(
                {
                    name: Curve(
                        one.flops,
                        one.quality[rows],
                        None if one.utility is None else one.utility[rows],
                    )
                    for name, one in curves.items()
                },
                utility_bound=bound,
            )
            for curves, bound in zip((defended, undefended), bounds, strict=True)
        )
        found.append(break_ratio(held, bare, threshold))
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_interval_is_the_slow_bootstrap(seed):
    rng = np.random.default_rng(seed)
    shared, s = rng.normal(size=7), 7
    models = []
    for log_cost in (6.0, 4.0):
        curves = {
            name: luck_curve(log_cost + add, shared + 0.2 * rng.normal(size=s))
            for name, add in (("a", 0.0), ("b", 0.3))
        }
        curves["b"] = curves["b"]._replace(utility=rng.normal(0.9, 0.1, curves["b"].quality.shape))
        models.append(curves)
    bounds = (0.9, 0.88)
    found = break_ratio_interval(
        models[0],
        models[1],
        0.7,
        utility_bound=bounds[0],
        undefended_bound=bounds[1],
        level=0.6,
        draws=300,
        seed=seed,
    )
    index = np.random.default_rng(seed).integers(s, size=(300, s))
    slow = slow_draws(models[0], models[1], 0.7, bounds, index)
    assert {one.bound for one in slow} == {"="}
    ratios = np.sort([one.value for one in slow])
    tail = stats.norm.cdf(-math.sqrt(s / (s - 1)) * stats.t.ppf(0.8, s - 1))
    assert 0.1 < tail < 0.2
    expected = ratios[math.floor(tail * 299)], ratios[math.ceil((1 - tail) * 299)], 0.0, 0.0
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.lower < found.upper


def test_few_seeds_are_resampled_exhaustively():
    luck = np.array([-0.4, -0.1, 0.0, 0.2, 0.7])
    models = {"a": luck_curve(7, luck)}, {"a": luck_curve(4, luck[::-1])}
    found = break_ratio_interval(*models, 0.7, seed=0)
    assert found == break_ratio_interval(*models, 0.7, seed=1)
    index = np.stack(np.meshgrid(*[np.arange(5)] * 5, indexing="ij"), axis=-1).reshape(-1, 5)
    ratios = np.sort([one.value for one in slow_draws(*models, 0.7, (None, None), index)])
    # At 95 % and s = 5 the tail is 0.1 %: all but the 2 or 3 lowest and highest of 3125.
    np.testing.assert_allclose(found[:2], (ratios[2], ratios[-3]), rtol=1e-12)


def test_seeds_are_paired():
    luck = np.random.default_rng(0).normal(size=6)
    hard, easy = {"a": luck_curve(7, luck)}, {"a": luck_curve(4, luck)}
    paired = break_ratio_interval(hard, easy, 0.7)
    step = GRID[1] / GRID[0]  # costs sit on the grid
    assert paired.upper / paired.lower < 1.01 * step**2
    assert paired.lower / (1.01 * step) < math.exp(3) < paired.upper * 1.01 * step
    unpaired = break_ratio_interval(hard, {"a": luck_curve(4, luck[::-1])}, 0.7)
    assert unpaired.upper / unpaired.lower > 2 * paired.upper / paired.lower
    assert break_ratio_interval(hard, hard, 0.7) == (1.0, 1.0, 0.0, 0.0)


def test_censored_draws_leave_the_interval_open():
    # One seed of five never breaks; a mean of 0.7 needs four or more draws of the others.
    flops = [1, 10]
    held = {"a": curve(flops, *[[0.1, 1.0]] * 4, [0.1, 0.1])}
    bare = {"a": curve(flops, *[[0.1, 1.0]] * 5)}
    probability = float(stats.binom.cdf(3, 5, 0.8))  # four of five give 0.82, three give 0.64
    found = break_ratio_interval(held, bare, 0.7)
    np.testing.assert_allclose(found.censored, probability, rtol=1e-12)
    assert found[:2] == (1.0, math.inf)  # at least what was tried, and no more is known
    assert found.unknown == 0
    turned = break_ratio_interval(bare, held, 0.7)
    np.testing.assert_allclose(turned.unknown, probability, rtol=1e-12)
    assert turned[:2] == (0.0, 1.0)
    never = {"a": curve([1, 70], *[[0.1, 0.1]] * 5)}
    assert break_ratio_interval(never, bare, 0.7) == (7.0, math.inf, 1.0, 0.0)
    assert break_ratio_interval(never, never, 0.7) == (0.0, math.inf, 1.0, 1.0)


@pytest.mark.parametrize("share", [0.005, 0.03, 0.2])
def test_upper_is_inf_where_more_than_the_tail_is_censored(share):
    # The mean falls below the threshold where one bad seed is drawn more than `weight` times.
    s = 20
    weight = next(k for k in range(s) if stats.binom.sf(k, s, 1 / s) < share)
    low = 1 - 0.3 * s / (weight + 0.5)
    held = {"a": curve([1, 10], *[[0.1, 1.0]] * (s - 1), [0.1, low])}
    bare = {"a": curve([1, 10], *[[0.1, 1.0]] * s)}
    found = break_ratio_interval(held, bare, 0.7)
    tail = special.ndtr(-math.sqrt(s / (s - 1)) * stats.t.ppf(0.975, s - 1))
    assert tail < 0.025
    np.testing.assert_allclose(found.censored, stats.binom.sf(weight, s, 1 / s), atol=0.01)
    assert (found.upper == math.inf) == (found.censored > tail)


@pytest.mark.parametrize("s", [1, 2, FEWEST_SEEDS - 1])
def test_too_few_seeds_bound_nothing(s):
    hard, easy = {"a": luck_curve(7, np.zeros(s))}, {"a": luck_curve(4, np.zeros(s))}
    assert break_ratio_interval(hard, easy, 0.7) == (0.0, math.inf, 0.0, 0.0)


def test_reaching_the_threshold_exactly_breaks_in_every_draw():
    exact = {"a": curve([1, 10], *[[0.1, 0.75]] * 5)}
    assert break_ratio_interval(exact, exact, 0.75) == (1.0, 1.0, 0.0, 0.0)


def test_a_seed_that_diverged_is_not_drawn_away():
    broken = curve([1, 10], *[[0.1, 1.0]] * 4, [0.1, NAN])
    bare = {"a": curve([1, 10], *[[0.1, 1.0]] * 5)}
    found = break_ratio_interval({"a": broken}, bare, 0.7)
    assert found == (0.1, math.inf, 1.0, 0.0)  # tried up to cost 1, in every draw


def test_coverage_of_the_interval():
    rng = np.random.default_rng(0)
    hits = {level: 0 for level in (0.5, 0.95)}
    for _ in range(150):
        luck = 0.5 * rng.normal(size=8)
        hard, easy = (
            {"a": luck_curve(log_cost, luck + 0.3 * rng.normal(size=8))} for log_cost in (7, 4)
        )
        for level in hits:
            found = break_ratio_interval(hard, easy, 0.7, level=level, draws=400)
            hits[level] += found.lower <= math.exp(3) <= found.upper
    assert 0.9 <= hits[0.95] / 150 <= 0.99
    assert 0.4 <= hits[0.5] / 150 <= 0.75  # the grid widens narrow intervals


# --- lookups -------------------------------------------------------------------------------------


def test_matched_by_hand():
    held = envelope(a=curve([2, 20], [0.1, 0.3]))
    bare = envelope(a=curve([1, 2, 4], [0.2, 0.5, 0.4]), b=curve([3], [0.9]))
    found = matched(held, bare, np.array([30.0, 3.0, 1.0, 0.0]))
    np.testing.assert_array_equal(found.defended, [0.3, 0.1, NAN, NAN])
    np.testing.assert_array_equal(found.undefended, [0.9, 0.9, 0.2, NAN])
    np.testing.assert_allclose(found.change, [-0.6, -0.8, NAN, NAN], rtol=1e-12)
    assert found.defended_attacker == ("a", "a", None, None)
    assert found.undefended_attacker == ("b", "b", "a", None)
    np.testing.assert_array_equal(found.tried, [False, True, True, True])


def test_harm_at_keeps_any_shape():
    found = envelope(a=curve([1, 4], [0.2, 0.7]))
    np.testing.assert_array_equal(
        harm_at(found, np.array([[0, 1, 2], [4, 5, math.inf]])), [[NAN, 0.2, 0.2], [0.7, 0.7, 0.7]]
    )
    assert harm_at(found, np.array(3.0)) == 0.2


def test_area_by_hand():
    found = envelope(a=curve([0, 10, 1000], [-5.0, 0.5, 0.9]))
    assert area(found, 1, 1e4) == pytest.approx((0 + 0.5 * 2 + 0.9) / 4)
    assert area(found, 1, 1e4, floor=0.6) == pytest.approx((0.6 * 3 + 0.9) / 4)
    assert area(found, 100, 1e5) == pytest.approx((0.5 + 0.9 * 2) / 3)
    assert area(found, 10, 1000) == pytest.approx(0.5)  # its ends are the steps
    assert area(found, 2000, 3000) == pytest.approx(0.9)


@hypothesis.given(seed=st.integers(0, 100), scale=st.floats(1e-3, 1e12))
def test_area_does_not_know_the_unit_of_cost(seed, scale):
    curves = random_curves(seed)
    dear = {name: one._replace(flops=one.flops * scale) for name, one in curves.items()}
    first, second = (worst_case(found, utility_bound=None) for found in (curves, dear))
    found = area(first, 0.7, 17.3)
    np.testing.assert_allclose(area(second, 0.7 * scale, 17.3 * scale), found, rtol=1e-9)
    assert 0 <= found <= 1
    # Against a sum over a fine grid of log cost.
    fine = np.geomspace(0.7, 17.3, 40001)
    middle = np.sqrt(fine[1:] * fine[:-1])
    np.testing.assert_allclose(
        found, np.mean(np.nan_to_num(harm_at(first, middle), nan=0.0)), atol=2e-3
    )


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (curve([], []), r"flops of 'a' must have shape \(points,\), got shape \(0,\)"),
        (curve([1, 2], [0.1]), r"quality of 'a' must have shape \(seeds, 2\).* \(1, 1\)"),
        (Curve(np.ones(2), np.ones(2)), r"quality of 'a' must have shape \(seeds, 2\)"),
        (Curve(np.ones(2), np.ones((0, 2))), r"got shape \(0, 2\)"),
        (curve([2, 1], [0.1, 0.2]), r"never decrease, got \[2.0, 1.0\]"),
        (curve([-1, 1], [0.1, 0.2]), "0 or more"),
        (curve([1, NAN], [0.1, 0.2]), "must be finite"),
        (
            Curve(np.ones(2), np.ones((3, 2)), np.ones((2, 2))),
            r"utility of 'a' must have the shape of its quality, \(3, 2\), got \(2, 2\)",
        ),
    ],
)
def test_curves_that_do_not_fit(bad, message):
    with pytest.raises(ValueError, match=message):
        worst_case({"a": bad}, utility_bound=None)
    good = {"a": curve([1], [0.5])}
    for models in (({"a": bad}, good), (good, {"a": bad})):
        with pytest.raises(ValueError, match=message):
            break_ratio_interval(*models, 0.5)


def test_more_errors():
    found, curves = envelope(a=curve([1], [0.5])), {"a": curve([1], [0.5])}
    with pytest.raises(ValueError, match="curves must hold one attacker or more"):
        worst_case({}, utility_bound=None)
    with pytest.raises(ValueError, match="undefended must hold one attacker or more"):
        break_ratio_interval(curves, {}, 0.5)
    for bound in (NAN, math.inf):
        with pytest.raises(ValueError, match="utility_bound must be finite, or None"):
            worst_case(curves, utility_bound=bound)
        with pytest.raises(ValueError, match="undefended_bound must be finite, or None"):
            break_ratio_interval(curves, curves, 0.5, undefended_bound=bound)
    with pytest.raises(ValueError, match=r"the same seeds.* got \[1, 2\] seeds"):
        break_ratio_interval(curves, {"a": curve([1], [0.5], [0.5])}, 0.5)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            break_ratio_interval(curves, curves, 0.5, level=level)
    with pytest.raises(ValueError, match="draws must be 1 or more, got 0"):
        break_ratio_interval(curves, curves, 0.5, draws=0)
    for threshold in (NAN, math.inf):
        for call in (
            lambda t: cost_to_reach(found, t),
            lambda t: break_ratio(found, found, t),
            lambda t: break_ratio_interval(curves, curves, t),
        ):
            with pytest.raises(ValueError, match="threshold must be finite"):
                call(threshold)
    for fraction in (0, 1.1, NAN):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
            threshold_of(0.9, 0.1, fraction)
    with pytest.raises(ValueError, match="floor must be finite"):
        threshold_of(0.9, NAN)
    with pytest.raises(ValueError, match="floor must be finite"):
        area(found, 1, 2, floor=NAN)
    for lowest, highest in ((0, 1), (2, 2), (3, 2), (1, math.inf), (NAN, 2)):
        with pytest.raises(ValueError, match="0 < lowest < highest"):
            area(found, lowest, highest)
    for costs in ([-1.0], [NAN]):
        with pytest.raises(ValueError, match="costs must be 0 or more"):
            harm_at(found, np.array(costs))
    with pytest.raises(ValueError, match=r"costs must have shape \(m,\), got shape \(1, 1\)"):
        matched(found, found, np.ones((1, 1)))


def test_arguments_are_left_alone():
    curves = random_curves(0, s=5, holes=True)
    before = {
        name: [np.copy(part) for part in one if part is not None] for name, one in curves.items()
    }
    worst_case(curves, utility_bound=0.5)
    cost_to_break.break_ratio_interval(curves, curves, 0.5)
    for name, one in curves.items():
        for part, copy in zip((p for p in one if p is not None), before[name], strict=True):
            np.testing.assert_array_equal(part, copy)
