"""Figures as inline SVG, small enough to stand side by side on a desk and below one another on a
phone.

Every function returns one ``<svg>`` element as text. Colours are CSS variables of the page
(``--primary``, ``--harmful``, ``--ink``, ``--faint``, ``--c0`` ... ``--c7``), so one figure serves
the light and the dark scheme; text is text. Axes of condition numbers and ratios are in powers of
ten, made from the natural logarithms in the results. Dashed lines and hollow marks are before
immunisation, solid ones after.
"""

from __future__ import annotations

import functools
import html
import importlib.resources
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from jaximm.report import formats

WIDTH = 4.6  # inches at 72 to the inch: 331 px of content, so a phone shows it at full size
MAX_POINTS = 160
PALETTE_SIZE = 8
MARKS = "os^DvPX*"
GLYPHS = "●■▲◆▼✚✖★"
"""The mark at the end of a curve, as matplotlib and as a legend in text write it."""


# Stand-ins that no figure uses otherwise; `_inline` puts the page's variables in their place.
_TOKENS = {
    "#010101": "--ink",
    "#020202": "--faint",
    "#030303": "--primary",
    "#040404": "--harmful",
    "#050505": "--card",
} | {f"#0{index:x}0b0b": f"--c{index}" for index in range(PALETTE_SIZE)}
_COLOUR = {variable: token for token, variable in _TOKENS.items()}
INK, FAINT, CARD = _COLOUR["--ink"], _COLOUR["--faint"], _COLOUR["--card"]
TASK = {"primary": _COLOUR["--primary"], "harmful": _COLOUR["--harmful"]}

P = ParamSpec("P")


@functools.cache
def _style() -> Any:
    file = importlib.resources.files("jaximm.report").joinpath("templates", "figures.mplstyle")
    with importlib.resources.as_file(file) as path:
        return matplotlib.rc_params_from_file(path, use_default_template=False)


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draws in the style above; matplotlib reads it whenever a text or a grid line is made."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(_style()):
            return draw(*args, **kwargs)

    return styled


class Row(NamedTuple):
    """One line of a dot plot: a label, a mark a seed, an optional interval and limit (logs)."""

    label: str
    values: tuple[float, ...]
    lower: float | None = None
    upper: float | None = None
    limit: float | None = None


class Curve(NamedTuple):
    """One line of an attack plot; the colour is an index into the palette."""

    steps: Sequence[float]
    values: Sequence[float | None]
    colour: int
    after: bool


class Line(NamedTuple):
    """The highest harm at each cost, and certified floors of the cost. `colour` is an index."""

    flops: Sequence[float | None]
    harm: Sequence[float | None]
    colour: int
    floors: Sequence[float] = ()


class Span(NamedTuple):
    """One line of a before / after plot; None is not drawn."""

    label: str
    before: float | None
    after: float | None
    task: str = "harmful"


@_styled
def ratio_dots(rows: Sequence[Row], *, alt: str, xlabel: str, extent: Sequence[float] = ()) -> str:
    """Dots a seed, a diamond at the mean, a line for the interval, the limit as a dashed line.

    `extent` are further logarithms that the axis takes in: intervals wider than the dots.
    """
    figure, axes = _row_canvas([row.label for row in rows], each=0.44)
    limits = [row.limit for row in rows if row.limit is not None]
    shared = bool(limits) and max(limits) - min(limits) < 0.02 * max(1.0, abs(max(limits)))
    if shared:
        limit = _tens(sum(limits) / len(limits))
        axes.axvline(limit, color=INK, linestyle=(0, (4, 2)), linewidth=1)
        _say(axes, "limit", (limit, 1.0), (0, 3), xycoords=("data", "axes fraction"), ha="center")
    for index, row in enumerate(rows):
        if row.limit is not None and not shared:
            axes.plot([_tens(row.limit)] * 2, [index - 0.3, index + 0.3], color=INK, linewidth=1.5)
        if row.lower is not None and row.upper is not None:
            axes.plot(
                [_tens(row.lower), _tens(row.upper)], [index] * 2, color=INK, linewidth=3,
                alpha=0.45, solid_capstyle="butt",
            )  # fmt: skip
        _dots(axes, row.values, index, INK)
    axes.axvline(0, color=FAINT, linewidth=1)
    values = [value for row in rows for value in row.values] + limits + [0.0, *extent]
    _log_axis(axes.xaxis, [_tens(value) for value in values])
    return _finish(figure, axes, alt, xlabel)


