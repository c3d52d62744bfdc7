"""What a task's best damped linear head reaches on features: the utility that a defence must keep.

The head is ridge regression; its penalty is chosen on selection rows, and the quality is reported
on training rows and on held-out rows that chose nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


@jax.jit
def r_squared(prediction: Float[Array, "n"], target: Float[Array, "n"]) -> Float[Array, ""]:
    """1 - |y - p|^2 / |y - mean(y)|^2; 1 is perfect, 0 is the constant mean."""
    residual = jnp.sum((target - prediction) ** 2)
    return 1 - residual / jnp.sum((target - jnp.mean(target)) ** 2)


@jax.jit
def accuracy(prediction: Float[Array, "n"], target: Float[Array, "n"]) -> Float[Array, ""]:
    """Part of the rows whose sign is right; targets are -1 and +1."""
    return jnp.mean((prediction > 0) == (target > 0), dtype=prediction.dtype)


def best_head_quality(rows: Rows, theta: Float[Array, "d_in d"], *, metric: str) -> Quality:
    r"""Quality of ridge on ``x @ theta``: w = (H + p I)^{-1} F^T y / n, p chosen on selection rows.

    Args:
      rows: the task's rows; y [n].
      theta: the backbone.
      metric: "r2" or "accuracy".

    Raises:
      ValueError: an unknown metric.
    """
    if metric not in ("r2", "accuracy"):
        raise ValueError(f'metric must be "r2" or "accuracy", got {metric!r}.')
    score = r_squared if metric == "r2" else accuracy
    weights, penalties = _ridge_path(rows.train, theta)
    scores = [jnp.stack([score(batch.x @ theta @ w, batch.y) for w in weights]) for batch in rows]
    chosen = jnp.argmax(scores[1])
    train, selection, held_out = (values[chosen] for values in scores)
    return Quality(train, selection, held_out, penalties[chosen])


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


def utility(rows: Rows, theta: Float[Array, "d_in d"], *, kind: str) -> dict[str, Any] | None:
    """The ``utility`` section of a result: before (raw inputs) and after, train and held-out.

    None for a task whose targets are one constant: there is nothing to predict.
    """
    if kind == "constant":
        return None
    metric = "accuracy" if kind == "binary" else "r2"
    section: dict[str, Any] = {"metric": metric}
    for backbone, weights in (
        ("before", jnp.eye(theta.shape[0], dtype=theta.dtype)),
        ("after", theta),
    ):
        found = best_head_quality(rows, weights, metric=metric)
        section[backbone] = {"train": float(found.train), "held_out": float(found.held_out)}
    return section
