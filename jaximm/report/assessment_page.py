"""One self-contained HTML page for one assessment: answer first, then the evidence.

It looks like the page of results (`jaximm.report.page`), whose styles and table macros it takes:
nothing is loaded, colours follow the reader's scheme, every text of the assessment is escaped.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Sequence

import jinja2
import markupsafe

from jaximm.report import assessment_heat as heat
from jaximm.report import assessment_tables as tables
from jaximm.report import formats
from jaximm.report.assessment_leaderboard import leaderboard, ranked
from jaximm.report.assessment_rows import (
    HARMFUL,
    Assessment,
    Model,
    chance,
    is_reference,
    plain,
    reference_of,
    score,
)
from jaximm.report.assessment_verdict import TONES, decide
from jaximm.report.page import Key, Panel, write_text
from jaximm.report.tables import Table

LINES = 8
"""Curves of this many models are drawn, a colour each: undefended ones, then as the leaderboard
ranks them. The tables show all."""

FLOOR = "1e-2"
"""Of the floors on steps, the one to this relative excess loss is drawn."""

LIMIT = 1_900_000
"""Bytes above which the page leaves the grids of hyper-parameters to the file."""


WORDS = {"accuracy": "accuracy", "r2": "R²"}


def write_assessment_page(
    assessment: Assessment, path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Writes the page of `assessment` to `path`, whole or not at all.

    Args:
      assessment: validated, see `jaximm.records.assessment`.
      path: the file to write; a page that was there before is replaced at the end.
      title: heading of the page; by default it names the experiment.

    Raises:
      OSError: if the file cannot be written; an older page is then untouched.
    """
    write_text(render(assessment, title=title), path)


def render(assessment: Assessment, *, title: str | None = None) -> str:
    """The page as text; the same assessment gives the same text."""
    text = _render(assessment, title, grids=True)
    if len(text.encode()) > LIMIT:
        text = _render(assessment, title, grids=False)
    return text


def _render(assessment: Assessment, title: str | None, *, grids: bool) -> str:
    page = _source("page.html.jinja")
    macros, _, body = page.partition("<!DOCTYPE html>")
    (style,) = re.findall(r"<style>(.*?)</style>", body, flags=re.DOTALL)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.DictLoader(
            {"macros": macros, "assessment": _source("assessment.html.jinja")}
        ),
    )
    models, data = assessment["models"], assessment["data"]
    drawn = sorted(ranked(assessment), key=lambda model: not is_reference(model))[:LINES]
    choices = [
        table
        for attacker in assessment["attackers"]
        if (table := tables.choices(assessment, attacker["name"], grids=grids)).rows
    ]
    return environment.get_template("assessment").render(
        title=title or f"Assessment: {formats.name(assessment['name'])}",
        style=markupsafe.Markup(style),
        assessment=assessment,
        data=data,
        tones=TONES,
        verdicts=[decide(assessment, model) for model in models],
        compared=any(reference_of(assessment, model) is not None for model in models),
        leaderboard=_unbroken(leaderboard([assessment])),
        panels=_panels(assessment, drawn),
        legend=_legend(drawn),
        floors=_floor_sentence(assessment),
        hidden=len(models) - len(drawn),
        quality=heat.quality_map(assessment),
        ratios=heat.ratio_map(assessment),
        others=heat.heat_tasks(assessment),
        metric=WORDS[data["metric"]],
        utility_metric=WORDS[data["utility_metric"]],
        percent=", in per cent" if data["metric"] == "accuracy" else "",
        chance=score(chance(assessment), data["metric"]),
        conditions=_unbroken(tables.conditions(assessment)),
        together=tables.together(assessment),
        flags=tables.flags(assessment),
        certificates=tables.certificates(assessment),
        choices=choices,
        grids=grids,
        failed=tables.failed(assessment),
        protocol=tables.protocol(assessment),
        ran=len({row["attacker"] for row in assessment["rows"] if row["status"] == "done"}),
    )


