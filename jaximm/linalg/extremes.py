r"""Largest and smallest singular triples of a matrix, of a Gram matrix, and of a matvec.

One function per algorithm, and one chooser by shape:

=====================  =====================  ======================================
function               cost                   smallest value is right to about
=====================  =====================  ======================================
`svd_extremes`         max(n, d) min(n, d)^2  eps * largest
`eigh_extremes`        d^3                    eps * largest; symmetric only
`gram_extremes`        n d min(n, d)          sqrt(eps) * largest: it squares
`krylov_extremes`      m matvecs, m^2 d       what `converged` says; often unresolved
`inverse_krylov_…`     a Cholesky, m d^2      eps * largest; positive definite only
`damped_operator_…`    m CG solves, m^2 d     its residual, checked; A + lam I only
=====================  =====================  ======================================

float16 and bfloat16 are computed, and returned, in float32. Every path works on the matrix over a
power of two near its largest entry, so that scaling the matrix by powers of two scales the result
and nothing else, over all normal numbers of the dtype.

Definitions: Golub and Van Loan, Matrix Computations (4th ed.), sections 2.4, 8.6 and 10.1;
Zheng et al. (2025), https://arxiv.org/abs/2505.23760, whose regularisers need these triples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaximm.linalg.arrays import (
    as_matrix,
    as_square,
    check_function,
    check_key,
    exponent_of,
    one_program,
    times_power_of_two,
)
from jaximm.linalg.lanczos import (
    Ritz,
    as_varying_as,
    check_operator_sizes,
    conjugate_gradients,
    in_units,
    lanczos_in_units,
    matvec_noise,
    vector_dtype,
)

METHODS = ("svd", "eigh", "gram", "krylov", "inverse_krylov")
"""Names behind the integer code `Extremes.method`."""

EXACT_SIDE = 2048
"""Longest smaller side that a dense factorisation gets from `choose_method`.

