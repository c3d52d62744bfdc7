r"""Confidence intervals of scores that s attacker seeds reach on the same n held-out examples.

The design is crossed: score y_ij of example j under seed i, with i = 1..s, j = 1..n, is

    y_ij = mu + a_i + b_j + e_ij,    Var(mean) = s2_a / s + s2_b / n + s2_e / (s n),

a_i the luck of a seed, b_j how easy an example is, e_ij all else. Neither level may be left out:
seeds alone forget that other examples could have been held out, examples alone that the attacker
could have been started elsewhere. The two-level ("pigeonhole") bootstrap, which resamples rows and
columns independently, has the variance

    ((1 - 1/s) MS_a + (1 - 1/n) MS_b + (1 - 1/s) (1 - 1/n) MS_e) / (s n)

over its draws (MS the mean squares of the two-way table, `mean_squares`). It counts s2_e three
times (Owen 2007), loses 1/s of the seeds' variance, and its percentiles do not know how few the
seeds are: where 95 % are asked for and s = 5, it covers 85 % if seeds differ much and 99 % or more
if they do not. All three are mended in closed form: nothing is drawn, so no number depends on a
random seed or on how many draws there were.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

RESIDUAL_FLOOR = 0.5
"""Part of MS_e below which the seeds' mean square may not take the interval, see `bounds`."""


class Interval(NamedTuple):
    """A mean and its confidence bounds, in the unit of the scores.

    >>> Interval(0.5, 0.25, float("inf")).as_dict()
    {'mean': 0.5, 'lower': 0.25, 'upper': None}
    """

    mean: float
    lower: float
    upper: float

    def as_dict(self) -> dict[str, float | None]:
        """As result.json holds it: NaN and +-inf become None."""
        return {
            name: float(value) if math.isfinite(value) else None
            for name, value in self._asdict().items()
        }


class MeanSquares(NamedTuple):
    """The mean and the mean squares of two-way tables.

    Attributes:
      mean: over seeds and examples.
      seed: MS_a = n sum_i (y_i. - y..)^2 / (s - 1), expectation n s2_a + s2_e.
      example: MS_b = s sum_j (y_.j - y..)^2 / (n - 1), expectation s s2_b + s2_e.
      residual: MS_e, expectation s2_e.
    """

    mean: Float[np.ndarray, "*batch"]
    seed: Float[np.ndarray, "*batch"]
    example: Float[np.ndarray, "*batch"]
    residual: Float[np.ndarray, "*batch"]


class Bounds(NamedTuple):
    """`Interval`, of a batch of tables."""

    mean: Float[np.ndarray, "*batch"]
    lower: Float[np.ndarray, "*batch"]
    upper: Float[np.ndarray, "*batch"]


def mean_squares(scores: Float[np.ndarray, "*batch s n"]) -> MeanSquares:
    """Mean squares of the crossed design, s >= 2 and n >= 2: `MeanSquares` has the formulae."""
    s, n = scores.shape[-2:]
    by_seed = np.mean(scores, axis=-1, keepdims=True)
    by_example = np.mean(scores, axis=-2, keepdims=True)
    mean = np.mean(by_seed, axis=-2, keepdims=True)
    both = (-2, -1)
    return MeanSquares(
        mean=mean[..., 0, 0],
        seed=n * np.sum((by_seed - mean) ** 2, axis=both) / (s - 1),
        example=s * np.sum((by_example - mean) ** 2, axis=both) / (n - 1),
        residual=np.sum((scores - by_seed - by_example + mean) ** 2, axis=both)
        / ((s - 1) * (n - 1)),
    )


def two_level(scores: Float[np.ndarray, "s n"], *, level: float = 0.95) -> Interval:
    r"""Interval of the mean score over other seeds and other examples: `bounds` of one table.

    One seed (s = 1) gives an interval over examples for that seed alone: how much another one would
    change, it cannot tell. Constant scores that are not all 0 or all 1 give zero width.

    >>> found = two_level(np.ones((5, 100)))  # no error in 100 examples is not no error at all
    >>> round(found.lower, 4), found.upper
    (0.963, 1.0)

    Args:
      scores: [s, n], the same examples in the same order under each seed; n >= 2. 0 and 1 for
        correctness, which is recognised by its values, or any real contributions to a mean.
      level: of confidence, in (0, 1).

    Returns:
      In the unit of the scores; NaN throughout where a score is not finite.

    Raises:
      ValueError: wrong shape or level.
    """
    scores = _table(scores, "scores")
    _check_level(level)
    if not np.all(np.isfinite(scores)):
        return Interval(math.nan, math.nan, math.nan)
    return _scalar(bounds(scores, level=level))


