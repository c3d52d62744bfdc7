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
process finds damaged, all refuse. A restoring process reads the whole state into host memory, one
file at a time, before it places its own shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from jaximm.types import Params

if TYPE_CHECKING:
    from jaximm.models.base import Backbone

FORMAT = "jaximm.checkpoint/2"
"""Written into every record; a reader refuses what it does not know."""

READABLE = ("jaximm.checkpoint/1", FORMAT)
"""Formats that can be read; the first had no ``files.json``."""

MANIFEST = "files.json"
"""Beside the items of every checkpoint: size and SHA-256 of each file."""

# Orbax writes the time of the commit into it afterwards; it holds no numbers.
_UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST)

_KEY_LENGTH = 60  # longest readable part of a leaf's name on disk


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged: one line that names the place."""


class Restored(NamedTuple):
    """A verified training state.

    ``skipped`` lists the newer (or better) steps that were passed over because they are damaged, in
    that order; it is empty unless ``strict=False`` was asked for.
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
    live and however they are sharded (over several processes, all of them call this). ``-0.0`` and
    ``0.0`` differ, as do NaNs of different payload.

    >>> import numpy as np
    >>> same = content_hash({"w": np.ones(2)}) == content_hash({"w": np.ones(2)})
    >>> same, content_hash({"w": np.ones(2)}) == content_hash({"w": np.ones(2, np.float32)})
    (True, False)
    """
    # Gathered, one leaf at a time: digests of shards would depend on the sharding.
    leaves = (leaf._replace(array=_to_host(leaf.array)) for leaf in _flatten(tree))
    return _combine([row for leaf in leaves for row in _describe([leaf])])


class TrainCheckpoints:
    """The numbered checkpoints of one run, in one directory. Use it in a ``with`` block.

    Saving is asynchronous: `save` returns once the arrays are copied or pinned, and leaving the
    block (by an exception too) waits until the last step is on disk. Without the block Orbax would
    lose it, so the methods refuse to work outside. A step is committed by a rename, so a killed
    process leaves either the whole step or nothing that counts as one.

    A step stays on disk while it is one of the newest ``keep``, or a multiple of ``keep_every``, or
    one of the best ``keep_best``.

    Args:
      directory: made if absent; may be relative.
      keep: how many of the newest steps stay, >= 1.
      keep_every: multiples of it stay for good, >= 1; None: none do.
      best_metric: name among the ``metrics`` given to `save` that ranks steps; None: no ranking.
      best_mode: "max" if a larger metric is better, else "min".
      keep_best: how many of the best steps stay, >= 1.

    Raises:
      ValueError: a number below 1, or another mode.
      CheckpointError: on entering, if the directory cannot be made or read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int | None = None,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        keep_best: int = 1,
    ) -> None:
        for name, count in (("keep", keep), ("keep_every", keep_every), ("keep_best", keep_best)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be >= 1 (steps kept on disk), got {count}.")
        if best_mode not in ("max", "min"):
            raise ValueError(f'best_mode must be "max" or "min", got {best_mode!r}.')
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._keep_every = keep_every
        self._best_metric = best_metric
        self._best_sign = 1.0 if best_mode == "max" else -1.0
        self._keep_best = keep_best
        self._metrics: dict[int, dict[str, float]] = {}  # of steps saved or looked up so far
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

    def save(
        self,
        step: int,
        state: Any,
        metadata: dict[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving ``state`` as ``step``; the buffers may be donated as soon as it returns.

        A failure of the save before this one is raised here. A step that `restore_latest` had to
        skip is renamed to ``<step>.damaged`` first, so the rerun can write its number again.

        Args:
          step: updates done so far, >= 0 and larger than every step on disk.
          state: any pytree of arrays, typed PRNG keys and Python scalars, with at least one leaf.
          metadata: JSON-serialisable, comes back with the state.
          metrics: numbers by name, among them ``best_metric`` if the run ranks its steps. A step
            saved without them, or with NaN, is never among the best.

        Raises:
          ValueError: step not larger than the newest one, or an empty tree, or metadata not JSON,
            or metrics without ``best_metric``, or a state that differs between processes.
          CheckpointError: the disk refused this save or the one before; older steps are whole.
        """
        manager = self._manager
        measured = {name: float(value) for name, value in (metrics or {}).items()}
        if metrics is not None and self._best_metric not in (None, *measured):
            raise ValueError(
                f"metrics of step {step} must hold best_metric {self._best_metric!r}, "
                f"got {sorted(measured)}."
            )
        leaves = _flatten(state)
        record = _record(leaves, metadata or {}, step=step, metrics=measured)
        self.wait()
        self._set_damaged_aside()
        newest = max(self.all_steps(), default=-1)
        if step <= newest:
            raise ValueError(
                f"step {step} is not newer than step {newest} in {self.directory}; "
                "resume from it or use another directory."
            )
        self._metrics[step] = measured  # before the save: the keep policy looks it up
        self._pending, cause = step, None
        try:
            if not self._manager.save(step, args=_save_args(leaves, record)):
                cause = CheckpointError("Orbax declined the save")  # it does so by returning False
        except Exception as error:
            cause = error
        self._raise_together(manager, step, cause)

    def wait(self) -> None:
        """Blocks until every started save is on disk.

        Raises:
          CheckpointError: a started save failed (disk full, permissions); earlier steps are whole.
        """
        manager, step = self._manager, self._pending
        if step is None:
            return
        cause = None
        try:
            manager.wait_until_finished()
            if step not in manager.all_steps(read=True):
                cause = CheckpointError("it is missing after the save")
        except Exception as error:
            cause = error
        self._raise_together(manager, step, cause)
        self._pending = None

    def all_steps(self) -> list[int]:
        """Committed steps, ascending. Only a restore shows whether their bytes are still sound.

        A save still under way is not among them; `wait` first to see it.
        """
        # One process's reading for all: a network file system may show them different ones.
        return json.loads(_share(json.dumps(sorted(self._manager.all_steps(read=True))))[0])

    def best_step(self) -> int | None:
        """The committed step with the best ``best_metric``; the oldest of equals, None if none.

        Raises:
          ValueError: the run was opened without ``best_metric``.
        """
        return next(iter(self._ranked(self.all_steps())), None)

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
          CheckpointError: the step is missing or damaged; the message names the step, the file
            and the leaves that changed with it.
        """
        self.wait()
        place = f"step {step} in {self.directory}"
        arrays, record = _load_together(self.directory / str(step), place)
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
        found = self._restore_first(list(reversed(self.all_steps())), abstract_state, strict)
        if found is not None:
            self._damaged.update(found.skipped)
        return found

    def restore_best(self, abstract_state: Any, *, strict: bool = True) -> Restored | None:
        """Loads the step with the best ``best_metric``; None if none has one.

        Args:
          abstract_state: see `restore`.
          strict: if that step is damaged, ``True`` raises and names it; ``False`` falls back to the
            next best one and lists what it passed over in ``skipped``.

        Raises:
          ValueError: see `restore`; or the run was opened without ``best_metric``.
          CheckpointError: the best step (strict) or every ranked step (not strict) is damaged.
        """
        self.wait()
        return self._restore_first(self._ranked(self.all_steps()), abstract_state, strict)

    def _restore_first(
        self, steps: Sequence[int], abstract_state: Any, strict: bool
    ) -> Restored | None:
        """The first sound one of ``steps``."""
        skipped: list[int] = []
        problem = ""
        for step in steps:
            try:
                found = self.restore(step, abstract_state)
            except CheckpointError as error:
                if strict:
                    raise CheckpointError(
                        f"{str(error).rstrip('.')}; strict=False falls back to another step."
                    ) from error
                skipped.append(step)
                problem = problem or str(error)
                continue
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
        kept = ocp.checkpoint_managers
        policies: list[Any] = [kept.LatestN(self._keep)]
        if self._keep_every is not None:
            policies.append(kept.EveryNSteps(self._keep_every))
        if self._best_metric is not None:
            policies.append(_KeepBest(self))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept.AnyPreservationPolicy(policies),
            # Despite its name it is called before the commit, once all files of the step are there.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _list_files(self) -> None:
        """Adds the manifest to the step that is about to be committed."""
        if _is_first_process():
            half = self.directory / f"{self._pending}.orbax-checkpoint-tmp"
            # Where Orbax commits by a marker and not by a rename, it writes in place.
            _write_manifest(half if half.exists() else self.directory / str(self._pending))

    def _ranked(self, steps: Sequence[int]) -> list[int]:
        """Those of ``steps`` that have the metric, best first, the older of equals first."""
        if self._best_metric is None:
            raise ValueError(
                "best_step and restore_best need TrainCheckpoints(..., best_metric=name)."
            )
        scores = {}
        for step in steps:
            if step not in self._metrics:
                self._metrics[step] = _read_metrics(self.directory / str(step))
            value = self._metrics[step].get(self._best_metric, math.nan)
            if not math.isnan(value):
                scores[step] = self._best_sign * value
        return sorted(scores, key=lambda step: (-scores[step], step))

    def _raise_together(
        self, manager: ocp.CheckpointManager, step: int, cause: Exception | None
    ) -> None:
        """Raises on every process if a save failed on any, after cleaning up."""
        found = _share("" if cause is None else _line(cause))
        reason = next(filter(None, found), None)
        if reason is None:
            return
        self._recover(manager)
        raise CheckpointError(self._not_saved(step, reason)) from cause

    def _recover(self, manager: ocp.CheckpointManager) -> None:
        """After a failed save Orbax still counts it, and its half is on disk: start afresh."""
        if self._pending is not None:
            self._metrics.pop(self._pending, None)
        self._pending = None
        with contextlib.suppress(Exception):
            manager.close()
        if _is_first_process():
            for half in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(half, ignore_errors=True)
        _share("")  # until the first process has tidied up
        self._open = self._make_manager()

    def _set_damaged_aside(self) -> None:
        if not self._damaged:
            return
        for step in sorted(self._damaged):
            self._metrics.pop(step, None)
            if _is_first_process():
                aside = self.directory / f"{step}.damaged"
                if aside.exists():
                    shutil.rmtree(aside)
                (self.directory / str(step)).rename(aside)
        self._damaged.clear()
        _share("")  # until the first process has renamed them
        self._manager.reload()

    def _not_saved(self, step: int, reason: str) -> str:
        return (
            f"step {step} was not saved in {self.directory}: {reason}; earlier steps are untouched."
        )


class _KeepBest:
    """Orbax preservation policy: the best ``keep_best`` steps by the run's metric.

    Ours reads metrics from the verified record; Orbax would keep a second, unchecked copy.
    """

    def __init__(self, checkpoints: TrainCheckpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        ours = self._checkpoints
        best = ours._ranked([info.step for info in checkpoints])[: ours._keep_best]
        return [info.step in best for info in checkpoints]


def save_backbone(
    path: str | os.PathLike[str], params: Params, metadata: dict[str, Any] | None = None
) -> str:
    """Saves an immunised backbone with its metadata; returns its `content_hash`.

    Written under another name, checked by reading it back, then renamed: ``path`` holds the whole
    new backbone or what it held before, never a part. (Replacing takes two renames; between them
    the old one lies at ``<path>.previous``, where `load_backbone` finds it. A killed process may
    leave a ``.<name>.<id>.tmp`` beside it, which nothing reads.)

    With several processes all call it with the same global or equal arrays; the first one writes,
    and sharded arrays are gathered to it.

    Args:
      path: the directory to make or replace.
      params: one array, or arrays in dicts, lists and tuples (an NNX state: ``nnx.to_pure_dict``).
      metadata: JSON-serialisable, for instance model, method, configuration, conditioning summary.

    Raises:
      ValueError: another kind of container, a typed PRNG key, no leaf at all, metadata not JSON.
      CheckpointError: the disk refused; what ``path`` held before is untouched.
    """
    target = Path(path).absolute()
    structure = _structure(params, ())
    leaves = [leaf._replace(array=_to_host(leaf.array)) for leaf in _flatten(params)]
    record = _record(leaves, metadata or {}, structure=structure)
    cause = None
    if _is_first_process():
        try:
            _replace_directory(target, leaves, record)
        except Exception as error:
            cause = error
    reason = _share("" if cause is None else _line(cause))[0]
    if reason:
        raise CheckpointError(
            f"the backbone was not saved at {target}: {reason}; what was there is untouched."
        ) from cause
    return record["content"]


def _replace_directory(target: Path, leaves: list[_Leaf], record: dict[str, Any]) -> None:
    """Writes a checkpoint beside ``target``, checks it, and puts it in its place."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    previous = target.with_name(target.name + ".previous")
    try:
        with _quiet_orbax():
            shutil.rmtree(fresh, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with _own_checkpointer() as checkpointer:
                checkpointer.save(fresh, args=_save_args(leaves, record))
        _write_manifest(fresh)
        _load(fresh, str(fresh))
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        fresh.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    except Exception:
        for half in target.parent.glob(fresh.name + "*"):
            shutil.rmtree(half, ignore_errors=True)
        raise


def load_backbone(path: str | os.PathLike[str]) -> tuple[Params, dict[str, Any]]:
    """Loads and verifies a backbone saved by `save_backbone`, without knowing its structure.

    Returns:
      ``(params, metadata)``: the dicts, lists and tuples that were saved, with NumPy leaves of the
      saved dtypes (float64 stays float64 whatever ``jax_enable_x64`` says; `jax.device_put` places
      them), and the metadata with ``"content_hash"`` added.

    Raises:
      CheckpointError: nothing there, not a backbone, or damaged; the message names the file.
    """
    target = Path(path).absolute()
    previous = target.with_name(target.name + ".previous")
    if not target.exists() and previous.exists():  # killed between the two renames of a replacement
        target = previous
    place = f"the backbone at {target}"
    arrays, record = _load_together(target, place)
    if "structure" not in record:
        raise CheckpointError(f"{place} is a training state, not a backbone.")
    params = _rebuild(record["structure"], iter(arrays))
    return params, {**record["user"], "content_hash": record["content"]}


class Immunised(NamedTuple):
    """What `load_immunised` gives back.

    Attributes:
      backbone: the whole backbone, ready to run.
      head: ``{"kernel": [d, k], "bias": [k]}`` of the primary task, None where none was saved.
      metadata: ``model``, ``model_config``, ``preprocess``, ``method``, ``config``,
        ``conditioning`` and ``content_hash``.
    """

    backbone: Backbone
    head: dict[str, jax.Array] | None
    metadata: dict[str, Any]


def save_immunised(
    path: str | os.PathLike[str],
    backbone: Backbone,
    head: Any = None,
    *,
    method: str,
    config: Any = None,
    conditioning: Mapping[str, Any] | None = None,
) -> str:
    """Saves an immunised backbone as an item of its own; returns its `content_hash`.

    What is saved is all that `load_immunised` needs: parameters and batch statistics, the model's
    name and configuration, its preprocessing, and what was done to it.

    Args:
      path: the directory to make or replace; see `save_backbone`.
      backbone: with the immunised parameters in place (`Trainable.whole`).
      head: ``kernel`` [d, k] and ``bias`` [k] of the primary task, as a dict or a NamedTuple.
      method: name of the immuniser; "none" for a reference.
      config: of the method: a dataclass, or something JSON-serialisable.
      conditioning: log kappas and ratios, JSON-serialisable.

    Raises:
      ValueError: a model configuration that JSON cannot hold, with the field; other metadata that
        it cannot hold; a head without a kernel.
      CheckpointError: the disk refused; what ``path`` held before is untouched.
    """
    tree: dict[str, Any] = {"params": dict(backbone.params), "stats": dict(backbone.stats)}
    if head is not None:
        tree["head"] = dict(head._asdict() if hasattr(head, "_asdict") else head)
        if "kernel" not in tree["head"]:
            raise ValueError(f"a head has a kernel (and a bias), got {sorted(tree['head'])}.")
    metadata = {
        "kind": _IMMUNISED,
        "model": backbone.name,
        "model_config": _fields_to_json(backbone.config, f"config of {backbone.name}"),
        "width": backbone.width,
        "preprocess": _fields_to_json(backbone.preprocess, "preprocess"),
        "method": method,
        "config": _fields_to_json(config, "config") if dataclasses.is_dataclass(config) else config,
        "conditioning": None if conditioning is None else dict(conditioning),
    }
    return save_backbone(path, tree, metadata)


def load_immunised(path: str | os.PathLike[str], *, template: Backbone | None = None) -> Immunised:
    """Loads, verifies and rebuilds what `save_immunised` saved.

    Args:
      path: the directory.
      template: a backbone of the same structure, for a model that is not in
        `jaximm.models.REGISTRY`; its numbers are not used.

    Raises:
      ValueError: a model, or a field of its configuration, that this version does not know; stored
        parameters that are not those of the model. The message names them.
      CheckpointError: nothing there, something else, or damaged; the message names the file.
    """
    tree, metadata = load_backbone(path)
    place = f"the backbone at {Path(path).absolute()}"
    if metadata.get("kind") != _IMMUNISED:
        raise CheckpointError(
            f"{place} was not saved by save_immunised; load_backbone gives its arrays."
        )
    if template is None:
        template = _backbone_template(metadata, place)
    elif template.name != metadata["model"]:
        raise ValueError(f"{place} is a {metadata['model']}, the template a {template.name}.")
    for kind in ("params", "stats"):
        _check_shapes(tree[kind], getattr(template, kind), f"{place}: {kind}")
    backbone = dataclasses.replace(
        template,
        params={name: jnp.array(value) for name, value in tree["params"].items()},
        stats={name: jnp.array(value) for name, value in tree["stats"].items()},
        width=metadata["width"],
        preprocess=_fields_from_json(template.preprocess, metadata["preprocess"], "preprocess"),
    )
    head = tree.get("head")
    if head is not None:
        head = {name: jnp.array(value) for name, value in head.items()}
    shown = {key: value for key, value in metadata.items() if key not in ("kind", "width")}
    return Immunised(backbone, head, shown)


_IMMUNISED = "immunised backbone"


def _backbone_template(metadata: Mapping[str, Any], place: str) -> Backbone:
    """The model of a checkpoint with shapes in place of numbers."""
    from flax import nnx

    from jaximm import models
    from jaximm.models.base import Backbone

    name = metadata["model"]
    if name not in models.REGISTRY:
        raise ValueError(
            f"{place} is a {name!r}, which is no model here; choose from {sorted(models.REGISTRY)} "
            "or pass template= (on the command line: --load FILE, the code that registers it)."
        )
    spec = models.REGISTRY[name]
    config = _fields_from_json(spec.config, metadata["model_config"], f"config of {name}")
    module = nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def flat(state):
        return {
            ".".join(map(str, path)): variable.get_value()
            for path, variable in nnx.to_flat_state(state)
        }

    return Backbone(
        name=name,
        config=config,
        graphdef=graphdef,
        params=flat(params),
        stats=flat(rest),
        stage_names=tuple(module.stage_names),
        width=metadata["width"],
        preprocess=spec.preprocess,
    )


def _check_shapes(stored: Mapping[str, Any], expected: Mapping[str, Any], place: str) -> None:
    neck = {name for name in stored if name.split(".")[0] == "neck"}
    for problem, names in (
        ("are missing", sorted(set(expected) - set(stored))),
        ("are not the model's", sorted(set(stored) - set(expected) - neck)),
    ):
        if names:
            raise ValueError(f"{place} {names[:3]} {problem} ({len(names)} in all).")
    for name in sorted(set(stored) & set(expected)):
        if stored[name].shape != tuple(expected[name].shape):
            raise ValueError(
                f"{place} {name} has shape {stored[name].shape}, the model's "
                f"{tuple(expected[name].shape)}."
            )


def _fields_to_json(config: Any, place: str) -> dict[str, Any]:
    """A dataclass as JSON values; dtypes by name."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = _fields_to_json(value, f"{place}, {field.name}")
        elif isinstance(value, np.dtype) or (isinstance(value, type) and _is_dtype(value)):
            value = np.dtype(value).name
        try:
            fields[field.name] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"field {field.name!r} of {place} is no JSON value: {error}."
            ) from error
    return fields


def _fields_from_json(template: Any, fields: Mapping[str, Any], place: str) -> Any:
    """A dataclass like ``template`` with the stored fields."""
    known = {field.name for field in dataclasses.fields(template)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r} in the {place}; this version knows {sorted(known)}."
        )
    values = {}
    for name, value in fields.items():
        like = getattr(template, name)
        if dataclasses.is_dataclass(like) and isinstance(value, Mapping):
            value = _fields_from_json(like, value, f"{place}, {name}")
        elif isinstance(value, str) and not isinstance(like, str) and _is_dtype(like):
            value = jnp.dtype(value) if isinstance(like, np.dtype) else jnp.dtype(value).type
        values[name] = _to_tuples(value)
    try:
        return dataclasses.replace(template, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _is_dtype(value: Any) -> bool:
    try:
        return value is not None and bool(jnp.dtype(value).name)
    except TypeError:
        return False


def _to_tuples(value: Any) -> Any:
    """JSON lists as the tuples that frozen configurations hold."""
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


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
    blocks = _gather_blocks({leaf.name: leaf.array for leaf in leaves if _is_spread(leaf.array)})
    rows = []
    for leaf in leaves:
        row = {
            "name": leaf.name,
            "path": leaf.path,
            "dtype": np.dtype(leaf.array.dtype).name,
            "shape": list(leaf.array.shape),
            "prng": leaf.prng,
        }
        if leaf.name in blocks:
            row |= {"sha256": _combine_blocks(blocks[leaf.name]), "blocks": blocks[leaf.name]}
        else:
            row["sha256"] = _digest(_to_host(leaf.array))
        rows.append(row)
    return rows


def _is_spread(array: Any) -> bool:
    """Whether no process holds the whole of an array."""
    if not isinstance(array, jax.Array):
        return False
    return not (array.is_fully_addressable or array.is_fully_replicated)


def _gather_blocks(arrays: dict[str, jax.Array]) -> dict[str, list[list[Any]]]:
    """For each array ``[[start, ...], [stop, ...], sha256]`` of its shards, in index order.

    A process digests the shards it holds, and only the digests are exchanged. A reader that has the
    whole array, however it is sharded there, slices it and compares.
    """
    if not arrays:
        return {}
    own = {name: _own_blocks(array) for name, array in arrays.items()}
    everyone = [json.loads(text) for text in _share(json.dumps(own))]
    return {name: sorted(block for part in everyone for block in part[name]) for name in arrays}


def _own_blocks(array: jax.Array) -> list[list[Any]]:
    """The shards that this process holds, each shard of the array on one process only."""
    blocks = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            ranges = [range(n)[part] for n, part in zip(array.shape, shard.index, strict=True)]
            start, stop = [part.start for part in ranges], [part.stop for part in ranges]
            blocks.append([start, stop, _digest(np.asarray(shard.data))])
    return blocks


def _combine_blocks(blocks: list[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(blocks).encode()).hexdigest()


def _matches(array: np.ndarray, row: dict[str, Any]) -> bool:
    """Whether a whole array has the digest, or the digests, of its record."""
    if "blocks" not in row:
        return _digest(array) == row["sha256"]
    return _combine_blocks(row["blocks"]) == row["sha256"] and all(
        _digest(array[tuple(map(slice, start, stop))]) == digest
        for start, stop, digest in row["blocks"]
    )


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
    content = _combine(rows)
    if len(set(_share(content))) > 1:
        raise ValueError(
            "the state differs between processes: host data and single-device arrays must be equal "
            "on all of them, everything else a global array."
        )
    record = {"format": FORMAT, "leaves": rows, "content": content, "user": user, **extra}
    return {**record, "sha256": _record_digest(record)}


def _record_digest(record: dict[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _save_args(leaves: list[_Leaf], record: dict[str, Any]) -> ocp.args.Composite:
    # Orbax refuses arrays of size zero: the record alone (dtype and shape) restores those.
    arrays = {leaf.name: _global_or_host(leaf.array) for leaf in leaves if leaf.array.size}
    items: dict[str, Any] = {"record": ocp.args.JsonSave(record)}
    if arrays:
        items["arrays"] = ocp.args.StandardSave(arrays)
    return ocp.args.Composite(**items)


def _global_or_host(array: Any) -> Any:
    """With several processes Orbax takes a process's own arrays as host data only."""
    own = isinstance(array, jax.Array) and array.is_fully_addressable
    return np.asarray(array) if own and jax.process_count() > 1 else array


def _own_checkpointer() -> ocp.Checkpointer:
    """A checkpointer that waits for no other process."""
    options = {}
    if jax.process_count() > 1:
        index = jax.process_index()
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"own{index}"
        )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(**options) if options else ocp.CompositeOptions()
    )
    return ocp.Checkpointer(handler, **options)


def _load_together(directory: Path, place: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """`_load` on every process; what one of them cannot read, all refuse in the same words."""
    cause, found = None, None
    try:
        found = _load(directory, place)
    except CheckpointError as error:
        cause = error
    problem = next(filter(None, _share("" if cause is None else str(cause))), None)
    if problem is not None:
        raise CheckpointError(problem) from cause
    assert found is not None
    return found


def _load(directory: Path, place: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Every leaf as a verified NumPy array, in tree order, and the verified record."""
    if not directory.is_dir():
        raise CheckpointError(f"{place} does not exist.")
    # One process reads every file once more; all of them check every leaf.
    bad_files = _damaged_files(directory) if _is_first_process() else []
    damage = f"{place} is damaged: {'; '.join(bad_files)}"
    try:
        arrays, record = _read(directory, place)
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


def _read(directory: Path, place: str) -> tuple[list[np.ndarray], dict[str, Any]]:
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
    arrays = [
        np.asarray(stored.get(row["name"], blank))
        for row, blank in zip(record["leaves"], empty, strict=True)
    ]
    return arrays, record


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
        sound = listed["sha256"] == _record_digest(listed)
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
        if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
            data = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
            return jax.random.wrap_key_data(data, impl=prng)
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


def _is_first_process() -> bool:
    return jax.process_index() == 0


def _share(text: str) -> list[str]:
    """The texts of all processes, in their order. All wait here for the last one."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        rows[index, :length].tobytes().decode() for index, length in enumerate(lengths.tolist())
    ]


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
