r"""Condition numbers as log kappa, with bounds that hold, and the ratios built from them.

kappa(S) = sigma_max / sigma_min+, where sigma_min+ is the smallest non-zero singular value, or the
smallest above a tolerance that the caller states. All logarithms are natural.

**Where the bounds come from.** A backward-stable SVD returns the exact singular values of S + E
with |E|_2 <= c eps |S|_2, so by Weyl every computed value is within r = c eps sigma_max of the
true one. Worst-case analysis gives c a low-degree polynomial in (n, d); rounding errors that
behave like independent ones accumulate as the square root of the number of operations per entry
(Higham and Mary 2019, https://doi.org/10.1137/18M1226312). This module takes

    c(n, d) = 4 + 1.5 sqrt(max(n, d)),    eps = spacing of the dtype at 1.

Largest error seen in float32 LAPACK against float64, over geometric, two-level, flat,
rank-deficient and positive matrices: 2.3 eps at 3 x 2, 3.8 at 8 x 8, 3.9 at 40 x 30, 4.6 at
100 x 100, 10.7 at 400 x 400, 3.3 at 5000 x 50, against c of 6.6, 8.2, 13, 19, 34 and 110. The
bounds are about the matrix as given: NumPy float64 that JAX holds in float32 adds to r what that
rounding changed. An error made before, in forming it, is the caller's (a Gram matrix loses half the
digits, so use `feature_condition_number`).

    lower = log( (sigma_max - r) / (sigma_k + r) )
    upper = log( (sigma_max + r) / (sigma_k - r) )

A power of two is split off first, so kappas of 2^e S are those of S to the bit.

**Rank.** A computed value that r cannot tell from zero may be a true zero, which kappa leaves out,
or a small true value, which decides it. No decomposition in the dtype can say which, whatever the
value: exact zeros come back as several eps, and 1e-20 as the same. The rank can be computed
exactly, though (`modular_rank`): where it says that as many values are non-zero as surely differ
from zero, the others are true zeros, `rank` is exact and both bounds are finite. Otherwise some
value below r is not zero, kappa is past about 1 / (c eps), and the result says that it is no
measurement: `upper` = +inf, "rounding"; `lower` uses the smallest value that is surely counted.

A zero in exact arithmetic is seldom a zero as stored: of a product of rank 5 that was rounded to
the dtype, all singular values are non-zero, and its kappa is unbounded in this sense. Whoever
means "zero up to rounding" states an `rtol`, which then defines kappa: values surely below it are
left out, and those near it make the value ambiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaximm.linalg.arrays import (
    as_matrix,
    check_function,
    check_key,
    check_kind,
    computing_dtype,
    exponent_of,
    one_program,
    times_power_of_two,
)
from jaximm.linalg.extremes import rank_rtol
from jaximm.linalg.lanczos import lanczos
from jaximm.linalg.modular import modular_rank

DOMINANCE = ("none", "damping", "rounding")
"""Names behind the integer code `Condition.dominated_by`."""


class Condition(NamedTuple):
    """log kappa in nats with bounds, `lower <= truth <= upper`; `upper` = +inf says unbounded.

    `rank`: number of singular values above `tolerance` (absolute, in units of the singular values
    of the array that was given), of the undamped matrix; the exact rank where `condition_number`
    and `feature_condition_number` could settle it without damping. `dominated_by`: index into
    `DOMINANCE`: "damping" when the damping is at least the smallest undamped eigenvalue and so
    decides kappa, "rounding" when round-off or an ambiguous rank makes the value no measurement.
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
    repeated values (that of one of the tied directions); where `log_kappa` is inf it is 0. The
    bounds are constants.

    Args:
      matrix: any float dtype; float16 and bfloat16 are computed in float32.
      rtol: values at or below `rtol * largest` count as zero, and so does not what lies above it.
        None: every value that is not exactly zero counts; `rank` and `log_kappa` leave out those
        at or below max(n, d) * eps * largest, which then also are what makes `upper` infinite
        unless they are exact zeros.
      damping: lam >= 0 in units of the matrix; may be traced.

    Returns:
      `Condition` in the dtype of `matrix` (float32 for the half precisions).

    Raises:
      ValueError: if `matrix` is not a non-empty float (n, d) array, or is damped and not square, if
        `damping` is not a scalar or is a number that is negative or not finite, or if `rtol` is
        negative or not finite.

    >>> kappa = condition_number(jnp.diag(jnp.array([100.0, 1.0])))
    >>> bool(kappa.lower <= jnp.log(100.0)) and bool(jnp.log(100.0) <= kappa.upper)
    True
    """
    stored = as_matrix(matrix)
    _check_options(rtol, damping)
    if not _is_zero(damping) and stored.shape[0] != stored.shape[1]:
        raise ValueError(
            f"damping needs a square positive semi-definite matrix, got shape {stored.shape}; "
            "for features use feature_condition_number."
        )
    return _of_matrix(stored, _change_on_entry(matrix, stored), rtol=rtol, damping=damping)


@one_program
def _of_matrix(stored: Float[Array, "n d"], change, *, rtol, damping) -> Condition:
    """`condition_number` after the door."""
    sigma = _singular_values(stored, change)
    if _is_zero(damping):
        return _plain(sigma, stored, rtol, power=1)
    plain = _bracket(sigma, rtol, power=1)
    lam = jnp.asarray(damping, stored.dtype)
    values, radius, lam = _common_units(sigma, lam)
    bottom = values[-1]
    return _damped(
        plain,
        largest=values[0] + lam,
        smallest=bottom + lam,
        largest_bounds=(values[0] - radius + lam, values[0] + radius + lam),
        smallest_bounds=(_signed_floor(bottom, radius) + lam, bottom + radius + lam),
        dominated=bottom <= lam,
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
      features: any float dtype; rows are examples. float16 and bfloat16 are computed in float32.
      rtol: singular values of X at or below `rtol * largest` count as zero (of H that is a relative
        tolerance of rtol^2). None: as `condition_number`.
      damping: lam >= 0 in units of the mean-convention Hessian, feature^2; may be traced. Where it
        is traced and zero, the gradient with respect to it is 0.

    Returns:
      `Condition` in the dtype of `features` (float32 for the half precisions); `tolerance` in units
      of the singular values of X.

    Raises:
      ValueError: if `features` is not a non-empty float (n, d) array, if `damping` is not a scalar
        or is a number that is negative or not finite, or if `rtol` is negative or not finite.

    >>> kappa = feature_condition_number(jnp.diag(jnp.array([100.0, 1.0])))
    >>> round(float(kappa.log_kappa / jnp.log(100.0)), 4)
    2.0
    """
    stored = as_matrix(features, name="features")
    _check_options(rtol, damping)
    return _of_features(stored, _change_on_entry(features, stored), rtol=rtol, damping=damping)


