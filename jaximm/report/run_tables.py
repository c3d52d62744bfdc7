"""Results of runs as tables: for the terminal, as Markdown, as CSV, for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import RenderableType

from jaximm.records.result import FOOTINGS, SPLITS
from jaximm.report import answers, formats, reading, table
from jaximm.report.answers import Answer, cheapest, cost_steps, least_slowed
from jaximm.report.groups import (
    Cost,
    Group,
    Moments,
    Result,
    any_deep,
    attack_costs,
    conditioning_row,
    group_results,
    group_rir,
    is_deep,
    moments,
    paired_differences,
    plain_attacker,
    quality,
    rank_lost,
    ratio,
)
from jaximm.report.table import Column, Table

SPLIT_NAMES = {"train": "training", "held_out": "held-out"}
FOOTING_NAMES = {
    "damped": "damped (the measure)",
    "pseudo_inverse": "pseudo-inverse",
    "reference": "reference code",
}
TASKS, SIDES = ("harmful", "primary"), ("before", "after")
_RATIOS = ("log_ratio_harmful", "log_ratio_primary", "log_rir")
_QUALITIES = {"utility": "primary", "harmful_utility": "harmful"}


# ---------------------------------------------------------------- what cells show


def _mean(spread: Moments | None) -> float | None:
    return spread and spread.mean


def _arrow(ends: Sequence[float | None], arrow: str = "→") -> str:
    texts = [formats.decimal(end) for end in ends]
    return formats.MISSING if set(texts) == {formats.MISSING} else arrow.join(texts)


def _slowdown(cost: Cost | None) -> str:
    return formats.multiple(cost.steps_ratio, cost.bound) if cost else formats.MISSING


def _label(group: Group) -> str:
    return group.label


def _deep(group: Group) -> bool:
    return any(map(is_deep, group.results))


def _lost(group: Group) -> bool:
    return any(map(rank_lost, group.results))


def _ends(group: Group, key: str) -> tuple[float | None, ...]:
    return tuple(_mean(quality(group, side, key=key)) for side in SIDES)


# ---------------------------------------------------------------- tables


def summary(groups: Sequence[Group], *, recoverable: bool = False) -> Table:
    """One row a method: (i), (ii), RIR on both sets of rows, quality, cost to break.

    Where a backbone is deep also RIR by group of held-out rows, the harmful accuracy that a closed
    form recovers (elsewhere if `recoverable`), and the fine-tuning attacker that is slowed least.
    """
    deep = any_deep(groups)
    metric = _metric(groups)

    def factor(key: str, split: str = "train") -> Callable[[Group], float | None]:
        return lambda group: None if _lost(group) else _mean(ratio(group, key, split=split))

    def cost(choose: Callable[[list[Cost]], Cost | None]) -> Callable[[Group], Cost | None]:
        return lambda group: choose(attack_costs(group, task="harmful"))

    def left(group: Group) -> Sequence[float | None]:
        return _ends(group, "harmful_utility") if recoverable or _deep(group) else ()

    columns = [
        Column("method", _label),
        Column("(i)", factor("log_ratio_harmful"), formats.from_log),
        Column("(ii)", factor("log_ratio_primary"), formats.from_log),
        Column("RIR", factor("log_rir"), formats.from_log),
        Column("RIR held out", factor("log_rir", "held_out"), formats.from_log),
        Column("RIR by group, held out", lambda g: _mean(group_rir(g, "log_rir")),
               formats.from_log),
        Column("of limit", factor("log_fraction"), formats.decimal),
        Column(f"primary {metric}", lambda g: _ends(g, "utility"), _arrow),
        Column(f"harmful {metric} recoverable", left, lambda ends: _arrow(ends or (None,))),
        Column("GD slowed", cost(plain_attacker), _slowdown),
        Column("other steps", cost(lambda costs: cheapest([c for c in costs if c.informed])),
               lambda c: "→".join(cost_steps(c, s) for s in SIDES) if c else formats.MISSING),
        Column("fine-tuning slowed",
               cost(lambda costs: least_slowed([c for c in costs if c.fine_tuning])), _slowdown),
    ]  # fmt: skip
    if not deep:
        columns = [c for place, c in enumerate(columns) if place not in (5, 11)
                   and (recoverable or place != 8)]  # fmt: skip
    seeds = sorted({len(group.results) for group in groups})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    head = "damped least-squares classifier" if deep else "linear head"
    removed = ", ".join(group.label for group in groups if deep and _lost(group))
    note = reading.note(
        "summary",
        count=count,
        limit_of=_limit_of(groups),
        by_group=reading.note("summary_by_group", when=deep),
        recoverable=reading.note(
            "summary_recoverable", when=deep or recoverable, metric=metric, head=head
        ),
        fine_tuning=reading.note("summary_fine_tuning", when=deep),
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
    found: dict[str, list[str]] = {}
    for task in TASKS:
        for side in SIDES:
            for cause in sorted({row[task][side]["dominated_by"] for row in rows} - {"none"}):
                found.setdefault(cause, []).append(f"{task} {side}")
    return "; ".join(f"{cause}: {', '.join(where)}" for cause, where in found.items()) or "none"


def costs(group: Group, sides: tuple[str, str] = SIDES) -> Table:
    """Cost to break of every attacker with a probe, harmful task first.

    Of tasks with classes also the held-out accuracy at the end of the budget. `sides` are what the
    backbones before and after are called.
    """
    found = [c for task in TASKS for c in attack_costs(group, task=task) if not c.fine_tuning]
    classes = any(cost.after.accuracy is not None for cost in found)
    columns = [
        Column("attacker", lambda cost: formats.name(cost.attacker)),
        Column("kind", lambda cost: cost.kind),
        Column("task", lambda cost: cost.task),
        *_cost_columns(sides),
    ]
    note = f"{reading.note('costs')} {reading.note('costs_accuracy', when=classes)}".strip()
    if not classes:
        columns.pop(-2)
    return Table(f"Cost to break: {group.label}", columns, found, note)


def fine_tuning(group: Group) -> Table:
    """Attackers that train the backbone too: cost of the undefended accuracy, and the end."""
    found = [c for task in TASKS for c in attack_costs(group, task=task) if c.fine_tuning]
    columns = (
        Column("attacker", lambda cost: formats.name(cost.attacker)),
        Column("task", lambda cost: cost.task),
        Column("accuracy target", lambda cost: cost.accuracy_target, formats.decimal),
        *_cost_columns(SIDES),
    )
    budgets = ", ".join(f"{budget:,}" for budget in sorted({cost.budget for cost in found}))
    note = reading.note("fine_tuning", budgets=budgets)
    return Table(f"Cost to break by fine-tuning: {group.label}", columns, found, note)


def _cost_columns(names: tuple[str, str]) -> tuple[Column, ...]:
    quotient = " / ".join(names[::-1])
    return (
        *(Column(f"steps {name}", lambda cost, s=side: cost_steps(cost, s), str)
          for name, side in zip(names, SIDES, strict=True)),
        Column(quotient, lambda c: formats.multiple(c.steps_ratio, c.bound), str),
        *(Column(f"FLOPs {name}", lambda cost, s=side: getattr(cost, s).flops, formats.flops)
          for name, side in zip(names, SIDES, strict=True)),
        Column(quotient, lambda c: formats.multiple(c.flops_ratio, c.bound), str),
        Column("held-out accuracy", lambda c: (c.before.accuracy, c.after.accuracy),
               lambda ends: _arrow(ends, " → ")),
        Column("notes", _cost_notes),
    )  # fmt: skip


def _cost_notes(cost: Cost) -> str:
    notes = [
        f"{name}: {side.reached} of {side.runs} runs arrived"
        for name, side in zip(SIDES, (cost.before, cost.after), strict=True)
        if 0 < side.reached < side.runs
    ]
    notes += ["edge of grid"] * cost.edge_of_grid + ["a run diverged"] * cost.diverged
    return "; ".join(notes)


def utility(groups: Sequence[Group]) -> Table:
    """Quality on both tasks, before and after.

    Of the best damped linear head; on the primary task of a deep backbone, of the head that goes
    with it.
    """
    heads = {"primary": "the head that is shipped", "harmful": "the best linear classifier"}
    records = [
        (group, key, found["metric"])
        for group in groups
        for key in _QUALITIES
        if (found := next((r[key] for r in group.results if r[key]), None))
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


def certificates(groups: Sequence[Group]) -> Table:
    """Certified bounds, as recorded, one row a result and certificate."""
    records = [
        {"method": group.label, "model_seed": result["seed"], **row}
        for group in groups
        for result in group.results
        for row in result["certificates"]
    ]
    columns = (
        Column("method", lambda row: row["method"]),
        Column("seed", lambda row: row["model_seed"], str),
        Column("certificate", lambda row: formats.name(row["name"])),
        Column("holds against", lambda row: row["threat_model"]),
        Column("task", lambda row: row["task"]),
        Column("backbone", lambda row: row["backbone"]),
        Column("target", lambda row: row["target"]),
        Column("value", lambda row: row["value"],
               lambda v: formats.MISSING if v is None else f"{v:,.6g}"),
        Column("unit", lambda row: row["unit"]),
    )  # fmt: skip
    return Table("Certificates", columns, records)


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


def steps_to_break(groups: Sequence[Group], task: str, *, fine_tuning: bool = False) -> Table:
    """Steps of each attacker on the raw backbone and on that of each method.

    Of a probe to break it; of attackers that train the backbone too, to the undefended accuracy,
    with the accuracy that they end with.
    """
    found = [
        (group, {cost.attacker: cost for cost in attack_costs(group, task=task)
                 if cost.fine_tuning == fine_tuning})
        for group in groups
    ]  # fmt: skip
    attacked = [(group, costs) for group, costs in found if costs]
    firsts = {name: cost for _, costs in reversed(attacked) for name, cost in costs.items()}
    names = dict.fromkeys(name for _, costs in attacked for name in costs)

    def cell(cost: Cost | None, side: str) -> str:
        if cost is None:
            return formats.MISSING
        accuracy = getattr(cost, side).accuracy if fine_tuning else None
        end = "" if accuracy is None else f" ({formats.decimal(accuracy)})"
        return cost_steps(cost, side) + end

    columns = [
        Column("attacker", lambda name: formats.name(name, short=True)),
        Column(table.RAW, lambda name: cell(firsts[name], "before"), str),
        # A heading breaks at spaces; the numbers below it are narrower than most labels.
        *(Column(group.label.replace("_", " "), lambda name, c=costs: cell(c.get(name), "after"),
                 str)
          for group, costs in attacked if group.method != "none"),
    ]  # fmt: skip
    aim = "the undefended accuracy by fine-tuning" if fine_tuning else "break"
    note = reading.note("steps_to_accuracy" if fine_tuning else "steps_to_break")
    return Table(f"Steps to {aim}, {task} task", columns, list(names), note)


def _metric(groups: Sequence[Group]) -> str:
    found = {r["utility"]["metric"] for group in groups for r in group.results if r["utility"]}
    return reading.metric_word(found.pop()) if len(found) == 1 else "quality"


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
    found = [summary(groups), conditioning(groups), by_group(groups)]
    found += [one for group in groups for one in (costs(group), fine_tuning(group))]
    return [t for t in (*found, utility(groups), paired(groups), flags(groups)) if t.rows]


def summary_table(results: Sequence[Result]) -> Any:
    """The summary of `results` for the terminal, a rich table.

    Raises:
      ValueError: if there are no results.
    """
    return table.to_rich(summary(group_results(results)))


def terminal_tables(results: Sequence[Result]) -> list[Any]:
    """Summary, condition numbers, costs, quality, paired differences and flags as rich tables.

    A table without rows is left out.

    Raises:
      ValueError: if there are no results.
    """
    return list(map(table.to_rich, all_tables(group_results(results))))


def verdicts(results: Sequence[Result]) -> list[Answer]:
    """The answer in words for each method, in order of first appearance.

    Raises:
      ValueError: if there are no results.
    """
    return [answers.answer(group) for group in group_results(results)]


def terminal(
    results: Sequence[Result], *, width: int, everything: bool = False
) -> list[RenderableType]:
    """Summary, steps to break, answers and flags, in the order of `results`, for rich to print.

    Args:
      results: validated results.
      width: columns of the terminal; wider tables are broken into blocks.
      everything: also quality, paired differences, RIR by group and the primary task's attacks.

    Raises:
      ValueError: if there are no results.
    """
    groups = group_results(results)
    chosen = [summary(groups)]
    if everything:
        chosen += [by_group(groups), utility(groups), paired(groups)]
    for task in TASKS if everything else TASKS[:1]:
        chosen += [steps_to_break(groups, task), steps_to_break(groups, task, fine_tuning=True)]
    attacked = [group for group in groups if any(result["attacks"] for result in group.results)]
    said = [(found.label, found.headline, "") for found in map(answers.answer, attacked)]
    return [
        *table.shown(chosen, width=width),
        *table.pairs(said),
        *table.pairs(_grouped_flags(groups)),
    ]


def _grouped_flags(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """(severity, text, style) of each flag, warnings first; where methods differ, names only."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in flags(groups).records:
        found.setdefault((row.severity, row.code), []).append(row)
    lines = []
    for (severity, code), rows in sorted(found.items(), key=lambda item: item[0][0] == "info"):
        methods = dict.fromkeys(label for row in rows for label, _ in row.owners)
        messages = {row.message for row in rows}
        who = "every method" if len(methods) == len(groups) > 1 else ", ".join(methods)
        message = messages.pop() if len(messages) == 1 else "The page says why."
        style = "yellow" if severity == "warning" else "dim"
        lines.append((severity, f"{formats.name(code)} ({who}). {message}", style))
    return lines


