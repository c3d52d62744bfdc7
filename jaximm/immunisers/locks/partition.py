"""Parameters in parts: a core, and a part for each domain that can be taken out.

A partition is a tree like the parameters with the number of the owner of each entry: 0 the core, i
the part of domain i.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaximm.types import Params

Partition = Params
"""A tree of int8 arrays, each of its parameter's shape."""

CORE = 0


def of_units(params: Params, share: float, *, units: str, readers: str) -> Partition:
    """The last share of every layer's units is part 1: what computes them, and what reads them.

    Args:
      params: the whole model.
      share: in (0, 1); the last ``round(share * width)`` units of each axis.
      units: regular expression of dotted paths whose last axis is of units ("backbone.0.kernel").
      readers: of those whose second to last axis is.

    Raises:
      ValueError: expressions that name nothing, or a share that leaves no unit of a named axis to
        the core or to the part.
    """

    def owners(path, leaf) -> np.ndarray:
        dotted = jax.tree_util.keystr(path, simple=True, separator=".")
        part = np.zeros(leaf.shape, np.int8)
        if leaf.ndim >= 1 and re.search(units, dotted):
            part[..., _first(dotted, leaf.shape[-1], share) :] = 1
        if leaf.ndim >= 2 and re.search(readers, dotted):
            part[..., _first(dotted, leaf.shape[-2], share) :, :] = 1
        return part

    partition = jax.tree_util.tree_map_with_path(owners, params)
    if not any(part.any() for part in jax.tree.leaves(partition)):
        paths = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        raise ValueError(
            f"units={units!r} and readers={readers!r} name none of the parameters {paths}."
        )
    return partition


def _first(path: str, width: int, share: float) -> int:
    """The first unit of the part."""
    count = round(share * width)
    if not 0 < count < width:
        raise ValueError(
            f"a share of {share} is {count} of the {width} units of {path!r}; core and part need "
            "one at least: choose another share, or leave the path out of units and readers."
        )
    return width - count


def route_gradients(gradients: Params, partition: Partition, domain: int) -> Params:
    """The gradient of a domain's loss where the domain owns the entry, 0 elsewhere."""
    return jax.tree.map(
        lambda slope, owner: jnp.where(owner == domain, slope, 0), gradients, partition
    )


def routed(params: Params, partition: Partition, domain: int) -> Params:
    """The same numbers, of which gradients move the entries of one owner alone."""
    return jax.tree.map(
        lambda leaf, owner: jnp.where(owner == domain, leaf, jax.lax.stop_gradient(leaf)),
        params,
        partition,
    )


def ablate(
    params: Params, partition: Partition, domain: int, attached: bool | Int[Array, ""] = False
) -> Params:
    """A domain's part set to 0, or left where `attached`.

    >>> import jax.numpy as jnp
    >>> ablate(jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 1, 2]), 1).tolist()
    [1.0, 0.0, 3.0]
    """
    return jax.tree.map(
        lambda leaf, owner: jnp.where((owner == domain) & jnp.logical_not(attached), 0, leaf),
        params,
        partition,
    )
