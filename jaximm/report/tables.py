"""Rows of results as tables: for the terminal (rich), as Markdown, as CSV, for the page.

A `Table` is plain strings and knows no medium; one function a medium renders it. The CSV is apart:
it carries the raw numbers of every result, not the rounded ones.
"""

from __future__ import annotations

import csv as csv_module
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from jaximm.records.result import FOOTINGS, SPLITS
from jaximm.report import formats, verdict
from jaximm.report.compare import (
    Cost,
    Group,
    Moments,
    Result,
    any_deep,
    attack_costs,
    conditioning_row,
    conditioning_values,
    group_results,
    group_rir,
    is_deep,
    moments,
    paired_differences,
    plain_attacker,
    rank_lost,
    utility_values,
)

SPLIT_NAMES = {"train": "training", "held_out": "held-out"}
FOOTING_NAMES = {
    "damped": "damped (the measure)",
    "pseudo_inverse": "pseudo-inverse",
    "reference": "reference code",
}


class Column(NamedTuple):
    """A heading, and whether its cells are numbers (set flush right)."""

    heading: str
    numeric: bool = True


class Table(NamedTuple):
    """A table of text. `rows` [row][column], as many cells as `columns`."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def to_rich(table: Table) -> RichTable:
    """For the terminal. Cells are literal text, no markup."""
    rich_table = RichTable(
        title=Text(table.title, style="bold"),
        caption=Text(table.note, style="dim") if table.note else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in table.columns:
        rich_table.add_column(
            # Headings of numbers break at their spaces, so that the numbers set the width.
            Text(_broken(column.heading) if column.numeric else column.heading),
            justify="right" if column.numeric else "left",
            no_wrap=column.numeric,
            overflow="fold",
        )
    for row in table.rows:
        rich_table.add_row(*(Text(cell) for cell in row))
    return rich_table


def _broken(heading: str) -> str:
    """A line a word; short quotients as "B / A" stay whole."""
    whole = re.sub(r"(?<!\S)(\S{1,4}) / (\S{1,4})(?!\S)", "\\1\u00a0/\u00a0\\2", heading)
    return whole.replace(" ", "\n")


def to_markdown(table: Table) -> str:
    """GitHub Markdown with a bold title line; pipes and angle brackets in cells are escaped."""
    lines = [f"**{_escape(table.title)}**", ""]
    lines.append("| " + " | ".join(_escape(column.heading) for column in table.columns) + " |")
    lines.append(
        "| " + " | ".join("---:" if column.numeric else "---" for column in table.columns) + " |"
    )
    lines += ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in table.rows]
    if table.note:
        lines += ["", _escape(table.note)]
    return "\n".join(lines) + "\n"


def summary(groups: Sequence[Group]) -> Table:
    """One row a method: (i), (ii), RIR on both sets of rows, quality, cost to break.

    Where a backbone is deep also RIR by group of held-out rows, the harmful accuracy that a closed
    form recovers, and the fine-tuning attacker that is slowed least.
    """
    deep = any_deep(groups)
    columns = (
        Column("method", numeric=False),
        Column("(i)"),
        Column("(ii)"),
        Column("RIR"),
        Column("RIR held out"),
        *([Column("RIR by group, held out")] if deep else []),
        Column("of limit"),
        Column(f"primary {_metric(groups)}"),
        *([Column("harmful accuracy recoverable")] if deep else []),
        Column("GD slowed"),
        Column("other steps"),
        *([Column("fine-tuning slowed")] if deep else []),
    )
    rows = []
    for group in groups:
        costs = attack_costs(group, task="harmful")
        plain = plain_attacker(costs)
        other = verdict.cheapest([cost for cost in costs if cost.informed])
        tuned = verdict.least_slowed([cost for cost in costs if cost.fine_tuning])
        fraction = moments(conditioning_values(group, "log_fraction"))
        by_group = group_rir(group, "log_rir")
        removed = any(map(rank_lost, group.results))
        ratios = [
            formats.MISSING if removed else _mean_factor(group, key, split)
            for key, split in (
                ("log_ratio_harmful", "train"),
                ("log_ratio_primary", "train"),
                ("log_rir", "train"),
                ("log_rir", "held_out"),
            )
        ]
        recoverable = _before_after(group, "harmful_utility") if _deep(group) else formats.MISSING
        rows.append(
            (
                group.label,
                *ratios,
                *([formats.from_log(by_group.mean if by_group else None)] if deep else []),
                formats.decimal(fraction.mean if fraction and not removed else None),
                _before_after(group, "utility"),
                *([recoverable] if deep else []),
                _slowdown(plain),
                "→".join(formats.cost_steps(other, side) for side in ("before", "after"))
                if other
                else formats.MISSING,
                *([_slowdown(tuned)] if deep else []),
            )
        )
    seeds = sorted({len(group.results) for group in groups})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    recovered = tuning = ""
    if deep:
        recovered = (
            "'by group': pseudo-inverse, within groups of rows. 'recoverable': held-out accuracy "
            "of the best damped least-squares classifier on the harmful task. "
        )
        tuning = (
            " 'fine-tuning slowed': steps to the undefended held-out accuracy, after / before, of "
            "the attacker slowed least."
        )
        removed = [group.label for group in groups if any(map(rank_lost, group.results))]
        if removed:
            tuning += (
                f" {', '.join(removed)}: directions of the features are removed, so that damped "
                "condition numbers are those of rounding; read the pseudo-inverse."
            )
    note = (
        f"Seeds a method: {count}. (i), (ii): condition number of the harmful and the primary "
        "task, after / before; RIR = (i) / (ii); damped, training rows unless said; geometric "
        f"means over seeds. 'of limit': log RIR over the largest that any {_limit_of(groups)} "
        f"can reach. Primary quality: held-out rows, before → after, means. {recovered}"
        "'GD slowed': steps of plain gradient descent to 1 % excess loss on the harmful task, "
        "after / before. 'other steps': the same for the attacker with the fewest FLOPs after "
        f"among those that use more than gradients, before → after.{tuning}"
    )
    return Table("Summary", columns, tuple(rows), note)


def conditioning(groups: Sequence[Group], *, footing: str = "damped") -> Table:
    """Condition numbers before and after, on one footing, one row a method and set of rows."""
    columns = (
        Column("method", numeric=False),
        Column("rows", numeric=False),
        Column("κ harmful before"),
        Column("after"),
        Column("(i)"),
        Column("κ primary before"),
        Column("after"),
        Column("(ii)"),
        Column("log RIR (nats)"),
        Column("limit"),
        Column("fraction"),
    )
    rows = []
    for group in groups:
        for split in SPLITS:
            kappas = {
                (task, side): _kappa_moments(group, task, side, footing, split)
                for task in ("harmful", "primary")
                for side in ("before", "after")
            }
            if all(value is None for value in kappas.values()):
                continue
            rir, limit, fraction = (
                moments(conditioning_values(group, key, footing=footing, split=split))
                for key in ("log_rir", "log_rir_limit", "log_fraction")
            )
            rows.append(
                (
                    group.label,
                    SPLIT_NAMES[split],
                    _exp(kappas["harmful", "before"]),
                    _exp(kappas["harmful", "after"]),
                    _mean_factor(group, "log_ratio_harmful", split, footing),
                    _exp(kappas["primary", "before"]),
                    _exp(kappas["primary", "after"]),
                    _mean_factor(group, "log_ratio_primary", split, footing),
                    formats.mean_sd(rir),
                    formats.decimal(limit.mean if limit else None, 2),
                    formats.decimal(fraction.mean if fraction else None),
                )
            )
    note = "Condition numbers and ratios: geometric means over seeds. log RIR: mean ± sd."
    return Table(f"Condition numbers, {FOOTING_NAMES[footing]}", columns, tuple(rows), note)


def by_group(groups: Sequence[Group]) -> Table:
    """RIR within groups of rows, the protocol of the literature; no rows where not measured."""
    columns = (
        Column("method", numeric=False),
        Column("rows", numeric=False),
        Column("groups"),
        Column("log (i)"),
        Column("log (ii)"),
        Column("log RIR"),
        Column("RIR"),
    )
    rows, sizes = [], set()
    for group in groups:
        for split in SPLITS:
            found = [result["groups"][split] for result in group.results if "groups" in result]
            if not found:
                continue
            here = sorted({f"{row['groups']} of {row['rows']}" for row in found})
            sizes |= {(row["groups"], row["rows"]) for row in found}
            spreads = [group_rir(group, key, split=split) for key in _RATIOS]
            rows.append(
                (
                    group.label,
                    SPLIT_NAMES[split],
                    ", ".join(here),
                    *(formats.mean_sd(spread) for spread in spreads),
                    formats.from_log(spreads[-1].mean if spreads[-1] else None),
                )
            )
    count = "".join(f"{number} groups of {size} rows, " for number, size in sizes)
    note = (
        "Natural logarithms, mean ± sd over groups of rows (within a seed; means over seeds). RIR: "
        "exp of the mean. (i) harmful, (ii) primary, condition number after / before; singular "
        "values above the tolerance only. With fewer rows than features these are condition "
        "numbers of a row space, and smaller than those of all rows."
    )
    title = f"RIR by group ({count if len(sizes) == 1 else ''}pseudo-inverse)"
    return Table(title, columns, tuple(rows), note)


_RATIOS = ("log_ratio_harmful", "log_ratio_primary", "log_rir")


def footings(groups: Sequence[Group]) -> Table:
    """Every footing with what its numbers hang on: rank, tolerance, dtype, what dominates."""
    columns = (
        Column("method", numeric=False),
        Column("footing", numeric=False),
        Column("rows", numeric=False),
        Column("log RIR (nats)"),
        Column("(i)"),
        Column("(ii)"),
        Column("rank harmful"),
        Column("rank primary"),
        Column("tolerance"),
        Column("dtype", numeric=False),
        Column("dominated by", numeric=False),
    )
    rows = []
    for group in groups:
        for footing in FOOTINGS:
            for split in SPLITS:
                found = [
                    row
                    for result in group.results
                    if (row := conditioning_row(result, footing=footing, split=split))
                ]
                if not found:
                    continue
                kappas = [
                    row[task][side]
                    for row in found
                    for task in ("harmful", "primary")
                    for side in ("before", "after")
                ]
                spread = moments([row["log_rir"] for row in found])
                rows.append(
                    (
                        group.label,
                        FOOTING_NAMES[footing],
                        SPLIT_NAMES[split],
                        formats.mean_sd(spread),
                        _mean_factor(group, "log_ratio_harmful", split, footing),
                        _mean_factor(group, "log_ratio_primary", split, footing),
                        _ranks(found, "harmful"),
                        _ranks(found, "primary"),
                        _span([kappa["tolerance"] for kappa in kappas]),
                        ", ".join(sorted({kappa["dtype"] for kappa in kappas})),
                        _dominated(found),
                    )
                )
    note = (
        "Two condition numbers compare only on one footing. Rank: before → after. 'dominated by' "
        "names what, besides the data, sets the smallest value: the damping, or rounding in the "
        "stated dtype; a kappa dominated by rounding is no measurement."
    )
    return Table("All footings", columns, tuple(rows), note)


def costs(group: Group) -> Table:
    """Cost to break of every attacker with a probe, harmful task first.

    Of tasks with classes also the held-out accuracy at the end of the budget.
    """
    found = [
        (task, cost)
        for task in ("harmful", "primary")
        for cost in attack_costs(group, task=task)
        if not cost.fine_tuning
    ]
    classes = any(cost.accuracy_after is not None for _, cost in found)
    columns = (
        Column("attacker", numeric=False),
        Column("kind", numeric=False),
        Column("task", numeric=False),
        Column("steps before"),
        Column("steps after"),
        Column("after / before"),
        Column("FLOPs before"),
        Column("FLOPs after"),
        Column("after / before"),
        *([Column("held-out accuracy")] if classes else []),
        Column("notes", numeric=False),
    )
    rows = [
        (
            formats.name(cost.attacker),
            cost.kind,
            task,
            formats.cost_steps(cost, "before"),
            formats.cost_steps(cost, "after"),
            formats.multiple(cost.steps_ratio, cost.bound),
            formats.flops(cost.flops_before),
            formats.flops(cost.flops_after),
            formats.multiple(cost.flops_ratio, cost.bound),
            *([_accuracies(cost)] if classes else []),
            _cost_notes(cost),
        )
        for task, cost in found
    ]
    note = (
        "Steps and floating-point operations to 1 % of the starting excess loss, medians over "
        "seeds. '> 20,000': not reached within that many steps. A ratio with > or < is a bound. "
        "'edge of grid': the best setting was the last one tried, so a better one may exist."
    )
    if classes:
        note += " Held-out accuracy: at the end of the budget, before → after, means."
    return Table(f"Cost to break: {group.label}", columns, tuple(rows), note)


def fine_tuning(group: Group) -> Table:
    """Attackers that train the backbone too: cost of the undefended accuracy, and the end."""
    columns = (
        Column("attacker", numeric=False),
        Column("task", numeric=False),
        Column("accuracy target"),
        Column("steps before"),
        Column("steps after"),
        Column("after / before"),
        Column("FLOPs before"),
        Column("FLOPs after"),
        Column("after / before"),
        Column("held-out accuracy"),
        Column("notes", numeric=False),
    )
    found = [
        (task, cost)
        for task in ("harmful", "primary")
        for cost in attack_costs(group, task=task)
        if cost.fine_tuning
    ]
    rows = tuple(
        (
            formats.name(cost.attacker),
            task,
            formats.decimal(cost.accuracy_target),
            formats.cost_steps(cost, "before"),
            formats.cost_steps(cost, "after"),
            formats.multiple(cost.steps_ratio, cost.bound),
            formats.flops(cost.flops_before),
            formats.flops(cost.flops_after),
            formats.multiple(cost.flops_ratio, cost.bound),
            _accuracies(cost),
            _cost_notes(cost),
        )
        for task, cost in found
    )
    budgets = ", ".join(f"{budget:,}" for budget in sorted({cost.budget for _, cost in found}))
    note = (
        f"Budget: {budgets} steps. Accuracy target: what the same attacker reaches on held-out "
        "rows with that budget on the undefended backbone, less a point. Steps are recorded ones, "
        "medians over seeds. Held-out accuracy: at the end of the budget, before → after, means."
    )
    return Table(f"Cost to break by fine-tuning: {group.label}", columns, rows, note)


def utility(groups: Sequence[Group]) -> Table:
    """Quality on both tasks, before and after.

    Of the best damped linear head; on the primary task of a deep backbone, of the head that goes
    with it.
    """
    deep = any_deep(groups)
    columns = (
        Column("method", numeric=False),
        Column("task", numeric=False),
        Column("metric", numeric=False),
        Column("training before"),
        Column("after"),
        Column("held-out before"),
        Column("after"),
        Column("change"),
    )
    rows = []
    for group in groups:
        for key, task in (("utility", "primary"), ("harmful_utility", "harmful")):
            found = next((result[key] for result in group.results if result[key]), None)
            if found is None:
                continue
            cells = {
                (side, split): moments(utility_values(group, key=key, side=side, split=split))
                for side in ("before", "after")
                for split in SPLITS
            }
            before, after = cells["before", "held_out"], cells["after", "held_out"]
            change = after.mean - before.mean if before and after else None
            rows.append(
                (
                    group.label,
                    f"{task}, {_HEADS[task]}" if _deep(group) else task,
                    "R²" if found["metric"] == "r2" else "accuracy",
                    formats.mean_sd(cells["before", "train"], 3),
                    formats.mean_sd(cells["after", "train"], 3),
                    formats.mean_sd(before, 3),
                    formats.mean_sd(after, 3),
                    formats.decimal(change),
                )
            )
    note = "Mean ± sd over seeds. The harmful rows are what an attacker in closed form gets."
    title = "Quality of both tasks" if deep else "Quality of the best linear head"
    return Table(title, columns, tuple(rows), note)


_HEADS = {"primary": "the head that is shipped", "harmful": "the best linear classifier"}


def paired(groups: Sequence[Group]) -> Table:
    """Paired differences over common seeds; no rows where no two groups share two seeds."""
    columns = (
        Column("first", numeric=False),
        Column("second", numeric=False),
        Column("measure", numeric=False),
        Column("first − second"),
        Column("unit", numeric=False),
        Column("first larger"),
    )
    rows = tuple(
        (
            row.first,
            row.second,
            row.measure,
            formats.mean_sd(row.difference, 3),
            row.unit,
            f"{row.first_larger} of {row.difference.n}",
        )
        for row in paired_differences(groups)
    )
    note = "Mean ± sd over the common seeds of the difference within each seed."
    return Table("Paired differences", columns, rows, note)


def certificates(groups: Sequence[Group]) -> Table:
    """Certified bounds, as recorded, one row a result and certificate."""
    columns = (
        Column("method", numeric=False),
        Column("seed"),
        Column("certificate", numeric=False),
        Column("holds against", numeric=False),
        Column("task", numeric=False),
        Column("backbone", numeric=False),
        Column("target", numeric=False),
        Column("value"),
        Column("unit", numeric=False),
    )
    rows = tuple(
        (
            group.label,
            str(result["seed"]),
            formats.name(row["name"]),
            row["threat_model"],
            row["task"],
            row["backbone"],
            formats.MISSING if row["target"] is None else str(row["target"]),
            formats.MISSING if row["value"] is None else f"{row['value']:,.6g}",
            row["unit"],
        )
        for group in groups
        for result in group.results
        for row in result["certificates"]
    )
    return Table("Certificates", columns, rows)


def flags(groups: Sequence[Group]) -> Table:
    """What to know before trusting a number; equal flags of several seeds are one row."""
    columns = (
        Column("severity", numeric=False),
        Column("method", numeric=False),
        Column("flag", numeric=False),
        Column("what it means", numeric=False),
        Column("seeds", numeric=False),
    )
    seeds: dict[tuple[str, str, str, str], list[int]] = {}
    for group in groups:
        for result in group.results:
            for flag in result["flags"]:
                key = (flag["severity"], group.label, flag["code"], flag["message"])
                seeds.setdefault(key, []).append(result["seed"])
    ordered = sorted(seeds, key=lambda key: key[0] != "warning")
    rows = tuple(
        (
            key[0],
            key[1],
            formats.name(key[2]),
            key[3],
            ", ".join(map(str, dict.fromkeys(seeds[key]))),
        )
        for key in ordered
    )
    return Table("Flags", columns, rows)


def summary_table(results: Sequence[Result]) -> RichTable:
    """The summary of `results` for the terminal.

    Raises:
      ValueError: if there are no results.
    """
    return to_rich(summary(group_results(results)))


def terminal_tables(results: Sequence[Result]) -> list[RichTable]:
    """Summary, condition numbers, costs, quality, paired differences and flags for the terminal.

    A table without rows is left out.

    Raises:
      ValueError: if there are no results.
    """
    return [to_rich(table) for table in _all_tables(group_results(results)) if table.rows]


def verdicts(results: Sequence[Result]) -> list[verdict.Verdict]:
    """The answer in words for each method, in order of first appearance.

    Raises:
      ValueError: if there are no results.
    """
    return [verdict.decide(group) for group in group_results(results)]


def markdown(results: Sequence[Result]) -> str:
    """Verdicts, summary, condition numbers, costs, quality and paired differences as Markdown.

    Raises:
      ValueError: if there are no results.
    """
    groups = group_results(results)
    parts = []
    for group in groups:
        found = verdict.decide(group)
        lines = [f"**{_escape(found.label)}**: {_escape(found.headline)}", ""]
        lines += [f"- {_escape(text)}" for text in (*found.warnings, *found.sentences)]
        parts.append("\n".join(lines) + "\n")
    parts.append(f"Threat model: {_escape(verdict.threat_model(groups))}\n")
    parts += [to_markdown(table) for table in _all_tables(groups) if table.rows]
    return "\n".join(parts)


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
    names = list(dict.fromkeys(key for row in rows for key in row)) or list(head)
    buffer = io.StringIO()
    writer = csv_module.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _all_tables(groups: Sequence[Group]) -> list[Table]:
    tables = [summary(groups), conditioning(groups), by_group(groups)]
    tables += [table for group in groups for table in (costs(group), fine_tuning(group))]
    return [*tables, utility(groups), paired(groups), flags(groups)]


def _conditioning_lines(result: Result) -> list[dict[str, Any]]:
    lines = []
    for footing, splits in result["conditioning"].items():
        for split, row in splits.items():
            line: dict[str, Any] = {"footing": footing, "split": split}
            for task in ("primary", "harmful"):
                for side in ("before", "after"):
                    line |= {
                        f"{key}_{task}_{side}": value for key, value in row[task][side].items()
                    }
            line |= {key: value for key, value in row.items() if key not in ("primary", "harmful")}
            for key in ("utility", "harmful_utility"):
                quality = result[key]
                for side in ("before", "after"):
                    line[f"{key}_{side}"] = quality and quality[side][split]
            lines.append(line)
    return lines


def _attack_lines(result: Result) -> list[dict[str, Any]]:
    lines = []
    for attack in result["attacks"]:
        line = {
            "attack_seed" if key == "seed" else key: attack[key]
            for key in ("attacker", "kind", "task", "backbone", "seed", "steps_budget")
        }
        for key in ("steps_to_loss_gap", "steps_to_parameter_error", "flops_to_loss_gap"):
            line |= {f"{key}_{target}": value for target, value in attack[key].items()}
        for key in ("flops_per_step", "setup_flops", "final_relative_excess_loss"):
            line[key] = attack[key]
        for key in ("edge_of_grid", "diverged", "still_falling"):
            line[key] = attack[key]
        line |= {key: attack[key] for key in _LABEL_KEYS if key in attack}
        lines.append(line)
    return lines


_LABEL_KEYS = (
    "accuracy_target",
    "steps_to_accuracy",
    "flops_to_accuracy",
    "final_held_out_accuracy",
    "final_held_out_loss",
    "final_train_loss",
    "batch_size",
)


def _group_lines(result: Result) -> list[dict[str, Any]]:
    lines = []
    for split, row in result.get("groups", {}).items():
        line: dict[str, Any] = {"split": split, "groups": row["groups"], "rows": row["rows"]}
        for key in _RATIOS:
            line |= {f"{key}_{moment}": value for moment, value in row[key].items()}
        lines.append(line)
    return lines


def _escape(text: str) -> str:
    text = " ".join(text.split())
    text = text.replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _metric(groups: Sequence[Group]) -> str:
    metrics = {
        result["utility"]["metric"]
        for group in groups
        for result in group.results
        if result["utility"]
    }
    return "R²" if metrics == {"r2"} else "accuracy" if metrics == {"accuracy"} else "quality"


def _mean_factor(group: Group, key: str, split: str, footing: str = "damped") -> str:
    spread = moments(conditioning_values(group, key, footing=footing, split=split))
    return formats.from_log(spread.mean if spread else None)


def _before_after(group: Group, key: str) -> str:
    """Held-out quality before → after; `key` is "utility" or "harmful_utility"."""
    spreads = [
        moments(utility_values(group, key=key, side=side, split="held_out"))
        for side in ("before", "after")
    ]
    sides = [formats.decimal(spread.mean if spread else None) for spread in spreads]
    return formats.MISSING if set(sides) == {formats.MISSING} else "→".join(sides)


def _deep(group: Group) -> bool:
    return any(map(is_deep, group.results))


def _limit_of(groups: Sequence[Group]) -> str:
    """What the limit binds: a deep backbone that is trained itself may pass it."""
    if not any_deep(groups):
        return "invertible linear backbone"
    if all(map(_deep, groups)):
        return "linear map after the original features"
    return "invertible linear backbone (deep: linear map after the original features)"


def _slowdown(cost: Cost | None) -> str:
    return formats.multiple(cost.steps_ratio, cost.bound) if cost else formats.MISSING


def _accuracies(cost: Cost) -> str:
    """Held-out accuracy at the end of the budget, before → after."""
    sides = [formats.decimal(side) for side in (cost.accuracy_before, cost.accuracy_after)]
    return formats.MISSING if set(sides) == {formats.MISSING} else " → ".join(sides)


def _kappa_moments(group: Group, task: str, side: str, footing: str, split: str) -> Moments | None:
    rows = (conditioning_row(result, footing=footing, split=split) for result in group.results)
    return moments([row[task][side]["log_kappa"] if row else None for row in rows])


def _exp(spread: Moments | None) -> str:
    return formats.from_log(spread.mean if spread else None)


def _span(values: Sequence[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return formats.MISSING
    low, high = f"{known[0]:.1e}", f"{known[-1]:.1e}"
    return low if low == high else f"{low} – {high}"


def _ranks(rows: Sequence[Any], task: str) -> str:
    sides = []
    for side in ("before", "after"):
        ranks = sorted({row[task][side]["rank"] for row in rows})
        sides.append(str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}")
    return f"{sides[0]} → {sides[1]}"


def _dominated(rows: Sequence[Any]) -> str:
    found: dict[str, list[str]] = {}
    for task in ("harmful", "primary"):
        for side in ("before", "after"):
            for cause in sorted({row[task][side]["dominated_by"] for row in rows} - {"none"}):
                found.setdefault(cause, []).append(f"{task} {side}")
    return "; ".join(f"{cause}: {', '.join(where)}" for cause, where in found.items()) or "none"


def _cost_notes(cost: Cost) -> str:
    notes = []
    for side in ("before", "after"):
        reached, runs = getattr(cost, f"reached_{side}"), getattr(cost, f"runs_{side}")
        if 0 < reached < runs:
            notes.append(f"{side}: {reached} of {runs} runs arrived")
    if cost.edge_of_grid:
        notes.append("edge of grid")
    if cost.diverged:
        notes.append("a run diverged")
    return "; ".join(notes)
