"""Batches of cells that other processes compute, through any `concurrent.futures.Executor`.

The assessment stays one process, which alone chooses, reads and writes. Where a batch is not in its
store, it asks for it (`cells.Asked`) by a plain description, `Work`; a worker builds the bench once
and computes what it is asked for; what had asked begins anew and finds the batch. So the folder in
the end is that of an assessment without workers, file by file, whatever order batches come in, and
a worker that dies loses the batch that it was at, which is asked for again.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaximm import registry
from jaximm.assessment import suites
from jaximm.assessment.bench import Bench, Model
from jaximm.assessment.cells import Asked, Store, attempt
from jaximm.assessment.level import Level
from jaximm.assessment.runners import Subject, _probe_run, _weights_run
from jaximm.attacks.grid import Hyper
from jaximm.attacks.probe.problem import Attack
from jaximm.attacks.weights.loop import Execution
from jaximm.attacks.weights.problem import WeightAttack
from jaximm.compilation import FLAGS
from jaximm.records.files import plain

Result = TypeVar("Result")
Rebuild = Callable[[], tuple[Bench, Sequence[Model]]]

PATIENCE = 3
"""How often in a row workers may end without a batch."""


class Work(NamedTuple):
    """One batch of cells: all that computes it beside the bench; it can be pickled."""

    model: str
    task: str
    attacker: str
    level: Level
    execution: Execution
    steps: int
    rows: int  # the most that are measured of any task
    split: str
    cells: tuple[Hyper, ...]
    seeds: tuple[int, ...]
    stops: tuple[int, ...]


def perform(subject: Subject, attack: Attack | WeightAttack, work: Work) -> Mapping[str, Any]:
    """What a batch finds, as plain data."""
    run = _probe_run if isinstance(attack, Attack) else _weights_run
    return run(
        subject,
        attack,
        level=work.level,
        steps=work.steps,
        execution=work.execution,
        split=work.split,
        cells=work.cells,
        seeds=work.seeds,
        stops=work.stops,
        rows=work.rows,
    )


WAITING = 20
"""Seconds that a scheduler, and its first worker, have to be there."""


class Workers(NamedTuple):
    """Who computes batches.

    Attributes:
      start: gives an executor; again where its processes ended.
      rebuild: gives the bench and its models in a worker: a function that can be pickled. What it
        gives must be what the assessment was given.
    """

    start: Callable[[], futures.Executor]
    rebuild: Rebuild


class _Settings(NamedTuple):
    """Of the assessment's process: what the last digits of numbers depend on, and the user's code
    that it ran, such as attackers of his own."""

    x64: bool
    flags: str
    code: tuple[registry.Origin, ...]


def processes(count: int) -> futures.Executor:
    """That many processes of this machine.

    Raises:
      ValueError: fewer than one.
    """
    if count < 1:
        raise ValueError(f"there must be at least 1 worker, got {count}.")
    return futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def cluster(address: str) -> futures.Executor:
    """The workers of a Dask scheduler, which must see the same files and packages.

    Raises:
      ValueError: the package is missing, nobody answers, or there are no workers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(
            'a scheduler needs the package distributed: pip install "jaximm[cluster]".'
        ) from error
    try:
        client = Client(address, timeout=f"{WAITING}s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no scheduler answers at {address!r} ({error}): start one with `dask scheduler`, and "
            "workers with `dask worker ADDRESS`."
        ) from error
    try:
        client.wait_for_workers(1, timeout=WAITING)
    except TimeoutError as error:  # or it would wait for ever, and say nothing
        client.close()
        raise ValueError(
            f"the scheduler at {address!r} has no workers: start some with `dask worker {address}`."
        ) from error
    return client.get_executor(pure=False, retries=PATIENCE)


