"""An assessment as tables: for the page, as Markdown, as CSV, for the terminal.

The CSV carries the raw numbers of every row, the other tables rounded ones.
"""

from __future__ import annotations

import csv as csv_module
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from jaximm.records.assessment import CONDITIONS
from jaximm.report import formats, terminal
from jaximm.report.assessment_heat import heat_table, quality_map, ratio_map
from jaximm.report.assessment_leaderboard import in_unit, leaderboard
from jaximm.report.assessment_rows import (
    Assessment,
    Row,
    flops,
    metric_name,
    plain,
    score,
    settings,
    tasks_of,
)
from jaximm.report.assessment_verdict import decide
from jaximm.report.tables import Column, Table, _escape, to_markdown


def conditions(assessment: Assessment) -> Table:
    """The four conditions of Rosati et al. (2024) on each model."""
    columns = (
        Column("model", numeric=False),
        Column("condition", numeric=False),
        Column("holds", numeric=False),
        Column("value"),
        Column("undefended"),
        Column("value of", numeric=False),
        Column("cheapest cost"),
        Column("what the value is", numeric=False),
    )
    rows = tuple(
        (
            model["label"],
            name,
            found["holds"],
            # A cost ratio of a task that was never learned is that of the largest budget.
            "> "
            * (name == "trainability" and found["value"] is not None and found["flops"] is None)
            + _number_span(found["value"]),
            _number_span(found["undefended"]),
            formats.MISSING if found["attacker"] is None else formats.name(found["attacker"]),
            flops(found["flops"]),
            found["meaning"],
        )
        for model in assessment["models"]
        for name in CONDITIONS
        for found in [model["conditions"][name]]
    )
    return Table("The four conditions", columns, rows)


def _number_span(interval: Mapping[str, float | None] | None) -> str:
    if interval is None or interval["mean"] is None:
        return formats.MISSING
    mean, lower, upper = (_number(interval[key]) for key in ("mean", "lower", "upper"))
    return mean if formats.MISSING in (lower, upper) else f"{mean} ({lower} to {upper})"


def _number(value: float | None) -> str:
    """A number whose unit is told by its meaning only: three places, or three digits."""
    if value is None or abs(value) < 10:
        return formats.decimal(value)
    return formats.significant(value).replace("-", "−")


def together(assessment: Assessment) -> Table:
    """What all attackers get together, against what they would if they erred independently."""
    metric = assessment["data"]["metric"]
    columns = (
        Column("model", numeric=False),
        Column(f"worst attacker{in_unit(metric)}"),
        Column("union of all"),
        Column("expected by chance"),
        Column("portfolio", numeric=False),
    )
    rows = tuple(
        (
            model["label"],
            *(score(model["union"][key], metric) for key in ("worst", "quality", "expected")),
            _portfolio(model["portfolio"]),
        )
        for model in assessment["models"]
    )
    note = (
        "Union: held-out examples that at least one attacker gets right. Expected by chance: the "
        "same for attackers that err independently of one another, each as good as it is; a union "
        "no larger says nothing beyond the worst attacker. Both are for labels; of R² there is "
        "none. Portfolio: what successive halving over all attackers and settings ends with on "
        "selection rows, and the part of the cost of running everything that it takes."
    )
    return Table("Attackers together", columns, rows, note)


def _portfolio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return formats.MISSING
    chosen = found["hyper_parameters"]
    who = formats.name(found["winner"]) + (f" ({settings(chosen)})" if chosen else "")
    part = found["spent"] / found["exhaustive"]
    return f"{who}: {plain(found['selection'])} for {flops(found['spent'])}, {part:.0%} of all"


def flags(assessment: Assessment) -> Table:
    """Flags of the assessment and of its models, warnings first; equal ones are one row."""
    where: dict[tuple[str, str, str], list[str]] = {}
    owners = [("all models", assessment["flags"])]
    owners += [(model["label"], model["flags"]) for model in assessment["models"]]
    for owner, found in owners:
        for flag in found:
            key = (flag["severity"], flag["code"], flag["message"])
            where.setdefault(key, []).append(owner)
    columns = (
        Column("severity", numeric=False),
        Column("flag", numeric=False),
        Column("what it means", numeric=False),
        Column("models", numeric=False),
    )
    rows = tuple(
        (severity, formats.name(code), message, ", ".join(dict.fromkeys(labels)))
        for (severity, code, message), labels in sorted(
            where.items(), key=lambda item: item[0][0] != "warning"
        )
    )
    return Table("Flags", columns, rows)


def failed(assessment: Assessment) -> Table:
    """Cells that failed or do not apply, and why; failed ones first."""
    columns = (
        Column("status", numeric=False),
        Column("model", numeric=False),
        Column("attacker", numeric=False),
        Column("task", numeric=False),
        Column("reason", numeric=False),
    )
    listed = [row for row in assessment["rows"] if row["status"] != "done"]
    rows = tuple(
        (
            row["status"].replace("_", " "),
            row["model"],
            formats.name(row["attacker"]),
            row["task"],
            row["reason"] or formats.MISSING,
        )
        for row in sorted(listed, key=lambda row: row["status"] != "failed")
    )
    return Table("Failed and not applicable", columns, rows)


