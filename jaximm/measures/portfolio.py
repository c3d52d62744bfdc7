r"""Portfolios of attackers: what any of them recovers, and which one a budget should go to.

**Union.** AutoAttack (Croce and Hein 2020, https://arxiv.org/abs/2003.01690) counts an input as
broken if any attack of its ensemble breaks it. `union` does so for the examples of a harmful task:
each is recovered if any attacker's model is right about it. For inputs that is a fact about one
model and one attacker who sees whether he won. Here it is not one model: nobody can tell which of
the attacked models to believe about an example, so the union is an *upper bound* on what the
attackers know together, and guessing inflates it. k independent attackers of accuracy p have a
union of 1 - (1 - p)^k, which tends to 1 for any p > 0. Read it only beside what it would be if
attackers' successes had nothing to do with each other: `chance_union` and `union_null`.

**Successive halving** divides one budget over arms (attacker x hyper-parameters): all of them run
for a little, the best part of them longer, and so on (Karnin, Koren and Somekh 2013, Almost optimal
exploration in multi-armed bandits, ICML; for learning curves, Jamieson and Talwalkar 2016,
https://arxiv.org/abs/1502.07943).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize

LONGEST = 2**62
"""First rung above which a search for it gives up: the price does not grow with steps."""


class ChanceUnion(NamedTuple):
    """Unions that unrelated attackers would have.

    Attributes:
      guessing: of as many attackers that know nothing, 1 - (1 - chance)^k.
      independent: of attackers as accurate as these, but independent of each other about every
        example: mean over seeds of 1 - prod_a (1 - p_a).
    """

    guessing: float
    independent: float


class UnionNull(NamedTuple):
    """A union beside those of the same scores with the examples shuffled; see `union_null`.

    Attributes:
      observed: mean of `union`.
      mean: of the null, exactly: `ChanceUnion.independent`.
      lower: quantile (1 - level) / 2 of the draws.
      upper: quantile (1 + level) / 2 of the draws.
      above: part of the draws, the observation among them, with a union of the observed or more:
        small if attackers complement each other.
      below: likewise with the observed or less: small if they recover the same examples, as
        attackers of one model mostly do.
    """

    observed: float
    mean: float
    lower: float
    upper: float
    above: float
    below: float


class Rung(NamedTuple):
    """One round of halving.

    Attributes:
      steps: each arm has run for, in total.
      standing: arms with their quality, the best first; those that failed here are not among them.
    """

    steps: int
    standing: tuple[tuple[str, float], ...]


class Failed(NamedTuple):
    """An arm that dropped out.

    Attributes:
      arm: its name.
      steps: of the rung that it failed in.
      message: what it raised, or which number came instead of a quality.
    """

    arm: str
    steps: int
    message: str


class Portfolio(NamedTuple):
    """What successive halving chose and did.

    Attributes:
      winner: the best arm of the last rung in which any arm stands that never failed; None if all
        failed.
      quality: its quality there, on selection rows: optimistic, since it chose; NaN if all failed.
      rungs: in order.
      spent: price of all that ran, failures included; never more than the total.
      failed: in the order in which they failed.
    """

    winner: str | None
    quality: float
    rungs: tuple[Rung, ...]
    spent: float
    failed: tuple[Failed, ...]


def union(scores: Mapping[str, Float[np.ndarray, "s n"]]) -> Float[np.ndarray, "s n"]:
    """Whether any attacker recovers an example, seed by seed: 0 or 1.

    union_ji = max_a scores_a,ji. The mean is at least that of the best attacker and grows with each
    attacker that guesses, so it is an upper bound and no accuracy: quote it beside `chance_union`
    and `union_null` only. NaN counts as 0, not recovered.

    Args:
      scores: by attacker, [s, n], 0 and 1 for correctness; the same examples in the same order, row
        j of all attackers from seed j.

    Returns:
      [s, n], float64.

    Raises:
      ValueError: no attacker, shapes that differ, or scores other than 0, 1 and NaN.

    References:
      Croce and Hein (2020), https://arxiv.org/abs/2003.01690, for the inputs of one model.

    >>> union({"a": np.array([[0.0, 1.0, 0.0]]), "b": np.array([[0.0, 0.0, 1.0]])}).tolist()
    [[0.0, 1.0, 1.0]]
    """
    return np.max(_stack(scores), axis=0)


def chance_union(scores: Mapping[str, Float[np.ndarray, "s n"]], *, chance: float) -> ChanceUnion:
    r"""The union expected of as many attackers whose successes have nothing in common.

    guessing = 1 - (1 - chance)^k;  independent = mean_j 1 - prod_a (1 - p_aj),  p_aj the mean over
    examples of attacker a under seed j. A union at or below `independent` is no sign that attackers
    complement each other, one at or below `guessing` none that they know anything.

    Args:
      scores: as in `union`; k attackers.
      chance: accuracy of knowing nothing, 1 / classes or the largest share of one class.

    Raises:
      ValueError: as `union`; chance not in [0, 1].

    >>> guesses = {str(k): np.eye(10)[[k]] for k in range(10)}  # each right about one in ten
    >>> union(guesses).mean().item()
    1.0
    >>> [round(value, 3) for value in chance_union(guesses, chance=0.1)]
    [0.651, 0.651]
    """
    if not 0 <= chance <= 1:
        raise ValueError(f"chance must be in [0, 1], such as 1 / classes, got {chance}.")
    return ChanceUnion(1 - (1 - chance) ** len(scores), _independent(_stack(scores)))


def union_null(
    scores: Mapping[str, Float[np.ndarray, "s n"]],
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> UnionNull:
    r"""The union if attackers' successes did not line up by example: a permutation null.

    A draw shuffles the examples of each attacker independently of the other attackers', in one
    order for all seeds, so that an attacker's accuracies and how far his seeds agree stay as they
    are. An example is then right with probability p_aj for each attacker independently, so the mean
    of the null is known (`chance_union`); draws give its spread alone.

    Args:
      scores: as in `union`. One attacker is its own null.
      draws: 1 or more.
      seed: of the shuffling.
      level: of the range from lower to upper, in (0, 1).

    Raises:
      ValueError: as `union`; a wrong number of draws or level.
    """
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, got {draws}.")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95, got {level}.")
    table = _stack(scores)
    rng = np.random.default_rng(seed)
    observed = float(np.mean(np.max(table, axis=0)))
    right = np.ascontiguousarray(table.transpose(0, 2, 1), dtype=bool)  # rows move, fast
    null = np.empty(draws)
    for draw in range(draws):
        any_right = right[0].copy()  # not shuffled: only orders relative to each other matter
        for attacker in right[1:]:
            any_right |= attacker[rng.permutation(len(attacker))]
        null[draw] = np.mean(any_right)
    lower, upper = np.quantile(null, [(1 - level) / 2, (1 + level) / 2])
    return UnionNull(
        observed=observed,
        mean=_independent(table),
        lower=float(lower),
        upper=float(upper),
        above=float((1 + np.sum(null >= observed)) / (1 + draws)),
        below=float((1 + np.sum(null <= observed)) / (1 + draws)),
    )


def rung_sizes(arms: int, eta: int) -> tuple[int, ...]:
    """Arms of each rung: ceil(arms / eta^k), k = 0, 1, ..., as long as there is more than one.

    There are ceil(log_eta arms) rungs, in integers; one arm has one rung. The last rung has 2 to
    eta arms, of which the best wins: the winner is not run for itself.

    >>> rung_sizes(27, 3), rung_sizes(10, 3), rung_sizes(1, 3)
    ((27, 9, 3), (10, 4, 2), (1,))
    """
    sizes = [arms]
    while sizes[-1] > eta:
        sizes.append(-(-arms // eta ** len(sizes)))
    return tuple(sizes)


def successive_halving(
    arms: Sequence[str],
    evaluate: Callable[[str, int], float],
    *,
    total: float,
    first: int | None = None,
    eta: int = 3,
    cost: Callable[[str, int], float] | None = None,
    continues: bool = True,
    longest: int | None = None,
) -> Portfolio:
    r"""Spends one budget on the arms that look best.

    Rung k runs the n_k = ceil(n / eta^k) best of n arms (`rung_sizes`), ties to the earlier, up to
    t_k = first eta^k steps. The budget sets the first rung: with a step of price 1, and runs that
    are continued,

        spent = n_0 first + sum_(k >= 1) n_k (t_k - t_(k-1))
        first = floor(total / (n_0 + sum_(k >= 1) n_k (eta^k - eta^(k-1))))

    and without continuing floor(total / sum_k n_k eta^k). With prices that differ between arms it
    is the largest first rung for which the total suffices *whichever* arms survive, the dearest
    included (the worst case is an assignment of arms to their last rungs), so spent <= total always
    and dear arms cost the others steps.

    In the source every rung costs the same: floor(total / (n_k rungs)) *further* steps of each arm.
    Here it is an arm's steps in all that grow by eta, so that a later rung costs 1 - 1 / eta of the
    first and its steps do not depend on rounding.

    An arm whose quality is not finite, or which raises an `Exception`, drops out with its message.
    Its place is not given to another, and it does not win by an earlier quality. Where curves cross
    after a rung, that rung decides wrongly; where they do not, the best arm wins.

    Args:
      arms: names, all different.
      evaluate: (arm, steps) -> quality on selection rows after so many steps in total, higher is
        better. It is called rung by rung, the best arms first after rung 0, with `steps`
        increasing for each arm, so that it can continue what it ran.
      total: budget, in the unit of the price; all of the runs together.
      first: steps of the first rung; as many as the total allows if None.
      eta: 2 or more.
      cost: (arm, steps) -> price of a run of that length from its start, set-up included (FLOPs),
        never decreasing in steps. The number of steps if None.
      continues: whether `evaluate` continues runs, and pays for the further steps only; otherwise
        each call is paid in full.
      longest: steps that no run exceeds: rungs above are cut to it.

    Returns:
      See `Portfolio`. For one seed the same numbers each time, if `evaluate` gives the same.

    Raises:
      ValueError: no arm or arms that repeat; eta, first or longest out of range; a total too small
        for a first rung of one step (or of `first`); a price that is negative, not finite or
        decreasing, or that does not grow with steps while neither first nor longest is given.

    >>> found = successive_halving("abc", lambda arm, steps: {"a": 1, "b": 3, "c": 2}[arm] * steps,
    ...                            total=30)
    >>> found.winner, found.rungs[0].steps, found.spent
    ('b', 10, 30.0)
    """
    arms = list(arms)
    _check_halving(arms, total, first, eta, longest)
    sizes = rung_sizes(len(arms), eta)
    price = (lambda arm, steps: steps) if cost is None else cost

    def schedule(begin: int) -> list[int]:
        return [
            begin * eta**k if longest is None else min(begin * eta**k, longest)
            for k in range(len(sizes))
        ]

    def most(begin: int) -> float:
        return _dearest(_prices(arms, schedule(begin), price, continues), sizes)

    if first is None:
        first = _largest(most, total, longest)
    elif most(first) > total:
        raise ValueError(
            f"total {total} is too small: with first={first} the rungs may cost {most(first)}."
        )
    steps = schedule(first)
    prices = dict(zip(arms, _prices(arms, steps, price, continues), strict=True))
    rungs: list[Rung] = []
    failed: list[Failed] = []
    paid: dict[str, float] = {}
    place = {arm: number for number, arm in enumerate(arms)}
    alive = arms
    for k, (length, size) in enumerate(zip(steps, sizes, strict=True)):
        standing = []
        for arm in alive[:size]:
            paid[arm] = float(prices[arm][k])  # of all its rungs
            quality, message = _attempt(evaluate, arm, length)
            if message is None:
                standing.append((arm, quality))
            else:
                failed.append(Failed(arm, length, message))
        standing.sort(key=lambda pair: (-pair[1], place[pair[0]]))
        rungs.append(Rung(length, tuple(standing)))
        alive = [arm for arm, _ in standing]
    winner, quality = _winner(rungs, {failure.arm for failure in failed})
    return Portfolio(winner, quality, tuple(rungs), math.fsum(paid.values()), tuple(failed))


def halving_of_curves(
    curves: Mapping[str, tuple[Float[np.ndarray, "r"], Float[np.ndarray, "r"]]],
    *,
    fraction: float = 0.1,
    eta: int = 3,
) -> Portfolio:
    """What successive halving would have done on trajectories that are already recorded.

    A rung is a number of FLOPs, the same for every arm. An arm is read at its last point of that
    cost or less, and pays the cost of that point; one that is dearer to set up is read at its first
    point, and pays for it. Its quality is the best so far. The total is that of running every arm
    for `fraction` of the cost of its trajectory, or through its set-up where that costs more.

    Args:
      curves: by arm, (flops [r], quality [r] on selection rows), flops never decreasing. A quality
        that is not finite does not count; an arm with no other so far drops out.
      fraction: in (0, 1].
      eta: 2 or more.

    Returns:
      `Rung.steps` are FLOPs, and so is `spent`.

    Raises:
      ValueError: as `successive_halving`; shapes that do not fit, or FLOPs that are negative, not
        finite or decreasing; another fraction.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], such as 0.1, got {fraction}.")
    read = {name: _recorded(name, *curve) for name, curve in curves.items()}

    costs = {name: flops.tolist() for name, (flops, _) in read.items()}

    def reached(arm: str, flops: int) -> int:
        return max(0, bisect.bisect_right(costs[arm], flops) - 1)

    def evaluate(arm: str, flops: int) -> float:
        sofar = read[arm][1][: reached(arm, flops) + 1]
        return float(np.max(sofar[np.isfinite(sofar)], initial=-math.inf))

    return successive_halving(
        list(read),
        evaluate,
        total=sum(max(float(flops[0]), fraction * float(flops[-1])) for flops, _ in read.values()),
        eta=eta,
        cost=lambda arm, flops: costs[arm][reached(arm, flops)],
        longest=max((math.ceil(flops[-1]) for flops, _ in read.values()), default=1) or 1,
    )


