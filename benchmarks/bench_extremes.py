"""Krylov against dense extremes of a symmetric matrix, with and without jit.

python benchmarks/bench_extremes.py [--quick] [--repeats R]
"""

from __future__ import annotations

from _timing import interleave, parse, print_header, print_table  # first: it sets the threads

# isort: split
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaximm.linalg import eigh_extremes, inverse_krylov_extremes, krylov_extremes, svd_extremes


def spread(d: int, dtype) -> jax.Array:
    """A [d, d] matrix with eigenvalues 1 ... 1e-3, geometric, rotated by reflections."""
    values = jnp.geomspace(1.0, 1e-3, d, dtype=dtype)
    matrix = jnp.diag(values)
    # Four Householder reflections mix every coordinate, at O(d^2) where a QR costs O(d^3).
    for seed in range(4):
        v = jax.random.normal(jax.random.key(seed), (d,), dtype)
        v = v / jnp.linalg.norm(v)
        matrix = matrix - 2 * jnp.outer(v, v @ matrix)
        matrix = matrix - 2 * jnp.outer(matrix @ v, v)
    return matrix


def largest_by_krylov(matrix: jax.Array) -> jax.Array:
    """The largest value and its vector, at most 128 matvecs."""
    found = krylov_extremes(
        lambda v: matrix @ v, matrix.shape[0], jax.random.key(0), steps=128, dtype=matrix.dtype
    )
    return jnp.append(found.largest_right, found.largest)


def both_by_inverse(matrix: jax.Array) -> jax.Array:
    """Both extremes, the smallest through a Cholesky factor."""
    found = inverse_krylov_extremes(matrix, jax.random.key(0), steps=128)
    return jnp.stack([found.largest, found.smallest])


def both_by_eigh(matrix: jax.Array) -> jax.Array:
    """Both extremes, by the symmetric eigensolver."""
    found = eigh_extremes(matrix)
    return jnp.stack([found.largest, found.smallest])


def both_by_svd(matrix: jax.Array) -> jax.Array:
    """Both extremes, by the SVD."""
    found = svd_extremes(matrix)
    return jnp.stack([found.largest, found.smallest])


def bench(d: int, dtype, repeats: int) -> None:
    """One size."""
    matrix = jax.block_until_ready(spread(d, dtype))
    eigh_jit, krylov_jit, inverse_jit, svd_jit = (
        jax.jit(fn) for fn in (both_by_eigh, largest_by_krylov, both_by_inverse, both_by_svd)
    )
    contestants: dict[str, Callable[[], jax.Array]] = {
        "eigh, jit": lambda: eigh_jit(matrix),
        "Krylov (largest), jit": lambda: krylov_jit(matrix),
        "Krylov + Cholesky (both), jit": lambda: inverse_jit(matrix),
    }
    if d <= 2048:  # beyond, the SVD alone takes minutes
        contestants["svd, jit"] = lambda: svd_jit(matrix)
    if d <= 4096:  # without jit a call compiles its loop anew; at 8192 nothing new shows
        contestants["eigh, no jit"] = lambda: both_by_eigh(matrix)
        contestants["Krylov (largest), no jit"] = lambda: largest_by_krylov(matrix)
        contestants["Krylov + Cholesky (both), no jit"] = lambda: both_by_inverse(matrix)
    print_table(
        f"extremes of a symmetric matrix, d = {d}, {matrix.dtype}, kappa 1e3",
        interleave(contestants, repeats=repeats),
    )
    both = inverse_jit(matrix)
    print(
        f"  relative error: Krylov largest {abs(float(krylov_jit(matrix)[-1]) - 1):.1e}, "
        f"Krylov + Cholesky smallest {abs(float(both[1]) / 1e-3 - 1):.1e}"
    )


def main() -> None:
    arguments = parse(__doc__)
    jax.config.update("jax_enable_x64", True)
    print_header()
    for d in (512, 1024) if arguments.quick else (512, 1024, 2048, 4096, 8192):
        # float64 up to 2048; a float64 eigendecomposition takes 10 s at 4096 and 80 s at 8192.
        dtype = jnp.float64 if d <= 2048 else jnp.float32
        repeats = (3 if arguments.quick else 7) if d <= 1024 else 3 if d <= 2048 else 1
        bench(d, dtype, arguments.repeats or repeats)


if __name__ == "__main__":
    main()
