"""The run function of every immuniser: batches in, updates on device, one line of metrics a chunk.

Steps run on device in chunks of ``log_every``: one compiled ``while_loop`` whose bounds are traced,
so the last, shorter chunk and a resumed run use the same executable and hence give the same bits.
The host is reached once a chunk. Batch ``t`` and key ``t`` are functions of ``(seed, t)`` alone.

With a `jaximm.training.Parallel` the whole chunk, its loop included, runs inside the map over
devices: each gathers its own rows of batch ``t``, and the host still sees one chunk at a time.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaximm.checkpoint import TrainCheckpoints
from jaximm.training.parallel import Parallel, wrap
from jaximm.training.stops import Noting, Stopped, largest
from jaximm.types import Immuniser, Info, Json, PairedBatch, Params, State, as_argument

Record = Json
"""One logged step: ``step`` (updates done), then Python numbers by name."""

_INIT_FOLD = np.uint32(0xFFFFFFFF)  # the key of `init`: no step number can collide with it


class FitResult(NamedTuple):
    """A finished run.

    ``trajectory`` has one record a logged step, of the whole run, also where it was resumed.
    ``seconds`` is wall-clock time, compilation included, summed over the parts of a resumed run;
    ``step_seconds`` that of an update of this part alone, without compilation, monitors and
    checkpoints: NaN where no update was made but the first, which compiles on the host.
    ``resumed_from`` is the step this call started at (0 for a fresh run); ``skipped`` the damaged
    checkpoints it passed over (only with ``strict=False``). On many devices, ``params`` and
    ``state`` are one copy, on one device of this process.
    """

    params: Params
    state: State
    trajectory: list[Record]
    seconds: float
    step_seconds: float
    steps_done: int
    resumed_from: int
    skipped: tuple[int, ...]


class MetricsLog:
    """A ``metrics.jsonl``: one JSON object a line, flushed as it is written.

    Non-finite numbers, which JSON lacks, are written as the strings "nan", "inf" and "-inf";
    `read_metrics` turns them back.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, record: Record) -> None:
        """Adds one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_to_line(record))

    def rewrite(self, records: Iterable[Record]) -> None:
        """Replaces the file by ``records``, at once: a kill leaves the old file or the new one."""
        fresh = self.path.with_name(self.path.name + ".tmp")
        fresh.write_text("".join(map(_to_line, records)), encoding="utf-8")
        fresh.replace(self.path)


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a ``metrics.jsonl``, in order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is not a JSON object; names the file and the line.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = {key: _from_json(value) for key, value in json.loads(line).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a metrics record ({error}).") from error
        records.append(record)
    return records


def fit(
    immuniser: Immuniser,
    params: Params,
    batch_fn: Callable[..., PairedBatch],
    *,
    seed: int,
    steps: int,
    log_every: int,
    measure_fn: Callable[[Params], dict[str, float]] | None = None,
    checkpoints: TrainCheckpoints | None = None,
    checkpoint_every: int | None = None,
    checkpoint_seconds: float | None = None,
    resume: bool = False,
    strict: bool = True,
    log: MetricsLog | None = None,
    progress: Callable[[int, Record], None] | None = None,
    foretell: Callable[[int, float], None] | None = None,
    parallel: Parallel | None = None,
    loop: Literal["device", "host"] = "device",
) -> FitResult:
    """Runs ``steps`` updates of an immuniser.

    Step ``t`` (from 0) sees ``batch_fn(t)`` and the key ``fold_in(key(seed), t)``. A record is made
    after every ``log_every`` updates and after the last: ``step`` (updates done), each field of the
    immuniser's info as it was at that step, its mean since the record before as ``<field>_mean``
    (floating fields only), and what ``measure_fn`` returns. A resumed run gives bit for bit the
    numbers of an uninterrupted one on one device.

    Args:
      immuniser: see `jaximm.types.Immuniser`. Its info is a NamedTuple of scalars. If the info has
        a field ``task_loss``, or the state a field ``params``, each must stay finite. Reuse the
        same immuniser object for runs of equal shapes: they share one compilation.
      params: start of the backbone; copied, so the caller's arrays stay valid.
      batch_fn: traceable, a pure function of the int32 step. Give large data as arguments of a
        ``jax.tree_util.Partial`` rather than in a closure: they are then inputs of the compiled
        loop, not constants in it, and data sets of one shape share a compilation. On several
        devices it must also take ``part=(index, count)`` and return that part of the rows, as
        `jaximm.data.paired_batch` does; the data in a Partial are copied to every device.
      seed: of the keys of ``init`` and of every step.
      steps: updates to do in all, >= 0, earlier parts of a resumed run included.
      log_every: updates between two records, >= 1; need not divide ``steps``.
      measure_fn: called with ``immuniser.finish(state)`` at each record; its numbers join the
        record. It must not keep the arrays: the next chunk reuses their memory.
      checkpoints: an entered `TrainCheckpoints`; the last step is always saved, and on disk when
        this returns. The numbers of the record are its metrics, by which it may keep the best.
      checkpoint_every: also save at the first record at or after each multiple of it.
      checkpoint_seconds: also save at the first record this long after the last save.
      resume: continue from the newest checkpoint, if there is one.
      strict: if that one is damaged, refuse (True) or fall back to an older one (False).
      log: where records are appended. A resumed run first cuts it back to the restored step.
      progress: called with ``(steps done, record)`` after each record.
      foretell: called once, early, with the number of updates that are left and the seconds that
        each takes, as measured after compiling.
      parallel: the devices to run on, from `jaximm.training.make_parallel`, or from `make_sharded`
        to spread parameters over them (results stay so); None: one device, without any placement.
        Parameters agree with those of one device up to the order of sums.
        Checkpoints hold one copy of the state, so a run may go on with other devices, another
        kind, or none. With several processes all of them call this alike; ``log`` and ``progress``
        are process 0's alone, ``measure_fn`` runs in each, on its own copy.
      loop: who drives the steps between two records. "device": one compiled loop. "host": a
        compiled step, called again and again without waiting for its result; for convolutions on
        CPU, which XLA runs some 50 times slower inside a compiled loop.

    Raises:
      ValueError: an argument out of range; rows that the devices do not divide, or a ``batch_fn``
        that cannot split them; checkpoints there and ``resume=False``; or a checkpoint of another
        seed, of another tree, or past ``steps``.
      FloatingPointError: ``task_loss`` or the parameters stopped being finite; names the step (the
        number of updates done, the bad one included) and its metrics. Earlier checkpoints are on
        disk by then.
      CheckpointError: see `TrainCheckpoints`.
      Stopped: with checkpoints, at the first record after Ctrl-C or SIGTERM, which is saved. A
        second one ends the run at once.
    """
    _check_arguments(steps, log_every, checkpoints, checkpoint_every, checkpoint_seconds, resume)
    started = time.perf_counter()
    root_key = jax.random.key(seed)
    # Donation needs buffers of our own, and one each: `init` may return `params` itself, or twice.
    state = jax.tree.map(_owned, immuniser.init(params, jax.random.fold_in(root_key, _INIT_FOLD)))
    if not isinstance(batch_fn, jax.tree_util.Partial):  # wrapping one again would hide its data
        batch_fn = jax.tree_util.Partial(batch_fn)
    info = _info_shapes(immuniser, state, batch_fn, root_key) if steps else ()
    info_names = getattr(info, "_fields", ())
    if parallel is not None and steps:
        _check_parts(batch_fn, parallel)
    if loop not in ("device", "host"):
        raise ValueError(f'loop must be "device" or "host", got {loop!r}.')
    devices = _OneDevice() if parallel is None else _ManyDevices(parallel)
    if jax.process_index():
        log, progress, foretell = None, None, None
    clock = _Clock(steps, foretell)
    run = devices.run
    if loop == "host":
        run = functools.partial(_run_from_host, devices, info, clock)
    done, earlier, trajectory, skipped = 0, 0.0, [], ()
    restored = None
    if checkpoints is not None and resume:
        restored = checkpoints.restore_latest(devices.like(state), strict=strict)
    if restored is None:
        state = devices.place(state)
    else:
        _check_checkpoint(restored.step, restored.metadata, seed, steps)
        done, skipped = restored.step, restored.skipped
        state = devices.from_checkpoint(restored.state)
        earlier = restored.metadata["seconds"]
        trajectory = [
            {key: _from_json(value) for key, value in record.items()}
            for record in restored.metadata["trajectory"]
        ]
    if log is not None:
        log.rewrite(trajectory)
    resumed_from = done
    if done < steps:
        update = as_argument(immuniser.update)
        update, batch_fn, root_key = devices.place_inputs(update, batch_fn, root_key)
        if loop == "device":  # no step: what is compiled now is not part of the first chunk's time
            state, _ = run(update, state, batch_fn, root_key, done, done)
            jax.block_until_ready(state)
    saved_at = time.monotonic()
    with Noting(active=checkpoints is not None) as signals:
        while done < steps:
            stop = min(done + log_every - done % log_every, steps)
            clock.start(done)
            state, chunk = run(update, state, batch_fn, root_key, done, stop)  # pyrefly: ignore[unbound-name]
            reached, is_finite, last, mean = jax.device_get(devices.one_copy(chunk))
            clock.stop(stop)
            record = _make_record(int(reached), info_names, last, mean)
            if not is_finite:
                if checkpoints is not None:
                    checkpoints.wait()
                raise FloatingPointError(
                    f"task loss or parameters not finite at step {int(reached)}: {record}."
                )
            if measure_fn is not None:
                _add_measures(record, measure_fn(immuniser.finish(devices.one_copy(state))))
            trajectory.append(record)
            if log is not None:
                log.append(record)
            now = time.monotonic()
            is_late = checkpoint_seconds is not None and now - saved_at >= checkpoint_seconds
            number, late = largest(signals.number, int(is_late))
            is_due = _is_due(done, stop, steps, checkpoint_every) or late or number
            if checkpoints is not None and is_due:
                saved_at = now
                seconds = earlier + time.perf_counter() - started
                kept = [{key: _to_json(value) for key, value in row.items()} for row in trajectory]
                metadata = {"seed": seed, "seconds": seconds, "trajectory": kept}
                finite = {key: value for key, value in record.items() if math.isfinite(value)}
                checkpoints.save(stop, devices.to_checkpoint(state), metadata, metrics=finite)
            done = stop
            if progress is not None:
                progress(done, record)
            if number and done < steps and checkpoints is not None:
                checkpoints.wait()
                raise Stopped(f"step {done:,} of {steps:,} is kept", number)
    state = devices.one_copy(state)
    finished = immuniser.finish(state)
    if not _all_finite(finished):
        if checkpoints is not None:
            checkpoints.wait()
        raise FloatingPointError(
            f"finish() gave parameters that are not finite after step {done}: "
            f"{trajectory[-1] if trajectory else 'no step was run'}."
        )
    jax.block_until_ready(finished)
    if checkpoints is not None:
        checkpoints.wait()
    seconds = earlier + time.perf_counter() - started
    return FitResult(
        finished, state, trajectory, seconds, clock.step_seconds, done, resumed_from, skipped
    )


class _Clock:
    """Time that updates take, from a moment after the first compilation."""

    def __init__(self, steps: int, foretell: Callable[[int, float], None] | None) -> None:
        self._steps, self._foretell = steps, foretell
        self._updates, self._seconds = 0, 0.0
        self._at, self._began = 0, 0.0
        self.is_warm = False  # on the host, whether a step was made and then waited for

    @property
    def is_new(self) -> bool:
        """Whether somebody waits for the first measured update."""
        return self._foretell is not None

    @property
    def step_seconds(self) -> float:
        """Of an update; NaN before one was measured."""
        return self._seconds / self._updates if self._updates else math.nan

    def start(self, done: int) -> None:
        self._at, self._began = done, time.perf_counter()

    def stop(self, done: int) -> None:
        """After the updates up to `done`, which were waited for."""
        self._updates += done - self._at
        self._seconds += time.perf_counter() - self._began
        self.start(done)
        if self._foretell is not None and self._updates:
            self._foretell(self._steps - done, self.step_seconds)
            self._foretell = None


class _OneDevice:
    """Where arrays live in a plain run: nothing is placed anywhere."""

    def place(self, state):
        return state

    def place_inputs(self, *inputs):
        return inputs

    def run(self, update, state, batch_fn, root_key, start, stop):
        return _run_chunk(update, state, batch_fn, root_key, jnp.int32(start), jnp.int32(stop))

    def step(self, update, carry, batch_fn, root_key):
        return _run_step(update, carry, batch_fn, root_key)

    one_copy = like = to_checkpoint = from_checkpoint = place


class _ManyDevices:
    """Where arrays live in a run on the devices of a `Parallel`."""

    def __init__(self, parallel: Parallel) -> None:
        self.place = parallel.put
        self.one_copy = parallel.one_copy
        self.like = parallel.abstract
        self.to_checkpoint = parallel.replicated
        self.from_checkpoint = parallel.from_replicated
        self._put = parallel.put_shared
        self._chunk = _parallel_chunk(parallel)
        self._step = _parallel_step(parallel)
        # Steps dispatched ahead starve the collectives of simulated devices of their threads.
        self._wait = len(parallel.devices) > 1 and parallel.devices[0].platform == "cpu"

    def place_inputs(self, *inputs):
        return self._put(inputs)

    def run(self, update, state, batch_fn, root_key, start, stop):
        bounds = self._put((np.int32(start), np.int32(stop)))
        return self._chunk(update, state, batch_fn, root_key, *bounds)

    def step(self, update, carry, batch_fn, root_key):
        carry = self._step(update, carry, batch_fn, root_key)
        return jax.block_until_ready(carry) if self._wait else carry


class _Carry(NamedTuple):
    """What goes from step to step: the state, and what a record is made of."""

    state: State
    step: Int[Array, ""]
    reached: Int[Array, ""]
    finite: Bool[Array, ""]
    last: tuple[Array, ...]
    total: tuple[Array, ...]


def _run_from_host(devices, info, clock, update, state, batch_fn, root_key, start, stop):
    """`_run_chunk`, with one call a step; after a step that is not finite the rest is noise."""
    zeros = tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in info)
    counts = jnp.int32(start), jnp.int32(start), jnp.asarray(True)
    # Copies: donated buffers must be each used once.
    tally = devices.place(jax.tree.map(jnp.copy, (*counts, zeros, zeros)))
    carry = _Carry(state, *tally)
    for step in range(start, stop):
        carry = devices.step(update, carry, batch_fn, root_key)
        if not clock.is_warm:  # it compiled
            jax.block_until_ready(carry)
            clock.start(step + 1)
            clock.is_warm = True
        elif clock.is_new:  # how long the rest will take is said at once
            jax.block_until_ready(carry)
            clock.stop(step + 1)
    last = carry.last
    count = jnp.maximum(carry.reached - start, 1)
    mean = tuple(a / count.astype(a.dtype) if _is_float(a) else a for a in carry.total)
    return carry.state, _Chunk(carry.reached, carry.finite, last, mean)


@functools.partial(jax.jit, donate_argnames="carry")
def _run_step(update, carry, batch_fn, root_key) -> _Carry:
    return _one_step(update, carry, batch_fn, root_key)


@functools.lru_cache(maxsize=64)
def _parallel_step(parallel: Parallel):
    """`_run_step` on the devices of a `Parallel`."""

    def step(update, carry, batch_fn, root_key):
        return _one_step(update, carry, _own_rows(batch_fn, parallel), root_key)

    return wrap(step, parallel, rows=(False,) * 4)


def _one_step(update, carry: _Carry, batch_fn, root_key) -> _Carry:
    """One update; the first that is not finite stops the count."""
    state, step, reached, finite, last, total = carry
    state, info = update(state, batch_fn(step), jax.random.fold_in(root_key, step))
    info = tuple(jnp.asarray(value) for value in info)
    last = tuple(jnp.where(finite, new, old) for new, old in zip(info, last, strict=True))
    total = tuple(
        jnp.where(finite, jnp.add(old, new).astype(old.dtype), old)
        for new, old in zip(info, total, strict=True)
    )
    reached = reached + finite.astype(reached.dtype)
    return _Carry(state, step + 1, reached, finite & _is_finite(state, info), last, total)


def _own_rows(batch_fn, parallel: Parallel):
    """``batch_fn`` inside a step on several devices: this device's rows."""
    part = parallel.part()
    own = batch_fn if part is None else functools.partial(batch_fn, part=part)
    return lambda step: parallel.spread(own(step))


