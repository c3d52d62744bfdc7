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

**What is emitted.** Rounded to float32, x A is an invertible map again: the label survives at an
amplitude of 1e-7, and least squares in float64 finds it. So rows go through

    y = x P + p,    P = I - E S_E^{-T} S^T,    S^T P = 0,

E the columns of the identity at r = rank(S) chosen features and S_E the rows of S there: every
other feature loses a multiple of the r chosen ones, which are zero afterwards, *literally*, in any
arithmetic. What a probe could find is what rounding left in the others, eps of their own size. P
does not depend on K; the least change is made up for in the next map, since S^T A = 0 gives

    r(x) = x A + b = y A + c.

A feature of y that the others determine is zero too, and read off them: there eps is all there is.
`Eraser` holds both: ``matrix``, ``bias`` for the rows, ``lift``, ``lift_bias`` for the map that
reads them, which for a head W is A W, W's bias plus c W. E comes from a QR decomposition with
pivoting of S^T in units of the rows, so that entries of P stay near one there.

Moments are centred as they are taken (about a first row, then about the mean) and merged by the
formula of Chan, Golub and LeVeque (1983), The American Statistician 37, so that rows far from zero
lose nothing; and each feature in a power of two of its own, so that nothing over- or underflows.
All else is computed in coordinates x_j / rms(x_j): no result depends on the features' units.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaximm.linalg.arrays import (
    as_matrix,
    check_kind,
    exponent_of,
    one_program,
    times_power_of_two,
)
from jaximm.linalg.batched import after


class Moments(Protocol):
    """Raw means over rows, as `jaximm.hessians.GramMoments` (``"mean"``) has them.

    `linear_eraser` takes these too, at the cost of the digits that centring them afterwards loses:
    of rows whose mean is 1000 times their deviation, six.
    """

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
    """Centred moments of rows and of their labels, to be merged by `merge_moments`.

    In units of 2^exponents, a power of two a feature (0 where squares fit the dtype), and
    2^label_exponents a label. The mean is origin + offset, `origin` being one of the rows. Label
    fields are None where there are none. The raw moments are properties: `Moments`.
    """

    count: Int[Array, ""]
    exponents: Int[Array, "d"]
    origin: Float[Array, "d"]
    offset: Float[Array, "d"]
    covariance: Float[Array, "d d"]
    label_exponents: Int[Array, "k"] | None
    label_origin: Float[Array, "k"] | None
    label_offset: Float[Array, "k"] | None
    label_variance: Float[Array, "k"] | None
    cross_covariance: Float[Array, "d k"] | None

    @property
    def feature_mean(self) -> Float[Array, "d"]:
        """E[x]."""
        return times_power_of_two(self.origin + self.offset, self.exponents)

    @property
    def target_mean(self) -> Float[Array, "k"] | None:
        """E[z]."""
        label_mean = self.label_mean
        if label_mean is None or self.label_exponents is None:
            return None
        return times_power_of_two(label_mean, self.label_exponents)

    @property
    def label_mean(self) -> Float[Array, "k"] | None:
        """E[z] in units of 2^label_exponents."""
        if self.label_origin is None or self.label_offset is None:
            return None
        return self.label_origin + self.label_offset

    @property
    def gram(self) -> Float[Array, "d d"]:
        """E[x x^T]."""
        mean = self.origin + self.offset
        raw = self.covariance + jnp.outer(mean, mean)
        return _in_units(raw, self.exponents, self.exponents)

    @property
    def cross(self) -> Float[Array, "d k"] | None:
        """E[x z^T]."""
        label_mean = self.label_mean
        if self.cross_covariance is None or label_mean is None:
            return None
        raw = self.cross_covariance + jnp.outer(self.origin + self.offset, label_mean)
        return _in_units(raw, self.exponents, self.label_exponents)

    @property
    def target_square(self) -> Float[Array, "k"] | None:
        """E[z^2]."""
        label_mean = self.label_mean
        if self.label_variance is None or label_mean is None or self.label_exponents is None:
            return None
        raw = self.label_variance + label_mean**2
        return times_power_of_two(raw, 2 * self.label_exponents)


