r"""Spectral deformation (SpecDef): large singular values that a matrix of their inverses undoes.

Of y = x W with W = U S V^T [d_in, d_out], the k largest singular values are multiplied by alpha
(S~) and a matrix that undoes it is put behind:

    W~ = U S~ V^T,    C = V S S~^{-1} V^T + (I - V V^T),    W~ C = W

The function is the same, the Hessian's largest eigenvalue grows with alpha^2, and gradient descent
needs a step below 2 over it. Released are W~ and C, as another parameter: the model is
``features_fn(fuse(params), inputs)``, whose gradients in both are those of the two layers.

What may be claimed: plain gradient descent needs a rate smaller by about alpha^2, or diverges. It
is blocked where the rates that are tried stop above that, and then alone: at alpha 1e5 two small
networks were tuned at rates of 1e-8 and 1e-11. Clipping, Adam at small rates, or `fuse` - one
product a layer - bring the speed back. Who tunes an honest task at usual rates is stopped as well.

The function is the same up to alpha times the float's precision: .1 of a logit in float32 at alpha
1e5 (`tests/immunisers/locks/test_specdef.py`). The decomposition is taken in float64.

Rosati et al. (2026), https://arxiv.org/abs/2602.18868 (y = W x there, C on the left).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

COMPENSATION = "compensation"
"""Last name of the path of C."""


def specdef(
    params: Mapping[str, Array], paths: Sequence[str], *, k: int, alpha: float
) -> dict[str, Array]:
    """The released parameters: W~ at each path, C [d_out, d_out] at ``<path>.compensation``.

    Args:
      params: arrays by dotted path.
      paths: of matrices [d_in, d_out].
      k: singular values of each that grow, in [1, min(d_in, d_out)].
      alpha: > 0, by how much.

    Raises:
      ValueError: a path that is no matrix or is deformed already, or k or alpha out of range.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be finite and > 0, got {alpha}.")
    deformed = dict(params)
    for path in paths:
        if path not in params or params[path].ndim != 2 or _name(path) in deformed:
            matrices = [name for name, leaf in params.items() if leaf.ndim == 2]
            raise ValueError(
                f"{path!r} must be a matrix that is not deformed; choose from {matrices}."
            )
        matrix = params[path]
        if not 1 <= k <= min(matrix.shape):
            raise ValueError(f"k must be in [1, {min(matrix.shape)}] at {path!r}, got {k}.")
        u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
        factors = np.where(np.arange(s.size) < k, alpha, 1.0)
        undo = np.eye(matrix.shape[1]) + (vt.T * (1 / factors - 1)) @ vt
        deformed[path] = jnp.asarray((u * (s * factors)) @ vt, matrix.dtype)
        deformed[_name(path)] = jnp.asarray(undo, matrix.dtype)
    return deformed


def fuse(params: Mapping[str, Array]) -> dict[str, Array]:
    """W~ C in the place of W~, and no C: the model's function, and what undoes the lock.

    >>> import jax.numpy as jnp
    >>> start = {"kernel": jnp.eye(2)}
    >>> fuse(specdef(start, ["kernel"], k=1, alpha=8.0))["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    fused = dict(params)
    for path in params:
        if _name(path) in fused:
            undo = fused.pop(_name(path))
            fused[path] = jnp.matmul(fused[path], undo, precision=lax.Precision.HIGHEST)
    return fused


def _name(path: str) -> str:
    return f"{path}.{COMPENSATION}"
