"""A linear problem in the coordinates of its data: the same kappas from smaller matrices.

Digit images fill some 500 of 784 directions. Where neither task has data, K + lam I is lam I in
both and stays out of the game: a backbone may treat all of those directions alike. So a problem
keeps a basis B of the joint row space and at least one direction u outside it, works on B^T x, and
is lifted back by theta = B theta_r B^T + c (I - B B^T).

With c the norm of theta_r's row for u, c^2 lam is a diagonal entry of (R theta_r)(R theta_r)^T and
so lies between the extreme eigenvalues of both Hessians: lifting changes no condition number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaximm.immunisers.base import ProbeParams
from jaximm.types import Batch, PairedBatch

MULTIPLE = 64
"""Basis sizes are rounded up to a multiple of this, so that data sets share compilations."""


def row_space_basis(arrays: PairedBatch) -> Float[Array, "d_in s"] | None:
    """Orthonormal basis of both tasks' rows, padded with directions outside; None if not smaller.

    The last column is outside the row space. Computed on the host from the singular values of the
    stacked rows, rank tolerance max(n, d) eps.
    """
    rows = np.concatenate([np.asarray(arrays.primary.x), np.asarray(arrays.harmful.x)])
    d_in = rows.shape[1]
    _, sigma, right_t = np.linalg.svd(rows, full_matrices=True)
    rank = int(np.sum(sigma > max(rows.shape) * np.finfo(rows.dtype).eps * sigma[0]))
    size = -(-(rank + 1) // MULTIPLE) * MULTIPLE
    return None if size >= d_in else jnp.asarray(right_t[:size].T)


def to_row_space(arrays: PairedBatch, basis: Float[Array, "d_in s"]) -> PairedBatch:
    """The same rows in the basis."""
    return PairedBatch(*(Batch(batch.x @ basis, batch.y) for batch in arrays))


@jax.jit
def from_row_space(params: ProbeParams, basis: Float[Array, "d_in s"]) -> ProbeParams:
    """The backbone and head on the raw inputs [d_in]; see the module's formula for theta."""
    theta = params.backbone
    outside = jnp.linalg.norm(theta[-1])
    projector = basis @ basis.T
    lifted = basis @ theta @ basis.T + outside * (
        jnp.eye(basis.shape[0], dtype=theta.dtype) - projector
    )
    return ProbeParams(lifted, basis @ params.head)