class Eraser(NamedTuple):
    """Rows without a linear trace of the label, and the map that makes up for it best.

    y = x @ matrix + bias: `removed` coordinates are literal zeros, `rank` of them for the label and
    one for each feature that the others determine (a duplicate, a constant's complement). Whatever
    read x reads ``y @ lift + lift_bias``, the rows r(x) changed least: a head W becomes
    ``lift @ W``. matrix @ lift = A of the module, of rank d - rank.

    `rank`: independent label directions removed. `tolerance`: singular values of Cov(x, z) in
    units of the rows' and labels' own deviation (rms if not centred) at or below it count as
    rounding; a label direction this weak is not removed.
    """

    matrix: Float[Array, "d d"]
    bias: Float[Array, "d"]
    lift: Float[Array, "d d"]
    lift_bias: Float[Array, "d"]
    removed: Bool[Array, "d"]
    rank: Int[Array, ""]
    tolerance: Float[Array, ""]


BLOCK = 1024
"""Rows a partial sum: more rows than that cost no digits."""


def label_moments(
    features: Float[Array, "n d"], labels: Float[Array, "n k"] | None = None
) -> LabelMoments:
    """`LabelMoments` of all rows at once. For a stream merge those of its parts.

    Args:
      features: X, any float dtype.
      labels: Z of the same dtype; for classes one-hot. None: of the features alone.

    Returns:
      In the dtype of the features, float32 for half precision.

    Raises:
      ValueError: not two non-empty float matrices of one dtype and number of rows.
    """
    features = as_matrix(features, name="features")
    if labels is None:
        return _in_own_units(features, None)
    labels = as_matrix(labels, name="labels")
    if features.shape[0] != labels.shape[0] or features.dtype != labels.dtype:
        raise ValueError(
            f"features and labels must have one number of rows and one dtype, got "
            f"{features.dtype}{list(features.shape)} and {labels.dtype}{list(labels.shape)}."
        )
    return _in_own_units(features, labels)


# Compiled here, as `merge_moments` is: a stream calls them once a batch, and they are many small
# operations.
@jax.jit
def _in_own_units(features, labels) -> LabelMoments:
    label_exponents = None if labels is None else _column_exponents(labels)
    return moments_in_units(features, labels, _column_exponents(features), label_exponents)


def moments_in_units(
    features: Float[Array, "n d"],
    labels: Float[Array, "n k"] | None,
    exponents: Int[Array, "d"],
    label_exponents: Int[Array, "k"] | None,
) -> LabelMoments:
    """`label_moments` in given powers of two: for devices whose moments are to be added up."""
    origin, offset, rows = _centred(features, exponents)
    moments = empty_moments(features.shape[1], None, features.dtype)._replace(
        count=jnp.asarray(features.shape[0], jnp.int32),
        exponents=exponents,
        origin=origin,
        offset=offset,
        covariance=_mean_product(rows, rows),
    )
    if labels is None or label_exponents is None:
        return moments
    label_origin, label_offset, deviations = _centred(labels, label_exponents)
    return moments._replace(
        label_exponents=label_exponents,
        label_origin=label_origin,
        label_offset=label_offset,
        label_variance=jnp.mean(deviations**2, axis=0),
        cross_covariance=_mean_product(rows, deviations),
    )


def empty_moments(width: int, labels: int | None, dtype) -> LabelMoments:
    """`LabelMoments` of no rows: what a stream starts from. `labels`: their number k, or None."""

    def zeros(*shape):
        return None if labels is None else jnp.zeros(shape, dtype)

    k = 0 if labels is None else labels
    return LabelMoments(
        count=jnp.zeros((), jnp.int32),
        exponents=jnp.zeros(width, jnp.int32),
        origin=jnp.zeros(width, dtype),
        offset=jnp.zeros(width, dtype),
        covariance=jnp.zeros((width, width), dtype),
        label_exponents=None if labels is None else jnp.zeros(k, jnp.int32),
        label_origin=zeros(k),
        label_offset=zeros(k),
        label_variance=zeros(k),
        cross_covariance=zeros(width, k),
    )


