"""Hessians of linear probes, dense and as operators: squares, logistic, softmax."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaximm.hessians.rows import (
    Matvec,
    Rows,
    as_vector,
    check_rows,
    gram_of,
    gram_operator,
    in_one_dtype,
    no_empty,
    ridge_of,
    row_product,
    rows_of,
)
from jaximm.linalg.arrays import (
    as_float,
    column_exponents,
    exponent_of,
    one_program,
    times_power_of_two,
)


@one_program
def l2_probe_hessian(
    features: Float[Array, "n d"],
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Float[Array, "d d"]:
    r"""Hessian of the l2 linear probe: ``X^T X / n + damping I``, or n times that.

    It is the Hessian of ``1/(2n) |X w - y|^2 + damping/2 |w|^2``; no label enters it.

    Args:
      features: X [n, d].
      convention: ``"mean"`` or ``"sum"``.
      damping: weight decay, in units of the mean-convention Hessian.

    Returns:
      Symmetric positive semi-definite [d, d], dtype of the features (float32 for half).

    Raises:
      ValueError: not a non-empty floating-point matrix, or an unknown convention.

    References:
      Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 9.

    >>> l2_probe_hessian(jnp.array([[1.0, 2.0], [1.0, 0.0]])).tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """
    features = check_rows(features, convention)
    n, d = features.shape
    gram = gram_of(rows_of(features, convention))
    ridge = ridge_of(damping, convention, n, features.dtype)
    return gram + ridge * jnp.eye(d, dtype=features.dtype)


def l2_probe_operator(
    features: Float[Array, "n d"],
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Matvec:
    """`l2_probe_hessian` as a matvec ``[d] -> [d]``: two products with X, nothing [d, d].

    Arguments and errors are those of `l2_probe_hessian`.
    """
    features = check_rows(features, convention)
    n = features.shape[0]
    ridge = ridge_of(damping, convention, n, features.dtype)
    return gram_operator(rows_of(features, convention), ridge)


def _with_intercept(features: Array, intercept: bool) -> Array:
    """Features with a last column of ones where the probe has an intercept."""
    if not intercept:
        return features
    return jnp.concatenate([features, jnp.ones((features.shape[0], 1), features.dtype)], axis=1)


def _logits(features: Array, weights: Array, intercept: Array | None) -> tuple[Array, Array]:
    """X W + b [n, k] over powers of two, and their exponents [n, 1]: no product that a row is made
    of can overflow, or be lost beside those of another row or feature, where X W is a number."""
    w_units = no_empty(column_exponents(weights.T))
    w = times_power_of_two(weights, -w_units[:, None])
    unit = no_empty(column_exponents(features.T, w_units))[:, None]
    x = times_power_of_two(features, w_units[None, :] - unit)
    scaled = jnp.matmul(x, w, precision="highest")
    if intercept is None:
        return scaled, unit
    common = jnp.maximum(unit, exponent_of(intercept))
    common = jnp.where(jnp.all(intercept == 0), unit, common)
    offset = times_power_of_two(jnp.broadcast_to(intercept, scaled.shape), -common)
    return times_power_of_two(scaled, unit - common) + offset, common


def _logistic_rows(features, weights, intercept, convention: str) -> Rows:
    """The augmented features, weighted by p (1 - p)."""
    features = check_rows(features, convention)
    weights = as_float(weights, name="weights")
    if weights.shape != features.shape[1:]:
        raise ValueError(f"weights must have shape {features.shape[1:]}, got {weights.shape}.")
    features, weights = in_one_dtype(features, weights)
    if intercept is not None:
        if jnp.ndim(intercept) != 0:
            raise ValueError(f"intercept must be one number, got shape {jnp.shape(intercept)}.")
        intercept = jnp.asarray(intercept, features.dtype)
    logits = times_power_of_two(*_logits(features, weights[:, None], intercept))[:, 0]
    # p (1 - p) = sigmoid(z) sigmoid(-z), as its logarithm: p rounds to one from z = 17 in float32.
    log_curvature = jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits)
    return rows_of(_with_intercept(features, intercept is not None), convention, log_curvature)


@one_program
def logistic_probe_hessian(
    features: Float[Array, "n d"],
    weights: Float[Array, "d"],
    intercept: Float[Array, ""] | None = None,
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Float[Array, "p p"]:
    r"""Hessian of logistic regression on ``features`` at ``weights``.

    ``X^T diag(p (1 - p)) X / n + damping I`` with ``p = sigmoid(X w + b)``; labels do not enter.

    Args:
      features: X [n, d].
      weights: w [d], where the Hessian is taken. At w = 0 it is a quarter of the l2 Hessian.
      intercept: b, a scalar, or None for a probe without one. With it, p = d + 1: the intercept is
        the last coordinate, damped like the others.
      convention: ``"mean"`` or ``"sum"``.
      damping: in units of the mean-convention Hessian.

    Returns:
      Symmetric positive semi-definite [d, d] or [d + 1, d + 1].

    Raises:
      ValueError: shapes that do not fit, or an unknown convention.
    """
    rows = _logistic_rows(features, weights, intercept, convention)
    n, p = rows.scaled.shape
    ridge = ridge_of(damping, convention, n, rows.scaled.dtype)
    return gram_of(rows) + ridge * jnp.eye(p, dtype=ridge.dtype)


def logistic_probe_operator(
    features: Float[Array, "n d"],
    weights: Float[Array, "d"],
    intercept: Float[Array, ""] | None = None,
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Matvec:
    """`logistic_probe_hessian` as a matvec ``[p] -> [p]``; same arguments and errors."""
    rows = _logistic_rows(features, weights, intercept, convention)
    n = rows.scaled.shape[0]
    return gram_operator(rows, ridge_of(damping, convention, n, rows.scaled.dtype))


class _Classes(NamedTuple):
    """Softmax curvature of each row in the unit s = 1 - p_top, whose root is in `rows`.

    diag p - p p^T is s times: ratio_c (1 - p_c) on the diagonal and -ratio_c p_e beside it for the
    classes c that are not the top one, and what makes every row sum zero for the top one. No
    number is the difference of two close ones: where p_top rounds to one, 1 - p_top keeps its
    digits, and where 1 - p_top is no number of the dtype, s x^2 may be one.
    """

    rows: Rows  # augmented
    probabilities: Float[Array, "n k"]
    ratio: Float[Array, "n k"]  # p / s, zero at the top class
    top: Float[Array, "n k"]  # one at the top class


def _softmax_classes(features, weights, intercept, convention: str) -> _Classes:
    features = check_rows(features, convention)
    weights = as_float(weights, name="weights")
    if weights.ndim != 2 or weights.shape[0] != features.shape[1]:
        raise ValueError(
            f"weights must have shape [{features.shape[1]}, k], got {weights.shape}; "
            "rows are features, columns are classes."
        )
    features, weights = in_one_dtype(features, weights)
    if intercept is not None:
        intercept = as_float(intercept, name="intercept")
        if intercept.shape != weights.shape[1:]:
            raise ValueError(
                f"intercept must have shape {weights.shape[1:]}, got {intercept.shape}."
            )
        intercept = intercept.astype(features.dtype)
    scaled, unit = _logits(features, weights, intercept)
    top = jax.nn.one_hot(jnp.argmax(scaled, axis=1), weights.shape[1], dtype=scaled.dtype)
    # The largest is subtracted in the smaller unit: inf - inf would be NaN.
    below = scaled - lax.stop_gradient(jnp.max(scaled, axis=1, keepdims=True))
    log_p = jax.nn.log_softmax(times_power_of_two(below, unit), axis=1)
    log_s = jax.nn.logsumexp(lax.stop_gradient(jnp.where(top > 0, -jnp.inf, log_p)), axis=1)
    log_s = jnp.where(jnp.isfinite(log_s), log_s, 0)  # one class, or all others at zero
    ratio = jnp.where(top > 0, 0, jnp.exp(log_p - log_s[:, None]))
    rows = rows_of(_with_intercept(features, intercept is not None), convention, log_s)
    return _Classes(rows, jnp.exp(log_p), ratio, top)


@one_program
def softmax_probe_hessian(
    features: Float[Array, "n d"],
    weights: Float[Array, "d k"],
    intercept: Float[Array, "k"] | None = None,
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Float[Array, "p p"]:
    r"""Hessian of softmax regression (cross-entropy) on ``features`` at ``weights``.

    ``1/n sum_i (x_i x_i^T) kron (diag p_i - p_i p_i^T) + damping I``; labels do not enter.
    The coordinates are ``W.ravel()``: feature-major, classes next to each other. With an intercept
    they are those of W with b as one more row, so p = (d + 1) k, otherwise p = d k.

    Without damping it is singular for every W: adding one vector to all columns of W changes no
    probability, so at least p/k eigenvalues are zero.

    Args:
      features: X [n, d].
      weights: W [d, k], where the Hessian is taken.
      intercept: b [k], or None for a probe without one.
      convention: ``"mean"`` or ``"sum"``.
      damping: in units of the mean-convention Hessian.

    Returns:
      Symmetric positive semi-definite [p, p]. For large p use `softmax_probe_operator`.

    Raises:
      ValueError: shapes that do not fit, or an unknown convention.
    """
    classes = _softmax_classes(features, weights, intercept, convention)
    rows = classes.rows
    (n, width), k, dtype = rows.scaled.shape, classes.ratio.shape[1], rows.scaled.dtype
    total = jnp.sum(classes.ratio, axis=1)

    @jax.checkpoint  # or the derivative would keep the weights of every pair
    def block(pair):
        one, other = pair[0], pair[1]
        p_one, p_other = classes.probabilities[:, one], classes.probabilities[:, other]
        r_one, r_other = classes.ratio[:, one], classes.ratio[:, other]
        top = classes.top[:, one] > 0
        same = jnp.where(top, p_one * total, r_one * (1 - p_one))
        weights = jnp.where(one == other, same, -jnp.where(top, p_one * r_other, r_one * p_other))
        return gram_of(rows._replace(weights=weights))

    pairs = jnp.stack(jnp.meshgrid(jnp.arange(k), jnp.arange(k), indexing="ij"), axis=-1)
    blocks = lax.map(block, pairs.reshape(-1, 2)).reshape(k, k, width, width)
    hessian = blocks.transpose(2, 0, 3, 1).reshape(width * k, width * k)
    return hessian + ridge_of(damping, convention, n, dtype) * jnp.eye(width * k, dtype=dtype)


def softmax_probe_operator(
    features: Float[Array, "n d"],
    weights: Float[Array, "d k"],
    intercept: Float[Array, "k"] | None = None,
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Matvec:
    """`softmax_probe_hessian` as a matvec ``[p] -> [p]`` at O(n d k); same arguments and errors."""
    classes = _softmax_classes(features, weights, intercept, convention)
    rows = classes.rows
    (n, width), k = rows.scaled.shape, classes.ratio.shape[1]
    ridge = ridge_of(damping, convention, n, rows.scaled.dtype)
    curvature = classes.probabilities, classes.ratio, classes.top

    def matvec(vector: Float[Array, "p"]) -> Float[Array, "p"]:
        v = as_vector(vector, width * k)
        x, probabilities, ratio, top, v, lam = in_one_dtype(rows.scaled, *curvature, v, ridge)
        scaled = times_power_of_two(v.reshape(width, k), rows.exponents[:, None])
        image = jnp.matmul(x, scaled, precision="highest")
        image = image - jnp.sum(top * image, axis=1, keepdims=True)  # zero at the top class
        outside = jnp.sum(ratio * image, axis=1, keepdims=True)
        mean = jnp.sum(probabilities * image, axis=1, keepdims=True)
        image = ratio * (image - mean) - top * probabilities * outside
        product = row_product(x, image) / rows.divisor
        return times_power_of_two(product, rows.exponents[:, None]).reshape(-1) + lam * v

    return matvec
