"""Rows that come in parts: the triangle that stands for all of them, whatever their number.

A Gram matrix squares the condition number, and its small eigenvalues are gone in float32 from
kappa = 1e7 on. The triangle R of a QR decomposition, R^T R = X^T X, keeps them, and parts are added
to it: qr([R; part]). Rows are tokens of a text, most often, with a mask for positions that do not
count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaximm.measures.conditioning import TaskRows, task_rows


class RowStream(NamedTuple):
    """What is kept of all rows so far: R with R^T R = X^T X, and how many there were."""

    triangle: Float[Array, "d d"]
    count: Float[Array, ""]


def row_stream(width: int, dtype: Any = None) -> RowStream:
    """No rows yet.

    >>> stream = add_rows(row_stream(2), jnp.array([[3.0, 0.0], [0.0, 2.0]]))
    >>> stream = add_rows(stream, jnp.array([[4.0, 0.0]]))
    >>> float(stream.count), jnp.abs(stream.triangle).round(3).tolist()
    (3.0, [[5.0, 0.0], [0.0, 2.0]])
    """
    return RowStream(jnp.zeros((width, width), dtype), jnp.zeros((), dtype))


def add_rows(
    stream: RowStream, rows: Float[Array, "*n d"], mask: Bool[Array, "*n"] | None = None
) -> RowStream:
    """The stream with more rows, in its own dtype; traceable.

    Args:
      stream: of width d.
      rows: any leading axes; where `mask` is False they are never looked at.
      mask: None: every row counts.

    Raises:
      ValueError: rows of another width, or a mask of another shape.
    """
    width = stream.triangle.shape[0]
    if rows.shape[-1] != width or (mask is not None and mask.shape != rows.shape[:-1]):
        raise ValueError(
            f"expected rows [..., {width}] and a mask of their leading axes, got "
            f"{list(rows.shape)} and {None if mask is None else list(mask.shape)}."
        )
    flat = rows.reshape(-1, width).astype(stream.triangle.dtype)
    count = jnp.asarray(flat.shape[0], stream.count.dtype)
    if mask is not None:
        flat = jnp.where(mask.reshape(-1, 1), flat, 0)
        count = jnp.sum(mask, dtype=stream.count.dtype)
    stacked = jnp.concatenate([stream.triangle, flat])
    return RowStream(jnp.linalg.qr(stacked, mode="r"), stream.count + count)


def joined(first: RowStream, second: RowStream) -> RowStream:
    """The stream of the rows of both."""
    return RowStream(add_rows(first, second.triangle).triangle, first.count + second.count)


def stream_rows(stream: RowStream, train: RowStream | None = None, *, damping: float) -> TaskRows:
    """The stream as d rows with the same K = X^T X / n, for `kappas`, `log_rir_limit` and the like.

    Args:
      stream: with at least one row.
      train: whose trace the damping is relative to; None: the stream itself.
      damping: relative.
    """

    def scaled(rows: RowStream) -> Float[Array, "d d"]:
        return rows.triangle * jnp.sqrt(rows.triangle.shape[0] / rows.count)

    return task_rows(scaled(stream), None if train is None else scaled(train), damping=damping)
