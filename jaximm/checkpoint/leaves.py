"""A pytree as flat leaves with a digest each, over any number of processes."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaximm.types import Json, Params, Tree

if TYPE_CHECKING:
    pass

_KEY_LENGTH = 60  # longest readable part of a leaf's name on disk


LeafArray = Any
"""A jax.Array or np.ndarray, never a typed key; or the shape, dtype and sharding of one."""

Block = list[Any]
"""``[[start, ...], [stop, ...], sha256]`` of a part of an array."""


class LeafRow(TypedDict):
    """One leaf in a record."""

    name: str
    path: str
    dtype: str
    shape: list[int]
    prng: str | None
    sha256: str
    blocks: NotRequired[list[Block]]  # of an array that was saved in parts


class _Leaf(NamedTuple):
    """One leaf as stored: its path in the tree, its array, and the PRNG family if it is a key."""

    name: str
    path: str
    array: LeafArray
    prng: str | None


def content_hash(tree: Params) -> str:
    """SHA-256 of a pytree's leaves: paths, dtypes, shapes and bytes. 64 hexadecimal digits.

    Two trees with the same hash hold bitwise the same numbers under the same names, wherever they
    live and however they are sharded (over several processes, all of them call this). ``-0.0`` and
    ``0.0`` differ, as do NaNs of different payload.

    >>> import numpy as np
    >>> same = content_hash({"w": np.ones(2)}) == content_hash({"w": np.ones(2)})
    >>> same, content_hash({"w": np.ones(2)}) == content_hash({"w": np.ones(2, np.float32)})
    (True, False)
    """
    # Gathered, one leaf at a time: digests of shards would depend on the sharding.
    leaves = (leaf._replace(array=_to_host(leaf.array)) for leaf in _flatten(tree))
    return _combine([row for leaf in leaves for row in _describe([leaf])])


# --- one tree <-> flat leaves and their record ----------------------------------------------------


def _flatten(tree: Params) -> list[_Leaf]:
    """Leaves in tree order, PRNG keys as their raw words, Python scalars as NumPy scalars."""
    leaves = []
    for index, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        dotted = jax.tree_util.keystr(path, simple=True, separator=".")
        # The index makes names unique and ordered; the rest is for the reader.
        name = f"{index:04d}.{re.sub('[^A-Za-z0-9_.-]', '_', dotted)[:_KEY_LENGTH]}"
        prng = None
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            prng, leaf = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        elif not isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
            if leaf.dtype.kind not in "biufcV":
                raise ValueError(
                    f"cannot save leaf {dotted or '(root)'} of dtype {leaf.dtype}; "
                    "states and backbones hold arrays and numbers."
                )
        leaves.append(_Leaf(name, jax.tree_util.keystr(path), leaf, prng))
    return leaves


def _dotted(path: str) -> str:
    """A leaf's path in a record, as other modules write paths.

    >>> _dotted("['params']['layers.up.kernel'][0].b")
    'params.layers.up.kernel.0.b'
    """
    parts = re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)", path)
    return ".".join(next(filter(None, part), "") for part in parts)


def _describe(leaves: list[_Leaf]) -> list[LeafRow]:
    blocks = _gather_blocks({leaf.name: leaf.array for leaf in leaves if _is_spread(leaf.array)})
    rows: list[LeafRow] = []
    for leaf in leaves:
        own = blocks.get(leaf.name)
        row: LeafRow = {
            "name": leaf.name,
            "path": leaf.path,
            "dtype": np.dtype(leaf.array.dtype).name,
            "shape": list(leaf.array.shape),
            "prng": leaf.prng,
            "sha256": _digest(_to_host(leaf.array)) if own is None else _combine_blocks(own),
        }
        rows.append(row if own is None else {**row, "blocks": own})
    return rows


def _is_spread(array: LeafArray) -> bool:
    """Whether an array, or what it is to become, lies in parts on several devices."""
    sharding = getattr(array, "sharding", None)
    if sharding is None:
        return False
    return len(sharding.device_set) > 1 and not sharding.is_fully_replicated


def _gather_blocks(arrays: dict[str, jax.Array]) -> dict[str, list[Block]]:
    """For each array ``[[start, ...], [stop, ...], sha256]`` of its shards, in index order.

    A process digests the shards it holds, and only the digests are exchanged. A reader that has the
    whole array, however it is sharded there, slices it and compares.
    """
    if not arrays:
        return {}
    own = {name: _own_blocks(array) for name, array in arrays.items()}
    everyone = [json.loads(text) for text in _share(json.dumps(own))]
    return {name: sorted(block for part in everyone for block in part[name]) for name in arrays}


def _own_blocks(array: jax.Array) -> list[Block]:
    """The shards that this process holds, each shard of the array on one process only."""
    blocks = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            ranges = [range(n)[part] for n, part in zip(array.shape, shard.index, strict=True)]
            start, stop = [part.start for part in ranges], [part.stop for part in ranges]
            blocks.append([start, stop, _digest(np.asarray(shard.data))])
    return blocks


def _combine_blocks(blocks: list[Block]) -> str:
    return hashlib.sha256(json.dumps(blocks).encode()).hexdigest()


def _matches(array: LeafArray, row: LeafRow) -> bool:
    """Whether an array has the digest, or the digests, of its record.

    Of an array in parts, every recorded block that lies in one part of this process is compared;
    what is cut across is vouched for by the digests of the files.
    """
    if _is_spread(array):
        return _blocks_match(array, row)
    array = np.asarray(array)
    if "blocks" not in row:
        return _digest(array) == row["sha256"]
    return _combine_blocks(row["blocks"]) == row["sha256"] and all(
        _digest(array[tuple(map(slice, start, stop))]) == digest
        for start, stop, digest in row["blocks"]
    )


def _blocks_match(array: jax.Array, row: LeafRow) -> bool:
    blocks = row.get("blocks", [])
    if blocks and _combine_blocks(blocks) != row["sha256"]:
        return False
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        ranges = [range(n)[part] for n, part in zip(array.shape, shard.index, strict=True)]
        data = None
        for start, stop, digest in blocks:
            inside = [
                part.start <= first and last <= part.stop
                for part, first, last in zip(ranges, start, stop, strict=True)
            ]
            if not all(inside):
                continue
            data = np.asarray(shard.data) if data is None else data
            own = tuple(
                slice(first - part.start, last - part.start)
                for part, first, last in zip(ranges, start, stop, strict=True)
            )
            if _digest(data[own]) != digest:
                return False
    return True


def _to_host(array: LeafArray) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            return np.asarray(array.addressable_shards[0].data)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _digest(array: np.ndarray) -> str:
    # reshape(-1) first: a 0-d array cannot be viewed as bytes; the view itself copies nothing.
    flat = np.ascontiguousarray(array).reshape(-1)
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape} ".encode())
    digest.update(flat.view(np.uint8).data)
    return digest.hexdigest()


def _combine(rows: list[LeafRow]) -> str:
    text = json.dumps([[row["path"], row["prng"], row["sha256"]] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _spread_targets(abstract: Params) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves of an abstract state that are to lie in parts on several devices, by their path."""
    return {
        jax.tree_util.keystr(path): jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
        if _is_spread(leaf)
    }


