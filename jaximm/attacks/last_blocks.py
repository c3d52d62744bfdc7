"""Fine-tuning of the last blocks and the head alone, by AdamW.

A block is what the paths of its parameters begin with: up to the first component that is a number,
or else the first component (`block_of`):

    blocks.11.attention.out.kernel   blocks.11        fire9.squeeze1x1.bias   fire9
    layer4.1.norm1.scale             layer4.1         kernel                  kernel

Blocks come in the order of their names, numbers by value, those called "stem" or "embed" first: a
pytree does not say in which order it is used. What is no block of its own (vectors alone, such as a
final norm, and a neck, which the head can do without) goes with the block before it and is not
counted. A backbone with no more than k blocks is trained whole.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax

from jaximm.attacks.base import Hyper
from jaximm.attacks.fine_tune import (
    FineTuneAdamConfig,
    Objective,
    State,
    Trained,
    adam_of,
    by_path,
    descent,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights import (
    Access,
    Batches,
    ModelWeights,
    WeightAttack,
    paths_of,
)

SOURCE = (
    "Lee et al. (2023), Surgical fine-tuning improves adaptation to distribution shifts, "
    "https://arxiv.org/abs/2210.11466"
)

_FIRST = ("stem", "embed")
_UNCOUNTED = "neck"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastBlocksConfig(FineTuneAdamConfig):
    """AdamW on the last blocks and the head.

    Attributes:
      learning_rates: > 0.
      weight_decays: >= 0, decoupled.
      head_scales: factors on the head before the first step; 0 re-initialises it.
      k: how many blocks, >= 1; compiled in.
    """

    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}.")


def block_of(path: str) -> str:
    """The block of a parameter, by its dotted path.

    >>> block_of("blocks.11.attention.out.kernel"), block_of("embed.position"), block_of("kernel")
    ('blocks.11', 'embed', 'kernel')
    """
    parts = path.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


def last_blocks_of(params: Any, k: int) -> frozenset[str]:
    """The names of the last k blocks, and of what goes with them.

    >>> import numpy as np
    >>> sizes = {"blocks.9.w": (2, 2), "blocks.10.w": (2, 2), "embed.w": (2, 2), "norm.scale": (2,)}
    >>> sorted(last_blocks_of({path: np.ones(shape) for path, shape in sizes.items()}, 1))
    ['blocks.10', 'norm']
    """
    counts: dict[str, bool] = {}
    for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True):
        block = block_of(path)
        counts[block] = counts.get(block, False) or (leaf.ndim >= 2 and block != _UNCOUNTED)
    ordered = sorted(counts, key=_place)
    counted = [at for at, block in enumerate(ordered) if counts[block]]
    return frozenset(ordered[counted[-k] :] if len(counted) > k else ordered)


def _place(block: str) -> tuple[Any, ...]:
    """What blocks are sorted by; every other part of the split is a number."""
    parts = re.split(r"(\d+)", block)
    return block.split(".")[0] not in _FIRST, [
        int(part) if at % 2 else part for at, part in enumerate(parts)
    ]


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
        last = last_blocks_of(weights.params, k)
        return by_path(lambda path: block_of(path) in last)(weights)

    return descent(adam_of, scaled_head, loss_of(trained), trained)


def last_blocks(config: LastBlocksConfig) -> WeightAttack:
    """Fine-tuning of the last blocks and the head by AdamW."""
    return tuning(
        config,
        _last_blocks(config.k),
        kind="partial",
    )
