r"""Fine-tuning in a random low-dimensional subspace: A is drawn and frozen, only B trains.

    W = W_0 + A B,      A [in, rank] ~ N(0, 1), frozen,      B [rank, out] = 0 at the start.

Every parameter moves, but only so: a matrix or a kernel [all axes but the last, out] by `rank`
numbers an output, a vector (one column) along `rank` random directions. The head trains fully, by
the same AdamW. At rank 1 there is next to nothing that a defence could make costly: it measures how
much of a defence rests on distances in the space of all parameters, or on their gradients.

With entries of A around 1 a step moves each weight by about the learning rate, so that learning
rates compare with those of Adam on the weights themselves; LoRA's A is sqrt(in) times smaller.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, check_whole
from jaximm.attacks.weights.descent import AdamW, adam_of, scaled_head, tuning
from jaximm.attacks.weights.lora import adam_step, start_key
from jaximm.attacks.weights.problem import (
    Access,
    Batches,
    ModelWeights,
    WeightAttack,
    dtype_of,
)
from jaximm.models.adapters.lora import Factors, merged, start
from jaximm.types import Head

SOURCE = (
    "Li et al. (2018), Measuring the intrinsic dimension of objective landscapes, "
    "https://arxiv.org/abs/1804.08838; Zhang et al. (2023), LoRA-FA: Memory-efficient low-rank "
    "adaptation for large language models fine-tuning, https://arxiv.org/abs/2308.03303"
)


class State(NamedTuple):
    """The weights, both factors by path, and AdamW's state of coordinates and head."""

    weights: ModelWeights
    bases: dict[str, Float[Array, "in rank"]]
    coordinates: dict[str, Float[Array, "rank out"]]
    opt_state: Any


@functools.lru_cache(maxsize=16)
def _subspace(rank: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of a rank."""

    def init(access: Access, hyper: Hyper) -> State:
        weights = scaled_head(access, hyper)
        key = start_key(access)
        factors = start(weights.params, lambda *_: True, rank, key, stacked=access.stacked)
        bases = {path: factor.a * math.sqrt(factor.a.shape[-2]) for path, factor in factors.items()}
        coordinates = {path: factor.b for path, factor in factors.items()}
        with jax.numpy_dtype_promotion("standard"):
            opt_state = adam_of(hyper).init((coordinates, weights.head))
        return State(weights, bases, coordinates, opt_state)

    def update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        def weights_of(coordinates: dict[str, jax.Array], head: Head) -> ModelWeights:
            factors = {path: Factors(state.bases[path], b) for path, b in coordinates.items()}
            one = jnp.ones((), dtype_of(head, access.weights.params))
            params = merged(access.weights.params, factors, one)
            return state.weights._replace(params=params, head=head)

        def objective(trained):
            return access.loss_fn(weights_of(*trained), batches.harmful)

        trained, opt_state = adam_step(
            (state.coordinates, state.weights.head), objective, state.opt_state, hyper
        )
        return State(weights_of(*trained), state.bases, trained[0], opt_state)

    return init, update


def random_subspace(*, rank: int = 1, **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on the coordinates in a random subspace.

    Args:
      rank: columns of every A, >= 1; compiled in.
      **adamw: see `AdamW`.
    """
    check_whole("rank", rank)
    return tuning(
        _subspace(rank),
        adamw,
        title="random subspace",
        kind="low-rank",
        source=SOURCE,
    )
