"""Fine-tuning of the normalisation layers' scales and shifts, and of the head, by AdamW.

A few numbers a channel: enough to rescale features and to turn them off, which is what a defence
by scaling relies on nobody undoing. Which parameters those are is told by their names
(`jaximm.attacks.weights.paths.is_norm`). Batch statistics stay as they are.
"""

from __future__ import annotations

import dataclasses

from jaximm.attacks.weights.descent import (
    FineTuneAdamConfig,
    adam_of,
    by_path,
    descent,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.last_blocks import loss_of
from jaximm.attacks.weights.paths import is_norm
from jaximm.attacks.weights.problem import WeightAttack

SOURCE = (
    "Frankle, Schwab and Morcos (2021), Training BatchNorm and only BatchNorm, "
    "https://arxiv.org/abs/2003.00152"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormOnlyConfig(FineTuneAdamConfig):
    """AdamW on normalisation layers and the head.

    Attributes:
      learning_rates: > 0; larger than for all weights, of which there are so many more.
      weight_decays: >= 0, decoupled.
      head_scales: factors on the head before the first step; 0 re-initialises it.
    """

    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)


# Built once: the same function objects each time, so that jit finds the compiled run again.
_TRAINED = by_path(is_norm)
_NORM_ONLY = descent(adam_of, scaled_head, loss_of(_TRAINED), _TRAINED)


def norm_only(config: NormOnlyConfig) -> WeightAttack:
    """Fine-tuning of normalisation layers and the head by AdamW."""
    return tuning(
        config,
        _NORM_ONLY,
        kind="partial",
        needs=("norms",),
    )
