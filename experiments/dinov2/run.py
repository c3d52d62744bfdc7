"""Runs the DINOv2 experiments and prints their tables as Markdown.

python experiments/dinov2/run.py [--sizes] [--smoke] [--out DIR] [--resume]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import jax

jax.config.update("jax_enable_x64", True)

from config import (
    ATTACK_ROWS,
    ATTACKED,
    FASHION,
    SIZES,
    SMOKE,
    SPLIT,
    TWO_FASHION,
    TWO_SPLIT,
)

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments.deep_tables import arrow, show
from experiments.tables import markdown_table
from jaximm import assessment, measures, report, run
from jaximm.records import assessment as assessment_record
from jaximm.run import assess as run_assess
from jaximm.run.measure import accuracy
from jaximm.types import Batch

PUBLISHED = {"Stanford Cars": "34.5", "Country211": "41.3"}
"""RIR_theta0 of Zheng et al. (2025) on ViT-B/16, by harmful task; the primary one is ImageNet."""


def main() -> None:
    """Immunises, assesses, prints; or probes the untouched model at several sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", action="store_true", help="accuracy by input size, no more")
    parser.add_argument("--smoke", action="store_true", help="a few rows and steps")
    parser.add_argument("--out", type=Path, help="keep the run directories here")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    args = parser.parse_args()
    if args.sizes:
        print(sizes_table())
        return
    out = args.out or Path(tempfile.mkdtemp())
    configs = (SMOKE,) if args.smoke else (FASHION, SPLIT, TWO_FASHION, TWO_SPLIT)
    for config in configs:
        folder = out / config.name
        run.immunise(config, folder, resume=args.resume)
        results = results_of(config, folder)
        print(f"\n### {config.description}\n\n**Held-out RIR_theta0**\n")
        print(rir_table(results), flush=True)
        found = attacked(config, folder)
        report.write_assessment_page(found, folder / "assessment.html", title=config.description)
        print()
        show(results, found)


def attacked(config: run.Experiment, folder: Path):
    """The assessment of some of the methods, on few rows and with small budgets.

    An attacker that does not break a model within its budget gets no more steps, so that nothing is
    called resistant here.
    """
    folders = [
        folder / run.run_folder(method, 0) for method in config.methods if method in ATTACKED
    ]
    bench, models = run_assess.bench_of(config, folders)
    bench = dataclasses.replace(
        bench, harmful=few_rows(bench.harmful), primary=few_rows(bench.primary)
    )
    level = dataclasses.replace(
        run_assess.level_of(config), report_seeds=(101, 102, 103), record=4, patience=1.0
    )
    found = assessment.assess(
        bench,
        models,
        level=level,
        attackers=run_assess.attackers_of(config),
        out=folder / "assessment",
    )
    assessment_record.write(folder / "assessment" / run_assess.FILE, found)
    return found


def few_rows(rows: assessment.TaskSplits) -> assessment.TaskSplits:
    """The same training rows, with the first of those that choose and those that are reported."""
    selection, held_out = (
        Batch(*(part[:ATTACK_ROWS] for part in split)) for split in (rows.selection, rows.held_out)
    )
    return rows._replace(selection=selection, held_out=held_out)


def results_of(config: run.Experiment, folder: Path):
    """The results of an experiment in the order of its methods."""
    results = run.load_results([folder])
    return sorted(results, key=lambda found: config.methods.index(found["method"]))


def rir_table(results) -> str:
    """Held-out RIR_theta0 itself, beside the accuracy that it costs and the published figures.

    By groups of 100 rows is the published protocol (the geometric mean of the groups); the other
    two are all held-out rows, damped as an attacker with weight decay has it, after theta, and
    undamped.
    """
    rows = []
    for found in results:
        conditioning, utility = found["conditioning"], found["utility"]
        before, after = (utility[side]["held_out"] for side in ("before", "after"))
        logs = (
            found["groups"]["held_out"]["log_rir"]["mean"],
            *(conditioning[one]["held_out"]["log_rir"] for one in ("shipped", "pseudo_inverse")),
        )
        near = "yes" if after >= before - 0.01 else "no"
        cells = (f"{math.exp(number):.3g}" for number in logs)
        rows.append([found["method"], *cells, arrow(before, after), near])
    for task, ratio in PUBLISHED.items():
        rows.append([f"published, ViT-B/16, {task}", ratio, "-", "-", "-", "-"])
    head = ["method", "groups of 100", "damped, all rows", "pseudo-inverse, all rows"]
    return markdown_table([*head, "primary accuracy", "within 1 point"], rows)


def sizes_table() -> str:
    """Accuracy of the untouched model's features on held-out rows, by input size.

    The head is the softmax classifier that an experiment starts from; the ridge head chooses its
    penalty on selection rows.
    """
    rows = []
    for config in (FASHION, SPLIT):
        for size in SIZES:
            started = time.perf_counter()
            fields = {**config.data_fields, "train_rows": 1000, "held_out_rows": 1000, "seed": 2}
            prepared = run.prepare(
                dataclasses.replace(config, data_fields=fields, image_size=size, train="norm")
            )
            seconds = time.perf_counter() - started
            features = prepared.features
            accuracies = [accuracy(prepared.head, features["held_out"].primary)]
            for task in ("primary", "harmful"):
                classes = prepared.classes(task)
                assert classes is not None
                splits = (
                    getattr(features[split], task) for split in ("train", "selection", "held_out")
                )
                best = measures.best_classifier_accuracy(*splits, classes=classes)
                accuracies.append(best.held_out)
            row = [config.data, str(size), *(f"{100 * part:.1f}" for part in accuracies)]
            rows.append([*row, f"{seconds:.0f}"])
            print(row, file=sys.stderr, flush=True)
    head = ["pair", "pixels", "primary, head", "primary, ridge", "harmful, ridge", "seconds"]
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()