def _winner(rungs: Sequence[Rung], failed: set[str]) -> tuple[str | None, float]:
    """Best arm of the last rung that has one which never failed."""
    for rung in reversed(rungs):
        for arm, quality in rung.standing:
            if arm not in failed:
                return arm, quality
    return None, math.nan


def _attempt(evaluate, arm: str, steps: int) -> tuple[float, str | None]:
    """Quality and None, or NaN and why there is none."""
    try:
        quality = float(evaluate(arm, steps))
    except Exception as error:  # whatever an attacker does wrong, the others go on and it is told
        return math.nan, f"{type(error).__name__}: {error}"
    if math.isfinite(quality):
        return quality, None
    return math.nan, f"quality is {quality} after {steps} steps."


def _prices(arms, steps, price, continues) -> Float[np.ndarray, "arms rungs"]:
    """What an arm has paid in all once it has been through rung k."""
    table = np.array([[price(arm, length) for length in steps] for arm in arms], np.float64)
    if not np.all(np.isfinite(table)) or np.any(table < 0) or np.any(np.diff(table, axis=1) < 0):
        wrong = next(
            arm
            for arm, row in zip(arms, table, strict=True)
            if not np.all(np.isfinite(row)) or np.any(row < 0) or np.any(np.diff(row) < 0)
        )
        raise ValueError(
            f"cost of {wrong!r} must be finite, 0 or more and never decrease in steps, "
            f"got {table[arms.index(wrong)].tolist()} for {steps} steps."
        )
    return table if continues else np.cumsum(table, axis=1)