Measured on one CPU core in float64: eigh takes 0.9 s and the SVD with vectors 2.6 s at 2048; at
4096 they take 8 s and 21 s, Lanczos with 32 steps 0.14 s.
"""

CERTAIN = 16
"""Least size of `Extremes.smallest`, in rounding errors of its path, at which it is `converged`."""

SLACK = 1 / 32
"""How far a value that is `converged` may lie from the true one, relatively, where a Krylov space
cannot have missed what lies beyond."""

GRAM_ASPECT = 4
"""Least ratio of the sides at which `choose_method(accurate=False)` takes the Gram side."""


class Extremes(NamedTuple):
    """Extreme singular triples of an [n, d] matrix; of a symmetric one, n = d.

    `largest`, `smallest`: the largest singular value and the smallest one above `tolerance`; both
    0 for a zero matrix. `largest_left` [n], `largest_right` [d], `smallest_left`,
    `smallest_right`: unit vectors, `matrix @ right = value * left`. `rank`: number of values above
    `tolerance` (absolute, in units of the matrix). `method`: index into `METHODS`.

    `converged`: True only where both values are right. False where an iteration fell short, the
    input was not finite, `smallest` is less than `CERTAIN` times what rounding may have moved it
    (so that its first digit is in doubt), or a value lies so close to the tolerance that rounding
    decides on which side.

    The derivative of `largest` and `smallest` is the outer product of their vectors, finite at ties
    (that of one of the tied directions). Vectors, rank and tolerance are constants under
    differentiation, so second derivatives are not provided: they read as zero.
    """

    largest: Float[Array, ""]
    smallest: Float[Array, ""]
    largest_left: Float[Array, "n"]
    largest_right: Float[Array, "d"]
    smallest_left: Float[Array, "n"]
    smallest_right: Float[Array, "d"]
    rank: Int[Array, ""]
    tolerance: Float[Array, ""]
    converged: Bool[Array, ""]
    method: Int[Array, ""]


def rank_rtol(shape: tuple[int, ...], dtype: jnp.dtype) -> float:
    """The default relative rank tolerance, max(n, d) * eps, as in NumPy's `matrix_rank`.

    Args:
      shape: shape of the matrix; its last two lengths count.
      dtype: a float dtype.

    Returns:
      A Python float, relative to the largest singular value.

    >>> rank_rtol((20, 8), jnp.dtype("float32")) == 20 * 2.0**-23
    True
    """
    return max(shape[-2:]) * float(jnp.finfo(dtype).eps)


@one_program
def svd_extremes(matrix: Float[Array, "n d"], *, rtol: float | None = None) -> Extremes:
    """Extreme singular triples by a thin SVD: the accurate path, for any dense matrix.

    Edge cases: a zero matrix has rank 0 and largest = smallest = 0; NaN or inf gives NaN and
    `converged` False.

    Args:
      matrix: any float dtype.
      rtol: values at or below `rtol * largest` count as zero; max(n, d) * eps if None.

    Returns:
      `Extremes` in the dtype of `matrix`.

    Raises:
      ValueError: if `matrix` is not two-dimensional, is empty, or is not of float dtype.

    >>> extremes = svd_extremes(jnp.diag(jnp.array([1.0, 4.0, 0.0])))
    >>> float(extremes.largest), float(extremes.smallest), int(extremes.rank)
    (4.0, 1.0, 2)
    """
    matrix = as_matrix(matrix)
    default = rank_rtol(matrix.shape, matrix.dtype)
    unit, exponent = _in_units(matrix)
    left, values, right_t = jnp.linalg.svd(unit, full_matrices=False)
    picked = _pick_extremes(values, rtol, default=default, noise=_noise(matrix), sort=False)
    rows = picked.columns
    return _assemble(
        matrix,
        left=left[:, rows].T,
        right=right_t[rows],
        picked=picked,
        exponent=exponent,
        method="svd",
    )


@one_program
def eigh_extremes(symmetric: Float[Array, "d d"], *, rtol: float | None = None) -> Extremes:
    """Extreme singular triples of a symmetric matrix by its eigendecomposition.

    Singular values are |eigenvalues|; for a negative eigenvalue left = -right. About half the cost
    of the SVD with vectors. Only the symmetric part of the input is seen.

    Edge cases: as `svd_extremes`.

    Args:
      symmetric: symmetric, any float dtype.
      rtol: values at or below `rtol * largest` count as zero; d * eps if None.

    Returns:
      `Extremes` in the dtype of `symmetric`.

    Raises:
      ValueError: if `symmetric` is not square, is empty, or is not of float dtype.
    """
    symmetric = as_square(symmetric, name="symmetric")
    default = rank_rtol(symmetric.shape, symmetric.dtype)
    unit, exponent = _in_units(symmetric)
    values, vectors = jnp.linalg.eigh(unit)
    sizes, noise = jnp.abs(values), _noise(symmetric)
    picked = _pick_extremes(sizes, rtol, default=default, noise=noise, sort=True)
    right = vectors[:, picked.columns].T
    signs = jnp.where(values[picked.columns] < 0, -1, 1).astype(values.dtype)
    return _assemble(
        symmetric,
        left=right * signs[:, None],
        right=right,
        picked=picked,
        exponent=exponent,
        method="eigh",
    )


@one_program
def gram_extremes(features: Float[Array, "n d"], *, rtol: float | None = None) -> Extremes:
    """Extreme singular triples of `features` through its smaller Gram matrix.

    Works on X X^T [n, n] when n < d and on X^T X [d, d] otherwise: cubic cost in min(n, d) only,
    and the fastest dense path for a long or wide matrix. Squaring costs half the digits: a singular
    value below sqrt(eps) * largest is noise, and the default tolerance says so. Use `svd_extremes`
    when the smallest value matters beyond that.

    Edge cases: as `svd_extremes`.

    Args:
      features: any float dtype; rows are examples.
      rtol: values of X (not of the Gram matrix) at or below `rtol * largest` count as zero;
        sqrt(max(n, d) * eps) if None.

    Returns:
      `Extremes` of `features` itself. For those of the Gram matrix, square the values.

    Raises:
      ValueError: if `features` is not two-dimensional, is empty, or is not of float dtype.
    """
    features = as_matrix(features, name="features")
    n, d = features.shape
    default = math.sqrt(rank_rtol(features.shape, features.dtype))
    unit, exponent = _in_units(features)
    wide = n < d
    side = unit if wide else unit.T
    # Accelerators round float32 products by default, which would cost the other half of the digits.
    gram = jnp.matmul(side, side.T, precision="highest")
    squares, vectors = jnp.linalg.eigh(gram)
    values = jnp.sqrt(jnp.maximum(squares, 0))
    # Only the two extreme columns get their partner, a matvec each.
    noise = math.sqrt(_noise(features))
    picked = _pick_extremes(values, rtol, default=default, noise=noise, sort=True)
    near = vectors[:, picked.columns].T
    far = jnp.matmul(near, side, precision="highest")
    lengths = jnp.linalg.norm(far, axis=1, keepdims=True)
    far = jnp.where(lengths > 0, far / jnp.where(lengths > 0, lengths, 1), far)
    left, right = (near, far) if wide else (far, near)
    return _assemble(
        features, left=left, right=right, picked=picked, exponent=exponent, method="gram"
    )


def krylov_extremes(
    matvec: Callable[[Float[Array, "d"]], Float[Array, "d"]],
    dim: int,
    rng_key: Array,
    *,
    steps: int = 128,
    rtol: float | None = None,
    residual_rtol: float | None = None,
    dtype: jnp.dtype | None = None,
) -> Extremes:
    """Extreme singular triples of a symmetric operator by Lanczos, fully reorthogonalised.

    Stops when the residual |beta_m y_m| of both extreme Ritz pairs is at most `residual_rtol`
    times their own value and none can lie beyond them, or after `steps` matvecs. `converged`
    reports that (passed, too, once the whole space is spanned, steps = dim), the residuals taken
    with the operator itself on the pairs that are returned, and that what the tolerance left out is
    known to be below it. A residual proves that an eigenvalue is near, not that it is the extreme
    one: an eigenvector of which the start has next to nothing stays unseen. So `converged` asks
    that an eigenvalue a thirty-second of its value further out (for the smallest: further in, down
    to the tolerance) would have needed a start with a chance below one in a million. The largest
    value is right within some tens of steps; the smallest one is an over-estimate until converged,
    and for kappa above about (steps / 25)^2 it does not converge unless a gap sets it apart: use
    `inverse_krylov_extremes`, a dense path, or the bounds of `operator_condition_number`. On
    breakdown (an invariant subspace) it goes on from a fresh random direction.

    The operator should be positive semi-definite; of an indefinite one the smallest |eigenvalue| is
    interior to the spectrum and rarely converges. `rank` counts Ritz values above the tolerance:
    a lower bound on the rank, exact once the whole space is spanned.

    Differentiable in whatever arrays `matvec` closes over (one extra matvec per extreme).

    Args:
      matvec: v [d] -> A v [d], symmetric, traceable.
      dim: the length d.
      rng_key: for the start vector and restarts.
      steps: cap on the number of matvecs; no more than `dim` are used. Memory is steps * dim.
      rtol: values at or below `rtol * largest` count as zero; if None, dim * eps, and at least
        four times what rounding does to a product: (16 + 6 sqrt(dim)) eps.
      residual_rtol: see above; sqrt(eps) if None, which leaves the values right to about eps over
        their relative gap, and to sqrt(eps) at worst.
      dtype: of the vectors; the default float dtype if None.

    Returns:
      `Extremes` in `dtype`; left and right vectors agree up to the sign of the eigenvalue.

    Raises:
      ValueError: `matvec` is no function or `rng_key` no key, `dim` or `steps` is below 1, `dtype`
        is not a float dtype, or `matvec` returns something else than a float vector [d].
    """
    check_function(matvec, "matvec")
    check_key(rng_key)
    dtype = vector_dtype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    goal = eps**0.5 if residual_rtol is None else residual_rtol
    noise = matvec_noise(dim, dtype)
    # A zero comes out as at most one `noise`, with a residual of another: below it all the same.
    default = max(dim * eps, 4 * noise)

    def pick(values, known):
        sizes = jnp.where(known, jnp.abs(values), -1)
        return _pick_extremes(sizes, rtol, default=default, noise=noise, sort=True)

    def accept(ritz, exponent):
        del exponent  # ratios alone
        picked = pick(ritz.values, ritz.known)
        largest, smallest = picked.values
        # What counts as zero must be known to be below the tolerance.
        sizes = jnp.abs(ritz.values)
        dismissed = ritz.known & (sizes <= picked.tolerance)
        below = ~dismissed | (sizes + ritz.residuals + noise * largest <= picked.tolerance)
        near = jnp.all(ritz.residuals[picked.columns] <= goal * picked.values)
        least = jnp.maximum(picked.tolerance, noise * largest)
        within = jnp.maximum((1 - SLACK) * smallest, least)
        return near & jnp.all(below) & _none_beyond(ritz, largest, inside=(least, within))

    run = lanczos_in_units(
        lambda v: (matvec(v), jnp.ones((), bool)),
        dim,
        rng_key,
        steps=steps,
        dtype=dtype,
        stop_fn=accept,
    )
    space, exponent = run.space, run.exponent
    picked = pick(space.values, space.known)
    vectors = space.ritz_vectors(picked.columns)
    unit = in_units(lambda v: matvec(v).astype(dtype), exponent)
    images = jnp.stack([unit(v) for v in vectors])
    values, residuals = _rayleigh(vectors, images)
    allowed = goal * jnp.abs(values) + 2 * noise * picked.values[0]
    passed = (run.accepted | (space.size == dim)) & jnp.all(residuals <= allowed)
    # Hellmann-Feynman: the Rayleigh quotient on a constant vector has the right first derivative.
    signs = jnp.where(lax.stop_gradient(values) < 0, -1, 1).astype(dtype)
    return _with_values(
        times_power_of_two(jnp.append(signs * values, picked.tolerance), exponent),
        left=vectors * signs[:, None],
        right=vectors,
        picked=picked._replace(certain=picked.certain & passed),
        method="krylov",
    )


def inverse_krylov_extremes(
    matrix: Float[Array, "d d"],
    rng_key: Array,
    *,
    steps: int = 64,
    residual_rtol: float | None = None,
) -> Extremes:
    """Extremes of a positive definite matrix: Lanczos on A, and on A^{-1} through Cholesky.

    The fast path when both extremes are wanted and d is some hundreds or more: 4 to 8 times cheaper
    than the eigendecomposition. The smallest eigenvalue is the largest of the inverse, where
    Lanczos converges quickly. Relative accuracy of the smallest value is about d * eps * kappa.

    Edge cases: a matrix that is not numerically positive definite has no Cholesky factor: the
    values are NaN, the rank 0 and `converged` False. Where the smallest value comes out at or below
    the tolerance it is an upper bound in rounding, the rank (which this path cannot count) reads 0
    and `converged` False. Fall back to `eigh_extremes`.

    Args:
      matrix: symmetric positive definite, any float dtype.
      rng_key: for the start vectors.
      steps: cap on the Lanczos steps of each of the two runs.
      residual_rtol: as in `krylov_extremes`, for each extreme of its own operator.

    Returns:
      `Extremes` in the dtype of `matrix`; rank d (or 0, see above), tolerance d * eps * largest.

    Raises:
      ValueError: if `matrix` is not square, is empty, or is not of float dtype.
    """
    matrix = as_square(matrix)
    d = matrix.shape[0]
    unit, exponent = _in_units(matrix)
    factor = jnp.linalg.cholesky(unit)
    check_key(rng_key)
    top_key, bottom_key = jax.random.split(rng_key)

    def multiply(v):
        return jnp.matmul(unit, v, precision="highest"), jnp.ones((), bool)

    def solve(v):
        half = jax.scipy.linalg.solve_triangular(factor, v, lower=True)
        solution = jax.scipy.linalg.solve_triangular(factor, half, lower=True, trans=1)
        return solution, jnp.ones((), bool)

    goal = _residual_goal(residual_rtol, matrix.dtype)
    top, top_run, _ = _dominant(multiply, d, top_key, steps, goal, matrix.dtype)
    bottom, bottom_run, _ = _dominant(solve, d, bottom_key, steps, goal, matrix.dtype)
    vectors = jnp.stack([top, bottom])
    values, residuals = _rayleigh(vectors, jnp.matmul(vectors, unit.T, precision="highest"))
    noise = _noise(matrix) * values[0]
    tolerance = rank_rtol(matrix.shape, matrix.dtype) * values[0]
    definite = jnp.all(jnp.isfinite(factor))
    passed = jnp.all(residuals <= goal * values + 2 * noise) & (values[1] > CERTAIN * noise)
    picked = _Picked(
        columns=jnp.arange(2),
        values=jnp.where(definite, values, jnp.nan),
        rank=jnp.where(definite & (values[1] > tolerance), d, 0).astype(jnp.int32),
        tolerance=tolerance,
        certain=definite & passed & top_run.accepted & bottom_run.accepted,
    )
    return _assemble(
        matrix,
        left=vectors,
        right=vectors,
        picked=picked,
        exponent=exponent,
        method="inverse_krylov",
    )


class OperatorExtremes(NamedTuple):
    """Extreme eigenvalues of S = A + damping I with what is proven about them.

    `largest`, `smallest` are Rayleigh quotients v^T S v of the unit vectors, and the residuals
    |S v - (v^T S v) v| are taken with S itself, however the vectors were found. So, to rounding:
    the true largest eigenvalue is at least `largest`; the true smallest one is at most `smallest`
    and, A being positive semi-definite, at least the damping; S has an eigenvalue within the
    residual of each; log kappa(S) >= log(largest / smallest). That no eigenvalue lies beyond is
    likely where it converged, not proven; `operator_condition_number(..., inverse_matvec=...)`
    gives bounds.

    `..._converged`: the residual is at most `residual_rtol` times the value, and an eigenvalue
    beyond it by a thirty-second would have needed a start with a chance below one in a million
    (`krylov_extremes`); for `smallest`, too, every solve reached its tolerance and met positive
    curvature alone, so that what was iterated on is the inverse of a positive definite operator.
    """

    largest: Float[Array, ""]
    smallest: Float[Array, ""]
    largest_vector: Float[Array, "d"]
    smallest_vector: Float[Array, "d"]
    largest_residual: Float[Array, ""]
    smallest_residual: Float[Array, ""]
    largest_converged: Bool[Array, ""]
    smallest_converged: Bool[Array, ""]


def damped_operator_extremes(
    matvec: Callable[[Float[Array, "d"]], Float[Array, "d"]],
    dim: int,
    rng_key: Array,
    *,
    damping: float | Float[Array, ""],
    steps: int = 64,
    solve_steps: int = 1000,
    residual_rtol: float | None = None,
    dtype: jnp.dtype | None = None,
) -> OperatorExtremes:
    r"""Both extremes of A + damping I where no d x d matrix can be held: Lanczos on it and on its
    inverse, the inverse by conjugate gradients.

    Largest memory: the Krylov basis, (steps + 1) x d. Where A = X^T X / n with n < d no iteration
    is needed: the smallest eigenvalue is the damping exactly, and the n x n side
    (`gram_extremes`, `jaximm.hessians.dual_gram`) has the rest.

    Edge cases: a solve that falls short of its tolerance costs convergence, not the guarantee:
    `smallest_converged` is then False, as it is for an A that is not semi-definite. NaN gives NaN
    and False.

    Args:
      matvec: v [d] -> A v [d], symmetric positive semi-definite, traceable, undamped. It may hold
        arrays that are spread over devices.
      dim: the length d.
      rng_key: for the start vectors.
      damping: lam > 0 in units of A; may be traced.
      steps: cap on the Lanczos steps of each of the two runs.
      solve_steps: cap on the matvecs of one solve, of which the second run makes one a step; about
        20 sqrt(kappa) in float64.
      residual_rtol: see `OperatorExtremes`; sqrt(eps) if None, the value then being right to about
        eps over its relative gap.
      dtype: of the vectors; the default float dtype if None.

    Returns:
      `OperatorExtremes` in `dtype`. Not differentiable.

    Raises:
      ValueError: `matvec` is no function or `rng_key` no key; `dim`, `steps` or `solve_steps` below
        1, a damping that is not > 0, or a `dtype` that is not a float dtype.
    """
    check_function(matvec, "matvec")
    check_key(rng_key)
    check_operator_sizes(dim, min(steps, solve_steps))
    if isinstance(damping, int | float) and not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping}; use krylov_extremes without it.")
    dtype = vector_dtype(dtype)
    goal = _residual_goal(residual_rtol, dtype)
    lam = jnp.asarray(damping).astype(dtype)

    def damped(v):
        return matvec(v).astype(dtype) + lam * v

    # A pair good to goal for the inverse may have a residual goal * kappa times its value for S,
    # so the second run is asked for more than it is judged by.
    stricter = max(goal * 1e-2, 4 * float(jnp.finfo(dtype).eps))
    top_key, bottom_key = jax.random.split(rng_key)
    top, top_run, top_alone = _dominant(
        lambda v: (damped(v), jnp.ones((), bool)), dim, top_key, steps, goal, dtype
    )
    exponent = top_run.exponent
    unit = in_units(damped, exponent)

    def inverse(v):
        v = as_varying_as(v, lax.stop_gradient(top[0]))
        return conjugate_gradients(unit, v, steps=solve_steps, rtol=None)

    bottom, bottom_run, bottom_alone = _dominant(inverse, dim, bottom_key, steps, stricter, dtype)
    vectors = jnp.stack([top, bottom])
    images = jnp.stack([unit(v) for v in vectors])
    values, residuals = _rayleigh(vectors, images)
    converged = residuals <= goal * values
    largest, smallest, *natural = times_power_of_two(jnp.append(values, residuals), exponent)
    return OperatorExtremes(
        largest=largest,
        smallest=smallest,
        largest_vector=top,
        smallest_vector=bottom,
        largest_residual=natural[0],
        smallest_residual=natural[1],
        largest_converged=converged[0] & top_alone,
        smallest_converged=converged[1] & bottom_alone & bottom_run.sound & (lam > 0),
    )


def log_kappa_shift_bound(
    *,
    largest: float | Float[Array, ""],
    smallest: float | Float[Array, ""] | None,
    error_norm: float | Float[Array, ""],
    damping: float | Float[Array, ""] = 0.0,
) -> Float[Array, ""]:
    r"""How far log kappa(X^T X + damping I) can move when X becomes X + E.

    By Weyl every singular value moves by at most e = |E|_2. With h(s) = log(max(s, 0)^2 + damping)
    the shift is then at most the larger of

        h(s_1 + e) - h(s_1) + h(s_k) - h(s_k - e)    (kappa rises)
        h(s_1) - h(s_1 - e) + h(s_k + e) - h(s_k)    (kappa falls)

    Without damping that is 2 log((1 + e / s_1) / (1 - e / s_k)), and +inf once e >= s_k: an error
    that reaches the smallest singular value leaves nothing of the measurement.

    Without damping s_k must be the k-th value on both sides: where a tolerance decides the rank,
    no value may lie within e (1 + tolerance) of it, or nothing is bounded.

    Args:
      largest: s_1 of X, a singular value (not its square).
      smallest: s_k of X, the smallest one that counts; None where fewer rows than features leave
        directions empty, whose eigenvalue is the damping before and after.
      error_norm: e >= |E|_2, in units of X.
      damping: lam >= 0 in units of X^T X: n times that of the mean convention. > 0 if `smallest`
        is None.

    Returns:
      Scalar >= 0 in nats, in the default float dtype.

    Raises:
      ValueError: `smallest` None without damping, or a negative damping.

    References:
      Golub and Van Loan, Matrix Computations (4th ed.), corollary 8.6.2.
    """
    if isinstance(damping, int | float) and (damping < 0 or (smallest is None and damping == 0)):
        raise ValueError(
            f"damping must be >= 0, and > 0 where directions are empty, got {damping}."
        )
    dtype = jnp.zeros(()).dtype
    top, e, lam = (jnp.asarray(a).astype(dtype) for a in (largest, error_norm, damping))
    root = jnp.sqrt(lam)

    def rise(s):
        """h(s + e) - h(s): the log of a ratio of sizes, whatever their scale."""
        h = jnp.hypot(s, root)
        return jnp.log1p((e / h) * ((2 * s + e) / h))

    def fall(s):
        """h(s) - h(s - e)."""
        h, by = jnp.hypot(s, root), jnp.minimum(e, s)
        share = (by / h) * ((2 * s - by) / h)
        far = jnp.log(h / jnp.hypot(s - by, root)) * 2
        return jnp.where(share < 0.5, -jnp.log1p(-jnp.minimum(share, 0.5)), far)

    up = 1 + 32 * jnp.finfo(dtype).eps  # a bound is rounded away from zero
    if smallest is None:
        return jnp.maximum(rise(top), fall(top)) * up
    bottom = jnp.asarray(smallest).astype(dtype)
    bound = jnp.maximum(rise(top) + fall(bottom), fall(top) + rise(bottom)) * up
    # Without damping log 0 - log 0 would be NaN.
    return jnp.where((lam == 0) & (bottom <= e), jnp.inf, bound)


def choose_method(shape: tuple[int, ...], *, symmetric: bool = False, accurate: bool = True) -> str:
    """The path that `singular_extremes` takes for a matrix of this shape, by name.

    "krylov" when min(n, d) > `EXACT_SIDE`; else "eigh" for a symmetric matrix; else "gram" when
    `accurate` is False and the sides differ by a factor `GRAM_ASPECT`; else "svd". It looks at the
    shape alone, so the answer is known before tracing.

    Args:
      shape: (n, d).
      symmetric: the caller's promise; needs n = d.
      accurate: False allows the Gram side, right to sqrt(eps) * largest only.

    Raises:
      ValueError: if `shape` is not (n, d) with n, d >= 1, or is symmetric and not square.

    >>> choose_method((5000, 128)), choose_method((5000, 128), accurate=False)
    ('svd', 'gram')
    >>> choose_method((784, 784), symmetric=True), choose_method((8192, 8192), symmetric=True)
    ('eigh', 'krylov')
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape must be (n, d) with n, d >= 1, got {tuple(shape)}.")
    if symmetric and shape[0] != shape[1]:
        raise ValueError(f"a symmetric matrix must be square, got shape {tuple(shape)}.")
    if min(shape) > EXACT_SIDE:
        return "krylov"
    if symmetric:
        return "eigh"
    if not accurate and max(shape) >= GRAM_ASPECT * min(shape):
        return "gram"
    return "svd"


