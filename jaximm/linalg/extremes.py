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

Definitions: Golub and Van Loan, Matrix Computations (4th ed.), sections 2.4, 8.6 and 10.1;
Zheng et al. (2025), https://arxiv.org/abs/2505.23760, whose regularisers need these triples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaximm.linalg.lanczos import conjugate_gradient_inverse, lanczos

METHODS = ("svd", "eigh", "gram", "krylov", "inverse_krylov")
"""Names behind the integer code `Extremes.method`."""

EXACT_SIDE = 2048
"""Longest smaller side that a dense factorisation gets from `choose_method`.

Measured on one CPU core in float64: eigh takes 0.9 s and the SVD with vectors 2.6 s at 2048; at
4096 they take 8 s and 21 s, Lanczos with 32 steps 0.14 s.
"""

GRAM_ASPECT = 4
"""Least ratio of the sides at which `choose_method(accurate=False)` takes the Gram side."""


class Extremes(NamedTuple):
    """Extreme singular triples of an [n, d] matrix; of a symmetric one, n = d.

    `largest`, `smallest`: the largest singular value and the smallest one above `tolerance`; both
    0 for a zero matrix. `largest_left` [n], `largest_right` [d], `smallest_left`,
    `smallest_right`: unit vectors, `matrix @ right = value * left`. `rank`: number of values above
    `tolerance` (absolute, in units of the matrix). `converged`: False where an iteration fell
    short or the input was not finite. `method`: index into `METHODS`.

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

    >>> found = svd_extremes(jnp.diag(jnp.array([1.0, 4.0, 0.0])))
    >>> float(found.largest), float(found.smallest), int(found.rank)
    (4.0, 1.0, 2)
    """
    check_matrix(matrix)
    rtol = rank_rtol(matrix.shape, matrix.dtype) if rtol is None else rtol
    left, values, right_t = jnp.linalg.svd(lax.stop_gradient(matrix), full_matrices=False)
    return _from_triples(
        matrix, left=left, values=values, right=right_t.T, rtol=rtol, method="svd", sort=False
    )


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
    check_square(symmetric)
    rtol = rank_rtol(symmetric.shape, symmetric.dtype) if rtol is None else rtol
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(symmetric))
    signs = jnp.where(values < 0, -1, 1).astype(values.dtype)
    return _from_triples(
        symmetric,
        left=vectors * signs[None, :],
        values=jnp.abs(values),
        right=vectors,
        rtol=rtol,
        method="eigh",
        sort=True,
    )


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
    check_matrix(features)
    n, d = features.shape
    rtol = math.sqrt(rank_rtol(features.shape, features.dtype)) if rtol is None else rtol
    constant = lax.stop_gradient(features)
    wide = n < d
    side = constant if wide else constant.T
    # Accelerators round float32 products by default, which would cost the other half of the digits.
    gram = jnp.matmul(side, side.T, precision="highest")
    squares, vectors = jnp.linalg.eigh(gram)
    values = jnp.sqrt(jnp.maximum(squares, 0))
    # Only the two extreme columns get their partner, a matvec each.
    picked = _pick_extremes(values, rtol, sort=True)
    near = vectors[:, picked.columns].T
    far = jnp.matmul(near, side, precision="highest")
    lengths = jnp.linalg.norm(far, axis=1, keepdims=True)
    far = jnp.where(lengths > 0, far / jnp.where(lengths > 0, lengths, 1), far)
    left, right = (near, far) if wide else (far, near)
    return _assemble(features, left=left, right=right, picked=picked, method="gram")


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
    times their own value, or after `steps` matvecs. `converged` reports that test (and is True
    once the whole space is spanned, steps = dim). A passed test proves that an eigenvalue lies
    within the residual, not that none lies beyond it. The largest value is right within some tens
    of steps; the smallest one is an over-estimate until converged, and for kappa above about
    (steps)^2 it does not converge: use `inverse_krylov_extremes`, a dense path, or the bounds of
    `operator_condition_number`. On breakdown (an invariant subspace) it goes on from a fresh random
    direction.

    The operator should be positive semi-definite; of an indefinite one the smallest |eigenvalue| is
    interior to the spectrum and rarely converges. `rank` counts Ritz values above the tolerance:
    a lower bound on the rank, exact once the whole space is spanned.

    Differentiable in whatever arrays `matvec` closes over (one extra matvec per extreme).

    Args:
      matvec: v [d] -> A v [d], symmetric, traceable.
      dim: the length d.
      rng_key: for the start vector and restarts.
      steps: cap on the number of matvecs; no more than `dim` are used. Memory is steps * dim.
      rtol: values at or below `rtol * largest` count as zero; dim * eps if None.
      residual_rtol: see above; sqrt(eps) if None, which leaves the values right to about eps.
      dtype: of the vectors; the default float dtype if None.

    Returns:
      `Extremes` in `dtype`; left and right vectors agree up to the sign of the eigenvalue.

    Raises:
      ValueError: if `dim` or `steps` is below 1.
    """
    if dim < 1 or steps < 1:
        raise ValueError(f"dim and steps must be at least 1, got dim={dim}, steps={steps}.")
    dtype = jnp.zeros((), dtype).dtype
    eps = float(jnp.finfo(dtype).eps)
    cutoff = dim * eps if rtol is None else rtol
    goal = eps**0.5 if residual_rtol is None else residual_rtol

    def accept(values, residuals, known):
        picked = _pick_extremes(jnp.where(known, jnp.abs(values), -1), cutoff, sort=True)
        return jnp.all(residuals[picked.columns] <= goal * picked.values)

    space = lanczos(matvec, dim, rng_key, steps=steps, dtype=dtype, stop_fn=accept)
    sizes = jnp.where(space.known, jnp.abs(space.values), -1)
    picked = _pick_extremes(sizes, cutoff, sort=True)
    vectors = space.ritz_vectors(picked.columns)
    passed = accept(space.values, space.residuals, space.known) | (space.size == dim)
    images = jnp.stack([matvec(v) for v in vectors])
    signs = jnp.where(space.values[picked.columns] < 0, -1, 1).astype(dtype)
    left = vectors * signs[:, None]
    # Hellmann-Feynman: the Rayleigh quotient on a constant vector has the right first derivative.
    return _with_values(
        jnp.sum(left * images, axis=1),
        left=left,
        right=vectors,
        picked=picked,
        converged=passed,
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
    values are NaN, the rank 0 and `converged` False. Fall back to `eigh_extremes`.

    Args:
      matrix: symmetric positive definite, any float dtype.
      rng_key: for the start vectors.
      steps: cap on the Lanczos steps of each of the two runs.
      residual_rtol: as in `krylov_extremes`, for each extreme of its own operator.

    Returns:
      `Extremes` in the dtype of `matrix`; rank d, tolerance d * eps * largest.

    Raises:
      ValueError: if `matrix` is not square, is empty, or is not of float dtype.
    """
    check_square(matrix)
    d = matrix.shape[0]
    constant = lax.stop_gradient(matrix)
    factor = jnp.linalg.cholesky(constant)
    top_key, bottom_key = jax.random.split(rng_key)

    def solve(v):
        half = jax.scipy.linalg.solve_triangular(factor, v, lower=True)
        return jax.scipy.linalg.solve_triangular(factor, half, lower=True, trans=1)

    top, top_passed = dominant_vector(
        lambda v: constant @ v, d, top_key, steps, residual_rtol, matrix.dtype
    )
    bottom, bottom_passed = dominant_vector(
        solve, d, bottom_key, steps, residual_rtol, matrix.dtype
    )
    vectors = jnp.stack([top, bottom])
    values = jnp.sum(vectors * (vectors @ matrix), axis=1)
    definite = jnp.all(jnp.isfinite(factor))
    fixed = lax.stop_gradient(values)
    picked = _Picked(
        columns=jnp.arange(2),
        values=fixed,
        rank=jnp.where(definite, d, 0).astype(jnp.int32),
        tolerance=rank_rtol(matrix.shape, matrix.dtype) * fixed[0],
    )
    return _with_values(
        jnp.where(definite, values, jnp.nan),
        left=vectors,
        right=vectors,
        picked=picked,
        converged=definite & top_passed & bottom_passed,
        method="inverse_krylov",
    )


