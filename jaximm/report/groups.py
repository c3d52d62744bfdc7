"""Many results: which belong together, means and spreads over seeds, paired differences.

Seeds of one method form a group. Ratios are averaged as natural logarithms, so a mean ratio is a
geometric mean. Two methods are compared seed by seed on the seeds that both have: the difference
of a pair cancels what the seed did to both, so its spread is the one that matters.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Result = Mapping[str, Any]


class Group(NamedTuple):
    """Results that differ only in their seed, in order of seed."""

    label: str
    experiment: str
    method: str
    init: str
    results: tuple[Result, ...]


class Moments(NamedTuple):
    """Mean and sample standard deviation (n - 1; None for a single value) of `n` numbers."""

    mean: float
    sd: float | None
    n: int


class Measure(NamedTuple):
    """A scalar of a result: its name, its unit, and how to read it (None where it is missing)."""

    name: str
    unit: str
    get: Callable[[Result], float | None]


class PairedDifference(NamedTuple):
    """`first` minus `second` in one measure over the seeds that both have."""

    first: str
    second: str
    measure: str
    unit: str
    difference: Moments
    seeds: tuple[int, ...]
    first_larger: int


def is_deep(result: Result) -> bool:
    """Whether a result is of a deep backbone: theta_0 is a trained model, not the identity."""
    return "backbone" in result


def any_deep(groups: Sequence[Group]) -> bool:
    """Whether there is a result of a deep backbone among `groups`."""
    return any(is_deep(result) for group in groups for result in group.results)


def group_results(results: Sequence[Result]) -> list[Group]:
    """Groups `results` by experiment, method, start and, where one seed occurs twice, by config.

    The order is that of first appearance. A result that occurs twice is counted once. Labels name
    the method, and beyond it only what tells the groups apart.

    Raises:
      ValueError: if there are no results.
    """
    if not results:
        raise ValueError("expected at least one result, got none.")
    buckets: dict[tuple, list[Result]] = {}
    for result in results:
        bucket = buckets.setdefault((result["experiment"], result["method"], result["init"]), [])
        if result not in bucket:
            bucket.append(result)
    experiments = {key[0] for key in buckets}
    groups = []
    for (experiment, method, init), bucket in buckets.items():
        starts = {key[2] for key in buckets if key[:2] == (experiment, method)}
        label = method if len(starts) == 1 else f"{method}, {init} start"
        label = label if len(experiments) == 1 else f"{experiment}: {label}"
        for suffix, members in _split_by_config(bucket):
            ordered = tuple(sorted(members, key=lambda result: result["seed"]))
            groups.append(Group(label + suffix, experiment, method, init, ordered))
    return groups


def moments(values: Sequence[float | None]) -> Moments | None:
    """Mean and sample standard deviation of the values that are not None; None if none is left.

    >>> moments([1.0, 3.0, None])
    Moments(mean=2.0, sd=1.4142135623730951, n=2)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    sd = statistics.stdev(known) if len(known) > 1 else None
    return Moments(statistics.fmean(known), sd, len(known))


def conditioning_row(
    result: Result, *, footing: str = "damped", split: str = "train"
) -> Mapping[str, Any] | None:
    """The conditioning row on one footing and one set of rows, None where it was not measured."""
    return result["conditioning"].get(footing, {}).get(split)


def values(group: Group, key: str, *, footing: str = "damped", split: str = "train") -> list[float]:
    """One number of the conditioning rows of a group, a value a seed that has it."""
    rows = (conditioning_row(result, footing=footing, split=split) for result in group.results)
    return [row[key] for row in rows if row and row[key] is not None]


def ratio(
    group: Group, key: str, *, footing: str = "damped", split: str = "train"
) -> Moments | None:
    """Moments of `values`."""
    return moments(values(group, key, footing=footing, split=split))


def quality(
    group: Group, side: str, *, key: str = "utility", split: str = "held_out"
) -> Moments | None:
    """Quality on the primary task, or with ``key="harmful_utility"`` on the harmful one."""
    records = (result[key] for result in group.results)
    return moments([sides[side][split] for sides in records if sides])


