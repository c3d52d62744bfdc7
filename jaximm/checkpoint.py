"""Checkpoints: the full training state while a run goes on, the immunised backbone at its end.

Both are Orbax checkpoints with one addition. Orbax stores no checksum over array chunks: one
flipped byte in a large array comes back silently as other numbers. So every checkpoint here
carries, as a JSON item beside the arrays, a SHA-256 digest of each leaf (over its dtype, shape and
bytes) and one of the JSON record itself, and nothing is handed out before all of them agree.

Leaves are stored flat, as ``{"0003.opt_state.0.trace": array}``, so any pytree can be saved
(NamedTuples, optax states, typed PRNG keys, empty arrays, Python scalars) and any Orbax tool can
read the arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaximm.types import Params

FORMAT = "jaximm.checkpoint/1"
"""Written into every record; a reader refuses what it does not know."""

_KEY_LENGTH = 60  # longest readable part of a leaf's name on disk


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged: one line that names the place."""


class Restored(NamedTuple):
    """A verified training state.

    ``skipped`` lists the newer steps that were passed over because they are damaged, newest first;
    it is empty unless ``strict=False`` was asked for.
    """

    step: int
    state: Any
    metadata: dict[str, Any]
    skipped: tuple[int, ...]


class _Leaf(NamedTuple):
    """One leaf as stored: its path in the tree, its array, and the PRNG family if it is a key."""

    name: str
    path: str
    array: Any  # jax.Array or np.ndarray, never a typed key
    prng: str | None


def content_hash(tree: Any) -> str:
    """SHA-256 of a pytree's leaves: paths, dtypes, shapes and bytes. 64 hexadecimal digits.

    Two trees with the same hash hold bitwise the same numbers under the same names, wherever they
    live and however they are sharded. ``-0.0`` and ``0.0`` differ, as do NaNs of different payload.

    >>> import numpy as np
    >>> same = content_hash({"w": np.ones(2)}) == content_hash({"w": np.ones(2)})
    >>> same, content_hash({"w": np.ones(2)}) == content_hash({"w": np.ones(2, np.float32)})
    (True, False)
    """
    return _combine(_describe(_flatten(tree)))


