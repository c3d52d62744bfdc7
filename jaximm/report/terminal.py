"""Results as what a terminal has room for: tables in blocks, verdicts, flags.

Functions return what rich prints, and print nothing themselves. The page has everything; here are
the tables that answer first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from jaximm.report import formats, tables, verdict
from jaximm.report.compare import Cost, Group, Result, attack_costs, group_results
from jaximm.report.tables import Table

RAW = "raw"
"""Heading of the column for the backbone before immunisation."""


def of_results(
    results: Sequence[Result], *, width: int, everything: bool = False
) -> list[RenderableType]:
    """Summary, steps to break, verdicts and flags, in the order of `results`.

    Args:
      results: validated results.
      width: columns of the terminal; wider tables are broken into blocks.
      everything: also quality, paired differences, RIR by group and the primary task's attacks.

    Raises:
      ValueError: if there are no results.
    """
    groups = group_results(results)
    shown = [narrowed(tables.summary(groups))]
    if everything:
        shown += [tables.by_group(groups), tables.utility(groups), tables.paired(groups)]
    for task in ("harmful", "primary") if everything else ("harmful",):
        shown += [steps_to_break(groups, task), steps_to_accuracy(groups, task)]
    parts = [part for table in shown if table.rows for part in blocks(table, width=width)]
    attacked = [group for group in groups if any(result["attacks"] for result in group.results)]
    answers = [(found.label, found.headline, "") for found in map(verdict.decide, attacked)]
    return [*parts, *pairs(answers), *pairs(grouped_flags(groups))]


def of_checkpoints(compared: Mapping[str, Any], *, width: int) -> list[RenderableType]:
    """Tables and answer of `jaximm.report.checkpoints.compare_checkpoints`."""
    from jaximm.report import checkpoints  # brings the checkpoint library: slow to import

    parts = [
        part
        for table in checkpoints.all_tables(compared)
        for part in blocks(narrowed(table), width=width)
    ]
    return [*parts, *(Text(line) for line in checkpoints.sentences(compared)), ""]


def blocks(table: Table, *, width: int) -> list[RenderableType]:
    """A table in as many blocks of columns as `width` asks for, the leading ones in each."""
    unbounded = Console(width=10**4)
    lead = next((i for i, column in enumerate(table.columns) if column.numeric), 1)
    if lead < len(table.columns):
        lead += table.columns[lead].heading == RAW

    def build(chosen: Sequence[int], title: str) -> RichTable:
        places = [*range(lead), *chosen]
        rich_table = tables.to_rich(
            table._replace(
                title=title,
                columns=tuple(table.columns[place] for place in places),
                rows=tuple(tuple(row[place] for place in places) for row in table.rows),
                note="",
            )
        )
        for column in rich_table.columns[:lead]:
            column.no_wrap = True
        return rich_table

    def fitting(rest: Sequence[int]) -> int:
        count = len(rest)
        while count > 1 and unbounded.measure(build(rest[:count], "")).maximum > width:
            count -= 1
        return count

    rest = list(range(lead, len(table.columns)))
    number, left = 0, rest
    while left:
        number, left = number + 1, left[fitting(left) :]
    even = math.ceil(len(rest) / max(number, 1))
    parts: list[RenderableType] = []
    title = table.title
    while rest:
        count = min(fitting(rest), even)
        parts.append(build(rest[:count], title))
        rest, title = rest[count:], f"{table.title}, continued"
    return [*parts, Text(table.note, style="dim"), ""] if table.note else parts


def pairs(rows: Sequence[tuple[str, str, str]]) -> list[RenderableType]:
    """(heading, text, style) lines, the texts in one column; nothing where there are none."""
    if not rows:
        return []
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for heading, text, style in rows:
        grid.add_row(Text(heading, style=style or "bold"), Text(text))
    return [grid, ""]


def narrowed(table: Table) -> Table:
    """Without the columns in which no row has anything."""
    kept = [
        place
        for place in range(len(table.columns))
        if any(row[place] not in ("", formats.MISSING) for row in table.rows)
    ]
    return table._replace(
        columns=tuple(table.columns[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in table.rows),
    )


def steps_to_break(groups: Sequence[Group], task: str) -> Table:
    """Steps that each attacker's probe needs on the raw backbone and on that of each method."""
    note = (
        "Steps to 1 % of the starting excess loss, medians over seeds: on the backbone before "
        "('raw') and on each method's. '> 20,000': not reached within that many steps."
    )
    return _steps(groups, task, f"Steps to break, {task} task", note, fine_tuning=False)


def steps_to_accuracy(groups: Sequence[Group], task: str) -> Table:
    """Steps of attackers that train the backbone too, and the accuracy that they end with."""
    note = (
        "Steps to the held-out accuracy that the attacker reaches on the backbone before ('raw'), "
        "less a point, and in brackets the held-out accuracy at the end of the budget."
    )
    title = f"Steps to the undefended accuracy by fine-tuning, {task} task"
    return _steps(groups, task, title, note, fine_tuning=True)


def _steps(
    groups: Sequence[Group], task: str, title: str, note: str, *, fine_tuning: bool
) -> Table:
    def cell(cost: Cost | None, side: str) -> str:
        if cost is None:
            return formats.MISSING
        accuracy = getattr(cost, f"accuracy_{side}") if fine_tuning else None
        end = "" if accuracy is None else f" ({formats.decimal(accuracy)})"
        return formats.cost_steps(cost, side) + end

    found = [
        (
            group,
            {
                cost.attacker: cost
                for cost in attack_costs(group, task=task)
                if cost.fine_tuning == fine_tuning
            },
        )
        for group in groups
    ]
    attacked = [(group, costs) for group, costs in found if costs]
    shown = [(group, costs) for group, costs in attacked if group.method != "none"]
    rows = []
    for attacker in dict.fromkeys(name for _, costs in attacked for name in costs):
        raw = next(costs[attacker] for _, costs in attacked if attacker in costs)
        after = [cell(costs.get(attacker), "after") for _, costs in shown]
        rows.append((formats.name(attacker, short=True), cell(raw, "before"), *after))
    heads = [tables.Column("attacker", numeric=False), tables.Column(RAW)]
    # A heading breaks at spaces; the numbers below it are narrower than most labels.
    heads += [tables.Column(group.label.replace("_", " ")) for group, _ in shown]
    return Table(title, tuple(heads), tuple(rows), note)


def grouped_flags(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """(severity, text, style) of each flag, warnings first; where methods differ, names only."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for group in groups:
        for result in group.results:
            for flag in result["flags"]:
                methods = found.setdefault((flag["severity"], flag["code"]), {})
                methods.setdefault(group.label, set()).add(flag["message"])
    lines = []
    for (severity, code), methods in sorted(found.items(), key=lambda item: item[0][0] == "info"):
        messages = set().union(*methods.values())
        all_of_them = len(methods) == len(groups) > 1
        who = "every method" if all_of_them else ", ".join(methods)
        message = messages.pop() if len(messages) == 1 else "The page says why."
        style = "yellow" if severity == "warning" else "dim"
        lines.append((severity, f"{formats.name(code)} ({who}). {message}", style))
    return lines
