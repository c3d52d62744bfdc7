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
``shard_map``, with ``check_vma`` or without, all work. Second derivatives go through the
eigendecomposition: they are NaN where values tie.

Neither function is scale free: ``R_well(cS) = c^2 R_well(S)`` and ``R_ill(cS) = c^-2 R_ill(S)``.
``R_ill`` therefore also falls when S grows as a whole: read it beside kappa, never alone. It does
not tend to zero with kappa either: ``diag(1, e)`` with e -> 0 tends to 4. What does hold is

    log kappa <= (k / s_k^2) R_well       and       1 / log kappa <= s_1^2 R_ill.

**Scale.** Everything is computed of S over a power of two, so the laws above hold to the bit for c
a power of two, values and derivatives alike, wherever S and the result are normal numbers. A value
above them is inf, one below them is rounded to the nearest subnormal number; of derivatives, what
is below the normal numbers may be zero. A derivative that fits is right where its value does not.

**Dtypes.** float64, float32; float16 and bfloat16 are computed in float32, and the value is
float32 (a gradient has the dtype of what it is the gradient in). NumPy's float64 is float32 while
x64 is off.

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
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaximm.linalg.arrays import as_matrix, as_square, exponent_of, one_program, times_power_of_two

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


class _Problem(NamedTuple):
    """Which function of S; hashable, so that it can be a static argument."""

    kind: str  # a key of _DEGREE
    cut: _Cut
    sums: bool = False  # features only: S times n


_DEGREE = {"well": 2, "ill": -2, "well step": -1, "ill step": 3}
"""f(cS) = c^degree f(S)."""


def _matrix_terms(problem: _Problem, hessian) -> tuple[Array, tuple[Array, ...]]:
    """R of a matrix and its derivative."""
    spec = _matrix_spectrum(problem, hessian)
    value, position, factor = _TERMS[problem.kind](spec)
    symmetric = (hessian + hessian.T) / 2  # eigh reads the symmetric part, so must this
    return value, (_derivative_matrix(spec, symmetric, position, factor, problem.cut),)


def _matrix_spectrum(problem: _Problem, hessian) -> _Spectrum:
    d = hessian.shape[0]
    default_rtol = float(jnp.finfo(hessian.dtype).eps) * d
    return _spectrum(hessian, size=d, shift=0.0, default_rtol=default_rtol, cut=problem.cut)


def _features_terms(problem: _Problem, features, damping) -> tuple[Array, tuple[Array, ...]]:
    """R of X^T X / n + damping I and its derivatives."""
    # dR/dX = (2/n) X G with G = dR/dS. On the n x n side the eigenvectors of S in the row space
    # are X^T u_i, up to scale, and X G = G_n X, where G_n is the same expression of X X^T / n.
    # The other eigenvectors w of S have X w = 0: they never enter, so that also where the
    # smallest kept value is the damping itself, only -S/k is left.
    n, d = features.shape
    eps = float(jnp.finfo(features.dtype).eps)
    factor = features if n < d else features.T
    gram = jnp.matmul(factor, factor.T, precision="highest") / n
    spec = _spectrum(gram, size=d, shift=damping, default_rtol=eps * max(n, d), cut=problem.cut)
    value, position, factor = _TERMS[problem.kind](spec)
    small = _derivative_matrix(spec, gram, position, factor, problem.cut)
    left, right = (small, features) if n < d else (features, small)
    derivative = jnp.matmul(left, right, precision="highest") * (2 / n)
    # Along the damping S moves by I, so R by the trace of dR/dS, the part outside included.
    extreme = spec.largest if problem.kind == "well" else spec.smallest
    total = jnp.sum(spec.kept * spec.values) + spec.complement * spec.shift
    trace = ((extreme - total / spec.k) * factor) * factor
    times_n = float(n) ** _DEGREE[problem.kind] if problem.sums else 1.0
    return value * times_n, (derivative * times_n, trace * times_n)