@one_program
def _of_features(stored: Float[Array, "n d"], change, *, rtol, damping) -> Condition:
    """`feature_condition_number` after the door."""
    n, d = stored.shape
    sigma = _singular_values(stored, change)
    if _is_zero(damping):
        return _plain(sigma, stored, rtol, power=2)
    plain = _bracket(sigma, rtol, power=2)
    # In units of the singular values: h_i + lam = (sigma_i^2 + root^2) / n. Squares are not formed,
    # since kappa may be far outside the dtype where log kappa is not.
    lam = jnp.asarray(damping, stored.dtype)
    positive = lam > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, lam, 1)), lam) * n**0.5
    values, radius, root = _common_units(sigma, root)
    bottom = values[-1] if n >= d else jnp.zeros_like(values[0])
    bottom_radius = radius if n >= d else jnp.zeros_like(radius)  # an empty direction is exact

    def augmented(value):
        return _hypotenuse(jnp.maximum(value, 0), root)

    return _damped(
        plain,
        largest=augmented(values[0]),
        smallest=augmented(bottom),
        largest_bounds=(augmented(values[0] - radius), augmented(values[0] + radius)),
        smallest_bounds=(augmented(bottom - bottom_radius), augmented(bottom + bottom_radius)),
        dominated=bottom <= root,
        power=2,
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

    - the whole space is spanned (steps >= dim): both ends are known up to rounding. What A positive
      definite, damping or the inverse say still counts; without any of them a Ritz value that
      rounding cannot tell from zero may be one, which leaves `upper` infinite unless a stated
      `rtol` puts it out;
    - otherwise, with a random start and m steps, the largest eigenvalue L is at most
      theta_max / (1 - e) except with probability at most `failure_probability` p, where
      e = (log(1.648 sqrt(d) / p) / (2 m - 1))^2 (Kuczynski and Wozniakowski 1992,
      https://doi.org/10.1137/0613066). The same on A^{-1}, if `inverse_matvec` is given, and on
      L I - A, bounds the smallest: the latter is of use when e * kappa < 1. Damping bounds it by
      lam.

    One more matvec finds the scale of A, and a power of two is split off, so that kappas of 2^e A
    are those of A.

    `dominated_by` is "rounding" only where round-off decides; upper = +inf alone says "not
    bounded".

    Args:
      matvec: v [d] -> A v [d], symmetric positive semi-definite, traceable, undamped.
      dim: the length d.
      rng_key: for the start vectors; consumed once.
      steps: cap on the matvecs (all are used, up to dim), and on those of the inverse.
      rtol: Ritz values at or below `rtol * largest` count as zero; dim * eps if None. Of no account
        where A is known to be definite.
      damping: lam >= 0 in units of A; may be traced; added here, not by `matvec`.
      positive_definite: promise that A has no zero eigenvalue.
      inverse_matvec: v -> (A + damping I)^{-1} v, if there is one, at full accuracy.
      failure_probability: p, in (0, 1), of each use of the random-start bound.
      dtype: of the vectors; the default float dtype if None. The matvecs of float16 and bfloat16
        are given, and must return, float32.

    Returns:
      `Condition`; `rank` counts Ritz values of A above `tolerance`: a lower bound on the rank,
      exact once the whole space is spanned. Not differentiable: all results are constants.

    Raises:
      ValueError: `matvec` is no function or `rng_key` no key, dim or steps below 1, a damping or
        rtol that is negative or not finite, or a probability outside (0, 1).
    """
    check_function(matvec, "matvec")
    check_key(rng_key)
    if dim < 1 or steps < 1:
        raise ValueError(f"dim and steps must be at least 1, got dim={dim}, steps={steps}.")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be in (0, 1), got {failure_probability}.")
    _check_options(rtol, damping)
    dtype = computing_dtype(jnp.zeros((), dtype).dtype)
    main_key, inverse_key = jax.random.split(rng_key)
    exponent, matvec, inverse_matvec = _unit_scale(matvec, inverse_matvec, dim, main_key, dtype)
    lam = times_power_of_two(lax.stop_gradient(jnp.asarray(damping, dtype)), -exponent)
    space = lanczos(matvec, dim, main_key, steps=steps, dtype=dtype)
    spanned = steps >= dim
    shortfall = 0.0 if spanned else _random_start_shortfall(dim, steps, failure_probability)

    top = jnp.max(jnp.where(space.known, space.values, 0))
    lowest = jnp.min(jnp.where(space.known, space.values, jnp.inf))
    relative_radius = rounding_radius((dim, dim), dtype)
    radius = relative_radius * top
    tolerance = (rank_rtol((dim,), dtype) if rtol is None else rtol) * top
    counted = space.known & (space.values > tolerance)
    definite = (lam > 0) | positive_definite | (inverse_matvec is not None)

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
        # The inverse resolves what the operator's own rounding hides.
        reading = jnp.where(spanned, 1 / peak - lam, jnp.minimum(reading, 1 / peak - lam))
    elif not _is_zero(damping):
        # Damping below round-off bounds nothing: a matvec may have eigenvalues of -radius.
        smallest = (jnp.where(smallest[0] > radius, smallest[0], 0), smallest[1])

    plain = Condition(
        log_kappa=top,
        lower=top,
        upper=top,
        rank=jnp.sum(counted).astype(jnp.int32),
        tolerance=times_power_of_two(tolerance, exponent),
        dominated_by=jnp.zeros((), jnp.int32),
    )
    usable = jnp.isfinite(reading) & (top > 0) & (reading + lam > 0)
    damped = _damped(
        plain,
        largest=top + lam,
        smallest=jnp.where(usable, reading + lam, 0),
        largest_bounds=(largest[0] + lam, largest[1] + lam),
        smallest_bounds=smallest,
        dominated=jnp.zeros((), bool),
    )
    # Unbounded for want of information is not round-off.
    damped_code = jnp.where((lam > 0) & (reading <= lam), DOMINANCE.index("damping"), 0)
    rounded = ~(top > 0) | (reading + lam <= radius) | (spanned & jnp.isinf(damped.upper))
    if inverse_matvec is not None:
        rounded = jnp.isinf(damped.upper) & spanned
    code = jnp.where(rounded, DOMINANCE.index("rounding"), damped_code)
    damped = damped._replace(dominated_by=code.astype(jnp.int32))
    if not spanned:
        return damped
    spectrum = _Values(jnp.maximum(space.values[::-1], 0), radius, exponent, (dim, dim), False)
    semidefinite = _bracket(spectrum, rtol, power=1)
    return jax.tree.map(lambda a, b: jnp.where(definite, a, b), damped, semidefinite)


def log_ratio(*, after: Condition, before: Condition) -> Ratio:
    """log kappa(after) - log kappa(before) in nats, the interval carried through.

    Args:
      after: of the immunised features.
      before: of the same rows under the reference backbone, on the same footing (tolerance,
        damping, dtype).

    Returns:
      `Ratio`, its bounds rounded outwards; one is infinite where either side is unbounded there,
      and `log_ratio` is NaN where both are infinite (zero features on both sides).

    Raises:
      ValueError: one is no `Condition`.
    """
    check_kind(after, Condition, "after", "`feature_condition_number`")
    check_kind(before, Condition, "before", "`feature_condition_number`")
    return _difference(Ratio(*after[:3]), Ratio(*before[:3]))


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

    Raises:
      ValueError: one is no `Condition`.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, definition of RIR.
    """
    harmful = log_ratio(after=harmful_after, before=harmful_before)
    primary = log_ratio(after=primary_after, before=primary_before)
    return RelativeImmunisation(harmful, primary, _difference(harmful, primary))


def _difference(first: Ratio, second: Ratio) -> Ratio:
    """first - second with its interval."""
    low, high = first.lower - second.upper, first.upper - second.lower
    return Ratio(
        first.log_ratio - second.log_ratio,
        _towards(low, -jnp.inf),
        _towards(high, jnp.inf),
    )


def _towards(bound, end: float):
    """The next number on the way to `end`: a difference is off by up to half a spacing."""
    bound = lax.stop_gradient(jnp.asarray(bound))
    return jnp.nextafter(bound, jnp.full_like(bound, end))


class _Values(NamedTuple):
    """Descending singular values of 2^-exponent S, each within `radius` of the truth.

    `as_given`: S holds the very numbers that the caller gave, so its exact rank is theirs.
    """

    values: Float[Array, "k"]
    radius: Float[Array, ""]
    exponent: Int[Array, ""]
    shape: tuple[int, ...]
    as_given: bool


def _singular_values(stored: Float[Array, "n d"], change: np.ndarray | None) -> _Values:
    """Of what is computed with, and how far that is from what was given (`_change_on_entry`)."""
    exponent = exponent_of(stored)
    # Not full_matrices=True: LAPACK's workspace would then have an n x n matrix in it.
    values = jnp.linalg.svd(
        times_power_of_two(stored, -exponent), compute_uv=False, full_matrices=False
    )
    relative = rounding_radius(stored.shape, stored.dtype) + (0.0 if change is None else change)
    radius = jnp.asarray(relative, stored.dtype) * values[0]
    return _Values(values, lax.stop_gradient(radius), exponent, stored.shape, change is None)


def _change_on_entry(given, stored: Array) -> np.ndarray | None:
    """Bound on |given - stored|_2 / |stored|_2, for a NumPy array of a wider dtype; None: equal."""
    if not isinstance(given, np.ndarray) or given.dtype.itemsize <= stored.dtype.itemsize:
        return None
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        entered = given.astype(stored.dtype)
        entered[np.abs(entered) < jnp.finfo(stored.dtype).tiny] = 0  # XLA may flush them
        entered = entered.astype(given.dtype)  # whose squares fit
        difference = given - entered
        unit = np.max(np.abs(difference))
        if unit == 0 or not np.isfinite(unit):  # not finite: then neither is the result
            return None
        # In units of the largest one: the square of 1e-200 is zero.
        change, size = unit * np.linalg.norm(difference / unit), np.linalg.norm(entered)
    # The Frobenius norm is at most sqrt(k) times the spectral one; a quarter more for the rounding.
    bound = 1.25 * change / size * math.sqrt(min(stored.shape)) if size else math.inf
    return np.asarray(bound, stored.dtype)


def _common_units(sigma: _Values, shift: Float[Array, ""]):
    """Singular values, radius and a shift >= 0, all in units of the larger one's power of two."""
    exponent = jnp.where(shift > 0, jnp.maximum(sigma.exponent, exponent_of(shift)), sigma.exponent)
    exponent = jnp.where(sigma.values[0] > 0, exponent, jnp.where(shift > 0, exponent_of(shift), 0))
    apart = sigma.exponent - exponent
    return (
        times_power_of_two(sigma.values, apart),
        times_power_of_two(sigma.radius, apart),
        times_power_of_two(shift, -exponent),
    )


def _plain(sigma: _Values, stored: Float[Array, "n d"], rtol, *, power: int) -> Condition:
    """Undamped `Condition`; without a stated tolerance, exact zeros are told from small values."""
    if rtol is not None or not sigma.as_given:
        return _bracket(sigma, rtol, power=power)
    values = lax.stop_gradient(sigma.values)
    tolerance = rank_rtol(stored.shape, values.dtype) * values[0]
    certain = jnp.sum(values > jnp.maximum(tolerance, sigma.radius)).astype(jnp.int32)
    in_doubt = certain < values.shape[0]
    fixed = lax.stop_gradient(stored)
    rank = lax.cond(in_doubt, lambda: modular_rank(fixed, enough=certain), lambda: certain)
    return _bracket(sigma, None, power=power, certain=certain, settled=rank <= certain)


def _bracket(sigma: _Values, rtol, *, power: int, certain=None, settled=None) -> Condition:
    """Undamped `Condition` of kappa^power.

    `settled`: all but the first `certain` values are exact zeros.
    """
    values, radius = sigma.values, sigma.radius
    fixed = lax.stop_gradient(values)
    largest = fixed[0]
    k = fixed.shape[0]
    relative = rank_rtol(sigma.shape, values.dtype) if rtol is None else rtol
    tolerance = relative * largest
    # The tolerance is as uncertain as the largest value is.
    margin = radius * (1 + relative)
    rank = jnp.sum(fixed > tolerance).astype(jnp.int32)  # Not >=: a zero matrix has rank 0.
    surely_kept = jnp.min(jnp.where(fixed > tolerance + margin, fixed, jnp.inf))
    if settled is None or certain is None:
        # A tolerance that the caller states defines kappa: what lies surely below it is out. One of
        # the module's does not.
        left_out = jnp.where(rank < k, fixed[jnp.minimum(rank, k - 1)], -jnp.inf)
        settled = (rank == k) if rtol is None else left_out <= tolerance - margin
    else:
        assert certain is not None  # given together
        rank = jnp.where(settled, certain, rank)
        index = jnp.arange(k, dtype=jnp.int32)
        surely_kept = jnp.where(
            settled, jnp.min(jnp.where(index < certain, fixed, jnp.inf)), surely_kept
        )
    nonzero = rank > 0
    last = jnp.maximum(rank - 1, 0)
    lower, upper = _log_bounds(
        largest=(largest - radius, largest + radius),
        smallest=(jnp.where(settled, fixed[last] - radius, 0), surely_kept + radius),
    )
    # A single value is its own largest and smallest: kappa is 1 whatever its error.
    upper = jnp.where(nonzero & (k == 1), 0, upper)
    code = jnp.where(jnp.isinf(upper), DOMINANCE.index("rounding"), DOMINANCE.index("none"))
    spoiled = jnp.isnan(largest)
    log_kappa = _log_quotient(jnp.where(nonzero, values[0], 1), jnp.where(nonzero, values[last], 0))
    return Condition(
        log_kappa=jnp.where(spoiled, jnp.nan, power * log_kappa),
        lower=jnp.where(spoiled, jnp.nan, power * lower),
        upper=jnp.where(spoiled, jnp.nan, power * upper),
        rank=rank,
        tolerance=times_power_of_two(tolerance, sigma.exponent),
        dominated_by=code.astype(jnp.int32),
    )


def _unit_scale(matvec, inverse_matvec, dim: int, rng_key, dtype):
    """(e, 2^-e A, 2^e A^{-1}) with 2^-e A of order 1, from the image of a random vector."""
    probe = jax.random.normal(jax.random.fold_in(rng_key, dim), (dim,), dtype)
    exponent = exponent_of(matvec(probe))

    def scaled(vector):
        return times_power_of_two(matvec(vector), -exponent)

    def scaled_inverse(vector):
        return times_power_of_two(inverse_matvec(vector), exponent)

    return exponent, scaled, None if inverse_matvec is None else scaled_inverse


def _signed_floor(bottom, radius):
    """Least eigenvalue behind a computed |eigenvalue|: below radius its sign is open."""
    return jnp.where(bottom > radius, bottom - radius, -(bottom + radius))


def _damped(
    plain: Condition,
    *,
    largest,
    smallest,
    largest_bounds,
    smallest_bounds,
    dominated: Bool[Array, ""],
    power: int = 1,
) -> Condition:
    """`Condition` of kappa^power from both ends and their bounds; `dominated` by the damping."""
    lower, upper = _log_bounds(
        largest=jax.tree.map(lax.stop_gradient, largest_bounds),
        smallest=jax.tree.map(lax.stop_gradient, smallest_bounds),
    )
    code = jnp.where(
        jnp.isinf(upper),
        DOMINANCE.index("rounding"),
        jnp.where(dominated, DOMINANCE.index("damping"), DOMINANCE.index("none")),
    )
    spoiled = jnp.isnan(largest)
    return plain._replace(
        log_kappa=jnp.where(spoiled, jnp.nan, power * _log_quotient(largest, smallest)),
        lower=jnp.where(spoiled, jnp.nan, power * lower),
        upper=jnp.where(spoiled, jnp.nan, power * upper),
        dominated_by=code.astype(jnp.int32),
    )


def _log_quotient(largest, smallest):
    """log(largest / smallest) of largest >= smallest, with `largest` of order 1; +inf at 0.

    Not log(largest) - log(smallest), whose error is that of the larger logarithm.
    """
    quotient = smallest / jnp.where(largest > 0, largest, 1)
    positive = quotient > 0
    # 0 - x, not -x: kappa 1 has the logarithm 0, and -0 reads as if something were wrong.
    return jnp.where(positive, 0 - jnp.log(jnp.where(positive, quotient, 1)), jnp.inf)


def _log_bounds(*, largest, smallest):
    """Bounds on log(largest / smallest) from (low, high) of each; [0, inf] if nothing is known."""

    def log_quotient(top, bottom, otherwise):
        usable = (top > 0) & (bottom > 0) & (bottom < jnp.inf) & (top < jnp.inf)
        value = -jnp.log(jnp.where(usable, bottom, 1) / jnp.where(usable, top, 1))
        # The bounds of either end, the quotient and the logarithm round too.
        slack = 8 * float(jnp.finfo(value.dtype).eps) * (1 + jnp.abs(value))
        return jnp.where(usable, value, otherwise), slack

    lower, lower_slack = log_quotient(largest[0], smallest[1], 0)
    upper, upper_slack = log_quotient(largest[1], smallest[0], jnp.inf)
    return jnp.maximum(lower - lower_slack, 0), upper + upper_slack


def _hypotenuse(first, second):
    """sqrt(first^2 + second^2) of numbers >= 0, without forming the squares; 0 at 0."""
    high, low = jnp.maximum(first, second), jnp.minimum(first, second)
    return high * jnp.sqrt(1 + (low / jnp.where(high > 0, high, 1)) ** 2)


def _random_start_shortfall(dim: int, steps: int, probability: float) -> float:
    """e with theta_max >= (1 - e) lambda_max but for `probability`; inf outside the theorem."""
    if dim < 8 or steps < 4:
        return math.inf
    return (math.log(1.648 * math.sqrt(dim) / probability) / (2 * steps - 1)) ** 2


def _is_zero(damping) -> bool:
    """True for the literal number zero; a traced or array damping is never known to be zero."""
    return isinstance(damping, int | float) and damping == 0


def _check_options(rtol: Any, damping: Any) -> None:
    """Refuse what is known to be wrong about a tolerance or a damping."""
    for name, value in (("rtol", rtol), ("damping", damping)):
        if isinstance(value, int | float | np.number) and not 0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {value}.")
        if value is not None and jnp.ndim(value) != 0:
            raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}.")
