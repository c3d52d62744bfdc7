"""Fine-tuning on both tasks at once: the harmful loss plus a multiple of the benign one, by AdamW.

    L = L_harmful + benign_weight * L_benign,        each a mean over its own mini-batch.

Backbone, harmful head and benign head all train. A defence that makes the model collapse when it is
fine-tuned bets on an attacker who does not look at what else is lost; this one pays a second
forward and backward pass a step to keep the utility.
"""

from __future__ import annotations

import dataclasses

import jax

from jaximm.attacks.grid import Hyper
from jaximm.attacks.probe.ridge import check_non_negative
from jaximm.attacks.weights.descent import (
    FineTuneAdamConfig,
    adam_of,
    descent,
    everything,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack

SOURCE = "Caruana (1997), Multitask learning, https://doi.org/10.1023/A:1007379606734"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedLossConfig(FineTuneAdamConfig):
    """AdamW on the harmful loss plus a multiple of the benign one.

    Attributes:
      learning_rates: > 0.
      weight_decays: >= 0, decoupled.
      head_scales: factors on the harmful head before the first step; 0 re-initialises it.
      benign_weights: >= 0, of the benign loss.
    """

    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    benign_weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("benign_weights", self.benign_weights)


def _objective(weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper) -> jax.Array:
    """The weighted sum of both losses."""
    assert batches.benign is not None  # the attacker needs a benign task
    benign = access.benign_loss_fn(weights, batches.benign)
    return access.loss_fn(weights, batches.harmful) + hyper["benign_weight"] * benign


# Built once: the same function objects each time, so that jit finds the compiled run again.
_MIXED = descent(adam_of, scaled_head, _objective, everything)


def mixed_loss(config: MixedLossConfig) -> WeightAttack:
    """Fine-tuning by AdamW on the sum of both tasks' losses."""
    return tuning(
        config,
        _MIXED,
        kind="mixed",
        bounds=(("benign_weight", 0.0),),
        needs=("benign",),
        benign_weight=config.benign_weights,
    )