def _step_terms(problem: _Problem, hessian) -> tuple[Array, tuple[Array, ...]]:
    """A step bound and its derivative."""
    bound = _STEPS[problem.kind]
    value, derivative = jax.value_and_grad(lambda h: bound(_matrix_spectrum(problem, h)))(hessian)
    return value, (derivative,)


def _well_step(spec: _Spectrum) -> Array:
    sigma = jnp.sort(jnp.abs(spec.values))
    if sigma.shape[0] == 1:
        return jnp.where(jnp.isnan(sigma[0]), jnp.nan, jnp.inf).astype(sigma.dtype)
    first, second = sigma[-1], sigma[-2]
    cubed = (1 - 1 / spec.k) * first * jnp.sqrt(first) + second * jnp.sqrt(second) / spec.k
    nothing_to_lower = (spec.k <= 1) & ~jnp.isnan(first)
    bound = (jnp.sqrt(first) - jnp.sqrt(second)) / jnp.where(nothing_to_lower, 1, 2 * cubed)
    return jnp.where(nothing_to_lower, jnp.inf, bound)


def _ill_step(spec: _Spectrum) -> Array:
    value = _ill_terms(spec)[0]
    at_pole = jnp.isinf(value)
    shrink = 2 * spec.smallest * (1 - 1 / spec.k)
    denominator = jnp.where(at_pole, 1, value) ** 2 * jnp.where(at_pole, 1, shrink)
    return jnp.where(at_pole, 0, 1 / denominator)


_STEPS = {"well step": _well_step, "ill step": _ill_step}


