r"""Hessians of linear probes and of any loss, and Gram matrices that stream.

Linear probing fits a linear map on fixed features X [n, d]. Its Hessians, in the mean convention:

    l2        1/(2n) |X w - y|^2           H = X^T X / n
    logistic  mean log(1 + exp(-y x^T w))  H = X^T diag(p (1 - p)) X / n,       p = sigmoid(X w)
    softmax   mean cross-entropy of X W    H = 1/n sum_i (x_i x_i^T) kron (diag p_i - p_i p_i^T)

The sum convention is n times that. The l2 Hessian with several outputs is the same block for each,
so [d, d] is all there is. Damping is in units of the mean-convention Hessian: H + damping I, times
n in the sum convention; it is the Hessian of an attacker who uses that weight decay.

Operators are matvec closures: nothing of the Hessian's size is formed. Products are taken at
``precision="highest"``, since accelerators round float32 products by default, and added up over
blocks of rows. Powers of two are split off before anything is squared: what fits the dtype comes
out right, also where a sum of squares on the way to a mean, or p (1 - p) itself, would not fit.

float64 and float32 are computed in; float16 and bfloat16 are computed in float32, and so is the
result. Where a probe's features and weights, or an operator and its vector, differ, the wider dtype
is taken. NumPy's float64 is float32 while x64 is off.

Source of the l2 case: Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaximm.linalg.arrays import (
    EMPTY,
    as_float,
    as_matrix,
    as_square,
    column_exponents,
    computing_dtype,
    exponent_of,
    one_program,
    times_power_of_two,
)

CONVENTIONS = ("mean", "sum")
"""``"mean"``: H is an average over examples. ``"sum"``: n times that, damping included."""

Matvec = Callable[[Any], Any]
"""A linear map of one pytree (or one vector) to another of the same structure."""


def _check_rows(features, convention: str) -> Array:
    _check_convention(convention)
    return as_matrix(features, name="features")


def _check_convention(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}.")


def _divisor(convention: str, n: int) -> float:
    """What a sum over examples is divided by."""
    return float(n) if convention == "mean" else 1.0


def _ridge(damping, convention: str, n: int, dtype) -> Array:
    """The multiple of the identity that ``damping`` stands for."""
    return jnp.asarray(damping, dtype) * (1.0 if convention == "mean" else float(n))


def _common(*arrays: Array) -> tuple[Array, ...]:
    """The arrays in the widest of their dtypes."""
    dtype = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
    return tuple(array.astype(dtype) for array in arrays)


def _vector(vector, length: int) -> Array:
    """What an operator is applied to."""
    if jnp.shape(vector) != (length,):
        raise ValueError(f"vector must have shape ({length},), got {jnp.shape(vector)}.")
    return as_float(vector, name="vector")


_BLOCK = 4096
"""Rows that are summed in one go. A float32 sum of 2^24 ones takes no further one, and BLAS adds up
one product after the other; block by block the rounding error is that of some thousand rows, and
only a block at a time is weighted."""


def _sum_over_blocks(body, *arrays: Array) -> Array:
    """The sum of ``body(None, arrays)[1]`` over blocks of rows; `body` as `lax.scan` wants it."""
    n, block = arrays[0].shape[0], max(_BLOCK, *(x.shape[-1] for x in arrays if x.ndim == 2))
    whole = n - n % block  # a block is not shorter than wide: its sum is not larger than itself
    rest = body(None, tuple(x[whole:] for x in arrays))[1]
    if whole == 0:
        return rest
    blocks = tuple(x[:whole].reshape(-1, block, *x.shape[1:]) for x in arrays)
    return jnp.sum(lax.scan(body, None, blocks)[1], axis=0) + rest


@jax.checkpoint
def _block_product(carry, block):
    left, right = block
    return carry, jnp.matmul(left.T, right, precision="highest")


@jax.checkpoint
def _weighted_block(carry, block):
    x, weights = block
    return carry, jnp.matmul(x.T, x * weights[:, None], precision="highest")


def _product(left: Array, right: Array) -> Array:
    """left^T right, [n, a] and [n, b] to [a, b]."""
    return _sum_over_blocks(_block_product, left, right)


class _Rows(NamedTuple):
    """X, its rows times the roots of their weights, every column in a unit of its own: squares and
    sums stay numbers, and no column is lost beside a larger one."""

    scaled: Float[Array, "n q"]  # X_ij sqrt(weight_i) / 2^exponents_j, the largest about one
    exponents: Int[Array, "q"]
    weights: Float[Array, "n"] | None  # more of them, of any sign, about one in size; None: ones
    divisor: float


def _rows(features: Array, convention: str, log_weights: Array | None = None) -> _Rows:
    divisor = _divisor(convention, features.shape[0])
    if log_weights is None:
        exponents = _no_empty(column_exponents(features))
        return _Rows(times_power_of_two(features, -exponents[None, :]), exponents, None, divisor)
    # A weight may be no number of the dtype where weight times x^2 is one: a power of two a row.
    half = log_weights / 2
    whole = lax.stop_gradient(jnp.floor(half / math.log(2)))
    whole = jnp.where(jnp.isfinite(whole), jnp.maximum(whole, _LEAST), _LEAST)
    roots = jnp.exp(half - whole * math.log(2))
    whole = whole.astype(jnp.int32)
    exponents = _no_empty(column_exponents(features, whole))
    scaled = times_power_of_two(features, whole[:, None] - exponents[None, :]) * roots[:, None]
    return _Rows(scaled, exponents, None, divisor)


_LEAST = -(2**28)
"""Exponent of what is zero beside any number."""


def _no_empty(exponents: Array) -> Array:
    """0 for columns of zeros."""
    return jnp.where(exponents == EMPTY, 0, exponents)


def _in_two_units(matrix: Array, rows: Array, columns: Array) -> Array:
    """matrix_ij 2^(rows_i + columns_j)."""
    return times_power_of_two(matrix, rows[:, None] + columns[None, :])


def _gram(rows: _Rows) -> Array:
    """X^T diag(weights) X / divisor."""
    x, weights = rows.scaled, rows.weights
    total = _product(x, x) if weights is None else _sum_over_blocks(_weighted_block, x, weights)
    return _in_two_units(total / rows.divisor, rows.exponents, rows.exponents)


def _gram_operator(rows: _Rows, ridge: Array) -> Matvec:
    """v -> X^T diag(weights) X v / divisor + ridge v."""
    p = rows.scaled.shape[1]

    def matvec(vector: Float[Array, "p"]) -> Float[Array, "p"]:
        x, v, lam = _common(rows.scaled, _vector(vector, p), ridge)
        image = jnp.matmul(x, times_power_of_two(v, rows.exponents), precision="highest")
        product = _product(x, image[:, None])[:, 0] / rows.divisor
        return times_power_of_two(product, rows.exponents) + lam * v

    return matvec


def _with_intercept(features: Array, intercept: bool) -> Array:
    """Features with a last column of ones where the probe has an intercept."""
    if not intercept:
        return features
    return jnp.concatenate([features, jnp.ones((features.shape[0], 1), features.dtype)], axis=1)


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
    features = _check_rows(features, convention)
    n, d = features.shape
    gram = _gram(_rows(features, convention))
    ridge = _ridge(damping, convention, n, features.dtype)
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
    features = _check_rows(features, convention)
    n = features.shape[0]
    ridge = _ridge(damping, convention, n, features.dtype)
    return _gram_operator(_rows(features, convention), ridge)


def _divide(length: int, mesh: Mesh, axis: str | None, what: str) -> None:
    """Refuse an axis that the mesh lacks or that does not divide a length."""
    if axis is None:
        return
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has axes {list(mesh.shape)}, got {axis!r}.")
    if length % mesh.shape[axis]:
        raise ValueError(
            f"{length} {what} do not divide by the {mesh.shape[axis]} devices of axis {axis!r}; "
            "pad with zeros, which adds eigenvalues 0."
        )


def sharded_l2_probe_operator(
    features: Float[Array, "n d"],
    mesh: Mesh,
    *,
    rows: str | None = None,
    columns: str | None = None,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Matvec:
    r"""`l2_probe_operator` for features spread over devices by rows, by columns, or by both.

    Every device holds its part of X and nothing larger; vectors [d] are whole on each. A matvec
    costs one all-reduce for each axis that is given:

    - rows: of the result, v -> sum over devices of X_i^T (X_i v), [d];
    - columns: of the image, X v = sum of X_j v_j, [n]; the result stays spread over `columns`
      (JAX gathers it where it is needed whole).

    For use outside ``shard_map``, as a function of whole arrays; inside ``jit`` for speed. Under
    ``jit`` `l2_probe_operator` of features placed with a ``NamedSharding`` does the same by the
    compiler's choice.

    Args:
      features: X [n, d]; placed as the axes say, or to be placed so.
      mesh: of ``AxisType.Auto`` axes.
      rows: mesh axis over which n is spread, or None.
      columns: mesh axis over which d is spread, or None.
      convention: ``"mean"`` or ``"sum"``.
      damping: in units of the mean-convention Hessian.

    Raises:
      ValueError: as `l2_probe_operator`; an unknown axis, one axis twice, or a length that does
        not divide by its devices.
    """
    features = _check_rows(features, convention)
    n, d = features.shape
    _divide(n, mesh, rows, "rows")
    _divide(d, mesh, columns, "columns")
    if rows is not None and rows == columns:
        raise ValueError(f"rows and columns must be different axes, got {rows!r} for both.")
    divisor, ridge = _divisor(convention, n), _ridge(damping, convention, n, features.dtype)

    def per_device(x, v):
        image = jnp.matmul(x, v, precision="highest")
        image = image if columns is None else lax.psum(image, columns)
        # Divided first: the sum may not fit where the mean does.
        result = _product(x, image[:, None] / divisor)[:, 0]
        return result if rows is None else lax.psum(result, rows)

    spread = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(PartitionSpec(rows, columns), PartitionSpec(columns)),
        out_specs=PartitionSpec(columns),
    )

    def matvec(vector: Float[Array, "d"]) -> Float[Array, "d"]:
        x, v, lam = _common(features, _vector(vector, d), ridge)
        return spread(x, v) + lam * v

    return matvec


def dual_gram(
    features: Float[Array, "n d"], mesh: Mesh, *, columns: str, convention: str = "mean"
) -> Float[Array, "n n"]:
    """X X^T / n (or X X^T) of features whose columns are spread over devices: one all-reduce.

    Its eigenvalues are those of the l2-probe Hessian, but for the d - n zeros of the latter.

    Raises:
      ValueError: as `sharded_l2_probe_operator`.
    """
    features = _check_rows(features, convention)
    n, d = features.shape
    _divide(d, mesh, columns, "columns")

    def per_device(x):
        return lax.psum(_product(x.T, x.T), columns)

    exponents = _no_empty(column_exponents(features.T))
    gram = jax.shard_map(
        per_device, mesh=mesh, in_specs=PartitionSpec(None, columns), out_specs=PartitionSpec()
    )(times_power_of_two(features, -exponents[:, None]))
    return _in_two_units(gram / _divisor(convention, n), exponents, exponents)


def column_sharded_gram(
    features: Float[Array, "n d"],
    mesh: Mesh,
    *,
    axis: str,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Float[Array, "d d"]:
    r"""`l2_probe_hessian` with columns spread over devices: each holds K[:, block], [d, d / N].

    Rows of X may arrive spread over the same axis; one all-gather makes X whole on each device,
    which then multiplies with its own columns: the work is divided by N, and no device ever has
    more than X and its block. Over a stream, add up the results of the batches (sum convention).

    Args:
      features: X [n, d], d and n divisible by the devices of `axis`.
      mesh: of ``AxisType.Auto`` axes.
      axis: the mesh axis.
      convention: ``"mean"`` or ``"sum"``.
      damping: in units of the mean-convention Hessian.

    Returns:
      A global [d, d] array with sharding ``PartitionSpec(None, axis)``.

    Raises:
      ValueError: as `sharded_l2_probe_operator`.
    """
    features = _check_rows(features, convention)
    n, d = features.shape
    _divide(n, mesh, axis, "rows")
    _divide(d, mesh, axis, "columns")
    block = d // mesh.shape[axis]
    ridge = _ridge(damping, convention, n, features.dtype)

    exponents = _no_empty(column_exponents(features))

    def per_device(x, exponents, ridge):
        whole = lax.all_gather(x, axis, tiled=True)
        first = lax.axis_index(axis) * block
        mine = lax.dynamic_slice_in_dim(whole, first, block, axis=1)
        gram = _product(whole, mine) / _divisor(convention, n)
        own = lax.dynamic_slice_in_dim(exponents, first, block)
        gram = _in_two_units(gram, exponents, own)
        column = first + jnp.arange(block, dtype=first.dtype)
        diagonal = jnp.arange(d, dtype=first.dtype)[:, None] == column[None, :]
        return gram + jnp.where(diagonal, ridge, 0)

    return jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(PartitionSpec(axis), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, axis),
    )(times_power_of_two(features, -exponents[None, :]), exponents, ridge)


def column_sharded_operator(gram: Float[Array, "d d"], mesh: Mesh, *, axis: str) -> Matvec:
    """v -> K v for a symmetric K as `column_sharded_gram` gives it: one all-reduce of [d].

    Raises:
      ValueError: K not square, or as `sharded_l2_probe_operator`.
    """
    gram = as_square(gram, name="gram")
    _divide(gram.shape[1], mesh, axis, "columns")

    def per_device(block, part):
        return lax.psum(jnp.matmul(block, part, precision="highest"), axis)

    spread = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(PartitionSpec(None, axis), PartitionSpec(axis)),
        out_specs=PartitionSpec(),
    )
    return lambda vector: spread(*_common(gram, _vector(vector, gram.shape[0])))


def _logits(features: Array, weights: Array, intercept: Array | None) -> tuple[Array, Array]:
    """X W + b [n, k] over powers of two, and their exponents [n, 1]: no product that a row is made
    of can overflow, or be lost beside those of another row or feature, where X W is a number."""
    w_units = _no_empty(column_exponents(weights.T))
    w = times_power_of_two(weights, -w_units[:, None])
    unit = _no_empty(column_exponents(features.T, w_units))[:, None]
    x = times_power_of_two(features, w_units[None, :] - unit)
    scaled = jnp.matmul(x, w, precision="highest")
    if intercept is None:
        return scaled, unit
    common = jnp.maximum(unit, exponent_of(intercept))
    common = jnp.where(jnp.all(intercept == 0), unit, common)
    offset = times_power_of_two(jnp.broadcast_to(intercept, scaled.shape), -common)
    return times_power_of_two(scaled, unit - common) + offset, common


def _logistic_rows(features, weights, intercept, convention: str) -> _Rows:
    """The augmented features, weighted by p (1 - p)."""
    features = _check_rows(features, convention)
    weights = as_float(weights, name="weights")
    if weights.shape != features.shape[1:]:
        raise ValueError(f"weights must have shape {features.shape[1:]}, got {weights.shape}.")
    features, weights = _common(features, weights)
    if intercept is not None:
        if jnp.ndim(intercept) != 0:
            raise ValueError(f"intercept must be one number, got shape {jnp.shape(intercept)}.")
        intercept = jnp.asarray(intercept, features.dtype)
    logits = times_power_of_two(*_logits(features, weights[:, None], intercept))[:, 0]
    # p (1 - p) = sigmoid(z) sigmoid(-z), as its logarithm: p rounds to one from z = 17 in float32.
    log_curvature = jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits)
    return _rows(_with_intercept(features, intercept is not None), convention, log_curvature)


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
    ridge = _ridge(damping, convention, n, rows.scaled.dtype)
    return _gram(rows) + ridge * jnp.eye(p, dtype=ridge.dtype)


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
    return _gram_operator(rows, _ridge(damping, convention, n, rows.scaled.dtype))


class _Classes(NamedTuple):
    """Softmax curvature of each row in the unit s = 1 - p_top, whose root is in `rows`.

    diag p - p p^T is s times: ratio_c (1 - p_c) on the diagonal and -ratio_c p_e beside it for the
    classes c that are not the top one, and what makes every row sum zero for the top one. No
    number is the difference of two close ones: where p_top rounds to one, 1 - p_top keeps its
    digits, and where 1 - p_top is no number of the dtype, s x^2 may be one.
    """

    rows: _Rows  # augmented
    probabilities: Float[Array, "n k"]
    ratio: Float[Array, "n k"]  # p / s, zero at the top class
    top: Float[Array, "n k"]  # one at the top class


def _softmax_classes(features, weights, intercept, convention: str) -> _Classes:
    features = _check_rows(features, convention)
    weights = as_float(weights, name="weights")
    if weights.ndim != 2 or weights.shape[0] != features.shape[1]:
        raise ValueError(
            f"weights must have shape [{features.shape[1]}, k], got {weights.shape}; "
            "rows are features, columns are classes."
        )
    features, weights = _common(features, weights)
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
    rows = _rows(_with_intercept(features, intercept is not None), convention, log_s)
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
        return _gram(rows._replace(weights=weights))

    pairs = jnp.stack(jnp.meshgrid(jnp.arange(k), jnp.arange(k), indexing="ij"), axis=-1)
    blocks = lax.map(block, pairs.reshape(-1, 2)).reshape(k, k, width, width)
    hessian = blocks.transpose(2, 0, 3, 1).reshape(width * k, width * k)
    return hessian + _ridge(damping, convention, n, dtype) * jnp.eye(width * k, dtype=dtype)


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
    ridge = _ridge(damping, convention, n, rows.scaled.dtype)
    curvature = classes.probabilities, classes.ratio, classes.top

    def matvec(vector: Float[Array, "p"]) -> Float[Array, "p"]:
        v = _vector(vector, width * k)
        x, probabilities, ratio, top, v, lam = _common(rows.scaled, *curvature, v, ridge)
        scaled = times_power_of_two(v.reshape(width, k), rows.exponents[:, None])
        image = jnp.matmul(x, scaled, precision="highest")
        image = image - jnp.sum(top * image, axis=1, keepdims=True)  # zero at the top class
        outside = jnp.sum(ratio * image, axis=1, keepdims=True)
        mean = jnp.sum(probabilities * image, axis=1, keepdims=True)
        image = ratio * (image - mean) - top * probabilities * outside
        product = _product(x, image) / rows.divisor
        return times_power_of_two(product, rows.exponents[:, None]).reshape(-1) + lam * v

    return matvec


def _computing(tree):
    """A pytree with its float16 and bfloat16 leaves, NumPy's too, as `as_float` has them."""

    def leaf(value):
        dtype = getattr(value, "dtype", None)
        floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        return as_float(value) if floating else value

    return jax.tree.map(leaf, tree)


