"""Self-contained HTML pages: answer first, then the evidence.

All pages extend ``templates/base.html.jinja``: of runs, of an assessment, of two checkpoints, of a
leaderboard. A page loads nothing: styles and figures are inline, colours follow the reader's light
or dark scheme, figures are panels that stand side by side where there is room. Every text that
comes from a document is escaped.
"""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from jaximm.records.assessment import TONES, traits_of
from jaximm.records.comparison import Comparison
from jaximm.report import (
    assessment_tables,
    checkpoints,
    formats,
    heat,
    reading,
    run_tables,
    standings,
)
from jaximm.report.groups import (
    Group,
    Result,
    any_deep,
    conditioning_row,
    group_results,
    group_rir,
    is_deep,
    moments,
    quality,
    rank_lost,
    ratio,
    values,
)
from jaximm.report.reading import Assessment, Model
from jaximm.report.run_tables import FOOTING_NAMES, SPLIT_NAMES
from jaximm.report.table import Table, to_html

FIGURE_METHODS = 8
"""Figures that take a panel a method show this many methods; the tables show all."""

DOT_METHODS = 40
"""Figures that take a line a method show this many; more would not be read."""

LINES = 8
"""Curves of this many models are drawn, a colour each: undefended ones, then as the leaderboard
ranks them. The tables show all."""

OPEN_CARDS = 2
"""The evidence on the cards is folded where there are more of them."""

FLOOR = "1e-2"
"""Of the floors on steps, the one to this relative excess loss is drawn."""

LIMIT = 1_900_000
"""Bytes above which the page leaves the grids of hyper-parameters to the file."""


class Panel(NamedTuple):
    """One small figure and the line above it."""

    heading: str
    svg: Markup


class Key(NamedTuple):
    """An entry of a legend: a name, the CSS variable of its colour, the mark at its curve's end."""

    name: str
    colour: str
    glyph: str


class PanelRow(NamedTuple):
    """Panels of one kind with a shared legend."""

    heading: str
    panels: Sequence[Panel]
    legend: Sequence[Key]


# ---------------------------------------------------------------- files


