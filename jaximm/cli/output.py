"""What commands write: lines, tables and pages of results, text files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jaximm.cli.errors import UsageError
from jaximm.records import files

if TYPE_CHECKING:
    from rich.console import Console

    from jaximm.types import Json

    Results = list[Json]

PIPE_WIDTH = 120
"""Columns of the tables where stdout is no terminal and COLUMNS is not set."""


def tell(line: str) -> None:
    """Prints a line on stderr, with the program's name."""
    print(f"jaximm: {line}", file=sys.stderr)


def stdout() -> Console:
    """A console as wide as the terminal, or as `PIPE_WIDTH`."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False)


def print_results(results: Results, *, everything: bool = False) -> None:
    """The tables a terminal has room for; the page has all of them."""
    from jaximm.report import run_tables

    console = stdout()
    for part in run_tables.terminal(ordered(results), width=console.width, everything=everything):
        console.print(part)


def ordered(results: Iterable[Json]) -> Results:
    """By experiment, then method as in its registry, then seed."""
    from jaximm import immunisers

    rank = {name: place for place, name in enumerate(immunisers.REGISTRY)}

    def key(result: Json) -> tuple[str, int, str, int]:
        label = result["method"]
        name = label.partition("@")[0]
        return result["experiment"], rank.get(name, len(rank)), label, result["seed"]

    return sorted(results, key=key)


def check_free(paths: Iterable[Path | None], *, replace: bool) -> None:
    """Refuses files that are not to be written, before anything is computed.

    Args:
      paths: files that a command is to write; None: not asked for.
      replace: files that are there are to be replaced.

    Raises:
      UsageError: a folder, a device, or a file that is there.
    """
    for path in paths:
        if path is None or not path.exists():
            continue
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UsageError(f"{path} is {kind}; name a file to write.")
        if not replace:
            raise UsageError(
                f"{path} is there already; give --replace to replace it, or name another file."
            )


MARK = b'<meta name="generator" content="jaximm">'
"""In the head of every page of ours."""


def check_ours(path: Path) -> None:
    """Refuses a page under a name that a command chose itself, where another's file is.

    Raises:
      UsageError: what is there is no page of ours.
    """
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if MARK in file.read(4096):
                return
    raise UsageError(f"{path} is there and no page of jaximm: move it, or give another --out.")


def write_page(results: Results, path: Path, *, name: str = "report") -> None:
    """Writes the page of `results` and prints where it is."""
    from jaximm import report

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        report.write_page(results, path)
    except OSError as error:  # name the page, not the draft beside it
        raise OSError(error.errno, error.strerror, str(path)) from error
    print(f"{name}: {path}")


def write_text(path: Path, text: str, *, name: str) -> None:
    """Writes `text` and prints where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)
    print(f"{name}: {path}")
