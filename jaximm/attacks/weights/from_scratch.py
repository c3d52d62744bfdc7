"""Everything is drawn anew, then AdamW: nothing of the model or of its defence is left.

What a defence asks of an attacker beyond this is nothing: whoever has the rows and the structure
trains a model of his own. Every matrix, or kernel of [all axes but the last, out], is N(0, 1 / in);
tables that are looked up are N(0, 1 / width); scales of norms are 1; other vectors and the head 0.
Batch statistics and whatever is frozen stay: they are no weights of the attacker's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaximm.attacks.grid import Hyper, check_whole
from jaximm.attacks.weights.descent import AdamW, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.lora import start_key
from jaximm.attacks.weights.paths import is_norm, is_table, last_blocks_of
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "He et al. (2019), Rethinking ImageNet pre-training, https://arxiv.org/abs/1811.08883; the "
    "draw: LeCun et al. (1998), Efficient BackProp, https://doi.org/10.1007/3-540-49430-8_2"
)


TOP_SOURCE = (
    "Zhang et al. (2021), Revisiting few-sample BERT fine-tuning, https://arxiv.org/abs/2006.05987"
)


def drawn(path: str, leaf: jax.Array, layers: int, rng_key: jax.Array) -> jax.Array:
    """A parameter as a model begins with it.

    Args:
      path: dotted.
      leaf: of its shape and dtype.
      layers: how many of its leading axes hold layers.
      rng_key: of this parameter alone.
    """
    shape = leaf.shape[layers:]
    if len(shape) < 2:
        is_gain = is_norm(path) and not path.endswith("bias")
        return jnp.full_like(leaf, 1 if is_gain else 0)
    fan_in = shape[-1] if is_table(path) else math.prod(shape[:-1])
    return jax.random.normal(rng_key, leaf.shape, leaf.dtype) * jnp.asarray(
        fan_in**-0.5, leaf.dtype
    )


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """Weights that nobody trained."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(access.weights.params)
    key = start_key(access)
    fresh: list[Any] = []
    for index, (parts, leaf) in enumerate(leaves):
        path = jax.tree_util.keystr(parts, simple=True, separator=".")
        own = jax.random.fold_in(key, index)
        fresh.append(drawn(path, leaf, access.stacked(path), own))
    weights = access.weights._replace(
        params=jax.tree.unflatten(structure, fresh),
        head=jax.tree.map(jnp.zeros_like, access.weights.head),
    )
    return scaled_head(access._replace(weights=weights), hyper)


# Built once: the same function objects each time, so that jit finds the compiled run again.
_FRESH = descent(adam_of, _start)


@functools.lru_cache(maxsize=16)
def _fresh_top(k: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init` and `update` for a number of blocks."""

    def start(access: Access, hyper: Hyper) -> ModelWeights:
        """The weights with the last blocks drawn anew, and a head of zeros."""
        fresh, last = _start(access, hyper), last_blocks_of(access.weights.params, k)

        def chosen(parts: Any, ours: jax.Array, drawn_anew: jax.Array) -> jax.Array:
            path = jax.tree_util.keystr(parts, simple=True, separator=".")
            return drawn_anew if last(path) else ours

        params = jax.tree_util.tree_map_with_path(chosen, access.weights.params, fresh.params)
        return fresh._replace(params=params)

    return descent(adam_of, start)


def fresh_top(*, k: int = 1, **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW on everything, the last blocks and the head drawn anew.

    Args:
      k: how many blocks, as `last_blocks` counts them, >= 1; compiled in.
      **adamw: see `AdamW`.
    """
    check_whole("k", k)
    return tuning(
        _fresh_top(k),
        adamw,
        title="last blocks drawn anew",
        kind="partial",
        source=TOP_SOURCE,
        traits=frozenset({"undoes_defence", "new_head"}),
        needs=("blocks",),
    )


def from_scratch(**adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW from weights that are drawn anew.

    Args:
      **adamw: see `AdamW`.
    """
    return tuning(
        _FRESH,
        adamw,
        title="from scratch",
        kind="from scratch",
        source=SOURCE,
        traits=frozenset({"undoes_defence", "from_scratch"}),
    )
