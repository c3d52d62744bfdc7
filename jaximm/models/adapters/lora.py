r"""Low-rank adapters: a tree of their own, {path of a kernel: (A, B)}.

    W_eff = W + A B,    A [.., in, rank] ~ N(0, 1 / in),    B [.., rank, out] = 0  at the start,

so that the start is the model. A kernel of two axes or more is the matrix [all axes but the last,
out]; where leading axes hold layers that are stacked, its adapter is stacked alike. A model that
scans over its layers takes adapters beside them and computes ``x W + (x A) B``
(`jaximm.models.llama.hidden`): no merged copy of the weights is made, and none has a gradient.
`merged` writes them into the weights, for export and for models that take nothing beside them.

The usual factor alpha / rank is that of B: ``scaled(adapters, alpha / rank)``.

Hu et al. (2021), LoRA: Low-rank adaptation of large language models,
https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.models.flat import under
from jaximm.types import Params, Tree


class Factors(NamedTuple):
    """The adapter of one kernel, with the kernel's stacked axes first."""

    a: Float[Array, "*stacked in rank"]
    b: Float[Array, "*stacked rank out"]


Adapters = dict[str, Factors]
"""By the dotted path of the kernel."""


def matrix_shape(shape: tuple[int, ...], stacked: int = 0) -> tuple[int, ...]:
    """[.., in, out] of a parameter: all axes but the last, and the last; a vector is one column.

    >>> matrix_shape((3, 3, 8, 16)), matrix_shape((8, 16)), matrix_shape((5,)), matrix_shape(())
    ((72, 16), (8, 16), (5, 1), (1, 1))
    >>> matrix_shape((30, 8, 16), stacked=1), matrix_shape((30, 8), stacked=1)
    ((30, 8, 16), (30, 8, 1))

    Args:
      shape: of the parameter.
      stacked: how many leading axes hold layers.
    """
    front, own = shape[:stacked], shape[stacked:]
    if len(own) < 2:
        return *front, math.prod(own), 1
    return *front, math.prod(own[:-1]), own[-1]


def named_by(targets: str) -> Callable[[str], bool]:
    """Whether a path is chosen by a pattern.

    >>> chosen = named_by("layers.query, layers.value")
    >>> [chosen(path) for path in ("layers.query.kernel", "layers.query_norm.scale")]
    [True, False]

    Args:
      targets: dotted path prefixes, by whole components, separated by commas; "*" is all.

    Raises:
      ValueError: a pattern without any prefix.
    """
    prefixes = [part.strip() for part in targets.split(",") if part.strip()]
    if not prefixes:
        raise ValueError(
            f'targets must be "*" or dotted prefixes separated by commas, got {targets!r}.'
        )
    return lambda path: any(part == "*" or under(path, part) for part in prefixes)


def start(
    params: Params,
    chosen: Callable[[str, Array], bool],
    rank: int,
    rng_key: jax.Array,
    *,
    stacked: Callable[[str], int] = lambda path: 0,
) -> Adapters:
    """Adapters of the chosen parameters that change nothing yet: A ~ N(0, 1 / in) and B = 0.

    Args:
      params: a pytree of arrays.
      chosen: ``chosen(path, leaf)``.
      rank: columns of A, >= 1.
      rng_key: parameter i, in the order of the tree, draws from this folded with i.
      stacked: ``stacked(path)``, how many leading axes hold layers.

    Raises:
      ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of adapters must be >= 1, got {rank}.")
    adapters = {}
    for i, (parts, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        path = jax.tree_util.keystr(parts, simple=True, separator=".")
        if not chosen(path, leaf):
            continue
        *front, rows, columns = matrix_shape(leaf.shape, stacked(path))
        key = jax.random.fold_in(rng_key, i)
        draw = jax.random.normal(key, (*front, rows, rank), leaf.dtype)
        zeros = jnp.zeros((*front, rank, columns), leaf.dtype)
        adapters[path] = Factors(draw / math.sqrt(rows), zeros)
    return adapters


def scaled(adapters: Mapping[str, Factors], scale: float | Array) -> Adapters:
    """Adapters that add `scale` times as much."""
    return {path: own._replace(b=scale * own.b) for path, own in adapters.items()}


def merged(params: Tree, adapters: Mapping[str, Factors], scale: float | Array = 1.0) -> Tree:
    """Parameters plus `scale` A B, for each path that has an adapter.

    >>> adapters = {"kernel": Factors(jnp.ones((2, 1)), 3 * jnp.ones((1, 2)))}
    >>> merged({"kernel": jnp.eye(2)}, adapters, 2.0)["kernel"].tolist()
    [[7.0, 6.0], [6.0, 7.0]]
    """

    def merge(path, leaf):
        own = adapters.get(jax.tree_util.keystr(path, simple=True, separator="."))
        return leaf if own is None else leaf + scale * jnp.matmul(own.a, own.b).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(merge, params)
