"""Trained parameters as matrices, for methods that work on the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from jaximm.models.adapters import lora
from jaximm.types import Params


def dotted(path: Any) -> str:
    """A path of `jax.tree_util` as patterns and `route` name it: "backbone.layers.0.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def over_kernels(
    edit: Callable[..., Float[Array, "*stacked in out"]],
    params: Params,
    *others: Params,
    vectors: Callable[..., Array] = lambda leaf, *rest: leaf,
) -> Params:
    """``edit(matrix, ...)`` of every kernel, ``vectors(leaf, ...)`` of biases and scales.

    A kernel is the matrix [all axes but the last, out]; the layers of a language model
    (`jaximm.models.llama.Weights`) are stacked before it. Its frozen part is left as it is.
    """

    def leaf_of(path, leaf, *rest):
        name = dotted(path)
        if name.startswith("frozen."):
            return leaf
        stacked = int(name.startswith("trained.layers."))
        if leaf.ndim - stacked < 2:
            return vectors(leaf, *rest)
        shape = lora.matrix_shape(leaf.shape, stacked)
        return edit(*(each.reshape(shape) for each in (leaf, *rest))).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(leaf_of, params, *others)


def refuse_adapters(method: str, params: Params) -> None:
    """Refuses a language model of which low-rank adapters train.

    Raises:
      ValueError: as said.
    """
    if jax.tree.leaves(getattr(params, "adapters", ())):
        raise ValueError(
            f"{method} works on the weights themselves, not on adapters beside them; merge these "
            "(jaximm.models.llama.whole) and name the parameters that train (named_parameters)."
        )
