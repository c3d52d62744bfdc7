r"""A ridge head on whatever value inside the model reads the task best, then AdamW.

All values that the model's program computes and that have a row for each input are read
(`jaximm.attacks.weights.program`): activations before an erasure at the end, both sides of a
choice that the weights make, what a closure's weights give, what enters the trained part; once as
the model is, once with its dead units revived, and with the answers of its gates turned. Of each,
with columns standardised to Z [n, p],

    ridge:   Y_hat = H (Y - mean Y),    H = Z (Z^T Z + penalty * tr(Z^T Z) / p I)^(-1) Z^T,

and the value and penalty of the least mean squared error left out one by one on the training rows,

    (Y - Y_hat)_i / (1 - 1/n - H_ii),

are taken. The head is solved on that value as the model would compute it, and then the model in
front of it and the head are trained. What comes after that value is thrown away: the attacker
keeps the model as it came for everything else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaximm.attacks.grid import Values
from jaximm.attacks.weights.factor_insert import spectrum_flops
from jaximm.attacks.weights.opened import (
    World,
    flat,
    opened_problem,
    rows_of,
    standard_of,
    worlds,
)
from jaximm.attacks.weights.problem import FineTuneProblem, WeightAttack, zero_head
from jaximm.attacks.weights.program import Walk, walked
from jaximm.attacks.weights.solved_head import solved_head
from jaximm.types import as_argument

SOURCE = (
    "Alain and Bengio (2016), Understanding intermediate layers using linear classifier probes, "
    "https://arxiv.org/abs/1610.01644; left out one by one: Allen (1974), "
    "https://doi.org/10.1080/00401706.1974.10489157"
)

PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)
"""Over the mean variance of a column, of the search."""


def left_out_error(z: np.ndarray, targets: np.ndarray) -> float:
    """The least mean squared error of ridge, left out one by one, over the targets' variance.

    Args:
      z: [n, p], columns standardised.
      targets: [n, k].
    """
    n = len(z)
    centred = targets - targets.mean(axis=0)
    total = float(np.sum(centred**2))
    values, vectors = np.linalg.eigh(z @ z.T)
    values = np.maximum(values, 0.0)
    along = vectors.T @ centred
    least = np.inf
    for penalty in PENALTIES:
        damped = values + penalty * (values.sum() / z.shape[1] or 1.0)
        kept = values / damped
        fitted = vectors @ (kept[:, None] * along)
        room = 1 - 1 / n - np.sum(vectors**2 * kept, axis=1)
        # A row that decides its own answer says nothing when it is left out.
        error = (centred - fitted) / np.maximum(room, 1e-3)[:, None]
        least = min(least, float(np.sum(error**2)) / (total or 1.0))
    return least


def taps(problem: FineTuneProblem, world: World) -> dict[int, np.ndarray]:
    """Every value with a row for each training row that is looked at, as [n, p]."""
    arrays: dict[int, np.ndarray] = {}

    def tapped(number: int, array: Any) -> None:
        values = np.asarray(flat(array))
        if np.isfinite(values).all() and np.any(np.ptp(values, axis=0) > 0):
            arrays[number] = values

    x = rows_of(problem)
    walk = Walk(rows=x.shape[0], quiet=True, tapped=tapped, **world._asdict())
    walked(walk, as_argument(problem.features_fn), problem.params, x, like=problem.params)
    return arrays


def _pose(problem: FineTuneProblem) -> FineTuneProblem | str:
    """The problem whose features are the value that reads the task best."""
    y = np.asarray(problem.train.y)[: rows_of(problem).shape[0]]
    k = problem.head.kernel.shape[1]
    targets = y[:, None].astype(float) if problem.is_regression else np.eye(k)[y]
    best: tuple[float, int, World] | None = None
    spent = 0.0
    for world in worlds(problem).values():
        for number, values in taps(problem, world).items():
            mean, size = standard_of(values.astype(float))
            z = (values - np.asarray(mean)) / np.asarray(size)
            error = left_out_error(z.astype(float), targets)
            n, p = z.shape
            # A Gram matrix; eigenvalues and eigenvectors: Golub and Van Loan, 8.3.
            spent += 2.0 * n**2 * p + 9.0 * n**3
            if best is None or error < best[0]:
                best = error, number, world
    if best is None:
        return "none of its values has a row for each input"
    _, number, world = best
    dtype = problem.head.kernel.dtype
    form = opened_problem(
        problem,
        world=world,
        tap=number,
        heads_of=lambda mean, size: {"head": zero_head(mean.size, k, dtype), "benign": None},
    )
    form.once(SPENT, lambda: spent)
    return form


SPENT = "FLOPs of the search"


def search_flops(problem: FineTuneProblem) -> tuple[float, float]:
    """Of the search, and of the head that is solved."""
    setup, step = spectrum_flops(problem)
    return setup + problem.once(SPENT, lambda: 0.0), step


def tapped_head(
    *,
    learning_rates: Values = (1e-4, 1e-2),
    penalties: Values = (1e-6, 1e-3, 1e-1),
    logit_scales: Values = (10.0,),
) -> WeightAttack:
    """A ridge head on the value inside the model that reads the task best, then AdamW.

    Args:
      learning_rates, penalties, logit_scales: those of `solved_head`.
    """
    plain = solved_head(
        learning_rates=learning_rates, penalties=penalties, logit_scales=logit_scales
    )
    return dataclasses.replace(
        plain,
        pose=_pose,
        kind="opened",
        title="a head on any value inside",
        source=SOURCE,
        knows="the code of the model",
        traits=plain.traits | {"opens"},
        solve_flops=search_flops,
    )