def dense_hessian(loss_fn: Callable[..., Array]) -> Callable[..., Array]:
    """The function that gives the dense Hessian of ``loss_fn`` in its first argument.

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar``, params any pytree of floating-point arrays.
        Half-precision leaves of params and args reach it as float32.

    Returns:
      ``hessian(params, *args) -> [p, p]``, in the coordinates of
      ``jax.flatten_util.ravel_pytree(params)``. A plain function: put ``jax.jit`` around it. It
      costs p Hessian-vector products and p^2 memory.

    >>> loss = lambda params: params["a"] ** 2 * params["b"]
    >>> dense_hessian(loss)({"a": jnp.array(1.0), "b": jnp.array(3.0)}).tolist()
    [[6.0, 2.0], [2.0, 0.0]]
    """

    def hessian(params, *args):
        flat, unravel = ravel_pytree(_computing(params))
        args = _computing(args)
        return jax.hessian(lambda vector: loss_fn(unravel(vector), *args))(flat)

    return hessian


def hvp(loss_fn: Callable[..., Array], params, *args) -> Matvec:
    """Hessian-vector products of ``loss_fn`` at ``params``, forward over reverse.

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar``.
      params: pytree where the Hessian is taken; half-precision leaves, of `args` too, as float32.
      *args: further arguments, held fixed.

    Returns:
      ``matvec(tangent) -> pytree``: both like ``params``. About the cost of two gradients.
    """
    params, args = _computing(params), _computing(args)
    gradient = jax.grad(lambda point: loss_fn(point, *args))

    def matvec(tangent):
        return jax.jvp(gradient, (params,), (_computing(tangent),))[1]

    return matvec


