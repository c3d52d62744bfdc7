"""The paper's ablation: only the harmful task's regulariser, nothing that holds the primary kappa.

Zheng et al. (2025), https://arxiv.org/abs/2505.23760, the "R_ill only" rows of its tables.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaximm.immunisers.about import GRADIENT_STEPS, WHITENING, About
from jaximm.immunisers.conditioning.condition_gap import ConditionGapConfig, condition_gap
from jaximm.immunisers.problem import Problem
from jaximm.types import Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class IllOnlyConfig(ConditionGapConfig):
    """R_ill alone (ablation): both kappas grow together."""

    about: ClassVar = About(
        title="ill-conditioning alone",
        source="Zheng et al. (2025), ablation R_ill only, https://arxiv.org/abs/2505.23760",
        against=GRADIENT_STEPS,
        broken_by=WHITENING,
    )

    primary_weight: float | None = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.primary_weight != 0:
            raise ValueError(
                f"ill_only has no primary term, got primary_weight={self.primary_weight}; use "
                "condition_gap."
            )


def ill_only(config: IllOnlyConfig, problem: Problem) -> Immuniser:
    """`condition_gap` without R_well."""
    return condition_gap(config, problem)