@one_program
def singular_extremes(
    matrix: Float[Array, "n d"],
    *,
    symmetric: bool = False,
    accurate: bool = True,
    rtol: float | None = None,
    rng_key: Array | None = None,
    steps: int = 128,
) -> Extremes:
    """Extreme singular triples by the path that `choose_method` names; `method` reports it.

    On the Krylov path a matrix that is not promised symmetric is worked through the Gram operator
    of its smaller side, never formed: values below sqrt(eps) * largest are then noise.

    Args:
      matrix: any float dtype.
      symmetric: promise that `matrix` is symmetric.
      accurate: see `choose_method`.
      rtol: as in the function of the chosen path.
      rng_key: needed on the Krylov path only.
      steps: cap on the Krylov steps.

    Returns:
      `Extremes` of `matrix`.

    Raises:
      ValueError: on a bad shape or dtype, or if the Krylov path is chosen without `rng_key`.
    """
    matrix = as_matrix(matrix)
    method = choose_method(matrix.shape, symmetric=symmetric, accurate=accurate)
    if method == "svd":
        return svd_extremes(matrix, rtol=rtol)
    if method == "eigh":
        return eigh_extremes(matrix, rtol=rtol)
    if method == "gram":
        return gram_extremes(matrix, rtol=rtol)
    if rng_key is None:
        raise ValueError(
            f"shape {matrix.shape} takes the Krylov path, which needs rng_key=jax.random.key(...)."
        )
    check_key(rng_key)
    if symmetric:
        return krylov_extremes(
            lambda v: jnp.matmul(matrix, v, precision="highest"),
            matrix.shape[0],
            rng_key,
            steps=steps,
            rtol=rtol,
            dtype=matrix.dtype,
        )
    return _rectangular_krylov(matrix, rng_key, steps=steps, rtol=rtol)