def markdown(results: Sequence[Result]) -> str:
    """Answers, summary, condition numbers, costs, quality and paired differences as Markdown.

    Raises:
      ValueError: if there are no results.
    """
    groups = group_results(results)
    parts = []
    for found in map(answers.answer, groups):
        lines = [
            f"**{table.markdown_text(found.label)}**: {table.markdown_text(found.headline)}",
            "",
        ]
        lines += [f"- {table.markdown_text(text)}" for text in (*found.warnings, *found.sentences)]
        parts.append("\n".join(lines) + "\n")
    parts.append(f"Threat model: {table.markdown_text(answers.threat_model(groups))}\n")
    return "\n".join([*parts, *map(table.to_markdown, all_tables(groups))])


def csv(results: Sequence[Result], *, what: str = "conditioning") -> str:
    """The raw numbers of every result, one header line, natural logarithms, empty where missing.

    Args:
      results: results in any order.
      what: "conditioning" for a line a result, footing and set of rows; "attacks" for a line a
        result, attacker, task, backbone and attack seed (steps are -1 where not reached); "groups"
        for a line a result and set of rows, of results that were measured by group.

    Raises:
      ValueError: if there are no results, or `what` is another word.
    """
    if not results:
        raise ValueError("expected at least one result, got none.")
    lines = {
        "conditioning": _conditioning_lines,
        "attacks": _attack_lines,
        "groups": _group_lines,
    }
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


_ATTACK_KEYS = (
    "flops_per_step", "setup_flops", "final_relative_excess_loss", "edge_of_grid", "diverged",
    "still_falling", "accuracy_target", "steps_to_accuracy", "flops_to_accuracy",
    "final_held_out_accuracy", "final_held_out_loss", "final_train_loss", "batch_size",
)  # fmt: skip


def _attack_lines(result: Result) -> list[dict[str, Any]]:
    lines = []
    for attack in result["attacks"]:
        line = {
            "attack_seed" if key == "seed" else key: attack[key]
            for key in ("attacker", "kind", "task", "backbone", "seed", "steps_budget")
        }
        for key in ("steps_to_loss_gap", "steps_to_parameter_error", "flops_to_loss_gap"):
            line |= {f"{key}_{target}": value for target, value in attack[key].items()}
        lines.append(line | {key: attack[key] for key in _ATTACK_KEYS if key in attack})
    return lines


def _group_lines(result: Result) -> list[dict[str, Any]]:
    return [
        {"split": split, "groups": row["groups"], "rows": row["rows"]}
        | {f"{key}_{name}": value for key in _RATIOS for name, value in row[key].items()}
        for split, row in result.get("groups", {}).items()
    ]
