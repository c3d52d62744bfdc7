r"""Exact linear erasure: the smallest affine map after which no linear predictor sees a label.

Rows x [d] with labels z [k]; r(x) = x A + b. If Cov(r(x), z) = 0 on a set of rows, then for every
loss convex in the prediction no predictor r(x) W + c has a lower mean loss on those rows than the
best constant (Belrose et al. 2023, https://arxiv.org/abs/2306.03819, theorems 3.1 to 3.4): the
gradient in W at the best constant is E[r(x) g(z)^T] with E g(z) = 0 and g affine in z for one-hot
labels and for least squares, so it is zero. A label erased as a number is erased for least squares;
for the logistic loss give one-hot (or 0/1) labels.

Which map: with D = I - A, S = Cov(x, z) of the labelled rows and K the covariance of the rows whose
change is to be smallest (the same rows, or those of another task),

    minimise  E |r(x) - x|^2 = tr(D^T K D)   over D with S^T D = S^T  (and b = mean D),

a least-squares problem per column of D under the same constraints. Its stationary points have
K D = S Lambda, so, S of full column rank (else any basis of its range) and K invertible,

    D = K^{-1} S (S^T K^{-1} S)^{-1} S^T.

D is a projection, and the minimiser is the same for every norm |r(x) - x|_M: a head of any shape
behind the map changes as little as it can. The removed part x D and the kept part x A are
uncorrelated in the metric, A^T K D = 0. Belrose et al. is K = Cov(x) of the labelled rows.

A singular K. In the labels' own metric S lies in the range of K (Cauchy and Schwarz), so K^{-1} is
the pseudo-inverse, in the units below, and directions without data are left alone. In another
task's metric a label may lie partly where that task has no data; there erasing costs it nothing, so
K^{-1} is the inverse of K + floor I, floor the rounding level: within floor |D|^2 of the least
cost.

Without centring (for probes without an intercept) the same with raw second moments, E[r(x) z^T] = 0
and b = 0: then no r(x) W beats predicting zero in least squares.

Everything is computed in coordinates x_j / rms(x_j), so no result depends on the features' units.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm.linalg.extremes import check_matrix


class Moments(Protocol):
    """Means over rows; `LabelMoments` and `jaximm.hessians.GramMoments` (``"mean"``) are such."""

    @property
    def gram(self) -> Array:
        """E[x x^T], [d, d]."""
        ...

    @property
    def cross(self) -> Array | None:
        """E[x z^T], [d, k] or [d]; None for rows without labels."""
        ...

    @property
    def target_square(self) -> Array | None:
        """E[z^2], [k] or scalar."""
        ...

    @property
    def feature_mean(self) -> Array:
        """E[x], [d]."""
        ...

    @property
    def target_mean(self) -> Array | None:
        """E[z], [k] or scalar."""
        ...

    @property
    def count(self) -> Array:
        """Number of rows, scalar."""
        ...


class LabelMoments(NamedTuple):
    """`Moments` of one array of rows, in float."""

    gram: Float[Array, "d d"]
    cross: Float[Array, "d k"]
    target_square: Float[Array, "k"]
    feature_mean: Float[Array, "d"]
    target_mean: Float[Array, "k"]
    count: Int[Array, ""]


class Eraser(NamedTuple):
    """An affine map of rows, r(x) = x @ matrix + bias.

    `rank`: independent label directions removed; `matrix` has rank d - rank. `tolerance`: singular
    values of the rms-scaled E[x z^T] - mean mean^T at or below it count as rounding; a label
    direction this weak is not removed.
    """

    matrix: Float[Array, "d d"]
    bias: Float[Array, "d"]
    rank: Int[Array, ""]
    tolerance: Float[Array, ""]


def label_moments(features: Float[Array, "n d"], labels: Float[Array, "n k"]) -> LabelMoments:
    """`LabelMoments` of all rows at once. For a stream use `jaximm.hessians.gram_update`.

    Args:
      features: X, any float dtype.
      labels: Z of the same dtype; for classes one-hot.

    Raises:
      ValueError: not two non-empty float matrices of one dtype and number of rows.
    """
    check_matrix(features)
    check_matrix(labels)
    if features.shape[0] != labels.shape[0] or features.dtype != labels.dtype:
        raise ValueError(
            f"features and labels must have one number of rows and one dtype, got "
            f"{features.dtype}{list(features.shape)} and {labels.dtype}{list(labels.shape)}."
        )
    n = features.shape[0]
    return LabelMoments(
        gram=_dot(features.T, features) / n,
        cross=_dot(features.T, labels) / n,
        target_square=jnp.mean(labels**2, axis=0),
        feature_mean=jnp.mean(features, axis=0),
        target_mean=jnp.mean(labels, axis=0),
        count=jnp.asarray(n, jnp.int32),
    )


def linear_eraser(
    labelled: Moments,
    *,
    metric: Moments | None = None,
    centred: bool = True,
    damping: float | Float[Array, ""] = 0.0,
    rtol: float | Float[Array, ""] | None = None,
) -> Eraser:
    r"""The affine map of least cost after which no linear predictor beats a constant.

    On the rows of `labelled`, Cov(r(x), z) = 0 (`centred`) or E[r(x) z^T] = 0. Idempotent:
    r(r(x)) = r(x). See the module for the formula. One eigendecomposition [d, d], one SVD [d, k].

    Edge cases: labels that no feature is correlated with give rank 0, the identity. More
    independent label directions than features (k >= d) give A = 0: all is removed. A feature or a
    label that is always zero is left alone. NaN gives NaN.

    Args:
      labelled: moments of the labelled rows, float32 or float64, with `cross` [d, k] or [d].
      metric: moments of the rows whose change E |r(x) - x|^2 is least; None: of the same rows.
        Its labels are not read.
      centred: False for probes without an intercept; then bias = 0.
      damping: >= 0; added to the eigenvalues of K in rms units, so K + damping diag(E x_j^2). The
        constraint holds exactly whatever it is; what it costs is optimality on these rows, what it
        buys is a map that fits the noise of few rows less. May be traced.
      rtol: of the rank of the labels and of K, in rms units (where |S|_2 <= sqrt(d k)). None:
        eps (max(d, k) + 4 sqrt(n (d + k))), the rounding of sums over n rows.

    Returns:
      `Eraser` in the dtype of the moments; `metric`'s mean is a fixed point if `centred`.

    Raises:
      ValueError: moments without labels, shapes or dtypes that do not fit, damping < 0.

    References:
      Belrose et al. (2023), https://arxiv.org/abs/2306.03819, theorem 4.3.
    """
    cross, target_mean, target_square = _labels(labelled)
    own_metric = metric is None
    metric = labelled if metric is None else metric
    _check(labelled.gram, cross, metric.gram, damping)
    d, k = cross.shape
    dtype = cross.dtype

    covariance, kernel = cross, metric.gram
    if centred:
        covariance = cross - jnp.outer(labelled.feature_mean, target_mean)
        kernel = kernel - jnp.outer(metric.feature_mean, metric.feature_mean)
    if rtol is None:
        rows = jnp.minimum(labelled.count, metric.count).astype(dtype)
        rounding = float(jnp.finfo(dtype).eps)
        tolerance = rounding * (max(d, k) + 4 * jnp.sqrt(rows * (d + k)))
    else:
        tolerance = jnp.asarray(rtol, dtype)

    # Units of the labels first, for the rank: rounding of S_jc is eps rms(x_j) rms(z_c).
    unit = _positive(jnp.sqrt(jnp.maximum(jnp.diagonal(labelled.gram), 0)))
    label_unit = _positive(jnp.sqrt(jnp.maximum(target_square, 0)))
    left, values, _ = jnp.linalg.svd(
        covariance / unit[:, None] / label_unit[None, :], full_matrices=False
    )
    kept = values > tolerance  # Not >=: labels all zero would have full rank.
    directions = left * kept.astype(dtype)[None, :] * unit[:, None]  # range of S, in units of x

    # Then units of the metric: x' = x / scale, D' = scale D / scale, S' = S / scale.
    scale = _positive(jnp.sqrt(jnp.maximum(jnp.diagonal(metric.gram), 0)))
    weights, vectors = jnp.linalg.eigh(kernel / scale[:, None] / scale[None, :])
    root = _inverse_root(weights, tolerance, jnp.asarray(damping, dtype), drop=own_metric)
    basis = _orthonormal(directions / scale[:, None], kept)
    projection = _oblique(basis, vectors, root, kept)
    removed = scale[:, None] ** -1 * projection * scale[None, :]
    bias = _dot(metric.feature_mean, removed) if centred else jnp.zeros((d,), dtype)
    return Eraser(
        matrix=jnp.eye(d, dtype=dtype) - removed,
        bias=bias,
        rank=jnp.sum(kept).astype(jnp.int32),
        tolerance=tolerance,
    )


def apply_eraser(eraser: Eraser, features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """r(x) = x A + b of every row, at highest precision."""
    return _dot(features, eraser.matrix) + eraser.bias[None, :]


def erasure_cost(eraser: Eraser, moments: Moments) -> Float[Array, ""]:
    """E |r(x) - x|^2 over E |x - E x|^2 (the variance; E |x|^2 where it is 0) of some rows.

    Args:
      eraser: the map.
      moments: of the rows on which the cost is asked, of any task.

    Returns:
      Scalar >= 0, without unit; 0 if nothing changes.
    """
    d = eraser.matrix.shape[0]
    removed = jnp.eye(d, dtype=eraser.matrix.dtype) - eraser.matrix
    mean = moments.feature_mean
    covariance = moments.gram - jnp.outer(mean, mean)
    shift = eraser.bias - _dot(mean, removed)
    change = jnp.sum(removed * _dot(covariance, removed)) + jnp.sum(shift**2)
    variance, square = jnp.trace(covariance), jnp.trace(moments.gram)
    noise = d * float(jnp.finfo(square.dtype).eps) * square
    whole = jnp.where(variance > noise, variance, square)
    return jnp.maximum(change, 0) / jnp.where(whole > 0, whole, 1)


def _labels(moments: Moments):
    """E[z]-side moments as [d, k], [k], [k]."""
    if moments.cross is None or moments.target_mean is None or moments.target_square is None:
        raise ValueError("labelled moments must hold the label's: cross is None; give targets.")
    width = moments.gram.shape[-1]
    if moments.cross.ndim not in (1, 2) or moments.cross.shape[0] != width:
        raise ValueError(f"cross must be [{width}, k] or [{width}], got {moments.cross.shape}.")
    return (
        moments.cross.reshape(width, -1),
        moments.target_mean.reshape(-1),
        moments.target_square.reshape(-1),
    )


def _check(gram, cross, metric_gram, damping) -> None:
    check_matrix(gram)
    check_matrix(cross)
    shapes = (gram.shape[1], cross.shape[0]), metric_gram.shape
    if shapes != (gram.shape, gram.shape) or len({gram.dtype, cross.dtype, metric_gram.dtype}) > 1:
        raise ValueError(
            "moments must have one width and dtype, got "
            f"gram {gram.dtype}{list(gram.shape)}, cross {cross.dtype}{list(cross.shape)}, "
            f"metric {metric_gram.dtype}{list(metric_gram.shape)}."
        )
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}.")


def _positive(values):
    """The values, 1 where they are 0: units of what is never there do not matter."""
    return jnp.where(values == 0, 1, values)


def _inverse_root(eigenvalues, tolerance, damping, *, drop: bool):
    """K^{-1/2} on the eigenvectors; see the module for eigenvalues that are rounding."""
    seen = eigenvalues > tolerance
    total = jnp.where(seen, eigenvalues, 0) + damping
    unseen = jnp.where(damping > 0, damping, tolerance) if not drop else damping
    total = jnp.where(seen, total, unseen)
    usable = total > 0
    root = jnp.where(usable, jnp.where(usable, total, 1) ** -0.5, 0)
    return jnp.where(jnp.isnan(eigenvalues), jnp.nan, root)


def _orthonormal(columns, kept):
    """Orthonormal basis of the kept columns' span, zero columns for the others."""
    norms = _positive(jnp.linalg.norm(columns, axis=0))
    # Kept columns come first (singular values descend), so QR of the padded whole is theirs.
    basis, _ = jnp.linalg.qr(columns / norms[None, :])
    return jnp.where(kept[None, :], basis, 0)


def _oblique(basis, vectors, root, kept):
    """D = K^{-1} U (U^T K^{-1} U)^{-1} U^T for orthonormal U, its kept columns."""
    # With K^{-1/2} U = P s Q^T: D = (K^{-1/2} P / s) (U Q)^T, no product of K^{-1} is inverted.
    left, values, right_t = jnp.linalg.svd(
        root[:, None] * _dot(vectors.T, basis), full_matrices=False
    )
    rows = _dot(basis, right_t.T)  # U Q, the kept columns first again
    safe = jnp.where(kept, _positive(values), 1)
    columns = jnp.where(kept[None, :], _dot(vectors, root[:, None] * left) / safe[None, :], 0)
    # U^T D = U^T is what erases. One Newton step squares its error, eps kappa(K)^{1/2} before.
    identity = jnp.diag(kept.astype(basis.dtype))
    columns = _dot(columns, 2 * identity - _dot(rows.T, columns))
    return _dot(columns, rows.T)


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")