@jax.jit
def merge_moments(first: LabelMoments, second: LabelMoments) -> LabelMoments:
    """The moments of the rows of both, of one width, dtype and number of labels.

    With counts n_1 + n_2 = n and mean difference delta,
    C = (n_1 C_1 + n_2 C_2) / n + (n_1 n_2 / n^2) delta delta^T.

    Raises:
      ValueError: one is no `LabelMoments`; different widths, labels or dtypes.

    References:
      Chan, Golub and LeVeque (1983), The American Statistician 37, equation 2.1b.
    """
    for moments, name in ((first, "first"), (second, "second")):
        check_kind(moments, LabelMoments, name, "`label_moments`")
    shapes = [
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(moments)]
        for moments in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the moments do not fit together: {shapes[0]} and {shapes[1]}.")
    n = (first.count + second.count).astype(first.covariance.dtype)
    n = jnp.where(n > 0, n, 1)
    weights = tuple(m.count.astype(n.dtype) / n for m in (first, second))
    counts = first.count, second.count
    exponents, (a, b) = _common_units(counts, first.exponents, second.exponents)
    origin, offset, delta = _merged_mean(
        counts, weights, first.origin, first.offset, second.origin, second.offset, a, b
    )
    both = weights[0] * weights[1]
    merged = first._replace(
        count=first.count + second.count,
        exponents=exponents,
        origin=origin,
        offset=offset,
        covariance=weights[0] * _in_units(first.covariance, a, a)
        + weights[1] * _in_units(second.covariance, b, b)
        + both * jnp.outer(delta, delta),
    )
    if first.label_origin is None:
        return merged
    one: Any = first  # of one structure, so that both have labels
    other: Any = second
    label_exponents, (p, q) = _common_units(counts, one.label_exponents, other.label_exponents)
    label_origin, label_offset, label_delta = _merged_mean(
        counts,
        weights,
        one.label_origin,
        one.label_offset,
        other.label_origin,
        other.label_offset,
        p,
        q,
    )
    return merged._replace(
        label_exponents=label_exponents,
        label_origin=label_origin,
        label_offset=label_offset,
        label_variance=weights[0] * times_power_of_two(one.label_variance, 2 * p)
        + weights[1] * times_power_of_two(other.label_variance, 2 * q)
        + both * label_delta**2,
        cross_covariance=weights[0] * _in_units(one.cross_covariance, a, p)
        + weights[1] * _in_units(other.cross_covariance, b, q)
        + both * jnp.outer(delta, label_delta),
    )


@jax.jit
def moments_through(moments: LabelMoments, theta: Float[Array, "d k"]) -> LabelMoments:
    """The moments of rows x @ theta from those of x; theta in their dtype."""
    _, sizes = jnp.frexp(theta)
    there = theta != 0
    sizes = jnp.where(there, sizes.astype(jnp.int32) + moments.exponents[:, None], -(2**30))
    exponents = jnp.where(jnp.any(there, axis=0), jnp.max(sizes, axis=0), 0)
    scaled = times_power_of_two(theta, moments.exponents[:, None] - exponents[None, :])
    covariance = _dot(scaled.T, _dot(moments.covariance, scaled))
    cross = moments.cross_covariance
    return moments._replace(
        exponents=exponents,
        origin=_dot(moments.origin, scaled),
        offset=_dot(moments.offset, scaled),
        covariance=(covariance + covariance.T) / 2,
        cross_covariance=None if cross is None else _dot(scaled.T, cross),
    )