@_styled
def task_ratio_dots(
    harmful: Sequence[Row], primary: Sequence[Row], *, alt: str, xlabel: str
) -> str:
    """(i) and (ii) of each method on one line a method, harmful above primary."""
    figure, axes = _row_canvas([row.label for row in harmful], each=0.44)
    axes.axvline(0, color=FAINT, linewidth=1)
    for index, (first, second) in enumerate(zip(harmful, primary, strict=True)):
        _dots(axes, first.values, index - 0.14, TASK["harmful"])
        _dots(axes, second.values, index + 0.14, TASK["primary"], marker="s")
    values = [value for row in (*harmful, *primary) for value in row.values] + [0.0]
    _log_axis(axes.xaxis, [_tens(value) for value in values])
    return _finish(figure, axes, alt, xlabel)


@_styled
def spectra(
    records: Mapping[str, Mapping[str, Sequence[float | None]]], *, alt: str, floor: float
) -> str:
    """Eigenvalues of both tasks over the largest, before dashed and after solid.

    `floor` is the smallest ratio on the axis, shared by the panels of a page.
    """
    figure, axes = _canvas(height=2.7)
    for task in ("primary", "harmful"):
        for side in ("before", "after"):
            positive = [value for value in records[task][side] if value is not None and value > 0]
            points = _thin(list(enumerate(sorted(positive, reverse=True), start=1)))
            if not points:
                continue
            position, values = zip(*points, strict=True)
            tens = [math.log10(value / max(positive)) for value in values]
            axes.plot(position, tens, color=TASK[task], **_side_style(side == "after"))
    _log_axis(axes.yaxis, [math.log10(floor), 0.0])
    axes.margins(x=0.02)
    return _finish(figure, axes, alt, "eigenvalue number, largest first", "eigenvalue / largest")


@_styled
def attack_curves(
    curves: Sequence[Curve], *, alt: str, furthest: float, floor: float = 1e-6
) -> str:
    """Relative excess loss against steps, both logarithmic; values below `floor` are cut.

    `furthest` is the last step on the axis, shared by the panels of a row.
    """
    figure, axes = _canvas(height=2.7, right=0.5)
    top, low = 0.0, math.log10(floor)
    for curve in curves:
        points = [
            (math.log10(step), math.log10(min(max(value, floor), 1e3)))
            for step, value in _known(curve)
        ]
        points = points[: next((i + 1 for i, (_, y) in enumerate(points) if y <= low), None)]
        points = _thin(points, log=True)
        top = max([top, *(y for _, y in points)])
        _draw_curve(axes, curve, points)
    axes.axhline(-2, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    _beside(axes, "1 %", -2)
    axes.set_ylim(low - 0.15, top + 0.25)
    _log_axis(axes.yaxis, [low, top], fixed=True)
    _steps_axis(axes, furthest)
    return _finish(figure, axes, alt, "steps", "relative excess loss")


@_styled
def quality_curves(curves: Sequence[Curve], *, alt: str, furthest: float) -> str:
    """Held-out quality, at most 1, against steps, steps logarithmic; below 0 it is cut.

    `furthest` is the last step on the axis, shared by the panels of a row.
    """
    figure, axes = _canvas(height=2.7, right=0.3)
    for curve in curves:
        points = [(math.log10(step), max(value, 0.0)) for step, value in _known(curve)]
        _draw_curve(axes, curve, _thin(points))
    axes.set_ylim(0.0, 1.04)
    _steps_axis(axes, furthest)
    return _finish(figure, axes, alt, "steps", "held-out quality")


def _known(curve: Curve) -> list[tuple[float, float]]:
    """Points that have a place on a logarithmic axis of steps."""
    points = zip(curve.steps, curve.values, strict=True)
    return [(step, value) for step, value in points if value is not None and step >= 1]


def _draw_curve(axes: Axes, curve: Curve, points: Sequence[tuple[float, float]]) -> None:
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=_palette(curve.colour), **_side_style(curve.after))
    _end_mark(axes, xs[-1], ys[-1], curve.colour, filled=curve.after)


