"""Unions of attackers against their nulls, and successive halving against its budget."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaximm.measures.portfolio import (
    Failed,
    Rung,
    chance_union,
    halving_of_curves,
    rung_sizes,
    successive_halving,
    union,
    union_null,
)


def random_scores(seed: int, *, k: int = 4, s: int = 3, n: int = 50):
    rng = np.random.default_rng(seed)
    accuracy = rng.random((k, s, 1))
    right = rng.random((k, s, n)) < accuracy
    return {f"a{number}": table.astype(float) for number, table in enumerate(right)}


# --- unions --------------------------------------------------------------------------------------


def test_union_by_hand():
    first = np.array([[1, 0, 0, 0], [0, 0, 0, 0]])
    second = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], bool)
    found = union({"first": first, "second": second})
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [[1, 1, 0, 0], [0, 0, 0, 1]])
    lost = np.array([[np.nan, np.nan, 1, 0], [0, 0, 0, np.nan]])
    np.testing.assert_array_equal(
        union({"first": first, "lost": lost}), [[1, 0, 1, 0], [0, 0, 0, 0]]
    )


@hypothesis.given(seed=st.integers(0, 200), k=st.integers(1, 5))
def test_union_is_at_least_the_best_and_grows(seed, k):
    scores = random_scores(seed, k=k)
    found = union(scores)
    for table in scores.values():
        assert np.all(found >= table)
    assert np.mean(found) <= min(1, sum(np.mean(table) for table in scores.values())) + 1e-12
    more = union(scores | {"new": random_scores(seed + 1)["a0"]})
    assert np.all(more >= found)
    np.testing.assert_array_equal(union(dict(reversed(scores.items()))), found)


def test_chance_union_by_hand():
    half, quarter = np.tile([1.0, 0.0], (2, 4)), np.tile([1.0, 0, 0, 0], (2, 2))
    quarter[1] = 1.0  # accuracy 1/4 under the first seed, 1 under the second
    found = chance_union({"half": half, "quarter": quarter}, chance=0.1)
    np.testing.assert_allclose(found.guessing, 1 - 0.9**2, rtol=1e-12)
    np.testing.assert_allclose(found.independent, (1 - 0.5 * 0.75 + 1) / 2, rtol=1e-12)


@pytest.mark.parametrize("k", [3, 40])
def test_guessing_alone_makes_a_union_that_tends_to_one(k):
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=2000)
    guesses = {
        str(number): (rng.integers(10, size=(2, 2000)) == labels).astype(float)
        for number in range(k)
    }
    found, expected = union_null(guesses, draws=50), chance_union(guesses, chance=0.1)
    np.testing.assert_allclose(found.observed, 1 - 0.9**k, atol=0.02)
    np.testing.assert_allclose(expected, 1 - 0.9**k, atol=0.02)
    assert found.lower - 0.01 <= found.observed <= found.upper + 0.01


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_null_has_the_mean_that_is_known(seed):
    scores = random_scores(seed, k=3, s=2, n=12)
    found = union_null(scores, draws=4000, seed=seed)
    assert found.mean == chance_union(scores, chance=0.1).independent
    # Every order of a few examples, exactly.
    small = {name: table[:, :4] for name, table in scores.items()}
    orders = list(itertools.permutations(range(4)))
    tables = list(small.values())
    exact = np.mean(
        [
            np.mean(np.max([tables[0], tables[1][:, list(p)], tables[2][:, list(q)]], axis=0))
            for p in orders
            for q in orders
        ]
    )
    np.testing.assert_allclose(union_null(small, draws=1).mean, exact, rtol=1e-12)
    narrow = union_null(scores, draws=4000, seed=seed, level=0.01)
    assert abs(narrow.lower - found.mean) < 0.03
    assert found.lower <= narrow.lower <= narrow.upper <= found.upper


def test_the_null_knows_attackers_that_agree_and_that_complement_each_other():
    n = 60
    base = (np.arange(n) < 20).astype(float)
    same = {name: np.tile(base, (3, 1)) for name in "abc"}
    found = union_null(same)
    assert found.observed == pytest.approx(1 / 3)
    assert found.below == pytest.approx(1 / 1001)
    assert found.above == 1
    parts = {name: np.tile(np.roll(base, 20 * k), (3, 1)) for k, name in enumerate("abc")}
    found = union_null(parts)
    assert found.observed == 1
    assert found.above == pytest.approx(1 / 1001)
    assert found.mean == pytest.approx(1 - (2 / 3) ** 3)
    assert found.lower < found.mean < found.upper < 1


def test_seeds_of_an_attacker_are_shuffled_together():
    # Under independent orders the spread over three equal seeds would be 3 ** 0.5 times smaller.
    base = (np.arange(60) < 20).astype(float)
    one = union_null({name: base[None] for name in "ab"}, draws=500)
    three = union_null({name: np.tile(base, (3, 1)) for name in "ab"}, draws=500)
    np.testing.assert_allclose(three, one, rtol=1e-12)


def test_one_attacker_is_its_own_null():
    scores = {"only": random_scores(0)["a0"]}
    mean = pytest.approx(float(np.mean(scores["only"])))
    assert union_null(scores, draws=10) == (mean, mean, mean, mean, 1.0, 1.0)


def test_the_null_depends_on_its_seed_alone():
    scores = random_scores(3, n=997)
    first, again, other = (union_null(scores, seed=seed, draws=30) for seed in (1, 1, 2))
    assert first == again
    assert first.lower != other.lower


@pytest.mark.parametrize("call", [union, lambda s: chance_union(s, chance=0.1), union_null])
def test_scores_that_do_not_fit(call):
    with pytest.raises(ValueError, match="scores must hold one attacker or more"):
        call({})
    with pytest.raises(ValueError, match=r"\(2, 3\) of 'b' and \(2, 4\) of 'a'"):
        call({"a": np.ones((2, 4)), "b": np.ones((2, 3))})
    with pytest.raises(ValueError, match=r"one shape \(seeds, examples\)"):
        call({"a": np.ones(4)})
    for value in (0.5, math.inf, -1.0):
        with pytest.raises(ValueError, match="scores of 'a' must be 0 and 1"):
            call({"a": np.full((2, 4), value)})


def test_other_errors_of_unions():
    scores = random_scores(0)
    for chance in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"chance must be in \[0, 1\]"):
            chance_union(scores, chance=chance)
    with pytest.raises(ValueError, match="draws must be 1 or more"):
        union_null(scores, draws=0)
    with pytest.raises(ValueError, match="level must be between"):
        union_null(scores, level=95)


# --- successive halving --------------------------------------------------------------------------


def names(count: int) -> list[str]:
    return [f"arm{number}" for number in range(count)]


class Recorder:
    """Curves that never cross: slope times steps; remembers what was asked."""

    def __init__(self, slopes):
        self.slopes, self.calls = slopes, []

    def __call__(self, arm, steps):
        self.calls.append((arm, steps))
        return self.slopes[arm] * steps


@pytest.mark.parametrize(
    ("arms", "eta", "sizes"),
    [
        (1, 3, (1,)),
        (2, 2, (2,)),
        (2, 3, (2,)),
        (3, 3, (3,)),
        (4, 3, (4, 2)),
        (8, 2, (8, 4, 2)),
        (9, 3, (9, 3)),
        (10, 3, (10, 4, 2)),
        (100, 3, (100, 34, 12, 4, 2)),
    ],
)
def test_rung_sizes(arms, eta, sizes):
    assert rung_sizes(arms, eta) == sizes
    assert len(sizes) == max(1, math.ceil(math.log(arms, eta) - 1e-9))


def test_halving_by_hand():
    arms = names(9)
    run = Recorder({arm: float(number % 5) for number, arm in enumerate(arms)})
    # 9 first + 3 (3 first - first) = 15 first <= 100
    found = successive_halving(arms, run, total=100)
    assert [(rung.steps, len(rung.standing)) for rung in found.rungs] == [(6, 9), (18, 3)]
    assert found.rungs[1] == Rung(18, (("arm4", 72.0), ("arm3", 54.0), ("arm8", 54.0)))
    assert found[:2] == ("arm4", 72.0)
    assert found.spent == 90
    assert found.failed == ()
    assert run.calls == [(arm, 6) for arm in arms] + [("arm4", 18), ("arm3", 18), ("arm8", 18)]


@pytest.mark.parametrize("total", [15, 29, 30, 1000, 10**9])
def test_the_first_rung_is_the_documented_formula(total):
    for count, eta in ((9, 3), (10, 3), (8, 2), (1, 2), (5, 4)):
        sizes = rung_sizes(count, eta)
        each = sizes[0] + sum(size * (eta**k - eta ** (k - 1)) for k, size in enumerate(sizes) if k)
        paid = sum(size * eta**k for k, size in enumerate(sizes))
        for continues, unit in ((True, each), (False, paid)):
            if total < unit:
                continue
            found = successive_halving(
                names(count), lambda arm, steps: 0.0, total=total, eta=eta, continues=continues
            )
            assert [rung.steps for rung in found.rungs] == [
                total // unit * eta**k for k in range(len(sizes))
            ]
            assert found.spent == total // unit * unit


@hypothesis.given(
    seed=st.integers(0, 500),
    count=st.integers(1, 20),
    eta=st.integers(2, 5),
    continues=st.booleans(),
    spare=st.floats(1, 50),
)
def test_never_more_than_the_total_and_the_best_wins(seed, count, eta, continues, spare):
    rng = np.random.default_rng(seed)
    arms = names(count)
    setup = dict(zip(arms, rng.exponential(10, count), strict=True))
    price = dict(zip(arms, rng.exponential(1, count) + 0.01, strict=True))
    slopes = dict(zip(arms, rng.permutation(count).astype(float), strict=True))

    def cost(arm, steps):
        return setup[arm] + price[arm] * steps

    total = spare * count * (max(setup.values()) + max(price.values()) * eta ** len(arms))
    run = Recorder(slopes)
    found = successive_halving(
        arms, run, total=total, eta=eta, cost=cost, continues=continues, longest=10**6
    )
    assert found.spent <= total
    assert found.winner == max(arms, key=slopes.__getitem__)
    # What was spent, from the calls.
    last = dict(run.calls)
    paid = [cost(*call) for call in (last.items() if continues else run.calls)]
    np.testing.assert_allclose(found.spent, sum(paid), rtol=1e-12)


@pytest.mark.parametrize("continues", [True, False])
def test_the_total_suffices_whoever_survives_and_no_larger_rung_is_safe(continues):
    # Every ranking of five arms; the worst of them decides what the first rung may be.
    arms, prices = names(5), dict(zip(names(5), (1.0, 2.0, 7.0, 0.5, 30.0), strict=True))
    total = 2000.0

    def run(first, order):
        slopes = dict(zip(order, range(5), strict=True))
        return successive_halving(
            arms,
            lambda arm, steps: slopes[arm],
            total=math.inf if first is None else 1e9,
            first=first,
            eta=2,
            cost=lambda arm, steps: 3 + prices[arm] * steps,
            continues=continues,
        ).spent

    chosen = successive_halving(
        arms,
        lambda arm, steps: 0.0,
        total=total,
        eta=2,
        cost=lambda arm, steps: 3 + prices[arm] * steps,
        continues=continues,
    ).rungs[0].steps  # fmt: skip
    orders = list(itertools.permutations(arms))
    assert max(run(chosen, order) for order in orders) <= total
    assert max(run(chosen + 1, order) for order in orders) > total


def test_dear_arms_leave_fewer_steps():
    def first(price):
        return successive_halving(
            names(9),
            lambda arm, steps: 0.0,
            total=1500,
            cost=lambda arm, steps: steps * (price if arm == "arm0" else 1.0),
        ).rungs[0].steps  # fmt: skip

    assert first(1.0) == 100
    assert first(13.0) == 1500 // (8 + 13 + 2 * (13 + 2))


def test_arms_that_fail_are_listed_and_not_replaced():
    def evaluate(arm, steps):
        if arm == "arm1":
            raise FloatingPointError("loss is inf at step 3")
        if arm == "arm2":
            return math.nan
        if arm == "arm8" and steps > 6:
            return math.inf
        return float(arm[3:])

    found = successive_halving(names(9), evaluate, total=100)
    assert found.failed == (
        Failed("arm1", 6, "FloatingPointError: loss is inf at step 3"),
        Failed("arm2", 6, "quality is nan after 6 steps."),
        Failed("arm8", 18, "quality is inf after 18 steps."),
    )
    assert [arm for arm, _ in found.rungs[0].standing] == [f"arm{k}" for k in (8, 7, 6, 5, 4, 3, 0)]
    assert [arm for arm, _ in found.rungs[1].standing] == ["arm7", "arm6"]
    assert found.winner == "arm7"
    assert found.spent == 90  # failures are paid for


def test_a_rung_in_which_all_fail_leaves_the_one_before():
    def evaluate(arm, steps):
        return float(arm[3:]) if steps == 6 else math.nan

    found = successive_halving(names(9), evaluate, total=100)
    assert found.rungs[1] == Rung(18, ())
    assert found[:2] == ("arm5", 5.0)  # 8, 7 and 6 ran on, and failed
    assert len(found.failed) == 3


def test_all_arms_may_fail():
    found = successive_halving(names(4), lambda arm, steps: math.nan, total=100)
    assert found.winner is None
    assert math.isnan(found.quality)
    assert [failure.arm for failure in found.failed] == names(4)
    assert [rung.standing for rung in found.rungs] == [(), ()]


def test_only_exceptions_are_caught():
    def stop(arm, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        successive_halving(names(2), stop, total=10)


def test_ties_go_to_the_earlier():
    found = successive_halving(names(12), lambda arm, steps: 1.0, total=1000)
    assert found.winner == "arm0"
    assert [arm for arm, _ in found.rungs[1].standing] == names(4)


def test_curves_that_cross_may_mislead():
    slow = {"slow": lambda t: 0.0 if t < 50 else 9.0} | {name: (lambda t: 1.0) for name in names(8)}
    found = successive_halving(list(slow), lambda arm, steps: slow[arm](steps), total=100)
    assert found.winner == "arm0"


def test_first_and_longest():
    found = successive_halving(names(9), Recorder(dict.fromkeys(names(9), 1.0)), total=80, first=5)
    assert [rung.steps for rung in found.rungs] == [5, 15]
    assert found.spent == 75
    found = successive_halving(names(9), lambda arm, steps: 0.0, total=1e6, longest=40)
    assert [rung.steps for rung in found.rungs] == [40, 40]
    assert found.spent == 9 * 40
    found = successive_halving(names(9), lambda arm, steps: 0.0, total=9 * 30 + 5, longest=40)
    assert [rung.steps for rung in found.rungs] == [25, 40]  # 9 * 25 + 3 * 15 = 270
    free = successive_halving(
        names(3), lambda arm, steps: 0.0, total=3, cost=lambda arm, steps: 1.0, longest=7
    )
    assert free.rungs[0].steps == 7


def test_errors_of_halving():
    def run(arms: Sequence[str] = ("a", "b"), *, total: float = 10, **changes: Any):
        return successive_halving(arms, lambda arm, steps: 0.0, total=total, **changes)

    with pytest.raises(ValueError, match="arms must name one arm or more"):
        run(arms=())
    with pytest.raises(ValueError, match="names of arms must differ, got 'a' twice"):
        run(arms=("a", "b", "a"))
    with pytest.raises(ValueError, match=r"total 1 is too small.* may cost 2"):
        run(total=1)
    with pytest.raises(ValueError, match=r"with first=6 the rungs may cost 12"):
        run(first=6)
    for total in (math.nan, math.inf, -1):
        with pytest.raises(ValueError, match="total must be finite"):
            run(total=total)
    for changes in ({"eta": 1}, {"eta": 2.5}, {"first": 0}, {"longest": 0}):
        name = next(iter(changes))
        with pytest.raises(ValueError, match=f"{name} must be a whole number of"):
            run(arms=("a", "b"), **changes)
    with pytest.raises(ValueError, match="cost does not grow with steps"):
        run(cost=lambda arm, steps: 1.0)
    for cost in (lambda arm, steps: -steps, lambda arm, steps: math.nan):
        with pytest.raises(ValueError, match="cost of 'a' must be finite, 0 or more"):
            run(cost=cost)
    with pytest.raises(ValueError, match=r"cost of 'c3' must be .* never decrease"):
        run(
            arms=[f"c{k}" for k in range(9)],
            cost=lambda arm, steps: steps if arm != "c3" else 100 - steps,
        )


# --- recorded curves -----------------------------------------------------------------------------


def test_halving_of_curves_by_hand():
    flops = np.arange(0.0, 1001.0, 10.0)
    curves = {f"a{k}": (flops, k * flops / 1000) for k in range(9)}
    found = halving_of_curves(curves, fraction=0.1)
    # total 900: 9 x 60 + 3 x (180 - 60) = 900, at recorded points of 10 FLOPs; 63 x 3 = 189 still
    # reads the point of 180, 64 x 3 = 192 that of 190.
    assert [(rung.steps, len(rung.standing)) for rung in found.rungs] == [(63, 9), (189, 3)]
    assert found.spent == 900
    assert found.winner == "a8"
    assert found.quality == pytest.approx(8 * 0.18)


def test_dear_set_ups_are_paid_and_read():
    cheap = (np.arange(0.0, 1001.0), np.linspace(0, 0.5, 1001))
    once = (np.array([600.0]), np.array([0.9]))
    found = halving_of_curves({"cheap": cheap, "once": once})
    assert found.winner == "once"
    assert found.spent <= 600 + 100
    assert [rung.steps for rung in found.rungs] == [100]


def test_quality_is_the_best_so_far_and_holes_do_not_count():
    flops = np.array([1.0, 2.0, 3.0])
    found = halving_of_curves(
        {
            "peak": (flops, np.array([0.1, 0.9, np.nan])),
            "never": (flops, np.array([np.nan, np.nan, 1.0])),
        },
        fraction=2 / 3,
    )
    assert found[:2] == ("peak", 0.9)
    assert found.failed == (Failed("never", 2, "quality is -inf after 2 steps."),)


def test_the_whole_trajectory_is_affordable_at_fraction_one():
    rng = np.random.default_rng(0)
    curves = {
        f"a{k}": (np.cumsum(rng.integers(1, 100, 20)).astype(float), rng.random(20))
        for k in range(7)
    }
    found = halving_of_curves(curves, fraction=1.0)
    total = sum(flops[-1] for flops, _ in curves.values())
    assert found.spent <= total
    best = max(curves, key=lambda name: curves[name][1].max())
    assert found.winner == best
    single = halving_of_curves(
        {"a": (np.zeros(1), np.array([0.3])), "b": (np.zeros(1), np.ones(1))}
    )
    assert single[:2] == ("b", 1.0)


@hypothesis.given(seed=st.integers(0, 200), scale=st.sampled_from([1e2, 1e6, 1e13]))
def test_halving_of_curves_keeps_to_its_budget(seed, scale):
    rng = np.random.default_rng(seed)
    curves = {}
    for k in range(int(rng.integers(1, 12))):
        flops = np.cumsum(rng.exponential(scale, int(rng.integers(1, 30))))
        curves[f"a{k}"] = flops, rng.random(flops.size)
    found = halving_of_curves(curves)
    total = sum(max(flops[0], 0.1 * flops[-1]) for flops, _ in curves.values())
    assert found.spent <= total * (1 + 1e-12)
    assert found.winner in curves


def test_errors_of_recorded_curves():
    good = (np.arange(3.0), np.ones(3))
    for bad in ((np.arange(3.0), np.ones(2)), (np.ones((2, 2)), np.ones((2, 2)))):
        with pytest.raises(ValueError, match=r"of 'b' must both have shape \(points,\)"):
            halving_of_curves({"a": good, "b": bad})
    for flops in ([2.0, 1.0], [-1.0, 1.0], [0.0, math.inf]):
        with pytest.raises(ValueError, match="flops of 'b' must be finite, 0 or more and never"):
            halving_of_curves({"a": good, "b": (np.array(flops), np.ones(2))})
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
            halving_of_curves({"a": good}, fraction=fraction)
    with pytest.raises(ValueError, match="arms must name one arm or more"):
        halving_of_curves({})