@one_program
def linear_eraser(
    labelled: Moments,
    *,
    metric: Moments | None = None,
    centred: bool = True,
    damping: float | Float[Array, ""] = 0.0,
    rtol: float | Float[Array, ""] | None = None,
    emitted: DTypeLike | None = None,
) -> Eraser:
    r"""The affine map of least cost after which no linear predictor beats a constant.

    On the rows of `labelled`, Cov(r(x), z) = 0 (`centred`) or E[r(x) z^T] = 0, and the same of the
    emitted y. Idempotent: y of y is y. See the module for the formulas. One eigendecomposition
    [d, d], two SVDs and two QRs [d, k].

    Edge cases: labels that no feature is correlated with give rank 0, the identity. More
    independent label directions than features (k >= d) give A = 0: all is removed. A feature or a
    label that is always zero (constant, if `centred`) is left alone. NaN gives NaN.

    Args:
      labelled: moments of the labelled rows, float32 or float64; `label_moments`.
      metric: moments of the rows whose change E |r(x) - x|^2 is least; None: of the same rows.
        Its labels are not read.
      centred: False for probes without an intercept; then both biases are 0.
      damping: >= 0; added to the eigenvalues of K in rms units, so K + damping diag(E x_j^2). The
        constraint holds exactly whatever it is; what it costs is optimality on these rows, what it
        buys is a map that fits the noise of few rows less. May be traced.
      rtol: of the rank of the labels and of K, in the units of `Eraser.tolerance`. None: the
        rounding of the moments, eps (max(d, k) + 16 sqrt(d + k)); of raw ones
        eps (max(d, k) + 4 sqrt(n (d + k))).
      emitted: dtype in which rows will be multiplied with `matrix`, if it is not the moments'.

    Returns:
      `Eraser` in the dtype of the moments; `metric`'s mean is a fixed point of r if `centred`.

    Raises:
      ValueError: `labelled` holds no moments; moments without labels, shapes or dtypes that do not
        fit, damping < 0.

    References:
      Belrose et al. (2023), https://arxiv.org/abs/2306.03819, theorem 4.3.
    """
    label = _view(labelled, centred)
    own_metric = metric is None
    kernel = label if metric is None else _view(metric, centred, labelled=False)
    _check(label, kernel, damping)
    d, dtype = label.cross.shape[0], label.cross.dtype
    if rtol is None:
        tolerance = label.noise if own_metric else jnp.maximum(label.noise, kernel.noise)
    else:
        tolerance = jnp.asarray(rtol, dtype)

    # Units of the labels first, for the rank: rounding of S_jc is eps times both deviations.
    left, values, _ = jnp.linalg.svd(
        label.cross / label.unit[:, None] / label.label_unit[None, :], full_matrices=False
    )
    kept = values > tolerance  # Not >=: labels all zero would have full rank.
    left = left * kept.astype(dtype)[None, :] * label.unit[:, None]

    # What is emitted, in units of the rows' deviation.
    unit = label.deviation
    chosen, removed = _eliminated(_orthonormal(left / unit[:, None], kept), kept)
    centre = times_power_of_two(kernel.mean, kernel.exponents - label.exponents) / unit
    spare = _dot(jnp.where(removed, centre, 0), chosen)
    up = times_power_of_two(unit, label.exponents)

    # Then units of the metric: x' = x / scale, D' = scale D / scale, S' = S / scale.
    weights, vectors = jnp.linalg.eigh(
        after(kernel.square / kernel.scale[:, None] / kernel.scale[None, :], chosen)
    )
    # Rounding of K is in units of the deviations, which may be far below those of the scale.
    noise = tolerance * jnp.sum((vectors * (kernel.unit / kernel.scale)[:, None]) ** 2, axis=0)
    root = _inverse_root(weights, noise, jnp.asarray(damping, dtype), drop=own_metric)
    ratio = times_power_of_two(1 / kernel.scale, label.exponents - kernel.exponents)
    basis = _orthonormal(after(left * ratio[:, None], vectors), kept)
    scale = times_power_of_two(kernel.scale, kernel.exponents)
    lost = _rescaled(_oblique(basis, vectors, root, kept), scale)
    lift = jnp.eye(d, dtype=dtype) - lost
    mean = times_power_of_two(kernel.mean, kernel.exponents)  # zero if not centred
    lift_bias = _dot(mean, lost) + _dot(jnp.where(removed, mean, 0), lift)

    # Last, features of y that the others determine: what is left there is rounding and the label.
    eps = float(jnp.finfo(dtype if emitted is None else emitted).eps)
    left_over, determined = _determined(
        label, None if own_metric else kernel, after(chosen, lost), removed, eps
    )
    whole = _rescaled(jnp.eye(d, dtype=dtype) - left_over, up)  # all of y from what is emitted
    emitted_mean = jnp.where(removed, 0, mean)
    removed = removed | determined
    # A column is zero because it says so, and not because 1 - 1 rounds to it.
    matrix = jnp.where(removed[None, :], 0, jnp.eye(d, dtype=dtype) - _rescaled(chosen, up))
    lift_bias = lift_bias + _dot(
        emitted_mean - _dot(jnp.where(removed, 0, emitted_mean), whole), lift
    )
    return Eraser(
        matrix=jnp.where(jnp.isnan(jnp.sum(values)), jnp.nan, matrix),
        bias=jnp.where(removed, 0, spare * up),
        lift=_dot(whole, lift),
        lift_bias=lift_bias,
        removed=removed,
        rank=jnp.sum(kept).astype(jnp.int32),
        tolerance=tolerance,
    )


