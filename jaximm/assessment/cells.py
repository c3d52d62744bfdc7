"""Cells: what an assessment has computed, addressed by everything that it depends on.

A cell is one (model, attacker, hyper-parameters, seed, data, code). Cells that are computed in one
compiled call are written in one file, whole or not at all, so that a batch is there or it is not: a
run that is killed at any moment and started again computes no cell twice and ends with the same
numbers. A batch that raised is a batch too: its cells are failed, with the message. A file whose
digest or address is not its own is put aside, named, and computed again.

Code counts by what a cell runs: the modules of the attacker's functions and of its family's loop,
and what those import of the package, as syntax trees without comments and docstrings. Nothing else
that is edited loses a stored cell; a model counts by its outputs, not by its sources.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import sys
import sysconfig
import types
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

import jaximm
from jaximm.attacks.probe.problem import Attack
from jaximm.attacks.weights.loop import Execution
from jaximm.attacks.weights.problem import WeightAttack
from jaximm.records.files import (
    FileWarning,
    ResultError,
    aside,
    opened,
    parse,
    plain,
    sealed,
    sweep,
    write_text,
)

PACKAGE = Path(jaximm.__file__).parent

# Once: finding a path of an installation takes 0.3 ms, and thousands of files are asked about.
NOT_USERS = (PACKAGE, *(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")))

LOOPS = {
    "probe": ("attacks/probe/loop.py", "attacks/probe/fit.py", "attacks/weights/flops.py"),
    "weights": ("attacks/weights/loop.py",),
}
"""What runs an attacker of either family, and counts its cost, beside `RUNNER`."""

RUNNER = "assessment/runners.py"
"""What makes stored data of a run; what it imports does not count by that."""


def code_of(attack: Attack | WeightAttack) -> str:
    """Hash of the code that decides an attacker's numbers, and of the version of jax.

    Reached from its functions through closures and partials: their files, the user's own among
    them, and what these import of the package and of the user's.
    """
    values = (getattr(attack, field.name) for field in dataclasses.fields(attack))
    functions = [value for value in values if callable(value)]
    files = {file for function in functions for file in _files(function)}
    files |= {
        PACKAGE / part for part in LOOPS["probe" if isinstance(attack, Attack) else "weights"]
    }
    reached = _closure(files) | {PACKAGE / RUNNER}
    own = [*map(fingerprint, functions), "solves" in attack.traits]
    own += [getattr(attack, name, None) for name in ("passes", "follows_loss", "update_reads")]
    own += [attack.harmful_rows, attack.rows_seed]
    return digest([jax.__version__, sorted(_read(file)[0] for file in reached), own])


def _files(function: Any, above: tuple[int, ...] = ()) -> set[Path]:
    """Sources of a function and of all functions that are bound to it."""
    if id(function) in above or len(above) > 8:
        return set()
    bound: list[Any] = [getattr(function, name, None) for name in ("__wrapped__", "__func__")]
    own: set[Path] = set()
    if isinstance(function, functools.partial):
        bound += [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, tuple | list):
        bound += function
    elif isinstance(function, types.FunctionType):
        bound += [*map(_contents, function.__closure__ or ()), *(function.__defaults__ or ())]
        bound += (function.__kwdefaults__ or {}).values()
        own = {Path(function.__code__.co_filename).absolute()}
    inside = (_files(value, (*above, id(function))) for value in bound if value is not None)
    return own.union(*inside)


def _closure(files: Iterable[Path]) -> set[Path]:
    """The files of the package and the user, and all of either that they import."""
    reached: set[Path] = set()
    waiting = [file for file in files if file.is_relative_to(PACKAGE) or _is_users(file)]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += filter(None, map(_part, _read(file)[1]))
    return reached


def _is_users(file: Path) -> bool:
    """Whether a file is there, and neither of the package, installed nor of the library."""
    return file.is_file() and not any(map(file.is_relative_to, NOT_USERS))


def _part(name: str) -> Path | None:
    """The source of a module of the package or the user; None for any other name."""
    first, *rest = name.split(".")
    if first != "jaximm":
        file = getattr(sys.modules.get(name), "__file__", None) or ""
        return Path(file) if file.endswith(".py") and _is_users(Path(file)) else None
    stem = PACKAGE.joinpath(*rest)
    places = (stem.with_suffix(".py"), stem / "__init__.py") if rest else ()
    return next((place for place in places if place.is_file()), None)


def _read(file: Path) -> tuple[str, tuple[str, ...]]:
    """Hash of a source's syntax tree, and the modules that it imports by name."""
    return _parsed(_text(file))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> tuple[str, tuple[str, ...]]:
    tree = ast.parse(text)
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # Of a package, its parts are meant where there are such.
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in parts if _part(name)]
            imports += modules if len(modules) == len(parts) else [*modules, node.module]
        body = getattr(node, "body", None)
        if isinstance(body, list):  # not that of a lambda
            node.body = [statement for statement in body if not _is_text(statement)]  # pyrefly: ignore[missing-attribute]
    # No positions in it, so neither comments nor the layout count.
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], tuple(sorted(set(imports)))