def _unflatten(abstract: Tree, arrays: list[LeafArray], record: Json, place: str) -> Tree:
    """Puts verified arrays into the tree, on the devices and shardings, of ``abstract``."""
    wanted, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    have = [row["path"] for row in record["leaves"]]
    want = [jax.tree_util.keystr(path) for path, _ in wanted]
    if have != want:
        missing = [path for path in want if path not in have] or "none"
        extra = [path for path in have if path not in want] or "none"
        raise ValueError(
            f"{place} holds another tree: leaves missing there {missing}, unknown here {extra}; "
            "restore with the configuration that saved it."
        )
    leaves = []
    for (_, like), array, row in zip(wanted, arrays, record["leaves"], strict=True):
        leaves.append(_place(like, array, row, place))
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _place(like: Any, array: LeafArray, row: LeafRow, place: str) -> Any:
    if isinstance(like, bool | int | float | complex):
        return type(like)(array[()])
    prng = None
    dtype, shape = like.dtype, tuple(like.shape)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        probe = jax.eval_shape(jax.random.key_data, like)
        prng, dtype, shape = row["prng"], probe.dtype, probe.shape
    if (array.shape, array.dtype) != (shape, np.dtype(dtype)) or (row["prng"] != prng):
        raise ValueError(
            f"{place}: leaf {row['path']} is {row['dtype']}{row['shape']}, this run expects "
            f"{like.dtype}{list(like.shape)}; restore with the configuration that saved it."
        )
    if isinstance(like, np.ndarray | np.generic) or _is_spread(array):
        return array
    sharding = getattr(like, "sharding", None)
    if prng is not None:
        if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
            data = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
            return jax.random.wrap_key_data(data, impl=prng)
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=prng)
        return key if sharding is None else jax.device_put(key, sharding)
    if sharding is None:
        return jnp.array(array)
    if sharding.is_fully_addressable:
        # jnp.array copies: device_put may alias NumPy memory, which a donated state must not.
        return jax.device_put(jnp.array(array), sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


# --- small things ---------------------------------------------------------------------------------


def _is_first_process() -> bool:
    return jax.process_index() == 0


def _share(text: str) -> list[str]:
    """The texts of all processes, in their order. All wait here for the last one."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        rows[index, :length].tobytes().decode() for index, length in enumerate(lengths.tolist())
    ]
