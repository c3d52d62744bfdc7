"""Fine-tuning of the last blocks and the head alone, by AdamW.

A block is what the paths of its parameters begin with, after what all paths begin with: up to the
first component that is a number, or else the first component (`block_of`):

    blocks.11.attention.out.kernel   blocks.11        fire9.squeeze1x1.bias   fire9
    layer4.1.norm1.scale             layer4.1         kernel                  kernel

Blocks come in the order of their names, numbers by value, those whose name begins with "stem",
"embed", "input" or "patch" first: a pytree does not say in which order it is used. What is no block
of its own (vectors alone, such as a final norm, and a neck, which the head can do without) goes
with the block before it and is not counted. A backbone with no more than k blocks is trained whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Unpack

import jax

from jaximm.attacks.grid import Hyper, check_whole
from jaximm.attacks.weights.descent import (
    AdamW,
    Objective,
    State,
    Trained,
    adam_of,
    by_path,
    descent,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.paths import (
    last_blocks_of,
)
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack

SOURCE = (
    "Lee et al. (2023), Surgical fine-tuning improves adaptation to distribution shifts, "
    "https://arxiv.org/abs/2210.11466"
)


def loss_of(trained: Trained) -> Objective:
    """The harmful task's loss, differentiated by nothing but what is trained.

    `descent` masks the gradient of everything else, but has it computed first.
    """

    def objective(
        weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper
    ) -> jax.Array:
        del hyper
        weights = jax.tree.map(
            lambda leaf, keep: leaf if keep else jax.lax.stop_gradient(leaf),
            weights,
            trained(weights),
        )
        return access.loss_fn(weights, batches.harmful)

    return objective


@functools.lru_cache(maxsize=16)
def _last_blocks(k: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` for a number of blocks."""

    def trained(weights: ModelWeights) -> ModelWeights:
        return by_path(last_blocks_of(weights.params, k))(weights)

    return descent(adam_of, scaled_head, loss_of(trained), trained)


def last_blocks(*, k: int = 1, **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on the last blocks and the head.

    Args:
      k: how many blocks, >= 1; compiled in.
      **adamw: see `AdamW`.
    """
    check_whole("k", k)
    return tuning(
        _last_blocks(k),
        adamw,
        title="last blocks only",
        kind="partial",
        needs=("blocks",),
        source=SOURCE,
    )