def _dearest(prices: Float[np.ndarray, "arms rungs"], sizes: Sequence[int]) -> float:
    """The most that all arms together can pay, over who survives to which rung."""
    leave = np.repeat(np.arange(len(sizes)), -np.diff([*sizes, 0]))  # last rung of each place
    slots = prices[:, leave]
    if np.all(prices == prices[0]):
        return math.fsum(slots[0])
    return math.fsum(slots[optimize.linear_sum_assignment(slots, maximize=True)])


def _largest(most: Callable[[int], float], total: float, longest: int | None) -> int:
    """The largest first rung that may cost no more than the total; `most` never decreases."""
    if most(1) > total:
        raise ValueError(
            f"total {total} is too small: a first rung of one step may cost {most(1)} in all; "
            "give more, or fewer arms."
        )
    limit = LONGEST if longest is None else longest
    low, high = 1, 2
    while high <= limit and most(high) <= total:
        low, high = high, 2 * high
    if high > limit and longest is None:
        raise ValueError("cost does not grow with steps: give first or longest.")
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if most(middle) <= total else (low, middle)
    return low


def _stack(scores: Mapping[str, Float[np.ndarray, "s n"]]) -> Float[np.ndarray, "k s n"]:
    """Correctness of all attackers in float64, checked; NaN becomes 0."""
    if not scores:
        raise ValueError("scores must hold one attacker or more, got none.")
    tables = {name: np.asarray(table, np.float64) for name, table in scores.items()}
    shape = next(iter(tables.values())).shape
    for name, table in tables.items():
        if table.ndim != 2 or table.size == 0 or table.shape != shape:
            raise ValueError(
                "scores must have one shape (seeds, examples), none empty, for all attackers; "
                f"got {table.shape} of {name!r} and {shape} of {next(iter(tables))!r}."
            )
        if not np.all((table == 0) | (table == 1) | np.isnan(table)):
            raise ValueError(
                f"scores of {name!r} must be 0 and 1 (correctness): other scores have no union."
            )
    return np.nan_to_num(np.stack(list(tables.values())), nan=0.0)