@one_program
def apply_eraser(eraser: Eraser, features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """y = x @ matrix + bias of every row, at highest precision; removed coordinates are zeros.

    In the dtype of the features, whatever the eraser's; float32 for half precision.

    Raises:
      ValueError: `eraser` is no `Eraser`.
    """
    check_kind(eraser, Eraser, "eraser", "`linear_eraser`")
    features = as_matrix(features, name="features")
    matrix, bias = (part.astype(features.dtype) for part in (eraser.matrix, eraser.bias))
    return _dot(features, matrix) + bias[None, :]


@one_program
def erasure_cost(eraser: Eraser, moments: Moments) -> Float[Array, ""]:
    """E |r(x) - x|^2 over E |x - E x|^2 (the variance; E |x|^2 where it is 0) of some rows.

    Args:
      eraser: the map; r(x) are its lifted rows.
      moments: of the rows on which the cost is asked, of any task.

    Returns:
      Scalar >= 0, without unit; 0 if nothing changes.

    Raises:
      ValueError: `eraser` is no `Eraser`, or `moments` hold none.
    """
    check_kind(eraser, Eraser, "eraser", "`linear_eraser`")
    view = _view(moments, centred=True, labelled=False)
    # One unit for all features: the change is a sum over them.
    down = view.exponents - jnp.max(view.exponents)
    covariance = _in_units(view.square, down, down)
    mean = times_power_of_two(view.mean, down)
    removed = jnp.eye(eraser.lift.shape[0], dtype=eraser.lift.dtype) - eraser.lift
    bias = _dot(eraser.bias, eraser.lift) + eraser.lift_bias
    shift = times_power_of_two(bias, -jnp.max(view.exponents)) - _dot(mean, removed)
    change = jnp.sum(removed * _dot(covariance, removed)) + jnp.sum(shift**2)
    variance = jnp.trace(covariance)
    whole = jnp.where(variance > 0, variance, jnp.sum(mean**2))
    return jnp.maximum(change, 0) / jnp.where(whole > 0, whole, 1)


class _View(NamedTuple):
    """Second moments in units of 2^exponents, and the units in which their rounding is `noise`."""

    exponents: Array
    mean: Array
    square: Array  # covariance, or E[x x^T] where not centred
    scale: Array  # rms of the features
    deviation: Array  # of the features where centred, else their rms
    unit: Array  # the same, but of raw moments the rms: that is what their rounding goes with
    noise: Array
    count: Array
    cross: Any = None
    label_unit: Any = None


def _view(moments: Moments, centred: bool, labelled: bool = True) -> _View:
    if not hasattr(moments, "cross"):
        check_kind(moments, LabelMoments, "moments", "`label_moments` or `gram_finalise`")
    if labelled and moments.cross is None:
        raise ValueError("labelled moments must hold the label's: cross is None; give targets.")
    if isinstance(moments, LabelMoments):
        return _view_of_centred(moments, centred, labelled)
    return _view_of_raw(moments, centred, labelled)


def _view_of_centred(moments: LabelMoments, centred: bool, labelled: bool) -> _View:
    mean, square = moments.origin + moments.offset, moments.covariance
    raw = square + jnp.outer(mean, mean)
    d = mean.shape[0]
    cross = moments.cross_covariance
    k = cross.shape[1] if labelled and cross is not None else 1
    noise = float(jnp.finfo(square.dtype).eps) * (max(d, k) + 16 * (d + k) ** 0.5)
    deviation = _positive(jnp.sqrt(jnp.maximum(jnp.diagonal(square if centred else raw), 0)))
    view = _View(
        exponents=moments.exponents,
        mean=mean if centred else jnp.zeros_like(mean),
        square=square if centred else raw,
        scale=_positive(jnp.sqrt(jnp.maximum(jnp.diagonal(raw), 0))),
        deviation=deviation,
        unit=deviation,
        noise=jnp.asarray(noise, square.dtype),
        count=moments.count,
    )
    if not labelled:
        return view
    label_mean, variance = moments.label_mean, moments.label_variance
    assert cross is not None  # `_view` has asked
    assert label_mean is not None
    assert variance is not None
    if not centred:
        cross = cross + jnp.outer(mean, label_mean)
        variance = variance + label_mean**2
    return view._replace(cross=cross, label_unit=_positive(jnp.sqrt(jnp.maximum(variance, 0))))


def _view_of_raw(moments: Moments, centred: bool, labelled: bool) -> _View:
    gram, mean = moments.gram, moments.feature_mean
    square = gram - jnp.outer(mean, mean) if centred else gram
    scale = _positive(jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0)))
    d, dtype = gram.shape[0], gram.dtype
    view = _View(
        exponents=jnp.zeros((d,), jnp.int32),
        mean=mean if centred else jnp.zeros_like(mean),
        square=square,
        scale=scale,
        deviation=_positive(jnp.sqrt(jnp.maximum(jnp.diagonal(square), 0))),
        unit=scale,
        noise=jnp.zeros((), dtype),
        count=moments.count,
    )
    k = 1
    if labelled:
        cross, label_mean, target_square = _labels(moments)
        k = cross.shape[1]
        view = view._replace(
            cross=cross - jnp.outer(mean, label_mean) if centred else cross,
            label_unit=_positive(jnp.sqrt(jnp.maximum(target_square, 0))),
        )
    rows = jnp.maximum(moments.count, 1).astype(dtype)
    noise = float(jnp.finfo(dtype).eps) * (max(d, k) + 4 * jnp.sqrt(rows * (d + k)))
    return view._replace(noise=noise)


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


