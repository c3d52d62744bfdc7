"""From what a checkpoint's pickle holds to the arrays of one state dict by their names.

A training file holds its weights under a name, beside an epoch, an optimiser's state, a second set
of weights (an average, a teacher). `choose` finds the weights, or asks; `leaves` flattens them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaximm.models.weights.errors import Refusal, WeightFileError, advice, shown
from jaximm.models.weights.machine import Unpickled
from jaximm.models.weights.standins import Array, Tensor

_WORDS = frozenset(
    (
        *("average", "averaged", "avg", "best", "checkpoint", "dict", "ema", "model", "module"),
        *("momentum", "net", "network", "online", "params", "state", "student", "swa", "target"),
        *("teacher", "weight", "weights"),
    )
)
"""What the names of state dicts in training files are made of: ``model_ema_state_dict``."""

_STATISTICS = ("batch_stats", "stats", "buffers")
"""Beside ``params`` a second part of the same weights."""

_DEPTH = 100
_LEAVES = 100_000
_NAME = 256


class Chosen(NamedTuple):
    """A part of a tree that holds weights.

    Attributes:
      tree: it.
      path: where it lay, "" for the whole.
      beside: names of what lay beside it on the way.
      prefix: what is left of the prefix asked for.
    """

    tree: Unpickled
    path: str
    beside: list[str]
    prefix: str


def choose(tree: Unpickled, prefix: str) -> Chosen:
    """The weights in what a checkpoint holds.

    Goes into dicts for as long as one entry is named as state dicts are and holds arrays, or the
    prefix begins with an entry's name. So a prefix may begin at the file's root
    ("state_dict_ema.backbone.") or inside the weights ("backbone.").

    Raises:
      Refusal: several entries may be meant and the prefix names none.
    """
    path, beside = "", []
    while isinstance(tree, dict):
        named = [
            key
            for key, value in tree.items()
            if type(key) is str and key and prefix.startswith(f"{key}.") and _has_arrays(value)
        ]
        state_dicts = _state_dicts(tree)
        if named:
            key = max(named, key=len)
            # Inside a single candidate the same prefix may be meant: {"model": {"model.fc": ...}}.
            if state_dicts != [key] or not _has_names(tree[key], prefix):
                prefix = prefix.removeprefix(f"{key}.")
        elif not state_dicts:
            break
        elif len(state_dicts) > 1:
            listed = " and ".join(repr(shown(key)) for key in state_dicts)
            choices = " or ".join(
                advice("prefix", f"{key}.{prefix if _has_names(tree[key], prefix) else ''}")
                for key in state_dicts
            )
            raise Refusal(f"it holds the weights {listed}", choices)
        else:
            (key,) = state_dicts
        beside += [shown(_text(other), 40) for other in tree if other is not key and other != key]
        tree, path = tree[key], f"{path}{key}."
    return Chosen(tree, path, beside, prefix)


def leaves(tree: Unpickled) -> Iterator[tuple[str, Unpickled]]:
    """Leaves of nested dicts, lists and tuples by dotted path.

    Raises:
      Refusal: too deep, too many, or a name too long: a pickle can nest without an end.
    """
    rest, count = [("", iter([("", tree)]))], 0
    while rest:
        path, items = rest[-1]
        for key, value in items:
            name = f"{path}.{_text(key)}" if path else _text(key)
            if len(name) > _NAME:
                raise Refusal(f"the name {shown(name)} has {len(name)} characters")
            if type(value) in (dict, list, tuple):
                if len(rest) > _DEPTH:
                    raise Refusal(f"{shown(name)} nests deeper than {_DEPTH}")
                inner = value.items() if type(value) is dict else enumerate(value)
                rest.append((name, iter(inner)))
                break
            count += 1
            if count > _LEAVES:
                raise Refusal(f"it holds more than {_LEAVES} values")
            yield name, value
        else:
            rest.pop()


def materialise(tensor: Tensor, buffer: np.ndarray, name: str, *, bound: int) -> np.ndarray:
    """A tensor's view of its storage; read-only, no copy.

    Raises:
      Refusal: it reaches beyond the storage, or a copy of it would take more bytes than `bound`.
    """
    storage = tensor.storage
    if storage.start + storage.count > buffer.size:
        raise Refusal(
            f"the storage of {shown(name)} holds {buffer.size} numbers, "
            f"{storage.start + storage.count} are declared"
        )
    part = buffer[storage.start : storage.start + storage.count]
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, part.dtype)
    steps = list(zip(tensor.shape, tensor.strides, strict=True))
    last = tensor.offset + sum((side - 1) * stride for side, stride in steps)
    if last >= part.size:
        raise Refusal(f"{shown(name)} reaches number {last} of a storage of {part.size}")
    if part.itemsize * math.prod(tensor.shape) > bound:
        raise Refusal(f"{shown(name)} repeats its storage to more than {bound} bytes")
    return np.lib.stride_tricks.as_strided(
        part[tensor.offset :],
        tensor.shape,
        [stride * part.itemsize for stride in tensor.strides],
        writeable=False,
    )


def arrays_of(
    tree: Unpickled, buffers: Mapping[str, np.ndarray], *, bound: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays of a tree by name, and what else it holds, in words.

    Raises:
      Refusal: two arrays of one name; no arrays, with what the first leaf is.
    """
    arrays: dict[str, np.ndarray] = {}
    others: list[str] = []
    for name, leaf in leaves(tree):
        if type(leaf) is Tensor:
            value = materialise(leaf, buffers[leaf.storage.key], name, bound=bound)
        elif type(leaf) is Array and leaf.value is not None:
            value = leaf.value
        else:
            if len(others) < 100:
                others.append(f"{shown(name, 40)} is a {_kind(leaf)}")
            continue
        if name in arrays:
            raise Refusal(f"two arrays are named {shown(name)}")
        arrays[name] = value
    if not arrays and others:
        raise Refusal(f"it holds no arrays: {others[0]}", "give a file of a model's state dict")
    return arrays, others


