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


def main() -> None:
    """Both starts, every method; then the frontier of damping and t."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep the run directories here")
    out = parser.parse_args().out or Path(tempfile.mkdtemp())
    for title, config, folder in (
        ("Identity start (deterministic)", CONFIG, "identity"),
        ("Random start, 5 seeds", RANDOM, "random"),
    ):
        run.immunise(config, out / folder)
        results = run.attack(out / folder)
        report.write_page(results, out / folder / "report.html", title=f"House prices: {title}")
        print(f"\n## {title}\n")
        show(results)
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


def show(results) -> None:
    """Tables of one start."""
    records = []
    for result in results:
        record = {"method": result["method"], "case": result["seed"]}
        record |= tables.flatten(result["conditioning"])
        record |= tables.attack_steps(result["attacks"], "gd")
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
    print(attackers_table(results))
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


def attackers_table(results) -> str:
    """Median steps to 1 % excess loss of every attacker, method by method."""
    names = list(dict.fromkeys(row["attacker"] for row in results[0]["attacks"]))
    groups: dict[str, list] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    rows = []
    for method, group in groups.items():
        cells = []
        for name in names:
            steps = [
                {
                    row["backbone"]: row["steps_to_loss_gap"]["1e-2"]
                    for row in result["attacks"]
                    if row["attacker"] == name and row["task"] == "harmful"
                }
                for result in group
            ]
            before = tables.median_steps(steps, "before")
            cells.append(f"{before} -> {tables.median_steps(steps, 'after')}")
        rows.append([method, *cells])
    return tables.markdown_table(["method", *names], rows)


if __name__ == "__main__":
    main()