def _is_text(statement: ast.AST) -> bool:
    """Whether a statement is a string alone: a docstring, or what is said of a constant."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def source_digest(*functions: Any) -> str:
    """Hash of the files of functions that are not the package's own; empty if all are.

    A network of the user's has its place in an address by its file.
    """
    files = {file for function in functions for file in _files(function) if _is_users(file)}
    return digest(sorted(_read(file)[0] for file in files)) if files else ""


def fingerprint(function: Any) -> str:
    """What tells two functions of one file apart: name, compiled code, and what is bound to it.

    Arguments of a `functools.partial`, defaults, closures, the instance of a bound method and the
    state of an object that is called count by value: numbers, strings, arrays, containers, modules
    and classes by their names, and objects by what they hold (`__getstate__`, attributes and
    slots). An object that says nothing of what it holds counts as itself: its cells are found again
    by this process alone, and are nobody else's.
    """
    return digest(_described(function, {}, {}))


def _described(value: Any, above: dict[int, int], done: dict[int, tuple[Any, str]]) -> Any:
    """A value as plain data that is the same in every process.

    Args:
      value: anything.
      above: the place of each object that is being described, so that a cycle ends.
      done: what was described, by identity, with its digest: many hold one thing.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in above:
        return ["above", above[id(value)]]
    if id(value) not in done:
        inside = functools.partial(_described, above={**above, id(value): len(above)}, done=done)
        done[id(value)] = value, digest(_whole(value, inside))
    return done[id(value)][1]