def _check(label: _View, kernel: _View, damping) -> None:
    shapes = {label.square.shape, kernel.square.shape}
    if len(shapes) > 1 or len({label.square.dtype, label.cross.dtype, kernel.square.dtype}) > 1:
        raise ValueError(
            "moments must have one width and dtype, got "
            f"{label.square.dtype}{list(label.square.shape)} with labels "
            f"{label.cross.dtype}{list(label.cross.shape)}, "
            f"metric {kernel.square.dtype}{list(kernel.square.shape)}."
        )
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}.")


def _eliminated(basis, kept):
    """E S_E^{-T} S^T for orthonormal columns, the kept ones first; and which features are chosen.

    Row i is zero unless feature i is chosen; a kept column chooses one feature: the one with most
    of what the earlier ones leave of the columns' span (QR with pivoting, of the transpose), so the
    choice hangs on the span alone.
    """
    d, m = basis.shape

    def choose(step, carry):
        left, removed, order = carry
        feature = jnp.argmax(jnp.where(removed, -1, jnp.sum(left**2, axis=1)))
        direction = left[feature] / jnp.sqrt(_positive(jnp.sum(left[feature] ** 2)))
        left = left - jnp.outer(_dot(left, direction), direction)
        return left, removed.at[feature].set(True), order.at[step].set(feature)

    # Which features is a choice: no derivative. Begun with arrays like the basis, since inside
    # shard_map a carry varies as what is added to it.
    start = (
        jax.lax.stop_gradient(basis),
        jnp.zeros_like(basis[:, 0], bool),
        jnp.zeros_like(basis[0], int),
    )
    _, removed, order = jax.lax.fori_loop(0, jnp.sum(kept), choose, start)
    # Kept columns come first, so the block of the others is set to the identity.
    square = jnp.where(kept[:, None] & kept[None, :], basis[order], jnp.eye(m, dtype=basis.dtype))
    multiples = jnp.linalg.solve(square.T, basis.T)
    multiples = jnp.where(kept[:, None], multiples, 0)
    return jnp.zeros_like(basis, shape=(d, d)).at[order].add(multiples), removed


