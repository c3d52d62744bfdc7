"""What sets the scale of the logits is multiplied by a small factor first, then AdamW.

    kernel <- head_scale * kernel,      bias <- head_scale * bias,

of the head that the model has for the task; where there is none (a head of zeros) of every
parameter of the last block of the backbone (`last_blocks`), which sets the scale of the features.

Inflated logits saturate the softmax: the cross-entropy of rows that are right has no gradient left,
and that of the others one without any detail. A division takes that back; which class comes first
does not change. It is the first thing to try against a defence that looks strong.
"""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp

from jaximm.attacks.grid import Hyper
from jaximm.attacks.weights.descent import EDIT_RATES, AdamW, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.paths import last_blocks_of
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "Carlini and Wagner (2016), Defensive distillation is not robust to adversarial examples, "
    "https://arxiv.org/abs/1607.04311 (division of the logits)"
)


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with the head, or else the last block, scaled down."""
    weights = scaled_head(access, hyper)
    if not weights.head:  # `scaled_head` has scaled what stands for one
        return weights
    has_head = jnp.any(access.weights.head.kernel != 0)
    last = last_blocks_of(weights.params, 1)

    def edit(path, leaf):
        factor = jnp.where(has_head, 1.0, hyper["head_scale"]).astype(leaf.dtype)
        return (
            leaf * factor if last(jax.tree_util.keystr(path, simple=True, separator=".")) else leaf
        )

    return weights._replace(params=jax.tree_util.tree_map_with_path(edit, weights.params))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_RESCALE = descent(adam_of, _start)


def logit_rescale(**adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW after the head, or without one the last block, is scaled down.

    Args:
      **adamw: see `AdamW`.
    """
    return tuning(
        _RESCALE,
        adamw,
        rates=EDIT_RATES,
        heads=(0.05, 0.2),
        title="rescaled logits, then fine-tuning",
        kind="rescaling",
        source=SOURCE,
        traits=frozenset({"new_head"}),
    )