class _Picked(NamedTuple):
    """Columns (largest, smallest kept) of a list of singular values, with rank and tolerance."""

    columns: Int[Array, "2"]
    values: Float[Array, "2"]
    rank: Int[Array, ""]
    tolerance: Float[Array, ""]
    certain: Bool[Array, ""]


def _in_units(matrix: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Int[Array, ""]]:
    """The matrix over a power of two near its largest entry, constant under differentiation."""
    exponent = exponent_of(matrix)
    return times_power_of_two(lax.stop_gradient(matrix), -exponent), exponent


def _noise(matrix) -> float:
    """What rounding does to a singular value, relative to the largest."""
    return matvec_noise(max(matrix.shape), matrix.dtype)


def _residual_goal(residual_rtol: float | None, dtype) -> float:
    return float(jnp.finfo(dtype).eps) ** 0.5 if residual_rtol is None else residual_rtol


def _rayleigh(vectors: Float[Array, "c d"], images: Float[Array, "c d"]):
    """Rayleigh quotients of unit vectors and the residuals of both."""
    values = jnp.sum(vectors * images, axis=1)
    return values, jnp.linalg.norm(images - values[:, None] * vectors, axis=1)


def _pick_extremes(
    values: Float[Array, "k"], rtol: float | None, *, default: float, noise: float, sort: bool
) -> _Picked:
    """The largest of `values` and the smallest above `rtol * largest`; descending unless `sort`.

    `default`: rtol if that is None. `noise`: what rounding may have done to any of them, relative
    to the largest.
    """
    rtol = default if rtol is None else rtol
    first = jnp.argmax(values) if sort else jnp.zeros((), jnp.int32)
    largest = values[first]
    tolerance = rtol * largest
    kept = values > tolerance  # Not >=: a zero matrix would have full rank.
    rank = jnp.sum(kept).astype(jnp.int32)
    last = jnp.argmin(jnp.where(kept, values, jnp.inf)) if sort else jnp.maximum(rank - 1, 0)
    # largest * 0 and not 0, so that NaN stays NaN.
    smallest = jnp.where(rank > 0, values[last], largest * 0)
    # Half the default tolerance at most: what rounding makes of zero is not in doubt. With a
    # smaller one it is, since a value that is none may have come out as zero.
    doubt = jnp.minimum(noise, jnp.maximum(default, rtol) / 2) * largest
    certain = (rank == 0) | (smallest > CERTAIN * noise * largest)
    certain &= ~jnp.any(jnp.abs(values - tolerance) < doubt)
    columns = jnp.stack([first.astype(jnp.int32), last.astype(jnp.int32)])
    return _Picked(columns, jnp.stack([largest, smallest]), rank, tolerance, certain)


