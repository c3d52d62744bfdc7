r"""The two condition-number regularisers, with derivatives in closed form.

For a symmetric ``S`` with singular values ``s_1 >= ... >= s_k > 0`` (k the number kept) and
eigenvectors ``v_i``, from Zheng et al. (2025), https://arxiv.org/abs/2505.23760 (equation 3, which
is Nenov et al. (2024), and equation 12):

    R_well(S) = s_1^2 / 2 - |S|_F^2 / (2k)            dR_well/dS = s_1 v_1 v_1^T - S / k
    R_ill(S)  = 1 / (|S|_F^2 / (2k) - s_k^2 / 2)      dR_ill/dS  = (s_k v_k v_k^T - S / k) R_ill^2

``|S|_F^2`` runs over the kept values, so both are functions of the kept spectrum alone and
``R_well >= 0``, with equality at kappa = 1, where ``R_ill`` has its pole. The derivative rules need
the extreme pair and S, never the derivative of an eigenvector, so they are finite where singular
values repeat; autodiff through an SVD is not. Forward and reverse mode, ``jit``, ``vmap`` and
``shard_map`` all work. Second derivatives are not promised: they go through the
eigendecomposition and are NaN where values tie.

Neither function is scale free: ``R_well(cS) = c^2 R_well(S)`` and ``R_ill(cS) = c^-2 R_ill(S)``.
``R_ill`` therefore also falls when S grows as a whole: read it beside kappa, never alone. It does
not tend to zero with kappa either: ``diag(1, e)`` with e -> 0 tends to 4. What does hold is

    log kappa <= (k / s_k^2) R_well       and       1 / log kappa <= s_1^2 R_ill.

**Which values are kept.** By default those above ``rtol * s_1`` with ``rtol = eps * d`` (of
``max(n, d)`` for features); what is dropped is then rounding. A larger ``rtol``, or ``rank`` = the
number to keep, cuts a real part of the spectrum off; R and its derivative then ignore that part.

**Cost.** One symmetric eigendecomposition and no more: [d, d] for a matrix, the smaller of [n, n]
and [d, d] for features. One value and gradient of ``ill_conditioning_of_features`` at n = 64,
d = 784 in float64 takes about 1 ms on one CPU core (``benchmarks/bench_regularisers.py``), against
some 50 ms through the [784, 784] matrix. Without ``jit``, tracing adds some 15 ms to every call.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

CONVENTIONS = ("mean", "sum")
"""``"mean"``: the Hessian is X^T X / n. ``"sum"``: it is X^T X."""


class _Cut(NamedTuple):
    """Which part of the spectrum is kept; hashable, so that it can be a static argument."""

    rtol: float | None
    rank: int | None


class _Spectrum(NamedTuple):
    """The kept spectrum of a symmetric matrix whose eigenbasis may be known only in part.

    ``values`` and ``vectors`` belong to the matrix that was decomposed. The full matrix has
    ``complement`` further eigenvalues, all equal to ``shift``.
    """

    values: Float[Array, "m"]  # signed eigenvalues, shift included
    vectors: Float[Array, "m m"]
    kept: Float[Array, "m"]  # 1 or 0
    complement: Float[Array, ""]  # kept eigenvalues outside `values`
    shift: Float[Array, ""]
    k: Float[Array, ""]  # number kept, at least 1
    largest: Float[Array, ""]
    smallest: Float[Array, ""]  # of the kept ones
    pole: Float[Array, ""]  # below this a difference of squares is rounding


def _spectrum(matrix, *, size: int, shift, default_rtol: float, cut: _Cut) -> _Spectrum:
    """Decompose ``matrix`` [m, m], the part of a [size, size] matrix outside ``shift * I``."""
    m = matrix.shape[0]
    values, vectors = jnp.linalg.eigh(matrix)
    shift = jnp.asarray(shift, values.dtype)
    values = values + shift
    sigma = jnp.abs(values)
    largest = jnp.max(sigma)
    if cut.rank is None:
        tolerance = largest * (default_rtol if cut.rtol is None else cut.rtol)
        kept = sigma > tolerance  # not >=: a zero matrix would have full rank
        complement = jnp.where(shift > tolerance, size - m, 0).astype(sigma.dtype)
    else:
        listed = min(cut.rank, m)
        order = jnp.argsort(-sigma)
        kept = jnp.zeros(m, bool).at[order[:listed]].set(True)
        complement = jnp.asarray(cut.rank - listed, sigma.dtype)
    smallest_listed = jnp.min(jnp.where(kept, sigma, jnp.inf))
    smallest = jnp.where(complement > 0, jnp.minimum(smallest_listed, shift), smallest_listed)
    count = jnp.sum(kept).astype(sigma.dtype) + complement
    return _Spectrum(
        values=values,
        vectors=vectors,
        kept=kept.astype(sigma.dtype),
        complement=complement,
        shift=shift,
        k=jnp.maximum(count, 1),
        largest=largest,
        smallest=jnp.where(count > 0, smallest, 0 * largest),  # 0 * NaN stays NaN
        pole=default_rtol * largest**2,
    )


def _mean_square_excess(spec: _Spectrum, reference: Array) -> Array:
    """``|S|_F^2 / k - reference^2`` over the kept values, without subtracting two large totals."""
    sigma = jnp.abs(spec.values)
    listed = jnp.sum(spec.kept * (sigma - reference) * (sigma + reference))
    outside = spec.complement * (spec.shift - reference) * (spec.shift + reference)
    return (listed + outside) / spec.k


def _one_hot_of(spec: _Spectrum, extreme: Array) -> Array:
    """A one at the kept value equal to ``extreme``; zeros if that value is outside the list."""
    sigma = jnp.where(spec.kept > 0, jnp.abs(spec.values), jnp.nan)
    match = sigma == extreme
    return (match & (jnp.arange(sigma.shape[0]) == jnp.argmax(match))).astype(sigma.dtype)


def _well_terms(spec: _Spectrum) -> tuple[Array, Array, Array]:
    """R_well, the position of its extreme value, and the factor before (extreme part - S/k)."""
    value = jnp.maximum(-_mean_square_excess(spec, spec.largest) / 2, 0)
    factor = jnp.where(jnp.isnan(value), jnp.nan, jnp.ones_like(value))  # NaN in, all NaN out
    return value, _one_hot_of(spec, spec.largest), factor


def _ill_terms(spec: _Spectrum) -> tuple[Array, Array, Array]:
    """The same for R_ill; the factor is returned as R_ill, to be applied twice."""
    excess = _mean_square_excess(spec, spec.smallest)
    at_pole = excess <= spec.pole  # False for NaN, which goes on as NaN
    value = jnp.where(at_pole, jnp.inf, 2 / jnp.where(at_pole, 1, excess))
    return value, _one_hot_of(spec, spec.smallest), jnp.where(at_pole, 0, value)


_TERMS = {"well": _well_terms, "ill": _ill_terms}


def _derivative_matrix(spec: _Spectrum, matrix, position, factor, cut: _Cut) -> Array:
    """``(s v v^T - S_kept / k) * factor^2`` on the space of ``matrix`` (S without its shift)."""
    v = spec.vectors @ position
    extreme = (jnp.sum(spec.values * position) * v)[:, None] * v[None, :]
    if cut == _Cut(None, None):  # what was dropped is rounding: S itself will do
        kept_part = matrix + spec.shift * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    else:
        weighted = spec.vectors * (spec.kept * spec.values)[None, :]
        kept_part = jnp.matmul(weighted, spec.vectors.T, precision="highest")
    # factor twice, not squared: squares of 1 / small number overflow float32 first.
    return ((extreme - kept_part / spec.k) * factor) * factor


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _of_matrix(hessian, kind: str, cut: _Cut):
    """R of a matrix."""
    return _of_matrix_terms(hessian, kind, cut)[1][0]


def _of_matrix_terms(hessian, kind, cut):
    d = hessian.shape[0]
    eps = float(jnp.finfo(hessian.dtype).eps)
    spec = _spectrum(hessian, size=d, shift=0.0, default_rtol=eps * d, cut=cut)
    return spec, _TERMS[kind](spec)


@_of_matrix.defjvp
def _of_matrix_jvp(kind, cut, primals, tangents):
    (hessian,), (hessian_dot,) = primals, tangents
    spec, (value, position, factor) = _of_matrix_terms(hessian, kind, cut)
    symmetric = (hessian + hessian.T) / 2  # eigh reads the symmetric part, so must this
    derivative = _derivative_matrix(spec, symmetric, position, factor, cut)
    return value, jnp.sum(derivative * hessian_dot)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _of_features(features, damping, kind: str, cut: _Cut):
    """R of X^T X / n + damping I."""
    return _of_features_terms(features, damping, kind, cut)[2][0]


def _of_features_terms(features, damping, kind, cut):
    n, d = features.shape
    eps = float(jnp.finfo(features.dtype).eps)
    rows_side = n < d
    factor = features if rows_side else features.T
    gram = jnp.matmul(factor, factor.T, precision="highest") / n
    spec = _spectrum(gram, size=d, shift=damping, default_rtol=eps * max(n, d), cut=cut)
    return gram, spec, _TERMS[kind](spec)


@_of_features.defjvp
def _of_features_jvp(kind, cut, primals, tangents):
    # dR/dX = (2/n) X G with G = dR/dS. On the n x n side the eigenvectors of S in the row space
    # are X^T u_i, up to scale, and X G = G_n X, where G_n is the same expression of X X^T / n.
    # The other eigenvectors w of S have X w = 0: they never enter, so that also where the
    # smallest kept value is the damping itself, only -S/k is left.
    (features, damping), (features_dot, damping_dot) = primals, tangents
    n, d = features.shape
    gram, spec, (value, position, factor) = _of_features_terms(features, damping, kind, cut)
    small = _derivative_matrix(spec, gram, position, factor, cut)
    left, right = (small, features) if n < d else (features, small)
    derivative = jnp.matmul(left, right, precision="highest") * (2 / n)
    # Along the damping S moves by I, so R by the trace of dR/dS, the part outside included.
    extreme = spec.largest if kind == "well" else spec.smallest
    total = jnp.sum(spec.kept * spec.values) + spec.complement * spec.shift
    trace = ((extreme - total / spec.k) * factor) * factor
    return value, jnp.sum(derivative * features_dot) + trace * damping_dot


def _check_dtype(name: str, array) -> None:
    if array.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {array.dtype}; cast it first "
            "(eigendecompositions exist only for these)."
        )


def _check_cut(rtol: float | None, rank: int | None, size: int) -> _Cut:
    if rtol is not None and rank is not None:
        raise ValueError("give rtol or rank, not both.")
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}.")
    if rank is not None and not 1 <= rank <= size:
        raise ValueError(f"rank must be between 1 and {size}, got {rank}.")
    return _Cut(None if rtol is None else float(rtol), None if rank is None else int(rank))


def _check_square(hessian) -> Array:
    hessian = jnp.asarray(hessian)
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.shape[0] == 0:
        raise ValueError(
            f"hessian must be a non-empty square [d, d] matrix, got shape {hessian.shape}; "
            "for features [n, d] use well_conditioning_of_features / ill_conditioning_of_features."
        )
    _check_dtype("hessian", hessian)
    return hessian


def _check_features(features, convention: str, damping) -> tuple[Array, Array]:
    features = jnp.asarray(features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features must be a non-empty [n, d] matrix, got shape {features.shape}.")
    _check_dtype("features", features)
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}.")
    if not isinstance(damping, Tracer) and not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}.")
    return features, jnp.asarray(damping, features.dtype)


def well_conditioning(
    hessian: Float[Array, "d d"], *, rtol: float | None = None, rank: int | None = None
) -> Float[Array, ""]:
    r"""Penalty that gets smaller as the condition number of ``hessian`` falls.

    R_well(S) = s_1^2 / 2 - |S|_F^2 / (2k), derivative s_1 v_1 v_1^T - S / k.

    Edge cases: zero for the zero matrix and for a multiple of the identity; NaN or inf in the
    matrix gives NaN. Where s_1 is repeated the derivative is that of one of the tied directions
    (so it is not zero at the identity, where the function has its kink and its minimum).

    Args:
      hessian: symmetric [d, d], float32 or float64; only the symmetric part is read. Meant for
        positive semi-definite matrices; for an indefinite one, singular values are ``|lambda_i|``.
      rtol: keep the singular values above ``rtol * s_1``; default ``eps * d``. A Python number.
      rank: keep this many of the largest instead. At most one of the two.

    Returns:
      Scalar of the same dtype, non-negative, in units of hessian^2.

    Raises:
      ValueError: not a non-empty square matrix, another dtype, or a senseless cut.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 3 (from Nenov et al., 2024,
      https://arxiv.org/abs/2410.00169).

    >>> float(well_conditioning(jnp.diag(jnp.array([3.0, 1.0]))))  # 9/2 - 10/4
    2.0
    """
    hessian = _check_square(hessian)
    return _of_matrix(hessian, "well", _check_cut(rtol, rank, hessian.shape[0]))


def ill_conditioning(
    hessian: Float[Array, "d d"], *, rtol: float | None = None, rank: int | None = None
) -> Float[Array, ""]:
    r"""Penalty that gets smaller as the condition number of ``hessian`` grows.

    R_ill(S) = 1 / (|S|_F^2 / (2k) - s_k^2 / 2), derivative (s_k v_k v_k^T - S / k) R_ill^2.

    Edge cases: +inf for the zero matrix, a multiple of the identity and any matrix of rank one or
    size one (kappa = 1 within rounding: the difference is below ``eps * d * s_1^2``); the
    derivative there is defined as zero, being unbounded nearby. NaN or inf in the matrix gives
    NaN. Where s_k is repeated the derivative is that of one of the tied directions.

    Args:
      hessian: as in `well_conditioning`.
      rtol: as in `well_conditioning`. It decides what s_k is.
      rank: as in `well_conditioning`.

    Returns:
      Scalar of the same dtype, positive, in units of 1 / hessian^2.

    Raises:
      ValueError: as in `well_conditioning`.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equations 12 and 13.

    >>> float(ill_conditioning(jnp.diag(jnp.array([3.0, 1.0]))))  # 1 / (10/4 - 1/2)
    0.5
    """
    hessian = _check_square(hessian)
    return _of_matrix(hessian, "ill", _check_cut(rtol, rank, hessian.shape[0]))


def well_conditioning_of_features(
    features: Float[Array, "n d"],
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
    rtol: float | None = None,
    rank: int | None = None,
) -> Float[Array, ""]:
    r"""`well_conditioning` of the l2-probe Hessian of ``features``, from its smaller side.

    R_well(S) with S = X^T X / n + damping I, derivative (2/n) X dR/dS. With n < d only an [n, n]
    matrix is formed and decomposed: the cost is cubic in min(n, d) and linear in max(n, d).

    **The number k.** The value is always that of `well_conditioning` on the [d, d] matrix, so k is
    the number of singular values of S above the tolerance. With n < d and no damping these are the
    (at most n) non-zero ones: k <= n. With n < d and damping above the tolerance, S has full rank:
    k = d, d - n of the values equal ``damping``, and so does s_k. Then s_k does not depend on X any
    more (`ill_conditioning_of_features` can only grow the rest). ``rank=n`` restricts both to the
    row space, with s_k the smallest eigenvalue there. For a linear backbone the damping belongs
    before the backbone: pass the factor ``[X / sqrt(n); sqrt(damping) I] @ theta`` with
    ``convention="sum"`` and no damping.

    The Gram matrix squares the singular values of X, so kappa(S) above ``1 / (eps max(n, d))`` is
    treated as a lower rank: use float64 where that matters.

    Edge cases: as in `well_conditioning`; one row without damping has k = 1, so R_well = 0.

    Args:
      features: X [n, d], float32 or float64.
      convention: ``"mean"`` or ``"sum"``: S, damping included, times n.
      damping: lam >= 0, in units of the mean-convention Hessian; a number, which may be traced.
      rtol: as in `well_conditioning`, default ``eps * max(n, d)``.
      rank: as in `well_conditioning`.

    Returns:
      Scalar of the same dtype, non-negative, in units of features^4.

    Raises:
      ValueError: not a non-empty matrix, another dtype, negative damping, an unknown convention,
        or a senseless cut.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 3 and theorem 4.2.

    >>> float(well_conditioning_of_features(jnp.diag(jnp.array([2.0, 1.0])), convention="sum"))
    3.75
    """
    features, damping = _check_features(features, convention, damping)
    cut = _check_cut(rtol, rank, features.shape[1])
    value = _of_features(features, damping, "well", cut)
    return value * features.shape[0] ** 2 if convention == "sum" else value


def ill_conditioning_of_features(
    features: Float[Array, "n d"],
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
    rtol: float | None = None,
    rank: int | None = None,
) -> Float[Array, ""]:
    r"""`ill_conditioning` of the l2-probe Hessian of ``features``, from its smaller side.

    R_ill(S) with S = X^T X / n + damping I, derivative (2/n) X dR/dS. Cost, the meaning of k, the
    arguments and the errors are those of `well_conditioning_of_features`.

    Edge cases: as in `ill_conditioning`; one row without damping has k = 1, so R_ill = inf, with a
    zero derivative.

    Returns:
      Scalar of the same dtype, positive, in units of 1 / features^4.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 12 and theorem 4.2.
    """
    features, damping = _check_features(features, convention, damping)
    cut = _check_cut(rtol, rank, features.shape[1])
    value = _of_features(features, damping, "ill", cut)
    return value / features.shape[0] ** 2 if convention == "sum" else value


def _kept_values(hessian, cut: _Cut) -> tuple[Array, Int[Array, ""]]:
    """Singular values in descending order and the number kept."""
    sigma = jnp.sort(jnp.abs(jnp.linalg.eigvalsh(hessian)))[::-1]
    if cut.rank is not None:
        return sigma, jnp.asarray(cut.rank)
    d = hessian.shape[0]
    rtol = float(jnp.finfo(hessian.dtype).eps) * d if cut.rtol is None else cut.rtol
    return sigma, jnp.sum(sigma > rtol * sigma[0])


def well_step_bound(
    hessian: Float[Array, "d d"], *, rtol: float | None = None, rank: int | None = None
) -> Float[Array, ""]:
    r"""Largest step for which lowering R_well is certain to lower kappa.

    With G = dR_well/dH, theta <- theta (I - 2 eta G) (the gradient step times K^{-1}) turns every
    eigenvalue h_i of H = theta^T K theta into h_i (1 - 2 eta g_i)^2. All but the largest grow, and
    for

        0 < eta <= (sqrt(s_1) - sqrt(s_2)) / (2 [(1 - 1/k) s_1^(3/2) + s_2^(3/2) / k])

    the largest shrinks and stays the largest (at the bound it meets the second), so kappa falls.
    Theorem 4.3 of the paper allows ``1 / ((1 - 1/k) s_1)`` where its second term is not smaller;
    at half of that the largest eigenvalue becomes zero, and kappa infinite.

    Edge cases: zero where s_1 is repeated (no step is certain); +inf for rank one and for the zero
    matrix (kappa is 1 and stays 1). NaN in gives NaN.

    Args:
      hessian: H, as in `well_conditioning`.
      rtol: as in `well_conditioning`.
      rank: as in `well_conditioning`.

    Returns:
      Scalar of the same dtype, in units of 1 / hessian.

    Raises:
      ValueError: as in `well_conditioning`.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, theorem 4.3 (1), with this bound.
    """
    hessian = _check_square(hessian)
    sigma, k = _kept_values(hessian, _check_cut(rtol, rank, hessian.shape[0]))
    if sigma.shape[0] == 1:
        return jnp.where(jnp.isnan(sigma[0]), jnp.nan, jnp.inf).astype(sigma.dtype)
    inverse_k = 1 / jnp.maximum(k, 1).astype(sigma.dtype)
    first, second = sigma[0], sigma[1]
    shrink = 2 * ((1 - inverse_k) * first * jnp.sqrt(first) + inverse_k * second * jnp.sqrt(second))
    nothing_to_lower = (k <= 1) & ~jnp.isnan(first)
    bound = (jnp.sqrt(first) - jnp.sqrt(second)) / jnp.where(nothing_to_lower, 1, shrink)
    return jnp.where(nothing_to_lower, jnp.inf, bound)


def ill_step_bound(
    hessian: Float[Array, "d d"], *, rtol: float | None = None, rank: int | None = None
) -> Float[Array, ""]:
    r"""Step below which lowering R_ill is certain to raise kappa.

    With G = dR_ill/dH and D = 1 / R_ill, theta <- theta (I - 2 eta G) shrinks s_k, without
    changing its sign, and grows every other eigenvalue, for

        0 < eta < D^2 / (2 s_k (1 - 1/k)).

    At the bound itself s_k becomes zero. The step printed in theorem 4.3 of the paper,
    ``D^2 / (1 - 2 s_k / k)``, has other units: it changes meaning with the scale of H, is negative
    for s_k > k/2, and for some matrices lowers kappa.

    Edge cases: zero at the pole of R_ill (kappa = 1, rank one, the zero matrix). NaN in gives NaN.

    Args:
      hessian: H, as in `well_conditioning`.
      rtol: as in `well_conditioning`.
      rank: as in `well_conditioning`.

    Returns:
      Scalar of the same dtype, in units of hessian^3.

    Raises:
      ValueError: as in `well_conditioning`.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, theorem 4.3 (2), with this bound.
    """
    hessian = _check_square(hessian)
    cut = _check_cut(rtol, rank, hessian.shape[0])
    value = _of_matrix(hessian, "ill", cut)
    sigma, k = _kept_values(hessian, cut)
    smallest = sigma[jnp.maximum(k, 1) - 1]
    at_pole = jnp.isinf(value)
    inverse_k = 1 / jnp.maximum(k, 1).astype(sigma.dtype)
    shrink = 2 * smallest * (1 - inverse_k)
    return jnp.where(at_pole, 0, 1 / (jnp.where(at_pole, 1, value) ** 2 * shrink))