def _end_mark(axes: Axes, x: float, y: float, index: int, *, filled: bool) -> None:
    axes.plot(
        x, y, marker=MARKS[index % PALETTE_SIZE], markersize=5, color=_palette(index),
        markerfacecolor=_palette(index) if filled else CARD, clip_on=False, zorder=3,
    )  # fmt: skip


def _beside(axes: Axes, text: str, height: float) -> None:
    """What a horizontal line is, at its right end."""
    _say(axes, text, (1, height), (3, 0), xycoords=("axes fraction", "data"), va="center")


def _say(axes: Axes, text: str, at: Any, offset: Any, **style: Any) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=11,
                  annotation_clip=False, **style)  # fmt: skip


def _steps_axis(axes: Axes, furthest: float) -> None:
    last = max(1.0, math.log10(max(furthest, 1)))
    axes.set_xlim(-0.03, last * 1.03)
    _log_axis(axes.xaxis, [0.0, last], fixed=True)


def last_step(curve: Curve, *, floor: float = 1e-6) -> float:
    """The last step that `attack_curves` draws of `curve`."""
    below = (step for step, value in _known(curve) if value <= floor)
    return next(below, max(curve.steps, default=1))


@_styled
def before_after(spans: Sequence[Span], *, alt: str, xlabel: str) -> str:
    """A hollow mark before, a filled one after."""
    figure, axes = _row_canvas([span.label for span in spans], each=0.38)
    values = [value for span in spans for value in span[1:3] if value is not None] or [0.0, 1.0]
    low, high = min(values), max(values)
    room = 0.08 * max(high - low, 0.05)
    for index, span in enumerate(spans):
        colour = TASK[span.task]
        if span.before is not None and span.after is not None:
            ends = [span.before, span.after]
            axes.plot(ends, [index] * 2, color=colour, linewidth=1.2, alpha=0.6)
        for value, filled in ((span.before, False), (span.after, True)):
            if value is not None:
                axes.plot(
                    value, index, marker="o", markersize=6.5, color=colour,
                    markerfacecolor=colour if filled else CARD, linestyle="none",
                )  # fmt: skip
    axes.set_xlim(low - room, high + room)
    return _finish(figure, axes, alt, xlabel)