class _Chunk(NamedTuple):
    reached: Int[Array, ""]  # updates done; below `stop` only if something is not finite
    finite: Bool[Array, ""]
    last: tuple[Array, ...]
    mean: tuple[Array, ...]


@functools.partial(jax.jit, donate_argnames="state")
def _run_chunk(update, state, batch_fn, root_key, start, stop) -> tuple[State, _Chunk]:
    """Updates from ``start`` to ``stop``, ending early at the first that is not finite."""
    return _updates(update, state, batch_fn, root_key, start, stop)


@functools.lru_cache(maxsize=64)
def _parallel_chunk(parallel: Parallel):
    """`_run_chunk` on the devices of a `Parallel`, every argument in the form it takes."""

    def chunk(update, state, batch_fn, root_key, start, stop):
        rows = _own_rows(batch_fn, parallel)
        return _updates(update, state, rows, root_key, start, stop)

    return wrap(chunk, parallel, rows=(False,) * 6)


def _updates(update, state, batch_fn, root_key, start, stop) -> tuple[State, _Chunk]:
    def advance(state, step):
        return update(state, batch_fn(step), jax.random.fold_in(root_key, step))

    def body(carry):
        state, step, _, _, total = carry
        state, info = advance(state, step)
        last = tuple(jnp.asarray(value) for value in info)
        total = tuple(jnp.add(a, b).astype(a.dtype) for a, b in zip(total, last, strict=True))
        return state, step + 1, _is_finite(state, info), last, total

    def more(carry):
        _, step, finite, _, _ = carry
        return (step < stop) & finite

    shapes = jax.eval_shape(advance, state, start)[1]
    zeros = tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)
    carry = (state, start, jnp.asarray(True), zeros, zeros)
    state, reached, finite, last, total = lax.while_loop(more, body, carry)
    count = jnp.maximum(reached - start, 1)
    mean = tuple(a / count.astype(a.dtype) if _is_float(a) else a for a in total)
    return state, _Chunk(reached, finite, last, mean)


