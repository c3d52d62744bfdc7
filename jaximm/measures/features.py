"""Condition numbers of deep features: the l2-probe Hessian of a task's rows.

Footings, F [n, d] the features before a closed-form method's neck theta (the identity without one):

``damped``
    kappa(theta^T (F^T F / n + lam I) theta), lam = 1e-6 tr(F^T F / n) / d of the same backbone's
    training features: the measure. Features of a trained network have dead directions, on which the
    undamped kappa is infinite and the limit with it.
``pseudo_inverse``
    kappa of F theta's singular values above a stated tolerance, squared, with the rank. The
    tolerance is what float32 features can resolve.
``reference``
    the released code's H + 1e-6 I.

``groups``: the paper's protocol, 20 groups of 100 rows each on the pseudo-inverse footing, RIR by
group and then mean and standard deviation in logs. With n < d rows it is the kappa of a row space.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm import linalg
from jaximm.linalg import DOMINANCE, Condition
from jaximm.linalg.arrays import exponent_of, times_power_of_two
from jaximm.measures.conditioning import REFERENCE_DAMPING, TaskRows, kappa_row

RTOL = 1e-6
"""Singular values of float32 features below this part of the largest are their own rounding."""

DAMPING = 1e-6
"""Relative to tr(F^T F / n) / d."""

DEFINITIONS = {
    "damped": (
        f"kappa(theta^T (F^T F / n + lam I) theta), theta the neck, lam = {DAMPING:g} of the mean "
        "eigenvalue of the same backbone's training features"
    ),
    "pseudo_inverse": (
        f"kappa of the singular values of F theta above {RTOL:g} of the largest, squared"
    ),
    "reference": "kappa(H + 1e-6 I), as the released code",
}


class FeatureKappas(NamedTuple):
    """A `Condition` a footing, and the damped Hessian's eigenvalues in descending order."""

    damped: Condition
    pseudo_inverse: Condition
    reference: Condition
    eigenvalues: Float[Array, "k"]


def task_rows(features: Float[Array, "n d"], train: Float[Array, "m d"] | None = None) -> TaskRows:
    """Features before the neck in the default float; lam from the training rows (or these)."""
    dtype = jnp.zeros(()).dtype
    features = jnp.asarray(features, dtype)
    train = features if train is None else jnp.asarray(train, dtype)
    exponent = exponent_of(train)  # split off, since the sum of squares leaves the dtype first
    mean_square = jnp.mean(times_power_of_two(train, -exponent) ** 2)
    return TaskRows(features, times_power_of_two(DAMPING * mean_square, 2 * exponent))


@jax.jit
def feature_kappas(
    rows: TaskRows, kernel: Float[Array, "d k"] | None = None, bias: Float[Array, "k"] | None = None
) -> FeatureKappas:
    """Condition numbers of one task's features on every footing.

    Args:
      rows: features before the neck, and lam.
      kernel: theta, the neck; None where there is none.
      bias: of the neck.
    """
    n = rows.x.shape[0]
    triangle = jnp.linalg.qr(linalg.damped_factor(rows.x, damping=rows.damping), mode="r")
    moved = rows.x
    stored = rows.x.dtype if kernel is None else kernel.dtype
    if kernel is not None:
        kernel = kernel.astype(rows.x.dtype)
        triangle, moved = triangle @ kernel, moved @ kernel
    if bias is not None:
        moved = moved + bias.astype(moved.dtype)[None, :]
    tall = n > moved.shape[1]
    scale = (moved.shape[1] / n) ** 0.5 if tall else 1.0
    if tall:  # a triangle with T^T T / k = F^T F / n: smaller, and as accurate
        moved = jnp.linalg.qr(moved, mode="r") * scale
    plain = linalg.feature_condition_number(moved, rtol=RTOL)
    plain = plain._replace(tolerance=plain.tolerance / scale)
    damped = linalg.feature_condition_number(triangle, rtol=0.0)
    code = damped.dominated_by
    if kernel is not None:
        # The neck was stored in its own dtype: a direction that it removes is left at its rounding.
        lost = damped.log_kappa > -2 * math.log(jnp.finfo(stored).eps)
        code = jnp.where(lost, jnp.asarray(DOMINANCE.index("rounding"), code.dtype), code)
    return FeatureKappas(
        # The rank and its tolerance are those of the data: the damping fills every direction.
        damped=damped._replace(rank=plain.rank, tolerance=plain.tolerance, dominated_by=code),
        pseudo_inverse=plain,
        reference=linalg.feature_condition_number(moved, rtol=RTOL, damping=REFERENCE_DAMPING),
        eigenvalues=jnp.linalg.svd(triangle, compute_uv=False, full_matrices=False) ** 2,
    )


class Tasks(NamedTuple):
    """Kappas of both tasks under one backbone."""

    primary: FeatureKappas
    harmful: FeatureKappas


def conditioning_rows(
    before: Tasks, after: Tasks, *, limit: float, dtype: str
) -> dict[str, dict[str, Any]]:
    """One conditioning row of result.json a footing.

    Args:
      before: under theta_0.
      after: under the immunised backbone.
      limit: `log_rir_limit` of theta_0's features. It binds linear maps after the frozen backbone,
        not training of the backbone itself.
      dtype: in which the features were computed.
    """
    rows = {}
    for footing, definition in DEFINITIONS.items():
        found = linalg.relative_immunisation(
            harmful_after=getattr(after.harmful, footing),
            harmful_before=getattr(before.harmful, footing),
            primary_after=getattr(after.primary, footing),
            primary_before=getattr(before.primary, footing),
        )
        log_rir = float(found.rir.log_ratio)
        bound = limit if footing == "damped" else None
        damping = {"damped": DAMPING, "pseudo_inverse": 0.0, "reference": REFERENCE_DAMPING}
        rows[footing] = {
            task: {
                side: kappa_row(getattr(getattr(kappas, task), footing), dtype)
                for side, kappas in (("before", before), ("after", after))
            }
            for task in ("primary", "harmful")
        } | {
            "log_ratio_harmful": float(found.harmful.log_ratio),
            "log_ratio_primary": float(found.primary.log_ratio),
            "log_rir": log_rir,
            "log_rir_lower": float(found.rir.lower),
            "log_rir_upper": float(found.rir.upper),
            "log_rir_limit": bound,
            "log_fraction": log_rir / bound if bound is not None and bound > 1e-9 else None,
            "damping_primary": damping[footing],
            "damping_harmful": damping[footing],
            "definition": definition,
        }
    return rows