@_styled
def cost_curves(
    lines: Sequence[Line],
    *,
    alt: str,
    ylabel: str,
    scale: float = 1.0,
    threshold: float | None = None,
    chance: float | None = None,
    extent: Sequence[float] = (),
) -> str:
    """Harm of the worst case over attackers against FLOPs, one stepped line a model.

    Args:
      lines: costs in rising order; a mark where a line stops rising, then level to the edge.
      alt: what a reader who does not see the figure is told.
      ylabel, scale: of the harm axis; harm is multiplied by `scale`.
      threshold: harm that counts as broken, a dotted line.
      chance: harm of guessing, a faint line.
      extent: further costs that the axis takes in, so that panels share it.
    """
    figure, axes = _canvas(height=3.2, right=0.72)
    costs = [value for line in lines for value in (*line.flops, *line.floors)]
    tens = [math.log10(value) for value in (*costs, *extent) if value]
    low, high = min(tens, default=0.0), max(tens, default=1.0)
    high = max(high, low + 1.0)
    points = [_cost_points(line, scale, low) for line in lines]
    heights = [harm for curve in points for _, harm in curve]
    marks = [scale * value for value in (threshold, chance) if value is not None]
    bottom, top = min([0.0, *heights]), max([*heights, *marks, 0.05 * scale])
    if threshold is not None:
        axes.axhline(scale * threshold, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        _beside(axes, "broken", scale * threshold)
    if chance is not None:
        axes.axhline(scale * chance, color=FAINT, linewidth=0.8)
        _beside(axes, "chance", scale * chance)
    for line, curve in zip(lines, points, strict=True):
        colour = _palette(line.colour)
        for value in line.floors:
            if value > 0:
                axes.plot(
                    [math.log10(value)] * 2, [bottom, bottom + 0.22 * (top - bottom)],
                    color=colour, linewidth=2.4, solid_capstyle="butt",
                )  # fmt: skip
        if not curve:
            continue
        xs, ys = zip(*curve, strict=True)
        axes.step([*xs, high], [*ys, ys[-1]], where="post", color=colour)
        place = ys.index(max(ys))  # where it stops rising
        _end_mark(axes, xs[place], ys[place], line.colour, filled=False)
    axes.set_ylim(bottom, top + 0.06 * (top - bottom))
    room = 0.03 * (high - low)
    axes.set_xlim(low - room, high + room)
    _log_axis(axes.xaxis, [low, high], fixed=True)
    return _finish(figure, axes, alt, "FLOPs spent by the attacker", ylabel)


def _cost_points(line: Line, scale: float, low: float) -> list[tuple[float, float]]:
    """Decimal logarithm of the cost, and harm; what is free of charge is put at `low`."""
    known = [
        (math.log10(cost) if cost else low, scale * harm)
        for cost, harm in zip(line.flops, line.harm, strict=True)
        if cost is not None and harm is not None
    ]
    return _thin(known)


@_styled
def trajectory(rows: Sequence[Mapping[str, Any]], *, alt: str, extent: Sequence[float] = ()) -> str:
    """Both log kappas against training steps, labelled at their ends.

    `extent` are further log kappas that the axis takes in, so that panels share it.
    """
    figure, axes = _canvas(height=2.5, right=0.85)
    ends = []
    for task in ("primary", "harmful"):
        logs = [(row["step"], row[f"log_kappa_{task}"]) for row in rows]
        points = _thin([(step, _tens(value)) for step, value in logs if value is not None])
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=TASK[task])
        ends.append((task, steps[-1], values))
    values = [value for _, _, series in ends for value in series] or [0.0, 1.0]
    _log_axis(axes.yaxis, [*values, *map(_tens, extent)])
    low, high = axes.get_ylim()
    heights = {task: series[-1] for task, _, series in ends}
    if len(heights) == 2 and abs(heights["primary"] - heights["harmful"]) < 0.09 * (high - low):
        middle = sum(heights.values()) / 2
        up = "harmful" if heights["harmful"] >= heights["primary"] else "primary"
        heights = {
            task: middle + (0.05 if task == up else -0.05) * (high - low) for task in heights
        }
    for task, step, _ in ends:
        _say(axes, task, (step, heights[task]), (5, 0), va="center", color=TASK[task])
    axes.margins(x=0.01)
    return _finish(figure, axes, alt, "training step", "condition number")


