"""Suites with a name: what is tried, how hard, on which rows, and figures that hold the name to it.

A suite is a file of ``frozen/``. It says every attacker with its grid and budget, the level, and
the rows of each case, so that "linear-1.0" means the same in every version that has it:
`differences` says where a version's attackers are asked for other things,
`jaximm.assessment.golden.differences` where they reach others on a small problem that never
changes. While both are empty, results of two versions compare; what changes one is a new name.

Rows are told by their number, shape and moments, not by their bits, which differ between machines.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaximm import attacks
from jaximm.assessment.bench import Bench
from jaximm.assessment.level import Level
from jaximm.attacks.probe.problem import Attack
from jaximm.attacks.weights import jaximm28
from jaximm.attacks.weights.problem import WeightAttack
from jaximm.registry import parse_label
from jaximm.types import Batch

FROZEN = resources.files("jaximm.assessment") / "frozen"

SAME_ROWS = 1e-4
"""Moments of rows that differ by less, relatively, are those of the same rows."""


class Suite(NamedTuple):
    """What a name stands for.

    Attributes:
      name: "linear-1.0".
      description: one line.
      level: budgets and seeds.
      attackers: what each is asked to do: its steps and grid.
      cases: `fingerprint` of each experiment's rows by its name.
      seeds: of a defence, at the least, to be ranked.
      golden: what each attacker reaches on the golden problem.
    """

    name: str
    description: str
    level: Level
    attackers: Mapping[str, Mapping[str, Any]]
    cases: Mapping[str, Mapping[str, Any]]
    seeds: int
    golden: Mapping[str, float | None]


def names() -> list[str]:
    """Suites that this version has."""
    paths = (Path(entry.name) for entry in FROZEN.iterdir() if entry.name.endswith(".json"))
    return sorted(path.stem for path in paths)


@functools.cache
def load(name: str) -> Suite:
    """A suite by its name.

    Raises:
      ValueError: no such suite.
    """
    if name not in names():
        raise ValueError(f"unknown suite {name!r}; choose from {names()}.")
    fields = json.loads((FROZEN / f"{name}.json").read_text(encoding="utf-8"))
    level = fields["level"]
    seeds = {key: tuple(level[key]) for key in ("select_seeds", "report_seeds")}
    return Suite(**fields | {"level": Level(**level | seeds)})


# ---------------------------------------------------------------- attackers


def table(label: str) -> tuple[Level, list[str]] | None:
    """Level and attackers of ``jaximm-28@rate=1e-3``; None where the label is of no such table.

    The table of `jaximm.attacks.weights.jaximm28` at AdamW's best rate on the undefended model.
    Unlike a suite that is frozen it goes with any case. Its three adversaries whose harmful rows
    are out of distribution are left out: an assessment has no such rows.

    >>> len(table("jaximm-28@rate=1e-3")[1]), table("quick")
    (25, None)

    Raises:
      ValueError: no rate, or one that is not finite and > 0.
    """
    name, fields = parse_label(label)
    if name != jaximm28.NAME:
        return None
    if fields.keys() != {"rate"}:
        raise ValueError(
            f"{name} needs the rate at which AdamW does best on the undefended model: say "
            f"{name}@rate=1e-3, got {label!r}."
        )
    level = Level(
        probes="quick", weight_steps=jaximm28.STEPS, batch_size=128, report_seeds=(101, 102, 103)
    )
    rows = jaximm28.adversaries(rate=fields["rate"])
    return level, [row.label for row in rows if row.data != "out of distribution"]


def chosen(level: Level, labels: Sequence[str]) -> dict[str, tuple[Attack | WeightAttack, int]]:
    """Attackers by label, with their budgets in steps."""
    of_weights = {label: parse_label(label)[0] in attacks.WEIGHT_REGISTRY for label in labels}
    probes = [label for label, is_theirs in of_weights.items() if not is_theirs]
    budgets = attacks.suite_steps(level.probes, probes)
    by_label: dict[str, tuple[Attack | WeightAttack, int]] = {
        name: (attack, budgets[name])
        for name, attack in attacks.suite_attacks(level.probes, probes).items()
    }
    for label, is_theirs in of_weights.items():
        if is_theirs:
            by_label[label] = attacks.make_attack(label), level.weight_steps
    return by_label


def asked_of(
    made: Mapping[str, tuple[Attack | WeightAttack, int]],
) -> dict[str, dict[str, Any]]:
    """Steps and grid of each attacker, as plain values."""
    return {
        label: {
            "steps": steps,
            "grid": [{key: float(value) for key, value in cell.items()} for cell in attack.grid],
        }
        for label, (attack, steps) in made.items()
    }


def differences(suite: Suite) -> list[str]:
    """Where this version asks other things of a suite's attackers than the suite does."""
    try:
        now = asked_of(chosen(suite.level, list(suite.attackers)))
    except ValueError as error:
        return [str(error)]
    return [
        f"{label}: {what}"
        for label, frozen in suite.attackers.items()
        for what in _others(frozen, now[label], suite.name)
    ]


