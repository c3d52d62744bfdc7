"""Figures of an assessment, in the manner of `jaximm.report.plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaximm.report.plots import (
    _COLOUR,
    CARD,
    FAINT,
    INK,
    MARKS,
    PALETTE_SIZE,
    _canvas,
    _inline,
    _log_axis,
    _styled,
    _thin,
)


class Line(NamedTuple):
    """The highest harm at each cost, and certified floors of the cost. `colour` is an index."""

    flops: Sequence[float | None]
    harm: Sequence[float | None]
    colour: int
    floors: Sequence[float] = ()


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
    points = [_points(line, scale, low) for line in lines]
    heights = [harm for found in points for _, harm in found]
    marks = [scale * value for value in (threshold, chance) if value is not None]
    bottom, top = min([0.0, *heights]), max([*heights, *marks, 0.05 * scale])
    for value, text in ((threshold, "broken"), (chance, "chance")):
        if value is None:
            continue
        style = {"linestyle": (0, (1, 2)), "linewidth": 0.9} if text == "broken" else {
            "linewidth": 0.8}  # fmt: skip
        axes.axhline(scale * value, color=INK if text == "broken" else FAINT, **style)
        axes.annotate(
            text, (1, scale * value), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=11, annotation_clip=False,
        )  # fmt: skip
    for line, found in zip(lines, points, strict=True):
        colour = _COLOUR[f"--c{line.colour % PALETTE_SIZE}"]
        for value in line.floors:
            if value > 0:
                axes.plot(
                    [math.log10(value)] * 2, [bottom, bottom + 0.22 * (top - bottom)],
                    color=colour, linewidth=2.4, solid_capstyle="butt",
                )  # fmt: skip
        if not found:
            continue
        xs, ys = zip(*found, strict=True)
        axes.step([*xs, high], [*ys, ys[-1]], where="post", color=colour)
        place = ys.index(max(ys))  # where it stops rising
        axes.plot(
            xs[place], ys[place], marker=MARKS[line.colour % PALETTE_SIZE], markersize=6,
            color=colour, markerfacecolor=CARD, clip_on=False, zorder=3,
        )  # fmt: skip
    axes.set_ylim(bottom, top + 0.06 * (top - bottom))
    room = 0.03 * (high - low)
    axes.set_xlim(low - room, high + room)
    _log_axis(axes.xaxis, [low, high], fixed=True)
    axes.set_xlabel("FLOPs spent by the attacker")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    return _inline(figure, alt)


def _points(line: Line, scale: float, low: float) -> list[tuple[float, float]]:
    """Decimal logarithm of the cost, and harm; what is free of charge is put at `low`."""
    known = [
        (math.log10(cost) if cost else low, scale * harm)
        for cost, harm in zip(line.flops, line.harm, strict=True)
        if cost is not None and harm is not None
    ]
    return [known[index] for index in _thin(len(known))]
