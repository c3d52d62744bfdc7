"""Condition numbers of both tasks before and after, on every footing the library reports.

X [n, d_in] are a table's rows, or a backbone's features before a neck; theta is the neck, the
identity where there is none. Footings (a kappa means nothing without one):

``damped``
    kappa(theta^T (K + lam I) theta), K = X^T X / n, lam a stated part of tr(K) / d of the task's
    training rows, through the factor [X / sqrt(n); sqrt(lam) I] theta. The measure: well posed on
    singular K (features of a trained network have dead directions), it is the Hessian of a probe
    with weight decay, and the footing on which the limit is finite.
``shipped``
    kappa(theta^T K theta + lam' I), lam' the same part of tr(theta^T K theta) / d: damped after
    theta. A damping that passes through theta is another measure of a neck than of a backbone that
    trains, whose own features are damped; on this footing all methods of a network compare.
``pseudo_inverse``
    kappa of X theta's non-zero singular values above a stated relative tolerance, squared.
``reference``
    the released code's: H + 1e-6 I. On a singular H it measures sigma_max / 1e-6 and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaximm import linalg
from jaximm.immunisers import relative_damping
from jaximm.linalg import DOMINANCE, Condition

DAMPING = 1e-3
"""Of a table's rows, relative to tr(K) / d."""

PSEUDO_INVERSE_RTOL = 1e-10
"""Relative tolerance on the singular values of X theta in float64 (1e-20 on those of H)."""

FEATURE_DAMPING = 1e-6
"""Of a network's features, relative to tr(K) / d."""

FEATURE_RTOL = 1e-6
"""Singular values of float32 features below this part of the largest are their own rounding."""

REFERENCE_DAMPING = 1e-6
"""What the released code adds to the diagonal of H (mean convention)."""

DEFINITIONS = {
    "damped": "kappa(theta^T (K + lam I) theta), lam relative to the training rows' tr(K) / d",
    "shipped": (
        "kappa(theta^T K theta + lam' I), lam' the same part of tr(theta^T K theta) / d: "
        "damped after theta"
    ),
    "pseudo_inverse": (
        "kappa of the singular values of X theta above the stated tolerance, squared"
    ),
    "reference": (
        "kappa(H + 1e-6 I), as the released code; on a singular H it is sigma_max / 1e-6"
    ),
}


class TaskRows(NamedTuple):
    """Rows of one task [n, d_in], before theta, and the damping lam of its training rows.

    `count`: how many rows these stand for, with the same mean products; None: themselves.
    """

    x: Float[Array, "n d_in"]
    damping: Float[Array, ""]
    count: int | None = None


def task_rows(
    rows: Float[Array, "n d_in"],
    train: Float[Array, "m d_in"] | None = None,
    *,
    damping: float,
) -> TaskRows:
    """Rows in the default float; lam is `damping` times tr(K) / d of the training rows, or these.

    The undamped kappa is infinite on dead directions, and the limit with it.
    """
    dtype = jnp.zeros(()).dtype
    rows = jnp.asarray(rows, dtype)
    train = rows if train is None else jnp.asarray(train, dtype)
    return TaskRows(rows, relative_damping(train, damping))


class Kappas(NamedTuple):
    """One task under one backbone: a `Condition` a footing, and the damped spectrum."""

    damped: Condition
    shipped: Condition
    pseudo_inverse: Condition
    reference: Condition
    eigenvalues: Float[Array, "d"]  # of the damped Hessian, descending


class Tasks(NamedTuple):
    """Kappas of both tasks under one backbone."""

    primary: Kappas
    harmful: Kappas


def kappas(
    rows: TaskRows,
    kernel: Float[Array, "d_in d"] | None = None,
    bias: Float[Array, "d"] | None = None,
    *,
    rtol: float | None = None,
) -> Kappas:
    """Condition numbers of one task's l2-probe Hessian, of the features ``x @ kernel + bias``.

    One program whatever the number of rows, once there are more of them than columns.

    Args:
      rows: rows and damping (mean convention, added before the kernel).
      kernel: theta [d_in, d]; None is the identity.
      bias: [d], None is zero; the damped footing does not see it.
      rtol: of the pseudo-inverse footing, relative; None: `rounding`.
    """
    n, d_in = rows.x.shape
    n = n if rows.count is None else rows.count
    dtype = jnp.result_type(rows.x)
    kernel = jnp.eye(d_in, dtype=dtype) if kernel is None else kernel
    short, triangle = _factors(rows._replace(count=None))
    shifted = None if bias is None else _shifted(rows.x, kernel, bias)
    return _kappas(
        short,
        triangle,
        rows.damping,
        kernel,
        shifted,
        _row_scale(n, d_in if bias is None else kernel.shape[1]),
        rtol=rounding(dtype) if rtol is None else rtol,
    )


