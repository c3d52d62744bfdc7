"""Fine-tuning of a language model's unembedding alone, by AdamW: what a probe is elsewhere.

The table that maps final hidden states to tokens trains, and nothing before it does. Where it is
the embedding too (tied), that moves with it. A model of one vector a row has probes for this, on
features that are computed once (`jaximm.attacks.probe`).
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
from jaximm.attacks.weights.paths import is_table, paths_of
from jaximm.attacks.weights.problem import ModelWeights, WeightAttack

SOURCE = (
    "Kumar et al. (2022), Fine-tuning can distort pretrained features and underperform "
    "out-of-distribution, https://arxiv.org/abs/2202.10054, linear probing"
)


def _trained(weights: ModelWeights) -> ModelWeights:
    tables = filter(is_table, paths_of(weights.params))
    last = max(tables, default="")  # "unembedding" is after "embedding"
    return by_path(lambda path: path == last)(weights)


# Built once: the same function objects each time, so that jit finds the compiled run again.
_HEAD_ONLY = descent(adam_of, scaled_head, loss_of(_trained), _trained)


def head_only(**adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on the unembedding.

    Args:
      **adamw: see `AdamW`.
    """
    return tuning(
        _HEAD_ONLY,
        adamw,
        title="unembedding only",
        kind="partial",
        source=SOURCE,
        needs=("unembedding",),
    )
