r"""Lanczos tridiagonalisation with full reorthogonalisation, adaptive length, restart on breakdown;
and conjugate gradients, which give Lanczos the inverse of an operator that exists as a matvec only.

A Q_m = Q_m T_m + beta_m q_{m+1} e_m^T with orthonormal Q_m: the eigenvalues of the tridiagonal T_m
(Ritz values) lie inside the spectrum of A, and each has an eigenvalue of A within its residual
|beta_m y_m|, y_m the last entry of its eigenvector of T_m. Golub and Van Loan, Matrix Computations
(4th ed.), section 10.1; two passes of Gram-Schmidt keep Q orthonormal to machine precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaximm.linalg.arrays import (
    as_float,
    check_function,
    check_key,
    computing_dtype,
    exponent_of,
    times_power_of_two,
)

FIRST_CHECK = 8
"""Steps before the first convergence test; each later test comes after a quarter more steps."""


class KrylovSpace(NamedTuple):
    """Ritz pairs of a symmetric operator after `size` of at most m steps, padded to m.

    `values` [m]: Ritz values, ascending, the first `size` of them meaningful (`known`).
    `residuals` [m]: |A x - theta x| of each, to rounding. `basis` [m, d]: orthonormal rows.
    `small_vectors` [m, m]: eigenvectors of T as columns. All are constants under differentiation.
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


MISSED = 1e-6
"""Greatest chance of an eigenvalue beyond the Ritz values that `Ritz.nothing_at` lets pass."""


class Ritz(NamedTuple):
    """Ritz values of a Krylov space, and how strongly it would have shown any other eigenvalue.

    `values`, `residuals`, `known` as in `KrylovSpace`. `log_unseen`: sum of the logarithms of the
    links beta_j, one that was cut counted as the rounding that hid it, and of sqrt(2 d / pi) for
    every random vector that the space was grown from. `dim`: d.
    """

    values: Float[Array, "m"]
    residuals: Float[Array, "m"]
    known: Bool[Array, "m"]
    log_unseen: Float[Array, ""]
    dim: int

    def nothing_at(self, levels: Float[Array, "k"]) -> Bool[Array, ""]:
        r"""Whether the operator has no eigenvalue at the levels, but for a chance of `MISSED`.

        Were there one at lambda, its unit eigenvector u would have in the next Lanczos vector the
        part p(lambda) <u, start> / (beta_1 ... beta_m), p the characteristic polynomial of T. That
        is at most 1, so the random start would have had a part of at most
        prod beta_j / prod |lambda - theta_i| of u, of which the chance is at most sqrt(2 d / pi)
        times that; with several starts the chances multiply (van Dorsselaer, Hochstenbach and van
        der Vorst 2001, https://doi.org/10.1137/S0895479800366859). Between two Ritz values, and
        beyond them, |p| is least at an end, so two levels speak for all that lie between them if
        no Ritz value does.
        """
        known = jnp.where(self.known, self.values, 0)
        rounding = matvec_noise(self.dim, known.dtype) * jnp.max(jnp.abs(known))
        gaps = jnp.maximum(jnp.abs(levels[:, None] - known[None]) - rounding, 0)
        grown = jnp.sum(jnp.where(self.known[None], jnp.log(gaps), 0), axis=1)
        return jnp.all(self.log_unseen - grown <= math.log(MISSED))


class Run(NamedTuple):
    """A Krylov space of 2^-exponent times the operator, with what `lanczos_in_units` saw.

    `ritz`: of the space, in the same units. `accepted`: the last answer of `stop_fn`. `sound`:
    every matvec said that it was accurate.
    """

    space: KrylovSpace
    ritz: Ritz
    exponent: Int[Array, ""]
    accepted: Bool[Array, ""]
    sound: Bool[Array, ""]