def _is_finite(state: State, info: Info) -> Bool[Array, ""]:
    watched = [getattr(info, "task_loss", None), getattr(state, "params", None)]
    return _all_finite(watched)


def _all_finite(tree: Params) -> Bool[Array, ""]:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in leaves if _is_inexact(leaf)]
    return functools.reduce(jnp.logical_and, checks, jnp.asarray(True))


def _is_inexact(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _is_float(array: Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _owned(leaf: Any) -> Array:
    """A copy without weak type, which would make the second chunk compile again."""
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jnp.copy(array)
    return lax.convert_element_type(jnp.copy(array), array.dtype)


def _info_shapes(immuniser, state, batch_fn, root_key) -> Info:
    """The info of an update, as shapes."""
    info = jax.eval_shape(
        lambda state, step: immuniser.update(state, batch_fn(step), root_key), state, jnp.int32(0)
    )[1]
    names = getattr(info, "_fields", None)
    if names is None or any(getattr(value, "shape", None) != () for value in info):
        raise ValueError(f"an immuniser's info must be a NamedTuple of scalars, got {info}.")
    return info


def _check_parts(batch_fn: Callable, parallel: Parallel) -> None:
    """Whether every device gets an equal part of a batch, before anything is compiled."""
    if parallel.row_parts == 1:
        return
    count, step = parallel.row_parts, jax.ShapeDtypeStruct((), jnp.int32)
    for leaf in jax.tree.leaves(jax.eval_shape(batch_fn, step)):
        if leaf.shape[0] % count:
            raise ValueError(
                f"a batch of {leaf.shape[0]} rows does not divide by {count} devices; choose a "
                'batch_size that does, or rows="whole" in jaximm.training.make_parallel.'
            )
    if parallel.kind == "jit":
        return
    try:
        inspect.signature(batch_fn).bind(step, part=(0, count))
    except TypeError as error:
        raise ValueError(
            "on several devices batch_fn must take part=(index, count) and return that part of "
            f"the batch's rows, as jaximm.data.paired_batch does ({error})."
        ) from error
    whole = jax.eval_shape(batch_fn, step)
    part = jax.eval_shape(functools.partial(batch_fn, part=(0, count)), step)
    expected = jax.tree.map(lambda leaf: (leaf.shape[0] // count, *leaf.shape[1:]), whole)
    came = jax.tree.map(lambda leaf: leaf.shape, part)
    if came != expected:
        raise ValueError(
            f"batch_fn(step, part=(0, {count})) must return 1/{count} of the rows, {expected}, "
            f"got {came}."
        )


def _make_record(step: int, names: tuple[str, ...], last, mean) -> Record:
    record: Record = {"step": step}
    for name, value in zip(names, last, strict=True):
        record[name] = value.item()
    for name, value in zip(names, mean, strict=True):
        if _is_float(value):
            record[f"{name}_mean"] = value.item()
    return record


def _add_measures(record: Record, measures: dict[str, float]) -> None:
    clash = sorted(record.keys() & measures.keys())
    if clash:
        raise ValueError(f"measure_fn returned {clash}, which the record has already; rename them.")
    record.update({name: float(value) for name, value in measures.items()})


def _is_due(done: int, stop: int, steps: int, every: int | None) -> bool:
    return stop == steps or (every is not None and stop // every > done // every)


def _check_arguments(
    steps, log_every, checkpoints, checkpoint_every, checkpoint_seconds, resume
) -> None:
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}.")
    if log_every < 1:
        raise ValueError(f"log_every must be >= 1, got {log_every}.")
    if checkpoints is None:
        if resume or checkpoint_every is not None or checkpoint_seconds is not None:
            raise ValueError(
                "resume, checkpoint_every and checkpoint_seconds need "
                "checkpoints=TrainCheckpoints(...)."
            )
        return
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be >= 1, got {checkpoint_every}.")
    if checkpoint_seconds is not None and not checkpoint_seconds > 0:
        raise ValueError(f"checkpoint_seconds must be > 0, got {checkpoint_seconds}.")
    if not resume and checkpoints.all_steps():
        raise ValueError(
            f"{checkpoints.directory} already holds steps {checkpoints.all_steps()}; "
            "pass resume=True or use another directory."
        )


def _check_checkpoint(step: int, metadata: Json, seed: int, steps: int) -> None:
    if metadata["seed"] != seed:
        raise ValueError(f"the checkpoint was made with seed {metadata['seed']}, not {seed}.")
    if step > steps:
        raise ValueError(f"the checkpoint is at step {step}, past steps={steps}.")


def _to_json(number: float | str) -> float | str:
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number


def _from_json(number: float | str) -> float | str:
    return float(number) if number in ("nan", "inf", "-inf") else number


def _to_line(record: Record) -> str:
    return json.dumps({key: _to_json(value) for key, value in record.items()}) + "\n"