def select(
    arrays: dict[str, np.ndarray], prefix: str, file: str, *, strip: bool = False
) -> dict[str, np.ndarray]:
    """Arrays whose names begin with a prefix, without it.

    Args:
      arrays: by name.
      prefix: "": all of them.
      file: where they are from, for the message.
      strip: leave out ``module.`` where every name begins with it; the prefix may begin before or
        after it.

    Raises:
      WeightFileError: no name begins so.
    """
    strip = strip and all(name.startswith("module.") for name in arrays)
    stripped = {n.removeprefix("module."): v for n, v in arrays.items()} if strip else arrays
    if not prefix:
        return stripped
    for named in (arrays, stripped):
        part = {n.removeprefix(prefix): v for n, v in named.items() if n.startswith(prefix)}
        if part:
            return part
    listed = some([shown(name) for name in stripped])
    raise WeightFileError(
        f"no array of {shown(file)} begins with {prefix!r}; it holds {listed}; pass another prefix."
    )


def some(names: list[str]) -> str:
    """The first five of some names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def storage_keys(tree: Unpickled) -> set[str]:
    """Keys of the storages that a tree's tensors lie in."""
    return {array.storage.key for array in _arrays_in(tree) if type(array) is Tensor}


def _state_dicts(tree: dict) -> list[str]:
    """Keys of the entries that are named as state dicts are and hold arrays, each object once."""
    names = {
        id(value): key
        for key, value in reversed(tree.items())
        if type(key) is str
        and type(value) is dict
        and _is_wrapper(key, tree)
        and _has_arrays(value)
    }
    return list(names.values())[::-1]


def _is_wrapper(key: str, tree: dict) -> bool:
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", key[:100]).lower())
    # Of Flax, {"params": ..., "batch_stats": ...} are one set of weights.
    whole = key == "params" and any(other in tree for other in _STATISTICS)
    return bool(words) and set(words) <= _WORDS and not whole


def _has_arrays(tree: Unpickled) -> bool:
    return type(tree) in (dict, list, tuple) and any(True for _ in _arrays_in(tree))


def _arrays_in(tree: Unpickled) -> Iterator[Tensor | Array]:
    """Every array in nested containers; each container once."""
    rest, seen = [tree], set()
    while rest:
        node = rest.pop()
        if type(node) is Tensor or type(node) is Array:
            yield node
        elif type(node) in (dict, list, tuple) and id(node) not in seen:
            seen.add(id(node))
            rest += node.values() if type(node) is dict else node


def _has_names(tree: Unpickled, prefix: str) -> bool:
    return any(name.removeprefix("module.").startswith(prefix) for name, _ in leaves(tree))


def _text(key: Unpickled) -> str:
    """A key of a dict or an index, as part of a name."""
    return key if type(key) is str else str(key) if type(key) in (int, bool) else type(key).__name__


def _kind(leaf: Unpickled) -> str:
    """What a leaf is, in words that do not depend on its content."""
    if type(leaf) is Array:
        return f"array of dtype {shown(leaf.dtype, 20)!r}, not a plain number"
    name = getattr(leaf, "name", type(leaf).__name__) if leaf is not None else "None"
    return f"{name}, not an array"