@functools.partial(jax.jit, static_argnames="rtol")
def _kappas(short, triangle, damping, kernel, shifted, scale, *, rtol) -> Kappas:
    """`kappas` of rows, or of the triangle that stands for them, and of their damped triangle."""
    dtype, stored = short.dtype, kernel.dtype
    kernel = kernel.astype(dtype)
    features = short @ kernel if shifted is None else shifted
    damped_features = triangle @ kernel
    plain = linalg.feature_condition_number(features, rtol=rtol)
    damped = linalg.feature_condition_number(damped_features, rtol=0.0)
    plain = plain._replace(tolerance=plain.tolerance / scale)
    shipped = linalg.feature_condition_number(
        features, rtol=0.0, damping=_after(damping, short, features)
    )
    raw = jnp.linalg.svd(short, compute_uv=False, full_matrices=False)
    few = short.shape[0] < short.shape[1]
    weak = few | (raw[-1] / short.shape[0] ** 0.5 <= jnp.sqrt(damping))
    # The kernel was stored in its own dtype: a direction that it removes is left at its rounding.
    lost = damped.log_kappa > -2 * math.log(jnp.finfo(stored).eps)
    lost |= damped.dominated_by == DOMINANCE.index("rounding")
    code = jnp.where(
        lost,
        DOMINANCE.index("rounding"),
        jnp.where(weak, DOMINANCE.index("damping"), DOMINANCE.index("none")),
    ).astype(damped.dominated_by.dtype)
    return Kappas(
        # The rank and its tolerance are those of the data: the damping fills every direction.
        damped=damped._replace(rank=plain.rank, tolerance=plain.tolerance, dominated_by=code),
        shipped=shipped._replace(rank=plain.rank, tolerance=plain.tolerance),
        pseudo_inverse=plain,
        reference=linalg.feature_condition_number(features, rtol=rtol, damping=REFERENCE_DAMPING),
        eigenvalues=jnp.linalg.svd(damped_features, compute_uv=False, full_matrices=False) ** 2,
    )


def _after(damping, rows, features):
    """The same part of the mean eigenvalue of the features' Gram matrix as `damping` of the rows'.

    Zero of rows that are all zero, whose damping is.
    """
    of_rows, of_features = (jnp.sum(part * part) / part.shape[1] for part in (rows, features))
    is_zero = of_rows == 0
    return jnp.where(is_zero, 0, damping / jnp.where(is_zero, 1, of_rows) * of_features)


@jax.jit
def _factors(rows: TaskRows) -> tuple[Float[Array, "m d_in"], Float[Array, "d_in d_in"]]:
    """Rows or their triangle, and the triangle of the damped factor.

    The triangle comes before theta: its product with theta is as accurate as the tall factor's.
    """
    short = _shortened(rows.x)
    return short, jnp.linalg.qr(linalg.damped_factor(short, damping=rows.damping), mode="r")


@jax.jit
def _shifted(x, kernel, bias) -> Float[Array, "m d"]:
    """Rows of the features, or their triangle."""
    return _shortened(x @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None, :])


def _shortened(rows: Float[Array, "n d"]) -> Float[Array, "m d"]:
    """At most d rows with the same mean-convention Gram matrix: a triangle for more than d."""
    n, d = rows.shape
    return rows if n <= d else jnp.linalg.qr(rows, mode="r") * _row_scale(n, d)


def _row_scale(n: int, d: int) -> float:
    """Of the singular values of `_shortened`, where d rows stand for n."""
    return 1.0 if n <= d else (d / n) ** 0.5


def rounding(dtype: Any) -> float:
    """The stated tolerance of a table's rows, or their own rounding where that is coarser."""
    return max(PSEUDO_INVERSE_RTOL, 64 * float(jnp.finfo(dtype).eps))


def without_zeros(
    kernel: Float[Array, "d_in d"] | None, bias: Float[Array, "d"] | None = None
) -> tuple[Float[Array, "d_in k"] | None, Float[Array, "k"] | None]:
    """A kernel and bias without the features that are zero on every row, for `kappas`.

    What an erasure sets to zero is no feature: kappa of the others is what an attacker meets. Looks
    at the numbers, so not for use inside ``jit``.
    """
    if kernel is None:
        return kernel, bias
    kept = np.any(np.asarray(kernel) != 0, axis=0)
    if bias is not None:
        kept = kept | (np.asarray(bias) != 0)
    if kept.all() or not kept.any():
        return kernel, bias
    return kernel[:, kept], None if bias is None else bias[kept]