def gauss_newton_operator(
    outputs_fn: Callable[[Any], Any], output_loss_fn: Callable[[Any], Array], params
) -> Matvec:
    """Products with the (generalised) Gauss-Newton matrix ``J^T H_out J``.

    J is the Jacobian of ``outputs_fn`` at ``params`` and H_out the Hessian of the loss in the
    outputs. It equals the Hessian where the outputs are linear in the parameters, and is positive
    semi-definite whenever the loss is convex in the outputs.

    Args:
      outputs_fn: ``outputs_fn(params) -> outputs``, any pytree; close over the inputs.
      output_loss_fn: ``output_loss_fn(outputs) -> scalar``; close over the targets.
      params: pytree where the matrix is taken.

    Returns:
      ``matvec(tangent) -> pytree``: both like ``params``. One jvp, one vjp, and one
      Hessian-vector product in the outputs.
    """

    params = _computing(params)

    def matvec(tangent):
        outputs, outputs_dot = jax.jvp(outputs_fn, (params,), (_computing(tangent),))
        curved = hvp(output_loss_fn, outputs)(outputs_dot)
        _, pullback = jax.vjp(outputs_fn, params)
        return pullback(curved)[0]

    return matvec


class FlatOperator(NamedTuple):
    """A matvec on vectors ``[dim] -> [dim]``, as Krylov methods want it."""

    matvec: Matvec
    dim: int


