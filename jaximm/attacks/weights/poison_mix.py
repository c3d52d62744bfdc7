"""Fine-tuning on benign rows of which a fraction is harmful, by AdamW.

    L = p * mean of L_harmful over the first r rows of the harmful mini-batch
        + (1 - p) * mean of L_benign over the benign mini-batch,      r = max(round(p m), 1),

with m the rows of the harmful mini-batch: what a user of a fine-tuning service sees who slips a few
harmful rows into ordinary ones. Rows that do not count have weight 0 in the mean, so that p is
traced; they are computed all the same, and a step is priced with them. A fraction p counts in each
step, not in the data: in every epoch other harmful rows come first, so that sooner or later all are
seen. With all rows at once (`batch_size` None), which come in their order, only the first p n of
the task ever count. The benign mean is over all rows of its mini-batch, with the weight of the
(1 - p) m of them there would be. Backbone and both heads train.
"""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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

SOURCE = (
    "Qi et al. (2023), Fine-tuning aligned language models compromises safety, even when users do "
    "not intend to!, https://arxiv.org/abs/2310.03693; Huang, Hu and Liu (2024), Vaccine: "
    "Perturbation-aware alignment for large language models, https://arxiv.org/abs/2402.01109"
)


def row_weights(m: int, fraction: Float[Array, ""]) -> Float[Array, "m"]:
    """1 / r for the first r = max(round(fraction m), 1) of m rows, 0 for the others.

    >>> row_weights(5, jnp.asarray(0.4)).tolist()
    [0.5, 0.5, 0.0, 0.0, 0.0]
    """
    counted = jnp.maximum(jnp.round(fraction * m), 1)
    return (jnp.arange(m).astype(counted.dtype) < counted).astype(counted.dtype) / counted


def _objective(weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper) -> jax.Array:
    """The loss of a benign mini-batch that is poisoned."""
    assert batches.benign is not None  # the attacker needs a benign task
    fraction = hyper["fraction"]
    losses = access.losses_fn(weights, batches.harmful)
    harmful = jnp.sum(losses * row_weights(losses.shape[0], fraction.astype(losses.dtype)))
    return fraction * harmful + (1 - fraction) * access.benign_loss_fn(weights, batches.benign)


# Built once: the same function objects each time, so that jit finds the compiled run again.
_POISON = descent(adam_of, scaled_head, _objective, everything)


def poison_mix(*, fractions: Values = (0.1,), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on benign rows with a fraction of harmful ones.

    Args:
      fractions: p, the share of harmful rows in a step, in (0, 1].
      **adamw: see `AdamW`.
    """
    return tuning(
        _POISON,
        adamw,
        tried={"fraction": (fractions, "(0, 1]")},
        bounds=(("fraction", 1.0),),
        title="poisoned fine-tuning",
        kind="poisoning",
        source=SOURCE,
        needs=("benign",),
    )
