"""Readers of files against damaged ones, each reader in a process of its own with bounds on it.

Tests call `run_jobs`; this file is also the program that it starts, once for all jobs::

    python fuzz_worker.py FOLDER

The program imports every target once and then forks a child for each job, so that a hundred mutants
a reader cost one import. A child that ends by a signal, or outlives its alarm, is reported with the
mutant it had before it. Mutants are made here by bytes (`flip`); by structure in the tests.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 10
"""A mutant may take."""

MEMORY = 1 << 30
"""Bytes that a child may take beyond what its imports did."""


class Job(NamedTuple):
    """One reader and its mutants.

    Attributes:
      target: "module:function", called with the path of a file; a module of tests/ will do.
      suffix: of the files.
      mutants: their contents.
    """

    target: str
    suffix: str
    mutants: list[bytes]


class Report(NamedTuple):
    """What became of one job's mutants.

    Attributes:
      outcomes: a mutant each: "read", or the names of the exception's classes, its own first.
      messages: of the exceptions; "" where there was none.
      seconds: a mutant each.
      grown: bytes, the largest resident size beyond that before the first mutant.
    """

    outcomes: list[list[str]]
    messages: list[str]
    seconds: list[float]
    grown: int

    def refused(self, name: str) -> int:
        """How many raised an exception of that class."""
        return sum(name in outcome for outcome in self.outcomes)

    def others(self, name: str) -> list[tuple[int, list[str], str]]:
        """Mutants that were neither read nor refused by that class, with what they did."""
        return [
            (index, outcome, self.messages[index])
            for index, outcome in enumerate(self.outcomes)
            if outcome != ["read"] and name not in outcome
        ]


def run_jobs(jobs: dict[str, Job], folder: Path, *, timeout: float = 600) -> dict[str, Report]:
    """Every job in a process of its own, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, job in jobs.items():
        (folder / f"{name}.job").write_bytes(pickle.dumps(tuple(job)))
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: _report(folder / f"{name}.out", len(job.mutants)) for name, job in jobs.items()}


def mutants(seeds: Iterable[bytes], count: int, *, seed: int, by: Callable[..., bytes]) -> list:
    """`count` mutants of some files, in turn, by ``by(content, rng)``; a fixed `seed`."""
    rng, seeds = random.Random(seed), list(seeds)
    return [by(seeds[index % len(seeds)], rng) for index in range(count)]


def flip(content: bytes, rng: random.Random) -> bytes:
    """One to four damages by bytes: changed, cut off, cut out, repeated, or put in."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        end = min(len(made), at + rng.choice((1, 2, 4, 8, 40)))
        kind = rng.randrange(6)
        if kind == 0:
            made[at:end] = rng.randbytes(end - at)
        elif kind == 1:
            made[at:end] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * (end - at)
        elif kind == 2:
            del made[at:]
        elif kind == 3:
            del made[at:end]
        elif kind == 4:
            made[at:at] = made[at:end] * rng.choice((1, 3, 50))
        else:
            made[at:at] = rng.randbytes(end - at)
    return bytes(made)


def _report(path: Path, count: int) -> Report:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    *rows, last = rows
    assert len(rows) == count or "ended" in last
    if "ended" in last:  # what the child was at when it ended
        rows.append({"outcome": [last["ended"]], "message": "", "seconds": last["seconds"]})
    return Report(
        [row["outcome"] for row in rows],
        [row["message"] for row in rows],
        [row["seconds"] for row in rows],
        last["grown"],
    )


def _main(folder: Path) -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    jobs = {
        path.stem: Job(*pickle.loads(path.read_bytes())) for path in sorted(folder.glob("*.job"))
    }
    targets = {name: _target(job.target) for name, job in jobs.items()}
    for name, job in jobs.items():
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(targets[name], job, folder, name)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            ended = signal.Signals(-code).name if code < 0 else f"exit {code}"
            row = {"ended": ended, "seconds": time.monotonic() - started, "grown": 0}
            with open(folder / f"{name}.out", "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


def _target(text: str) -> Any:
    module, _, function = text.partition(":")
    return getattr(importlib.import_module(module), function)


def _child(target: Any, job: Job, folder: Path, name: str) -> None:
    """Runs all mutants of a job and leaves the process."""
    size = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    start = _status("VmRSS")
    path = folder / f"{name}{job.suffix}"
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no exception: C code would not see one
    with open(folder / f"{name}.out", "w", encoding="utf-8") as out:
        for content in job.mutants:
            path.write_bytes(content)
            outcome, message, started = ["read"], "", time.monotonic()
            signal.alarm(SECONDS)
            try:
                target(path)
            except BaseException as error:
                outcome = [kind.__name__ for kind in type(error).__mro__]
                message = ascii(str(error)[:300])
            signal.alarm(0)
            row = {"outcome": outcome, "message": message, "seconds": time.monotonic() - started}
            out.write(json.dumps(row) + "\n")
            out.flush()
        out.write(json.dumps({"grown": max(0, _status("VmHWM") - start)}) + "\n")
    os._exit(0)


def _status(key: str) -> int:
    """Bytes, of this process, from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
