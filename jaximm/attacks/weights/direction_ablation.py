r"""Abliteration: what tells harmful rows from benign ones is taken out of the weights, then AdamW.

With f the features [d] of the backbone as it came, and means over all training rows of each task,

    r = (mean f(harmful) - mean f(benign)) / |...|,
    W      <- W (I - r r^T)        for matrices W of the backbone with d outputs,
    kernel <- (I - r r^T) kernel   for the harmful head.

A defence that recognises harmful rows by one direction of its features, to refuse or to collapse on
them, loses that direction. What exactly is ablated:

- Only trained parameters, and matrices are told by their shape alone: two axes [in, d], or more
  axes with the last of length d and the one before longer than 1 (a convolution kernel that mixes
  channels; a depthwise one, [.., 1, d], does not). In a network of one width d that is every
  matrix that writes to the residual stream; where only the last layer has d outputs, it is that
  layer. If nothing fits, only the head changes.
- r is measured at the features, not at each layer as in the source. Where W is followed by a
  normalisation or a nonlinearity, features of the new weights may still have a part along r: it is
  gone exactly only for layers that are linear from W to the features. The head does not read it,
  at step 0; fine-tuning may bring it back.
- Biases, and the scales and shifts of norms, stay: a constant along r tells no row from another.
- The benign head stays, so that what the features lose shows in the utility.

Equal means give r = 0: nothing is ablated. With a head of zeros, its part does nothing.
"""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper
from jaximm.attacks.weights.descent import AdamW, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "Arditi et al. (2024), Refusal in language models is mediated by a single direction, "
    "https://arxiv.org/abs/2406.11717"
)


def mean_difference(access: Access) -> Float[Array, "d"]:
    """The unit vector from the benign rows' mean features to the harmful rows'; 0 if they agree."""
    assert access.benign_features is not None  # the attacker needs a benign task
    gap = jnp.mean(access.features.x, axis=0) - jnp.mean(access.benign_features.x, axis=0)
    norm = jnp.linalg.norm(gap)
    return gap / jnp.where(norm > 0, norm, 1.0)


def writes_features(shape: tuple[int, ...], d: int) -> bool:
    """Whether a parameter of this shape is a matrix with d outputs.

    >>> [writes_features(s, 8) for s in ((5, 8), (1, 8), (3, 3, 5, 8), (3, 3, 1, 8), (8,), (8, 5))]
    [True, True, True, False, False, False]
    """
    if len(shape) < 2 or shape[-1] != d:
        return False
    return len(shape) == 2 or shape[-2] > 1


def without_direction(
    matrix: Float[Array, "... d"], direction: Float[Array, "d"]
) -> Float[Array, "... d"]:
    """W (I - r r^T)."""
    along = jnp.matmul(matrix, direction, precision="highest")
    return matrix - jnp.tensordot(along, direction, axes=0)


def _ablated(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with the direction taken out of matrices that write features, and of the head."""
    weights = scaled_head(access, hyper)
    direction = mean_difference(access)
    d = direction.shape[0]

    def ablate(leaf: Any) -> Any:
        if not writes_features(leaf.shape, d):
            return leaf
        return without_direction(leaf, direction.astype(leaf.dtype))

    kernel = weights.head.kernel
    kernel = without_direction(kernel.T, direction.astype(kernel.dtype)).T
    return weights._replace(
        params=jax.tree.map(ablate, weights.params), head=weights.head._replace(kernel=kernel)
    )


# Built once: the same function objects each time, so that jit finds the compiled run again.
_ABLATION = descent(adam_of, _ablated)


def direction_ablation(**adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW after the direction of harmful rows is ablated.

    Args:
      **adamw: see `AdamW`.
    """
    return tuning(
        _ABLATION,
        adamw,
        title="direction ablation",
        kind="ablation",
        source=SOURCE,
        needs=("benign", "own_head"),
        passes=2.0,  # over the harmful rows, and over about as many benign ones
    )