def paired_difference(
    first: Float[np.ndarray, "s n"], second: Float[np.ndarray, "s n"], *, level: float = 0.95
) -> Interval:
    r"""Interval of mean(first) - mean(second): that of the differences, same seeds and examples.

    The construction is that of `bounds` on d = first - second, without Wilson's step (differences
    of correctness are -1, 0 and 1). Where both are correctness and all d are one number, the width
    is what another outcome could do that was not seen: at most z^2 / (n + z^2) of the examples have
    one (Wilson), each worth 1 + |d|. Where the two differ on about two examples or fewer (0.99
    against 0.97, n = 100), a 95 % interval covers about 90 %.

    Args:
      first: [s, n].
      second: [s, n]; entry i, j comes from the same seed and the same example as in `first`.
      level: of confidence, in (0, 1).

    Returns:
      In the unit of the scores; NaN throughout where a score is not finite.

    Raises:
      ValueError: wrong shape or level, or two shapes.
    """
    first, second = _table(first, "first"), _table(second, "second")
    _check_level(level)
    if first.shape != second.shape:
        raise ValueError(
            "first and second need the same seeds and the same examples, got shapes "
            f"{first.shape} and {second.shape}."
        )
    differences = first - second
    if not np.all(np.isfinite(differences)):
        return Interval(math.nan, math.nan, math.nan)
    mean, squared = _squared_half_width(differences, level)
    mean, half = float(mean), math.sqrt(squared)
    if _is_binary(first) and _is_binary(second):
        if np.ptp(differences) == 0:
            z2 = float(special.ndtri((1 + level) / 2)) ** 2
            half = z2 / (differences.shape[1] + z2) * (1 + abs(mean))
        return Interval(mean, max(mean - half, -1.0), min(mean + half, 1.0))
    return Interval(mean, mean - half, mean + half)