@contextlib.contextmanager
def interrupts_ignored() -> Generator[None]:
    """Processes started inside leave Ctrl-C, which reaches all of them, to this one."""
    if threading.current_thread() is not threading.main_thread():  # only that one may choose
        yield
        return
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextlib.contextmanager
def ended() -> Generator[None]:
    """Ends processes that were started inside if what is inside is left by an exception: what they
    are at would take minutes."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        raise


_Waiting = dict["futures.Future[dict[str, Any]]", tuple[int, Asked, "futures.Executor | None"]]
"""The job that each batch is for, what it asked for, and who computes it."""


class Crew:
    """An executor with what its workers need; without `Workers`, this process itself."""

    def __init__(self, workers: Workers | None, store: Store):
        self._workers, self._store = workers, store
        self._executor: futures.Executor | None = None
        self._ends = 0  # of executors, since a batch came
        if workers is not None:
            try:
                self._rebuild = pickle.dumps(workers.rebuild)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"rebuild must be a function that can be pickled, of a module: {error}."
                ) from error
            flags = os.environ.get(FLAGS, "")
            self._settings = _Settings(_is_double(), flags, registry.files_run())

    def all(self, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of jobs, each begun anew until all of its batches are there."""
        if self._workers is None:
            return [job() for job in jobs]
        results: dict[int, Result] = {}
        waiting: _Waiting = {}
        with ended():
            try:
                self._work_through(jobs, results, waiting)
            except BaseException:
                self._stop(waiting)
                raise
        return [results[number] for number in range(len(jobs))]

    def _work_through(
        self,
        jobs: Sequence[Callable[[], Result]],
        results: dict[int, Result],
        waiting: _Waiting,
    ) -> None:
        ready = list(range(len(jobs)))
        while ready or waiting:
            for number in ready:
                try:
                    results[number] = jobs[number]()
                except Asked as asked:
                    future = self._submit(asked.work)
                    waiting[future] = number, asked, self._executor
            ready = []
            for future in futures.wait(waiting, return_when=futures.FIRST_COMPLETED).done:
                number, asked, executor = waiting.pop(future)
                ready.append(number)
                try:
                    self._store.put(asked, future.result())
                    self._ends = 0
                except futures.BrokenExecutor:
                    if executor is self._executor:  # or another has taken its place
                        self._restart()

    def _submit(self, work: Work) -> futures.Future[dict[str, Any]]:
        assert self._workers is not None
        while True:
            if self._executor is None:
                self._executor = self._workers.start()
            try:
                with interrupts_ignored():
                    return self._executor.submit(compute, self._rebuild, self._settings, work)
            except futures.BrokenExecutor:
                self._restart()

    def _restart(self) -> None:
        """Another executor, for what was lost with the one before."""
        self.close()
        self._ends += 1
        if self._ends > PATIENCE:
            raise RuntimeError(
                f"workers ended {self._ends} times in a row without a batch, killed from outside "
                "or for want of memory; batches that came are kept. Try fewer workers."
            )

    def _stop(self, waiting: _Waiting) -> None:
        """Begins no batch more. A pool cancels what waits by itself, in its own order: one whose
        futures were cancelled by others prints a traceback when its processes are ended."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        try:
            executor.shutdown(wait=False, cancel_futures=True)
        except TypeError:  # Dask's takes no such argument
            for future in waiting:
                future.cancel()
            executor.shutdown(wait=False)

    def close(self) -> None:
        """Ends the executor."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
        self._executor = None


def compute(rebuild: bytes, settings: _Settings, work: Work) -> dict[str, Any]:
    """One batch, in a worker: as `attempt` gives it, in plain data.

    Raises:
      RuntimeError: the worker compiles otherwise than the assessment, or has other code.
      ValueError: the user's code cannot be run.
    """
    _settle(settings)
    with jax.enable_x64(settings.x64):
        subject = _subject(rebuild, work.model, work.task)
        attack, _ = suites.chosen(work.level, [work.attacker])[work.attacker]
        return plain(attempt(functools.partial(perform, subject, attack, work)))


def _is_double() -> bool:
    return jnp.zeros(()).dtype == jnp.float64


_flags: list[str] = []
"""Of this worker, from its first batch on: they are read once."""


def _settle(settings: _Settings) -> None:
    if not _flags:
        os.environ[FLAGS] = settings.flags
        _flags.append(settings.flags)
        registry.load_entry_points()
    if _flags[0] != settings.flags:
        raise RuntimeError(
            f"this worker compiles with {FLAGS}={_flags[0]!r}, the assessment with "
            f"{settings.flags!r}, and the last digits depend on it: give it workers of its own."
        )
    for origin in settings.code:
        if registry.last_run(Path(origin.file)) != origin:
            _, ran = registry.run_file(Path(origin.file))
            if ran != origin:
                raise RuntimeError(f"{origin.file} is not as the assessment ran it: start again.")


_held = threading.local()
"""Of this worker: the bench, its models, and the subject of the batch before."""


def _subject(rebuild: bytes, label: str, task: str) -> Subject:
    if getattr(_held, "rebuild", None) != rebuild:
        _held.subject = None
        _held.bench, models = pickle.loads(rebuild)()
        _held.models = {model.label: model for model in models}
        _held.rebuild = rebuild
    subject: Subject | None = _held.subject
    if subject is None or (subject.model.label, subject.task) != (label, task):
        subject = _held.subject = Subject(_held.bench, _held.models[label], task)
    return subject
