"""Collectives over the axis named ``"data"``, and nothing where there is no such axis.

One per-device function then serves ``jit`` on one device, ``jax.pmap`` and ``jax.shard_map``: these
helpers look at trace time whether the axis is bound. Under ``jit`` over sharded arrays no axis is
bound, and rows are global already.

Use ``jax.shard_map(..., check_vma=False)``, as `jaximm.training` does: a gathered array is the same
on every device, which JAX's varying-axes check cannot see.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaximm.types import Tree

AXIS = "data"
"""Name of the axis over which rows are spread."""


def is_bound() -> bool:
    """Whether this is traced inside a map over the axis ``"data"``."""
    try:
        lax.axis_size(AXIS)
    except NameError:
        return False
    return True


def device_count() -> int:
    """Devices along the axis ``"data"``; 1 where there is none."""
    return lax.axis_size(AXIS) if is_bound() else 1


def gather_rows(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of every device, in the order of devices: arrays [n_i, ...] become [N n_i, ...].

    One all-gather in all, whatever the number of arrays.

    Raises:
      ValueError: arrays of several dtypes.
    """
    if not is_bound() or not arrays:
        return arrays
    if len({array.dtype for array in arrays}) > 1:
        raise ValueError(
            f"gather_rows needs arrays of one dtype, got {[str(a.dtype) for a in arrays]}; "
            "cast them first."
        )
    sent = jnp.concatenate([array.reshape(-1) for array in arrays])
    received = lax.all_gather(sent, AXIS)  # [devices, total]
    gathered, start = [], 0
    for array in arrays:
        part = received[:, start : start + array.size]
        gathered.append(part.reshape(-1, *array.shape[1:]))
        start += array.size
    return tuple(gathered)


def own_rows(array: jax.Array) -> jax.Array:
    """This device's part of what `gather_rows` gave."""
    if not is_bound():
        return array
    n = array.shape[0] // lax.axis_size(AXIS)
    return lax.dynamic_slice_in_dim(array, lax.axis_index(AXIS) * n, n)


def gather_tree(tree: Tree) -> Tree:
    """`gather_rows` of every leaf of a tree, of whatever dtypes: one all-gather a leaf."""
    if not is_bound():
        return tree
    return jax.tree.map(lambda leaf: lax.all_gather(leaf, AXIS, tiled=True), tree)


def mean_over_devices(tree: Tree) -> Tree:
    """The mean of every leaf over the devices, in one all-reduce a dtype."""
    return _reduced(tree, lax.pmean)


def sum_over_devices(tree: Tree) -> Tree:
    """The sum of every leaf over the devices, in one all-reduce a dtype."""
    return _reduced(tree, lax.psum)


def _reduced(tree: Tree, reduce: Callable[[jax.Array, str], jax.Array]) -> Tree:
    if not is_bound():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):  # in one order everywhere
        places = [place for place, leaf in enumerate(leaves) if leaf.dtype == dtype]
        flat, rebuild = ravel_pytree([leaves[place] for place in places])
        for place, leaf in zip(places, rebuild(reduce(flat, AXIS)), strict=True):
            leaves[place] = leaf
    return jax.tree.unflatten(structure, leaves)