def _terms(problem: _Problem, operands: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    """Value, and one derivative for each of `operands`: (S,), or (X, damping)."""
    if len(operands) == 2:
        return _features_terms(problem, *operands)
    return (_step_terms if problem.kind in _STEPS else _matrix_terms)(problem, *operands)


# Scale. All of the above is computed of S / 2^e, its largest entry in [1, 2): nothing that is
# squared there overflows or underflows. f(S) = 2^(degree e) f(S / 2^e), and the m-th derivative has
# the degree less m. One that fits the dtype must not pass through one that does not: where R_well
# is 1e-50, no float32, its derivative 1e-25 is one. So powers of two are applied half before and
# half behind, and twice differentiable means two rules, here, instead of the chain rule.


class _Scales(NamedTuple):
    """Exponents of two."""

    units: tuple[Int[Array, ""], ...]  # of each operand
    value: Int[Array, ""]
    before: tuple[Int[Array, ""], ...]  # of each derivative, on the tangent
    behind: tuple[Int[Array, ""], ...]  # the rest of it


def _scales(problem: _Problem, operands: tuple[Array, ...]) -> _Scales:
    operands = tuple(lax.stop_gradient(operand) for operand in operands)
    if len(operands) == 2:  # S = X^T X / n + damping I, in the unit of the larger of the two
        features, damping = operands
        unit = exponent_of(jnp.maximum(jnp.max(jnp.abs(features)), jnp.sqrt(damping)))
        units = (unit, 2 * unit)
    else:
        units = (exponent_of(operands[0]),)
    value = _DEGREE[problem.kind] * units[-1]
    before = tuple((value - unit) // 2 for unit in units)
    behind = tuple(value - unit - half for unit, half in zip(units, before, strict=True))
    return _Scales(units, value, before, behind)


def _times(arrays: tuple[Array, ...], exponents: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(times_power_of_two, arrays, exponents))


def _in_units(operands: tuple[Array, ...], scales: _Scales) -> tuple[Array, ...]:
    return _times(operands, tuple(-unit for unit in scales.units))


def _at_scale(value: Array, exponent: Array) -> Array:
    """value * 2^exponent for a value that is not negative, rounded where that is subnormal."""
    # CPUs under XLA flush subnormal results of arithmetic to zero, so these are put together from
    # their bits: the multiple of the smallest number, as an integer.
    info = jnp.finfo(value.dtype)
    steps = times_power_of_two(value, exponent + (info.nmant - info.minexp))
    subnormal = steps < 2.0**info.nmant
    bits = jnp.round(jnp.where(subnormal, steps, 0)).astype(f"int{info.bits}")
    normal = times_power_of_two(value, exponent)
    return jnp.where(subnormal, lax.bitcast_convert_type(bits, value.dtype), normal)


def _directional(halves, tangents, scales: _Scales) -> Array:
    """The derivative along tangents."""
    moved = _times(tangents, scales.before)
    parts = [jnp.sum(half * dot) for half, dot in zip(halves, moved, strict=True)]
    return functools.reduce(jnp.add, parts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _homogeneous(problem: _Problem, operands: tuple[Array, ...]) -> Array:
    """R, or a step bound, of matrices of any scale."""
    scales = _scales(problem, operands)
    return _at_scale(_terms(problem, _in_units(operands, scales))[0], scales.value)


@_homogeneous.defjvp
def _homogeneous_jvp(problem, primals, tangents):
    (operands,), (operands_dot,) = primals, tangents
    value, halves = _with_derivative(problem, operands)
    return value, _directional(halves, operands_dot, _scales(problem, operands))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_derivative(problem: _Problem, operands: tuple[Array, ...]):
    """The value, and its derivatives without the factors 2^before."""
    scales = _scales(problem, operands)
    value, derivatives = _terms(problem, _in_units(operands, scales))
    return _at_scale(value, scales.value), _times(derivatives, scales.behind)


@_with_derivative.defjvp
def _with_derivative_jvp(problem, primals, tangents):
    (operands,), (operands_dot,) = primals, tangents
    scales = _scales(problem, operands)
    shift = scales.units[0] + (scales.behind[0] - scales.units[0]) // 2
    moved = _times(operands_dot, tuple(shift - unit for unit in scales.units))
    terms = functools.partial(_terms, problem)
    (value, derivatives), (_, derivatives_dot) = jax.jvp(
        terms, (_in_units(operands, scales),), (moved,)
    )
    halves = _times(derivatives, scales.behind)
    halves_dot = _times(derivatives_dot, tuple(half - shift for half in scales.behind))
    value_dot = _directional(halves, operands_dot, scales)
    return (_at_scale(value, scales.value), halves), (value_dot, halves_dot)


def _check_cut(rtol: float | None, rank: int | None, size: int) -> _Cut:
    if rtol is not None and rank is not None:
        raise ValueError("give rtol or rank, not both.")
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}.")
    if rank is not None and not 1 <= rank <= size:
        raise ValueError(f"rank must be between 1 and {size}, got {rank}.")
    return _Cut(None if rtol is None else float(rtol), None if rank is None else int(rank))


def _of_matrix(kind: str, hessian, rtol: float | None, rank: int | None) -> Array:
    hessian = as_square(hessian, name="hessian")
    return _homogeneous(_Problem(kind, _check_cut(rtol, rank, hessian.shape[0])), (hessian,))


def _of_features(kind: str, features, convention: str, damping, rtol, rank) -> Array:
    features = as_matrix(features, name="features")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}.")
    if jnp.ndim(damping) != 0:
        raise ValueError(f"damping must be one number, got shape {jnp.shape(damping)}.")
    if not isinstance(damping, Tracer) and not 0 <= damping < math.inf:
        raise ValueError(f"damping must be finite and >= 0, got {damping}.")
    problem = _Problem(kind, _check_cut(rtol, rank, features.shape[1]), convention == "sum")
    return _homogeneous(problem, (features, jnp.asarray(damping, features.dtype)))


@one_program
def well_conditioning(
    hessian: Float[Array, "d d"], *, rtol: float | None = None, rank: int | None = None
) -> Float[Array, ""]:
    r"""Penalty that gets smaller as the condition number of ``hessian`` falls.

    R_well(S) = s_1^2 / 2 - |S|_F^2 / (2k), derivative s_1 v_1 v_1^T - S / k.

    Edge cases: zero for the zero matrix and for a multiple of the identity; NaN or inf in the
    matrix gives NaN. Where s_1 is repeated the derivative is that of one of the tied directions
    (so it is not zero at the identity, where the function has its kink and its minimum).

    Args:
      hessian: symmetric [d, d], any float dtype; only the symmetric part is read. Meant for
        positive semi-definite matrices; for an indefinite one, singular values are ``|lambda_i|``.
      rtol: keep the singular values above ``rtol * s_1``; default ``eps * d``. A Python number.
      rank: keep this many of the largest instead. At most one of the two.

    Returns:
      Scalar of the computing dtype, non-negative, in units of hessian^2.

    Raises:
      ValueError: not a non-empty square matrix of a float dtype, or a senseless cut.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 3 (from Nenov et al., 2024,
      https://arxiv.org/abs/2410.00169).

    >>> float(well_conditioning(jnp.diag(jnp.array([3.0, 1.0]))))  # 9/2 - 10/4
    2.0
    """
    return _of_matrix("well", hessian, rtol, rank)


@one_program
def ill_conditioning(
    hessian: Float[Array, "d d"], *, rtol: float | None = None, rank: int | None = None
) -> Float[Array, ""]:
    r"""Penalty that gets smaller as the condition number of ``hessian`` grows.

    R_ill(S) = 1 / (|S|_F^2 / (2k) - s_k^2 / 2), derivative (s_k v_k v_k^T - S / k) R_ill^2.

    Edge cases: +inf for the zero matrix, a multiple of the identity and any matrix of rank one or
    size one (kappa = 1 within rounding: the difference is below ``eps * d * s_1^2``), and for a
    value above the dtype; at kappa = 1 the derivative, unbounded nearby, is defined as zero. NaN or
    inf in the matrix gives NaN. Where s_k is repeated the derivative is that of one of the tied
    directions.

    Args:
      hessian: as in `well_conditioning`.
      rtol: as in `well_conditioning`. It decides what s_k is.
      rank: as in `well_conditioning`.

    Returns:
      Scalar of the computing dtype, positive, in units of 1 / hessian^2.

    Raises:
      ValueError: as in `well_conditioning`.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equations 12 and 13.

    >>> float(ill_conditioning(jnp.diag(jnp.array([3.0, 1.0]))))  # 1 / (10/4 - 1/2)
    0.5
    """
    return _of_matrix("ill", hessian, rtol, rank)


@one_program
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
      features: X [n, d], any float dtype.
      convention: ``"mean"`` or ``"sum"``: S, damping included, times n.
      damping: lam >= 0, in units of the mean-convention Hessian; a number, which may be traced.
      rtol: as in `well_conditioning`, default ``eps * max(n, d)``.
      rank: as in `well_conditioning`.

    Returns:
      Scalar of the computing dtype, non-negative, in units of features^4.

    Raises:
      ValueError: not a non-empty matrix of a float dtype, damping that is not one number,
        finite and >= 0, an unknown convention, or a senseless cut.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 3 and theorem 4.2.

    >>> float(well_conditioning_of_features(jnp.diag(jnp.array([2.0, 1.0])), convention="sum"))
    3.75
    """
    return _of_features("well", features, convention, damping, rtol, rank)


@one_program
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
      Scalar of the computing dtype, positive, in units of 1 / features^4.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 12 and theorem 4.2.
    """
    return _of_features("ill", features, convention, damping, rtol, rank)


@one_program
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
      Scalar of the computing dtype, in units of 1 / hessian.

    Raises:
      ValueError: as in `well_conditioning`.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, theorem 4.3 (1), with this bound.
    """
    return _of_matrix("well step", hessian, rtol, rank)


@one_program
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
      Scalar of the computing dtype, in units of hessian^3.

    Raises:
      ValueError: as in `well_conditioning`.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, theorem 4.3 (2), with this bound.
    """
    return _of_matrix("ill step", hessian, rtol, rank)
