"""Fine-tuning of the normalisation layers' scales and shifts, and of the head, by AdamW.

A few numbers a channel: enough to rescale features and to turn them off, which is what a defence
by scaling relies on nobody undoing. Which parameters those are is told by their names
(`jaximm.attacks.weights.paths.is_norm`). Batch statistics stay as they are.
"""

from __future__ import annotations

from typing import Unpack

from jaximm.attacks.weights.descent import (
    AdamW,
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


# Built once: the same function objects each time, so that jit finds the compiled run again.
_TRAINED = by_path(is_norm)
_NORM_ONLY = descent(adam_of, scaled_head, loss_of(_TRAINED), _TRAINED)


def norm_only(**adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on normalisation layers and the head.

    Args:
      **adamw: see `AdamW`.
    """
    return tuning(
        _NORM_ONLY,
        adamw,
        title="norms and head only",
        kind="partial",
        source=SOURCE,
        needs=("norms",),
    )
