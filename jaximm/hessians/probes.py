"""Hessians of linear probes, dense and as operators: squares, logistic, softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaximm.hessians.rows import (
    Matvec,
    Rows,
    check_rows,
    in_one_dtype,
    in_two_units,
    matrix_product,
    no_empty,
    ridge_of,
    row_operator,
    rows_of,
    sum_over_rows,
)
from jaximm.linalg.arrays import (
    as_float,
    column_exponents,
    exponent_of,
    one_program,
    times_power_of_two,
)


def _unweighted(x: Array) -> tuple[Array, None]:
    """Rows of the l2 probe."""
    return x, None


def _gram_of(rows: Rows, damping, convention: str) -> Array:
    """X^T diag(weights) X / divisor, damped."""
    total = sum_over_rows(rows, lambda scaled: matrix_product(scaled, scaled)) / rows.divisor
    gram = in_two_units(total, rows.units, rows.units)
    return gram + _ridge(rows, damping, convention) * jnp.eye(len(gram), dtype=gram.dtype)


def _ridge(rows: Rows, damping, convention: str) -> Array:
    return ridge_of(damping, convention, rows.features.shape[0], rows.features.dtype)


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
    rows = rows_of(check_rows(features, convention), _unweighted, (), convention)
    return _gram_of(rows, damping, convention)


def l2_probe_operator(
    features: Float[Array, "n d"],
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Matvec:
    """`l2_probe_hessian` as a matvec ``[d] -> [d]``: two products with X, nothing [d, d].

    Arguments and errors are those of `l2_probe_hessian`.
    """
    rows = rows_of(check_rows(features, convention), _unweighted, (), convention)
    return row_operator(rows, _ridge(rows, damping, convention))


def _with_intercept(features: Array, intercept: Array | None) -> Array:
    """Features with a last column of ones where the probe has an intercept."""
    if intercept is None:
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


def _logistic_weighed(x: Array, weights: Array, intercept: Array | None) -> tuple[Array, Array]:
    """Rows of the logistic probe, weighted by p (1 - p) = sigmoid(z) sigmoid(-z): as its logarithm,
    since p rounds to one from z = 17 in float32."""
    logits = times_power_of_two(*_logits(x, weights[:, None], intercept))[:, 0]
    log_curvature = jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits)
    return _with_intercept(x, intercept), log_curvature


def _logistic_rows(features, weights, intercept, convention: str) -> Rows:
    features = check_rows(features, convention)
    weights = as_float(weights, name="weights")
    if weights.shape != features.shape[1:]:
        raise ValueError(f"weights must have shape {features.shape[1:]}, got {weights.shape}.")
    features, weights = in_one_dtype(features, weights)
    if intercept is not None:
        if jnp.ndim(intercept) != 0:
            raise ValueError(f"intercept must be one number, got shape {jnp.shape(intercept)}.")
        intercept = jnp.asarray(intercept, features.dtype)
    return rows_of(features, _logistic_weighed, (weights, intercept), convention)


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
    return _gram_of(rows, damping, convention)


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
    return row_operator(rows, _ridge(rows, damping, convention))


def _softmax_weighed(x: Array, weights: Array, intercept: Array | None) -> tuple[Array, ...]:
    """Rows of the softmax probe in the unit s = 1 - p_top; probabilities, p / s, the top class.

    diag p - p p^T is s times: ratio_c (1 - p_c) on the diagonal and -ratio_c p_e beside it for the
    classes c that are not the top one (ratio = p / s), and what makes every row sum zero for the
    top one. No number is the difference of two close ones: where p_top rounds to one, 1 - p_top
    keeps its digits, and where 1 - p_top is no number of the dtype, s x^2 may be one.
    """
    scaled, unit = _logits(x, weights, intercept)
    top = jax.nn.one_hot(jnp.argmax(scaled, axis=1), weights.shape[1], dtype=scaled.dtype)
    # The largest is subtracted in the smaller unit: inf - inf would be NaN.
    below = scaled - lax.stop_gradient(jnp.max(scaled, axis=1, keepdims=True))
    log_p = jax.nn.log_softmax(times_power_of_two(below, unit), axis=1)
    log_s = jax.nn.logsumexp(lax.stop_gradient(jnp.where(top > 0, -jnp.inf, log_p)), axis=1)
    log_s = jnp.where(jnp.isfinite(log_s), log_s, 0)  # one class, or all others at zero
    ratio = jnp.where(top > 0, 0, jnp.exp(log_p - log_s[:, None]))
    return _with_intercept(x, intercept), log_s, jnp.exp(log_p), ratio, top


def _pair_weights(one: Array, other: Array, p: Array, ratio: Array, top: Array) -> Array:
    """(diag p - p p^T) / s at a pair of classes [b]."""
    on_top = top[:, one] > 0
    same = jnp.where(on_top, p[:, one] * jnp.sum(ratio, axis=1), ratio[:, one] * (1 - p[:, one]))
    beside = jnp.where(on_top, p[:, one] * ratio[:, other], ratio[:, one] * p[:, other])
    return jnp.where(one == other, same, -beside)


def _softmax_curve(p: Array, ratio: Array, top: Array, change: Array) -> Array:
    """(diag p - p p^T) / s times a change of the logits [b, k]."""
    change = change - jnp.sum(top * change, axis=1, keepdims=True)  # zero at the top class
    outside = jnp.sum(ratio * change, axis=1, keepdims=True)
    mean = jnp.sum(p * change, axis=1, keepdims=True)
    return ratio * (change - mean) - top * p * outside


def _softmax_rows(features, weights, intercept, convention: str) -> Rows:
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
    return rows_of(features, _softmax_weighed, (weights, intercept), convention)


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
    rows = _softmax_rows(features, weights, intercept, convention)
    width, k = rows.units.shape[0], jnp.shape(weights)[1]
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(k), jnp.arange(k), indexing="ij"), axis=-1)

    def products(scaled, *classes):
        @jax.checkpoint  # or the derivative would keep the weights of every pair
        def product(pair):
            weights = _pair_weights(pair[0], pair[1], *classes)
            return matrix_product(scaled, scaled * weights[:, None])

        return lax.map(product, pairs.reshape(-1, 2))

    total = sum_over_rows(rows, products) / rows.divisor
    blocks = jax.vmap(in_two_units, (0, None, None))(total, rows.units, rows.units)
    blocks = blocks.reshape(k, k, width, width)
    hessian = blocks.transpose(2, 0, 3, 1).reshape(width * k, width * k)
    ridge = _ridge(rows, damping, convention)
    return hessian + ridge * jnp.eye(width * k, dtype=hessian.dtype)


def softmax_probe_operator(
    features: Float[Array, "n d"],
    weights: Float[Array, "d k"],
    intercept: Float[Array, "k"] | None = None,
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Matvec:
    """`softmax_probe_hessian` as a matvec ``[p] -> [p]`` at O(n d k); same arguments and errors."""
    rows = _softmax_rows(features, weights, intercept, convention)
    ridge = _ridge(rows, damping, convention)
    return row_operator(rows, ridge, jnp.shape(weights)[1], _softmax_curve)
