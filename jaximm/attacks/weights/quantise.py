r"""The backbone is rounded to few bits and back before the first step, then AdamW.

    q = round(W / delta),     W <- delta q,     delta = max |W[..., c]| / (2^(bits - 1) - 1),

round to nearest, symmetric, one delta an output channel c (the last axis), for every parameter of
two or more axes. Small changes to weights, which is how some defences hide what a model knew, are
rounded away; so is whatever relies on exact numbers. Vectors and the head stay, and training goes
on in full precision.
"""

from __future__ import annotations

from typing import Unpack

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.weights.descent import EDIT_RATES, AdamW, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.paths import over_matrices
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "Nagel et al. (2021), A white paper on neural network quantization, "
    "https://arxiv.org/abs/2106.08295; Zhang et al. (2025), Catastrophic failure of LLM unlearning "
    "via quantization, https://arxiv.org/abs/2410.16454"
)


def quantised(weight: Float[Array, "... out"], bits: Float[Array, ""]) -> Float[Array, "... out"]:
    """Rounded to 2^bits - 1 levels an output channel; a channel of zeros stays.

    >>> quantised(jnp.array([[0.4], [-3.0]]), jnp.asarray(3.0)).tolist()
    [[0.0], [-3.0]]
    """
    largest = jnp.round(jnp.exp2(bits - 1)) - 1
    top = jnp.max(jnp.abs(weight), axis=tuple(range(weight.ndim - 1)), keepdims=True)
    delta = jnp.where(top > 0, top, 1.0) / largest
    return delta * jnp.round(weight / delta)


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with a quantised backbone."""
    weights = scaled_head(access, hyper)

    def edit(leaf):
        return quantised(leaf, hyper["bits"].astype(leaf.dtype))

    return weights._replace(params=over_matrices(edit, weights.params, access.stacked))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_QUANTISE = descent(adam_of, _start)


def quantise_then_tune(*, bits: Values = (8, 4), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW after the backbone is rounded to few bits.

    Args:
      bits: whole numbers in 2..16; b bits have 2^b - 1 levels, symmetric around 0.
      **adamw: see `AdamW`.
    """
    return tuning(
        _QUANTISE,
        adamw,
        rates=EDIT_RATES,
        tried={"bits": (bits, "whole [2, 16]")},
        bounds=(("bits", 2.0), ("bits", 8.0)),
        title="quantised, then fine-tuning",
        kind="compression",
        source=SOURCE,
        needs=("matrices",),
    )
