"""Parameter paths: which are norms, and which the last blocks of a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax


def paths_of(params: Any) -> list[str]:
    """Dotted paths of the leaves of a pytree, in its order.

    >>> paths_of({"blocks.1": {"kernel": 0.0}, "head": [1.0]})
    ['blocks.1.kernel', 'head.0']
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def is_norm(path: str) -> bool:
    """Whether a parameter belongs to a normalisation layer, by its name.

    >>> is_norm("blocks.3.norm1.scale"), is_norm("head.bn.bias"), is_norm("fc.kernel")
    (True, True, False)
    """
    parts = path.lower().split(".")
    return any("norm" in part or part.rstrip("0123456789") in ("bn", "ln") for part in parts)


def is_table(path: str) -> bool:
    """Whether a parameter is a table of rows that are looked up, by its name.

    >>> is_table("embedding.table"), is_table("layers.query.kernel")
    (True, False)
    """
    return path.split(".")[-1] == "table"


def over_matrices(
    edit: Callable[[jax.Array], jax.Array], params: Any, stacked: Callable[[str], int]
) -> Any:
    """Parameters with every matrix or kernel edited; each layer alone where layers are stacked.

    Args:
      edit: of one parameter of two axes or more, to one of the same shape.
      params: the parameters; vectors stay.
      stacked: ``stacked(path)``, how many leading axes hold layers.
    """

    def one(parts, leaf):
        layers = stacked(jax.tree_util.keystr(parts, simple=True, separator="."))
        if leaf.ndim - layers < 2:
            return leaf
        each = edit
        for _ in range(layers):
            each = jax.vmap(each)
        return each(leaf)

    return jax.tree_util.tree_map_with_path(one, params)


_FIRST = ("stem", "embed", "input", "patch")
_UNCOUNTED = "neck"


def block_of(path: str) -> str:
    """The block of a parameter, by its dotted path.

    >>> block_of("blocks.11.attention.out.kernel"), block_of("embed.position"), block_of("kernel")
    ('blocks.11', 'embed', 'kernel')
    """
    parts = path.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


def last_blocks_of(params: Any, k: int) -> Callable[[str], bool]:
    """Whether a path belongs to the last k blocks, or to what goes with them.

    What all paths begin with (a network that is one attribute of a wrapper) is left out first.

    >>> import numpy as np
    >>> sizes = {"blocks.9.w": (2, 2), "blocks.10.w": (2, 2), "embed.w": (2, 2), "norm.scale": (2,)}
    >>> last = last_blocks_of({path: np.ones(shape) for path, shape in sizes.items()}, 1)
    >>> [path for path in sizes if last(path)]
    ['blocks.10.w', 'norm.scale']
    """
    paths = paths_of(params)
    skipped = _common(paths)

    def name(path: str) -> str:
        return block_of(".".join(path.split(".")[skipped:]))

    counts: dict[str, bool] = {}
    for path, leaf in zip(paths, jax.tree.leaves(params), strict=True):
        block = name(path)
        counts[block] = counts.get(block, False) or (leaf.ndim >= 2 and block != _UNCOUNTED)
    ordered = sorted(counts, key=_place)
    counted = [at for at, block in enumerate(ordered) if counts[block]]
    last = frozenset(ordered[counted[-k] :] if len(counted) > k else ordered)
    return lambda path: name(path) in last


def _common(paths: list[str]) -> int:
    """How many first components all paths share and need not, to be more than one block."""
    parts = [path.split(".") for path in paths]
    for skipped in range(min(map(len, parts), default=0)):
        if len({block_of(".".join(part[skipped:])) for part in parts}) > 1:
            return skipped
    return 0


def _place(block: str) -> tuple[Any, ...]:
    """What blocks are sorted by; every other part of the split is a number."""
    parts = re.split(r"(\d+)", block)
    return not block.startswith(_FIRST), [
        int(part) if at % 2 else part for at, part in enumerate(parts)
    ]
