r"""Lanczos tridiagonalisation with full reorthogonalisation, adaptive length, restart on breakdown;
and conjugate gradients, which give Lanczos the inverse of an operator that exists as a matvec only.

A Q_m = Q_m T_m + beta_m q_{m+1} e_m^T with orthonormal Q_m: the eigenvalues of the tridiagonal T_m
(Ritz values) lie inside the spectrum of A, and each has an eigenvalue of A within its residual
|beta_m y_m|, y_m the last entry of its eigenvector of T_m. Golub and Van Loan, Matrix Computations
(4th ed.), section 10.1; two passes of Gram-Schmidt keep Q orthonormal to machine precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

FIRST_CHECK = 8
"""Steps before the first convergence test; each later test comes after a quarter more steps."""


class KrylovSpace(NamedTuple):
    """Ritz pairs of a symmetric operator after `size` of at most m steps, padded to m.

    `values` [m]: Ritz values, ascending, the first `size` of them meaningful (`known`).
    `residuals` [m]: |A x - theta x| of each. `basis` [m, d]: orthonormal rows. `small_vectors`
    [m, m]: eigenvectors of T as columns. All are constants under differentiation.
    """

    values: Float[Array, "m"]
    residuals: Float[Array, "m"]
    known: Bool[Array, "m"]
    size: Int[Array, ""]
    basis: Float[Array, "m d"]
    small_vectors: Float[Array, "m m"]

    def ritz_vectors(self, columns: Int[Array, "c"]) -> Float[Array, "c d"]:
        """Unit Ritz vectors of the given columns, as rows."""
        rows = jnp.matmul(self.small_vectors[:, columns].T, self.basis, precision="highest")
        return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


class _Carry(NamedTuple):
    basis: Float[Array, "m+1 d"]
    diagonal: Float[Array, "m"]
    off_diagonal: Float[Array, "m"]
    scale: Float[Array, ""]
    size: Int[Array, ""]
    done: Bool[Array, ""]


def lanczos(
    matvec: Callable[[Float[Array, "d"]], Float[Array, "d"]],
    dim: int,
    rng_key: Array,
    *,
    steps: int,
    dtype: jnp.dtype,
    stop_fn: Callable[[Array, Array, Array], Array] | None = None,
) -> KrylovSpace:
    """Run up to `steps` Lanczos steps from a random start vector.

    When the Krylov space closes early (beta below dim * eps * scale) it goes on from a fresh random
    direction orthogonal to it, so that `size == dim` always means the whole space is spanned.

    Args:
      matvec: v [d] -> A v [d], symmetric, traceable. It may close over traced arrays; what comes
        out is constant under differentiation.
      dim: the length d.
      rng_key: for the start vector and restarts.
      steps: cap on the steps; at most `dim` are taken.
      dtype: of the vectors.
      stop_fn: `(values, residuals, known) -> bool`, asked after 8, 16, 24, 32, 40, 50, ... steps;
        None runs to the cap.

    Returns:
      `KrylovSpace` padded to min(steps, dim).
    """
    m = min(steps, dim)
    # Constants that matvec closes over become arguments, so that their tangents can be dropped:
    # a while loop has no reverse-mode derivative.
    example = jnp.zeros((dim,), dtype)
    pure, hoisted = jax.closure_convert(matvec, example)
    hoisted = [lax.stop_gradient(a) for a in hoisted]
    floor = dim * float(jnp.finfo(dtype).eps)

    def orthogonalise(basis, v):
        for _ in range(2):
            v = v - _dot(_dot(basis, v), basis)
        return v

    def unit_random(basis, index):
        v = jax.random.normal(jax.random.fold_in(rng_key, index), (dim,), dtype)
        v = orthogonalise(basis, v)
        return v / jnp.linalg.norm(v)

    def step(j, carry: _Carry) -> _Carry:
        q = carry.basis[j]
        image = pure(q, *hoisted)
        alpha = _dot(q, image)
        rest = orthogonalise(carry.basis, image)
        beta = jnp.linalg.norm(rest)
        scale = jnp.maximum(carry.scale, jnp.maximum(jnp.abs(alpha), beta))
        closed = beta <= floor * scale
        following = lax.cond(
            closed,
            lambda: unit_random(carry.basis, j + 1),
            lambda: rest / jnp.where(closed, 1, beta),
        )
        return carry._replace(
            basis=carry.basis.at[j + 1].set(following),
            diagonal=carry.diagonal.at[j].set(alpha),
            off_diagonal=carry.off_diagonal.at[j].set(jnp.where(closed, 0, beta)),
            scale=scale,
            size=carry.size + 1,
        )

    def chunk(carry: _Carry) -> _Carry:
        goal = jnp.minimum(carry.size + jnp.maximum(FIRST_CHECK, carry.size // 4), m)
        carry = lax.fori_loop(carry.size, goal, step, carry)
        if stop_fn is None:
            return carry
        values, residuals, known, _ = _ritz(carry, m)
        return carry._replace(done=stop_fn(values, residuals, known))

    start = _Carry(
        basis=jnp.zeros((m + 1, dim), dtype).at[0].set(unit_random(jnp.zeros((1, dim), dtype), 0)),
        diagonal=jnp.zeros((m,), dtype),
        off_diagonal=jnp.zeros((m,), dtype),
        scale=jnp.zeros((), dtype),
        size=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
    )
    final = lax.while_loop(lambda c: (c.size < m) & ~c.done, chunk, start)
    values, residuals, known, small_vectors = _ritz(final, m)
    return KrylovSpace(values, residuals, known, final.size, final.basis[:m], small_vectors)


def conjugate_gradient_inverse(
    matvec: Callable[[Float[Array, "d"]], Float[Array, "d"]],
    *,
    damping: float | Float[Array, ""] = 0.0,
    steps: int = 1000,
    rtol: float | None = None,
) -> Callable[[Float[Array, "d"]], Float[Array, "d"]]:
    r"""``v -> (A + damping I)^{-1} v`` by conjugate gradients, for A that exists as a matvec only.

    Each solve stops once its residual is at most ``rtol |v|``, or after `steps` matvecs: about
    ``sqrt(kappa) log(2 / rtol) / 2`` are needed, or as many as A + damping I has distinct
    eigenvalues. A solve that falls short is not reported here; whoever uses the inverse checks
    what comes out (`damped_operator_extremes` does).

    Golub and Van Loan, Matrix Computations (4th ed.), section 11.3.

    Args:
      matvec: v [d] -> A v [d], symmetric positive semi-definite, traceable.
      damping: lam >= 0; A + lam I must be positive definite. May be traced.
      steps: cap on the matvecs of a solve.
      rtol: of the residual; eps^(3/4) of the vector's dtype if None.

    Raises:
      ValueError: if `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")

    def inverse(vector: Float[Array, "d"]) -> Float[Array, "d"]:
        dtype = vector.dtype
        lam = jnp.asarray(damping, dtype)
        goal = (float(jnp.finfo(dtype).eps) ** 0.75 if rtol is None else rtol) ** 2

        def go_on(carry):
            _, _, _, square, done = carry
            return (done < steps) & (square > goal * start)

        def step(carry):
            solution, rest, direction, square, done = carry
            image = matvec(direction) + lam * direction
            size = square / _dot(direction, image)
            rest = rest - size * image
            new = _dot(rest, rest)
            solution = solution + size * direction
            return solution, rest, rest + (new / square) * direction, new, done + 1

        start = _dot(vector, vector)
        first = (jnp.zeros_like(vector), vector, vector, start, jnp.zeros((), jnp.int32))
        return lax.while_loop(go_on, step, first)[0]

    return inverse


def _ritz(carry: _Carry, m: int):
    """Eigenpairs and residuals of the tridiagonal matrix built so far, padded to m."""
    index = jnp.arange(m, dtype=jnp.int32)
    inside = index < carry.size
    # Padding gets a diagonal entry above every Ritz value, so that it sorts last and never mixes.
    beyond = 4 * carry.scale + 1
    diagonal = jnp.where(inside, carry.diagonal, beyond)
    links = jnp.where(index + 1 < carry.size, carry.off_diagonal, 0)[: m - 1]
    tridiagonal = jnp.diag(diagonal) + jnp.diag(links, 1) + jnp.diag(links, -1)
    values, vectors = jnp.linalg.eigh(tridiagonal)
    last = jnp.maximum(carry.size - 1, 0)
    residuals = jnp.abs(carry.off_diagonal[last] * vectors[last])
    return values, jnp.where(inside, residuals, jnp.inf), inside, vectors


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")
