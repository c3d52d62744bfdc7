"""The leaderboard: models of one assessment or of many, hardest to break first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from jaximm.records.assessment import CONDITIONS
from jaximm.report import formats
from jaximm.report.assessment_rows import (
    Assessment,
    Model,
    break_ratio,
    break_text,
    metric_name,
    score,
    span,
)
from jaximm.report.tables import Column, Table


def leaderboard(assessments: Sequence[Assessment]) -> Table:
    """One line a model, hardest to break first.

    Assessments of one experiment are one group, in order of first appearance. Within it models are
    sorted by the cost-to-break ratio under the utility bound, largest first, those that nobody
    broke before all others, then by the worst-case harm, smallest first; models without a ratio
    come last. A model that occurs
    twice with the same numbers is one line; other models of one label are told apart by their hash.

    Raises:
      ValueError: if there are no assessments.
    """
    if not assessments:
        raise ValueError("expected at least one assessment, got none.")
    groups: dict[str, list[Assessment]] = {}
    for found in assessments:
        groups.setdefault(found["name"], []).append(found)
    several = len(groups) > 1
    units = {(f["data"]["metric"], f["data"]["utility_metric"]) for f in assessments}
    harm, utility = units.pop() if len(units) == 1 else ("", "")
    columns = (
        *([Column("experiment", numeric=False)] if several else []),
        Column("model", numeric=False),
        Column(f"worst harm{in_unit(harm)}"),
        Column("cost-to-break ratio"),
        Column("worst harm, any utility"),
        Column("ratio, any utility"),
        Column("area"),
        Column(f"utility{in_unit(utility)}"),
        *(Column(name, numeric=False) for name in CONDITIONS),
    )
    rows = [
        (*([name] if several else []), *_standing(found, model, label))
        for name, members in groups.items()
        for found, model, label in _ranked_models(members)
    ]
    note = (
        "Ratio: FLOPs of the cheapest attacker to the threshold, over those on the undefended "
        "model, with its 95 % interval; where no attacker arrived within its own budget, the "
        "largest of the budgets. Worst harm: highest quality on the harmful task, over attackers "
        "and over their budget. Both with the attacked model's utility kept above the bound, "
        "unless 'any utility'. Area: under the curve of harm against the logarithm of FLOPs, "
        "smaller is better."
    )
    mixed = [name for name, members in groups.items() if _protocols(members) > 1]
    if mixed:
        note += f" Assessed by different protocols, levels or code: {', '.join(mixed)}."
    return Table("Leaderboard", columns, tuple(rows), note)


def ranked(assessment: Assessment) -> list[Model]:
    """The models of one assessment, hardest to break first."""
    return sorted(assessment["models"], key=_rank)


def in_unit(metric: str) -> str:
    """A unit for a heading: ' (accuracy, %)'; nothing where metrics differ."""
    return f" ({metric_name(metric)})" if metric else ""


def _ranked_models(members: Sequence[Assessment]) -> list[tuple[Assessment, Model, str]]:
    listed: list[tuple[Assessment, Model]] = []
    for found in members:
        for model in found["models"]:
            if not any(model == other for _, other in listed):
                listed.append((found, model))
    labels = [model["label"] for _, model in listed]
    named = [
        (found, model, model["label"] if labels.count(model["label"]) == 1
         else f"{model['label']} ({model['hash'][:8]})")
        for found, model in listed
    ]  # fmt: skip
    return sorted(named, key=lambda item: _rank(item[1]))


def _rank(model: Model) -> tuple[bool, float, float]:
    ratio, harm = break_ratio(model["break"]), model["break"]["highest_harm"]
    value = math.inf if ratio.bound == ">" else ratio.value
    return math.isnan(value), -value, math.inf if harm is None else harm


def _protocols(members: Sequence[Assessment]) -> int:
    keys = ("protocol", "level", "code", "data")
    return len({json.dumps([found[key] for key in keys], sort_keys=True) for found in members})


def _standing(found: Assessment, model: Model, label: str) -> tuple[str, ...]:
    data = found["data"]
    kept, free = model["break"], model["break_unbounded"]
    return (
        label,
        score(kept["highest_harm"], data["metric"]),
        break_text(kept),
        score(free["highest_harm"], data["metric"]),
        break_text(free),
        formats.decimal(kept["area"]),
        span(model["utility"], data["utility_metric"]),
        *(model["conditions"][name]["holds"] for name in CONDITIONS),
    )