def group_rir(group: Group, key: str, *, split: str = "held_out") -> Moments | None:
    """A logarithm of the protocol by groups of rows: mean and deviation over groups of rows.

    Of several seeds: the mean of the means, and the root mean square of the deviations, so that
    the deviation stays that of groups of rows within a seed. `n` counts groups. None where there
    is nothing, or a mean is not finite.

    Args:
      group: results of one method.
      key: "log_ratio_harmful", "log_ratio_primary" or "log_rir".
      split: rows, a key of `jaximm.records.result.SPLITS`.
    """
    rows = [result["groups"][split] for result in group.results if "groups" in result]
    if not rows or any(row[key]["mean"] is None for row in rows):
        return None
    sds = [row[key]["sd"] for row in rows]
    known = [sd for sd in sds if sd is not None]
    sd = math.sqrt(statistics.fmean(sd**2 for sd in known)) if len(known) == len(rows) else None
    mean = statistics.fmean(row[key]["mean"] for row in rows)
    return Moments(mean, sd, sum(row["groups"] for row in rows))


def rank_lost(result: Result) -> dict[str, tuple[int, int]]:
    """Ranks of the features before and after, by task, of a deep backbone that lost directions.

    Empty where no task lost any. Kappas are then over different numbers of directions.
    """
    row = conditioning_row(result) or {}
    if not is_deep(result) or not row:
        return {}
    ranks = {task: (row[task]["before"]["rank"], row[task]["after"]["rank"]) for task in _TASKS}
    return {task: pair for task, pair in ranks.items() if pair[1] < pair[0]}


_TASKS = ("harmful", "primary")


def measures(results: Sequence[Result]) -> list[Measure]:
    """What methods are compared in, those that at least one of `results` has."""

    def conditioning(split: str, key: str) -> Callable[[Result], float | None]:
        return lambda result: (conditioning_row(result, split=split) or {}).get(key)

    def after(key: str) -> Callable[[Result], float | None]:
        return lambda result: result[key]["after"]["held_out"] if result[key] else None

    def by_group(result: Result) -> float | None:
        return result["groups"]["held_out"]["log_rir"]["mean"] if "groups" in result else None

    def recoverable(result: Result) -> float | None:
        return after("harmful_utility")(result) if is_deep(result) else None

    candidates = [
        Measure("log RIR, training rows", "nats", conditioning("train", "log_rir")),
        Measure("log RIR, held-out rows", "nats", conditioning("held_out", "log_rir")),
        Measure("log RIR by group, held-out rows", "nats", by_group),
        Measure("log (i), training rows", "nats", conditioning("train", "log_ratio_harmful")),
        Measure("log (ii), training rows", "nats", conditioning("train", "log_ratio_primary")),
        Measure("primary quality, held-out rows", "fraction", after("utility")),
        Measure("recoverable harmful accuracy, held-out rows", "fraction", recoverable),
    ]
    return [m for m in candidates if any(m.get(result) is not None for result in results)]


def paired_differences(groups: Sequence[Group]) -> list[PairedDifference]:
    """Differences between every two groups of one experiment with at least two common seeds."""
    chosen = measures([result for group in groups for result in group.results])
    # Each value once, not once a pair of groups: there may be hundreds of groups.
    values = [
        {result["seed"]: [measure.get(result) for measure in chosen] for result in group.results}
        for group in groups
    ]
    differences = []
    for (i, first), (j, second) in itertools.combinations(enumerate(groups), 2):
        seeds = [seed for seed in values[i] if seed in values[j]]
        if first.experiment != second.experiment or len(seeds) < 2:
            continue
        for k, measure in enumerate(chosen):
            pairs = [(seed, values[i][seed][k], values[j][seed][k]) for seed in seeds]
            known = {seed: a - b for seed, a, b in pairs if a is not None and b is not None}
            spread = moments(list(known.values()))
            if spread is None or spread.n < 2:
                continue
            larger = sum(difference > 0 for difference in known.values())
            names = (first.label, second.label, measure.name, measure.unit)
            differences.append(PairedDifference(*names, spread, tuple(known), larger))
    return differences


def _split_by_config(bucket: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Splits results of one method that share a seed into groups of one configuration each."""
    seeds = [result["seed"] for result in bucket]
    if len(set(seeds)) == len(seeds):
        return [("", list(bucket))]
    flat = [_flatten(result["config"]) for result in bucket]
    varying = sorted(
        key
        for key in set().union(*flat)
        if key.rsplit(".", 1)[-1] not in ("seed", "seeds", "out")
        and len({json.dumps(config.get(key)) for config in flat}) > 1
    )
    split: dict[str, list[Result]] = {}
    for result, config in zip(bucket, flat, strict=True):
        differences = ", ".join(f"{key.rsplit('.', 1)[-1]}={config.get(key)}" for key in varying)
        base = f" ({differences})" if differences else ""
        suffix, copy = base, 1
        while any(other["seed"] == result["seed"] for other in split.get(suffix, [])):
            copy += 1
            suffix = f"{base} run {copy}"
        split.setdefault(suffix, []).append(result)
    return list(split.items())


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
