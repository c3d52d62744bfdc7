"""What is printed of an immunised language model: its record, and what a run would do.

No ratio of condition numbers stands alone: beside that of the harmful text stand those of a benign
text in its place and of two halves of one text. Only what exceeds both says something about harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from jaximm.report import formats, reading, table
from jaximm.report.table import Column, Table

Record = Mapping[str, Any]

OTHERS = ("harmful", "control", "null")
"""Texts beside the primary one in a ratio, the two controls last."""


def terminal(record: Record, *, width: int) -> list[RenderableType]:
    """Lines and tables for rich to print."""
    return [
        *map(Text, said(record)),
        "",
        *table.shown([conditioning(record), utility(record)], width=width),
    ]


def said(record: Record) -> list[str]:
    """What the numbers say, and of which weights they are."""
    config, change = record["config"], record["change_of_logits"]
    return [
        f"{record['method']} on {config['model']} ({record['precision']})",
        f"largest change of a logit: {change['largest_change']:.1e} (of logits up to "
        f"{change['largest_logit']:.1f})",
        specific(record),
    ]


def specific(record: Record) -> str:
    """Whether the ratio on held-out documents is specific to the harmful text.

    It is where it exceeds those of both controls. A record without one of them claims nothing.
    """
    sites = [row for row in _sites(record) if row["split"] == "held_out"]
    beyond = [row["site"] for row in sites if _beyond_controls(row)]
    if not beyond:
        return "At no site is RIR on held-out documents above that of both controls: not specific."
    return (
        f"RIR on held-out documents is above that of both controls at {', '.join(beyond)} "
        f"({len(beyond)} of {len(sites)} sites)."
    )


def conditioning(record: Record) -> Table:
    """Condition numbers of each site, and RIR beside its controls and its limit."""

    def kappa(task: str) -> Column:
        def ends(row: Record) -> str:
            numbers = row["harmful"]["primary" if task == "primary" else "other"]
            return " → ".join(formats.from_log(numbers[when]["log_kappa"]) for when in _WHEN)

        return Column(f"kappa, {task}", ends, str)

    def ratio(name: str, heading: str) -> Column:
        return Column(
            heading, lambda row: None if name not in row else row[name]["log_rir"], formats.from_log
        )

    columns = (
        Column("site", lambda row: row["site"]),
        Column("documents", lambda row: row["split"].replace("_", "-")),
        kappa("primary"),
        kappa("harmful"),
        ratio("harmful", "RIR harmful"),
        ratio("control", "RIR benign"),
        ratio("null", "RIR null"),
        Column("limit", lambda row: row["harmful"]["log_rir_limit"], formats.from_log),
        Column("above both", lambda row: _YES_OR_NO[_beyond_controls(row)]),
    )
    note = (
        "Before → after, damped. RIR: how much more the other text's kappa grew than the primary "
        "text's; benign: another benign text in the harmful one's place; null: two halves of the "
        "primary text. Limit: of any invertible map at that site."
    )
    return Table("Condition numbers by site", columns, _sites(record), note)


def utility(record: Record) -> Table:
    """How well each text is predicted, on held-out documents."""

    def both(key: str, places: int) -> Column:
        heading = {"nats": "nats a token", "right": "tokens right"}.get(key, key)
        return Column(
            heading,
            lambda role: " → ".join(
                formats.decimal(record["utility"][when][role][key], places) for when in _WHEN
            ),
            str,
        )

    columns = (
        Column("text", lambda role: f"{role} ({record['config'][role].removeprefix('text:')})"),
        Column("tokens", lambda role: record["utility"]["after"][role]["tokens"], "{:,}".format),
        both("nats", 3),
        both("perplexity", 2),
        both("right", 3),
    )
    return Table("Held-out documents, before → after", columns, list(record["utility"]["after"]))


_WHEN = ("before", "after")
_YES_OR_NO = {True: "yes", False: "no", None: None}


def _sites(record: Record) -> list[dict[str, Any]]:
    """Rows of a site and split, by the text beside the primary one."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in record["conditioning"]:
        key = row["site"], row["split"]
        rows.setdefault(key, {"site": key[0], "split": key[1]})[row["against"]] = row
    return list(rows.values())


def _beyond_controls(row: Record) -> bool | None:
    """Whether the harmful text's ratio exceeds both controls', by more than what counts as
    unchanged; None where one is missing."""
    if not all(name in row for name in OTHERS):
        return None
    harmful, *controls = (row[name]["log_rir"] for name in OTHERS)
    return harmful > max(controls) + reading.UNCHANGED_LOG


def plan_lines(config: Any, plan: Any) -> list[str]:
    """What a run would do.

    Args:
      config: a `jaximm.run.language.LanguageExperiment`.
      plan: its `jaximm.run.language.Plan`.
    """
    memory = plan.memory
    lines = [
        f"model: {config.model}: {plan.parameters:,} numbers, {size(plan.weights)} "
        f"({plan.precision})",
        f"method: {config.method}",
    ]
    if memory is None:
        lines.append("steps: none; the weights are moved on the host, a layer at a time in float64")
    else:
        lines.append(
            f"steps: {config.method_config.steps} of {config.batch_size} rows of "
            f"{config.length} tokens of each text, {config.compute_dtype}; {config.train}: "
            f"{plan.trained:,} numbers train"
        )
        total = memory.arguments + memory.temporaries
        lines.append(
            f"memory of a step: {size(total)} a device of {memory.devices}: "
            f"{size(memory.arguments)} of arguments, {size(memory.temporaries)} of temporaries, as "
            "XLA plans it for simulated CPU devices"
        )
    lines += [
        f"{role}: {getattr(config, role)}, rows to train on {rows[0]}, to choose on {rows[1]}, to "
        f"report {rows[2]}"
        for role, rows in plan.rows.items()
    ]
    return [*lines, "measured before and after: " + ", ".join(["features", *config.sites])]


def size(count: int) -> str:
    """Bytes as a reader sees them.

    >>> size(3 * 2**29), size(2**20), size(2000)
    ('1.50 GiB', '1.00 MiB', '1.95 KiB')
    """
    unit, name = next(
        ((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB")) if count >= unit),
        (2**10, "KiB"),
    )
    return f"{formats.significant(count / unit)} {name}"