@jax.custom_jvp
def _held(matrix, values, left, right):
    """`values`, whose derivative is left^T d(matrix) right (vectors as rows)."""
    del matrix, left, right
    return values


@_held.defjvp
def _held_jvp(primals, tangents):
    _, values, left, right = primals
    slopes = jnp.sum(jnp.matmul(left, tangents[0], precision="highest") * right, axis=1)
    return values, slopes


def _assemble(matrix, *, left, right, picked, exponent, method) -> Extremes:
    """`Extremes` whose values carry the derivative left^T d(matrix) right (vectors as rows)."""
    # A value that is none has no slope. The inverse path's rank says whether it could count.
    counted = jnp.isfinite(picked.values) & ((picked.rank > 0) | (method == "inverse_krylov"))
    natural = times_power_of_two(jnp.append(picked.values, picked.tolerance), exponent)
    values = _held(matrix, natural[:2], jnp.where(counted[:, None], left, 0), right)
    return _with_values(
        jnp.append(values, natural[2]), left=left, right=right, picked=picked, method=method
    )


def _with_values(natural, *, left, right, picked, method) -> Extremes:
    """`Extremes` from (largest, smallest, tolerance) in units of the matrix, and vectors (rows)."""
    fixed = lax.stop_gradient(natural)
    return Extremes(
        largest=natural[0],
        smallest=natural[1],
        largest_left=left[0],
        largest_right=right[0],
        smallest_left=left[1],
        smallest_right=right[1],
        rank=picked.rank,
        tolerance=fixed[2],
        converged=picked.certain & jnp.all(jnp.isfinite(fixed)),
        method=jnp.asarray(METHODS.index(method), jnp.int32),
    )


