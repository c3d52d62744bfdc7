"""ArchLock in a small space: a search that should pick a network whose features serve one task.

python experiments/systems/archlock/run.py [--cells N] [--seeds N]

Source: the digit modulo 5. Target: its parity. The predictor is trained on the zero-cost labels of
pairs of N architectures on five other groupings of the digits and on the source; held out are the
pairs of other architectures. The search knows the source alone (S), targets simulated at a cosine
of .9 (TU), or the target (TK). Each choice is trained on the source; the target is read off by a
probe on its frozen features, or everything is tuned. Beside it stands the median of N architectures
drawn from the space.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[3]))  # what the experiments share

from jaximm.compilation import compile_quickly, keep_programs

if __name__ == "__main__":
    keep_programs()
    compile_quickly()

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.systems.tasks import Rows, digits, on_device, relabelled
from jaximm.immunisers.locks import archlock
from jaximm.immunisers.locks.archlock import SPACE, Cell
from jaximm.training.optimiser import optimiser_state, optimiser_step
from jaximm.types import Batch

GROUPINGS = ("0001112220", "0120120120", "0011223344", "0101010011", "0000111112")
"""Labels of the digits 0 to 9 in the tasks that the predictor learns from."""

STEPS, ROWS, SHOTS, SIMULATED, COSINE = 300, 64, 100, 15, 0.9


def grouped(rows: Rows, labels: str) -> Batch:
    """Rows with another label for each digit."""
    return on_device(relabelled(rows, np.asarray([int(c) for c in labels])[rows.y]))


SOURCE, TARGET = "0123401234", "0101010101"


@functools.partial(jax.jit, static_argnames=("cell", "steps"))
def trained(cell: Cell, params, rows: Batch, rng_key, *, steps: int):
    """Adam on batches of 64."""
    optimiser = optax.adam(3e-3)

    def step(carry, number):
        places = jax.random.randint(jax.random.fold_in(rng_key, number), (64,), 0, rows.y.size)
        slope = jax.grad(
            lambda p: jnp.mean(archlock.losses(cell, p, Batch(rows.x[places], rows.y[places])))
        )(carry[0])
        return tuple(optimiser_step(optimiser, slope, carry[1], carry[0])), None

    return jax.lax.scan(step, (params, optimiser_state(optimiser, params)), jnp.arange(steps))[0][0]


PENALTIES = tuple(10.0**power for power in range(-4, 3))
"""Of the probe, times the number of its rows."""


def ridge_probe(x: np.ndarray, y: np.ndarray, penalty: float):
    """Least squares on standardised features of two classes: ``(x, y) -> accuracy``."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    z = (x - mean) / scale
    signs = 2.0 * y - 1
    gram = z.T @ z + penalty * len(z) * np.eye(z.shape[1])
    w = np.linalg.solve(gram, z.T @ (signs - signs.mean()))

    def right(x: np.ndarray, y: jax.Array) -> float:
        return float(np.mean(((x - mean) / scale @ w + signs.mean() > 0) == np.asarray(y)))

    return right


class Measured(NamedTuple):
    """Accuracies of one architecture, mean over seeds."""

    source: float
    probed: float
    tuned: float


@functools.cache
def measure(cell: Cell, seeds: int) -> Measured:
    """Trained on the source; the target from a few rows by a probe, and by tuning everything."""
    parts, found = digits(), []
    source, target = ([grouped(part, labels) for part in parts] for labels in (SOURCE, TARGET))
    for seed in range(seeds):
        key = jax.random.key(seed)
        start = archlock.init_cell(cell, 64, 5, key)
        params = trained(cell, start, source[0], key, steps=STEPS)
        few = Batch(*(leaf[:SHOTS] for leaf in target[1]))
        x = [np.asarray(archlock.features(cell, params, rows.x)[-1], float)
             for rows in (few, target[1], target[2])]  # fmt: skip
        scores = []
        for penalty in PENALTIES:
            right = ridge_probe(x[0], np.asarray(few.y), penalty)
            scores.append((right(x[1][SHOTS:], target[1].y[SHOTS:]), right(x[2], target[2].y)))
        fresh = [*params[:-1], archlock.init_cell(cell, 64, 2, key)[-1]]
        tuned = trained(cell, fresh, few, key, steps=STEPS)
        found.append(Measured(_right(cell, params, source[2]), float(max(scores)[1]),
                              _right(cell, tuned, target[2])))  # fmt: skip
    return Measured(*np.mean(found, axis=0).tolist())