def _unbroken(table: Table) -> Table:
    """With intervals in brackets, and numbers with their unit, kept on one line."""
    whole = r"\([^()]*\)|\d \w*FLOP"
    return table._replace(
        rows=tuple(
            tuple(
                re.sub(whole, lambda found: found[0].replace(" ", "\u00a0"), cell)
                if column.numeric
                else cell
                for column, cell in zip(table.columns, row, strict=True)
            )
            for row in table.rows
        )
    )


def _source(name: str) -> str:
    return importlib.resources.files("jaximm.report").joinpath(name).read_text(encoding="utf-8")


def _panels(assessment: Assessment, models: list[Model]) -> list[Panel]:
    from jaximm.report import assessment_plots  # matplotlib takes half a second to import

    metric, unit = assessment["data"]["metric"], assessment["data"]["utility_metric"]
    percent = metric == "accuracy"
    extent = [
        value
        for model in models
        for key in ("break", "break_unbounded")
        for value in model[key]["envelope"]["flops"]
        if value is not None
    ]
    panels = []
    for key in ("break", "break_unbounded"):
        thresholds = {model[key]["threshold"] for model in models} - {None}
        lines = [
            assessment_plots.Line(
                model[key]["envelope"]["flops"],
                model[key]["envelope"]["harm"],
                colour,
                _floors(assessment, model["label"]),
            )
            for colour, model in enumerate(models)
        ]
        heading = _bound_sentence([model[key]["utility_bound"] for model in models], unit)
        level = chance(assessment)
        svg = assessment_plots.cost_curves(
            lines,
            alt=f"Highest harm against FLOPs spent, a line a model. {heading}",
            ylabel=f"harmful {'accuracy, %' if percent else 'R²'}",
            scale=100.0 if percent else 1.0,
            threshold=thresholds.pop() if len(thresholds) == 1 else None,
            chance=level if level > 0 else None,
            extent=extent,
        )
        panels.append(Panel(heading, markupsafe.Markup(svg)))
    return panels


def _bound_sentence(bounds: Sequence[float | None], unit: str) -> str:
    known = [bound for bound in bounds if bound is not None]
    if not known:
        return "Whatever is left of the utility"
    low, high = score(min(known), unit), score(max(known), unit)
    if low == high:
        return f"Utility kept at {low} or more"
    return f"Utility kept at each model's bound ({low} to {high})"


def _legend(models: list[Model]) -> list[Key]:
    from jaximm.report import plots

    return [
        Key(model["label"], f"--c{place % plots.PALETTE_SIZE}", plots.GLYPHS[place])
        for place, model in enumerate(models)
    ]


def _floors(assessment: Assessment, label: str) -> list[float]:
    return [
        row["flops"]
        for row in assessment["certificates"]
        if row["model"] == label and row["task"] == HARMFUL and row["flops"] is not None
        if row["target"].endswith(FLOOR)
    ]


def _floor_sentence(assessment: Assessment) -> str:
    """What the certificates of the harmful task say, for the caption of the curves."""
    found = [row for row in assessment["certificates"] if row["task"] == HARMFUL]
    if not found:
        return ""
    drawn = any(row["flops"] is not None for row in found)
    rest = [row for row in found if row["flops"] is None]
    text = ""
    if drawn:
        names = dict.fromkeys(formats.name(row["name"]) for row in found if row["flops"])
        text = (
            f"Short thick lines at the foot: certified floors ({', '.join(names)}) of the cost of "
            "bringing the training loss within 1 % of its optimum, for attackers of the class "
            "named below; they are not floors of the dotted line. "
        )
    if rest:
        owners: dict[str, list[str]] = {}
        for row in rest:
            what = f"{formats.name(row['name'])} {plain(row['value'])} {row['unit']}"
            owners.setdefault(what, []).append(row["model"])
        every = len(assessment["models"])
        listed = "; ".join(
            f"{what} ({'every model' if len(set(of)) == every > 1 else ', '.join(of)})"
            for what, of in owners.items()
        )
        text += f"Certified without a cost: {listed}."
    return text.strip()