def _whole(value: Any, inside: Callable[[Any], Any]) -> Any:
    """What is no plain number or text, by its parts."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return [*_array_described(value), *_beside_items(value, inside)]
    if isinstance(value, functools.partial):
        own = ["partial", inside(value.func), inside(value.args), inside(value.keywords)]
        return [*own, inside(vars(value))]
    if isinstance(value, Mapping):
        items = sorted([repr(key), inside(item)] for key, item in value.items())
        return ["mapping", items, *_beside_items(value, inside)]
    if isinstance(value, tuple | list):
        own = [type(value).__qualname__, *map(inside, value)]
        return [*own, *_beside_items(value, inside)]
    if isinstance(value, set | frozenset):
        own = ["set", *sorted(map(inside, value), key=repr)]
        return [*own, *_beside_items(value, inside)]
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), *map(inside, value.co_consts)]
    if isinstance(value, types.FunctionType):
        closure = [_contents(cell) for cell in value.__closure__ or ()]
        code = value.__code__
        if value.__doc__ is not None and value.__doc__ in code.co_consts[:1]:
            code = code.replace(co_consts=code.co_consts[1:])
        bound_to = [code, value.__defaults__, value.__kwdefaults__, closure]
        own = {key: item for key, item in vars(value).items() if key != "__wrapped__"}
        wrapped = getattr(value, "__wrapped__", None)
        return [value.__module__, value.__qualname__, *map(inside, [*bound_to, own, wrapped])]
    if isinstance(value, jax.tree_util.PyTreeDef):
        return ["tree", inside(value.node_data()), [inside(child) for child in value.children()]]
    if isinstance(value, types.MethodType):
        return ["method", inside(value.__func__), inside(value.__self__)]
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    if isinstance(value, type | types.BuiltinFunctionType | np.ufunc | np.dtype):
        return [
            "named",
            getattr(value, "__module__", ""),
            str(getattr(value, "__qualname__", value)),
        ]
    return _object_described(value, inside)


def _array_described(value: Any) -> list[Any]:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    if array.dtype.hasobject:
        return ["objects", *map(repr, array.ravel().tolist())]
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # no copy: rows may be many
    bits_hash = hashlib.sha256(bits.data).hexdigest()
    return [str(array.dtype), list(array.shape), bits_hash]


def _object_described(value: Any, inside: Callable[[Any], Any]) -> Any:
    """An object that is none of the usual ones: what it wraps or what it holds."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    wrapped = getattr(value, "__wrapped__", None)
    state = _state(value)
    state.pop("__wrapped__", None)
    if wrapped is not None:  # a compiled function: what it compiles
        return [kind, inside(wrapped), inside({k: v for k, v in state.items() if callable(v)})]
    if _is_plain(type(value)):
        return [kind, inside(state)]
    made_of = _made_of(value)
    return [kind, inside(state), _itself(value) if made_of is None else inside(made_of)]


def _state(value: Any) -> dict[str, Any]:
    """Attributes and slots."""
    state = dict(getattr(value, "__dict__", {}))
    for parent in type(value).__mro__:
        slots = parent.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                state[name] = getattr(value, name)
    return state


def _made_of(value: Any) -> str | list[Any] | None:
    """Of what `copy` and `pickle` would make it again, items too; None: it does not say."""
    try:
        made_of = value.__reduce_ex__(4)
    except Exception:  # a type may raise what it likes
        return None
    if isinstance(made_of, str):
        return made_of
    return [*made_of[:3], *(None if items is None else list(items) for items in made_of[3:5])]


BARE = (dict, list, tuple, set, frozenset, types.MappingProxyType, FrozenDict, np.ndarray)
"""Containers that hold items alone, as they are and not as a subclass; `FrozenDict` keeps a hash of
itself, which is another one in every process."""


def _beside_items(value: Any, inside: Callable[[Any], Any]) -> list[Any]:
    """What a container of a class of its own holds beside items: attributes, a default factory."""
    if type(value) in BARE or isinstance(value, np.generic | jax.Array):
        return []
    return [
        f"{type(value).__module__}.{type(value).__qualname__}",
        inside(_state(value)),
        inside((_made_of(value) or [None, None])[1]) if isinstance(value, dict) else None,
    ]


def _is_plain(kind: type) -> bool:
    """Whether all that instances hold is in attributes and slots: classes written in Python."""
    return all(
        parent is object or "__dict__" in parent.__dict__ or "__slots__" in parent.__dict__
        for parent in kind.__mro__
    )


_KNOWN: dict[int, tuple[Any, str]] = {}  # the object too, so that no other takes its place


def _itself(value: Any) -> str:
    """A name for one object of one process."""
    return _KNOWN.setdefault(id(value), (value, uuid.uuid4().hex))[1]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def digest(value: Any) -> str:
    """SHA-256 of plain JSON with sorted keys, as 16 hex digits.

    >>> digest({"b": 1, "a": 2.0}) == digest({"a": 2.0, "b": 1})
    True
    """
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Asked(Exception):
    """A batch that is not there, and that a worker is to compute."""

    def __init__(self, key: str, batch: Mapping[str, Any], work: Any):
        super().__init__(f"batch {key} is not there")
        self.key, self.batch, self.work = key, batch, work


