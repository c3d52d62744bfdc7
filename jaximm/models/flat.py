"""A module's numbers as flat dicts by dotted path, and back."""

from __future__ import annotations

import jax
from flax import nnx

from jaximm.models.spec import StagedModule

FlatParams = dict[str, jax.Array]
"""Arrays by dotted path."""

NECK = "neck"
"""Stage after all others, there only when params hold ``neck.kernel``: features @ kernel + bias."""


def under(path: str, prefix: str) -> bool:
    """Whether a dotted path is `prefix` or lies below it, by whole components.

    >>> under("blocks.1.norm.scale", "blocks.1"), under("blocks.11.norm.scale", "blocks.1")
    (True, False)
    """
    return path == prefix or path.startswith(prefix + ".")


def merge(graphdef: nnx.GraphDef, params: FlatParams, stats: FlatParams) -> StagedModule:
    """A fresh NNX module of a structure and numbers; a neck's are left out."""
    leaves = [
        (from_dotted(path), kind(value))
        for flat, kind in ((params, nnx.Param), (stats, nnx.BatchStat))
        for path, value in flat.items()
        if not under(path, NECK)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves), copy=True)


def to_flat(state: nnx.State) -> FlatParams:
    """The numbers of an NNX state.

    Raises:
      ValueError: names that dotted paths cannot hold.
    """
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        dotted = ".".join(str(part) for part in path)
        if from_dotted(dotted) != tuple(path):
            raise ValueError(
                f"variable {tuple(path)} has a name with a dot or a number as text, which a dotted "
                "path cannot hold; rename it."
            )
        flat[dotted] = variable[...]
    return flat


def from_dotted(path: str) -> tuple[str | int, ...]:
    """A dotted path as NNX has it."""
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))
