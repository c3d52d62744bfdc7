"""The command line: parse, call one library function, print.

Results go to stdout, progress and errors to stderr. Exit code 0: done; 1: failed, with one readable
line; 2: a usage error, unknown names included; 130: stopped from the keyboard; 143: by SIGTERM.

A file a command: the class of its arguments and `run_command`, in a line of `COMMANDS`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shlex
import signal
import sys
import threading
import traceback as traceback_module
import warnings
from collections.abc import Callable, Generator, Sequence
from types import FrameType
from typing import Annotated, Any, Union

import tyro

from jaximm.cli import (
    assess,
    assess_language,
    compare,
    demo,
    export,
    fetch,
    immunise,
    immunise_language,
    language,
    leaderboard,
    listing,
    rebalance,
    report,
    submit,
    suite,
)
from jaximm.cli.common import Common, Compiling, run_own_file, set_compilation
from jaximm.cli.compare import Compare
from jaximm.cli.errors import UsageError, message
from jaximm.cli.immunise import experiment_of
from jaximm.cli.listing import catalogue
from jaximm.cli.output import tell
from jaximm.records.files import FileWarning

__all__ = ["COMMANDS", "UsageError", "catalogue", "experiment_of", "main", "parse"]

RunCommand = Callable[[Any, str], None]
"""``run_command(args, command)``, with arguments of its own command's class."""

COMMANDS: dict[str, tuple[type[Common], RunCommand]] = {
    "list": (listing.List, listing.run_command),
    "immunise": (immunise.Immunise, immunise.run_command),
    "attack": (assess.Attack, assess.run_command),  # before "assess", whose class it extends
    "assess": (assess.Assess, assess.run_command),
    "suite": (suite.Suite, suite.run_command),
    "compare": (compare.Compare, compare.run_command),
    "report": (report.Report, report.run_command),
    "submit": (submit.Submit, submit.run_command),
    "leaderboard": (leaderboard.Leaderboard, leaderboard.run_command),
    "export": (export.Export, export.run_command),
    "rebalance": (rebalance.Rebalance, rebalance.run_command),
    "demo": (demo.Demo, demo.run_command),
    "fetch": (fetch.Fetch, fetch.run_command),
}
"""Command name to the class of its arguments and the function that runs it."""

OF_MODELS: dict[str, tuple[type[Common], RunCommand]] = {
    "immunise": (immunise_language.ImmuniseLanguage, immunise_language.run_command),
    "assess": (assess_language.AssessLanguage, assess_language.run_command),
}
"""The same of commands that are given a language model, in place of an experiment or a run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (without the program name; by default that of the process).

    Returns:
      The exit code, see the module's docstring.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Before NumPy is first imported: LAPACK's own threads only get in the way of XLA's.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with _ended_by_sigterm(), _own_warnings():
        return _main(argv)


def _main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        said = set_compilation(args) if isinstance(args, Compiling) else None
        _start()
        run_own_file(args)
        _run_command(args)(args, shlex.join(["jaximm", *argv]))
        if said is not None:  # of what ran: an error is one line
            tell(said)
        sys.stdout.flush()
    except SystemExit as stop:  # from the parser: help, or a usage error that it has printed
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # `jaximm list | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--traceback" in argv:
            traceback_module.print_exc(file=sys.stderr)
        # A language model's run keeps nothing from which it could go on.
        words = [] if argv[:1] == ["immunise"] and takes_model(argv) else argv
        print(f"jaximm: {message(error, words)}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + getattr(error, "signal", signal.SIGINT)
        return 1 + isinstance(error, UsageError)
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""

    signal = signal.SIGTERM


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _Terminated


@contextlib.contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """So that what can be kept is kept, and the command that goes on is said."""
    if threading.current_thread() is not threading.main_thread():  # only that one may choose
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _own_warnings() -> Generator[None]:
    """A warning of ours is a line of ours, without a place in the source."""
    others = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, FileWarning):
            tell(str(message))
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


def parse(argv: Sequence[str]) -> Common:
    """The command in `argv` as an instance of its class.

    Raises:
      SystemExit: 0 after printing help, 2 after printing a usage error.
    """
    if list(argv) == ["--version"]:
        print(f"jaximm {importlib.import_module('jaximm').__version__}")
        raise SystemExit(0)
    classes = {name: class_ for name, (class_, _) in COMMANDS.items()}
    command = argv[0] if argv else ""
    if takes_model(argv):
        classes[command] = OF_MODELS[command][0]
    if command == "immunise":  # only it pays for reading an experiment's fields
        made = immunise_language if takes_model(argv) else immunise
        classes[command] = made.with_experiment_flags()
    members = tuple(
        Annotated[class_, tyro.conf.subcommand(name=name)] for name, class_ in classes.items()
    )
    # Its members are known at run time only.
    union: Any = Union[members]  # noqa: UP007  # pyrefly: ignore[not-a-type]
    args = tyro.cli(
        union,
        prog="jaximm",
        description="Immunise models, attack them, report what held. Start with `jaximm demo`.",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    if isinstance(args, Compare) and not args.run_dirs:
        print("jaximm: compare needs at least one RUN_DIR.", file=sys.stderr)
        raise SystemExit(2)
    if ("--out", "") in itertools.pairwise(argv) or "--out=" in argv:
        print("jaximm: --out is given without a name.", file=sys.stderr)
        raise SystemExit(2)
    if twice := _given_twice(args, argv):
        print(f"jaximm: {twice} is given twice; it takes one value.", file=sys.stderr)
        raise SystemExit(2)
    return args


def _given_twice(args: Common, argv: Sequence[str]) -> str | None:
    """A flag that is there more than once though it holds one value; the parser keeps the last."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    keys = [flag.removeprefix("--").replace("-", "_") for flag in flags]
    for place, (flag, key) in enumerate(zip(flags, keys, strict=True)):
        holds_one = not isinstance(getattr(args, key, True), tuple | bool)
        if holds_one and key in keys[:place]:
            return flag
    return None


def takes_model(argv: Sequence[str]) -> bool:
    """Whether the command is given a language model, in place of an experiment or a run."""
    command, *rest = argv or [""]
    if command not in OF_MODELS:
        return False
    word = language.first_word(rest, COMMANDS[command][0], OF_MODELS[command][0])
    if word and (language.is_model(word) or (command == "immunise" and language.is_place(word))):
        return True
    return command == "assess" and any(word.partition("=")[0] == "--base" for word in rest)


def _run_command(args: Common) -> RunCommand:
    every = (*OF_MODELS.values(), *COMMANDS.values())
    return next(run_command for class_, run_command in every if isinstance(args, class_))


def _start() -> None:
    """Double precision, in which the linear experiments are stated, and entries from outside."""
    import jax

    import jaximm

    jax.config.update("jax_enable_x64", True)
    jaximm.load_entry_points()
