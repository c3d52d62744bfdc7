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
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import jax
import numpy as np
from jaxtyping import Float

jax.config.update("jax_enable_x64", True)

from config import (
    ATTACK_ROWS,
    ATTACKED,
    FASHION,
    SIZES,
    SMOKE,
    SPLIT,
    TOLERANCE,
    TWO_FASHION,
    TWO_SPLIT,
)

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments.deep_tables import arrow, show
from experiments.tables import markdown_table
from jaximm import assessment, measures, models, report, run
from jaximm.records import assessment as assessment_record
from jaximm.run import assess as run_assess
from jaximm.run.measure import accuracy
from jaximm.run.prepare import TASKS, batched
from jaximm.types import Batch, Json

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
        bench, subjects = run_assess.bench_of(config, run.run_folders(folder))
        print(f"\n### {config.description}\n\n**Held-out RIR_theta0**\n")
        print(rir_table(results, one_rank(bench, subjects)), flush=True)
        found = attacked(config, bench, subjects, folder / "assessment")
        report.write_assessment_page(found, folder / "assessment.html", title=config.description)
        print()
        show(results, found)


def one_rank(bench: assessment.Bench, subjects: Sequence[assessment.Model]) -> dict[str, float]:
    """Held-out log RIR_theta0 without damping, before and after at the smaller of the two ranks.

    A pseudo-inverse kappa leaves out singular values below its tolerance. Where one of them crosses
    it, before and after are of different ranks, and their ratio says nothing. Here that happens by
    construction: along 1 / scale of the last layer norm every feature vector has the same component
    (`TOLERANCE`).
    """
    values = {subject.label: held_out_values(bench, subject) for subject in subjects}
    start = values["none"]
    return {
        label: log_ratio(start["harmful"], after["harmful"])
        - log_ratio(start["primary"], after["primary"])
        for label, after in values.items()
    }


def log_ratio(before: Float[np.ndarray, "d"], after: Float[np.ndarray, "d"]) -> float:
    """log kappa after less that before, of the largest singular values that neither has lost."""
    pair = before, after
    rank = min(int(np.sum(one > TOLERANCE * one[0])) for one in pair)
    first, second = (2 * math.log(one[0] / one[rank - 1]) for one in pair)
    return second - first


def held_out_values(
    bench: assessment.Bench, subject: assessment.Model
) -> dict[str, Float[np.ndarray, "d"]]:
    """Singular values of a model's features, by task, with its neck multiplied in float64."""
    neck = {
        path: value for path, value in subject.params.items() if models.under(path, models.NECK)
    }
    bare = {path: value for path, value in subject.params.items() if path not in neck}
    values = {}
    for task in TASKS:
        x = batched(bench.features_fn, bare, getattr(bench, task).held_out.x)
        features = np.asarray(x, np.float64)
        if neck:
            kernel, bias = (
                np.asarray(neck[f"neck.{part}"], np.float64) for part in ("kernel", "bias")
            )
            features = features @ kernel + bias
        values[task] = np.linalg.svd(features, compute_uv=False)
    return values


def attacked(
    config: run.Experiment,
    bench: assessment.Bench,
    subjects: Sequence[assessment.Model],
    out: Path,
) -> Json:
    """The assessment of some of the methods, on few rows and with small budgets.

    An attacker that does not break a model within its budget gets no more steps, so that nothing is
    called resistant here.
    """
    bench = dataclasses.replace(
        bench, harmful=few_rows(bench.harmful), primary=few_rows(bench.primary)
    )
    level = dataclasses.replace(
        run_assess.level_of(config), report_seeds=(101, 102, 103), record=4, patience=1.0
    )
    found = assessment.assess(
        bench,
        [subject for subject in subjects if subject.method in ATTACKED],
        level=level,
        attackers=run_assess.attackers_of(config),
        out=out,
    )
    assessment_record.write(out / run_assess.FILE, found)
    return found


def few_rows(rows: assessment.TaskSplits) -> assessment.TaskSplits:
    """The same training rows, with the first of those that choose and those that are reported."""
    selection, held_out = (
        Batch(*(part[:ATTACK_ROWS] for part in split)) for split in (rows.selection, rows.held_out)
    )
    return rows._replace(selection=selection, held_out=held_out)


def results_of(config: run.Experiment, folder: Path) -> list[Json]:
    """The results of an experiment in the order of its methods."""
    results = run.load_results([folder])
    return sorted(results, key=lambda found: config.methods.index(found["method"]))


def rir_table(results: Sequence[Json], undamped: Mapping[str, float]) -> str:
    """Held-out RIR_theta0 itself, beside the accuracy that it costs and the published figures.

    By groups of 100 rows is the published protocol (the geometric mean of the groups); the others
    are of all held-out rows: damped as an attacker with weight decay has it, after theta, and
    undamped, at one rank (`one_rank`).
    """
    rows = []
    for found in results:
        utility, groups = found["utility"], found["groups"]["held_out"]
        before, after = (utility[side]["held_out"] for side in ("before", "after"))
        logs = (
            groups["log_rir"]["mean"],
            found["conditioning"]["shipped"]["held_out"]["log_rir"],
            undamped[found["method"]],
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
