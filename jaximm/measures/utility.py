"""What a task's best damped linear head reaches on features: the utility that a defence must keep.

The head is ridge regression; its penalty is chosen on selection rows, and the quality is reported
on training rows and on held-out rows that chose nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaximm.data.rows import blocks
from jaximm.data.tasks import Split
from jaximm.objectives import Classes, Objective, objective
from jaximm.types import Batch

PENALTIES = tuple(10.0**e for e in range(-8, 3))
"""Ridge penalties tried, relative to the mean eigenvalue tr(H) / d."""


class Rows(NamedTuple):
    """One task's training, selection and held-out rows."""

    train: Batch
    selection: Batch
    held_out: Batch


class Quality(NamedTuple):
    """Quality of the chosen head on the three sets, and its relative penalty."""

    train: Float[Array, ""]
    selection: Float[Array, ""]
    held_out: Float[Array, ""]
    penalty: Float[Array, ""]


def best_head_quality(
    rows: Rows, theta: Float[Array, "d_in d"], *, metric: str, fitted: Split | None = None
) -> Quality:
    r"""Quality of ridge on ``x @ theta``: w = (H + p I)^{-1} F^T y / n, p chosen on selection rows.

    Args:
      rows: the task's rows; y [n].
      theta: the backbone.
      metric: "r2" or "accuracy".
      fitted: the training rows where those of `rows` are few that stand for them
        (`jaximm.data.rows.condensed`): the quality on training rows is that on these.

    Raises:
      ValueError: an unknown metric.
    """
    scores, weights, penalties, chosen = _chosen_head(rows, theta, metric)
    train, selection, held_out = (values[chosen] for values in scores)
    if fitted is not None:
        train = _score_of_many(_of_metric(metric), fitted, theta @ weights[chosen])
    return Quality(train, selection, held_out, penalties[chosen])


def best_head(rows: Rows, theta: Float[Array, "d_in d"], *, metric: str) -> Float[Array, "d"]:
    """The head whose quality `best_head_quality` gives, on the features ``x @ theta``."""
    _, weights, _, chosen = _chosen_head(rows, theta, metric)
    return weights[chosen]


def _chosen_head(rows: Rows, theta, metric: str):
    """Scores by split and penalty, heads, penalties, and which is best on selection rows."""
    of = _of_metric(metric)
    weights, penalties = _ridge_path(rows.train, theta)
    scores = [_mean_scores(of, batch, theta, weights) for batch in rows]
    return scores, weights, penalties, jnp.argmax(scores[1])


def _of_metric(metric: str) -> Objective:
    by_metric = {
        candidate.metric: candidate for candidate in map(objective, ("regression", "binary"))
    }
    if metric not in by_metric:
        raise ValueError(f'metric must be "r2" or "accuracy", got {metric!r}.')
    return by_metric[metric]


def _score_of_many(of: Objective, rows: Split, head: Float[Array, "d_in"]) -> Float[Array, ""]:
    """The mean score of a head on the raw rows, a block of them at a time, on the host."""
    weights, spread, total, start = np.asarray(head), np.asarray(of.spread(rows.y)), 0.0, 0
    for block in blocks(rows.x):
        y = rows.y[start : start + len(block)]
        total += float(np.sum(of.scores(block @ weights, y, spread)))
        start += len(block)
    return jnp.asarray(total / start, head.dtype)


@functools.partial(jax.jit, static_argnames="of")
def _mean_scores(of: Objective, batch: Batch, theta, weights) -> Float[Array, "penalties"]:
    outputs = batch.x @ theta @ weights.T
    return jnp.mean(jax.vmap(lambda column: of.scores(column, batch.y))(outputs.T), axis=1)


