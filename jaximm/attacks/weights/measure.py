"""Losses, scores and gradient norms of a trajectory at the recorded steps."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaximm import objectives
from jaximm.attacks.weights.problem import (
    FineTuneProblem,
    outputs_of,
)
from jaximm.types import Batch


class _Measured(NamedTuple):
    loss: jax.Array
    quality: jax.Array
    scores: jax.Array | None  # by row


@jax.jit
def _curves(points: list[dict[str, _Measured]], norms: list[tuple[jax.Array, jax.Array]]):
    """What was measured at recorded points, as curves."""

    def curve(parts):
        return jax.tree.map(lambda *values: jnp.stack(values, axis=-1), *parts)

    curves: dict[str, Any] = {
        name: _Measured(
            loss=curve([point[name].loss for point in points]),
            quality=curve([point[name].quality for point in points]),
            scores=None,
        )
        for name in points[0]
    }
    nothing = jnp.full_like(curves["held_out"].quality, jnp.nan)
    curves.setdefault("selection", _Measured(nothing, nothing, None))
    return curves | {
        "utility": curves["benign"].quality if "benign" in curves else nothing,
        "utility_scores": jnp.stack([_scores(point["benign"]) for point in points], axis=-2)
        if "benign" in curves
        else jnp.zeros((*nothing.shape, 0), nothing.dtype),
        "finite": functools.reduce(
            jnp.logical_and,
            [jnp.isfinite(curves[name].loss) for name in ("held_out", "benign") if name in curves],
        ),
        "scores": jnp.stack([_scores(point["held_out"]) for point in points], axis=-2),
        "gradient": curve([norm for norm, _ in norms]),
        "backbone_gradient": norms[-1][1],
    }


def _scores(measured: _Measured) -> jax.Array:
    assert measured.scores is not None
    return measured.scores


class _Rows(NamedTuple):
    """Rows that are measured, in blocks of one size (the last filled up), or all in one."""

    blocks: tuple[Batch, ...]
    count: int  # how many of them there are
    spread: jax.Array


@functools.lru_cache(maxsize=4)
def _sets_of(problem: FineTuneProblem, block: int | None) -> dict[str, _Rows]:
    """The rows that are measured at every recorded point, cut once a problem."""
    sets = {name: getattr(problem, name) for name in ("measured", "held_out", "selection")}
    sets = {name: batch for name, batch in sets.items() if batch is not None}
    if problem.benign is not None:
        sets["benign"] = problem.benign.held_out

    def cut(batch: Batch) -> _Rows:
        n = batch.x.shape[0]
        parts = [
            Batch(batch.x[rows], batch.y[rows])
            for rows, _ in _blocks(n, n if block is None else block)
        ]
        return _Rows(tuple(parts), n, objectives.of_targets(batch.y).spread(batch.y))

    return {name: cut(batch) for name, batch in sets.items()}


@functools.partial(jax.jit, static_argnames="features_fn")
def _features_of(features_fn, params, x, rows):
    return features_fn(params, x[rows])


def _blocks(n: int, block: int) -> list[tuple[Any, Any]]:
    """Row numbers 0..n-1 in blocks of one size, the last filled up, and which of them count."""
    rows = np.arange(-(-n // block) * block, dtype=np.int32).reshape(-1, block)
    return list(zip(np.minimum(rows, n - 1), rows < n, strict=True))


def _measure(
    features_fn, weights, sets: dict[str, _Rows], *, batched: bool
) -> dict[str, _Measured]:
    """Mean loss and quality of each set of rows, and the scores of each row."""
    found = {}
    for name, rows in sets.items():
        parts = [
            _measure_block(
                features_fn, weights, block, rows.spread, batched=batched, benign=name == "benign"
            )
            for block in rows.blocks
        ]
        columns = zip(*parts, strict=True)
        loss, scores = (jnp.concatenate(column, axis=-1) for column in columns)
        loss, scores = loss[..., : rows.count], scores[..., : rows.count]
        found[name] = _Measured(jnp.mean(loss, axis=-1), jnp.mean(scores, axis=-1), scores)
    return found


@functools.partial(jax.jit, static_argnames=("features_fn", "batched"))
def _measure_whole(features_fn, weights, sets: dict[str, _Rows], *, batched: bool):
    """`_measure` in one program, for small models whose rows are not cut."""
    whole = {name: rows._replace(count=rows.blocks[0].y.shape[0]) for name, rows in sets.items()}
    return _measure(features_fn, weights, whole, batched=batched)


@functools.partial(jax.jit, static_argnames=("features_fn", "batched", "benign"))
def _measure_block(features_fn, weights, block: Batch, spread, *, batched, benign):
    """Losses and scores of some rows."""
    x, y = block

    def one(weights):
        if benign:
            outputs = weights.benign_head.outputs(features_fn(weights.params, x))
        else:
            outputs = outputs_of(features_fn, weights, x)
        objective = objectives.of_targets(y)
        return objective.losses(outputs, y), objective.scores(outputs, y, spread)

    return jax.vmap(one)(weights) if batched else one(weights)


@functools.partial(jax.jit, static_argnames=("features_fn", "batched"))
def _gradient_norms(features_fn, weights, batch, *, batched):
    """Norms of the loss's gradient: of all weights, and of the backbone's alone."""

    def loss_fn(weights):
        outputs = outputs_of(features_fn, weights, batch.x)
        return jnp.mean(objectives.of_targets(batch.y).losses(outputs, batch.y))

    def one(weights):
        slopes = jax.grad(loss_fn)(weights)
        dtype = weights.head.kernel.dtype
        norms = [jnp.asarray(optax.tree.norm(tree), dtype) for tree in (slopes, slopes.params)]
        return tuple(norms)

    return jax.vmap(one)(weights) if batched else one(weights)
