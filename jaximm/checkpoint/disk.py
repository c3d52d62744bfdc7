"""Checkpoints: the full training state while a run goes on, the immunised backbone at its end.

Both are Orbax checkpoints with two additions. Orbax stores no checksum over array chunks: one
flipped byte in a large array comes back silently as other numbers. So every checkpoint here
carries, as a JSON item beside the arrays, a SHA-256 digest of each leaf (over its dtype, shape and
bytes) and one of the JSON record itself; and ``files.json``, written before the commit, with the
SHA-256 of each file. Nothing is handed out before all of them agree, and the message names the
file that is damaged.

Leaves are stored flat, as ``{"0003.opt_state.0.trace": array}``, so any pytree can be saved
(NamedTuples, optax states, typed PRNG keys, empty arrays, Python scalars) and any Orbax tool can
read the arrays.

**What a training state should hold** so that a resumed run is the run that was interrupted: the
trained parameters, the optimiser's state, batch statistics if they train, the step, the PRNG key,
and the data position. In jaximm batch ``t`` and key ``t`` are functions of (seed, t), so the step
*is* the data position; a loader with a position of its own (an iterator's state as bytes) goes in
as a uint8 array, or into ``metadata`` if it is JSON.

**Devices.** A restore takes its shardings from the abstract state of the run that restores: any
number of devices, any mesh.

**Several processes.** All of them enter the block and call the same methods with the same
arguments, on a file system that all of them see. A leaf is a global array (replicated or sharded)
or host data that is equal everywhere. Each process writes its own shards and digests them where
they lie: only digests travel. Records, deletions and renames are the first process's. Whatever one
process finds damaged, all refuse. What is to lie in parts on several devices is read part by part,
by whoever holds the part, and is nowhere whole: its recorded blocks are compared where one lies
within a part, the digests of the files stand for the rest. Everything else is read into host memory
before it is placed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaximm.checkpoint.leaves import LeafArray, LeafRow
from jaximm.types import Json

if TYPE_CHECKING:
    pass
from jaximm.checkpoint.leaves import (
    _combine,
    _describe,
    _is_first_process,
    _is_spread,
    _Leaf,
    _matches,
    _share,
)

FORMAT = "jaximm.checkpoint/2"
"""Written into every record; a reader refuses what it does not know."""

READABLE = ("jaximm.checkpoint/1", FORMAT)
"""Formats that can be read; the first had no ``files.json``."""

MANIFEST = "files.json"
"""Beside the items of every checkpoint: size and SHA-256 of each file."""

# Orbax writes the time of the commit into it afterwards; it holds no numbers.
_UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST)


Spread = Callable[[LeafRow], jax.ShapeDtypeStruct | None]
"""Of a row of the record: what the leaf is to become if it is to lie in parts, else None."""


Loaded = tuple[list[LeafArray], Json]
"""Leaves in tree order, and the record: what `_record` made."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged: one line that names the place."""


def _record(leaves: list[_Leaf], user: Json, **extra: Any) -> Json:
    if not leaves:
        raise ValueError("nothing to save: the tree has no leaves.")
    try:
        user = json.loads(json.dumps(user))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint metadata must be JSON-serialisable: {error}.") from error
    rows = _describe(leaves)
    content = _combine(rows)
    if len(set(_share(content))) > 1:
        raise ValueError(
            "the state differs between processes: host data and single-device arrays must be equal "
            "on all of them, everything else a global array."
        )
    record = {"format": FORMAT, "leaves": rows, "content": content, "user": user, **extra}
    return {**record, "sha256": _record_digest(record)}


def _record_digest(record: Json) -> str:
    body = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _save_args(leaves: list[_Leaf], record: Json) -> ocp.args.Composite:
    # Orbax refuses arrays of size zero: the record alone (dtype and shape) restores those.
    arrays = {leaf.name: _global_or_host(leaf.array) for leaf in leaves if leaf.array.size}
    items: dict[str, Any] = {"record": ocp.args.JsonSave(record)}
    if arrays:
        items["arrays"] = ocp.args.StandardSave(arrays)
    return ocp.args.Composite(**items)


def _global_or_host(array: LeafArray) -> LeafArray:
    """With several processes Orbax takes a process's own arrays as host data only."""
    own = isinstance(array, jax.Array) and array.is_fully_addressable
    return np.asarray(array) if own and jax.process_count() > 1 else array


def _own_checkpointer() -> ocp.Checkpointer:
    """A checkpointer that waits for no other process."""
    options: dict[str, Any] = {}
    if jax.process_count() > 1:
        index = jax.process_index()
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"own{index}"
        )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(**options) if options else ocp.CompositeOptions()
    )
    return ocp.Checkpointer(handler, **options)