def choices(assessment: Assessment, attacker: str, *, grids: bool = True) -> Table:
    """What one attacker chose on each model and task, out of which grid."""
    metric = assessment["data"]["metric"]
    columns = (
        Column("model", numeric=False),
        Column("task", numeric=False),
        Column("chosen", numeric=False),
        Column(f"selection{in_unit(metric)}"),
        Column("stop"),
        Column("within the utility bound", numeric=False),
        Column("steps"),
        Column("notes", numeric=False),
        *([Column("grid, with selection quality", numeric=False)] if grids else []),
    )
    rows = tuple(
        (
            row["model"],
            row["task"],
            settings(row["hyper_parameters"]),
            score(row["selected"], metric),
            f"{row['stop']:,}",
            _kept(row, metric),
            f"{row['steps']:,}",
            _notes(row),
            *([_grid(row["grid"], metric)] if grids else []),
        )
        for row in assessment["rows"]
        if row["attacker"] == attacker and row["status"] == "done"
    )
    return Table(formats.name(attacker), columns, rows)


def _kept(row: Row, metric: str) -> str:
    """What was chosen among that which keeps the utility, with what it reaches on held-out rows."""
    found = row["within_bound"]
    if found is None:
        return formats.MISSING
    reached = score((found["quality"] or {"mean": None})["mean"], metric)
    return f"{settings(found['hyper_parameters'])}, stop {found['stop']:,}: {reached}"


def _notes(row: Row) -> str:
    notes = {
        "edge of the grid": row["edge_of_grid"],
        "diverged": row["diverged"],
        "loss still falling": row["still_falling"],
    }
    return ", ".join(text for text, holds in notes.items() if holds) or formats.MISSING


def _grid(cells: Sequence[Mapping[str, Any]], metric: str) -> str:
    texts = []
    for cell in cells:
        values = {k: v for k, v in cell.items() if k not in ("selection", "diverged")}
        outcome = "diverged" if cell.get("diverged") else score(cell.get("selection"), metric)
        texts.append(f"{', '.join(map(plain, values.values())) or 'default'}\u00a0→\u00a0{outcome}")
    if not texts:
        return formats.MISSING
    names = [formats.name(key) for key in cells[0] if key not in ("selection", "diverged")]
    return f"{', '.join(names)}: {'; '.join(texts)}" if names else "; ".join(texts)


def certificates(assessment: Assessment) -> Table:
    """Certified bounds, as recorded."""
    columns = (
        Column("model", numeric=False),
        Column("certificate", numeric=False),
        Column("holds against", numeric=False),
        Column("task", numeric=False),
        Column("target", numeric=False),
        Column("value"),
        Column("unit", numeric=False),
        Column("cost"),
    )
    rows = tuple(
        (
            row["model"],
            formats.name(row["name"]),
            row["threat_model"],
            row["task"],
            row["target"],
            plain(row["value"]),
            row["unit"],
            flops(row["flops"]),
        )
        for row in assessment["certificates"]
    )
    return Table("Certificates", columns, rows)


# ---------------------------------------------------------------- Markdown, CSV, terminal


def assessment_markdown(assessment: Assessment) -> str:
    """Verdicts, leaderboard, heat maps as tables, conditions, flags, failures as Markdown."""
    parts = [f"# {_escape(assessment['name'])}, {_escape(assessment['level'])}\n"]
    for model in assessment["models"]:
        found = decide(assessment, model)
        lines = [f"**{_escape(found.label)}**: {_escape(found.headline)}", ""]
        lines += [f"- {_escape(text)}" for text in (*found.warnings, *found.sentences)]
        lines += [f"- Threat model: {_escape(found.threat_model)}"]
        parts.append("\n".join(lines) + "\n")
    parts += [to_markdown(table) for table in _all_tables(assessment) if table.rows]
    parts.append("## Hyper-parameters\n")
    parts += [
        to_markdown(table)
        for attacker in assessment["attackers"]
        if (table := choices(assessment, attacker["name"], grids=False)).rows
    ]
    parts.append("## Protocol\n")
    if assessment["command"]:
        parts.append(f"```\n{assessment['command']}\n```\n")
    parts.append(
        "\n".join(f"- {name}: {_escape(text)}" for name, text in protocol(assessment)) + "\n"
    )
    return "\n".join(parts)