def flatten_operator(matvec: Matvec, params) -> FlatOperator:
    """A pytree matvec in the coordinates of ``ravel_pytree(params)``.

    Args:
      matvec: linear map of pytrees like ``params``, such as `hvp` returns.
      params: a pytree that gives structure, shapes and dtype; its values do not matter.
    """
    flat, unravel = ravel_pytree(_computing(params))
    return FlatOperator(lambda vector: ravel_pytree(matvec(unravel(vector)))[0], flat.shape[0])


class GramState(NamedTuple):
    """Sums over the rows seen so far; the target fields are None where no targets are kept.

    Natural sums, so that states can be added up: they are inf where the sum does not fit the dtype,
    also where the mean would.
    """

    gram: Float[Array, "d d"]  # sum of x x^T
    feature_sum: Float[Array, "d"]
    count: Int[Array, ""]  # rows; int32, so fewer than 2^31 of them
    cross: Float[Array, "d ..."] | None  # sum of x y^T
    target_square: Float[Array, "..."] | None  # sum of y^2, per output
    target_sum: Float[Array, "..."] | None


class GramMoments(NamedTuple):
    """`GramState` over the number of rows (mean convention) or as it is (sum convention)."""

    gram: Float[Array, "d d"]
    cross: Float[Array, "d ..."] | None
    target_square: Float[Array, "..."] | None
    feature_mean: Float[Array, "d"]  # a mean in both conventions
    target_mean: Float[Array, "..."] | None  # likewise
    count: Int[Array, ""]