class _Carry(NamedTuple):
    basis: Float[Array, "m+1 d"]
    diagonal: Float[Array, "m"]
    off_diagonal: Float[Array, "m"]
    scale: Float[Array, ""]
    dropped: Float[Array, ""]
    log_unseen: Float[Array, ""]
    size: Int[Array, ""]
    done: Bool[Array, ""]
    sound: Bool[Array, ""]


def vector_dtype(dtype) -> jnp.dtype:
    """The dtype that vectors of `dtype` are computed in; None is the default float dtype.

    float16 and bfloat16 give float32, and float64 does while x64 is off.

    Raises:
      ValueError: if it is not a float dtype.
    """
    if dtype is None:
        return jnp.zeros(()).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a float dtype, got {jnp.dtype(dtype)}.")
    return computing_dtype(jax.dtypes.canonicalize_dtype(dtype))


def check_operator_sizes(dim: int, steps: int) -> None:
    """ValueError unless there is a dimension and a step."""
    if dim < 1 or steps < 1:
        raise ValueError(f"dim and steps must be at least 1, got dim={dim}, steps={steps}.")


def matvec_noise(dim: int, dtype: jnp.dtype) -> float:
    """What rounding does to a unit vector's image, relative to the operator's norm.

    (4 + 1.5 sqrt(dim)) eps: errors that behave like independent ones (Higham and Mary 2019,
    https://doi.org/10.1137/18M1226312). dim * eps would call a link of .1 rounding at a million
    features in float32.
    """
    return (4 + 1.5 * dim**0.5) * float(jnp.finfo(dtype).eps)


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

    When the Krylov space closes early (beta at the rounding of a matvec) it goes on from a fresh
    random direction orthogonal to it, so that `size == dim` always means the whole space is
    spanned; the link that was cut counts in every residual. One more matvec, before the others,
    finds the power of two at which the operator is worked on.

    Works inside `jax.shard_map`, whatever its `check_vma`.

    Args:
      matvec: v [d] -> A v [d], symmetric, linear, traceable. It may close over traced arrays; what
        comes out is constant under differentiation. An image of another dtype is cast.
      dim: the length d.
      rng_key: for the start vector and restarts.
      steps: cap on the steps; at most `dim` are taken.
      dtype: of the vectors; float16 and bfloat16 are computed in float32.
      stop_fn: `(values, residuals, known) -> bool`, asked after 8, 16, 24, 32, 40, 50, ... steps;
        None runs to the cap.

    Returns:
      `KrylovSpace` padded to min(steps, dim).

    Raises:
      ValueError: `matvec` is no function or `rng_key` no key, `dim` or `steps` is below 1, `dtype`
        is not a float dtype, or `matvec` returns something else than a real vector [d].
    """
    check_function(matvec, "matvec")
    check_key(rng_key)

    def natural(values, residuals, exponent):
        return times_power_of_two(values, exponent), times_power_of_two(residuals, exponent)

    def asked(ritz, exponent):
        assert stop_fn is not None
        return stop_fn(*natural(ritz.values, ritz.residuals, exponent), ritz.known)

    run = lanczos_in_units(
        lambda v: (matvec(v), jnp.ones((), bool)),
        dim,
        rng_key,
        steps=steps,
        dtype=dtype,
        stop_fn=None if stop_fn is None else asked,
    )
    values, residuals = natural(run.space.values, run.space.residuals, run.exponent)
    return run.space._replace(values=values, residuals=residuals)


def lanczos_in_units(matvec, dim: int, rng_key, *, steps: int, dtype, stop_fn=None) -> Run:
    """`lanczos` for a matvec that returns (image, whether it is accurate), in units of 2^exponent.

    `stop_fn(ritz, exponent)` sees values in those units.
    """
    check_operator_sizes(dim, steps)
    dtype = vector_dtype(dtype)
    m = min(steps, dim)
    floor = matvec_noise(dim, dtype)
    log_start = 0.5 * math.log(max(2 * dim / math.pi, 1))

    def orthogonalise(basis, v):
        for _ in range(2):
            v = v - _dot(_dot(basis, v), basis)
        return v

    def unit_random(basis, index):
        v = jax.random.normal(jax.random.fold_in(rng_key, index), (dim,), dtype)
        v = orthogonalise(basis, v)
        return v / jnp.linalg.norm(v)

    def checked(v):
        image, sound = matvec(v)
        if image.shape != (dim,) or not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(
                f"matvec must return a float vector of shape ({dim},), got {image.dtype} of shape "
                f"{image.shape}."
            )
        return image.astype(dtype), sound

    # Constants that matvec closes over become arguments, so that their tangents can be dropped:
    # a while loop has no reverse-mode derivative.
    def converted(example):
        pure, hoisted = jax.closure_convert(checked, example)
        hoisted = [lax.stop_gradient(a) for a in hoisted]
        return lambda v: pure(v, *hoisted)

    first = unit_random(jnp.zeros((1, dim), dtype), 0)
    pure = converted(first)
    image, sound = pure(first)
    exponent = exponent_of(image)
    like = jnp.where(sound, image[0], 0)
    start = as_varying_as(first, like)
    if jax.typeof(start) != jax.typeof(first):  # inside shard_map: the loop's vectors vary
        pure = converted(start)
    pure = in_units(pure, exponent)

    def step(j, carry: _Carry) -> _Carry:
        q = carry.basis[j]
        image, sound = pure(q)
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
            dropped=jnp.where(closed, jnp.maximum(carry.dropped, beta), carry.dropped),
            log_unseen=carry.log_unseen
            + jnp.log(jnp.maximum(beta, floor * scale))
            + jnp.where(closed, log_start, 0),
            size=carry.size + 1,
            sound=carry.sound & sound,
        )

    def chunk(carry: _Carry) -> _Carry:
        goal = jnp.minimum(carry.size + jnp.maximum(FIRST_CHECK, carry.size // 4), m)
        carry = lax.fori_loop(carry.size, goal, step, carry)
        if stop_fn is None:
            return carry
        ritz, _ = _ritz(carry, m, dim)
        return carry._replace(done=as_varying_as(stop_fn(ritz, exponent), like))

    begin = _Carry(
        basis=jnp.zeros((m + 1, dim), dtype).at[0].set(start),
        diagonal=jnp.zeros((m,), dtype),
        off_diagonal=jnp.zeros((m,), dtype),
        scale=jnp.zeros((), dtype),
        dropped=jnp.zeros((), dtype),
        log_unseen=jnp.full((), log_start, dtype),
        size=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
        sound=sound,
    )
    begin = jax.tree.map(lambda a: as_varying_as(a, like), begin)
    final = lax.while_loop(lambda c: (c.size < m) & ~c.done, chunk, begin)
    ritz, small_vectors = _ritz(final, m, dim)
    space = KrylovSpace(*ritz[:3], final.size, final.basis[:m], small_vectors)
    return Run(space, ritz, exponent, final.done, final.sound)


def in_units(operator, exponent: Int[Array, ""]) -> Callable[..., Any]:
    """2^-exponent times a linear operator of about that size; it may return (image, anything).

    A tiny operator gets its vector scaled up half of the way, since its image would lose digits to
    underflow; a huge one gets its vector as it is, whose small entries would.
    """
    up = jnp.maximum(-exponent // 2, 0)

    def unit(v):
        answer = operator(times_power_of_two(v, up))
        image, *rest = answer if isinstance(answer, tuple) else (answer,)
        image = times_power_of_two(image, -exponent - up)
        return (image, *rest) if rest else image

    return unit


def as_varying_as(array: Array, like: Float[Array, ""]) -> Array:
    """`array`, marked as differing between devices where the scalar `like` does.

    What enters a loop inside `jax.shard_map` must be marked like what comes out of it, and zeros
    are the same everywhere. Elsewhere it does nothing.
    """
    return jnp.where(jnp.ones((), bool), array, like.astype(array.dtype))


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
    eigenvalues. One more, before them, finds the power of two to work at.

    A solve that falls short, or meets a direction of curvature <= 0 (A + damping I is not positive
    definite), returns NaN: an inverse that is none makes wrong bounds. `damped_operator_extremes`
    takes what was reached, and says so.

    Golub and Van Loan, Matrix Computations (4th ed.), section 11.3.

    Args:
      matvec: v [d] -> A v [d], symmetric positive semi-definite, linear, traceable.
      damping: lam >= 0; A + lam I must be positive definite. May be traced.
      steps: cap on the matvecs of a solve.
      rtol: of the residual; eps^(3/4) of the vector's dtype if None.

    Raises:
      ValueError: `matvec` is no function, `steps` is below 1.
    """
    check_function(matvec, "matvec")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")

    def inverse(vector: Float[Array, "d"]) -> Float[Array, "d"]:
        vector = as_float(vector, name="vector")
        lam = jnp.asarray(damping).astype(vector.dtype)

        def operator(v):
            return matvec(v).astype(v.dtype) + lam * v

        size = exponent_of(vector)
        vector = times_power_of_two(vector, -size)
        image = operator(vector)
        exponent = exponent_of(image)
        solution, reached = conjugate_gradients(
            in_units(operator, exponent),
            as_varying_as(vector, image[0]),
            steps=steps,
            rtol=rtol,
        )
        solution = times_power_of_two(solution, size - exponent)
        return jnp.where(reached, solution, jnp.nan)

    return inverse


