"""Two checkpoints side by side, as `jaximm.run.compare.compare_checkpoints` returns them.

A is the reference and B what is measured against it: (i), (ii) and RIR are B over A.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from jaximm.records.comparison import SIDES, TASKS, Comparison, ProbeRow, Side
from jaximm.report import formats, reading
from jaximm.report.reading import Ratio
from jaximm.report.run_tables import FOOTING_NAMES
from jaximm.report.table import Column, Table, markdown_text, shown, to_markdown

KappaRecord = tuple[str, str, Mapping[str, Any], dict[Side, Mapping[str, Any]]]
"""Footing, task, the row of both tasks, and the kappas of each side."""

LAYER_ROWS = 20
"""Rows of the table of parameters: those that moved most."""


def all_tables(compared: Comparison) -> list[Table]:
    """Identity, condition numbers, layers, attacks; those that have rows."""
    parts = (identity, conditioning, stages, layers, attacks)
    return [table for table in (part(compared) for part in parts) if table.rows]


def terminal(compared: Comparison, *, width: int) -> list[RenderableType]:
    """Tables and answer, for rich to print."""
    return [*shown(all_tables(compared), width=width), *map(Text, sentences(compared)), ""]


def markdown(compared: Comparison) -> str:
    """The answer in words and the tables as Markdown."""
    lines = "\n".join(f"- {markdown_text(line)}" for line in sentences(compared))
    return "\n".join([lines + "\n", *map(to_markdown, all_tables(compared))])


def sentences(compared: Comparison) -> list[str]:
    """What the comparison says, most important first."""
    lines = []
    if compared["same_numbers"]:
        lines.append(
            "A and B hold the same numbers bit for bit (one content hash): nothing was immunised "
            "between them, and every difference below is rounding."
        )
    elif compared["movement"] is None:
        lines.append(f"Layers are not compared: {compared['movement_note']}.")
    else:
        total, rows = compared["movement"]["total"], compared["movement"]["parameters"]
        moved = sum(row["changed"] > 0 for row in rows)
        lines.append(
            f"{moved} of {len(rows)} parameters moved, {_percent(total['relative_norm'])} of the "
            "norm of all."
        )
        for key, words in (("added", "B adds"), ("removed", "B lacks")):
            names = compared["movement"][key]
            if names:
                lines.append(f"{words} {', '.join(names)}.")
    measure, row = next(iter(compared["conditioning"].items()))
    lines.append(
        f"Condition numbers B / A, {FOOTING_NAMES[measure]}: harmful "
        f"{formats.factor(row['log_ratio_harmful'])}, primary "
        f"{formats.factor(row['log_ratio_primary'])}, RIR {formats.factor(row['log_rir'])}."
    )
    unsound = [
        f"{task} {side.upper()}"
        for task in TASKS
        for side, name in SIDES.items()
        if row[task][name]["dominated_by"] == "rounding"
    ]
    if unsound:
        lines.append(f"Rounding decides kappa of {', '.join(unsound)}: no measurement.")
    ranks = {side: {t: row[t][name]["rank"] for t in TASKS} for side, name in SIDES.items()}
    if ranks["a"] != ranks["b"]:
        lines.append(
            "A and B differ in rank, so their kappas are over different numbers of directions: "
            + ", ".join(f"{t} {ranks['a'][t]} → {ranks['b'][t]}" for t in TASKS)
            + "."
        )
    accuracies = [compared[side]["primary_accuracy"] for side in SIDES]
    if None not in accuracies:
        lines.append(
            "Primary accuracy of the stored heads on these rows: "
            f"{formats.decimal(accuracies[0])} → {formats.decimal(accuracies[1])}."
        )
    return lines


def identity(compared: Comparison) -> Table:
    """What the two are: model, method, content hash."""
    sides = {side: compared[side] for side in SIDES}
    columns = (
        Column("", lambda side: side.upper()),
        Column("path", lambda side: sides[side]["path"]),
        Column("model", lambda side: sides[side]["model"]),
        Column("method", lambda side: sides[side]["method"]),
        Column("d", lambda side: sides[side]["width"], str),
        Column("primary accuracy", lambda side: sides[side]["primary_accuracy"],
               formats.decimal),
        Column("content hash", lambda side: sides[side]["content_hash"][:16]),
    )  # fmt: skip
    note = reading.note("identity")
    if compared["same_numbers"]:
        note = "The two hold the same numbers."
    return Table("Checkpoints", columns, list(SIDES), note)


def conditioning(compared: Comparison) -> Table:
    """Condition numbers of the features of both, on every footing."""
    records = [
        (footing, task, row, {side: row[task][name] for side, name in SIDES.items()})
        for footing, row in compared["conditioning"].items()
        for task in TASKS
    ]

    def kappa(side: Side) -> Column:
        return Column(f"κ {side.upper()}", lambda r: r[3][side]["log_kappa"], formats.from_log)

    def ranks(record: KappaRecord) -> str:
        pair = (f"{kappa['rank']} of {compared[side]['width']}"
                for side, kappa in record[3].items())  # fmt: skip
        return " → ".join(pair)

    def dominated(record: KappaRecord) -> str:
        causes = (f"{side.upper()}: {kappa['dominated_by']}" for side, kappa in record[3].items()
                  if kappa["dominated_by"] != "none")  # fmt: skip
        return ", ".join(causes) or "none"

    columns = (
        Column("footing", lambda r: FOOTING_NAMES[r[0]]),
        Column("task", lambda r: r[1]),
        kappa("a"),
        kappa("b"),
        Column("B / A", lambda r: r[2][f"log_ratio_{r[1]}"], formats.factor),
        Column("RIR", lambda r: formats.factor(r[2]["log_rir"]) if r[1] == TASKS[0] else "", str),
        Column("rank", ranks, str),
        Column("dominated by", dominated),
    )
    source = f" of {compared['data']}" if compared.get("data") else ""
    definitions = (
        f"{FOOTING_NAMES[name]}: {row['definition']}."
        for name, row in compared["conditioning"].items()
    )
    note = reading.note(
        "features", **compared["rows"], source=source, definitions=" ".join(definitions)
    )
    return Table("Condition numbers of the features", columns, records, note)


def stages(compared: Comparison) -> Table:
    """How far each stage moved, in the order in which they run."""
    moved = compared["movement"]
    columns = (
        Column("stage", lambda row: row["path"]),
        Column("numbers", lambda row: row["size"], "{:,}".format),
        Column("changed", lambda row: row["changed"], "{:,}".format),
        *_MOVED,
    )
    return Table("Stages moved", columns, [*moved["stages"], moved["total"]] if moved else [])


def layers(compared: Comparison, *, limit: int = LAYER_ROWS) -> Table:
    """The parameters that moved, most first."""
    moved = compared["movement"]
    rows = [row for row in (moved or {"parameters": ()})["parameters"] if row["changed"]]
    # A parameter that was zero moved by infinitely many of its norms (None in JSON).
    rows.sort(key=lambda row: math.inf if row["relative_norm"] is None else row["relative_norm"])
    most = rows[::-1][:limit]
    cut = f"The {len(most)} of {len(rows)} moved parameters that moved most."
    note = reading.note("layers", most=cut if len(rows) > len(most) else "")

    columns = (
        Column("parameter", lambda row: row["path"]),
        Column("shape", lambda row: " × ".join(map(str, row["shape"]))),
        *_MOVED,
        Column("largest σ of ΔW", lambda row: next(iter(row["top_singular_values"]), None),
               lambda v: formats.MISSING if v is None else f"{v:.3g}"),
        Column("directions", lambda row: row["effective_rank"], lambda v: formats.decimal(v, 1)),
        *(Column(f"κ {name.upper()}", lambda r, s=side: r[s] and r[s]["log_kappa"],
                 formats.from_log) for name, side in SIDES.items()),
        Column("rank", lambda r: [str(r[s]["rank"]) for s in SIDES.values() if r[s]],
               lambda ranks: " → ".join(ranks) or formats.MISSING),
    )  # fmt: skip
    return Table("Layers moved", columns, most, note)


def attacks(compared: Comparison) -> Table:
    """What fitting the rows takes each probe on A and on B, harmful task first."""

    def steps(row: ProbeRow, side: Side) -> int | None:
        taken = row[side]["fit"]["steps_to_loss_gap"]["1e-2"]
        return None if taken < 0 else taken

    def shown(row: ProbeRow, side: Side) -> str:
        taken = steps(row, side)
        return formats.steps(math.inf if taken is None else taken, row["steps"])

    def flops(row: ProbeRow, side: Side, *, capped: bool = False) -> float | None:
        taken = steps(row, side)
        taken = row["steps"] if taken is None and capped else taken
        own = row[side]
        return None if taken is None else own["setup_flops"] + taken * own["step_flops"]

    def quotient(row: ProbeRow, of: Callable[..., Any]) -> str:
        """B over A, a bound where one of them did not arrive; at least 1 of either."""
        ends = {side: steps(row, side) for side in SIDES}
        if ends["a"] is None and ends["b"] is None:
            return formats.MISSING
        bound = ">" if ends["b"] is None else "<" if ends["a"] is None else "="
        a, b = (max(1.0, of(row, side)) for side in SIDES)
        return reading.multiple(Ratio(b / a, bound))

    def capped(row: ProbeRow, side: Side) -> float:
        taken = steps(row, side)
        return row["steps"] if taken is None else taken

    def notes(row: ProbeRow) -> str:
        fits = [row[side]["fit"] for side in SIDES]
        texts = {"edge_of_grid": "edge of grid", "diverged": "diverged"}
        return "; ".join(text for key, text in texts.items() if any(fit[key] for fit in fits))

    columns = (
        Column("attacker", lambda row: row["title"]),
        Column("kind", lambda row: row["kind"]),
        Column("task", lambda row: row["task"]),
        *(Column(f"steps {side.upper()}", functools.partial(shown, side=side), str)
          for side in SIDES),
        Column("B / A", lambda row: quotient(row, capped), str),
        *(Column(f"FLOPs {side.upper()}", functools.partial(flops, side=side), reading.flops)
          for side in SIDES),
        Column("B / A", lambda row: quotient(row, functools.partial(flops, capped=True)), str),
        Column("notes", notes),
    )  # fmt: skip
    return Table("Cost of fitting, B against A", columns, compared["attacks"],
                 reading.note("fits"))  # fmt: skip


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return "from zero"
    return f"{formats.significant(100 * fraction)} %"


_MOVED = (
    Column("|ΔW| / |W|", lambda row: row["relative_norm"], _percent),
    Column("cosine", lambda row: row["cosine"], lambda v: formats.decimal(v, 4)),
)
