"""Condition numbers by groups of rows, as in the paper's protocol."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaximm import linalg
from jaximm.measures.conditioning import FEATURE_RTOL


def group_log_kappas(
    features: Float[Array, "n d"],
    *,
    groups: int = 20,
    size: int = 100,
    rtol: float = FEATURE_RTOL,
) -> Float[np.ndarray, "groups"]:
    """log kappa, pseudo-inverse, of consecutive groups of rows, as many as there are rows for.

    Raises:
      ValueError: fewer rows than one group.
    """
    count = min(groups, features.shape[0] // size)
    if count < 1:
        raise ValueError(f"a group needs {size} rows, got {features.shape[0]}.")
    rows = jnp.asarray(features[: count * size], jnp.zeros(()).dtype)
    return np.asarray(_log_kappas(rows.reshape(count, size, -1), rtol=rtol))


@functools.partial(jax.jit, static_argnames="rtol")
def _log_kappas(groups, *, rtol):
    def one(rows):
        return linalg.feature_condition_number(rows, rtol=rtol).log_kappa

    return jax.lax.map(one, groups)


def group_summary(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], *, size: int
) -> dict[str, Any]:
    """RIR_theta0 by group: mean and sample standard deviation of each logarithm.

    Args:
      before: log kappas by task, under theta_0.
      after: the same groups under the immunised backbone.
      size: rows a group.
    """
    harmful = after["harmful"] - before["harmful"]
    primary = after["primary"] - before["primary"]
    count = min(len(harmful), len(primary))
    values = {
        "log_ratio_harmful": harmful,
        "log_ratio_primary": primary,
        "log_rir": harmful[:count] - primary[:count],
    }
    return {"groups": count, "rows": size} | {
        key: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)) if len(v) > 1 else None}
        for key, v in values.items()
    }