def _others(frozen: Mapping[str, Any], now: Mapping[str, Any], name: str) -> list[str]:
    told = []
    if frozen["steps"] != now["steps"]:
        told.append(f"{frozen['steps']} steps in {name}, {now['steps']} here")
    if frozen["grid"] != now["grid"]:
        gone = sum(cell not in now["grid"] for cell in frozen["grid"])
        told.append(
            f"a grid of {len(frozen['grid'])} cells in {name}, of {len(now['grid'])} here, where "
            f"{gone} of those are not"
        )
    return told


# ---------------------------------------------------------------- rows


def fingerprint(bench: Bench) -> dict[str, Any]:
    """Number, shape and moments of the rows of every task of a bench."""
    return {
        f"{task}, {split}": _moments(getattr(rows, split))
        for task, rows in bench.tasks().items()
        for split in ("train", "selection", "held_out")
    }


def _moments(rows: Batch) -> dict[str, Any]:
    x, y = np.asarray(rows.x, np.float64), np.asarray(rows.y, np.float64)
    places = np.arange(1, len(x) + 1) / len(x)  # so that another order is another number
    return {
        "shape": list(x.shape),
        "mean_square": float(np.mean(x**2)),
        "mean_square_in_order": float(
            np.mean(places * np.mean(x.reshape(len(x), -1) ** 2, axis=1))
        ),
        "targets_in_order": float(np.mean(places * y)),
    }


def check(suite: Suite, bench: Bench) -> None:
    """Refuses what would not be the suite: other attackers, or a bench of other rows.

    Raises:
      ValueError: naming the first difference and what to do.
    """
    if others := differences(suite):
        raise ValueError(
            f"this version's attackers are not those of {suite.name} ({others[0]}): its results "
            f"would not compare. Use a version that has {suite.name} as it is, or give a level."
        )
    if bench.name not in suite.cases:
        raise ValueError(
            f"{suite.name} has no case {bench.name!r}, it has {sorted(suite.cases)}; assess it at "
            "a level (--level standard) instead."
        )
    frozen, now = suite.cases[bench.name], fingerprint(bench)
    for place in sorted(frozen.keys() | now.keys()):
        if place not in now or place not in frozen or not _same(frozen[place], now[place]):
            raise ValueError(
                f"{bench.name}, {place}: rows are not those of {suite.name} "
                f"({now.get(place)}, not {frozen.get(place)}). Run the case as {suite.name} has "
                "it, or assess at a level."
            )


def _same(frozen: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return frozen["shape"] == now["shape"] and all(
        abs(frozen[key] - now[key]) <= SAME_ROWS * (abs(frozen[key]) + 1e-6)
        for key in frozen
        if key != "shape"
    )
