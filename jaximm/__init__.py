"""jaximm: model immunisation in JAX.

The primitives are modules of pure functions, ready to use inside your own jitted code::

    from jaximm import hessians, linalg, regularisers

`immunise`, `attack` and `assess` do all of it in one call; see `jaximm.face`.

Every module is imported when it is first touched, so that ``import jaximm`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from jaximm.registry import load_entry_points, register
from jaximm.version import __version__

if TYPE_CHECKING:
    from jaximm import (
        assessment,
        attacks,
        carriers,
        checkpoint,
        cli,
        collectives,
        compilation,
        data,
        face,
        hessians,
        immunisers,
        linalg,
        measures,
        models,
        objectives,
        preconditioner,
        records,
        registry,
        regularisers,
        report,
        run,
        training,
        types,
        version,
    )
    from jaximm.face import assess, attack, immunise

__all__ = [
    "__version__",
    "assess",
    "assessment",
    "attack",
    "attacks",
    "carriers",
    "checkpoint",
    "cli",
    "collectives",
    "compilation",
    "data",
    "face",
    "hessians",
    "immunise",
    "immunisers",
    "linalg",
    "load_entry_points",
    "measures",
    "models",
    "objectives",
    "preconditioner",
    "records",
    "register",
    "registry",
    "regularisers",
    "report",
    "run",
    "training",
    "types",
    "version",
]


_VERBS = ("assess", "attack", "immunise")


def __getattr__(name: str):
    if name in _VERBS:
        return getattr(importlib.import_module("jaximm.face"), name)
    if name in __all__:
        return importlib.import_module(f"jaximm.{name}")
    raise AttributeError(f"module 'jaximm' has no attribute {name!r}; it has {sorted(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