def _right(cell: Cell, params, rows: Batch) -> float:
    logits = archlock.features(cell, params, rows.x)[-1] @ params[-1]
    return float(jnp.mean(jnp.argmax(logits, axis=1) == rows.y))


def task_of(labels: str) -> tuple[Batch, int]:
    """Some rows of a grouping, and the classes of a head: as many for all, for one program."""
    rows = grouped(digits().defence, labels)
    return Batch(rows.x[:ROWS], rows.y[:ROWS]), 5


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the predictor, searches, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args(argv)
    begun = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(SPACE))
    seen, unseen = ([SPACE[i] for i in order[part]] for part in
                    (slice(asked.cells), slice(asked.cells, 2 * asked.cells)))  # fmt: skip

    def pairs_of(cells: Sequence[Cell], tasks: Sequence[str]) -> archlock.Pairs:
        parts = []
        for labels in tasks:
            rows, classes = task_of(labels)
            scores = np.stack([
                archlock.zero_cost_scores(cell, rows, classes, jax.random.key(0)) for cell in cells
            ])  # fmt: skip
            parts.append(archlock.labelled_pairs(cells, scores, embedded[labels]))
        return archlock.Pairs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    embedded = {labels: archlock.task_embedding(*task_of(labels))
                for labels in (*GROUPINGS, SOURCE, TARGET)}  # fmt: skip
    psi = archlock.fit_predictor(
        pairs_of(seen, (*GROUPINGS, SOURCE)), steps=2000, rng_key=jax.random.key(0)
    )
    print("| held-out pairs | right |\n| --- | ---: |")
    for name, labels in (("source", SOURCE), ("target", TARGET)):
        held = pairs_of(unseen, (labels,))
        guessed = np.asarray(archlock.predictor(psi, jnp.asarray(held.inputs))) > 0
        print(f"| {name} | {np.mean(guessed == held.wins):.2f} |")
    ranks = [archlock.ranks(psi, SPACE, embedded[labels]) for labels in (SOURCE, TARGET)]
    print(f"\ncorrelation of the two predicted ranks over the space: "
          f"{np.corrcoef(ranks[0], ranks[1])[0, 1]:.2f}\n")  # fmt: skip

    source = embedded[SOURCE]
    simulated = archlock.simulate_targets(source, SIMULATED, COSINE, seed=0)
    config = archlock.SearchConfig()
    choices = {
        "S": archlock.evolve(psi, source, 0 * simulated[:1] + source, config),
        "TU": archlock.evolve(psi, source, simulated, config),
        "TK": archlock.evolve(psi, source, embedded[TARGET][None], config),
    }
    others = [(cell, measure(cell, asked.seeds)) for cell in unseen]
    print("| choice | network | source | target, probe | target, tuned |\n"
          "| --- | --- | ---: | ---: | ---: |")  # fmt: skip
    for name, found in choices.items():
        ours, c = measure(found.cell, asked.seeds), found.cell
        words = f"{c.depth} x {c.width} {c.activation}" + " skip" * c.skip + " pooled" * c.pooled
        print(f"| {name} | {words} | {ours.source:.2f} | {ours.probed:.2f} | {ours.tuned:.2f} |")
    middle = np.median([found for _, found in others], axis=0)
    row = " | ".join(f"{value:.2f}" for value in middle)
    print(f"| median | of {len(others)} others | {row} |")
    least = [found for _, found in others if found.source >= middle[0]]
    middle = np.median(least, axis=0)
    row = " | ".join(f"{value:.2f}" for value in middle)
    print(f"| median | of the {len(least)} of them better on the source | {row} |")
    print(f"\n{asked.seeds} seeds, {time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
