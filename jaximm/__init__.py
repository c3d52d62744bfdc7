"""jaximm: model immunisation in JAX.

The primitives are modules of pure functions, ready to use inside your own jitted code::

    from jaximm import hessians, linalg, regularisers

Everything else is imported when it is first touched, so that ``import jaximm`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from jaximm import hessians, linalg, preconditioner, regularisers, types
from jaximm.registry import load_entry_points, register

if TYPE_CHECKING:
    from jaximm import (
        attacks,
        checkpoint,
        data,
        evaluation,
        immunisers,
        report,
        result,
        run,
        training,
    )

__version__ = "0.1.0"

__all__ = [
    "attacks",
    "checkpoint",
    "data",
    "evaluation",
    "hessians",
    "immunisers",
    "linalg",
    "load_entry_points",
    "preconditioner",
    "register",
    "regularisers",
    "report",
    "result",
    "run",
    "training",
    "types",
]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"jaximm.{name}")
    raise AttributeError(f"module 'jaximm' has no attribute {name!r}")
