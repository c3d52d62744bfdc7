"""jaximm: model immunisation in JAX.

The primitives are modules of pure functions, ready to use inside your own jitted code::

    from jaximm import hessians, linalg, regularisers

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
        hessians,
        immunisers,
        linalg,
        measures,
        models,
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

__all__ = [
    "__version__",
    "assessment",
    "attacks",
    "carriers",
    "checkpoint",
    "cli",
    "collectives",
    "compilation",
    "data",
    "hessians",
    "immunisers",
    "linalg",
    "load_entry_points",
    "measures",
    "models",
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


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"jaximm.{name}")
    raise AttributeError(f"module 'jaximm' has no attribute {name!r}; it has {sorted(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
