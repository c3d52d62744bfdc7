"""A linear problem in the coordinates of its data: the same kappas from smaller matrices.

Digit images fill some 500 of 784 directions. Where neither task has data, K + lam I is lam I in
both and stays out of the game: a backbone may treat all of those directions alike. So a problem
keeps a basis B of the joint row space and at least one direction u outside it, works on B^T x, and
is lifted back by theta = B theta_r B^T + c (I - B B^T).

With c the norm of theta_r's row for u, c^2 lam is a diagonal entry of (R theta_r)(R theta_r)^T and
so lies between the extreme eigenvalues of both Hessians: lifting changes no condition number.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaximm.immunisers.conditioning.whole_data import replaced
from jaximm.immunisers.problem import NUMBERS, THETA, LinearTask, ProbeParams
from jaximm.linalg.arrays import computing_dtype
from jaximm.types import Batch, PairedBatch

MULTIPLE = 64
"""Basis sizes are rounded up to a multiple of this, so that data sets share compilations."""

BLOCK_BYTES = 2**25
"""Rows that are decomposed at a time: the memory beside the data, whatever the number of rows."""


def row_space_basis(arrays: PairedBatch) -> Float[Array, "d_in s"] | None:
    """Orthonormal basis of both tasks' rows, padded with directions outside; None if not smaller.

    The last column is outside the row space. Computed on the host from the singular values of the
    triangle R of the stacked rows, R^T R = X_P^T X_P + X_H^T X_H, rank tolerance max(n, d) eps. R
    is [d_in, d_in] and built by blocks of rows: time n d^2, and no copy of the rows.
    """
    rows = [np.asarray(batch.x) for batch in arrays]
    n, d_in = sum(len(part) for part in rows), rows[0].shape[1]
    dtype = np.dtype(computing_dtype(rows[0].dtype))
    step = max(d_in, BLOCK_BYTES // (d_in * dtype.itemsize))
    triangle = np.zeros((0, d_in), dtype)
    for part in rows:
        for start in range(0, len(part), step):
            block = part[start : start + step].astype(dtype)
            triangle = np.linalg.qr(np.concatenate([triangle, block]), mode="r")
    # [d_in, d_in] at most: the complete basis costs no more than the triangle.
    _, sigma, right_t = np.linalg.svd(triangle, full_matrices=True)
    rank = int(np.sum(sigma > max(n, d_in) * np.finfo(dtype).eps * sigma[0]))
    size = -(-(rank + 1) // MULTIPLE) * MULTIPLE
    return None if size >= d_in else jnp.asarray(right_t[:size].T)


def to_row_space(arrays: PairedBatch, basis: Float[Array, "d_in s"]) -> PairedBatch:
    """The same rows in the basis."""
    return PairedBatch(*(Batch(batch.x @ basis, batch.y) for batch in arrays))


@functools.partial(jax.jit, static_argnames="task")
def from_row_space(
    params: ProbeParams, basis: Float[Array, "d_in s"], task: LinearTask = NUMBERS
) -> ProbeParams:
    """Theta and head on the raw rows [d_in]; see the module's formula for theta."""
    theta = params.backbone[THETA]
    outside = jnp.linalg.norm(theta[-1])
    projector = basis @ basis.T
    lifted = basis @ theta @ basis.T + outside * (
        jnp.eye(basis.shape[0], dtype=theta.dtype) - projector
    )
    return replaced(params._replace(head=task.lifted(params.head, basis)), lifted)


@functools.partial(jax.jit, static_argnames="task")
def at_primary_scale(
    params: ProbeParams, inputs: Float[Array, "n d_in"], task: LinearTask = NUMBERS
) -> ProbeParams:
    """theta scaled so that the primary features keep the inputs' mean square, the head undoing it.

    No kappa depends on it; the reference footing, which adds an absolute 1e-6, does.
    """
    theta = params.backbone[THETA]
    scale = jnp.linalg.norm(inputs) / jnp.linalg.norm(inputs @ theta)
    return replaced(params._replace(head=task.scaled(params.head, 1 / scale)), theta * scale)