class OperatorExtremes(NamedTuple):
    """Extreme eigenvalues of S = A + damping I with what is proven about them.

    `largest`, `smallest` are Rayleigh quotients v^T S v of the unit vectors, and the residuals
    |S v - (v^T S v) v| are taken with S itself, however the vectors were found. So, to rounding:
    the true largest eigenvalue is at least `largest`; the true smallest one is at most `smallest`
    and, A being positive semi-definite, at least the damping; S has an eigenvalue within the
    residual of each; log kappa(S) >= log(largest / smallest). That no eigenvalue lies beyond is not
    proven: `operator_condition_number(..., inverse_matvec=...)` bounds it in probability.

    `..._converged`: the residual is at most `residual_rtol` times the value.
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
    `smallest_converged` is then False. NaN gives NaN and False.

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
      ValueError: `dim`, `steps` or `solve_steps` below 1, or a damping that is not > 0.
    """
    if dim < 1 or steps < 1:
        raise ValueError(f"dim and steps must be at least 1, got dim={dim}, steps={steps}.")
    if isinstance(damping, int | float) and not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping}; use krylov_extremes without it.")
    dtype = jnp.zeros((), dtype).dtype
    goal = float(jnp.finfo(dtype).eps) ** 0.5 if residual_rtol is None else residual_rtol
    lam = jnp.asarray(damping, dtype)

    def damped(v):
        return matvec(v) + lam * v

    inverse = conjugate_gradient_inverse(matvec, damping=lam, steps=solve_steps)
    # A pair good to goal for the inverse may have a residual goal * kappa times its value for S,
    # so the second run is asked for more than it is judged by.
    stricter = max(goal * 1e-2, 4 * float(jnp.finfo(dtype).eps))
    top_key, bottom_key = jax.random.split(rng_key)
    top, _ = dominant_vector(damped, dim, top_key, steps, goal, dtype)
    bottom, _ = dominant_vector(inverse, dim, bottom_key, steps, stricter, dtype)
    found = []
    for vector in (top, bottom):
        image = damped(vector)
        value = jnp.matmul(vector, image, precision="highest")
        residual = jnp.linalg.norm(image - value * vector)
        found.append((value, residual, residual <= goal * value))
    return OperatorExtremes(
        largest=found[0][0],
        smallest=found[1][0],
        largest_vector=top,
        smallest_vector=bottom,
        largest_residual=found[0][1],
        smallest_residual=found[1][1],
        largest_converged=found[0][2],
        smallest_converged=found[1][2],
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

    def log_eigenvalue(s):
        return jnp.log(jnp.maximum(s, 0) ** 2 + lam)

    def moved(s, by):
        return log_eigenvalue(s + by) - log_eigenvalue(s)

    rise, fall = moved(top, e), -moved(top, -e)
    if smallest is None:
        return jnp.maximum(rise, fall)
    bottom = jnp.asarray(smallest).astype(dtype)
    bound = jnp.maximum(rise - moved(bottom, -e), fall + moved(bottom, e))
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
    check_matrix(matrix)
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
    if symmetric:
        return krylov_extremes(
            lambda v: matrix @ v,
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


def _pick_extremes(values: Float[Array, "k"], rtol: float, *, sort: bool) -> _Picked:
    """The largest of `values` and the smallest above `rtol * largest`; descending unless `sort`."""
    first = jnp.argmax(values) if sort else jnp.zeros((), jnp.int32)
    largest = values[first]
    tolerance = rtol * largest
    kept = values > tolerance  # Not >=: a zero matrix would have full rank.
    rank = jnp.sum(kept).astype(jnp.int32)
    last = jnp.argmin(jnp.where(kept, values, jnp.inf)) if sort else jnp.maximum(rank - 1, 0)
    # largest * 0 and not 0, so that NaN stays NaN.
    smallest = jnp.where(rank > 0, values[last], largest * 0)
    columns = jnp.stack([first.astype(jnp.int32), last.astype(jnp.int32)])
    return _Picked(columns, jnp.stack([largest, smallest]), rank, tolerance)


def _from_triples(matrix, *, left, values, right, rtol, method, sort) -> Extremes:
    """`Extremes` from a full set of singular triples (vectors as columns)."""
    picked = _pick_extremes(values, rtol, sort=sort)
    rows = picked.columns
    return _assemble(
        matrix, left=left[:, rows].T, right=right[:, rows].T, picked=picked, method=method
    )


def _assemble(matrix, *, left, right, picked, method) -> Extremes:
    """`Extremes` whose values carry the derivative left^T d(matrix) right (vectors as rows)."""
    # The difference is exactly zero: value from the decomposition, derivative from the vectors.
    change = matrix - lax.stop_gradient(matrix)
    slopes = jnp.sum((left @ change) * right, axis=1)
    slopes = jnp.where(picked.rank > 0, slopes, 0)
    converged = jnp.all(jnp.isfinite(picked.values))
    return _with_values(
        picked.values + slopes,
        left=left,
        right=right,
        picked=picked,
        converged=converged,
        method=method,
    )


def _with_values(values, *, left, right, picked, converged, method) -> Extremes:
    """`Extremes` from the two values and vectors (rows: largest, smallest)."""
    zero_rank = picked.rank == 0
    smallest = jnp.where(zero_rank, values[0] * 0, values[1])
    return Extremes(
        largest=values[0],
        smallest=smallest,
        largest_left=left[0],
        largest_right=right[0],
        smallest_left=left[1],
        smallest_right=right[1],
        rank=picked.rank,
        tolerance=picked.tolerance,
        converged=converged & jnp.all(jnp.isfinite(lax.stop_gradient(values))),
        method=jnp.asarray(METHODS.index(method), jnp.int32),
    )


def dominant_vector(matvec, dim, rng_key, steps, residual_rtol, dtype):
    """Unit vector of the largest |eigenvalue|, and whether its residual passed."""
    goal = float(jnp.finfo(dtype).eps) ** 0.5 if residual_rtol is None else residual_rtol

    def accept(values, residuals, known):
        top = jnp.argmax(jnp.where(known, jnp.abs(values), -1))
        return residuals[top] <= goal * jnp.abs(values[top])

    space = lanczos(matvec, dim, rng_key, steps=steps, dtype=dtype, stop_fn=accept)
    top = jnp.argmax(jnp.where(space.known, jnp.abs(space.values), -1))
    passed = accept(space.values, space.residuals, space.known) | (space.size == dim)
    return space.ritz_vectors(top[None])[0], passed


def _rectangular_krylov(matrix, rng_key, *, steps, rtol) -> Extremes:
    """Extremes of a large rectangular matrix through the Gram operator of its smaller side."""
    n, d = matrix.shape
    constant = lax.stop_gradient(matrix)
    side = constant if n < d else constant.T  # [small, large]

    def gram_matvec(v):
        image = jnp.matmul(v, side, precision="highest")
        return jnp.matmul(side, image, precision="highest")

    rtol = math.sqrt(rank_rtol(matrix.shape, matrix.dtype)) if rtol is None else rtol
    squared = krylov_extremes(
        gram_matvec, min(n, d), rng_key, steps=steps, rtol=rtol**2, dtype=matrix.dtype
    )
    near = jnp.stack([squared.largest_right, squared.smallest_right])
    far = jnp.matmul(near, side, precision="highest")
    lengths = jnp.linalg.norm(far, axis=1)
    far = far / jnp.where(lengths > 0, lengths, 1)[:, None]
    left, right = (near, far) if n < d else (far, near)
    picked = _Picked(jnp.arange(2), lengths, squared.rank, rtol * lengths[0])
    found = _assemble(matrix, left=left, right=right, picked=picked, method="krylov")
    return found._replace(converged=found.converged & squared.converged)


def check_matrix(matrix) -> None:
    """Refuse what is not a non-empty two-dimensional float array."""
    if jnp.ndim(matrix) != 2 or 0 in jnp.shape(matrix):
        raise ValueError(
            f"matrix must be a non-empty (n, d) array, got shape {jnp.shape(matrix)}; "
            "use jax.vmap for a batch."
        )
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise ValueError(f"matrix must be of float dtype, got {matrix.dtype}; convert it first.")


def check_square(matrix) -> None:
    """Refuse what is not a non-empty square float array."""
    check_matrix(matrix)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square (d, d), got shape {matrix.shape}.")