def conjugate_gradients(operator, vector, *, steps: int, rtol: float | None):
    """x with S x = v, as far as `steps` brought it, and whether that is to `rtol` with S > 0.

    S and v near a scale of one, so that squares stay inside of the dtype; v marked as varying
    between devices as S v is.
    """
    goal = (float(jnp.finfo(vector.dtype).eps) ** 0.75 if rtol is None else rtol) ** 2

    def go_on(carry):
        _, _, _, square, done, definite = carry
        return (done < steps) & (square > goal * start) & definite

    def step(carry):
        solution, rest, direction, square, done, definite = carry
        image = operator(direction)
        curvature = _dot(direction, image)
        size = square / curvature
        rest = rest - size * image
        new = _dot(rest, rest)
        solution = solution + size * direction
        direction = rest + (new / square) * direction
        return solution, rest, direction, new, done + 1, definite & (curvature > 0)

    start = _dot(vector, vector)
    zero, yes = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    first = (jnp.zeros_like(vector), vector, vector, start, zero, yes)
    first = jax.tree.map(lambda a: as_varying_as(a, start), first)
    solution, _, _, square, _, definite = lax.while_loop(go_on, step, first)
    return solution, (square <= goal * start) & definite


def _ritz(carry: _Carry, m: int, dim: int) -> tuple[Ritz, Float[Array, "m m"]]:
    """Of the tridiagonal matrix built so far, padded to m; and its eigenvectors."""
    index = jnp.arange(m, dtype=jnp.int32)
    inside = index < carry.size
    # Padding gets a diagonal entry above every Ritz value, so that it sorts last and never mixes.
    beyond = 4 * carry.scale + 1
    diagonal = jnp.where(inside, carry.diagonal, beyond)
    links = jnp.where(index + 1 < carry.size, carry.off_diagonal, 0)[: m - 1]
    tridiagonal = jnp.diag(diagonal) + jnp.diag(links, 1) + jnp.diag(links, -1)
    values, vectors = jnp.linalg.eigh(tridiagonal)
    last = jnp.maximum(carry.size - 1, 0)
    residuals = jnp.abs(carry.off_diagonal[last] * vectors[last]) + carry.dropped
    residuals = jnp.where(inside, residuals, jnp.inf)
    return Ritz(values, residuals, inside, carry.log_unseen, dim), vectors


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")