def write_page(
    results: Sequence[Result], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Writes the page for `results` to `path`, whole or not at all.

    Args:
      results: validated results (see `jaximm.records.result`), of one method or many, in any order.
      path: the file to write; a page that was there before is replaced at the end.
      title: heading of the page; by default it names the experiments.

    Raises:
      ValueError: if there are no results.
      OSError: if the file cannot be written; an older page is then untouched.
    """
    _write(render(results, title=title), path)


def write_assessment_page(
    assessment: Assessment, path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Writes the page of an assessment (`jaximm.records.assessment`) to `path`; as `write_page`."""
    _write(render_assessment(assessment, title=title), path)


def write_leaderboard_page(assessments: Sequence[Assessment], path: str | os.PathLike[str]) -> None:
    """Writes the models of `assessments`, best first, to `path`; as `write_page`."""
    board = assessment_tables.leaderboard(assessments)
    first, *others = (f"{one['name']}: {assessment_tables.lead(one)}" for one in assessments)
    write_tables_page([board], path, title="Leaderboard", lead=first, sentences=tuple(others))


def write_standings_page(
    entries: Sequence[standings.Entry], path: str | os.PathLike[str], *, suite: str, seeds: int
) -> None:
    """Writes the table of a suite (`jaximm.report.standings`) to `path`; as `write_page`."""
    board = standings.suite_table(entries, seeds=seeds)
    count = f"Defences under {suite}, by case: {len(board.rows)}."
    write_tables_page([board], path, title=f"Leaderboard, {suite}", lead=count)


def write_tables_page(
    tables: Sequence[Table],
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str,
    sentences: Sequence[str] = (),
) -> None:
    """Writes a page of tables to `path`, sentences after the first of them; as `write_page`."""
    text = _fill("tables", title=title, lead=lead, sentences=sentences, tables=tables)
    _write(text, path)


def write_comparison_page(compared: Comparison, path: str | os.PathLike[str]) -> None:
    """Writes two checkpoints (`jaximm.run.compare`) to `path`; as `write_page`."""
    _write(render_comparison(compared), path)


def _write(text: str, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _fill(template: str, **context: Any) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.PackageLoader("jaximm.report"),
    )
    environment.globals |= {"html": to_html, "tones": TONES}  # pyrefly: ignore[bad-assignment]
    return environment.get_template(f"{template}.html.jinja").render(context)


def _figures() -> Any:
    return importlib.import_module("jaximm.report.figures")  # matplotlib takes half a second


def render_comparison(compared: Comparison, *, title: str = "Two checkpoints compared") -> str:
    """The page of two checkpoints as text."""
    first, *others = checkpoints.sentences(compared)
    tables = checkpoints.all_tables(compared)
    return _fill("tables", title=title, lead=first, sentences=others, tables=tables)


# ---------------------------------------------------------------- runs


def render(results: Sequence[Result], *, title: str | None = None) -> str:
    """The page of results as text; the same results give the same text.

    Raises:
      ValueError: if there are no results.
    """
    groups = group_results(results)
    experiments = list(dict.fromkeys(group.experiment for group in groups))
    data = {json.dumps(g.results[0]["data"], sort_keys=True): g.results[0]["data"] for g in groups}
    present = [name for name in FOOTING_NAMES if any(name in r["conditioning"] for r in results)]
    shown, dotted = groups[:FIGURE_METHODS], groups[:DOT_METHODS]
    tables = ("paired", "footings", "by_group", "utility", "flags")
    return _fill(
        "runs",
        title=title or f"Immunisation report: {', '.join(map(formats.name, experiments))}",
        lead=run_tables.lead(groups),
        earlier=run_tables.earlier(results),
        deep=any_deep(groups),
        linear=not all(is_deep(result) for result in results),
        data=list(data.values()),
        summary=run_tables.summary(groups, recoverable=True),
        conditioning=[run_tables.conditioning(groups, footing=name) for name in present],
        ratio_panels=_ratio_panels(dotted),
        removed=[group.label for group in groups if any(map(rank_lost, group.results))],
        group_panels=_group_panels(dotted),
        spectrum_panels=_spectrum_panels(shown),
        utility_panels=_utility_panels(dotted),
        trajectory_panels=_trajectory_panels(shown),
        untrained=[group.label for group in groups if not _trains(group)],
        runs=list(map(_run, groups)),
        hidden=len(groups) - len(shown),
        figure_methods=FIGURE_METHODS,
        undotted=len(groups) - len(dotted),
        dot_methods=DOT_METHODS,
        several=len(groups) > 1,
        seeds=sorted({result["seed"] for result in results}),
        **{name: getattr(run_tables, name)(groups) for name in tables},
    )


def _with_seed(group: Group) -> str:
    return f"{group.label} (seed {group.results[0]['seed']})"


def _ratio_panels(groups: Sequence[Group]) -> list[Panel]:
    plots, panels = _figures(), []
    for split, rows_name in SPLIT_NAMES.items():
        rir, harmful, primary = [], [], []
        for group in groups:
            if not any(conditioning_row(result, split=split) for result in group.results):
                continue
            # Where directions are gone, a damped kappa is that of rounding: no mark.
            kept = tuple(result for result in group.results if not rank_lost(result))
            measured = group._replace(results=kept)
            logs, low, high, of_harmful, of_primary = (
                values(measured, key, split=split)
                for key in ("log_rir", "log_rir_lower", "log_rir_upper", "log_ratio_harmful",
                            "log_ratio_primary")
            )  # fmt: skip
            limit = ratio(measured, "log_rir_limit", split=split)
            ends = (min(low, default=None), max(high, default=None))
            rir.append(plots.Row(group.label, logs, *ends, limit and limit.mean))
            harmful.append(plots.Row(group.label, of_harmful))
            primary.append(plots.Row(group.label, of_primary))
        if rir:
            svg = plots.ratio_dots(
                rir, alt=f"RIR of each method, {rows_name} rows", xlabel="RIR (powers of ten)"
            )
            panels.append(Panel(f"RIR, {rows_name} rows", Markup(svg)))
            svg = plots.task_ratio_dots(
                harmful, primary, alt=f"(i) and (ii) of each method, {rows_name} rows",
                xlabel="κ after / before",
            )  # fmt: skip
            panels.append(Panel(f"(i) and (ii), {rows_name} rows", Markup(svg)))
    return panels


def _group_panels(groups: Sequence[Group]) -> list[Panel]:
    """RIR by group of rows: the mean, and a line of one standard deviation to both sides."""
    plots, panels = _figures(), []
    for split, rows_name in SPLIT_NAMES.items():
        rows = []
        for group in groups:
            if (log_rir := group_rir(group, "log_rir", split=split)) is not None:
                sd = log_rir.sd
                ends = () if sd is None else (log_rir.mean - sd, log_rir.mean + sd)
                rows.append(plots.Row(group.label, (log_rir.mean,), *ends))
        if rows:
            svg = plots.ratio_dots(
                rows,
                alt=f"RIR by group of {rows_name} rows",
                xlabel="RIR (powers of ten)",
                extent=[end for row in rows for end in (row.lower, row.upper) if end is not None],
            )
            panels.append(Panel(f"RIR by group, {rows_name} rows", Markup(svg)))
    return panels


def _spectrum_panels(groups: Sequence[Group]) -> list[Panel]:
    plots, floor = _figures(), 0.1
    for group in groups:
        for sides in group.results[0]["spectra"].values():
            for spectrum in sides.values():
                positive = [value for value in spectrum if value is not None and value > 0]
                # What is below float64 rounding is cut, or it would flatten every other panel.
                shown = [value for value in positive if value >= 1e-14 * max(positive)]
                floor = min(floor, min(shown) / max(shown)) if shown else floor
    return [
        Panel(_with_seed(group), Markup(plots.spectra(
            group.results[0]["spectra"], alt=f"Spectra of {group.label}", floor=floor)))
        for group in groups
    ]  # fmt: skip


def _legend(colours: Mapping[str, int]) -> list[Key]:
    plots = _figures()
    return [
        Key(key, f"--c{i % plots.PALETTE_SIZE}", plots.GLYPHS[i % plots.PALETTE_SIZE])
        for key, i in colours.items()
    ]


def _utility_panels(groups: Sequence[Group]) -> list[Panel]:
    plots, panels = _figures(), []
    for key, task in (("utility", "primary"), ("harmful_utility", "harmful")):
        spans, metrics = [], set()
        for group in groups:
            metrics |= {result[key]["metric"] for result in group.results if result[key]}
            ends = [quality(group, side, key=key) for side in ("before", "after")]
            if any(ends):
                spans.append(plots.Span(group.label, *(end and end.mean for end in ends), task))
        if spans:
            # R² and accuracy share the axis where both are compared.
            word = "accuracy" if metrics == {"accuracy"} else "quality"
            svg = plots.before_after(
                spans, alt=f"{task} {word} on held-out rows", xlabel=f"held-out {word}"
            )
            panels.append(Panel(f"{task.capitalize()} task, held-out rows", Markup(svg)))
    return panels


def _trains(group: Group) -> bool:
    return len(group.results[0]["trajectory"]) > 1


def _trajectory_panels(groups: Sequence[Group]) -> list[Panel]:
    plots = _figures()
    records = [(group, group.results[0]["trajectory"]) for group in groups if _trains(group)]
    keys = ("log_kappa_primary", "log_kappa_harmful")
    logs = [row[key] for _, rows in records for row in rows for key in keys]
    extent = [value for value in logs if value is not None]
    return [
        Panel(_with_seed(group), Markup(plots.trajectory(
            rows, alt=f"Condition numbers while {group.label} trains", extent=extent)))
        for group, rows in records
    ]  # fmt: skip


def _run(group: Group) -> dict[str, Any]:
    """What reproduces the results of a method: commands, and the rest once where seeds agree."""
    first, results = group.results[0], group.results

    def once(text: Callable[[Result], str]) -> str:
        return "; ".join(dict.fromkeys(map(text, results)))

    def seconds(key: str) -> str:
        return formats.mean_sd(moments([result["timing"][key] for result in results]))

    return {
        "label": group.label,
        "seeds": ", ".join(str(result["seed"]) for result in results),
        "commands": [result["command"] for result in results],
        "versions": once(lambda r: ", ".join(f"{k} {v}" for k, v in sorted(r["versions"].items()))),
        "devices": once(lambda r: "{count} × {kind} ({platform})".format(**r["device"])),
        "dtype": once(lambda r: r["dtype"]),
        "init": group.init,
        "backbone": first.get("backbone"),
        "immunise_s": seconds("immunise_s"),
        "total_s": seconds("total_s"),
        "config": json.dumps(first["config"], indent=2, sort_keys=True, ensure_ascii=False),
        "config_seed": first["seed"],
    }


# ---------------------------------------------------------------- an assessment


def render_assessment(assessment: Assessment, *, title: str | None = None) -> str:
    """The page of an assessment as text; the same assessment gives the same text."""
    text = _render_assessment(assessment, title, grids=True)
    if len(text.encode()) > LIMIT:
        text = _render_assessment(assessment, title, grids=False)
    return text


def _render_assessment(assessment: Assessment, title: str | None, *, grids: bool) -> str:
    models, data = assessment["models"], assessment["data"]
    ranked = assessment_tables.ranked(assessment)
    drawn = sorted(ranked, key=lambda model: not reading.is_reference(model))[:LINES]
    tables = (
        "classes",
        "costs",
        "conditions",
        "together",
        "flags",
        "certificates",
        "failed",
        "protocol",
    )
    return _fill(
        "assessment",
        title=title or f"Assessment: {formats.name(assessment['name'])}",
        lead=assessment_tables.lead(assessment),
        assessment=assessment,
        data=data,
        verdicts=[{"label": model["label"], **reading.verdict_of(model)} for model in models],
        folded=len(models) > OPEN_CARDS,
        compared=any(map(reading.is_reference, models)),
        leaderboard=assessment_tables.leaderboard([assessment]),
        harm_panels=_harm_panels(assessment, drawn),
        harm_legend=_legend({model["label"]: i for i, model in enumerate(drawn)}),
        floors=_floor_sentence(assessment),
        hidden=len(models) - len(drawn),
        quality=heat.quality_map(assessment),
        ratios=heat.ratio_map(assessment),
        others=heat.other_tasks(assessment),
        metric=reading.metric_word(data["metric"]),
        utility_metric=reading.metric_word(data["utility_metric"]),
        percent=", in per cent" if data["metric"] == "accuracy" else "",
        chance=reading.score(reading.chance(assessment), data["metric"]),
        choices=assessment_tables.all_choices(assessment, grids=grids),
        fits=assessment_tables.all_steps_to_fit(assessment),
        states=assessment_tables.states(assessment),
        by_step=assessment_tables.by_step(assessment),
        documents=assessment_tables.documents(assessment),
        fit_rows=_curve_rows(assessment, drawn, weights=False),
        quality_rows=_curve_rows(assessment, drawn, weights=True),
        grids=grids,
        ran=len({row["attacker"] for row in assessment["rows"] if row["status"] == "done"}),
        **{name: getattr(assessment_tables, name)(assessment) for name in tables},
    )


def _curve_rows(
    assessment: Assessment, models: Sequence[Model], *, weights: bool
) -> list[PanelRow]:
    """A row a task and sort of attackers, a panel a model: of probes, or of the others."""
    sorts: dict[str, list[str]] = {}
    for one in assessment["attackers"]:
        if (one["family"] == "weights") == weights:
            sorts.setdefault(_sort(one), []).append(one["name"])
    rows = [
        _curve_row(assessment, models, task, heading, names, weights=weights)
        for task in (reading.HARMFUL, reading.PRIMARY)
        for heading, names in sorts.items()
    ]
    return [row for row in rows if row is not None]


def _sort(attacker: Mapping[str, Any]) -> str:
    """The heading under which an attacker's curves are drawn."""
    if attacker["family"] == "weights":
        return "Attackers of the weights"
    follows = "plain_descent" in traits_of(attacker)
    return f"Probes {'that follow gradients' if follows else 'with curvature or closed forms'}"


def _curve_row(
    assessment: Assessment,
    models: Sequence[Model],
    task: str,
    heading: str,
    names: Sequence[str],
    *,
    weights: bool,
) -> PanelRow | None:
    """Curves of some attackers, those of the undefended model dashed; None where none moves.

    Of a probe its excess loss, of others their quality. Those that get furthest have a colour each.
    """
    plots = _figures()
    series, best = {}, {}
    for row in assessment["rows"]:
        curve = row["curve"] if weights else (row.get("fit") or {"curve": None})["curve"]
        if row["task"] == task and row["attacker"] in names and curve is not None:
            series[row["attacker"], row["model"]] = curve
            best[row["attacker"]] = max(best.get(row["attacker"], -1.0), row["best_quality"] or 0.0)
    kept = sorted(best, key=best.__getitem__, reverse=True)[: plots.PALETTE_SIZE]
    colours = {name: place for place, name in enumerate(n for n in names if n in kept)}
    bare = next((m["label"] for m in assessment["models"] if reading.is_reference(m)), None)
    values = "quality" if weights else "relative_excess_loss"

    def curves_of(label: str) -> list[Any]:
        return [
            plots.Curve(curve["step"], curve[values], colour, side == label)
            for name, colour in colours.items()
            for side in dict.fromkeys([bare, label])
            if (curve := series.get((name, side))) is not None
        ]

    drawn = {model["label"]: curves_of(model["label"]) for model in models}
    ends = [plots.last_step(curve) for curves in drawn.values() for curve in curves]
    furthest = max(ends, default=1)
    if furthest <= 1:  # closed forms alone, of which the table says "1"
        return None
    heading = f"{heading}, task {task}"
    draw = plots.quality_curves if weights else plots.attack_curves
    panels = [
        Panel(label, Markup(draw(curves, alt=f"{heading}, {label}", furthest=furthest)))
        for label, curves in drawn.items()
        if curves
    ]
    titles = reading.titles(assessment)
    return PanelRow(heading, panels, _legend({titles[n]: place for n, place in colours.items()}))


def _harm_panels(assessment: Assessment, models: Sequence[Model]) -> list[Panel]:
    plots, keys = _figures(), ("break", "break_unbounded")
    metric, unit = assessment["data"]["metric"], assessment["data"]["utility_metric"]
    percent, level = metric == "accuracy", reading.chance(assessment)
    costs = [v for model in models for key in keys for v in model[key]["envelope"]["flops"]]
    panels = []
    for key in keys:
        thresholds = {model[key]["threshold"] for model in models} - {None}
        lines = [
            plots.Line(
                model[key]["envelope"]["flops"],
                model[key]["envelope"]["harm"],
                colour,
                _floors(assessment, model["label"]),
            )
            for colour, model in enumerate(models)
        ]
        heading = _bound_sentence([model[key]["utility_bound"] for model in models], unit)
        svg = plots.cost_curves(
            lines,
            alt=f"Highest harm against FLOPs spent, a line a model. {heading}",
            ylabel=f"harmful {'accuracy, %' if percent else 'R²'}",
            scale=100.0 if percent else 1.0,
            threshold=thresholds.pop() if len(thresholds) == 1 else None,
            chance=level if level > 0 else None,
            extent=[value for value in costs if value is not None],
        )
        panels.append(Panel(heading, Markup(svg)))
    return panels


def _bound_sentence(bounds: Sequence[float | None], unit: str) -> str:
    known = [bound for bound in bounds if bound is not None]
    if not known:
        return "Whatever is left of the utility"
    low, high = reading.score(min(known), unit), reading.score(max(known), unit)
    if low == high:
        return f"Utility kept at {low} or more"
    return f"Utility kept at each model's bound ({low} to {high})"


def _floors(assessment: Assessment, label: str) -> list[float]:
    return [
        row["flops"]
        for row in assessment["certificates"]
        if row["model"] == label and row["task"] == reading.HARMFUL and row["flops"] is not None
        if row["target"].endswith(FLOOR)
    ]


def _floor_sentence(assessment: Assessment) -> str:
    """What the certificates of the harmful task say, for the caption of the curves."""
    certificates = [row for row in assessment["certificates"] if row["task"] == reading.HARMFUL]
    texts = []
    if drawn := [row for row in certificates if row["flops"] is not None]:
        names = dict.fromkeys(formats.name(row["name"]) for row in drawn if row["flops"])
        texts.append(reading.note("floors", names=", ".join(names)))
    owners: dict[str, dict[str, None]] = {}
    for row in certificates:
        if row["flops"] is None:
            what = f"{formats.name(row['name'])} {reading.plain(row['value'])} {row['unit']}"
            owners.setdefault(what, {})[row["model"]] = None
    if owners:
        every = len(assessment["models"])
        listed = "; ".join(
            f"{what} ({'every model' if len(of) == every > 1 else ', '.join(of)})"
            for what, of in owners.items()
        )
        texts.append(f"Certified without a cost: {listed}.")
    return " ".join(texts)
