"""Heat maps of an assessment: attackers against models, numbers with a colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaximm.report import formats, reading
from jaximm.report.reading import Assessment, Row
from jaximm.report.table import Column, Table

FAMILY_NAMES = {"probe": "Probes on frozen features", "weights": "Attackers of the weights"}
STATUS_NAMES = {"failed": "failed", "not_applicable": "n/a"}


class Cell(NamedTuple):
    """A cell of a heat map.

    ``level`` is 0 ... 100, the strength of its colour; ``tone`` is "hot" (bad for the defender),
    "cool" (good), or "failed", "na", "none" where there is no number.
    """

    text: str
    detail: str
    tone: str
    level: int = 0


class HeatRow(NamedTuple):
    """One attacker; `cells` [model]."""

    attacker: str
    what: str
    cells: tuple[Cell, ...]


class HeatMap(NamedTuple):
    """Attackers by family against models."""

    task: str
    models: tuple[str, ...]
    families: tuple[tuple[str, tuple[HeatRow, ...]], ...]
    ends: tuple[str, str]


def quality_map(assessment: Assessment, *, task: str = reading.HARMFUL) -> HeatMap:
    """Quality where an attacker stops, coloured from chance to the best on undefended models.

    Chance is known of the harmful task only; elsewhere colours begin at 0.
    """
    metric, level = assessment["data"]["metric"], reading.chance(assessment)
    known = task == reading.HARMFUL and not math.isnan(level)
    low = level if known else 0.0
    free = {model["label"] for model in assessment["models"] if reading.is_reference(model)}
    means = [
        (row["model"], row["quality"]["mean"])
        for row in assessment["rows"]
        if row["task"] == task and row["quality"] and row["quality"]["mean"] is not None
    ]
    high = max(
        [value for label, value in means if label in free] or [v for _, v in means] or [low + 1]
    )

    def fill(row: Row) -> Cell:
        quality: Mapping[str, Any] = row["quality"] or {"mean": None}
        if quality["mean"] is None:
            return Cell(formats.MISSING, "no quality recorded", "none")
        ends = [reading.score(quality[end], metric) for end in ("lower", "upper")]
        detail = "" if formats.MISSING in ends else f"{ends[0]} to {ends[1]}"
        share = (quality["mean"] - low) / (high - low) if high > low else 0.0
        return Cell(reading.score(quality["mean"], metric), detail, "hot", _level(share))

    ends = (
        f"{'chance ' * known}{reading.score(low, metric)}",
        f"{'undefended' if free else 'best'} {reading.score(high, metric)}",
    )
    return _heat_map(assessment, task, fill, ends)


def ratio_map(assessment: Assessment, *, task: str = reading.HARMFUL) -> HeatMap:
    """Cost to break over the undefended model's, attacker by attacker.

    Of undefended models, and where there is none, the cost itself. A model that lost its own task
    gets no green: what it withstands protects nothing.
    """
    lost = {model["label"] for model in assessment["models"] if reading.lost_utility(model)}
    free = {model["label"] for model in assessment["models"] if reading.is_reference(model)}

    def fill(row: Row) -> Cell:
        cost, ratio = row["flops_to_break"], reading.ratio_of(row)
        paid = reading.flops(cost) if cost is not None else "not broken"
        if row["model"] in free or math.isnan(ratio.value):
            return Cell(paid, "", "none")
        level = _level(abs(math.log10(ratio.value)) / 2)  # full colour at a factor of 100
        if ratio.value >= 1 and row["model"] in lost:
            return Cell(reading.multiple(ratio), f"{paid}; the model lost its own task", "none")
        return Cell(reading.multiple(ratio), paid, "cool" if ratio.value >= 1 else "hot", level)

    return _heat_map(assessment, task, fill, ("1×", "100× or more"))


def _level(share: float) -> int:
    return round(100 * min(max(share, 0.0), 1.0))


def _who(attacker: Mapping[str, Any]) -> str:
    """What an attacker does, and whom it stands for."""
    texts = [attacker["kind"], attacker["what"]]
    texts += [f"It {attacker['threat_model']}"] if "threat_model" in attacker else []
    return ". ".join(text.rstrip(".") for text in texts) + "."


def _heat_map(
    assessment: Assessment, task: str, fill: Callable[[Row], Cell], ends: tuple[str, str]
) -> HeatMap:
    labels = tuple(model["label"] for model in assessment["models"])
    rows = {(r["model"], r["attacker"]): r for r in assessment["rows"] if r["task"] == task}

    def cell(row: Row | None) -> Cell:
        if row is None:
            return Cell("", "not run", "none")
        if row["status"] != "done":
            tone = "failed" if row["status"] == "failed" else "na"
            return Cell(STATUS_NAMES[row["status"]], row["reason"] or "", tone)
        return fill(row)

    families = []
    for family, name in FAMILY_NAMES.items():
        members = tuple(
            HeatRow(
                reading.attacker_title(attacker),
                _who(attacker),
                tuple(cell(rows.get((label, attacker["name"]))) for label in labels),
            )
            for attacker in assessment["attackers"]
            if attacker["family"] == family
            and any((label, attacker["name"]) in rows for label in labels)
        )
        if members:
            families.append((name, members))
    return HeatMap(task, labels, tuple(families), ends)


def heat_table(found: HeatMap, title: str) -> Table:
    """A heat map without its colours."""

    def text(cell: Cell) -> str:
        detail = f" ({cell.detail})" if cell.detail and cell.tone in ("hot", "cool") else ""
        return cell.text + detail or formats.MISSING

    models = (
        Column(label, lambda row, place=place: row.cells[place], text)
        for place, label in enumerate(found.models)
    )
    columns = (Column("attacker", lambda row: row.attacker), *models)
    return Table(title, columns, [row for _, members in found.families for row in members])


def other_tasks(assessment: Assessment) -> list[HeatMap]:
    """Quality on every task but the harmful one."""
    return [
        quality_map(assessment, task=task)
        for task in reading.tasks_of(assessment)
        if task != reading.HARMFUL
    ]