class TrainCheckpoints:
    """The numbered checkpoints of one run, in one directory. Use it in a ``with`` block.

    Saving is asynchronous: `save` returns once the arrays are copied or pinned, and leaving the
    block (by an exception too) waits until the last step is on disk. Without the block Orbax would
    lose it, so the methods refuse to work outside. A step is committed by a rename, so a killed
    process leaves either the whole step or nothing that counts as one.

    Args:
      directory: made if absent; may be relative.
      keep: how many of the newest steps stay on disk, >= 1.

    Raises:
      ValueError: if ``keep`` < 1.
      CheckpointError: on entering, if the directory cannot be made or read.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1 (steps kept on disk), got {keep}.")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._open: ocp.CheckpointManager | None = None
        self._pending: int | None = (
            None  # last step handed to Orbax and not yet known to be on disk
        )
        self._damaged: set[int] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> TrainCheckpoints:
        """Opens the directory."""
        self._stack.enter_context(_quiet_orbax())
        try:
            self._open = self._make_manager()
        except Exception as error:
            self._stack.close()
            raise CheckpointError(
                f"cannot open the checkpoint directory {self.directory}: {_line(error)}."
            ) from error
        return self

    def __exit__(self, kind, value, traceback) -> None:
        """Waits for the last save, then closes. A failed save never hides an earlier exception."""
        manager = self._manager
        try:
            try:
                self.wait()
            finally:
                with contextlib.suppress(Exception):  # what failed was already raised by wait()
                    manager.close()
        except CheckpointError as error:
            if value is None:
                raise
            value.add_note(str(error))
        finally:
            self._open = None
            self._stack.close()

    def save(self, step: int, state: Any, metadata: dict[str, Any] | None = None) -> None:
        """Starts saving ``state`` as ``step``; the buffers may be donated as soon as it returns.

        A failure of the save before this one is raised here. A step that `restore_latest` had to
        skip is renamed to ``<step>.damaged`` first, so the rerun can write its number again.

        Args:
          step: updates done so far, >= 0 and larger than every step on disk.
          state: any pytree of arrays, typed PRNG keys and Python scalars, with at least one leaf.
          metadata: JSON-serialisable, comes back with the state.

        Raises:
          ValueError: step not larger than the newest one, or an empty tree, or metadata not JSON.
          CheckpointError: the disk refused this save or the one before; older steps are whole.
        """
        manager = self._manager
        leaves = _flatten(state)
        record = _record(leaves, metadata or {}, step=step)
        self.wait()
        self._set_damaged_aside()
        newest = max(self.all_steps(), default=-1)
        if step <= newest:
            raise ValueError(
                f"step {step} is not newer than step {newest} in {self.directory}; "
                "resume from it or use another directory."
            )
        try:
            saved = self._manager.save(step, args=_save_args(leaves, record))
        except Exception as error:
            self._recover(manager)
            raise CheckpointError(self._not_saved(step, _line(error))) from error
        if not saved:  # Orbax declines by returning False
            raise CheckpointError(self._not_saved(step, "Orbax declined the save"))
        self._pending = step

    def wait(self) -> None:
        """Blocks until every started save is on disk.

        Raises:
          CheckpointError: a started save failed (disk full, permissions); earlier steps are whole.
        """
        manager, step = self._manager, self._pending
        if step is None:
            return
        self._pending = None
        try:
            manager.wait_until_finished()
        except Exception as error:
            self._recover(manager)
            raise CheckpointError(self._not_saved(step, _line(error))) from error
        if step not in manager.all_steps(read=True):
            raise CheckpointError(self._not_saved(step, "it is missing after the save"))

    def all_steps(self) -> list[int]:
        """Committed steps, ascending. Only a restore shows whether their bytes are still sound.

        A save still under way is not among them; `wait` first to see it.
        """
        return sorted(self._manager.all_steps(read=True))

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Loads and verifies one step.

        Args:
          step: one of `all_steps`.
          abstract_state: a pytree like the saved one. Its array leaves (``jax.Array`` or
            ``jax.ShapeDtypeStruct``) give shape, dtype and, if they have one, the sharding of
            *this* run, which need not be that of the saving run; NumPy leaves come back as NumPy
            arrays, Python scalars as Python scalars.

        Raises:
          ValueError: the stored tree has other leaves, shapes or dtypes than ``abstract_state``.
          CheckpointError: the step is missing or damaged; the message names the step and the leaf.
        """
        self.wait()
        place = f"step {step} in {self.directory}"
        arrays, record = _load(self.directory / str(step), place)
        if record.get("step") != step:
            raise CheckpointError(f"{place} is damaged: its record says step {record.get('step')}.")
        return Restored(step, _unflatten(abstract_state, arrays, record, place), record["user"], ())

    def restore_latest(self, abstract_state: Any, *, strict: bool = True) -> Restored | None:
        """Loads the newest step; None if there is none.

        Args:
          abstract_state: see `restore`.
          strict: if the newest step is damaged, ``True`` raises and names it; ``False`` falls back
            to the newest sound one and lists what it passed over in ``skipped``.

        Raises:
          ValueError: see `restore`; a state that does not fit is never skipped as damaged.
          CheckpointError: the newest step (strict) or every step (not strict) is damaged.
        """
        self.wait()
        skipped: list[int] = []
        problem = ""
        for step in reversed(self.all_steps()):
            try:
                found = self.restore(step, abstract_state)
            except CheckpointError as error:
                if strict:
                    raise CheckpointError(
                        f"{str(error).rstrip('.')}; strict=False falls back to an older step."
                    ) from error
                skipped.append(step)
                problem = problem or str(error)
                continue
            self._damaged.update(skipped)
            return found._replace(skipped=tuple(skipped))
        if skipped:
            raise CheckpointError(
                f"no sound checkpoint in {self.directory}: steps {skipped} are all damaged "
                f"({problem.rstrip('.')})."
            )
        return None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._open is None:
            raise RuntimeError("TrainCheckpoints works inside its `with` block only.")
        return self._open

    def _make_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(self._keep)
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _recover(self, manager: ocp.CheckpointManager) -> None:
        """After a failed save Orbax still counts it, and its half is on disk: start afresh."""
        self._pending = None
        with contextlib.suppress(Exception):
            manager.close()
        for half in self.directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(half, ignore_errors=True)
        self._open = self._make_manager()

    def _set_damaged_aside(self) -> None:
        for step in sorted(self._damaged):
            aside = self.directory / f"{step}.damaged"
            if aside.exists():
                shutil.rmtree(aside)
            (self.directory / str(step)).rename(aside)
        if self._damaged:
            self._damaged.clear()
            self._manager.reload()

    def _not_saved(self, step: int, reason: str) -> str:
        return (
            f"step {step} was not saved in {self.directory}: {reason}; earlier steps are untouched."
        )


