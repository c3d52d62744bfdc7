"""Cells: what an assessment has computed, addressed by everything that it depends on.

A cell is one (model, attacker, hyper-parameters, seed, data, code). Cells that are computed in one
compiled call are written in one file, whole or not at all, so that a batch is there or it is not: a
run that is killed at any moment and started again computes no cell twice and ends with the same
numbers. A batch that raised is a batch too: its cells are failed, with the message.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaximm
from jaximm.attacks.weights.loop import Execution
from jaximm.records.files import plain


def source_digest(*functions: Any) -> str:
    """SHA-256 of the files of functions that are not the package's own; empty if all are.

    An attacker or a network of the user's has its place in an address by its file.
    """
    root, found = Path(jaximm.__file__).parent, hashlib.sha256()
    files = set()
    for function in functions:
        code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
        file = None if code is None else Path(code.co_filename)
        if file is not None and file.is_file() and root not in file.resolve().parents:
            files.add(file.resolve())
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()[:16] if files else ""


def fingerprint(function: Any) -> str:
    """What tells two functions of one file apart: name, compiled code, and what is bound to it.

    Arguments of a `functools.partial`, defaults and closures count by value where they are plain
    numbers, strings, arrays, containers of these or functions; of other objects only their type
    does, so arrays that such an object holds belong in `Model.frozen`.
    """
    return digest(_described(function, ()))


def _described(value: Any, above: tuple[int, ...]) -> Any:
    """A value as plain data that is the same in every process."""
    if id(value) in above or len(above) > 8:
        return "..."
    inside = functools.partial(_described, above=(*above, id(value)))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        found = hashlib.sha256(array.tobytes()).hexdigest()
        return [str(array.dtype), list(array.shape), found]
    if isinstance(value, functools.partial):
        return ["partial", inside(value.func), inside(value.args), inside(value.keywords)]
    if isinstance(value, Mapping):
        return sorted([repr(key), inside(item)] for key, item in value.items())
    if isinstance(value, tuple | list | set | frozenset):
        items = [inside(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), *map(inside, value.co_consts)]
    bound = getattr(value, "__wrapped__", None) or getattr(value, "__func__", None)
    if bound is not None:
        return [type(value).__qualname__, inside(bound)]
    if isinstance(value, types.FunctionType):
        closure = [_contents(cell) for cell in value.__closure__ or ()]
        bound_to = [value.__code__, value.__defaults__, value.__kwdefaults__, closure]
        return [value.__module__, value.__qualname__, *map(inside, bound_to)]
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


SOURCES = ("assessment", "attacks", "data/batches.py", "linalg", "measures", "models")
"""Parts of the package on which a cell's numbers depend."""


def digest(value: Any) -> str:
    """SHA-256 of plain JSON with sorted keys, as 16 hex digits.

    >>> digest({"b": 1, "a": 2.0}) == digest({"a": 2.0, "b": 1})
    True
    """
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest() -> str:
    """SHA-256 of the sources that decide a cell's numbers, and of the version of jax."""
    root = Path(jaximm.__file__).parent
    found = hashlib.sha256(jax.__version__.encode())
    for part in SOURCES:
        path = root / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            found.update(file.relative_to(root).as_posix().encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


class Store:
    """Batches of cells in a folder, a file each; in memory alone if there is no folder."""

    def __init__(self, folder: Path | None, *, retry_failed: bool = False):
        self._retry = retry_failed
        self._folder = None if folder is None else Path(folder)
        self._memory: dict[str, dict[str, Any]] = {}
        self.computed = 0  # batches that this process computed, rather than found
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def get(
        self,
        address: Mapping[str, Any],
        cells: Sequence[tuple[Mapping[str, float], int]],
        compute: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """The batch at an address: from the store, or computed and then stored.

        Args:
          address: model, attacker, task, data, code, ...: all that `compute` depends on.
          cells: its (hyper-parameters, seed) pairs.
          compute: gives plain data. If it raises, the batch is stored as failed.

        Returns:
          ``{"address", "cells": [hash, ...], "status": "done" | "failed", "error", "found"}``.
        """
        hashes = [digest({**address, "hyper": dict(hyper), "seed": seed}) for hyper, seed in cells]
        key = digest(hashes)
        known = self._read(key)
        if known is not None and not (self._retry and known["status"] == "failed"):
            return known
        batch: dict[str, Any] = {"address": dict(address), "cells": hashes, "status": "done"}
        try:
            batch |= {"error": None, "found": compute()}
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            batch |= {"status": "failed", "error": text[:500], "found": None}
        self.computed += 1
        return self._write(key, plain(batch))

    def plan(self, address: Mapping[str, Any], make: Callable[[], Execution]) -> Execution:
        """How trajectories run: as a measurement said the first time, so that a resumed run, whose
        numbers depend on it in the last digit, goes on in the same way."""
        found = self.get({"plan": dict(address)}, [({}, 0)], lambda: make()._asdict())
        if found["status"] == "failed":
            raise RuntimeError(f"the trial of how to run attackers failed: {found['error']}")
        return Execution(**found["found"])

    def _read(self, key: str) -> dict[str, Any] | None:
        if self._folder is None:
            return self._memory.get(key)
        path = self._folder / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _write(self, key: str, batch: dict[str, Any]) -> dict[str, Any]:
        if self._folder is None:
            self._memory[key] = batch
            return batch
        path = self._folder / f"{key}.json"
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(batch, file, allow_nan=False, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        return batch
