"""Fine-tuning on both tasks at once: the harmful loss plus a multiple of the benign one, by AdamW.

    L = L_harmful + benign_weight * L_benign,        each a mean over its own mini-batch.

Backbone, harmful head and benign head all train. A defence that makes the model collapse when it is
fine-tuned bets on an attacker who does not look at what else is lost; this one pays a second
forward and backward pass a step to keep the utility.
"""

from __future__ import annotations

from typing import Unpack

import jax

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.weights.descent import (
    AdamW,
    adam_of,
    descent,
    everything,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack

SOURCE = "Caruana (1997), Multitask learning, https://doi.org/10.1023/A:1007379606734"


def _objective(weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper) -> jax.Array:
    """The weighted sum of both losses."""
    assert batches.benign is not None  # the attacker needs a benign task
    benign = access.benign_loss_fn(weights, batches.benign)
    return access.loss_fn(weights, batches.harmful) + hyper["benign_weight"] * benign


# Built once: the same function objects each time, so that jit finds the compiled run again.
_MIXED = descent(adam_of, scaled_head, _objective, everything)


def mixed_loss(*, benign_weights: Values = (1.0,), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on the harmful loss plus a multiple of the benign one.

    Args:
      benign_weights: >= 0, of the benign loss.
      **adamw: see `AdamW`.
    """
    return tuning(
        _MIXED,
        adamw,
        tried={"benign_weight": (benign_weights, "[0, inf)")},
        bounds=(("benign_weight", 0.0),),
        title="both losses at once",
        kind="mixed",
        source=SOURCE,
        needs=("benign",),
    )
