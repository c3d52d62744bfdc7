"""One self-contained HTML page for one result or many: answer first, then the evidence.

The page loads nothing: styles and figures are inline, colours follow the reader's light or dark
scheme, figures are panels that stand side by side where there is room. Every text that comes from
a result is escaped.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from jaximm.report import formats, tables, verdict
from jaximm.report.compare import (
    FINE_TUNING,
    Group,
    Result,
    any_deep,
    attack_costs,
    conditioning_row,
    conditioning_values,
    family,
    group_results,
    group_rir,
    is_deep,
    moments,
    rank_lost,
    utility_values,
)

FIGURE_METHODS = 8
"""Figures that take a panel a method show this many methods; the tables show all."""


DOT_METHODS = 40
"""Figures that take a line a method show this many; more would not be read."""


class Panel(NamedTuple):
    """One small figure and the line above it."""

    heading: str
    svg: str


class Key(NamedTuple):
    """An entry of a legend: a name, the CSS variable of its colour, the mark at its curve's end."""

    name: str
    colour: str
    glyph: str


class Row(NamedTuple):
    """Panels of one kind with a shared legend."""

    heading: str
    panels: tuple[Panel, ...]
    legend: tuple[Key, ...] = ()


def write_page(
    results: Sequence[Result], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Writes the page for `results` to `path`, whole or not at all.

    Args:
      results: validated results (see `jaximm.result`), of one method or many, in any order.
      path: the file to write; a page that was there before is replaced at the end.
      title: heading of the page; by default it names the experiments.

    Raises:
      ValueError: if there are no results.
      OSError: if the file cannot be written; an older page is then untouched.
    """
    write_text(render(results, title=title), path)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Writes `text` to `path`, whole or not at all.

    Raises:
      OSError: if the file cannot be written; an older one is then untouched.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def render(results: Sequence[Result], *, title: str | None = None) -> str:
    """The page as text; the same results give the same text.

    Raises:
      ValueError: if there are no results.
    """
    groups = group_results(results)
    experiments = list(dict.fromkeys(group.experiment for group in groups))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = importlib.resources.files("jaximm.report").joinpath("page.html.jinja")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    shown = groups[:FIGURE_METHODS]
    return template.render(
        title=title or f"Immunisation report: {', '.join(map(formats.name, experiments))}",
        verdicts=[verdict.decide(group) for group in groups],
        threat_model=verdict.threat_model(groups),
        deep=any_deep(groups),
        linear=not all(is_deep(result) for result in results),
        data=_data(groups),
        summary=tables.summary(groups),
        paired=tables.paired(groups),
        conditioning=[tables.conditioning(groups, footing=name) for name in _footings(groups)],
        footings=tables.footings(groups),
        by_group=tables.by_group(groups),
        ratio_panels=_ratio_panels(groups[:DOT_METHODS]),
        removed=[group.label for group in groups if any(map(rank_lost, group.results))],
        group_panels=_group_panels(groups[:DOT_METHODS]),
        spectrum_panels=_spectrum_panels(shown),
        attacked=any(result["attacks"] for result in results),
        unattacked=[
            group.label for group in groups if not all(r["attacks"] for r in group.results)
        ],
        curve_rows=_curve_rows(shown),
        accuracy_rows=_accuracy_rows(shown),
        cost_panels=_cost_panels(shown, fine_tuning=False),
        fine_tuning_panels=_cost_panels(shown, fine_tuning=True),
        costs=[table for group in groups if (table := tables.costs(group)).rows],
        fine_tuning=[table for group in groups if (table := tables.fine_tuning(group)).rows],
        utility=tables.utility(groups),
        utility_panels=_utility_panels(groups[:DOT_METHODS]),
        trajectory_panels=_trajectory_panels(shown),
        untrained=[group.label for group in groups if not _has_trajectory(group)],
        flags=tables.flags(groups),
        certificates=tables.certificates(groups),
        runs=_runs(groups),
        hidden=len(groups) - len(shown),
        figure_methods=FIGURE_METHODS,
        undotted=max(0, len(groups) - DOT_METHODS),
        dot_methods=DOT_METHODS,
        several=len(groups) > 1,
        seeds=sorted({result["seed"] for result in results}),
    )


def _plots():
    from jaximm.report import plots  # matplotlib takes half a second to import

    return plots


def _figure(svg: str) -> Any:
    """Marks a figure as HTML: `plots` has escaped its texts."""
    import markupsafe

    return markupsafe.Markup(svg)


def _data(groups: Sequence[Group]) -> list[dict[str, Any]]:
    unique: dict[str, dict[str, Any]] = {}
    for group in groups:
        data = group.results[0]["data"]
        unique.setdefault(json.dumps(data, sort_keys=True), data)
    return list(unique.values())


def _footings(groups: Sequence[Group]) -> list[str]:
    present = {
        footing
        for group in groups
        for result in group.results
        for footing in result["conditioning"]
    }
    return [footing for footing in tables.FOOTING_NAMES if footing in present]


def _known(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)


def _ratio_panels(groups: Sequence[Group]) -> list[Panel]:
    plots = _plots()
    panels = []
    for split, rows_name in tables.SPLIT_NAMES.items():
        chosen = [
            group for group in groups
            if any(conditioning_row(result, split=split) for result in group.results)
        ]  # fmt: skip
        if not chosen:
            continue
        rir, harmful, primary = [], [], []
        for group in chosen:
            # Where directions are gone, a damped kappa is that of rounding: no mark.
            measured = group._replace(
                results=tuple(result for result in group.results if not rank_lost(result))
            )
            columns = {
                key: _known(conditioning_values(measured, key, split=split))
                for key in ("log_rir", "log_rir_lower", "log_rir_upper", "log_rir_limit",
                            "log_ratio_harmful", "log_ratio_primary")
            }  # fmt: skip
            limit = moments(columns["log_rir_limit"])
            rir.append(
                plots.Row(
                    group.label,
                    columns["log_rir"],
                    min(columns["log_rir_lower"], default=None),
                    max(columns["log_rir_upper"], default=None),
                    limit.mean if limit else None,
                )
            )
            harmful.append(plots.Row(group.label, columns["log_ratio_harmful"]))
            primary.append(plots.Row(group.label, columns["log_ratio_primary"]))
        svg = plots.ratio_dots(
            rir, alt=f"RIR of each method, {rows_name} rows", xlabel="RIR (powers of ten)"
        )
        panels.append(Panel(f"RIR, {rows_name} rows", _figure(svg)))
        svg = plots.task_ratio_dots(
            harmful, primary, alt=f"(i) and (ii) of each method, {rows_name} rows",
            xlabel="κ after / before",
        )  # fmt: skip
        panels.append(Panel(f"(i) and (ii), {rows_name} rows", _figure(svg)))
    return panels


def _group_panels(groups: Sequence[Group]) -> list[Panel]:
    """RIR by group of rows: the mean, and a line of one standard deviation to both sides."""
    plots = _plots()
    panels = []
    for split, rows_name in tables.SPLIT_NAMES.items():
        spreads = [(group.label, group_rir(group, "log_rir", split=split)) for group in groups]
        rows = [
            plots.Row(
                label,
                (spread.mean,),
                *(() if spread.sd is None else (spread.mean - spread.sd, spread.mean + spread.sd)),
            )
            for label, spread in spreads
            if spread is not None
        ]
        if rows:
            svg = plots.ratio_dots(
                rows,
                alt=f"RIR by group of {rows_name} rows",
                xlabel="RIR (powers of ten)",
                extent=_known([end for row in rows for end in (row.lower, row.upper)]),
            )
            panels.append(Panel(f"RIR by group, {rows_name} rows", _figure(svg)))
    return panels


def _spectrum_panels(groups: Sequence[Group]) -> list[Panel]:
    plots = _plots()
    records = [group.results[0]["spectra"] for group in groups]
    floor = 0.1
    for record in records:
        for sides in record.values():
            for values in sides.values():
                positive = [value for value in values if value is not None and value > 0]
                # What is below float64 rounding is cut, or it would flatten every other panel.
                shown = [value for value in positive if value >= 1e-14 * max(positive)]
                floor = min(floor, min(shown) / max(shown)) if shown else floor
    return [
        Panel(
            _with_seed(group),
            _figure(plots.spectra(record, alt=f"Spectra of {group.label}", floor=floor)),
        )
        for group, record in zip(groups, records, strict=True)
    ]


def _with_seed(group: Group) -> str:
    return f"{group.label} (seed {group.results[0]['seed']})"


def _curve_rows(groups: Sequence[Group]) -> list[Row]:
    rows = []
    families = (
        ("Gradient-following attackers", "first-order"),
        ("Attackers with curvature or closed forms", "informed"),
    )
    for task in ("harmful", "primary"):
        for heading, members in families:
            row = _curve_row(groups, f"{heading}, {task} task", task, members)
            if row.panels:
                rows.append(row)
    return rows


def _curve_row(groups: Sequence[Group], heading: str, task: str, members: str) -> Row:
    """One panel a method: the first run's attacks of one family, first attack seed."""
    plots = _plots()
    drawn, colours = _drawn(groups, task, members, "relative_excess_loss")
    furthest = max((plots.last_step(curve) for _, curves in drawn for curve in curves), default=1)
    if furthest <= 1:  # closed forms alone: the table of costs says "1 step", a panel shows no more
        return Row(heading, ())
    panels = [
        Panel(
            _with_seed(group),
            _figure(
                plots.attack_curves(curves, alt=f"{heading}, {group.label}", furthest=furthest)
            ),
        )
        for group, curves in drawn
    ]
    return Row(heading, tuple(panels), _legend(colours))


def _accuracy_rows(groups: Sequence[Group]) -> list[Row]:
    """Learning curves of fine-tuning attackers, a row a task."""
    plots = _plots()
    rows = []
    for task in ("harmful", "primary"):
        drawn, colours = _drawn(groups, task, FINE_TUNING, "held_out_accuracy")
        if not drawn:
            continue
        heading = f"Fine-tuning, {task} task"
        curves = [curve for _, drawn_curves in drawn for curve in drawn_curves]
        top = max((v for curve in curves for v in curve.values if v is not None), default=1.0)
        furthest = max(max(curve.steps, default=1) for curve in curves)
        panels = tuple(
            Panel(
                _with_seed(group),
                _figure(
                    plots.accuracy_curves(
                        found,
                        alt=f"{heading}, {group.label}",
                        furthest=furthest,
                        top=top,
                        targets=_targets(group, task, colours),
                    )
                ),
            )
            for group, found in drawn
        )
        rows.append(Row(heading, panels, _legend(colours)))
    return rows


def _targets(group: Group, task: str, colours: dict[str, int]) -> dict[int, float]:
    """Accuracy targets of fine-tuning attackers by colour."""
    return {
        colours[attack["attacker"]]: attack["accuracy_target"]
        for attack in group.results[0]["attacks"]
        if attack["task"] == task and attack.get("accuracy_target") is not None
    }


def _drawn(
    groups: Sequence[Group], task: str, members: str, values: str
) -> tuple[list[tuple[Group, list[Any]]], dict[str, int]]:
    """Curves of one family of attackers by method, and the colour of each attacker."""
    plots = _plots()
    colours: dict[str, int] = {}
    drawn: list[tuple[Group, list[Any]]] = []
    for group in groups:
        attacks = [
            attack
            for attack in group.results[0]["attacks"]
            if attack["task"] == task
            and family(attack["kind"]) == members
            and attack["curve"].get(values)
        ]
        first_seed = min((attack["seed"] for attack in attacks), default=0)
        curves = [
            plots.Curve(
                attack["curve"]["step"],
                attack["curve"][values],
                colours.setdefault(attack["attacker"], len(colours)),
                attack["backbone"] == "after",
            )
            for attack in attacks
            if attack["seed"] == first_seed
        ]
        if curves:
            drawn.append((group, curves))
    return drawn, colours


def _legend(colours: dict[str, int]) -> tuple[Key, ...]:
    plots = _plots()
    return tuple(
        Key(
            formats.name(attacker),
            f"--c{index % plots.PALETTE_SIZE}",
            plots.GLYPHS[index % plots.PALETTE_SIZE],
        )
        for attacker, index in colours.items()
    )


def _cost_panels(groups: Sequence[Group], *, fine_tuning: bool) -> list[Panel]:
    plots = _plots()
    target = "the undefended accuracy" if fine_tuning else "1 % excess loss"
    spans = {
        group.label: [
            plots.Span(formats.name(cost.attacker, short=True), cost.flops_before, cost.flops_after)
            for cost in attack_costs(group, task="harmful")
            if cost.fine_tuning == fine_tuning
        ]
        for group in groups
    }
    extent = [value for row in spans.values() for span in row for value in span[1:3]]
    return [
        Panel(
            label,
            _figure(
                plots.before_after(
                    row,
                    alt=f"{'Fine-tuning cost' if fine_tuning else 'Cost'} to break of {label}",
                    xlabel=f"FLOPs to {target}",
                    log=True,
                    extent=extent,
                )
            ),
        )
        for label, row in spans.items()
        if row
    ]


def _utility_panels(groups: Sequence[Group]) -> list[Panel]:
    plots = _plots()
    panels = []
    for key, task in (("utility", "primary"), ("harmful_utility", "harmful")):
        spans, metrics = [], set()
        for group in groups:
            metrics |= {result[key]["metric"] for result in group.results if result[key]}
            ends = [
                moments(utility_values(group, key=key, side=side, split="held_out"))
                for side in ("before", "after")
            ]
            before, after = (end.mean if end else math.nan for end in ends)
            if not (math.isnan(before) and math.isnan(after)):
                spans.append(plots.Span(group.label, before, after, task))
        if spans:
            # R² and accuracy share the axis where both are compared.
            quality = "accuracy" if metrics == {"accuracy"} else "quality"
            svg = plots.before_after(
                spans,
                alt=f"{task} {quality} on held-out rows",
                xlabel=f"held-out {quality}",
                log=False,
            )
            panels.append(Panel(f"{task.capitalize()} task, held-out rows", _figure(svg)))
    return panels


def _has_trajectory(group: Group) -> bool:
    return len(group.results[0]["trajectory"]) > 1


def _trajectory_panels(groups: Sequence[Group]) -> list[Panel]:
    plots = _plots()
    records = [
        (group, group.results[0]["trajectory"]) for group in groups if _has_trajectory(group)
    ]
    extent = [
        row[key]
        for _, rows in records
        for row in rows
        for key in ("log_kappa_primary", "log_kappa_harmful")
        if row[key] is not None
    ]
    return [
        Panel(
            _with_seed(group),
            _figure(
                plots.trajectory(
                    rows, alt=f"Condition numbers while {group.label} trains", extent=extent
                )
            ),
        )
        for group, rows in records
    ]


def _runs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What reproduces each result: commands, and the rest once where all seeds agree."""
    runs = []
    for group in groups:
        first = group.results[0]
        devices = [
            f"{device['count']} × {device['kind']} ({device['platform']})"
            for device in (result["device"] for result in group.results)
        ]
        versions = [
            ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
            for result in group.results
        ]
        seconds = moments([result["timing"]["total_s"] for result in group.results])
        immunise = moments([result["timing"]["immunise_s"] for result in group.results])
        runs.append(
            {
                "label": group.label,
                "seeds": ", ".join(str(result["seed"]) for result in group.results),
                "commands": [result["command"] for result in group.results],
                "versions": list(dict.fromkeys(versions)),
                "devices": list(dict.fromkeys(devices)),
                "dtype": ", ".join(dict.fromkeys(result["dtype"] for result in group.results)),
                "init": group.init,
                "backbone": first.get("backbone"),
                "immunise_s": formats.mean_sd(immunise),
                "total_s": formats.mean_sd(seconds),
                "config": json.dumps(first["config"], indent=2, sort_keys=True, ensure_ascii=False),
                "config_seed": first["seed"],
            }
        )
    return runs
