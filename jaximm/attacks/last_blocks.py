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

_FIRST = ("stem", "embed", "input", "patch")
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


def last_blocks_of(params: Any, k: int) -> Callable[[str], bool]:
    """Whether a path belongs to the last k blocks, or to what goes with them.

    What all paths begin with (a network that is one attribute of a wrapper) is left out first.

    >>> import numpy as np
    >>> sizes = {"blocks.9.w": (2, 2), "blocks.10.w": (2, 2), "embed.w": (2, 2), "norm.scale": (2,)}
    >>> last = last_blocks_of({path: np.ones(shape) for path, shape in sizes.items()}, 1)
    >>> [path for path in sizes if last(path)]
    ['blocks.10.w', 'norm.scale']
    """
    paths = paths_of(params)
    skipped = _common(paths)

    def name(path: str) -> str:
        return block_of(".".join(path.split(".")[skipped:]))

    counts: dict[str, bool] = {}
    for path, leaf in zip(paths, jax.tree.leaves(params), strict=True):
        block = name(path)
        counts[block] = counts.get(block, False) or (leaf.ndim >= 2 and block != _UNCOUNTED)
    ordered = sorted(counts, key=_place)
    counted = [at for at, block in enumerate(ordered) if counts[block]]
    last = frozenset(ordered[counted[-k] :] if len(counted) > k else ordered)
    return lambda path: name(path) in last


def _common(paths: list[str]) -> int:
    """How many first components all paths share and need not, to be more than one block."""
    parts = [path.split(".") for path in paths]
    for skipped in range(min(map(len, parts), default=0)):
        if len({block_of(".".join(part[skipped:])) for part in parts}) > 1:
            return skipped
    return 0


def _place(block: str) -> tuple[Any, ...]:
    """What blocks are sorted by; every other part of the split is a number."""
    parts = re.split(r"(\d+)", block)
    return not block.startswith(_FIRST), [
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
        return by_path(last_blocks_of(weights.params, k))(weights)

    return descent(adam_of, scaled_head, loss_of(trained), trained)


def last_blocks(config: LastBlocksConfig) -> WeightAttack:
    """Fine-tuning of the last blocks and the head by AdamW."""
    return tuning(
        config,
        _last_blocks(config.k),
        kind="partial",
    )
