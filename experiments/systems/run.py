"""Trains, attacks and tables a family of defences on its toy task.

python experiments/systems/run.py FAMILY [--seeds N] [--attack-seeds N] [--steps T ...] [--out DIR]
                                  [--only LABEL ...] [--smoke]

A family is a folder here with a file rows.py:

    TASK = "halves"                                  # of tasks.TOYS
    ROWS = {
        "NPO": Row("npo", {"steps": 300}),           # a registered method, fields of its config
        "my lock": lock,                             # lock(toy, seed) -> Model
    }
    ATTEMPTS = {"full, 1000": Attempt(...)}          # optional: further attackers

The undefended model, one that never learned the harmful task, and random weights are always there.
DIR/FAMILY.json holds everything (experiments/systems/leaderboard.py reads it), the table is
printed. A second call with ``--only`` replaces those rows in it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # what the experiments share

from jaximm.compilation import keep_programs

if __name__ == "__main__":
    keep_programs()  # seeds of one method share their programs through the disk

import jax

jax.config.update("jax_enable_x64", True)  # of spectra; the models are float32

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.systems import tables
from experiments.systems.attack import attack_model, logit_spread
from experiments.systems.rows import Lock, as_it_is
from experiments.systems.tasks import TOYS, Attempt, Toy

SMOKE_LENGTH, SMOKE_STEPS, SMOKE_ATTEMPTS = 0.1, (3, 10), ("rescaled", "full", "probe", "mixed")


def family_of(name: str) -> Any:
    """The module rows.py of a family.

    Raises:
      ValueError: there is none, with those that there are.
    """
    folder = Path(__file__).parent
    path = folder / name / "rows.py"
    if not path.is_file():
        known = sorted(one.parent.name for one in folder.glob("*/rows.py"))
        raise ValueError(f"unknown family {name!r}; choose from {known}.")
    spec = importlib.util.spec_from_file_location(f"systems_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_family(
    name: str,
    *,
    seeds: int = 3,
    attack_seeds: int = 3,
    steps: Sequence[int] = (),
    only: Sequence[str] = (),
    smoke: bool = False,
    before: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Everything that is stored of a family.

    Args:
      name: of the family.
      seeds: of the defence: of its start, of its batches.
      attack_seeds: of attackers: their rows, their batches.
      steps: at which attackers are measured, rising; none: those of the task.
      only: labels of the rows to run; none: all.
      smoke: short training, few attackers and steps, for tests.
      before: what was stored, of which other rows are kept where `only` is given.
      progress: called with a line a row; a row whose training diverges is left out.
      keep: called with all that there is after every row.

    Raises:
      ValueError: an unknown family or label.
    """
    family = family_of(name)
    toy = TOYS[family.TASK](SMOKE_LENGTH if smoke else 1.0)
    attempts = {**toy.attempts, **getattr(family, "ATTEMPTS", {})}
    steps = tuple(steps) or (SMOKE_STEPS if smoke else toy.steps)
    if smoke:
        attempts = {one: attempts[one] for one in SMOKE_ATTEMPTS if one in attempts}
    rows: dict[str, Lock] = {name: as_it_is(name) for name in tables.REFERENCES}
    rows |= family.ROWS
    unknown = sorted(set(only) - set(rows))
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r}; choose from {list(rows)}.")
    found = {row["label"]: row for row in (before or {}).get("rows", ()) if only}

    def document() -> dict[str, Any]:
        return {
            "schema": tables.SCHEMA_VERSION,
            "family": name,
            "task": toy.name,
            "chance": dict(zip(("harmful", "benign"), toy.chance, strict=True)),
            "steps": list(steps),
            "seeds": seeds,
            "attack_seeds": attack_seeds,
            "attempts": {one: attempt._asdict() for one, attempt in attempts.items()},
            "rows": [found[label] for label in rows if label in found],
        }

    for label, row in rows.items():
        if only and label not in only:
            continue
        try:
            found[label] = _one_row(label, row, toy, attempts, steps, seeds, attack_seeds)
        except FloatingPointError as error:  # of one defence: the others are not lost by it
            progress(f"{label}: left out, {error}")
            continue
        progress(f"{label}: {found[label]['seconds']:.0f} s")
        keep(document())
    return document()


def _one_row(
    label: str,
    row: Lock,
    toy: Toy,
    attempts: Mapping[str, Attempt],
    steps: Sequence[int],
    seeds: int,
    attack_seeds: int,
) -> dict[str, Any]:
    """One defence: its models by seed, attacked."""
    started = time.perf_counter()
    models = []
    for seed in range(seeds):
        begun = time.perf_counter()
        model = row(toy, seed)
        seconds = time.perf_counter() - begun
        base = toy.starts.get("base", toy.starts["undefended"])(seed)
        models.append(
            {
                "seed": seed,
                "training_seconds": seconds,
                "accuracy": {
                    name: toy.accuracy(model, name)
                    for name in toy.tests
                    # A new head is the attacker's: the model as it is does not answer.
                    if not toy.new_head or name == "benign"
                },
                "spread": logit_spread(toy, model),
                "attacks": attack_model(
                    toy, model, base, seeds=range(attack_seeds), steps=steps, attempts=attempts
                ),
            }
        )
    return {
        "label": label,
        "method": getattr(row, "method", None),
        "fields": dict(getattr(row, "fields", {})),
        "models": models,
        "seconds": time.perf_counter() - started,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a family and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family")
    parser.add_argument("--seeds", type=int, default=3, help="of each defence")
    parser.add_argument("--attack-seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="where attackers are seen")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"))
    parser.add_argument("--only", nargs="+", default=[], help="labels of rows to run again")
    parser.add_argument("--smoke", action="store_true", help="seconds: little of everything")
    asked = parser.parse_args(argv)
    path = asked.out / f"{asked.family}.json"
    before = tables.read(path) if asked.only and path.is_file() else None
    asked.out.mkdir(parents=True, exist_ok=True)
    found = run_family(
        asked.family,
        seeds=asked.seeds,
        attack_seeds=asked.attack_seeds,
        steps=asked.steps,
        only=asked.only,
        smoke=asked.smoke,
        before=before,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
        keep=functools.partial(tables.write, path),
    )
    tables.write(path, found)
    print(tables.markdown(tables.read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
