"""Closed-form regularisers against autodiff, and the n x n side against the d x d side.

python benchmarks/bench_regularisers.py [--quick] [--repeats R]
"""

from __future__ import annotations

from _timing import interleave, parse, print_header, print_table  # first: it sets the threads

# isort: split
import jax
import jax.numpy as jnp

from jaximm import regularisers as reg


def psd(d: int, dtype) -> jax.Array:
    """A [d, d] matrix with eigenvalues 1 ... 1e-3, geometric."""
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (d, d), dtype))[0]
    return (basis * jnp.geomspace(1.0, 1e-3, d, dtype=dtype)[None, :]) @ basis.T


def from_singular_values(sigma: jax.Array) -> jax.Array:
    """R_ill from the singular values."""
    return 2 / (jnp.mean(sigma**2) - sigma[-1] ** 2)


def through_svd(matrix: jax.Array) -> jax.Array:
    """R_ill, to be differentiated by JAX through the SVD."""
    return from_singular_values(jnp.linalg.svd(matrix, compute_uv=False))


def through_eigvalsh(matrix: jax.Array) -> jax.Array:
    """R_ill, to be differentiated by JAX through the symmetric eigensolver."""
    return from_singular_values(jnp.linalg.eigvalsh(matrix)[::-1])


def through_formed_hessian(features: jax.Array) -> jax.Array:
    """R_ill of features by way of the [d, d] Hessian."""
    n = features.shape[0]
    gram = jnp.matmul(features.T, features, precision="highest") / n
    return reg.ill_conditioning(gram)


def bench_gradient(d: int, dtype, repeats: int) -> None:
    """Value and gradient of R_ill of a [d, d] matrix."""
    matrix = jax.block_until_ready(psd(d, dtype))
    closed = jax.value_and_grad(reg.ill_conditioning)
    by_svd = jax.value_and_grad(through_svd)
    by_eigvalsh = jax.value_and_grad(through_eigvalsh)
    compiled = [jax.jit(fn) for fn in (closed, by_svd, by_eigvalsh)]
    rows = interleave(
        {
            "closed form, jit": lambda: compiled[0](matrix),
            "autodiff through svd, jit": lambda: compiled[1](matrix),
            "autodiff through eigvalsh, jit": lambda: compiled[2](matrix),
            "closed form, no jit": lambda: closed(matrix),
            "autodiff through svd, no jit": lambda: by_svd(matrix),
        },
        repeats=repeats,
    )
    print_table(f"value and gradient of R_ill(S), d = {d}, {matrix.dtype}", rows)


def bench_side(n: int, d: int, dtype, repeats: int) -> None:
    """Value and gradient of R_ill of [n, d] features."""
    features = jax.random.normal(jax.random.key(1), (n, d), dtype)
    small = jax.value_and_grad(reg.ill_conditioning_of_features)
    small_jit, formed_jit = jax.jit(small), jax.jit(jax.value_and_grad(through_formed_hessian))
    rows = interleave(
        {
            "n x n side, jit": lambda: small_jit(features),
            "d x d side, jit": lambda: formed_jit(features),
            "n x n side, no jit": lambda: small(features),
        },
        repeats=repeats,
    )
    title = f"value and gradient of R_ill(X^T X / n), n = {n}, d = {d}, {features.dtype}"
    print_table(title, rows)


def main() -> None:
    arguments = parse(__doc__)
    jax.config.update("jax_enable_x64", True)
    print_header()
    for d in (128, 512) if arguments.quick else (128, 512, 784):
        for dtype in (jnp.float32, jnp.float64):
            bench_gradient(d, dtype, arguments.repeats or (3 if arguments.quick else 9))
    for d in (512, 784) if arguments.quick else (512, 784, 1024, 2048, 4096):
        # A [4096, 4096] eigendecomposition takes ten seconds or more.
        repeats = 3 if arguments.quick else 9 if d <= 1024 else 3 if d <= 2048 else 1
        bench_side(64, d, jnp.float64, arguments.repeats or repeats)


if __name__ == "__main__":
    main()