def _determined(label: _View, kernel: _View | None, chosen, removed, eps: float):
    """Features of y that the others determine, on the rows of both tasks; and from which, how.

    y_j = sum_k y_k (I - left_over)_kj of deviations from the mean, in units of `label.deviation`.
    Rounding leaves eps of the chosen features, so of the label, in each y; where y has a direction
    of no more variance than that, least squares would find it. With no more rows than features
    every feature is determined by the others, which says nothing of new rows: then none is.
    """
    d, dtype = chosen.shape[0], chosen.dtype
    unit = label.deviation
    square = label.square / unit[:, None] / unit[None, :]
    if kernel is not None:
        ratio = times_power_of_two(1 / unit, kernel.exponents - label.exponents)
        other = kernel.square * ratio[:, None] * ratio[None, :]
        square = square + other / _positive(jnp.mean(jnp.diagonal(other)))
    kept = jnp.eye(d, dtype=dtype) - chosen
    square = _dot(kept.T, _dot(square, kept))
    # Those that are gone, and those that never vary, are set aside: no multiple of them is emitted.
    absent = removed | (jnp.diagonal(label.square) <= 0)
    square = jnp.where(absent[:, None] | absent[None, :], jnp.eye(d, dtype=dtype), square)
    own = float(jnp.finfo(dtype).eps)
    values, vectors = jnp.linalg.eigh((square + square.T) / 2)
    null = values <= max(own * (8 + 2 * d**0.5), (16 * eps) ** 2)
    null = null & (label.count > d)
    multiples, determined = _eliminated(jnp.where(null[None, :], vectors, 0), null)
    return jnp.where(absent[:, None], 0, multiples.T), determined


def _rescaled(matrix, units):
    """matrix_jk units_k / units_j; zeros stay zeros, whatever the units."""
    # Compiled, a / a may be 1 - eps.
    ratio = jnp.where(jnp.eye(units.shape[0], dtype=bool), 1, units[None, :] / units[:, None])
    return jnp.where(matrix == 0, 0, matrix * ratio)


def _column_exponents(rows):
    """`exponent_of` every column whose square might leave the dtype, 0 for all others."""
    exponents = jax.vmap(exponent_of, in_axes=1)(rows)
    safe = int(jnp.finfo(rows.dtype).maxexp) // 8
    return jnp.where(jnp.abs(exponents) < safe, 0, exponents)


def _centred(rows, exponents):
    """A first row, the mean relative to it, and deviations from the mean, in units of 2^exponents.

    About a row first: a mean that is large beside the deviations would round them.
    """
    scaled = times_power_of_two(rows, -exponents[None, :])
    origin = scaled[0]
    shifted = scaled - origin[None, :]
    offset = jnp.mean(shifted, axis=0)
    deviations = shifted - offset[None, :]
    # The mean of many rows is itself rounded: what is left of it, once more.
    left = jnp.mean(deviations, axis=0)
    return origin, offset + left, deviations - left[None, :]


def _mean_product(first, second):
    """first^T second / n, by blocks of rows with what each sum rounds off carried on (Kahan)."""
    n = first.shape[0]
    whole = n // BLOCK * BLOCK
    total = _dot(first[whole:].T, second[whole:])

    def add(carry, block):
        total, lost = carry
        part = _dot(block[0].T, block[1]) - lost
        summed = total + part
        return (summed, (summed - total) - part), None

    if whole:
        blocks = tuple(rows[:whole].reshape(-1, BLOCK, rows.shape[1]) for rows in (first, second))
        (total, _), _ = jax.lax.scan(add, (total, jnp.zeros_like(total)), blocks)
    return total / n


def _common_units(counts, first, second):
    """The larger exponents, of those that have rows, and what each side is to be scaled by."""
    larger = jnp.maximum(first, second)
    common = jnp.where(counts[0] == 0, second, jnp.where(counts[1] == 0, first, larger))
    return common, (
        jnp.where(counts[0] == 0, 0, first - common),
        jnp.where(counts[1] == 0, 0, second - common),
    )


def _merged_mean(counts, weights, origin_a, offset_a, origin_b, offset_b, a, b):
    """Origin, offset and the difference of the means, in the common units."""
    origin_a, offset_a = times_power_of_two(origin_a, a), times_power_of_two(offset_a, a)
    origin_b, offset_b = times_power_of_two(origin_b, b), times_power_of_two(offset_b, b)
    origin = jnp.where(counts[0] > 0, origin_a, origin_b)
    # Origins are rows: their difference is nearly exact, that of two rounded means is not.
    offset_a = jnp.where(counts[0] > 0, offset_a, offset_b)
    offset_b = jnp.where(counts[1] > 0, offset_b + (origin_b - origin), offset_a)
    delta = offset_b - offset_a
    return origin, offset_a + weights[1] * delta, delta


def _in_units(matrix, row_exponents, column_exponents):
    """matrix_ij 2^(row_i + column_j)."""
    return times_power_of_two(matrix, row_exponents[:, None] + column_exponents[None, :])


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