def gram_init(
    width: int, *, target_shape: tuple[int, ...] | None = None, dtype: Any = None
) -> GramState:
    """An empty `GramState`.

    Args:
      width: d, the number of features.
      target_shape: shape of one target: ``()`` for y [n], ``(k,)`` for y [n, k], None (default)
        to keep no target moments.
      dtype: of the sums, float32 for a half one; the default is JAX's default float. Every update
        rounds the running sums, so prefer few large updates, and float64 where the machine has it.

    Raises:
      ValueError: ``width`` not positive, or not a float dtype.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    dtype = jax.dtypes.canonicalize_dtype(float if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a float dtype, got {dtype}.")
    dtype = computing_dtype(dtype)
    targets = target_shape is not None
    return GramState(
        gram=jnp.zeros((width, width), dtype),
        feature_sum=jnp.zeros(width, dtype),
        count=jnp.zeros((), jnp.int32),
        cross=jnp.zeros((width, *target_shape), dtype) if targets else None,
        target_square=jnp.zeros(target_shape, dtype) if targets else None,
        target_sum=jnp.zeros(target_shape, dtype) if targets else None,
    )


@one_program
def gram_update(
    state: GramState,
    features: Float[Array, "n d"],
    targets: Float[Array, "n ..."] | None = None,
) -> GramState:
    """Add rows to the sums. Rows are cast to the dtype of the state before they are multiplied.

    Args:
      state: from `gram_init`; its dtype decides the precision.
      features: X [n, d]; n = 0 changes nothing.
      targets: y [n] or [n, k], if and only if the state keeps target moments.

    Raises:
      ValueError: another width, targets missing or not asked for, or another number of rows.
    """
    dtype = state.gram.dtype
    if jnp.ndim(features) != 2 or jnp.shape(features)[1] != state.gram.shape[0]:
        raise ValueError(
            f"features must have shape [n, {state.gram.shape[0]}], got {jnp.shape(features)}."
        )
    if (targets is None) != (state.cross is None):
        raise ValueError(
            "targets must be given exactly when gram_init was given a target_shape; "
            f"the state {'keeps none' if state.cross is None else 'needs them'}."
        )
    n = jnp.shape(features)[0]
    features = as_float(features, name="features").astype(dtype)
    ones = jnp.ones((n, 1), dtype)
    state = state._replace(
        gram=state.gram + _product(features, features),
        feature_sum=state.feature_sum + _product(features, ones)[:, 0],
        count=state.count + n,
    )
    if targets is None or state.cross is None:
        return state
    targets = jnp.asarray(targets)
    if targets.shape != (n, *state.cross.shape[1:]):
        raise ValueError(
            f"targets must have shape {(n, *state.cross.shape[1:])}, got {targets.shape}."
        )
    targets = targets.astype(dtype)  # class numbers too: they are exact
    flat = targets.reshape(n, math.prod(targets.shape[1:]))
    shape = targets.shape[1:]
    assert state.target_square is not None  # gram_init sets all three or none
    assert state.target_sum is not None
    return state._replace(
        cross=state.cross + _product(features, flat).reshape(-1, *shape),
        target_square=state.target_square + _product(flat**2, ones)[:, 0].reshape(shape),
        target_sum=state.target_sum + _product(flat, ones)[:, 0].reshape(shape),
    )


@one_program
def gram_merge(first: GramState, second: GramState) -> GramState:
    """The sums over the rows of both, which must keep the same things in the same dtype.

    Raises:
      ValueError: different widths, target shapes or dtypes.
    """
    shapes = [
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] for state in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the two states do not fit together: {shapes[0]} and {shapes[1]}.")
    return jax.tree.map(jnp.add, first, second)


# Rows are counted in float digits of base 2^12 on the wire: exact in float32 for 2^12 devices.
_DIGIT_BITS = 12


def psum_gram(state: GramState, axis_name: str) -> GramState:
    """The sums over the rows of all devices, with exactly one ``lax.psum``.

    For use inside ``jax.shard_map`` or ``jax.pmap``, after each device has updated a state of its
    own with its own rows; do it once at the end, not after each batch, or rows are counted twice.
    The state travels as one vector, the count as three digits that float32 holds exactly.

    Args:
      state: this device's sums.
      axis_name: the mesh or pmap axis.

    Returns:
      The total, the same on every device.
    """
    mask = (1 << _DIGIT_BITS) - 1
    digits = jnp.stack([(state.count >> (_DIGIT_BITS * i)) & mask for i in range(3)])
    sums = state._replace(count=None)
    flat, unravel = ravel_pytree(sums)
    total = lax.psum(jnp.concatenate([flat, digits.astype(flat.dtype)]), axis_name)
    digits = total[-3:].astype(state.count.dtype)
    count = digits[0] + (digits[1] << _DIGIT_BITS) + (digits[2] << (2 * _DIGIT_BITS))
    return unravel(total[:-3])._replace(count=count)


@one_program
def gram_finalise(
    state: GramState,
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> GramMoments:
    r"""Moments of the rows seen: ``gram`` is then the l2-probe Hessian, as `l2_probe_hessian`.

    Args:
      state: the sums.
      convention: ``"mean"`` or ``"sum"``, for ``gram``, ``cross`` and ``target_square``.
      damping: added to the diagonal of ``gram``, in units of the mean convention.

    Returns:
      `GramMoments`; NaN in what is divided by the count where no row has been seen.

    Raises:
      ValueError: an unknown convention.
    """
    _check_convention(convention)
    dtype = state.gram.dtype
    count = state.count.astype(dtype)
    mean = convention == "mean"
    ridge = jnp.asarray(damping, dtype) * (1 if mean else count)

    def moment(total):
        return total / count if mean and total is not None else total

    return GramMoments(
        gram=moment(state.gram) + ridge * jnp.eye(state.gram.shape[0], dtype=dtype),
        cross=moment(state.cross),
        target_square=moment(state.target_square),
        feature_mean=state.feature_sum / count,
        target_mean=None if state.target_sum is None else state.target_sum / count,
        count=state.count,
    )