def attempt(compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What a batch came to: found, or failed with the message."""
    try:
        return {"status": "done", "error": None, "found": compute()}
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {"status": "failed", "error": text[:500], "found": None}


class Store:
    """Batches of cells in a folder, a file each; in memory alone if there is no folder.

    Warns (`FileWarning`) of each damaged file that it puts aside.

    Args:
      folder: of the files.
      retry_failed: what failed earlier is computed again, once.
      asks: batches that have a description are not computed here, but asked for (`Asked`).
    """

    def __init__(self, folder: Path | None, *, retry_failed: bool = False, asks: bool = False):
        self._retry, self._asks = retry_failed, asks
        self._tried: set[str] = set()
        self._folder = None if folder is None else Path(folder)
        self._memory: dict[str, dict[str, Any]] = {}
        self.computed = 0  # batches that were computed since, rather than found
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            sweep(self._folder)

    def get(
        self,
        address: Mapping[str, Any],
        cells: Sequence[tuple[Mapping[str, float], int]],
        compute: Callable[[], Mapping[str, Any]],
        work: Any = None,
    ) -> dict[str, Any]:
        """The batch at an address: from the store, or computed and then stored.

        Args:
          address: model, attacker, task, data, code, ...: all that `compute` depends on.
          cells: its (hyper-parameters, seed) pairs.
          compute: gives plain data. If it raises, the batch is stored as failed.
          work: a description of the batch, from which a worker can compute it.

        Returns:
          ``{"address", "cells": [hash, ...], "status": "done" | "failed", "error", "found"}``.

        Raises:
          Asked: it is not there, and this store asks for what has a description.
        """
        hashes = [digest({**address, "hyper": dict(hyper), "seed": seed}) for hyper, seed in cells]
        key = digest(hashes)
        known = self._read(key)
        again = self._retry and key not in self._tried
        if known is not None and not (again and known["status"] == "failed"):
            return known
        batch = {"address": dict(address), "cells": hashes}
        if self._asks and work is not None:
            raise Asked(key, batch, work)
        return self._keep(key, batch, attempt(compute))

    def put(self, asked: Asked, came: Mapping[str, Any]) -> None:
        """Keeps a batch that was asked for, as `attempt` gave it."""
        self._keep(asked.key, asked.batch, came)

    def _keep(
        self, key: str, batch: Mapping[str, Any], outcome: Mapping[str, Any]
    ) -> dict[str, Any]:
        self.computed += 1
        self._tried.add(key)
        return self._write(key, plain({**batch, **outcome}))

    def plan(self, address: Mapping[str, Any], make: Callable[[], Execution]) -> Execution:
        """How trajectories run: as a measurement said the first time, so that a resumed run, whose
        numbers depend on it in the last digit, goes on in the same way."""
        batch = self.get({"plan": dict(address)}, [({}, 0)], lambda: make()._asdict())
        if batch["status"] == "failed":
            raise RuntimeError(f"the trial of how to run attackers failed: {batch['error']}")
        return Execution(**batch["found"])

    def _read(self, key: str) -> dict[str, Any] | None:
        if self._folder is None:
            return self._memory.get(key)
        path = self._folder / f"{key}.json"
        if not path.exists():
            return None
        try:
            document = parse(path)
            if not isinstance(document, Mapping):
                raise ResultError(f"a cell is a JSON object, got {type(document).__name__}.")
            batch = opened(document, of=f"cell {key}")
            if digest(batch["cells"]) != key:
                raise ResultError("its cells are those of another address.")
            return batch
        except ResultError as error:
            name = aside(path, "damaged")
            path.replace(name)
            said = f"{path}: {error} It is now {name.name}, and its cells are computed again."
            warnings.warn(said, FileWarning, stacklevel=2)
            return None

    def _write(self, key: str, batch: dict[str, Any]) -> dict[str, Any]:
        if self._folder is None:
            self._memory[key] = batch
            return batch
        text = json.dumps(sealed(batch, of=f"cell {key}"), allow_nan=False, separators=(",", ":"))
        write_text(self._folder / f"{key}.json", text)
        return batch
