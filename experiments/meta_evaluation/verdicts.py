"""What the assessment says of every model of the zoo: false "yes", false "no", "unknown".

python experiments/meta_evaluation/run.py --zoo --out DIR [--seeds 0 1] [--quick]

A false "yes" is "yes" or "erased" of a model that has the information; a false "no" is "no" or
"weak" of one that does not.
"""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zoo

from jaximm.assessment import Level, assess

ATTACKERS = ("ridge", "fine_tune_adam", "tapped_head", "opened", "revive")
"""Few strong ones, of every class that a verdict needs."""

QUICK = (
    "undefended", "never_learned", "stopped_all", "decoy_checksum", "hashed_noise",
    "honest_retrained",
)  # fmt: skip
"""A fake of some kinds, and an honest model, for a test."""

QUICK_ATTACKERS = ("ridge", "fine_tune_adam", "tapped_head")

REFERENCES = ("undefended", "never_learned", "whole_inputs", "whole_inputs_never")

LEVEL = Level(
    probes="quick",
    weight_steps=60,
    batch_size=48,
    report_seeds=(101, 102, 103),
    record=8,
    trial=False,
)


def judge(
    seed: int,
    *,
    only: Collection[str] | None = None,
    attackers: Sequence[str] = ATTACKERS,
    level: Level = LEVEL,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """The verdict on each model of a world.

    Args:
      seed: of the world.
      only: names of models; the references are always there. None: all.
      attackers: labels.
      level: of the assessment.
      out: folder of the cells and documents.
    """
    world = zoo.make_world(seed)
    subjects = zoo.zoo(world, only=only)
    found = []
    for whole in (False, True):
        members = [one for one in subjects if one.whole_numbers == whole]
        if not members:
            continue
        bench = zoo.bench_of(world, whole_numbers=whole)
        folder = None if out is None else out / f"zoo-{seed}" / str(int(whole))
        document = assess(
            bench, [one.model for one in members], level=level, attackers=attackers, out=folder
        )
        if folder is not None:
            (folder / "assessment.json").write_text(json.dumps(document))
        entries = {entry["label"]: entry for entry in document["models"]}
        found += [_record(seed, one, entries[one.name], document) for one in members]
    return found


def _record(
    seed: int, subject: zoo.Subject, entry: Mapping[str, Any], document: Mapping[str, Any]
) -> dict[str, Any]:
    rows = [
        row
        for row in document["rows"]
        if (row["model"], row["task"], row["status"]) == (subject.name, "harmful", "done")
    ]
    best = max(rows, key=lambda row: row["selected"] or -1.0)
    return {
        "seed": seed,
        "name": subject.name,
        "kind": subject.kind,
        "truth": subject.truth,
        "holds": entry["conditions"]["resistance"]["holds"],
        "capped": [flag["code"] for flag in entry["flags"] if flag["caps"]],
        "best": best["attacker"],
        "reached": best["quality"]["mean"],
        "utility": entry["utility"]["mean"],
    }


def mistake(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a verdict; None: nothing."""
    if record["truth"] == "present" and record["holds"] in ("yes", "erased"):
        return "false yes"
    if record["truth"] == "absent" and record["holds"] in ("no", "weak"):
        return "false no"
    return "unknown" if record["holds"] == "unknown" else None


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Every verdict, and how many are wrong."""
    judged = [record for record in records if record["name"] not in REFERENCES]
    lines = [
        "| model | kind | z is | verdict | capped by | best attack | reaches |",
        "| --- | --- | --- | --- | --- | --- | ---: |",
    ]
    by_name: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for record in records:
        by_name[record["name"]].append(record)
    for name, group in by_name.items():
        holds = collections.Counter(record["holds"] for record in group)
        said = ", ".join(w if len(group) == 1 else f"{w} {n}" for w, n in holds.items())
        capped = ", ".join(dict.fromkeys(code for record in group for code in record["capped"]))
        best = ", ".join(dict.fromkeys(record["best"] for record in group))
        first = group[0]
        reached = np.mean([record["reached"] for record in group])
        lines.append(
            f"| {name} | {first['kind']} | {first['truth']} | {said} | {capped or '-'} | {best} "
            f"| {reached:.3f} |"
        )
    counts = collections.Counter(map(mistake, judged))
    lines.append("")
    lines.append(
        f"{len(judged)} verdicts: false yes {counts['false yes']}, false no {counts['false no']}, "
        f"unknown {counts['unknown']}."
    )
    return "\n".join(lines)


def reveals(seed: int) -> dict[str, float]:
    """What ridge reads of each fake after its one edit."""
    world = zoo.make_world(seed)
    return {
        one.name: zoo.readable(one.reveal(one.model), world, whole_numbers=one.whole_numbers)
        for one in zoo.zoo(world)
        if one.reveal is not None
    }


def run(out: Path, seeds: Sequence[int], *, quick: bool) -> None:
    """Judges and prints."""
    started = time.perf_counter(), time.process_time()
    less: dict[str, Any] = {"only": QUICK, "attackers": QUICK_ATTACKERS} if quick else {}
    records = [record for seed in seeds for record in judge(seed, out=out, **less)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "zoo.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(table(records))
    shown = reveals(seeds[0])
    least = min(shown.values())
    print(f"\n{len(shown)} models, revealed by one edit: ridge reads {least:.3f} or more.")
    print(
        f"{time.perf_counter() - started[0]:.0f} s, {time.process_time() - started[1]:.0f} s of "
        "them on a core."
    )
