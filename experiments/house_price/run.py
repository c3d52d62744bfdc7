"""Runs the house-price experiment and prints its tables as Markdown.

python experiments/house_price/run.py [--out DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import jax

jax.config.update("jax_enable_x64", True)

from config import CONFIG, RANDOM

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments import tables, trade
from jaximm import report, run
from jaximm.run import assess as run_assess


def main() -> None:
    """Both starts, every method; then the frontier of damping and t."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep the run directories here")
    out = parser.parse_args().out or Path(tempfile.mkdtemp())
    for title, config, folder in (
        ("Identity start (deterministic)", CONFIG, "identity"),
        ("Random start, 5 seeds", RANDOM, "random"),
    ):
        results = run.immunise(config, out / folder)
        (found,) = run_assess.assess(
            [out / folder], out / folder / "assessment", level=None, as_configured=True
        )
        report.write_page(results, out / folder / "report.html", title=f"House prices: {title}")
        report.write_assessment_page(found, out / folder / "assessment.html")
        print(f"\n## {title}\n")
        show(results, found)
    print("\n## The trade of primary quality against held-out log RIR (limit)\n")
    prepared = run.prepare(CONFIG)
    chosen, cells = run.select_limit(prepared)
    print(trade.trade_table(chosen, cells))
    quality_before = results[0]["utility"]["before"]["held_out"]
    trade.draw_trade(
        chosen,
        cells,
        Path(__file__).with_name("trade.svg"),
        quality_before=quality_before,
        title="House prices: damping and t of the closed form",
    )


def show(results, found) -> None:
    """Tables of one start: what the runs measured, and the steps of their assessment."""
    records = []
    for result in results:
        record = {"method": result["method"], "case": result["seed"]}
        record |= tables.flatten(result["conditioning"])
        record |= tables.attack_steps(found, run_assess.label_of(result), "gd")
        record["r2_before"] = result["utility"]["before"]["held_out"]
        record["r2_after"] = result["utility"]["after"]["held_out"]
        record["seconds"] = result["timing"]["immunise_s"]
        records.append(record)
    print("**In short**: mean (sd), training rows unless said\n")
    print(tables.short_table(records) + "\n")
    print(tables.footing_tables(records))
    print("\n**Gradient descent with step 1/L: steps** (median)\n")
    print(tables.steps_table(records))
    print("\n**Every attacker on the harmful task: steps to 1 % excess loss, before -> after**\n")
    print(attackers_table(found))
    print("\n**Primary held-out R2 of the best damped head; seconds to immunise**\n")
    rows = [
        [
            method,
            tables.mean_sd(group, "r2_before", 3),
            tables.mean_sd(group, "r2_after", 3),
            tables.mean_sd(group, "seconds", 1),
        ]
        for method, group in tables.by_method(records).items()
    ]
    print(tables.markdown_table(["method", "R2 before", "R2 after", "seconds"], rows))


def attackers_table(found) -> str:
    """Median steps to 1 % excess loss of every probe, method by method."""
    names = [one["name"] for one in found["attackers"] if one["family"] == "probe"]
    rows = []
    for method, group in tables.by_method(found["models"]).items():
        cells = []
        for name in names:
            steps = [tables.attack_steps(found, one["label"], name) for one in group]
            before, after = (
                tables.median_steps(steps, f"{name}.harmful.{side}.loss")
                for side in ("before", "after")
            )
            cells.append(f"{before} -> {after}")
        rows.append([method, *cells])
    return tables.markdown_table(["method", *names], rows)


if __name__ == "__main__":
    main()
