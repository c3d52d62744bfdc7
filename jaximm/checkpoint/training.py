"""The full training state while a run goes on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import orbax.checkpoint as ocp

from jaximm.types import Json, State

if TYPE_CHECKING:
    pass
from jaximm.checkpoint.disk import (
    CheckpointError,
    _line,
    _load_together,
    _quiet_orbax,
    _read_metrics,
    _record,
    _save_args,
    _write_manifest,
)
from jaximm.checkpoint.leaves import (
    _flatten,
    _is_first_process,
    _share,
    _spread_targets,
    _unflatten,
)


class Restored(NamedTuple):
    """A verified training state.

    ``skipped`` lists the newer (or better) steps that were passed over because they are damaged, in
    that order; it is empty unless ``strict=False`` was asked for.
    """

    step: int
    state: State
    metadata: Json
    skipped: tuple[int, ...]


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
        state: State,
        metadata: Json | None = None,
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

    def restore(self, step: int, abstract_state: State) -> Restored:
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
        targets = _spread_targets(abstract_state)
        arrays, record = _load_together(
            self.directory / str(step), place, lambda row: targets.get(row["path"])
        )
        if record.get("step") != step:
            raise CheckpointError(f"{place} is damaged: its record says step {record.get('step')}.")
        return Restored(step, _unflatten(abstract_state, arrays, record, place), record["user"], ())

    def restore_latest(self, abstract_state: State, *, strict: bool = True) -> Restored | None:
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
        newest = self._restore_first(list(reversed(self.all_steps())), abstract_state, strict)
        if newest is not None:
            self._damaged.update(newest.skipped)
        return newest

    def restore_best(self, abstract_state: State, *, strict: bool = True) -> Restored | None:
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
        self, steps: Sequence[int], abstract_state: State, strict: bool
    ) -> Restored | None:
        """The first sound one of ``steps``."""
        skipped: list[int] = []
        problem = ""
        for step in steps:
            try:
                restored = self.restore(step, abstract_state)
            except CheckpointError as error:
                if strict:
                    raise CheckpointError(
                        f"{str(error).rstrip('.')}; strict=False falls back to another step."
                    ) from error
                skipped.append(step)
                problem = problem or str(error)
                continue
            return restored._replace(skipped=tuple(skipped))
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
        reasons = _share("" if cause is None else _line(cause))
        reason = next(filter(None, reasons), None)
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
