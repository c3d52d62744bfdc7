r"""Back to the public base: the main directions of what was done to it are taken away, then AdamW.

With D = W - W_public = U S V^T of every matrix (a kernel is [all axes but the last, out]),

    W <- W_public + U S' V^T,    S' = S without the largest values that together carry `energy` of
                                 sum s_i^2,

and vectors go back to the public ones. A defence that is an edit of low rank, as most are, is gone
once its few directions are, while what else a user tuned stays; at energy 1 the public model is
there again. Of which rank the differences are, an assessment says beside what it reaches
(`jaximm.measures.task_vectors.change_of`).
"""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.weights.descent import EDIT_RATES, AdamW, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack
from jaximm.attacks.weights.spectral_rebalance import svd_flops
from jaximm.linalg import batched
from jaximm.models.adapters.lora import matrix_shape

SOURCE = (
    "Ilharco et al. (2023), Editing models with task arithmetic, "
    "https://arxiv.org/abs/2212.04089; the rank: Sharma et al. (2023), "
    "https://arxiv.org/abs/2312.13558"
)


def stripped(difference: jax.Array, energy: jax.Array) -> jax.Array:
    """A matrix without its largest singular values, up to a share of the sum of their squares.

    >>> import jax.numpy as jnp
    >>> stripped(jnp.diag(jnp.array([3.0, 1.0])), jnp.array(0.9)).round(3).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    left, values, right = batched.svd(difference)
    squares = values**2
    total = jnp.sum(squares)
    # What stands before a value: it goes while the share is not reached without it.
    before = (jnp.cumsum(squares) - squares) / jnp.where(total > 0, total, 1.0)
    kept = jnp.where((before < energy) | (energy >= 1), 0.0, values)
    return jnp.matmul(left * kept[None, :], right, precision="highest")


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with every difference from the public ones stripped."""
    weights = scaled_head(access, hyper)

    def one(parts: Any, ours: jax.Array, theirs: jax.Array) -> jax.Array:
        theirs = theirs.astype(ours.dtype)
        layers = access.stacked(jax.tree_util.keystr(parts, simple=True, separator="."))
        if ours.ndim - layers < 2:
            return theirs

        def edit(difference: jax.Array) -> jax.Array:
            matrix = difference.reshape(matrix_shape(difference.shape))
            residue = stripped(matrix, hyper["energy"].astype(matrix.dtype))
            return residue.reshape(difference.shape)

        for _ in range(layers):
            edit = jax.vmap(edit)
        return theirs + edit(ours - theirs)

    params = jax.tree_util.tree_map_with_path(one, weights.params, access.public)
    return weights._replace(params=params)


# Built once: the same function objects each time, so that jit finds the compiled run again.
_STRIP = descent(adam_of, _start)


def delta_strip(*, energies: Values = (0.5, 0.9, 1.0), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW from the public weights and what is left of the difference from them.

    Args:
      energies: in (0, 1], the share of the squared difference that goes, largest directions first.
      **adamw: see `AdamW`.
    """
    return tuning(
        _STRIP,
        adamw,
        rates=EDIT_RATES,
        tried={"energy": (energies, "(0, 1]")},
        bounds=(("energy", 1.0),),
        title="back to the public base",
        kind="merging",
        source=SOURCE,
        traits=frozenset({"undoes_defence"}),
        needs=("public",),
        solve_flops=svd_flops,
    )
