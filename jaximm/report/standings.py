"""The table of a suite: a line a defence and case, its worst result over seeds and assessments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaximm.records.assessment import HOLDS
from jaximm.report import formats, reading
from jaximm.report.reading import Assessment, Model
from jaximm.report.table import Column, Table

Card = Mapping[str, Any]
Entry = tuple[Assessment, Card | None]
"""An assessment, and the card of the bundle that it is of."""

_Line = tuple[str, str, list[tuple[Assessment, Model]], Card | None]
"""Case, defence, its models in all assessments, card."""


def suite_table(entries: Sequence[Entry], *, seeds: int) -> Table:
    """One line a case and defence, hardest to break first.

    Every cell is the worst over the defence's seeds, and over all assessments of it: one that finds
    it weaker replaces what was there. Behind the others stand defences that lost their own task,
    and at the end, unranked, those of fewer seeds than the suite asks for.

    Args:
      entries: assessments under one suite, with their cards.
      seeds: that a defence needs to be ranked.

    Raises:
      ValueError: no assessments, or of several levels.
    """
    levels = {assessment["level"] for assessment, _ in entries}
    if len(levels) != 1:
        raise ValueError(f"expected assessments under one suite, got {sorted(levels)}.")
    lines: dict[tuple[str, str], _Line] = {}
    for assessment, card in entries:
        for model in filter(reading.is_defended, assessment["models"]):
            name = assessment["name"], model["method"]
            *_, models, known = lines.setdefault(name, (*name, [], card))
            models.append((assessment, model))
            lines[name] = (*name, models, known or card)

    def count(line: _Line) -> int:
        return len({(model["seed"], model["hash"]) for _, model in line[2]})

    def worst_holds(line: _Line) -> str:
        return min((model["conditions"]["resistance"]["holds"] for _, model in line[2]),
                   key=HOLDS.index)  # fmt: skip

    def cheapest(line: _Line) -> Model:
        return min((model for _, model in line[2]), key=_ratio)

    def most_harm(line: _Line) -> float:
        harms = [model["break_unbounded"]["highest_harm"] for _, model in line[2]]
        return max((value for value in harms if value is not None), default=math.nan)

    def lost(line: _Line) -> bool:
        return any(reading.lost_utility(model) for _, model in line[2])

    def rank(line: _Line) -> tuple[Any, ...]:
        return (
            line[0], count(line) < seeds, lost(line), -HOLDS.index(worst_holds(line)),
            -_ratio(cheapest(line)), most_harm(line),
        )  # fmt: skip

    def of_card(*keys: str) -> Any:
        def value(line: _Line) -> str:
            field: Any = line[3]
            for key in keys:
                field = None if field is None else field[key]
            return formats.MISSING if field is None else str(field)

        return value

    def harm(line: _Line) -> str:
        return reading.score(most_harm(line), line[2][0][0]["data"]["metric"])

    columns = (
        Column("case", lambda line: line[0]),
        Column("defence", lambda line: line[1]),
        Column("seeds", lambda line: f"{count(line)}" + " (unranked)" * (count(line) < seeds), str),
        Column("resistance", lambda line: worst_holds(line) + ", lost its own task" * lost(line)),
        Column("worst harm", harm, str),
        Column("cost-to-break ratio",
               lambda line: reading.break_text(cheapest(line)["break_unbounded"]), str),
        Column("harmful rows", of_card("data", "harmful_rows"), str),
        Column("compute", of_card("compute")),
        Column("its makers' own attack", of_card("adaptive_attack", "result")),
    )  # fmt: skip
    note = reading.note("standings", seeds=seeds)
    return Table(levels.pop(), columns, sorted(lines.values(), key=rank), note)


def _ratio(model: Model) -> float:
    """To rank by: what was not broken is above any number, what is not known below."""
    ratio = reading.break_ratio(model["break_unbounded"])
    if ratio.bound == ">":
        return math.inf
    return -math.inf if math.isnan(ratio.value) else ratio.value