def _canvas(*, height: float, left: float = 0.8, right: float = 0.3) -> tuple[Figure, Axes]:
    """A figure with margins in inches: fixed, so that panels side by side line up."""
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasSVG(figure)
    bottom, top = 0.6, 0.28
    size = (1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    return figure, figure.add_axes((left / WIDTH, bottom / height, *size))


def _row_canvas(labels: Sequence[str], *, each: float) -> tuple[Figure, Axes]:
    """A line a label, `each` inches apart; 6.6 points a character are room for the labels."""
    labels = [_shortened(label) for label in labels]
    width = 0.22 + 6.6 / 72 * max(map(len, labels))
    figure, axes = _canvas(height=1.05 + each * len(labels), left=width)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return figure, axes


def _shortened(label: str, limit: int = 22) -> str:
    """Cut in the middle: what tells two variants of a method apart is often at the end."""
    if len(label) <= limit:
        return label
    return f"{label[: limit // 2 - 1]}…{label[-(limit // 2) :]}"


def _dots(axes: Axes, values: Sequence[float], at: float, colour: str, marker: str = "D") -> None:
    if not values:
        return
    tens = [_tens(value) for value in values]
    if len(values) > 1:
        axes.plot(
            tens, [at] * len(tens), linestyle="none", marker="o", markersize=3.5, color=colour,
            alpha=0.45, markeredgewidth=0,
        )  # fmt: skip
    axes.plot(
        sum(tens) / len(tens), at, marker=marker, markersize=5.5, color=colour, linestyle="none"
    )


def _side_style(after: bool) -> dict[str, Any]:
    return {"linestyle": "-" if after else (0, (3, 2))}


def _palette(index: int) -> str:
    return _COLOUR[f"--c{index % PALETTE_SIZE}"]


def _tens(log_value: float) -> float:
    return log_value / math.log(10)


def _thin(points: Sequence[Any], *, log: bool = False) -> list[Any]:
    """At most `MAX_POINTS` of `points`, first and last among them.

    Evenly spaced, or on a logarithmic axis denser at the start.
    """
    count = len(points)
    if count <= MAX_POINTS:
        return list(points)
    spaced = np.geomspace(1, count, MAX_POINTS) if log else np.linspace(1, count, MAX_POINTS)
    return [points[place] for place in np.unique(spaced.round().astype(int) - 1)]


def _log_axis(axis: Any, tens: Sequence[float], *, fixed: bool = False) -> None:
    """Labels an axis of base-ten logarithms as powers of ten, at most six of them."""
    low, high = min(tens), max(tens)
    if not fixed:
        room = max(0.06 * (high - low), 0.12)
        low, high = low - room, high + room
        axis.axes.set_xlim(low, high) if axis.axis_name == "x" else axis.axes.set_ylim(low, high)
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first < 1:  # less than a decade: label factors between
        ticks = [t for t in (math.log10(m) + e for e in range(first - 1, last + 2)
                 for m in (1, 1.5, 2, 3, 5, 7)) if low <= t <= high]  # fmt: skip
        axis.set_ticks(ticks, labels=[f"{10**tick:.3g}" for tick in ticks])
        return
    stride = max(1, math.ceil((last - first) / 5))
    ticks = list(range(math.ceil(first / stride) * stride, last + 1, stride))
    axis.set_ticks(ticks, labels=[formats.power_of_ten(tick) if tick else "1" for tick in ticks])


def _finish(figure: Figure, axes: Axes, alt: str, xlabel: str, ylabel: str = "") -> str:
    axes.set_xlabel(xlabel)
    if ylabel:
        axes.set_ylabel(ylabel)
        axes.grid(axis="y")
    return _inline(figure, alt)


def _inline(figure: Figure, alt: str) -> str:
    """The figure as an ``<svg>`` element that stands on its own inside a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text))

    def page_tag(match: re.Match[str]) -> str:
        # Inside HTML an svg needs no namespaces, its links no xlink; of the ids, only those used.
        tag = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", match[0]).replace("xlink:href", "href")
        tag = re.sub(r'\sid="([^"]*)"', lambda name: name[0] if name[1] in used else "", tag)
        for token, variable in _TOKENS.items():
            tag = tag.replace(token, f"var({variable})")
        tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
        return re.sub(r"(\d+\.\d{2})\d+", r"\1", tag)  # hundredths of a point are enough

    # Tags only: what stands between them is the reader's text.
    text = re.sub(r"<[^>]+>", page_tag, text)
    text = re.sub(r">\s+<", "><", text)
    head = f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"'
    return text.replace("<svg", head, 1).strip()