def over_seeds(values: Float[np.ndarray, "s"], *, level: float = 0.95) -> Interval:
    """Student's t interval of one value a seed, such as the log of a cost ratio.

    Args:
      values: [s].
      level: of confidence, in (0, 1).

    Returns:
      In the unit of the values. One value gives -inf and +inf as bounds: it says nothing about its
      spread. NaN throughout where a value is not finite (an attack that never arrived).

    Raises:
      ValueError: not one axis, no value, or a wrong level.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values must have shape (seeds,), got shape {values.shape}.")
    _check_level(level)
    if not np.all(np.isfinite(values)):
        return Interval(math.nan, math.nan, math.nan)
    s = values.size
    mean = float(np.mean(values))
    if s == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(special.stdtrit(s - 1, (1 + level) / 2) * np.std(values, ddof=1)) / math.sqrt(s)
    return Interval(mean, mean - half, mean + half)


def bounds(scores: Float[np.ndarray, "*batch s n"], *, level: float = 0.95) -> Bounds:
    r"""Bounds of the means of crossed tables, finite scores.

    With MS_b' = max(MS_b - MS_e, 0), the part of the examples:

        V    = (MS_a + MS_b') / (s n)                       MS_a already holds the residual's s2_e
        df   = (MS_a + MS_b')^2 / (MS_a^2 / (s-1) + MS_b^2 / (n-1) + MS_e^2 / ((s-1) (n-1)))
        h^2  = max(t_df^2 V,  t_(n-1)^2 (c MS_e + MS_b') / (s n)),   c = RESIDUAL_FLOOR

    df (Satterthwaite) is s - 1 where MS_b' = 0, and never less. The second term of h^2 keeps seeds
    that happen to agree from giving an interval far narrower than seeds that are known not to
    differ would; a larger c covers too much there (97.6 % with 0.7). Scores other than 0 and 1 get
    mean +- h. For 0 and 1, p the mean, h is turned into Wilson's interval (Wilson 1927) of the
    effective number of trials (as in Korn and Graubard 1998), q = h^2 / (p (1 - p)):

        (p + q/2 +- sqrt(q p (1 - p) + q^2 / 4)) / (1 + q)

    which stays in [0, 1] and is not symmetric near its ends. With no error, or nothing but errors,
    q = z^2 / n: one trial an example, since seeds which all agree may be repeating each other (the
    lower bound is then about 1 - 3.8 / n). s = 1: q = z^2 / n, Wilson's own; Student's t otherwise.

    What a 95 % interval covers in simulation (s 5 or 10; n 100, 400 or 1000; accuracy 0.5, 0.8 or
    0.95; standard deviation of the seeds' accuracies 0, 0.01 or 0.03; examples equally hard or
    correlated 0.3 or 0.7 between seeds): 93.4 to 96.8 % in all 162 cells where seeds' accuracies
    are Beta distributed (`jaximm.measures.selection.draw_correct`). Seeds that now and then fail
    badly are harder: normal on the logit scale, accuracy 0.95 and deviation 0.03, it is 92 to 95 %.

    Args:
      scores: [..., s, n], finite; 0 and 1 throughout, or any real numbers.
      level: of confidence, in (0, 1).

    Returns:
      Arrays [...].

    References:
      Owen (2007), The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 386-411.
      Satterthwaite (1946), Biometrics Bulletin 2(6), 110-114.
      Wilson (1927), Journal of the American Statistical Association 22, 209-212.
      Korn and Graubard (1998), Survey Methodology 24(2), 193-201.
      The floor, and that these are put together, is this library's own.
    """
    mean, squared = _squared_half_width(scores, level)
    if not _is_binary(scores):
        half = np.sqrt(squared)
        return Bounds(mean, mean - half, mean + half)
    s, n = scores.shape[-2:]
    spread = mean * (1 - mean)
    q = np.full_like(mean, special.ndtri((1 + level) / 2) ** 2 / n)
    if s > 1:
        q = np.divide(squared, spread, out=q, where=spread > 0)
    half = np.sqrt(q * spread + q**2 / 4)
    return Bounds(
        mean,
        # Rounding aside, Wilson's interval holds the mean and is held by [0, 1].
        lower=np.clip((mean + q / 2 - half) / (1 + q), 0.0, mean),
        upper=np.clip((mean + q / 2 + half) / (1 + q), mean, 1.0),
    )


def _squared_half_width(scores, level: float):
    """Mean and h^2 of `bounds`."""
    s, n = scores.shape[-2:]
    quantile = (1 + level) / 2
    t_examples = special.stdtrit(n - 1, quantile)
    if s == 1:
        mean = np.asarray(np.mean(scores, axis=(-2, -1)))
        return mean, t_examples**2 * np.var(scores[..., 0, :], axis=-1, ddof=1) / n
    mean, seed, example, residual = mean_squares(scores)
    part = np.maximum(example - residual, 0.0)
    total = seed + part
    noise = seed**2 / (s - 1) + np.where(
        part > 0, example**2 / (n - 1) + residual**2 / ((s - 1) * (n - 1)), 0.0
    )
    df = np.divide(total**2, noise, out=np.zeros_like(total), where=noise > 0)
    t = special.stdtrit(np.maximum(df, s - 1), quantile)
    floor = t_examples**2 * (RESIDUAL_FLOOR * residual + part)
    return mean, np.maximum(t**2 * total, floor) / (s * n)


def _is_binary(scores) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(np.all((scores == 0) | (scores == 1)))


def _scalar(ends: Bounds) -> Interval:
    """Bounds of one table as floats."""
    return Interval(*(float(value) for value in ends))


def _table(scores: Any, name: str) -> np.ndarray:
    """Scores in float64, checked."""
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise ValueError(
            f"{name} must have shape (seeds, examples) with one seed and two examples or more, "
            f"got shape {table.shape}."
        )
    return table


def _check_level(level: float) -> None:
    """Raises ValueError unless 0 < level < 1."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95, got {level}.")