def protocol(assessment: Assessment) -> list[tuple[str, str]]:
    """How it was done, on which data and with which versions, a line each."""
    settled, data, cells = assessment["protocol"], assessment["data"], assessment["cells"]
    tasks = (
        f"{task}: {found['name']} ({found['n_train']:,} training, {found['n_selection']:,} "
        f"selection, {found['n_held_out']:,} held out)"
        for task, found in data["tasks"].items()
    )
    hashes = (f"{model['label']} {model['hash'][:16]}" for model in assessment["models"])
    return [
        ("Level", assessment["level"]),
        ("Seeds", f"{plain(settled['select_seeds'])} to choose hyper-parameters, "
                  f"{plain(settled['report_seeds'])} to report"),
        ("Budget of probes", f"{plain(settled['probe_steps'])} (steps)"),
        ("Budget on the weights", f"{settled['weight_steps']:,} steps"),
        ("Broken", f"at {plain(settled['break_fraction'])} of what is reached undefended"),
        ("Utility kept", f"{plain(settled['utility_fraction'])} of the model's own"),
        ("Batch size", plain(settled["batch_size"])),
        ("Chunk", plain(settled["chunk"])),
        ("Loop", settled["loop"]),
        ("Tasks", "; ".join(tasks)),
        ("Features", f"{data['d']:,}; inputs of the tasks "
                     f"{'shared' if data['inputs_shared'] else 'of their own'}"),
        ("Data", f"{data['name']}. {data['source']}"),
        ("Models", "; ".join(hashes)),
        ("Device", plain(assessment["device"])),
        ("Versions", plain(assessment["versions"])),
        ("Code", assessment["code"]),
        ("Attacks", f"{cells['done']:,} done, {cells['failed']:,} failed, "
                  f"{cells['not_applicable']:,} not applicable"),
        ("Digest of the cells", cells["digest"]),
    ]  # fmt: skip


def _all_tables(assessment: Assessment) -> list[Table]:
    unit = metric_name(assessment["data"]["metric"])
    qualities = [
        heat_table(
            quality_map(assessment, task=task),
            f"Quality on {task} at the stop ({unit})",
        )
        for task in tasks_of(assessment)
    ]
    costs = heat_table(ratio_map(assessment), "Cost to break over the undefended model's")
    tables = [leaderboard([assessment]), *qualities, costs, conditions(assessment)]
    return [*tables, together(assessment), certificates(assessment), flags(assessment),
            failed(assessment)]  # fmt: skip


CSV_COLUMNS: tuple[str, ...] = (
    "experiment", "level", "digest", "model", "method", "model_seed", "attacker", "family", "kind",
    "task", "status", "reason",
    "quality", "quality_lower", "quality_upper", "best_quality",
    "change", "change_lower", "change_upper", "utility", "utility_lower", "utility_upper",
    "stop", "steps", "setup_flops", "step_flops", "flops_to_break", "selected",
    "loss_start", "loss_end", "loss_guessing",
    "gradient_start", "gradient_end", "gradient_backbone",
    "edge_of_grid", "diverged", "still_falling", "by_seed", "hyper_parameters", "grid",
    "within_bound",
)  # fmt: skip
"""Columns of `assessment_csv`, in this order whatever the assessment holds."""


def assessment_csv(assessment: Assessment) -> str:
    """One line a row of the assessment, raw numbers, empty where null; the last four are JSON.

    Learning curves are left out.
    """
    models = {model["label"]: model for model in assessment["models"]}
    attackers = {attacker["name"]: attacker for attacker in assessment["attackers"]}
    buffer = io.StringIO()
    writer = csv_module.DictWriter(buffer, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in assessment["rows"]:
        line: dict[str, Any] = {
            "experiment": assessment["name"],
            "level": assessment["level"],
            "digest": assessment["cells"]["digest"],
            "method": models[row["model"]]["method"],
            "model_seed": models[row["model"]]["seed"],
            "family": attackers[row["attacker"]]["family"],
            "kind": attackers[row["attacker"]]["kind"],
        }
        line |= {key: row[key] for key in CSV_COLUMNS if key in row}
        for key in ("quality", "change", "utility"):
            found = row[key] or dict.fromkeys(("mean", "lower", "upper"))
            line |= {key: found["mean"], f"{key}_lower": found["lower"],
                     f"{key}_upper": found["upper"]}  # fmt: skip
        for key in ("loss", "gradient"):
            line |= {f"{key}_{part}": value for part, value in (row[key] or {}).items()}
        line |= {key: json.dumps(row[key]) for key in CSV_COLUMNS[-4:]}
        writer.writerow(line)
    return buffer.getvalue()


def terminal_assessment(assessment: Assessment, *, width: int = 80) -> list[RenderableType]:
    """What a terminal has room for: leaderboard, costs, verdicts, flags, failures.

    Args:
      assessment: a validated assessment.
      width: columns of the terminal; wider tables are broken into blocks.
    """
    tables = [
        leaderboard([assessment]),
        heat_table(ratio_map(assessment), "Cost to break over the undefended model's"),
    ]
    parts = [
        part
        for table in tables
        if table.rows
        for part in terminal.blocks(terminal.narrowed(table), width=width)
    ]
    found = [decide(assessment, model) for model in assessment["models"]]
    answers = [(verdict.label, verdict.headline, "") for verdict in found]
    lines = [
        (row[0], f"{row[1]} ({row[3]}). {row[2]}", "yellow" if row[0] == "warning" else "dim")
        for row in flags(assessment).rows
    ]
    lost = [
        (row[0], f"{row[2]} on {row[1]}, {row[3]}: {row[4]}", "yellow" if row[0] == "failed" else
         "dim")
        for row in failed(assessment).rows
    ]  # fmt: skip
    return [*parts, *terminal.pairs(answers), *terminal.pairs(lines), *terminal.pairs(lost)]
