"""Full MNIST: the closed form's held-out figures over damping and t, two pairs, and its trade.

python experiments/mnist_pairs/trade.py    (after `make data`; about five minutes on two cores)
"""

from __future__ import annotations

import dataclasses
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments import trade
from jaximm import measures, run

PAIRS = ((0, 1), (3, 8))


def main() -> None:
    """Prints a table and draws a figure for each pair."""
    for primary, harmful in PAIRS:
        fields = {
            "primary_digit": primary,
            "harmful_digit": harmful,
            "source": "full",
            "target": "slant",
        }
        config = dataclasses.replace(run.EXPERIMENTS["mnist_slant"], data_fields=fields)
        prepared = run.prepare(config)
        chosen, cells = run.select_limit(
            prepared, dampings=(1e-3, 1e-2, 1e-1), ts=(0.0, 0.5, 1.0), shrinkages=(0.0,)
        )
        rows = measures.Rows(
            prepared.train.primary, prepared.selection.primary, prepared.held_out.primary
        )
        raw = jax.numpy.eye(prepared.train.primary.x.shape[1])
        before = float(measures.best_head_quality(rows, raw, metric="r2").held_out)
        print(f"\n**{primary} (primary) against {harmful} (harmful), full MNIST**: held-out")
        print(f"log RIR / held-out R2 of the slant; raw features have R2 {before:.3f}\n")
        print(trade.trade_table(chosen, cells), flush=True)
        trade.draw_trade(
            chosen,
            cells,
            Path(__file__).with_name(f"trade_{primary}_{harmful}.svg"),
            quality_before=before,
            title=f"Full MNIST, {primary} against {harmful}: damping and t of the closed form",
        )


if __name__ == "__main__":
    main()
