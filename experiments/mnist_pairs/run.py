"""All 90 ordered digit pairs, one method after another, on several processes.

python experiments/mnist_pairs/run.py --out DIR [--method LABEL ...] [--workers 2] [--source 5k]
    [--pair 0 1 ...]
python experiments/mnist_pairs/run.py --out DIR --table

Each finished pair is one line of DIR/LABEL.jsonl; a second call computes what is missing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it
# One XLA thread a worker: two workers on two cores then do not wait for each other.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

# The config and what the experiments share, also in a spawned worker.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from config import CONFIG


def run_pair(task: tuple[str, int, int, str]) -> dict:
    """One method on one ordered pair: conditioning, slant quality, gradient-descent steps."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from experiments import tables
    from jaximm import attacks, run

    label, primary, harmful, source = task
    started = time.perf_counter()
    fields = {
        "primary_digit": primary,
        "harmful_digit": harmful,
        "source": source,
        "target": "slant",  # the images are those of the constant-label task: so are the kappas
    }
    config = dataclasses.replace(CONFIG, data_fields=fields, log_points=1)
    prepared = run.prepare(config)
    immunised = run.run_method(prepared, label)
    method_done = time.perf_counter()
    sections = run.measure(prepared, immunised)
    record: dict[str, Any] = {"method": label, "case": f"{primary}-{harmful}"}
    record |= tables.flatten(sections["conditioning"])
    gd, steps = attacks.make_attack("gd"), attacks.suite_steps("standard", ("gd",))["gd"]
    for side, theta in (("before", None), ("after", immunised.params.backbone["neck.kernel"])):
        for name in ("primary", "harmful"):
            batch = getattr(prepared.train, name)
            features = batch.x if theta is None else batch.x @ theta
            problem = attacks.probe_problem(features, batch.y)
            fit = attacks.fit_of(gd, attacks.run_attack(gd, problem, steps=steps))
            record |= tables.fit_steps(fit, f"gd.{name}.{side}")
    for when in ("before", "after"):
        record[f"r2_{when}"] = sections["utility"][when]["held_out"]
    record["method_s"] = method_done - started
    record["pair_s"] = time.perf_counter() - started
    return record


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", action="append", help="a label; default: the experiment's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--source", default="5k", choices=("5k", "full"))
    parser.add_argument("--pair", type=int, nargs=2, action="append")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    labels = args.method or list(CONFIG.methods)
    pairs = args.pair or [(a, b) for a in range(10) for b in range(10) if a != b]
    if not args.table:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            for label in labels:
                run_label(pool, label, pairs, args)
    records = [record for label in labels for record in read(args.out / f"{label}.jsonl")]
    print_tables(records)


def run_label(pool, label: str, pairs, args) -> None:
    """The missing pairs of one method."""
    file = args.out / f"{label}.jsonl"
    done = {record["case"] for record in read(file)}
    tasks = [(label, a, b, args.source) for a, b in pairs if f"{a}-{b}" not in done]
    started = time.perf_counter()
    with file.open("a") as lines:
        for number, record in enumerate(pool.imap_unordered(run_pair, tasks), start=1):
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            seconds = time.perf_counter() - started
            print(f"{label}: {number}/{len(tasks)} pairs, {seconds:.0f} s", file=sys.stderr)


def read(file: Path) -> list[dict]:
    """The records of a file, none if it is not there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def print_tables(records: list[dict]) -> None:
    """Means and deviations over pairs, as Markdown."""
    from experiments import tables

    print("**In short**: mean (sd), training rows unless said\n")
    print(tables.short_table(records) + "\n")
    print(tables.footing_tables(records))
    print("\n**Gradient descent with step 1/L on the slant of the digit: steps** (median)\n")
    print(tables.steps_table(records))
    print("\n**Pairs; held-out R2 of the slant (primary); seconds a pair**\n")
    rows = [
        [
            method,
            str(len(group)),
            tables.mean_sd(group, "r2_before", 3),
            tables.mean_sd(group, "r2_after", 3),
            tables.mean_sd(group, "method_s", 1),
            tables.mean_sd(group, "pair_s", 1),
        ]
        for method, group in tables.by_method(records).items()
    ]
    header = ["method", "pairs", "R2 before", "R2 after", "method, s", "with measuring, s"]
    print(tables.markdown_table(header, rows))


if __name__ == "__main__":
    main()