@jax.jit
def _ridge_path(train: Batch, theta):
    """The ridge heads of every penalty, from one SVD of the features."""
    features = train.x @ theta
    n = features.shape[0]
    left, sigma, right_t = jnp.linalg.svd(features, full_matrices=False)
    eigenvalues, projected = sigma**2 / n, left.T @ train.y
    relative = jnp.asarray(PENALTIES, features.dtype)
    penalties = relative * jnp.sum(eigenvalues) / features.shape[1]
    gains = (sigma / n)[None, :] / (eigenvalues[None, :] + penalties[:, None])
    return (gains * projected[None, :]) @ right_t, relative


def utility(
    rows: Rows, theta: Float[Array, "d_in d"], *, kind: str, fitted: Split | None = None
) -> dict[str, Any] | None:
    """The ``utility`` section of a result: before (raw inputs) and after, train and held-out.

    None for a task whose targets are one constant: there is nothing to predict. `fitted` as in
    `best_head_quality`.
    """
    if kind == "constant":
        return None
    metric = objective(kind).metric
    section: dict[str, Any] = {"metric": metric}
    for backbone, weights in (
        ("before", jnp.eye(theta.shape[0], dtype=theta.dtype)),
        ("after", theta),
    ):
        quality = best_head_quality(rows, weights, metric=metric, fitted=fitted)
        section[backbone] = {"train": float(quality.train), "held_out": float(quality.held_out)}
    return section


TIE = 1e-4
"""Scores of least squares on one-hot labels that are closer than this count as equal."""


class Accuracies(NamedTuple):
    """Accuracy of the chosen classifier on the three sets, and its relative penalty."""

    train: float
    selection: float
    held_out: float
    penalty: float


def best_classifier_accuracy(
    train: Batch, selection: Batch, held_out: Batch, *, classes: int
) -> Accuracies:
    """Accuracy of least squares on one-hot labels, with intercept and the best ridge penalty.

    A closed form: conditioning does not hinder it, so it says what linear information there is.
    Scores that differ by less than `TIE` share a guess between them: after an exact erasure they
    differ by the rounding of float32 alone, which is not information that the erasure left.

    Args:
      train: features [n, d] and int labels [n].
      selection: rows that choose the penalty, from `PENALTIES` relative to tr(H) / d.
      held_out: rows that are reported.
      classes: k.
    """
    dtype = jnp.zeros(()).dtype
    rows = [Batch(jnp.asarray(part.x, dtype), part.y) for part in (train, selection, held_out)]
    scores, penalties = _classifier_scores(Rows(*rows), classes=classes)
    chosen = jnp.argmax(scores[1])
    fitted, selected, unseen = (float(row[chosen]) for row in scores)
    return Accuracies(fitted, selected, unseen, float(penalties[chosen]))


@functools.partial(jax.jit, static_argnames="classes")
def _classifier_scores(rows: Rows, *, classes: int):
    """Accuracy [3, penalties] of every ridge head, from one SVD of the centred features."""
    train = rows.train
    mean = jnp.mean(train.x, axis=0)
    targets = jax.nn.one_hot(train.y, classes, dtype=train.x.dtype)
    offset = jnp.mean(targets, axis=0)
    centred, n, d = train.x - mean[None, :], *train.x.shape
    projected = targets - offset[None, :]
    if n > d:  # a triangle first: its SVD is that of the features, without their rows
        basis, centred = jnp.linalg.qr(centred)
        projected = basis.T @ projected
    left, sigma, right_t = jnp.linalg.svd(centred, full_matrices=False)
    projected = left.T @ projected
    relative = jnp.asarray(PENALTIES, train.x.dtype)
    lam = relative * jnp.sum(sigma**2) / d

    def score(penalty):
        kernel = right_t.T @ ((sigma / (sigma**2 + penalty))[:, None] * projected)

        def accuracy_of(batch):
            logits = (batch.x - mean[None, :]) @ kernel + offset[None, :]
            return jnp.mean(Classes().shared_scores(logits, batch.y, tie=TIE))

        return jnp.stack([accuracy_of(batch) for batch in rows])

    return jax.lax.map(score, lam).T, relative