def dominant_vector(
    matvec: Callable[[Float[Array, "d"]], Float[Array, "d"]],
    dim: int,
    rng_key: Array,
    steps: int,
    residual_rtol: float | None,
    dtype: jnp.dtype | None,
) -> tuple[Float[Array, "d"], Bool[Array, ""]]:
    """Unit vector of the largest |eigenvalue| of a symmetric operator, and whether it is one.

    It is where Lanczos's residual, and that of the operator itself on the vector, is at most
    `residual_rtol` times the eigenvalue. The zero operator has any vector.

    Args:
      matvec: as in `krylov_extremes`.
      dim: the length d.
      rng_key: for the start vector.
      steps: cap on the matvecs; two more are made.
      residual_rtol: sqrt(eps) if None.
      dtype: of the vector; the default float dtype if None.

    Raises:
      ValueError: as `krylov_extremes`.
    """
    check_function(matvec, "matvec")
    check_key(rng_key)
    dtype = vector_dtype(dtype)
    goal = _residual_goal(residual_rtol, dtype)
    vector, run, _ = _dominant(
        lambda v: (matvec(v), jnp.ones((), bool)), dim, rng_key, steps, goal, dtype
    )
    image = in_units(lambda v: matvec(v).astype(dtype), run.exponent)(vector)
    values, residuals = _rayleigh(vector[None], lax.stop_gradient(image)[None])
    allowed = (goal + 2 * matvec_noise(dim, dtype)) * jnp.abs(values)
    return vector, run.accepted & (residuals[0] <= allowed[0])