def _load_together(directory: Path, place: str, spread: Spread | None = None) -> Loaded:
    """`_load` on every process; what one of them cannot read, all refuse in the same words."""
    cause, loaded = None, None
    try:
        loaded = _load(directory, place, spread)
    except CheckpointError as error:
        cause = error
    problem = next(filter(None, _share("" if cause is None else str(cause))), None)
    if problem is not None:
        raise CheckpointError(problem) from cause
    assert loaded is not None
    return loaded


def _load(directory: Path, place: str, spread: Spread | None = None) -> Loaded:
    """Every leaf, verified, in tree order, and the verified record.

    Leaves are NumPy arrays, but those that `spread` has a place for.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{place} does not exist.")
    # One process reads every file once more; all of them check every leaf.
    bad_files = _damaged_files(directory) if _is_first_process() else []
    damage = f"{place} is damaged: {'; '.join(bad_files)}"
    try:
        arrays, record = _read(directory, place, spread or (lambda row: None))
    except CheckpointError as error:
        if bad_files:
            raise CheckpointError(f"{damage}.") from error
        raise
    wrong = [
        row["name"]
        for row, array in zip(record["leaves"], arrays, strict=True)
        if not _matches(array, row)
    ]
    if bad_files:
        leaves = f" (leaf {', '.join(wrong)} changed with it)" if wrong else ""
        raise CheckpointError(f"{damage}{leaves}.")
    if wrong:
        raise CheckpointError(f"{place} is damaged: leaf {wrong[0]} does not match its SHA-256.")
    return arrays, record


def _read(directory: Path, place: str, spread: Spread) -> Loaded:
    """The leaves as they come from disk, and the verified record."""
    try:
        with _quiet_reads(), _own_checkpointer() as checkpointer:
            record = checkpointer.restore(
                directory, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            ).record
            if record.get("sha256") != _record_digest(record):
                raise CheckpointError(f"{place} is damaged: its record does not match its SHA-256.")
            if record["format"] not in READABLE:
                raise CheckpointError(
                    f"{place} has format {record['format']!r}; this version reads {READABLE}."
                )
            if record["format"] != READABLE[0] and not (directory / MANIFEST).exists():
                raise CheckpointError(f"{place} is damaged: file {MANIFEST} is missing.")
            empty = [_target(row, spread) for row in record["leaves"]]
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
    arrays = [
        stored.get(row["name"], blank) for row, blank in zip(record["leaves"], empty, strict=True)
    ]
    return [array if _is_spread(array) else np.asarray(array) for array in arrays], record


def _target(row: LeafRow, spread: Spread) -> np.ndarray | jax.ShapeDtypeStruct:
    """What a leaf is read into."""
    shape, dtype = tuple(row["shape"]), jnp.dtype(row["dtype"])
    wanted = spread(row)
    # Where they differ, the leaf is read whole and refused with its name.
    if wanted is not None and (wanted.shape, jnp.dtype(wanted.dtype)) == (shape, dtype):
        return wanted
    return np.empty(shape, dtype)


def _read_metrics(directory: Path) -> dict[str, float]:
    """The metrics in a step's record, none where it has none or is damaged."""
    try:
        record = json.loads((directory / "record" / "metadata").read_text(encoding="utf-8"))
        if record["sha256"] == _record_digest(record):
            return record["metrics"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a restore of that step says what is wrong with it
    return {}


def _write_manifest(directory: Path) -> None:
    """Lists every file of a checkpoint that is complete but not yet committed."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in _UNLISTED:
            files[name] = {"bytes": path.stat().st_size, "sha256": _file_digest(path)}
    listed = {"files": files}
    text = json.dumps({**listed, "sha256": _record_digest(listed)}, indent=1)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _damaged_files(directory: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, one clause a file."""
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        # A record in the manifest's place is whole as well, and lists no files.
        sound = listed["sha256"] == _record_digest(listed) and "files" in listed
    except FileNotFoundError:
        return []  # `_read` refuses that, unless the format had none
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound, listed = False, {}
    if not sound:
        return [f"file {MANIFEST} does not match its SHA-256"]
    problems = []
    for name, expected in listed["files"].items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                problems.append(f"file {name} has {size} bytes, {expected['bytes']} were written")
            elif _file_digest(path) != expected["sha256"]:
                problems.append(f"file {name} does not match its SHA-256")
        except FileNotFoundError:
            problems.append(f"file {name} is missing")
        except OSError as error:
            problems.append(f"file {name} cannot be read ({_line(error)})")
    return problems


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(error: BaseException) -> str:
    """The first line of an error, short enough to print; the whole of it stays in the traceback."""
    text = next((line for line in str(error).splitlines() if line.strip()), "") or repr(error)
    full = "no space left on device" in str(error).lower()
    return "no space left on device" if full else text.strip().rstrip(".")[:300]


@contextlib.contextmanager
def _quiet_reads() -> Generator[None]:
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
def _quiet_orbax() -> Generator[None]:
    """Keeps Orbax's own log lines and tracebacks off stderr: what matters is raised as one line."""
    logger, drop = logging.getLogger("absl"), _DropOrbax()
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
