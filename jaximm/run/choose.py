"""The choice of a method's settings on rows that it was not fitted to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaximm import measures
from jaximm.immunisers.conditioning.limit import LimitChoice, LimitConfig, choose_limit, limit_theta
from jaximm.immunisers.problem import triangle
from jaximm.objectives import objective
from jaximm.registry import parse_label
from jaximm.run.prepare import Prepared


def is_selected(prepared: Prepared, label: str) -> bool:
    """Whether a label is a table's limit with t, damping and shrinkage left to be chosen."""
    name, fields = parse_label(label)
    keys = {*fields, *prepared.config.method_fields.get("limit", {})}
    of_numbers = prepared.classes("primary") is None
    return of_numbers and name == "limit" and not keys & {"t", "damping", "shrinkage"}


def select_limit(prepared: Prepared, **grids: Any) -> tuple[LimitConfig, list[LimitChoice]]:
    """`jaximm.immunisers.conditioning.limit.choose_limit` on the held-out rows of a prepared pair.

    log RIR is that of all held-out rows. Primary quality is that of the best damped head on the
    reported half (its penalty is chosen on the other); constant targets have none, so log RIR alone
    decides. The chosen method's held-out figures are therefore optimistic, which a flag says.

    Returns:
      The chosen config and every cell.
    """
    kind = prepared.pair.primary.kind
    factors = [
        triangle(jnp.concatenate([selection.x, held_out.x]), train.damping)
        for selection, held_out, train in zip(
            prepared.selection, prepared.held_out, prepared.rows["train"], strict=True
        )
    ]
    identity = jnp.eye(factors[0].shape[0], dtype=factors[0].dtype)
    raw = measures.log_kappas(*factors, identity)
    grams = [batch.x.T @ batch.x / batch.x.shape[0] for batch in prepared.train]
    rows = measures.Rows(
        prepared.train.primary, prepared.selection.primary, prepared.held_out.primary
    )

    def quality(theta) -> float:
        if kind == "constant":
            return 0.0
        metric = objective(kind).metric
        return float(measures.best_head_quality(rows, theta, metric=metric).held_out)

    def measure(config: LimitConfig) -> tuple[float, float, float]:
        theta = _limit_theta(grams[0], grams[1], config.t, config.damping, config.shrinkage)
        moved = measures.log_kappas(*factors, theta)
        harmful = float(moved["log_kappa_harmful"] - raw["log_kappa_harmful"])
        primary = float(moved["log_kappa_primary"] - raw["log_kappa_primary"])
        return harmful - primary, quality(theta), primary

    return choose_limit(measure, quality_before=quality(identity), **grids)


@jax.jit
def _limit_theta(gram_primary, gram_harmful, t, damping, shrinkage):
    return limit_theta(
        gram_primary, gram_harmful, t=t, damping=damping, shrinkage=shrinkage, rotate=False
    )
