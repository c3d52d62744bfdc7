"""Decompositions whose batches cannot hang a CPU.

jaxlib's LAPACK kernels split a batch over XLA's threads and wait for it on one of them. A program
with as many independent batches as threads can have all of them waiting, for ever: two vmapped
`jnp.linalg.eigh` on two cores are enough (jaxlib 0.10; both threads in `ParallelBatchMap`). Under
`jax.vmap` these two go through a batch one matrix after another on CPUs, and are the batched
kernels elsewhere. They have no derivative; where one is wanted, `after` puts one decomposition
behind another, so that no two of them wait at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import custom_batching
from jaxtyping import Array, Float


def _one_by_one(
    decompose: Callable[[jax.Array], tuple[jax.Array, ...]],
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """The function of one matrix, with that rule for batches; no derivative."""
    alone = custom_batching.custom_vmap(decompose)

    @alone.def_vmap
    def _(axis_size, in_batched, matrices):
        del axis_size, in_batched  # one argument, so it is batched
        factors = jax.lax.platform_dependent(
            matrices,
            cpu=lambda matrices: jax.lax.map(alone, matrices),
            default=jax.vmap(decompose),
        )
        return factors, tuple(True for _ in factors)

    return alone


_eigh = _one_by_one(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
_svd = _one_by_one(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)))


def eigh(symmetric: Float[Array, "d d"]) -> tuple[Float[Array, "d"], Float[Array, "d d"]]:
    """Eigenvalues, ascending, and eigenvectors in columns, of one symmetric matrix.

    >>> values, _ = jax.vmap(eigh)(jnp.stack([jnp.diag(jnp.array([2.0, 1.0]))] * 3))
    >>> values.tolist()
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
    """
    values, vectors = _eigh(symmetric)
    return values, vectors


def svd(
    matrix: Float[Array, "m n"],
) -> tuple[Float[Array, "m k"], Float[Array, "k"], Float[Array, "k n"]]:
    """The thin singular value decomposition of one matrix, k = min(m, n)."""
    left, values, right = _svd(matrix)
    return left, values, right


def after(array: Float[Array, "..."], earlier: Float[Array, "..."]) -> Float[Array, "..."]:
    """`array`, not before `earlier` is known; NaN where that begins with NaN or inf.

    >>> after(jnp.ones(2), jnp.full(3, 7.0)).tolist()
    [1.0, 1.0]
    """
    # A product and not an optimisation barrier, which is gone before CPU threads are assigned.
    return array + 0 * jax.lax.stop_gradient(earlier).reshape(-1)[0].astype(array.dtype)
