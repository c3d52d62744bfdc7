"""The smallest weights of every matrix are set to zero before the first step, then AdamW.

Of a parameter of two or more axes, the round(fraction * size) entries of smallest magnitude become
0, leaf by leaf. Vectors and the head stay. All weights train afterwards, the zeros too: what is
pruned is what a defence may have put there, not the capacity to learn.
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
    "Han et al. (2015), Learning both weights and connections for efficient neural networks, "
    "https://arxiv.org/abs/1506.02626; Wei et al. (2024), Assessing the brittleness of safety "
    "alignment via pruning and low-rank modifications, https://arxiv.org/abs/2402.05162"
)


def pruned(weight: Float[Array, "..."], fraction: Float[Array, ""]) -> Float[Array, "..."]:
    """The weight with its round(fraction * size) entries of smallest magnitude set to 0.

    Ties go to the entry that comes first.

    >>> pruned(jnp.array([[3.0, -1.0], [0.5, -2.0]]), jnp.asarray(0.5)).tolist()
    [[3.0, 0.0], [0.0, -2.0]]
    """
    order = jnp.argsort(jnp.abs(weight).ravel())
    ranks = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    count = jnp.round(fraction * weight.size).astype(order.dtype)
    return jnp.where(ranks.reshape(weight.shape) < count, 0.0, weight)


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with a pruned backbone."""
    weights = scaled_head(access, hyper)

    def edit(leaf):
        return pruned(leaf, hyper["fraction"].astype(leaf.dtype))

    return weights._replace(params=over_matrices(edit, weights.params, access.stacked))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_PRUNE = descent(adam_of, _start)


def prune_then_tune(*, fractions: Values = (0.1, 0.5), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW after the smallest weights are set to zero.

    Args:
      fractions: of the entries of each matrix that become zero, in [0, 1).
      **adamw: see `AdamW`.
    """
    return tuning(
        _PRUNE,
        adamw,
        rates=EDIT_RATES,
        tried={"fraction": (fractions, "[0, 1)")},
        bounds=(("fraction", 0.0),),
        title="pruned, then fine-tuning",
        kind="compression",
        source=SOURCE,
        needs=("matrices",),
    )
