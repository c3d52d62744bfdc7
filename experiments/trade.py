"""The trade of the closed form: primary quality against held-out log RIR over damping and t."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from experiments.tables import markdown_table


def trade_table(chosen: Any, cells: Sequence[Any]) -> str:
    """Held-out log RIR / primary quality by damping (rows) and t (columns), without shrinkage.

    Args:
      chosen: the config that `jaximm.immunisers.conditioning.limit.choose_limit` returned.
      cells: its grid, `LimitChoice`.
    """
    ts = sorted({cell.config.t for cell in cells})
    dampings = sorted({cell.config.damping for cell in cells})
    at = {(c.config.damping, c.config.t): c for c in cells if c.config.shrinkage == 0}
    rows = [
        [f"{damping:g}"]
        + [f"{at[damping, t].log_rir:z.2f} / {at[damping, t].quality:.3f}" for t in ts]
        for damping in dampings
    ]
    table = markdown_table(["damping", *(f"t = {t:g}" for t in ts)], rows)
    return (
        f"{table}\n\nChosen: t = {chosen.t:g}, damping = {chosen.damping:g}, "
        f"shrinkage = {chosen.shrinkage:g}."
    )


def draw_trade(
    chosen: Any,
    cells: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    quality_before: float,
    title: str,
) -> None:
    """One line a damping, t along it; the chosen cell ringed; the quality bound dashed.

    Args:
      chosen: as `trade_table`.
      cells: as `trade_table`.
      path: an ``.svg`` or ``.png`` file.
      quality_before: of raw features; 0.02 below it is the bound.
      title: of the figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    plain = [cell for cell in cells if cell.config.shrinkage == 0]
    dampings = sorted({cell.config.damping for cell in plain})
    colours = matplotlib.colormaps["viridis"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, damping in enumerate(dampings):
        line = sorted((c for c in plain if c.config.damping == damping), key=lambda c: c.config.t)
        axes.plot(
            [cell.log_rir for cell in line],
            [cell.quality for cell in line],
            "-",
            marker="o",
            markersize=4,
            color=colours(number / max(len(dampings) - 1, 1) * 0.9),
            label=f"damping {damping:g}",
        )
    for cell in plain:  # the two ends of the frontier have shapes of their own
        if cell.config.t in (0.0, 1.0):
            shape = "s" if cell.config.t == 0 else "^"
            axes.plot(cell.log_rir, cell.quality, shape, color="black", markersize=4, zorder=3)
    axes.axhline(quality_before - 0.02, linestyle="--", color="grey", linewidth=1)
    best = next(cell for cell in cells if cell.config == chosen)
    axes.plot(best.log_rir, best.quality, "o", markersize=13, mfc="none", mec="crimson", mew=2)
    axes.set_xlabel("log RIR on held-out rows (nats, damped footing)")
    axes.set_ylabel("primary quality, held-out rows")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylim(bottom=max(-1.0, min(c.quality for c in plain) - 0.05))
    axes.plot([], [], "ks", markersize=4, label="t = 0")
    axes.plot([], [], "k^", markersize=4, label="t = 1")
    axes.plot([], [], "o", mfc="none", mec="crimson", mew=2, markersize=9, label="chosen")
    axes.plot([], [], "--", color="grey", label="raw quality - 0.02")
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path)
