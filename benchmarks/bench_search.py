"""Hyper-parameters of an attacker: a grid of rates against Optuna's TPE, at equal FLOPs.

`fine_tune_adam` on a perceptron that knows the digits 0 to 4, which is to learn 5 to 9, in three
forms: as it is; the same function with one layer a hundred times larger and the next as much
smaller, so that other rates are best; and with features whose kappa is 1e3 times as large. A trial
is one run of 120 steps, whoever asks for it. The best trial and its stop are chosen on selection
rows, and held-out rows are printed: means and ranges over three seeds of batches and searches.

    grid       learning rates, log-spaced; with 4 trials those of the registry, 1e-5 to 1e-2,
               with more 1e-6 to 1
    random     rate, weight decay and head scale at random, the rate in 1e-6 to 1
    TPE        the same space by Optuna (`pip install optuna`, which nothing else here needs)

python benchmarks/bench_search.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from jaximm import attacks
from jaximm.attacks.weights.problem import FineTuneProblem
from jaximm.data.tables.mnist import read_5k
from jaximm.types import Batch

WIDTHS = (784, 64, 32)
STEPS, BATCH = 120, 64
RATES = (1e-6, 1.0)
SEEDS = (0, 1, 2)

Trial = Callable[[float, float, float], tuple[float, float]]
"""Rate, weight decay and head scale to quality on selection and on held-out rows."""


def features_fn(params, x):
    """The perceptron."""
    return jax.nn.relu(x @ params["layers.0.kernel"]) @ params["layers.1.kernel"]


def problems() -> dict[str, FineTuneProblem]:
    """The three forms of the model."""
    digits = read_5k()
    order = np.random.default_rng(0).permutation(len(digits.labels))
    x = jnp.asarray(digits.images[order].reshape(len(order), -1) / 255, jnp.float32)
    y = digits.labels[order]

    def task(first: int, part: slice) -> Batch:
        rows = np.flatnonzero((y >= first) & (y < first + 5))[part]
        return Batch(x[rows], jnp.asarray(y[rows] - first, jnp.int32))

    train, selection, held_out = slice(0, 300), slice(300, 800), slice(800, 2300)
    rng = np.random.default_rng(1)
    start = {
        f"layers.{at}.kernel": jnp.asarray(
            rng.normal(size=shape) * (2 / shape[0]) ** 0.5, np.float32
        )
        for at, shape in enumerate(itertools.pairwise(WIDTHS))
    }

    def posed(params, rows: Callable[[slice], Batch]) -> FineTuneProblem:
        return FineTuneProblem(
            features_fn=features_fn,
            params=params,
            head=attacks.zero_head(WIDTHS[-1], 5, jnp.float32),
            train=rows(train),
            selection=rows(selection),
            measured=rows(slice(0, 100)),
            held_out=rows(held_out),
        )

    primary = posed(start, lambda part: task(0, part))
    learnt = attacks.run_fine_tune(
        attacks.make_attack("fine_tune_adam@learning_rates=1e-3"), primary, steps=600,
        batch_size=BATCH, record=2, loop="device", keep_weights=True,
    )  # fmt: skip
    assert learnt.weights is not None
    first, second = (learnt.weights.params[f"layers.{at}.kernel"][0, 0] for at in (0, 1))
    turn = np.linalg.qr(rng.normal(size=(WIDTHS[-1],) * 2))[0]
    ill = jnp.asarray(turn * np.geomspace(1, 10**-1.5, WIDTHS[-1]) @ turn.T, np.float32)
    forms = {
        "as it is": (first, second),
        "same function, rescaled": (100 * first, second / 100),
        "ill-conditioned features": (first, second @ ill),
    }
    return {
        name: posed(
            dict(zip(("layers.0.kernel", "layers.1.kernel"), form, strict=True)),
            lambda part: task(5, part),
        )
        for name, form in forms.items()
    }


def trial_of(problem: FineTuneProblem, seed: int) -> Trial:
    """A run of one cell."""
    attack = attacks.make_attack("fine_tune_adam")

    def trial(rate: float, decay: float, head_scale: float) -> tuple[float, float]:
        cell = {"learning_rate": rate, "weight_decay": decay, "head_scale": head_scale}
        found = attacks.run_fine_tune(
            attack, problem, [cell], steps=STEPS, seeds=(seed,), batch_size=BATCH, record=12,
            loop="device",
        )  # fmt: skip
        chances = np.nan_to_num(found.selection_quality[0, 0])
        stop = int(np.argmax(chances))
        return float(chances[stop]), float(found.held_out_quality[0, 0, stop])

    return trial


def by_grid(trial: Trial, count: int, seed: int) -> list[tuple[float, float]]:
    """Rates alone."""
    del seed
    ends = (1e-5, 1e-2) if count == 4 else RATES
    return [trial(float(rate), 0.0, 1.0) for rate in np.geomspace(*ends, count)]


def at_random(trial: Trial, count: int, seed: int) -> list[tuple[float, float]]:
    """Points of the whole space."""
    rng = np.random.default_rng(seed)
    low, high = np.log(RATES)
    return [
        trial(
            float(np.exp(rng.uniform(low, high))), float(10 ** rng.uniform(-4, 0)),
            float(rng.uniform()),
        )
        for _ in range(count)
    ]  # fmt: skip


def by_tpe(trial: Trial, count: int, seed: int) -> list[tuple[float, float]]:
    """Points that a tree of Parzen estimators asks for, after four at random."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = []

    def objective(asked) -> float:
        found.append(
            trial(
                asked.suggest_float("rate", *RATES, log=True),
                asked.suggest_float("decay", 1e-4, 1.0, log=True),
                asked.suggest_float("head", 0.0, 1.0),
            )
        )
        return found[-1][0]

    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    optuna.create_study(direction="maximize", sampler=sampler).optimize(objective, n_trials=count)
    return found


SEARCHES = {"grid": by_grid, "random": at_random, "TPE": by_tpe}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    counts, seeds = ((4,), SEEDS[:1]) if parser.parse_args().quick else ((4, 8, 16), SEEDS)
    print("| model | trials | " + " | ".join(SEARCHES) + " |")
    print("| --- | ---: |" + " ---: |" * len(SEARCHES))
    for name, problem in problems().items():
        for count in counts:
            told = []
            for search in SEARCHES.values():
                best = [max(search(trial_of(problem, seed), count, seed))[1] for seed in seeds]
                told.append(f"{np.mean(best):.3f} ({min(best):.3f} to {max(best):.3f})")
            print(f"| {name} | {count} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