def _dominant(matvec, dim, rng_key, steps, goal, dtype) -> tuple[Any, Any, Bool[Array, ""]]:
    """The vector, by a matvec as in `lanczos_in_units`; the run, accepted if spanned; and whether
    nothing lies beyond its value, however near to an eigenvalue that is."""

    def dominant(ritz):
        return jnp.argmax(jnp.where(ritz.known, jnp.abs(ritz.values), -1))

    def accept(ritz, exponent):
        del exponent  # ratios alone
        top = dominant(ritz)
        largest = jnp.abs(ritz.values[top])
        return (ritz.residuals[top] <= goal * largest) & _none_beyond(ritz, largest)

    run = lanczos_in_units(matvec, dim, rng_key, steps=steps, dtype=dtype, stop_fn=accept)
    top, spanned = dominant(run.ritz), run.space.size == dim
    alone = spanned | _none_beyond(run.ritz, jnp.abs(run.ritz.values[top]))
    run = run._replace(accepted=run.accepted | spanned)
    return run.space.ritz_vectors(top[None])[0], run, alone


def _none_beyond(ritz: Ritz, largest, inside=()) -> Bool[Array, ""]:
    """No eigenvalue beyond +-`largest`, nor in size between the two of `inside`; of zero none."""
    sizes = jnp.stack([(1 + SLACK) * largest, *inside])
    return (largest == 0) | ritz.nothing_at(jnp.concatenate([sizes, -sizes]))


