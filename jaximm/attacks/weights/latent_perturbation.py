"""A universal offset on what enters the trained blocks; the weights stay as they are.

    outputs = features_fn(params, x + shift) @ kernel + bias,

with one `shift` of the shape of an input row for all rows, zero at the start, trained by AdamW with
the head (or without it). The inputs of `features_fn` are what the frozen part before it gives, so
this is an attack on embeddings, which somebody with the weights need not find inputs for. There it
is one offset for each prompt; one for all rows has no labels to be read off at test time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Unpack

import jax.numpy as jnp

from jaximm.attacks.grid import Hyper
from jaximm.attacks.weights.descent import (
    AdamW,
    State,
    adam_of,
    by_path,
    descent,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.last_blocks import loss_of
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "Schwinn et al. (2024), Soft prompt threats: Attacking safety alignment and unlearning in "
    "open-source LLMs through the embedding space, https://arxiv.org/abs/2402.09063"
)


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with an offset of zero."""
    x = access.inputs.x
    return scaled_head(access, hyper)._replace(shift=jnp.zeros(x.shape[1:], x.dtype))


@functools.lru_cache(maxsize=2)
def _latent(train_head: bool) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update`, with the head or without it."""
    frozen = by_path(lambda _: False, head=train_head)

    def trained(weights: ModelWeights) -> ModelWeights:
        return frozen(weights)._replace(shift=True)

    return descent(adam_of, _start, loss_of(trained), trained)


def latent_perturbation(*, train_head: bool = True, **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on an offset of the inputs, and on the head.

    Args:
      train_head: whether the head trains too; compiled in.
      **adamw: see `AdamW`.
    """
    return tuning(
        _latent(train_head),
        adamw,
        title="latent perturbation",
        kind="latent",
        needs=("real_inputs",),
        source=SOURCE,
    )