class Conditioning(NamedTuple):
    """Rows of result.json for one split, by footing, and the damped spectra."""

    rows: dict[str, dict[str, Any]]
    spectra: dict[str, dict[str, list[float]]]


def conditioning(
    before: Tasks,
    after: Tasks,
    *,
    limit: float,
    dampings: Sequence[float | Float[Array, ""]],
    dtype: str,
) -> Conditioning:
    """Both tasks, before and after, on every footing: ratios (i), (ii) and RIR.

    Args:
      before: under theta_0.
      after: under the immunised backbone.
      limit: `log_rir_limit` of theta_0's rows. It binds linear maps after them, not training of the
        backbone that makes them. It and the fraction of it that is reached (of the logarithms) go
        with the damped footing, on which they are defined for every data set.
      dampings: lam of theta_0's primary and harmful rows.
      dtype: in which the features were computed.
    """
    sides = (("before", before), ("after", after))
    rows = {}
    for footing, definition in DEFINITIONS.items():
        ratios = linalg.relative_immunisation(
            harmful_after=getattr(after.harmful, footing),
            harmful_before=getattr(before.harmful, footing),
            primary_after=getattr(after.primary, footing),
            primary_before=getattr(before.primary, footing),
        )
        log_rir = float(ratios.rir.log_ratio)
        bound = limit if footing == "damped" else None
        lam_primary, lam_harmful = {
            "damped": map(float, dampings),
            "shipped": (None, None),  # of each side's own features
            "pseudo_inverse": (0.0, 0.0),
            "reference": (REFERENCE_DAMPING, REFERENCE_DAMPING),
        }[footing]
        by_task: dict[str, Any] = {
            task: {
                side: kappa_row(getattr(getattr(tasks, task), footing), dtype)
                for side, tasks in sides
            }
            for task in Tasks._fields
        }
        rows[footing] = by_task | {
            "log_ratio_harmful": float(ratios.harmful.log_ratio),
            "log_ratio_primary": float(ratios.primary.log_ratio),
            "log_rir": log_rir,
            "log_rir_lower": float(ratios.rir.lower),
            "log_rir_upper": float(ratios.rir.upper),
            "log_rir_limit": bound,
            "log_fraction": log_rir / bound if bound is not None and bound > 1e-9 else None,
            "damping_primary": lam_primary,
            "damping_harmful": lam_harmful,
            "definition": definition,
        }
    spectra = {
        task: {side: np.asarray(getattr(tasks, task).eigenvalues).tolist() for side, tasks in sides}
        for task in Tasks._fields
    }
    return Conditioning(rows, spectra)


def log_rir_limit(primary: TaskRows, harmful: TaskRows) -> Float[Array, ""]:
    """The largest log RIR any invertible linear backbone has on these rows, damped footing."""
    factors = (_factors(rows._replace(count=None))[1] for rows in (primary, harmful))
    return _log_rir_limit(*factors)


@jax.jit
def _log_rir_limit(factor_primary, factor_harmful) -> Float[Array, ""]:
    return linalg.rir_limit(
        linalg.pencil_from_factors(factor_primary, factor_harmful),
        log_kappa_primary=_log_kappa(factor_primary),
        log_kappa_harmful=_log_kappa(factor_harmful),
    )


@jax.jit
def log_kappas(
    factor_primary: Float[Array, "d d"],
    factor_harmful: Float[Array, "d d"],
    theta: Float[Array, "d d"],
) -> dict[str, Float[Array, ""]]:
    """What a training run logs: both damped log kappas, the ranks, and the spectra's scale.

    ``scale_*`` is the mean eigenvalue tr(H) / d: R_ill also falls when H grows as a whole.
    """
    logged = {}
    for task, factor in (("primary", factor_primary), ("harmful", factor_harmful)):
        values = jnp.linalg.svd(factor @ theta, compute_uv=False, full_matrices=False)
        logged[f"log_kappa_{task}"] = -2 * jnp.log(values[-1] / values[0])
        tolerance = linalg.rank_rtol(factor.shape, values.dtype) * values[0]
        logged[f"rank_{task}"] = jnp.sum(values > tolerance)
        logged[f"scale_{task}"] = jnp.mean(values**2)
    return logged


def _log_kappa(factor):
    values = jnp.linalg.svd(factor, compute_uv=False, full_matrices=False)
    return -2 * jnp.log(values[-1] / values[0])


def kappa_row(found: Condition, dtype: str) -> dict[str, Any]:
    """A condition number as result.json holds it."""
    return {
        "log_kappa": float(found.log_kappa),
        "lower": float(found.lower),
        "upper": float(found.upper),
        "rank": int(found.rank),
        "tolerance": float(found.tolerance),
        "dtype": dtype,
        "dominated_by": DOMINANCE[int(found.dominated_by)],
    }