def _rectangular_krylov(matrix, rng_key, *, steps, rtol) -> Extremes:
    """Extremes of a large rectangular matrix through the Gram operator of its smaller side."""
    n, d = matrix.shape
    unit, exponent = _in_units(matrix)
    product = functools.partial(jnp.matmul, precision="highest")

    def gram_matvec(v):  # of the smaller side, without a transposed copy of the matrix
        return product(unit, product(v, unit)) if n < d else product(product(unit, v), unit)

    rtol = math.sqrt(rank_rtol(matrix.shape, matrix.dtype)) if rtol is None else rtol
    squared = krylov_extremes(
        gram_matvec, min(n, d), rng_key, steps=steps, rtol=rtol**2, dtype=matrix.dtype
    )
    near = jnp.stack([squared.largest_right, squared.smallest_right])
    far = product(near, unit) if n < d else product(near, unit.T)
    lengths = jnp.linalg.norm(far, axis=1)
    far = far / jnp.where(lengths > 0, lengths, 1)[:, None]
    left, right = (near, far) if n < d else (far, near)
    # The Gram operator sums over the longer side, which its matvec's own noise leaves out.
    certain = squared.converged & (lengths[1] ** 2 > CERTAIN * _noise(matrix) * lengths[0] ** 2)
    picked = _Picked(
        columns=jnp.arange(2),
        values=jnp.where(squared.rank > 0, lengths, lengths * 0),
        rank=squared.rank,
        tolerance=rtol * lengths[0],
        certain=certain | (squared.converged & (squared.rank == 0)),
    )
    return _assemble(
        matrix, left=left, right=right, picked=picked, exponent=exponent, method="krylov"
    )
