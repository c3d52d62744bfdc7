"""Flags of several commands, and what they set before a command runs."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from jaximm.cli.errors import UsageError
from jaximm.cli.output import tell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every command.

    Attributes:
      traceback: on an error, show where in the code it arose.
    """

    traceback: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiling(Common):
    """Flags of commands that compile more than they run.

    Attributes:
      no_cache: keep no compiled programs on disk. By default they are, in
        JAX_COMPILATION_CACHE_DIR or the user's cache folder, and the next call finds them.
      full_optimisation: compile with all of XLA's optimisations. By default with few, which is
        faster for programs that run for seconds.
    """

    shares_cores: ClassVar[bool] = False  # it starts processes that compile beside each other
    no_cache: bool = False
    full_optimisation: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread(Compiling):
    """Flags of commands whose cells may be computed by other processes.

    Attributes:
      workers: so many processes of this machine compute cells; by default this one does.
      scheduler: workers of the Dask scheduler at ADDRESS compute cells. They must see the same
        files and packages.
    """

    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    scheduler: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None


def executor_of(args: Spread) -> Callable[[], Executor] | None:
    """What starts the workers that the flags ask for; None: they ask for none.

    Raises:
      UsageError: both, or no number of workers.
    """
    if args.workers is not None and args.scheduler is not None:
        raise UsageError("--workers are of this machine, --scheduler has its own: give one.")
    if args.workers is None and args.scheduler is None:
        return None
    from jaximm.assessment import workers

    if args.scheduler is not None:
        return functools.partial(workers.cluster, args.scheduler)
    assert args.workers is not None
    if args.workers < 1:
        raise UsageError(f"--workers takes a number of at least 1, got {args.workers}.")
    return functools.partial(workers.processes, args.workers)


def set_compilation(args: Compiling) -> str:
    """Sets how programs are compiled and whether they are kept, and gives the line that says it.

    JAX is not imported yet.
    """
    from jaximm import compilation

    set_before = bool(os.environ.get(compilation.FLAGS))
    if args.full_optimisation:
        compilation.optimise_fully()
    else:
        compilation.compile_quickly(one_thread=args.shares_cores)
    how = "with few optimisations (--full-optimisation: with all)"
    if args.full_optimisation:
        how = "with all optimisations"
    if set_before:
        how = "as XLA_FLAGS says"
    folder, why = (None, "--no-cache") if args.no_cache else compilation.keep_programs()
    kept = f"kept in {folder} (--no-cache: nowhere)" if folder else f"not kept: {why}"
    return f"programs were compiled {how}; {kept}."


def run_own_file(args: Common) -> None:
    """Runs the file of --load."""
    file = getattr(args, "load", None)
    if file is None:
        return
    if not file.is_file():
        raise UsageError(f"--load takes a Python file, got {file}.")
    from jaximm import registry

    registry.run_file(file)


def load_code_of(run_dirs: Iterable[Path]) -> None:
    """Runs what the configurations of runs need, and says so.

    Raises:
      ValueError: see `jaximm.run.config.load_code`.
    """
    from jaximm.run import config

    files = [file for path in run_dirs for file in sorted(path.rglob("config.json"))]
    config.load_code(files, tell=tell)
