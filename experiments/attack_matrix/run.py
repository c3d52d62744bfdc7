"""Runs the attack matrix and prints its tables as Markdown.

python experiments/attack_matrix/run.py [--deep] [--out DIR] [--level LEVEL|linear-1.0]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import jax

jax.config.update("jax_enable_x64", True)

from config import CONFIG, DEEP_ATTACKERS, DEEP_LEVEL, LEVEL, SECOND

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments.tables import markdown_table
from jaximm import assessment, attacks, report, run
from jaximm.assessment import suites
from jaximm.records import assessment as assessment_record
from jaximm.records import result
from jaximm.run import assess as run_assess


def main() -> None:
    """Immunises, assesses, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deep", action="store_true", help="the backbone in place of linear cases")
    parser.add_argument("--level", default=LEVEL, help="of the linear cases")
    parser.add_argument("--out", type=Path, help="keep runs and cells here, and go on from them")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    command = "python experiments/attack_matrix/run.py"
    command += " --deep" if args.deep else "" if args.level == LEVEL else f" --level {args.level}"
    if args.deep:
        for folder, config in ((CONFIG.name, CONFIG), ("second", SECOND)):
            run.immunise(config, out / "runs" / folder, resume=True, command=command)
        found = [assess_backbone(out, command)]
    else:
        everyone = [*attacks.REGISTRY, *attacks.WEIGHT_REGISTRY]  # those of `DOMINATED` too
        attackers = None if args.level in suites.names() else everyone  # a suite brings its own
        found = run.suite(out, level=args.level, attackers=attackers, command=command)
    for one in found:
        report.write_assessment_page(one, out / one["name"] / "assessment.html")
        print(f"## {one['data']['description']}\n\n{report.to_markdown(report.leaderboard([one]))}")
        print(f"\n**How many times dearer each class of attacker becomes**\n\n{class_table(one)}\n")
        print(f"**Erasure and conditioning, what is left**\n\n{left_table(one, out)}\n")
        print(f"**Harmful quality, where the attacker stops**\n\n{quality_table(one)}\n")


def assess_backbone(out: Path, command: str):
    """The backbone's models without benign and unseen tasks, which double the hours."""
    bench, models = run_assess.bench_of(CONFIG, run.run_folders(out / "runs"))
    bench = dataclasses.replace(bench, benign={}, unseen={})
    where = out / bench.name
    where.mkdir(parents=True, exist_ok=True)
    found = assessment.assess(
        bench,
        models,
        level=DEEP_LEVEL,
        attackers=DEEP_ATTACKERS,
        out=where,
        command=command,
    )
    assessment_record.write(where / run_assess.FILE, found)
    return found


def class_table(found) -> str:
    """FLOPs to break of the cheapest attacker of a kind, over those on the undefended model.

    The last line is the certificate: steps below which no gradient method of the Krylov class can
    come (to 1 % excess loss), over those of the undefended model.
    """
    kinds = {attacker["name"]: attacker["kind"] for attacker in found["attackers"]}
    labels = [model["label"] for model in found["models"]]
    cheapest: dict[tuple[str, str], float] = {}
    for row in found["rows"]:
        if row["task"] == "harmful" and row["flops_to_break"] is not None:
            key = kinds[row["attacker"]], row["model"]
            cheapest[key] = min(cheapest.get(key, math.inf), row["flops_to_break"])
    lines = []
    for kind in dict.fromkeys(kinds.values()):
        bare = cheapest.get((kind, labels[0]))
        cells = []
        for label in labels[1:]:
            cost = cheapest.get((kind, label))
            cells.append("-" if bare is None else "never" if cost is None else f"{cost / bare:.3g}")
        lines.append([kind, *cells])
    floors = {
        row["model"]: row["value"]
        for row in found["certificates"]
        if row["name"] == "krylov_floor" and row["target"].endswith("1e-2")
    }
    ratios = [f"{floors[label] / floors[labels[0]]:.3g}" for label in labels[1:]]
    lines.append(["Krylov floor, steps", *ratios])
    return markdown_table(["class of attacker", *labels[1:]], lines)


FULL = ("fine_tune_sgd", "fine_tune_adam", "fresh_head_sgd", "fresh_head_adam", "shampoo", "muon")
"""Attackers that fine-tune everything they may."""


def left_table(found, out: Path) -> str:
    """What a linear head gets from the features, and what fine-tuning gets back.

    The best ridge head on the rows that a method was fitted on and on held-out rows, from the runs;
    the highest quality of probes and of attackers who fine-tune everything, where they stop.
    """
    rows = {
        (row["attacker"], row["model"]): row["quality"]["mean"]
        for row in found["rows"]
        if row["task"] == "harmful" and row["quality"] is not None
        if row["quality"]["mean"] is not None
    }
    probes = [one["name"] for one in found["attackers"] if one["family"] == "probe"]

    def best(names, label):
        values = [rows[name, label] for name in names if (name, label) in rows]
        return f"{max(values):.3f}" if values else "-"

    lines = []
    for folder in run.run_folders(out / "runs"):
        one = result.read(folder / "result.json")
        label = run_assess.label_of(one)
        if one["config"]["name"] == found["name"] and (probes[0], label) in rows:
            head = one["harmful_utility"]["after"]
            numbers = [f"{head[split]:.3g}" for split in ("train", "held_out")]
            lines.append([label, *numbers, best(probes, label), best(FULL, label)])
    columns = (
        "model",
        "head, fitted rows",
        "head, held-out",
        "best probe",
        "best full fine-tuning",
    )
    return markdown_table(columns, lines)


def quality_table(found) -> str:
    """Every attacker on every model."""
    labels = [model["label"] for model in found["models"]]
    rows = {
        (row["attacker"], row["model"]): row for row in found["rows"] if row["task"] == "harmful"
    }
    lines = []
    for attacker in found["attackers"]:
        cells = []
        for label in labels:
            row = rows[attacker["name"], label]
            mean = None if row["quality"] is None else row["quality"]["mean"]
            missing = {"failed": "failed", "not_applicable": "n/a"}.get(row["status"], "NaN")
            cells.append(missing if mean is None else f"{mean:.3f}")
        lines.append([attacker["name"], *cells])
    return markdown_table(["attacker", *labels], lines)


if __name__ == "__main__":
    main()
