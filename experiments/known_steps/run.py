"""Prints the table of known step counts as Markdown.

python experiments/known_steps/run.py [--seeds 0 1 2] [--spectra geometric log-uniform]

Least squares, n = 1000 rows, d = 200 features, no noise: the Hessian's eigenvalues run from 1 to
1 / kappa, in random axes; the optimum is Gaussian, the start is w = 0. Steps are to a relative
parameter error of 1e-2 (|w - w*| / |w0 - w*|) and to a relative excess loss of 1e-2.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads it

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the experiments share

from experiments import tables
from jaximm import attacks, linalg

N, D = 1000, 200
KAPPAS = (1e2, 1e4, 1e6)
SPECTRA = ("geometric", "log-uniform")
QUOTED = {1e2: (154, 24), 1e4: (12_340, 161), 1e6: (200_000, 1_079)}
"""Steps to 1e-2 parameter error of the best gradient descent and of conjugate gradients."""

GOAL = attacks.TARGETS.index(1e-2)
STEPS = {
    "gd_best_step": 10**8,
    "conjugate_gradients": 4_000,
    "whitened_gd": 10,
    "ridge": 1,
}
STEP_SCALES = tuple(float(scale) for scale in np.round(np.arange(0.9, 1.0201, 0.005), 3))


class Known(NamedTuple):
    """A problem and what it was made of."""

    problem: attacks.ProbeProblem
    eigenvalues: np.ndarray  # descending, as asked for
    optimum: np.ndarray  # w* in the original axes


class Counts(NamedTuple):
    """Steps of one attacker to 1e-2 of parameter error and of excess loss, best over its grid."""

    error: int
    loss: int


def make_known(spectrum: str, kappa: float, seed: int) -> Known:
    """The problem of a spectrum, without noise."""
    rng = np.random.default_rng(seed)
    if spectrum == "geometric":
        eigenvalues = np.geomspace(1, 1 / kappa, D)
    else:
        inner = np.exp(-np.sort(rng.uniform(0, np.log(kappa), D - 2)))
        eigenvalues = np.concatenate([[1.0], inner, [1 / kappa]])
    left = np.linalg.qr(rng.normal(size=(N, D)))[0]
    right = np.linalg.qr(rng.normal(size=(D, D)))[0]
    features = left * np.sqrt(N * eigenvalues) @ right.T
    optimum = rng.normal(size=D)
    problem = attacks.probe_problem(jnp.asarray(features), jnp.asarray(features @ optimum))
    return Known(problem, eigenvalues, optimum)


def cells(attacker: str):
    """The hyper-parameters tried: a fine grid of steps for descent, else the undamped cell."""
    if attacker == "gd_best_step":
        return [{"step_scale": scale} for scale in STEP_SCALES]
    return list(attacks.make_attack(attacker).grid)[:1]


def count(attacker: str, problem: attacks.ProbeProblem) -> Counts:
    """Fewest steps over the cells, -1 if none gets there."""
    trace = attacks.run_attack(
        attacks.make_attack(attacker), problem, cells(attacker), steps=STEPS[attacker]
    )

    def least(hits) -> int:
        reached = np.asarray(hits)[:, 0, GOAL]
        reached = reached[reached >= 0]
        return int(reached.min()) if reached.size else -1

    return Counts(least(trace.steps_to_parameter_error), least(trace.steps_to_loss_gap))


def floor_of(problem: attacks.ProbeProblem) -> int:
    """The Krylov floor of an excess loss of 1e-2."""
    return linalg.krylov_certificate(
        np.asarray(problem.eigenvalues),
        np.asarray(problem.error_coefficients),
        relative_gap=1e-2,
        max_steps=64,
    ).steps


def table(spectra, seeds) -> str:
    """The table, a line a problem."""
    header = ["spectrum", "kappa", "seed"]
    header += ["GD, error", "CG, error", "whitened GD, error", "closed form, error"]
    header += ["GD, loss", "CG, loss", "Krylov floor, loss"]
    lines = []
    for kappa in KAPPAS:
        descent, conjugate = QUOTED[kappa]
        more = "> " if kappa == 1e6 else ""
        quoted = [f"{more}{descent:,}", f"{conjugate:,}", "1", "1 solve", "", "", ""]
        lines.append(["quoted", f"{kappa:.0e}", "", *quoted])
        for spectrum in spectra:
            for seed in seeds:
                problem = make_known(spectrum, kappa, seed).problem
                found = {name: count(name, problem) for name in STEPS}
                numbers = [found[name].error for name in STEPS]
                numbers += [found[name].loss for name in ("gd_best_step", "conjugate_gradients")]
                numbers.append(floor_of(problem))
                lines.append([spectrum, f"{kappa:.0e}", str(seed), *(f"{v:,}" for v in numbers)])
    return tables.markdown_table(header, lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    asked = parser.parse_args()
    print(table(asked.spectra, asked.seeds))


if __name__ == "__main__":
    main()
