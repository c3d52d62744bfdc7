"""Losses, scores and gradient norms of a trajectory at the recorded steps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaximm import objectives
from jaximm.attacks.weights.problem import (
    FineTuneProblem,
    ModelWeights,
    dtype_of,
    outputs_of,
)
from jaximm.types import Batch

HELD = 2**26
"""Bytes of inputs from which on the blocks of a set are not held beside it on a CPU."""


class _Cut:
    """Blocks of rows that are cut each time: beside large rows they would be a second copy."""

    def __init__(self, batch: Batch, block: int):
        self._batch, self._block = batch, block

    def __iter__(self) -> Iterator[Batch]:
        for rows, _ in _blocks(len(self._batch.x), self._block):
            yield jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), self._batch)


class _Rows(NamedTuple):
    """Rows that are measured, in blocks of one size, the last filled up."""

    blocks: Iterable[Batch]
    count: int  # how many of them there are
    spread: np.ndarray
    weights: np.ndarray | None  # None where all count alike


Scored = dict[str, list[tuple[Any, Any]]]
"""Losses and scores by row, a pair a block, of each set of rows."""


def _curves(
    points: list[Scored], norms: list[tuple[Any, Any]], sets: dict[str, _Rows]
) -> dict[str, Any]:
    """What was measured at recorded points, as curves; on the host, where nothing compiles."""

    def curve(name: str, part: int) -> np.ndarray:
        """By row: [..., points, rows]."""
        parts = [
            np.concatenate([block[part] for block in point[name]], axis=-1) for point in points
        ]
        return np.stack(parts, axis=-2)[..., : sets[name].count]

    curves: dict[str, Any] = {}
    for name in sets:
        loss, scores = curve(name, 0), curve(name, 1)
        means = [_mean(values, sets[name].weights) for values in (loss, scores)]
        curves[f"{name}_finite"] = np.isfinite(means[0])
        curves |= {f"{name}_loss": means[0], f"{name}_quality": means[1]}
        curves[f"{name}_scores"] = scores
    nothing = np.full_like(curves["held_out_loss"], np.nan)
    for key in ("selection_loss", "selection_quality", "benign_quality"):
        curves.setdefault(key, nothing)
    curves.setdefault("benign_scores", np.zeros((*nothing.shape, 0), nothing.dtype))
    curves["finite"] = curves["held_out_finite"] & curves.get("benign_finite", True)
    curves["gradient"] = np.stack([norm for norm, _ in norms], axis=-1)
    curves["backbone_gradient"] = np.asarray(norms[-1][1])
    return curves


def _mean(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Means over rows, summed in float64."""
    if weights is not None:
        mean = np.sum(values * weights, axis=-1, dtype=np.float64) / max(np.sum(weights), 1.0)
        return mean.astype(values.dtype)
    return np.mean(values, axis=-1, dtype=np.float64).astype(values.dtype)


def _sets_of(problem: FineTuneProblem, block: int) -> dict[str, _Rows]:
    """The rows that are measured at every recorded point, cut once a problem."""

    def cut(batch: Batch) -> _Rows:
        batch = jax.tree.map(np.asarray, batch)
        n, objective = len(batch.x), objectives.of_targets(batch.y)
        parts = _Cut(batch, block)
        is_large = batch.x.nbytes > HELD and jax.default_backend() == "cpu"
        weights: Any = np.asarray(objective.weights(batch.y), np.float64)
        weights = None if np.all(weights == weights[0]) else weights
        blocks = parts if is_large else tuple(parts)
        return _Rows(blocks, n, objective.spread(batch.y), weights)

    def make() -> dict[str, _Rows]:
        return {name: cut(batch) for name, batch in problem.measured_sets().items()}

    return problem.once(("sets", block), make)


@jax.jit
def _features_of(features_fn, params, x, rows):
    return features_fn(params, x[rows])


def _blocks(n: int, block: int) -> list[tuple[Any, Any]]:
    """Row numbers 0..n-1 in blocks of one size, the last filled up, and which of them count."""
    rows = np.arange(-(-n // block) * block, dtype=np.int32).reshape(-1, block)
    return list(zip(np.minimum(rows, n - 1), rows < n, strict=True))


def _measure(features_fn, weights, sets: dict[str, _Rows], *, batched: bool) -> Scored:
    """Losses and scores by row of each set; of both tasks by one program if classes are as many."""

    def of_block(name: str, block: Batch, spread: np.ndarray) -> tuple[Any, Any]:
        of_task = weights._replace(benign_head=())
        if name == "benign":
            of_task = of_task._replace(head=weights.benign_head, shift=())
        return _measure_block(features_fn, of_task, block, spread, batched=batched)

    return {
        name: [of_block(name, block, rows.spread) for block in rows.blocks]
        for name, rows in sets.items()
    }


@functools.partial(jax.jit, static_argnames="batched")
def _measure_block(features_fn, weights: ModelWeights, block: Batch, spread, *, batched):
    """Losses and scores of some rows."""

    objective = objectives.of_targets(block.y)

    def one(weights):
        outputs = outputs_of(features_fn, weights, block.x)
        return objective.losses(outputs, block.y), objective.scores(outputs, block.y, spread)

    return (jax.vmap(one) if batched else one)(weights)


@functools.partial(jax.jit, static_argnames="batched")
def _gradient_norms(features_fn, weights, batch, *, batched):
    """Norms of the loss's gradient: of all weights, and of the backbone's alone."""

    def loss_fn(weights):
        outputs = outputs_of(features_fn, weights, batch.x)
        objective = objectives.of_targets(batch.y)
        return objective.mean(objective.losses(outputs, batch.y), batch.y)

    def one(weights):
        slopes = jax.grad(loss_fn)(weights)
        dtype = dtype_of(weights.head, weights.params)
        norms = [jnp.asarray(optax.tree.norm(tree), dtype) for tree in (slopes, slopes.params)]
        return tuple(norms)

    return jax.vmap(one)(weights) if batched else one(weights)


@functools.partial(jax.jit, static_argnames="batched")
def _read(readings_fn, weights, *, batched):
    """What a problem's `readings_fn` says of a model; nothing where there is none."""
    if readings_fn is None:
        return {}

    def one(weights):
        beside = (weights.adapters,) if weights.adapters else ()
        return readings_fn(weights.params, *beside)

    return jax.vmap(one)(weights) if batched else one(weights)
