"""The head is multiplied by a small factor before the first step, then AdamW.

    kernel <- head_scale * kernel,      bias <- head_scale * bias.

Inflated logits saturate the softmax: the cross-entropy of rows that are right has no gradient left,
and that of the others one without any detail. A division takes that back; which class comes first
does not change. `fine_tune_adam` with other factors, kept apart because it is the first thing to
try against a defence that looks strong.
"""

from __future__ import annotations

import dataclasses

from jaximm.attacks.fine_tune import FineTuneAdamConfig, fine_tune_adam
from jaximm.attacks.weights import (
    WeightAttack,
)

SOURCE = (
    "Carlini and Wagner (2016), Defensive distillation is not robust to adversarial examples, "
    "https://arxiv.org/abs/1607.04311 (division of the logits)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitRescaleConfig(FineTuneAdamConfig):
    """AdamW after the head is scaled down.

    Attributes:
      learning_rates: > 0.
      weight_decays: >= 0, decoupled.
      head_scales: factors on the head before the first step.
    """

    learning_rates: tuple[float, ...] = (1e-3, 1e-2)
    head_scales: tuple[float, ...] = (0.01, 0.05, 0.2)


def logit_rescale(config: LogitRescaleConfig) -> WeightAttack:
    """Fine-tuning by AdamW from a head that was scaled down."""
    return dataclasses.replace(fine_tune_adam(config), kind="rescaling", needs=("head",))