def save_backbone(
    path: str | os.PathLike[str], params: Params, metadata: dict[str, Any] | None = None
) -> str:
    """Saves an immunised backbone with its metadata; returns its `content_hash`.

    Written under another name, checked by reading it back, then renamed: ``path`` holds the whole
    new backbone or what it held before, never a part. (Replacing takes two renames; between them
    the old one lies at ``<path>.previous``, where `load_backbone` finds it.)

    Args:
      path: the directory to make or replace.
      params: one array, or arrays in dicts, lists and tuples (an NNX state: ``nnx.to_pure_dict``).
      metadata: JSON-serialisable, for instance model, method, configuration, conditioning summary.

    Raises:
      ValueError: another kind of container, a typed PRNG key, no leaf at all, metadata not JSON.
      CheckpointError: the disk refused; what ``path`` held before is untouched.
    """
    target = Path(path).absolute()
    structure, leaves = _structure(params, ()), _flatten(params)
    record = _record(leaves, metadata or {}, structure=structure)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    previous = target.with_name(target.name + ".previous")
    try:
        with _quiet_orbax():
            shutil.rmtree(fresh, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(fresh, args=_save_args(leaves, record))
        _load(fresh, str(fresh))
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        fresh.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    except Exception as error:
        for half in target.parent.glob(fresh.name + "*"):
            shutil.rmtree(half, ignore_errors=True)
        raise CheckpointError(
            f"the backbone was not saved at {target}: {_line(error)}; what was there is untouched."
        ) from error
    return record["content"]


def load_backbone(path: str | os.PathLike[str]) -> tuple[Params, dict[str, Any]]:
    """Loads and verifies a backbone saved by `save_backbone`, without knowing its structure.

    Returns:
      ``(params, metadata)``: the dicts, lists and tuples that were saved, with NumPy leaves of the
      saved dtypes (float64 stays float64 whatever ``jax_enable_x64`` says; `jax.device_put` places
      them), and the metadata with ``"content_hash"`` added.

    Raises:
      CheckpointError: nothing there, not a backbone, or damaged; the message names the leaf.
    """
    target = Path(path).absolute()
    previous = target.with_name(target.name + ".previous")
    if not target.exists() and previous.exists():  # killed between the two renames of a replacement
        target = previous
    place = f"the backbone at {target}"
    arrays, record = _load(target, place)
    if "structure" not in record:
        raise CheckpointError(f"{place} is a training state, not a backbone.")
    params = _rebuild(record["structure"], iter(arrays))
    return params, {**record["user"], "content_hash": record["content"]}


# --- one tree <-> flat leaves and their record ----------------------------------------------------


def _flatten(tree: Any) -> list[_Leaf]:
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


def _describe(leaves: list[_Leaf]) -> list[dict[str, Any]]:
    rows = []
    for leaf in leaves:
        array = _to_host(leaf.array)
        rows.append(
            {
                "name": leaf.name,
                "path": leaf.path,
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "prng": leaf.prng,
                "sha256": _digest(array),
            }
        )
    return rows


def _to_host(array: Any) -> np.ndarray:
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


def _combine(rows: list[dict[str, Any]]) -> str:
    text = json.dumps([[row["path"], row["prng"], row["sha256"]] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _record(leaves: list[_Leaf], user: dict[str, Any], **extra: Any) -> dict[str, Any]:
    if not leaves:
        raise ValueError("nothing to save: the tree has no leaves.")
    try:
        user = json.loads(json.dumps(user))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint metadata must be JSON-serialisable: {error}.") from error
    rows = _describe(leaves)
    record = {"format": FORMAT, "leaves": rows, "content": _combine(rows), "user": user, **extra}
    return {**record, "sha256": _record_digest(record)}


def _record_digest(record: dict[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _save_args(leaves: list[_Leaf], record: dict[str, Any]) -> ocp.args.Composite:
    # Orbax refuses arrays of size zero: the record alone (dtype and shape) restores those.
    arrays = {leaf.name: leaf.array for leaf in leaves if leaf.array.size}
    items: dict[str, Any] = {"record": ocp.args.JsonSave(record)}
    if arrays:
        items["arrays"] = ocp.args.StandardSave(arrays)
    return ocp.args.Composite(**items)


def _load(directory: Path, place: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Every leaf as a verified NumPy array, in tree order, and the verified record."""
    if not directory.is_dir():
        raise CheckpointError(f"{place} does not exist.")
    try:
        with _quiet_reads(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            record = checkpointer.restore(
                directory, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            ).record
            if record.get("sha256") != _record_digest(record):
                raise CheckpointError(f"{place} is damaged: its record does not match its SHA-256.")
            if record["format"] != FORMAT:
                raise CheckpointError(
                    f"{place} has format {record['format']!r}; this version reads {FORMAT!r}."
                )
            empty = [np.empty(row["shape"], jnp.dtype(row["dtype"])) for row in record["leaves"]]
            target = {
                row["name"]: array
                for row, array in zip(record["leaves"], empty, strict=True)
                if array.size
            }
            stored = {}
            if target:
                stored = checkpointer.restore(
                    directory, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
                ).arrays
    except CheckpointError:
        raise
    # Orbax and TensorStore report damage as ValueError, KeyError, FileNotFoundError, TypeError,
    # JSONDecodeError, ... : whatever it is, these bytes could not be read back.
    except Exception as error:
        raise CheckpointError(f"{place} is damaged or incomplete: {_line(error)}.") from error
    arrays = []
    for row, blank in zip(record["leaves"], empty, strict=True):
        array = np.asarray(stored.get(row["name"], blank))
        if _digest(array) != row["sha256"]:
            raise CheckpointError(
                f"{place} is damaged: leaf {row['name']} does not match its SHA-256."
            )
        arrays.append(array)
    return arrays, record


def _unflatten(abstract: Any, arrays: list[np.ndarray], record: dict[str, Any], place: str) -> Any:
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


def _place(like: Any, array: np.ndarray, row: dict[str, Any], place: str) -> Any:
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
    if isinstance(like, np.ndarray | np.generic):
        return array
    sharding = getattr(like, "sharding", None)
    if prng is not None:
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=prng)
        return key if sharding is None else jax.device_put(key, sharding)
    if sharding is None:
        return jnp.array(array)
    if sharding.is_fully_addressable:
        # jnp.array copies: device_put may alias NumPy memory, which a donated state must not.
        return jax.device_put(jnp.array(array), sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _structure(tree: Any, path: tuple[Any, ...]) -> Any:
    """The containers of ``tree`` as JSON, in the order in which jax flattens them."""
    if isinstance(tree, dict):
        keys = sorted(tree)
        if not all(isinstance(key, str | int) for key in keys):
            raise ValueError(f"backbone dict keys must be str or int, got {keys} at {path}.")
        return {"dict": [[key, _structure(tree[key], (*path, key))] for key in keys]}
    if type(tree) in (list, tuple):
        children = [_structure(child, (*path, i)) for i, child in enumerate(tree)]
        return {"list" if isinstance(tree, list) else "tuple": children}
    if isinstance(tree, jax.Array) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
        raise ValueError(f"a backbone holds no PRNG keys, found one at {path}.")
    if isinstance(tree, jax.Array | np.ndarray | np.generic | int | float | complex):
        return "leaf"
    raise ValueError(
        f"a backbone is made of arrays in dicts, lists and tuples, got {type(tree).__name__} at "
        f"{path or 'the root'}; convert it (for an NNX state: nnx.to_pure_dict) before saving."
    )


def _rebuild(structure: Any, arrays: Iterator[np.ndarray]) -> Any:
    if structure == "leaf":
        return next(arrays)
    ((kind, children),) = structure.items()
    if kind == "dict":
        return {key: _rebuild(child, arrays) for key, child in children}
    rebuilt = [_rebuild(child, arrays) for child in children]
    return rebuilt if kind == "list" else tuple(rebuilt)


# --- small things ---------------------------------------------------------------------------------


def _line(error: BaseException) -> str:
    """The first line of an error, short enough to print; the whole of it stays in the traceback."""
    text = next((line for line in str(error).splitlines() if line.strip()), "") or repr(error)
    full = "no space left on device" in str(error).lower()
    return "no space left on device" if full else text.strip().rstrip(".")[:300]


@contextlib.contextmanager
def _quiet_reads() -> Iterator[None]:
    """Reads damaged arrays without noise.

    When one of several parallel reads fails, Orbax closes its event loop under the others, and each
    prints an ignored "Event loop is closed" a moment later. The first failure is the one raised.
    """
    previous = sys.unraisablehook

    def hook(unraisable) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        with _quiet_orbax():
            yield
    except Exception:
        time.sleep(0.2)  # until the reads still under way have reported
        raise
    finally:
        sys.unraisablehook = previous


class _DropOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's own log lines and tracebacks off stderr: what matters is raised as one line."""
    logger, drop = logging.getLogger("absl"), _DropOrbax()
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
