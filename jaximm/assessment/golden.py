"""The golden problem: small, never changed; what attackers reach on it holds suites to names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaximm.assessment.bench import Bench, Model, TaskSplits
from jaximm.assessment.level import Level
from jaximm.assessment.protocol import assess
from jaximm.assessment.suites import Suite, asked_of, chosen, fingerprint
from jaximm.types import Batch, Head

SAME_QUALITY = 0.03
"""What an attacker reaches on the golden problem may differ by so much between machines."""

LEVEL = Level(
    probes="short", weight_steps=20, batch_size=16, report_seeds=(101, 102), trial=False,
    record=4, patience=1.0,
)  # fmt: skip


def problem() -> tuple[Bench, Model]:
    """A small network and two tasks of three and two classes, the same everywhere."""
    rng = np.random.Generator(np.random.PCG64(7))
    mix, targets = rng.normal(size=(6, 3)), rng.normal(size=6)

    def task(kind: str) -> TaskSplits:
        def rows(n: int) -> Batch:
            x = rng.normal(size=(n, 6))
            y = np.argmax(np.tanh(x) @ mix, axis=1) if kind == "harmful" else x @ targets > 0
            return Batch(jnp.asarray(x), jnp.asarray(y, jnp.int32))

        return TaskSplits(rows(96), rows(48), rows(192), 3 if kind == "harmful" else 2)

    params = {
        "blocks.0.kernel": jnp.asarray(rng.normal(size=(6, 12)) / 6**0.5),
        "blocks.0.norm.scale": jnp.ones(12),
        "blocks.1.kernel": jnp.asarray(rng.normal(size=(12, 5)) / 12**0.5),
    }
    head = Head(jnp.asarray(rng.normal(size=(5, 2)) / 5**0.5), jnp.zeros(2))
    bench = Bench(
        name="golden", features_fn=_features, harmful=task("harmful"), primary=task("primary")
    )
    public = {**params, "blocks.1.kernel": 0.5 * params["blocks.1.kernel"]}
    return bench, Model(label="none", method="none", params=params, benign_head=head, public=public)


def _features(params: Mapping[str, Any], x: Any) -> Any:
    hidden = jnp.tanh(x @ params["blocks.0.kernel"]) * params["blocks.0.norm.scale"][None, :]
    return hidden @ params["blocks.1.kernel"]


def figures(labels: Sequence[str]) -> dict[str, float | None]:
    """What each attacker reaches on the golden problem; None where it cannot be run."""
    bench, model = problem()
    document = assess(bench, [model], level=LEVEL, attackers=labels)
    rows = {row["attacker"]: row for row in document["rows"] if row["task"] == "harmful"}
    return {
        label: None if rows[label]["quality"] is None else rows[label]["quality"]["mean"]
        for label in labels
    }


def differences(suite: Suite, labels: Sequence[str] | None = None) -> list[str]:
    """Where this version's attackers reach something else on the golden problem.

    Args:
      suite: with its figures.
      labels: attackers to run; None: all.
    """
    labels = list(suite.attackers) if labels is None else labels
    found = figures(labels)
    return [
        f"{label}: {suite.golden[label]} in {suite.name}, {found[label]} here"
        for label in labels
        if not _close(suite.golden[label], found[label])
    ]


def _close(frozen: float | None, found: float | None) -> bool:
    if frozen is None or found is None:
        return frozen is found
    return abs(frozen - found) <= SAME_QUALITY


def freeze(
    name: str,
    description: str,
    level: Level,
    attackers: Sequence[str],
    benches: Sequence[Bench],
    *,
    seeds: int = 3,
) -> dict[str, Any]:
    """The content of a suite's file, as this version would run it."""
    return {
        "name": name,
        "description": description,
        "level": dataclasses.asdict(level),
        "attackers": asked_of(chosen(level, attackers)),
        "cases": {bench.name: fingerprint(bench) for bench in benches},
        "seeds": seeds,
        "golden": figures(attackers),
    }
