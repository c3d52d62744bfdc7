"""Condition numbers of both tasks before and after, on every footing the library reports.

Footings (a kappa means nothing without one):

``damped``
    kappa(theta^T (K + lam I) theta), lam = 1e-3 tr(K) / d of the task's training rows, through the
    factor [X / sqrt(n); sqrt(lam) I] theta. The measure: well posed on singular K, it is the
    Hessian of a probe with weight decay, and the footing on which the limit is finite.
``pseudo_inverse``
    kappa of X theta's non-zero singular values above a stated relative tolerance, squared.
``reference``
    the released code's: H + 1e-6 I. On a singular H it measures sigma_max / 1e-6 and nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaximm import linalg
from jaximm.linalg import DOMINANCE, Condition

PSEUDO_INVERSE_RTOL = 1e-10
"""Relative tolerance on the singular values of X theta in float64 (1e-20 on those of H)."""

REFERENCE_DAMPING = 1e-6
"""What the released code adds to the diagonal of H (mean convention)."""

DEFINITIONS = {
    "damped": "kappa(theta^T (K + lam I) theta), lam relative to the training rows' tr(K) / d",
    "pseudo_inverse": (
        f"kappa of the singular values of X theta above {PSEUDO_INVERSE_RTOL:g} of the largest, "
        "squared"
    ),
    "reference": (
        "kappa(H + 1e-6 I), as the released code; on a singular H it is sigma_max / 1e-6"
    ),
}


class TaskRows(NamedTuple):
    """Inputs of one task [n, d_in] and the damping lam of its training rows."""

    x: Float[Array, "n d_in"]
    damping: Float[Array, ""]


class Kappas(NamedTuple):
    """One task under one backbone: a `Condition` a footing, and the damped spectrum."""

    damped: Condition
    pseudo_inverse: Condition
    reference: Condition
    eigenvalues: Float[Array, "d"]  # of the damped Hessian, descending


@jax.jit
def kappas(rows: TaskRows, theta: Float[Array, "d_in d"]) -> Kappas:
    """Condition numbers of one task's l2-probe Hessian under the linear backbone ``theta``.

    Args:
      rows: inputs and damping (mean convention, added before theta).
      theta: [d_in, d]; the identity for the raw inputs.
    """
    n, d_in = rows.x.shape
    # A triangle first: its product with theta is as accurate as the tall factor's, and smaller. Its
    # d_in rows stand for n, so that both have one mean-convention Gram matrix.
    scale = (d_in / n) ** 0.5 if n > d_in else 1.0
    short = jnp.linalg.qr(rows.x, mode="r") * scale if n > d_in else rows.x
    features = short @ theta
    triangle = jnp.linalg.qr(linalg.damped_factor(short, damping=rows.damping), mode="r")
    damped_features = triangle @ theta
    plain = linalg.feature_condition_number(features, rtol=_rtol(features.dtype))
    damped = linalg.feature_condition_number(damped_features, rtol=0.0)
    plain = plain._replace(tolerance=plain.tolerance / scale)
    raw = jnp.linalg.svd(short, compute_uv=False, full_matrices=False)
    weak = (n < d_in) | (raw[-1] / short.shape[0] ** 0.5 <= jnp.sqrt(rows.damping))
    code = jnp.where(
        damped.dominated_by == DOMINANCE.index("rounding"),
        damped.dominated_by,
        jnp.where(weak, DOMINANCE.index("damping"), DOMINANCE.index("none")),
    )
    return Kappas(
        damped=damped._replace(rank=plain.rank, tolerance=plain.tolerance, dominated_by=code),
        pseudo_inverse=plain,
        reference=linalg.feature_condition_number(
            features, rtol=_rtol(features.dtype), damping=REFERENCE_DAMPING
        ),
        eigenvalues=jnp.linalg.svd(damped_features, compute_uv=False, full_matrices=False) ** 2,
    )


def _rtol(dtype) -> float:
    """The stated tolerance, or a float32 run's own rounding where that is coarser."""
    return max(PSEUDO_INVERSE_RTOL, 64 * float(jnp.finfo(dtype).eps))


class Conditioning(NamedTuple):
    """Rows of result.json for one split, by footing, and the damped spectra."""

    rows: dict[str, dict[str, Any]]
    spectra: dict[str, dict[str, list[float]]]


def conditioning(
    primary: TaskRows, harmful: TaskRows, theta: Float[Array, "d_in d"]
) -> Conditioning:
    """Both tasks, before (identity) and after, on every footing: ratios (i), (ii) and RIR.

    The limit of RIR and the fraction of it that is reached (of the logarithms) go with the damped
    footing, on which they are defined for every data set.
    """
    theta = jnp.asarray(theta)  # the dtype that is reported is the one that computes
    identity = jnp.eye(theta.shape[0], dtype=theta.dtype)
    before = {"primary": kappas(primary, identity), "harmful": kappas(harmful, identity)}
    after = {"primary": kappas(primary, theta), "harmful": kappas(harmful, theta)}
    limit = float(log_rir_limit(primary, harmful))
    dtype = str(theta.dtype)
    rows = {}
    for footing, definition in DEFINITIONS.items():
        found = linalg.relative_immunisation(
            harmful_after=getattr(after["harmful"], footing),
            harmful_before=getattr(before["harmful"], footing),
            primary_after=getattr(after["primary"], footing),
            primary_before=getattr(before["primary"], footing),
        )
        log_rir = float(found.rir.log_ratio)
        is_measure = footing == "damped"
        dampings = {
            "damped": (float(primary.damping), float(harmful.damping)),
            "pseudo_inverse": (0.0, 0.0),
            "reference": (REFERENCE_DAMPING, REFERENCE_DAMPING),
        }[footing]
        rows[footing] = {
            task: {
                "before": kappa_row(getattr(before[task], footing), dtype),
                "after": kappa_row(getattr(after[task], footing), dtype),
            }
            for task in ("primary", "harmful")
        } | {
            "log_ratio_harmful": float(found.harmful.log_ratio),
            "log_ratio_primary": float(found.primary.log_ratio),
            "log_rir": log_rir,
            "log_rir_lower": float(found.rir.lower),
            "log_rir_upper": float(found.rir.upper),
            "log_rir_limit": limit if is_measure else None,
            "log_fraction": log_rir / limit if is_measure and limit > 1e-9 else None,
            "damping_primary": dampings[0],
            "damping_harmful": dampings[1],
            "definition": definition,
        }
    spectra = {
        task: {
            "before": np.asarray(before[task].eigenvalues).tolist(),
            "after": np.asarray(after[task].eigenvalues).tolist(),
        }
        for task in ("primary", "harmful")
    }
    return Conditioning(rows, spectra)


@jax.jit
def log_rir_limit(primary: TaskRows, harmful: TaskRows) -> Float[Array, ""]:
    """The largest log RIR any invertible linear backbone has on these rows, damped footing."""
    factor_primary = linalg.damped_factor(primary.x, damping=primary.damping)
    factor_harmful = linalg.damped_factor(harmful.x, damping=harmful.damping)
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
