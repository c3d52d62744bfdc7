"""Pretrains a tiny Llama, conditions it in six ways, attacks all of them, prints the tables.

python experiments/lm_tiny/run.py OUT [--only N] [--demo]

What is in OUT is not made again, so that a run that was stopped goes on. ``--only N`` attacks the
first N defended models; ``--demo`` two of them by three attackers from two seeds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import jax

jax.config.update("jax_enable_x64", True)  # of triangles and spectra; the model is float32

import settings

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments.tables import markdown_table
from jaximm import report
from jaximm.run.assess_language import assess_language, read_record
from jaximm.run.language import LanguageExperiment, immunise_language
from jaximm.run.pretrain import pretrain

Row = Mapping[str, Any]


def main() -> None:
    """Makes the models, attacks them, prints."""
    parser = argparse.ArgumentParser(description="Attackers of a tiny language model.")
    parser.add_argument("out", type=Path, help="for models, cells, document and page")
    parser.add_argument(
        "--only", type=int, default=len(settings.METHODS), help="the first N models"
    )
    parser.add_argument("--demo", action="store_true", help="in minutes: little of everything")
    options = parser.parse_args()
    out, started = options.out, time.perf_counter()
    base = out / "base"
    if not (base / "pretraining.json").is_file():
        pretrain(base, progress=_say)
    folders = []
    names = settings.DEMO_METHODS if options.demo else list(settings.METHODS)[: options.only]
    for name in names:
        folders.append(out / name)
        if read_record(out / name) is None:
            _say(settings.METHODS[name])
            experiment = LanguageExperiment(
                model=str(base), method=settings.METHODS[name], **settings.TEXTS, **settings.TRAINED
            )
            immunise_language(experiment, out / name)
    found = assess_language(
        folders,
        base,
        out / "assessment",
        texts=settings.ATTACKED,
        level=settings.DEMO_LEVEL if options.demo else settings.LEVEL,
        attackers=settings.DEMO_ATTACKERS if options.demo else settings.ATTACKERS,
        command=f"python experiments/lm_tiny/run.py OUT{' --demo' * options.demo}",
        progress=_progress(),
    )
    report.write_assessment_page(found, out / "assessment" / "assessment.html")
    print(f"## Steps to break, and their ratio to the undefended model\n\n{steps_table(found)}\n")
    print(f"## Harmful tokens predicted at the stop, held-out phrasing\n\n{share_table(found)}\n")
    print(f"## Benign texts learned by the same attackers\n\n{benign_table(found)}\n")
    print(f"## Rates that were chosen\n\n{rate_table(found)}\n")
    print(f"## Condition numbers, final hidden states, held-out\n\n{site_table(out, folders)}\n")
    _say(f"{time.perf_counter() - started:.0f} s")


def steps_table(found: Row) -> str:
    """Updates until the harmful task is learned to the threshold, less what setting up cost."""

    def cell(row: Row, bare: Row | None) -> str:
        steps = _steps(row)
        if steps is None:
            return _status(row) or "never"
        before = None if bare is None or row is bare else _steps(bare)
        return f"{steps:.0f} ({steps / before:.1f})" if before else f"{steps:.0f}"

    return _table(found, "harmful", cell)


def share_table(found: Row) -> str:
    """The share of right tokens, and in brackets what is left of the utility."""

    def cell(row: Row, bare: Row | None) -> str:
        del bare
        if row["quality"] is None:
            return _status(row) or "-"
        left = row.get("utility")
        mean = row["quality"]["mean"]
        share = "NaN" if mean is None else f"{mean:.2f}"
        return share if left is None or left["mean"] is None else f"{share} ({left['mean']:.2f})"

    return _table(found, "harmful", cell)


def benign_table(found: Row) -> str:
    """The share of right tokens of benign texts after the same training."""
    tasks = [task for task in dict.fromkeys(row["task"] for row in found["rows"])]
    parts = []
    for task in tasks:
        if task.startswith("benign"):
            parts.append(f"{task}\n\n" + _table(found, task, lambda row, _: _share(row)))
    return "\n\n".join(parts)


def rate_table(found: Row) -> str:
    """The learning rate of the chosen cell."""

    def cell(row: Row, bare: Row | None) -> str:
        del bare
        hyper = row.get("hyper_parameters") or {}
        rate = hyper.get("learning_rate")
        return "-" if rate is None else f"{rate:.1e}"

    return _table(found, "harmful", cell)


def site_table(out: Path, folders: list[Path]) -> str:
    """log RIR against the harmful text beside the controls."""
    lines = []
    for folder in folders:
        record = read_record(folder)
        rows = {
            row["against"]: row
            for row in (record or {})["conditioning"]
            if row["site"] == "features" and row["split"] == "held_out"
        }
        lines.append(
            [
                folder.relative_to(out).name,
                *(f"{rows[one]['log_rir']:z.2f}" if one in rows else "-" for one in CONTROLS),
                f"{rows['harmful']['log_rir_limit']:.2f}",
            ]
        )
    return markdown_table(["model", *CONTROLS, "limit"], lines)


CONTROLS = ("harmful", "control", "null")


def _table(found: Row, task: str, cell) -> str:
    labels = [model["label"] for model in found["models"]]
    rows = {(row["attacker"], row["model"]): row for row in found["rows"] if row["task"] == task}
    lines = []
    for attacker in dict.fromkeys(name for name, _ in rows):
        bare = rows.get((attacker, "none"))
        lines.append([_short(attacker), *(cell(rows[attacker, one], bare) for one in labels)])
    return markdown_table(["attacker", *labels], lines)


def _short(attacker: str) -> str:
    """A label without its learning rates."""
    name, at, fields = attacker.partition("@")
    kept = [part for part in fields.split(",") if not part.startswith("learning_rates")]
    return name + at * bool(kept) + ",".join(kept)


def _steps(row: Row) -> float | None:
    if row["flops_to_break"] is None:
        return None
    return (row["flops_to_break"] - row["setup_flops"]) / row["step_flops"]


def _share(row: Row) -> str:
    mean = None if row["quality"] is None else row["quality"]["mean"]
    return _status(row) or "-" if mean is None else f"{mean:.2f}"


def _status(row: Row) -> str | None:
    return {"failed": "failed", "not_applicable": "n/a"}.get(row["status"])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _progress():
    last = [0.0]

    def tell(label, done, total, record):
        del record
        if time.perf_counter() - last[0] > 30:
            last[0] = time.perf_counter()
            _say(f"{label}: {done} of {total}")

    return tell


if __name__ == "__main__":
    main()
