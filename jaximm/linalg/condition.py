r"""Condition numbers as log kappa, with bounds that hold, and the ratios built from them.

kappa(S) = sigma_max / sigma_min+, where sigma_min+ is the smallest singular value above the rank
tolerance. All logarithms are natural.

**Where the bounds come from.** A backward-stable SVD returns the exact singular values of S + E
with |E|_2 <= c eps |S|_2, so by Weyl every computed value is within r = c eps sigma_max of the
true one. Worst-case analysis gives c a low-degree polynomial in (n, d); rounding errors that
behave like independent ones accumulate as the square root of the number of operations per entry
(Higham and Mary 2019, https://doi.org/10.1137/18M1226312). This module takes

    c(n, d) = 4 + 1.5 sqrt(max(n, d)),    eps = spacing of the dtype at 1.

Largest error seen in float32 LAPACK against float64, over geometric, two-level, flat,
rank-deficient and positive matrices: 2.3 eps at 3 x 2, 3.8 at 8 x 8, 3.9 at 40 x 30, 4.6 at
100 x 100, 10.7 at 400 x 400, 3.3 at 5000 x 50, against c of 6.6, 8.2, 13, 19, 34 and 110. The
bounds are about the matrix as stored: an error made before, in forming it, is the caller's (a Gram
matrix loses half the digits, so use `feature_condition_number`).

    lower = log( (sigma_max - r) / (sigma_k + r) )
    upper = log( (sigma_max + r) / (sigma_k - r) )

**Rank.** A computed value that r cannot tell from zero may be a true zero, which kappa leaves out,
or a small true value, which decides it. So `lower` uses the smallest value that is surely counted,
and `upper` is +inf unless sigma_k surely differs from zero and whatever was left out is numerically
zero, at most `ZERO_NOISE` eps sigma_max (LAPACK returned at most 0.9 eps for exact zeros in those
runs). An `rtol` that the caller states defines kappa, so values surely below it may be left out
too. Beyond kappa = 1 / (4 eps) no computation in the dtype can tell a small value from zero: such a
matrix reads as unbounded, or as rank deficient, `rank` < min(n, d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaximm.linalg.extremes import check_matrix, rank_rtol
from jaximm.linalg.lanczos import KrylovSpace, lanczos

DOMINANCE = ("none", "damping", "rounding")
"""Names behind the integer code `Condition.dominated_by`."""

ZERO_NOISE = 4.0
"""Largest computed value, in eps * sigma_max, that is read as an exact zero."""


class Condition(NamedTuple):
    """log kappa in nats with bounds, `lower <= truth <= upper`; `upper` = +inf says unbounded.

    `rank`: number of singular values above `tolerance` (absolute, in units of the singular values
    of the array that was given), of the undamped matrix. `dominated_by`: index into `DOMINANCE`:
    "damping" when the damping is at least the smallest undamped eigenvalue and so decides kappa,
    "rounding" when round-off or an ambiguous rank makes the value no measurement.
    """

    log_kappa: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    rank: Int[Array, ""]
    tolerance: Float[Array, ""]
    dominated_by: Int[Array, ""]


class Ratio(NamedTuple):
    """A log ratio of two condition numbers in nats, `lower <= truth <= upper`."""

    log_ratio: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]


class RelativeImmunisation(NamedTuple):
    """`harmful` = log (i), `primary` = log (ii), `rir` = log RIR = log (i) - log (ii)."""

    harmful: Ratio
    primary: Ratio
    rir: Ratio


def rounding_radius(shape: tuple[int, ...], dtype: jnp.dtype) -> float:
    """c(n, d) * eps: bound on the error of a computed singular value, relative to sigma_max.

    Args:
      shape: shape of the matrix; its last two lengths count.
      dtype: a float dtype.

    >>> round(rounding_radius((100, 30), jnp.dtype("float64")) / 2.0**-52, 6)
    19.0
    """
    return (4 + 1.5 * math.sqrt(max(shape[-2:]))) * float(jnp.finfo(dtype).eps)


def condition_number(
    matrix: Float[Array, "n d"],
    *,
    rtol: float | None = None,
    damping: float | Float[Array, ""] = 0.0,
) -> Condition:
    r"""log kappa(S), or log kappa(S + damping I), with bounds that bracket the truth.

    Without damping: the pseudo-inverse form, kappa = sigma_1 / sigma_rank. With damping: S must be
    symmetric positive semi-definite, and every eigenvalue counts, kappa = (h_1 + lam)/(h_d + lam).

    Edge cases: a single row or column has kappa 1. A zero matrix has rank 0, log_kappa = upper =
    +inf and lower = 0 (with damping, kappa 1). NaN or inf gives NaN. The gradient is finite at
    repeated values (that of one of the tied directions); where `log_kappa` is inf it is 0.

    Args:
      matrix: any float dtype. Each kappa holds for the matrix as stored.
      rtol: values at or below `rtol * largest` count as zero; max(n, d) * eps if None.
      damping: lam >= 0 in units of the matrix; may be traced.

    Returns:
      `Condition` in the dtype of `matrix`.

    Raises:
      ValueError: if `matrix` is not a non-empty float (n, d) array, or is damped and not square,
        or if `damping` is a negative number.

    >>> found = condition_number(jnp.diag(jnp.array([100.0, 1.0])))
    >>> bool(found.lower <= jnp.log(100.0)) and bool(jnp.log(100.0) <= found.upper)
    True
    """
    check_matrix(matrix)
    _check_damping(damping)
    if not _is_zero(damping) and matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"damping needs a square positive semi-definite matrix, got shape {matrix.shape}; "
            "for features use feature_condition_number."
        )
    values = jnp.linalg.svd(matrix, compute_uv=False)
    radius = rounding_radius(matrix.shape, matrix.dtype) * values[0]
    plain = _bracket(values, radius, rtol, shape=matrix.shape, power=1)
    if _is_zero(damping):
        return plain
    lam = jnp.asarray(damping, matrix.dtype)
    bottom = values[-1]
    return _damped(
        plain,
        lam=lam,
        largest=values[0] + lam,
        smallest=bottom + lam,
        largest_bounds=(values[0] - radius + lam, values[0] + radius + lam),
        smallest_bounds=(_signed_floor(bottom, radius) + lam, bottom + radius + lam),
        undamped=bottom,
    )


def feature_condition_number(
    features: Float[Array, "n d"],
    *,
    rtol: float | None = None,
    damping: float | Float[Array, ""] = 0.0,
) -> Condition:
    r"""log kappa of the l2-probe Hessian H = X^T X / n, or of H + damping I, from X itself.

    Without damping: 2 log(sigma_1 / sigma_rank), sigma the singular values of X; never through the
    Gram matrix, so kappa(H) up to 1/eps^2 can be measured. With damping the eigenvalues are
    sigma_i^2 / n + lam, those of the augmented factor [X / sqrt(n); sqrt(lam) I], with sigma_i = 0
    for the d - n directions that n < d rows leave empty: those make kappa (h_1 + lam) / lam.

    Edge cases: as `condition_number`; n < d without damping gives the pseudo-inverse form of rank
    at most n.

    Args:
      features: any float dtype; rows are examples.
      rtol: singular values of X at or below `rtol * largest` count as zero; max(n, d) * eps if
        None. (Of H that is a relative tolerance of rtol^2.)
      damping: lam >= 0 in units of the mean-convention Hessian, feature^2; may be traced.

    Returns:
      `Condition` in the dtype of `features`; `tolerance` in units of the singular values of X.

    Raises:
      ValueError: if `features` is not a non-empty float (n, d) array, or if `damping` is negative.

    >>> found = feature_condition_number(jnp.diag(jnp.array([100.0, 1.0])))
    >>> round(float(found.log_kappa / jnp.log(100.0)), 4)
    2.0
    """
    check_matrix(features)
    _check_damping(damping)
    n, d = features.shape
    values = jnp.linalg.svd(features, compute_uv=False)
    radius = rounding_radius(features.shape, features.dtype) * values[0]
    plain = _bracket(values, radius, rtol, shape=features.shape, power=2)
    if _is_zero(damping):
        return plain
    lam = jnp.asarray(damping, features.dtype)

    def eigenvalue(sigma):
        return jnp.maximum(sigma, 0) ** 2 / n + lam

    bottom = values[-1] if n >= d else jnp.zeros_like(values[0])
    bottom_radius = radius if n >= d else jnp.zeros_like(radius)  # an empty direction is exact
    return _damped(
        plain,
        lam=lam,
        largest=eigenvalue(values[0]),
        smallest=eigenvalue(bottom),
        largest_bounds=(eigenvalue(values[0] - radius), eigenvalue(values[0] + radius)),
        smallest_bounds=(eigenvalue(bottom - bottom_radius), eigenvalue(bottom + bottom_radius)),
        undamped=bottom**2 / n,
    )


def operator_condition_number(
    matvec: Callable[[Float[Array, "d"]], Float[Array, "d"]],
    dim: int,
    rng_key: Array,
    *,
    steps: int = 128,
    rtol: float | None = None,
    damping: float | Float[Array, ""] = 0.0,
    positive_definite: bool = False,
    inverse_matvec: Callable[[Float[Array, "d"]], Float[Array, "d"]] | None = None,
    failure_probability: float = 1e-12,
    dtype: jnp.dtype | None = None,
) -> Condition:
    r"""log kappa of a positive semi-definite operator A (+ damping I): what m matvecs can prove.

    Ritz values lie inside the spectrum, so Lanczos alone proves a lower bound only: a true kappa of
    1e6 reads as 4e4 after 100 matvecs. `log_kappa` is that reading. `lower` uses, for sigma_min+:
    any Ritz value if A is positive definite (promised, damped, or with its inverse given), else
    only Ritz values whose residual interval excludes zero. `upper` is +inf unless something bounds
    both ends:

    - the whole space is spanned (steps >= dim): as the dense bounds;
    - otherwise, with a random start and m steps, the largest eigenvalue L is at most
      theta_max / (1 - e) except with probability at most `failure_probability` p, where
      e = (log(1.648 sqrt(d) / p) / (2 m - 1))^2 (Kuczynski and Wozniakowski 1992,
      https://doi.org/10.1137/0613066). The same on A^{-1}, if `inverse_matvec` is given, and on
      L I - A, bounds the smallest: the latter is of use when e * kappa < 1. Damping bounds it by
      lam.

    `dominated_by` is "rounding" only where round-off decides; upper = +inf alone says "not
    bounded".

    Args:
      matvec: v [d] -> A v [d], symmetric positive semi-definite, traceable, undamped.
      dim: the length d.
      rng_key: for the start vectors; consumed once.
      steps: cap on the matvecs (all are used, up to dim), and on those of the inverse.
      rtol: Ritz values at or below `rtol * largest` count as zero; dim * eps if None.
      damping: lam >= 0 in units of A; may be traced; added here, not by `matvec`.
      positive_definite: promise that A has no zero eigenvalue.
      inverse_matvec: v -> (A + damping I)^{-1} v, if there is one, at full accuracy.
      failure_probability: p, in (0, 1), of each use of the random-start bound.
      dtype: of the vectors; the default float dtype if None.

    Returns:
      `Condition`; `rank` counts Ritz values of A above `tolerance`: a lower bound on the rank,
      exact once the whole space is spanned. Not differentiable: all results are constants.

    Raises:
      ValueError: on dim or steps below 1, a negative damping, or a probability outside (0, 1).
    """
    if dim < 1 or steps < 1:
        raise ValueError(f"dim and steps must be at least 1, got dim={dim}, steps={steps}.")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be in (0, 1), got {failure_probability}.")
    _check_damping(damping)
    dtype = jnp.zeros((), dtype).dtype
    main_key, inverse_key = jax.random.split(rng_key)
    space = lanczos(matvec, dim, main_key, steps=steps, dtype=dtype)
    lam = lax.stop_gradient(jnp.asarray(damping, dtype))
    if steps >= dim:
        return _spanned(space, rtol=rtol, lam=lam)

    top = jnp.max(jnp.where(space.known, space.values, 0))
    lowest = jnp.min(jnp.where(space.known, space.values, jnp.inf))
    relative_radius = rounding_radius((dim, dim), dtype)
    radius = relative_radius * top
    tolerance = (rank_rtol((dim,), dtype) if rtol is None else rtol) * top
    counted = space.known & (space.values > tolerance)
    definite = (lam > 0) | positive_definite | (inverse_matvec is not None)
    shortfall = _random_start_shortfall(dim, steps, failure_probability)

    # Undamped eigenvalues, bounded from the Ritz values: (low, high) of either end, and a reading.
    largest = (top - radius, top / (1 - shortfall) + radius if shortfall < 1 else top + jnp.inf)
    proven = counted & (space.values - space.residuals - radius > tolerance)
    proven_low = jnp.min(jnp.where(proven, space.values + space.residuals, jnp.inf))
    smallest_high = jnp.where(definite, jnp.maximum(lowest, 0), proven_low) + radius
    smallest_low = jnp.zeros((), dtype)
    if shortfall < 1:
        # L I - A has the same Krylov space, and its largest eigenvalue is L - lambda_min.
        mirrored = largest[1] - (largest[1] - lowest) / (1 - shortfall) - radius
        smallest_low = jnp.maximum(mirrored, 0)
    reading = jnp.where(definite, lowest, jnp.min(jnp.where(counted, space.values, jnp.inf)))
    smallest = (smallest_low + lam, smallest_high + lam)
    if inverse_matvec is not None:  # the damped operator's inverse
        inverse = lanczos(inverse_matvec, dim, inverse_key, steps=steps, dtype=dtype)
        peak = jnp.max(jnp.where(inverse.known, inverse.values, 0))
        noise = relative_radius * peak
        above = peak / (1 - shortfall) + noise if shortfall < 1 else peak + jnp.inf
        smallest = (
            jnp.maximum(smallest[0], 1 / above),
            jnp.minimum(smallest[1], 1 / (peak - noise)),
        )
        reading = jnp.minimum(reading, 1 / peak - lam)
    elif _is_zero(damping):
        pass
    else:
        # Damping below round-off bounds nothing: a matvec may have eigenvalues of -radius.
        smallest = (jnp.where(smallest[0] > radius, smallest[0], 0), smallest[1])

    plain = Condition(
        log_kappa=top,
        lower=top,
        upper=top,
        rank=jnp.sum(counted).astype(jnp.int32),
        tolerance=tolerance,
        dominated_by=jnp.zeros((), jnp.int32),
    )
    found = _damped(
        plain,
        lam=lam,
        largest=top + lam,
        smallest=jnp.where(jnp.isfinite(reading) & (top > 0), reading + lam, 0),
        largest_bounds=(largest[0] + lam, largest[1] + lam),
        smallest_bounds=smallest,
        undamped=reading,
    )
    # Unbounded for want of information is not round-off.
    damped_code = jnp.where((lam > 0) & (reading <= lam), DOMINANCE.index("damping"), 0)
    rounded = ~(top > 0) | (reading + lam <= radius)
    code = jnp.where(rounded & (inverse_matvec is None), DOMINANCE.index("rounding"), damped_code)
    return found._replace(dominated_by=code.astype(jnp.int32))


def log_ratio(*, after: Condition, before: Condition) -> Ratio:
    """log kappa(after) - log kappa(before) in nats, the interval carried through.

    Args:
      after: of the immunised features.
      before: of the same rows under the reference backbone, on the same footing (tolerance,
        damping, dtype).

    Returns:
      `Ratio`; a bound is infinite where either side is unbounded there, and `log_ratio` is NaN
      where both are infinite (zero features on both sides).
    """
    return Ratio(
        after.log_kappa - before.log_kappa,
        after.lower - before.upper,
        after.upper - before.lower,
    )


def relative_immunisation(
    *,
    harmful_after: Condition,
    harmful_before: Condition,
    primary_after: Condition,
    primary_before: Condition,
) -> RelativeImmunisation:
    r"""Ratios (i), (ii) and RIR = (i) / (ii), as logs in nats with their intervals.

    (i) = kappa(H_H after) / kappa(H_H before); (ii) the same for the primary task.

    Args:
      harmful_after: kappa of the harmful task under the immunised backbone.
      harmful_before: the same under the reference backbone (identity for RIR).
      primary_after: kappa of the primary task under the immunised backbone.
      primary_before: the same under the reference backbone.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, definition of RIR.
    """
    harmful = log_ratio(after=harmful_after, before=harmful_before)
    primary = log_ratio(after=primary_after, before=primary_before)
    rir = Ratio(
        harmful.log_ratio - primary.log_ratio,
        harmful.lower - primary.upper,
        harmful.upper - primary.lower,
    )
    return RelativeImmunisation(harmful, primary, rir)


def _bracket(values: Float[Array, "k"], radius, rtol, *, shape, power: int) -> Condition:
    """Undamped `Condition` of kappa^power from descending singular values, each within radius."""
    fixed = lax.stop_gradient(values)
    radius = lax.stop_gradient(radius)
    largest = fixed[0]
    stated = rtol is not None
    tolerance = (rtol if stated else rank_rtol(shape, values.dtype)) * largest
    kept = fixed > tolerance  # Not >=: a zero matrix would have full rank.
    rank = jnp.sum(kept).astype(jnp.int32)
    found = rank > 0
    last = jnp.maximum(rank - 1, 0)
    smallest = jnp.where(found, values[last], 1)
    log_kappa = jnp.where(
        found, jnp.log(jnp.where(found, values[0], 1)) - jnp.log(smallest), jnp.inf
    )

    surely_kept = jnp.min(jnp.where(fixed > tolerance + radius, fixed, jnp.inf))
    left_out = jnp.max(jnp.where(kept, 0, fixed))
    surely_zero = left_out <= ZERO_NOISE * float(jnp.finfo(values.dtype).eps) * largest
    if stated:  # the caller's tolerance defines kappa: what lies surely below it is out of the game
        surely_zero |= left_out <= tolerance - radius
    lower, upper = _log_bounds(
        largest=(largest - radius, largest + radius),
        smallest=(jnp.where(surely_zero, fixed[last] - radius, 0), surely_kept + radius),
    )
    # A single value is its own largest and smallest: kappa is 1 whatever its error.
    alone = found & (fixed.shape[0] == 1)
    upper = jnp.where(alone, 0, upper)
    code = jnp.where(jnp.isinf(upper), DOMINANCE.index("rounding"), DOMINANCE.index("none"))
    spoiled = jnp.isnan(largest)
    return Condition(
        log_kappa=jnp.where(spoiled, jnp.nan, power * log_kappa),
        lower=jnp.where(spoiled, jnp.nan, power * lower),
        upper=jnp.where(spoiled, jnp.nan, power * upper),
        rank=rank,
        tolerance=tolerance,
        dominated_by=code.astype(jnp.int32),
    )


def _spanned(space: KrylovSpace, *, rtol, lam) -> Condition:
    """`Condition` from Ritz values that are the whole spectrum of a semi-definite operator."""
    dim = space.values.shape[0]
    spectrum = jnp.maximum(space.values[::-1], 0)
    top, bottom = spectrum[0], spectrum[-1]
    radius = rounding_radius((dim, dim), top.dtype) * top
    plain = _bracket(spectrum, radius, rtol, shape=(dim, dim), power=1)
    damped = _damped(
        plain,
        lam=lam,
        largest=top + lam,
        smallest=bottom + lam,
        largest_bounds=(top - radius + lam, top + radius + lam),
        smallest_bounds=(_signed_floor(bottom, radius) + lam, bottom + radius + lam),
        undamped=bottom,
    )
    return jax.tree.map(lambda a, b: jnp.where(lam > 0, a, b), damped, plain)


def _signed_floor(bottom, radius):
    """Least eigenvalue behind a computed |eigenvalue|: below radius its sign is open."""
    return jnp.where(bottom > radius, bottom - radius, -(bottom + radius))


def _damped(
    plain: Condition, *, lam, largest, smallest, largest_bounds, smallest_bounds, undamped
) -> Condition:
    """`Condition` of S + lam I from its extreme eigenvalues and their bounds."""
    positive = smallest > 0
    log_kappa = jnp.where(
        positive, jnp.log(largest) - jnp.log(jnp.where(positive, smallest, 1)), jnp.inf
    )
    lower, upper = _log_bounds(
        largest=jax.tree.map(lax.stop_gradient, largest_bounds),
        smallest=jax.tree.map(lax.stop_gradient, smallest_bounds),
    )
    code = jnp.where(
        jnp.isinf(upper),
        DOMINANCE.index("rounding"),
        jnp.where(undamped <= lam, DOMINANCE.index("damping"), DOMINANCE.index("none")),
    )
    spoiled = jnp.isnan(largest)
    return plain._replace(
        log_kappa=jnp.where(spoiled, jnp.nan, log_kappa),
        lower=jnp.where(spoiled, jnp.nan, lower),
        upper=jnp.where(spoiled, jnp.nan, upper),
        dominated_by=code.astype(jnp.int32),
    )


def _log_bounds(*, largest, smallest):
    """Bounds on log(largest / smallest) from (low, high) of each; [0, inf] if nothing is known."""

    def log_quotient(top, bottom, otherwise):
        usable = (top > 0) & (bottom > 0) & (bottom < jnp.inf)
        high = jnp.log(jnp.where(usable, top, 1))
        low = jnp.log(jnp.where(usable, bottom, 1))
        # The logarithms and their difference round too.
        slack = 4 * float(jnp.finfo(high.dtype).eps) * (1 + jnp.abs(high) + jnp.abs(low))
        return jnp.where(usable, high - low, otherwise), slack

    lower, lower_slack = log_quotient(largest[0], smallest[1], 0)
    upper, upper_slack = log_quotient(largest[1], smallest[0], jnp.inf)
    return jnp.maximum(lower - lower_slack, 0), upper + upper_slack


def _random_start_shortfall(dim: int, steps: int, probability: float) -> float:
    """e with theta_max >= (1 - e) lambda_max but for `probability`; inf outside the theorem."""
    if dim < 8 or steps < 4:
        return math.inf
    return (math.log(1.648 * math.sqrt(dim) / probability) / (2 * steps - 1)) ** 2


def _is_zero(damping) -> bool:
    """True for the literal number zero; a traced or array damping is never known to be zero."""
    return isinstance(damping, int | float) and damping == 0


def _check_damping(damping) -> None:
    """Refuse a damping that is known to be negative."""
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}.")