def _independent(table: Float[np.ndarray, "k s n"]) -> float:
    """Mean over seeds of 1 - prod_a (1 - p_a)."""
    return float(np.mean(1 - np.prod(1 - np.mean(table, axis=2), axis=0)))


def _recorded(name: str, flops, quality) -> tuple[np.ndarray, np.ndarray]:
    """A recorded trajectory in float64, checked."""
    flops, quality = np.asarray(flops, np.float64), np.asarray(quality, np.float64)
    if flops.ndim != 1 or flops.size == 0 or flops.shape != quality.shape:
        raise ValueError(
            f"flops and quality of {name!r} must both have shape (points,), "
            f"got {flops.shape} and {quality.shape}."
        )
    if not np.all(np.isfinite(flops)) or flops[0] < 0 or np.any(np.diff(flops) < 0):
        raise ValueError(
            f"flops of {name!r} must be finite, 0 or more and never decrease, got {flops.tolist()}."
        )
    return flops, quality


def _check_halving(arms, total, first, eta, longest) -> None:
    """Raises ValueError unless the arguments of `successive_halving` make sense."""
    if not arms:
        raise ValueError("arms must name one arm or more, got none.")
    repeated = sorted({arm for arm in arms if arms.count(arm) > 1})
    if repeated:
        raise ValueError(f"names of arms must differ, got {repeated[0]!r} twice.")
    if not (math.isfinite(total) and total >= 0):
        raise ValueError(f"total must be finite and 0 or more, got {total}.")
    for name, value, least in (("eta", eta, 2), ("first", first, 1), ("longest", longest, 1)):
        if value is not None and (int(value) != value or value < least):
            raise ValueError(f"{name} must be a whole number of {least} or more, got {value}.")
