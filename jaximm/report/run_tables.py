"""Results of runs as tables: for the terminal, as Markdown, as CSV, for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import RenderableType

from jaximm.records.result import EARLIER, FOOTINGS, SPLITS
from jaximm.report import formats, reading, table
from jaximm.report.groups import (
    Group,
    Moments,
    Result,
    any_deep,
    conditioning_row,
    group_results,
    group_rir,
    is_deep,
    moments,
    paired_differences,
    quality,
    rank_lost,
    ratio,
)
from jaximm.report.table import Column, Table

SPLIT_NAMES = {"train": "training", "held_out": "held-out"}
FOOTING_NAMES = {
    "damped": "damped (the measure)",
    "shipped": "damped after theta",
    "pseudo_inverse": "pseudo-inverse",
    "reference": "reference code",
}
TASKS, SIDES = ("harmful", "primary"), ("before", "after")
_RATIOS = ("log_ratio_harmful", "log_ratio_primary", "log_rir")
_QUALITIES = {"utility": "primary", "harmful_utility": "harmful"}


# ---------------------------------------------------------------- what cells show


def _mean(spread: Moments | None) -> float | None:
    return None if spread is None else spread.mean


def _arrow(ends: Sequence[float | None], arrow: str = "→") -> str:
    texts = [formats.decimal(end) for end in ends]
    return formats.MISSING if set(texts) == {formats.MISSING} else arrow.join(texts)


def _label(group: Group) -> str:
    return group.label


def _deep(group: Group) -> bool:
    return any(map(is_deep, group.results))


def _lost(group: Group) -> bool:
    return any(map(rank_lost, group.results))


def _ends(group: Group, key: str) -> tuple[float | None, ...]:
    return tuple(_mean(quality(group, side, key=key)) for side in SIDES)


# ---------------------------------------------------------------- words


def lead(groups: Sequence[Group]) -> str:
    """One sentence over all methods: which of those that keep the primary task conditions most."""
    if len(groups) == 1:
        ends = (ratio(groups[0], "log_rir", split=split) for split in SPLITS)
        train, unseen = (formats.from_log(_mean(end)) for end in ends)
        return f"{groups[0].label}: RIR {train} on training rows, {unseen} on held-out rows."
    defended = [group for group in groups if group.method != "none"] or list(groups)
    kept = [group for group in defended if _keeps(group) is not False]
    count = f"{len(kept)} of {len(defended)} methods keep{'s' * (len(kept) == 1)} the primary task"
    if all(_keeps(group) is None for group in defended):
        count = "What is left of the primary task was not measured"
    if not kept:
        return f"{count}: none is a defence."
    logs = [(ratio(group, "log_rir", split="held_out"), group) for group in kept]
    known = [(spread.mean, group) for spread, group in logs if spread and not _lost(group)]
    if not known:
        return f"{count}."
    log_rir, best = max(known, key=lambda pair: pair[0])
    text = f"{count}; of these {best.label} has the largest RIR on held-out rows"
    return f"{text} ({formats.from_log(log_rir)})."


def _keeps(group: Group) -> bool | None:
    """Whether most of what is above chance of the primary task is left; None: not measured."""
    before, after = _ends(group, "utility")
    if before is None or after is None:
        return None
    data = group.results[0]["data"]["primary"]
    chances = {"binary": 1 / 2, "classes": 1 / data.get("classes", math.inf)}
    chance = chances.get(data["kind"], 0.0)
    return before <= chance or after - chance >= reading.KEPT * (before - chance)


def earlier(results: Sequence[Result]) -> str:
    """What is said of results of version 1, whose attack rows are not shown; "" of others."""
    return reading.note("earlier", when=any(r["schema"] == EARLIER for r in results))


# ---------------------------------------------------------------- tables


def summary(groups: Sequence[Group], *, recoverable: bool = False) -> Table:
    """One row a method: (i), (ii), RIR on both sets of rows, quality.

    Where a backbone is deep also RIR by group of held-out rows, and the harmful accuracy that a
    closed form recovers (elsewhere if `recoverable`).
    """
    deep = any_deep(groups)
    metric = _metric(groups)

    def factor(
        key: str, split: str = "train", footing: str = "damped"
    ) -> Callable[[Group], float | None]:
        def mean(group: Group) -> float | None:
            spread = ratio(group, key, footing=footing, split=split)
            return None if _lost(group) else _mean(spread)

        return mean

    def left(group: Group) -> Sequence[float | None]:
        return _ends(group, "harmful_utility") if recoverable or _deep(group) else ()

    columns = [
        Column("method", _label),
        Column("(i)", factor("log_ratio_harmful"), formats.from_log),
        Column("(ii)", factor("log_ratio_primary"), formats.from_log),
        Column("RIR", factor("log_rir"), formats.from_log),
        Column("RIR held out", factor("log_rir", "held_out"), formats.from_log),
        Column("RIR held out, damped after theta", factor("log_rir", "held_out", "shipped"),
               formats.from_log),
        Column("RIR by group, held out", lambda g: _mean(group_rir(g, "log_rir")),
               formats.from_log),
        Column("of limit", factor("log_fraction"), formats.decimal),
        Column(f"primary {metric}", lambda g: _ends(g, "utility"), _arrow),
        Column(f"harmful {metric} recoverable", left, lambda ends: _arrow(ends or (None,))),
    ]  # fmt: skip
    if not deep:
        columns = [c for place, c in enumerate(columns) if place not in (5, 6)
                   and (recoverable or place != 9)]  # fmt: skip
    seeds = sorted({len(group.results) for group in groups})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    head = "damped least-squares classifier" if deep else "linear head"
    removed = ", ".join(group.label for group in groups if deep and _lost(group))
    note = reading.note(
        "summary",
        count=count,
        limit_of=_limit_of(groups),
        after_theta=reading.note("summary_after_theta", when=deep),
        by_group=reading.note("summary_by_group", when=deep),
        recoverable=reading.note(
            "summary_recoverable", when=deep or recoverable, metric=metric, head=head
        ),
        removed=reading.note("summary_removed", when=removed, labels=removed),
    )
    return Table("Summary", columns, groups, note)


def conditioning(groups: Sequence[Group], *, footing: str = "damped") -> Table:
    """Condition numbers before and after, on one footing, one row a method and set of rows."""

    def of(key: str) -> Callable[[tuple[Group, str]], Moments | None]:
        return lambda record: ratio(record[0], key, footing=footing, split=record[1])

    def kappa(heading: str, task: str, side: str) -> Column:
        return Column(heading, lambda r: _kappa(r[0], r[1], footing, task, side), formats.from_log)

    def factor(heading: str, key: str) -> Column:
        return Column(heading, lambda r: _mean(of(key)(r)), formats.from_log)

    columns = (
        Column("method", lambda r: r[0].label),
        Column("rows", lambda r: SPLIT_NAMES[r[1]]),
        kappa("κ harmful before", "harmful", "before"),
        kappa("after", "harmful", "after"),
        factor("(i)", "log_ratio_harmful"),
        kappa("κ primary before", "primary", "before"),
        kappa("after", "primary", "after"),
        factor("(ii)", "log_ratio_primary"),
        Column("log RIR (nats)", of("log_rir"), formats.mean_sd),
        Column("limit", lambda r: _mean(of("log_rir_limit")(r)), lambda v: formats.decimal(v, 2)),
        Column("fraction", lambda r: _mean(of("log_fraction")(r)), formats.decimal),
    )
    records = [
        (group, split) for group in groups for split in SPLITS
        if any(_kappa(group, split, footing, task, side) is not None
               for task in TASKS for side in SIDES)
    ]  # fmt: skip
    title = f"Condition numbers, {FOOTING_NAMES[footing]}"
    return Table(title, columns, records, reading.note("conditioning"))


def _kappa(group: Group, split: str, footing: str, task: str, side: str) -> float | None:
    rows = (conditioning_row(result, footing=footing, split=split) for result in group.results)
    return _mean(moments([row[task][side]["log_kappa"] for row in rows if row]))


def by_group(groups: Sequence[Group]) -> Table:
    """RIR within groups of rows, the protocol of the literature; no rows where not measured."""
    records = [
        (group, split, [result["groups"][split] for result in group.results if "groups" in result])
        for group in groups
        for split in SPLITS
    ]
    records = [record for record in records if record[2]]
    sizes = {(row["groups"], row["rows"]) for _, _, rows in records for row in rows}

    def spread(key: str) -> Callable[[Any], Moments | None]:
        return lambda record: group_rir(record[0], key, split=record[1])

    columns = (
        Column("method", lambda r: r[0].label),
        Column("rows", lambda r: SPLIT_NAMES[r[1]]),
        Column("groups", lambda r: sorted({f"{row['groups']} of {row['rows']}" for row in r[2]}),
               ", ".join),
        *(Column(heading, spread(key), formats.mean_sd)
          for heading, key in zip(("log (i)", "log (ii)", "log RIR"), _RATIOS, strict=True)),
        Column("RIR", lambda r: _mean(spread("log_rir")(r)), formats.from_log),
    )  # fmt: skip
    count = "".join(f"{number} groups of {size} rows, " for number, size in sizes)
    title = f"RIR by group ({count if len(sizes) == 1 else ''}pseudo-inverse)"
    return Table(title, columns, records, reading.note("by_group"))


def footings(groups: Sequence[Group]) -> Table:
    """Every footing with what its numbers hang on: rank, tolerance, dtype, what dominates."""
    records = [
        (group, footing, split,
         [row for result in group.results
          if (row := conditioning_row(result, footing=footing, split=split))])
        for group in groups for footing in FOOTINGS for split in SPLITS
    ]  # fmt: skip

    def kappas(record: Any) -> list[Any]:
        return [row[task][side] for row in record[3] for task in TASKS for side in SIDES]

    def factor(key: str) -> Callable[[Any], float | None]:
        return lambda r: _mean(ratio(r[0], key, footing=r[1], split=r[2]))

    columns = (
        Column("method", lambda r: r[0].label),
        Column("footing", lambda r: FOOTING_NAMES[r[1]]),
        Column("rows", lambda r: SPLIT_NAMES[r[2]]),
        Column("log RIR (nats)", lambda r: moments([row["log_rir"] for row in r[3]]),
               formats.mean_sd),
        Column("(i)", factor("log_ratio_harmful"), formats.from_log),
        Column("(ii)", factor("log_ratio_primary"), formats.from_log),
        Column("rank harmful", lambda r: _ranks(r[3], "harmful"), str),
        Column("rank primary", lambda r: _ranks(r[3], "primary"), str),
        Column("tolerance", lambda r: [kappa["tolerance"] for kappa in kappas(r)], _span),
        Column("dtype", lambda r: ", ".join(sorted({kappa["dtype"] for kappa in kappas(r)}))),
        Column("dominated by", lambda r: _dominated(r[3])),
    )  # fmt: skip
    records = [record for record in records if record[3]]
    return Table("All footings", columns, records, reading.note("footings"))


def _span(values: Sequence[float | None]) -> str:
    known = sorted({f"{value:.1e}" for value in values if value is not None}, key=float)
    return " – ".join(dict.fromkeys(known[:1] + known[-1:])) or formats.MISSING


def _ranks(rows: Sequence[Any], task: str) -> str:
    sides = []
    for side in SIDES:
        ranks = sorted({row[task][side]["rank"] for row in rows})
        sides.append("–".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))))
    return " → ".join(sides)


def _dominated(rows: Sequence[Any]) -> str:
    places: dict[str, list[str]] = {}
    for task in TASKS:
        for side in SIDES:
            for cause in sorted({row[task][side]["dominated_by"] for row in rows} - {"none"}):
                places.setdefault(cause, []).append(f"{task} {side}")
    return "; ".join(f"{cause}: {', '.join(where)}" for cause, where in places.items()) or "none"


def utility(groups: Sequence[Group]) -> Table:
    """Quality on both tasks, before and after.

    Of the best damped linear head; on the primary task of a deep backbone, of the head that goes
    with it.
    """
    heads = {"primary": "the head that is shipped", "harmful": "the best linear classifier"}
    records = [
        (group, key, scores["metric"])
        for group in groups
        for key in _QUALITIES
        if (scores := next((r[key] for r in group.results if r[key]), None))
    ]

    def task(record: Any) -> str:
        name = _QUALITIES[record[1]]
        return f"{name}, {heads[name]}" if _deep(record[0]) else name

    def spread(side: str, split: str) -> Callable[[Any], Moments | None]:
        return lambda r: quality(r[0], side, key=r[1], split=split)

    def change(record: Any) -> float | None:
        before, after = _ends(*record[:2])
        return None if before is None or after is None else after - before

    columns = (
        Column("method", lambda r: r[0].label),
        Column("task", task),
        Column("metric", lambda r: reading.metric_word(r[2])),
        *(Column(heading, spread(side, split), lambda v: formats.mean_sd(v, 3))
          for heading, side, split in (("training before", "before", "train"),
                                       ("after", "after", "train"),
                                       ("held-out before", "before", "held_out"),
                                       ("after", "after", "held_out"))),
        Column("change", change, formats.decimal),
    )  # fmt: skip
    note = reading.note("utility")
    title = "Quality of both tasks" if any_deep(groups) else "Quality of the best linear head"
    return Table(title, columns, records, note)


def paired(groups: Sequence[Group]) -> Table:
    """Paired differences over common seeds; no rows where no two groups share two seeds."""
    columns = (
        Column("first", lambda row: row.first),
        Column("second", lambda row: row.second),
        Column("measure", lambda row: row.measure),
        Column("first − second", lambda row: row.difference, lambda v: formats.mean_sd(v, 3)),
        Column("unit", lambda row: row.unit),
        Column("first larger", lambda row: f"{row.first_larger} of {row.difference.n}", str),
    )
    return Table("Paired differences", columns, paired_differences(groups), reading.note("paired"))


def flags(groups: Sequence[Group]) -> Table:
    """What to know before trusting a number; equal flags of several seeds are one row."""
    rows = [
        row
        for group in groups
        for row in reading.flag_rows(
            ((group.label, r["seed"]), flag) for r in group.results for flag in r["flags"]
        )
    ]
    columns = (
        Column("method", lambda row: row.owners[0][0]),
        Column("seeds", lambda row: ", ".join(str(seed) for _, seed in row.owners)),
    )
    return reading.flag_table(sorted(rows, key=lambda row: row.severity != "warning"), columns)


def _metric(groups: Sequence[Group]) -> str:
    metrics = {r["utility"]["metric"] for group in groups for r in group.results if r["utility"]}
    return reading.metric_word(metrics.pop()) if len(metrics) == 1 else "quality"


def _limit_of(groups: Sequence[Group]) -> str:
    """What the limit binds: a deep backbone that is trained itself may pass it."""
    if not any_deep(groups):
        return "invertible linear backbone"
    if all(map(_deep, groups)):
        return "linear map after the original features"
    return "invertible linear backbone (deep: linear map after the original features)"


# ---------------------------------------------------------------- terminal, Markdown, CSV


def all_tables(groups: Sequence[Group]) -> list[Table]:
    """What a reader without the page gets; those that have rows."""
    tables = [summary(groups), conditioning(groups), by_group(groups)]
    return [t for t in (*tables, utility(groups), paired(groups), flags(groups)) if t.rows]


def terminal(
    results: Sequence[Result], *, width: int, everything: bool = False
) -> list[RenderableType]:
    """Summary and flags, in the order of `results`, for rich to print.

    Args:
      results: validated results.
      width: columns of the terminal; wider tables are broken into blocks.
      everything: also quality, paired differences and RIR by group.

    Raises:
      ValueError: if there are no results.
    """
    groups = group_results(results)
    chosen = [summary(groups)]
    if everything:
        chosen += [by_group(groups), utility(groups), paired(groups)]
    said = [("note", text, "") for text in filter(None, [earlier(results)])]
    return [
        *table.shown(chosen, width=width),
        *table.pairs(said),
        *table.pairs(_grouped_flags(groups)),
    ]


def _grouped_flags(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """(severity, text, style) of each flag, warnings first; where methods differ, names only."""
    by_code: dict[tuple[str, str], list[Any]] = {}
    for row in flags(groups).records:
        by_code.setdefault((row.severity, row.code), []).append(row)
    lines = []
    for (severity, code), rows in sorted(by_code.items(), key=lambda item: item[0][0] == "info"):
        methods = dict.fromkeys(label for row in rows for label, _ in row.owners)
        messages = {row.message for row in rows}
        who = "every method" if len(methods) == len(groups) > 1 else ", ".join(methods)
        message = messages.pop() if len(messages) == 1 else "The page says why."
        style = "yellow" if severity == "warning" else "dim"
        lines.append((severity, f"{formats.name(code)} ({who}). {message}", style))
    return lines


def markdown(results: Sequence[Result]) -> str:
    """The tables that have rows as Markdown, after a line over all methods.

    Raises:
      ValueError: if there are no results.
    """
    groups = group_results(results)
    lines = filter(None, [lead(groups), earlier(results)])
    texts = (table.markdown_text(text) + "\n" for text in lines)
    return "\n".join([*texts, *map(table.to_markdown, all_tables(groups))])


def csv(results: Sequence[Result], *, what: str = "conditioning") -> str:
    """The raw numbers of every result, one header line, natural logarithms, empty where missing.

    Args:
      results: results in any order.
      what: "conditioning" for a line a result, footing and set of rows; "groups" for a line a
        result and set of rows, of results that were measured by group.

    Raises:
      ValueError: if there are no results, or `what` is another word.
    """
    if not results:
        raise ValueError("expected at least one result, got none.")
    lines = {"conditioning": _conditioning_lines, "groups": _group_lines}
    if what not in lines:
        raise ValueError(f"unknown table {what!r}; choose from {sorted(lines)}.")
    head = ("experiment", "method", "init", "seed")
    rows = [
        {key: result[key] for key in head} | line
        for result in results
        for line in lines[what](result)
    ]
    return table.to_csv(table.of_lines(what, rows, head))


def _conditioning_lines(result: Result) -> list[dict[str, Any]]:
    return [
        {"footing": footing, "split": split}
        | {f"{key}_{task}_{side}": value for task in TASKS[::-1] for side in SIDES
           for key, value in row[task][side].items()}
        | {key: value for key, value in row.items() if key not in TASKS}
        | {f"{key}_{side}": result[key] and result[key][side][split]
           for key in _QUALITIES for side in SIDES}
        for footing, splits in result["conditioning"].items()
        for split, row in splits.items()
    ]  # fmt: skip


def _group_lines(result: Result) -> list[dict[str, Any]]:
    return [
        {"split": split, "groups": row["groups"], "rows": row["rows"]}
        | {f"{key}_{name}": value for key in _RATIOS for name, value in row[key].items()}
        for split, row in result.get("groups", {}).items()
    ]
