"""`jaximm demo`: house prices, immunised by every method, assessed, shown."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from jaximm.cli.assessments import assessment_folder, show_assessment
from jaximm.cli.common import Compiling
from jaximm.cli.output import ordered, print_results, write_page
from jaximm.cli.progress import Progress

DEMO_FOLDER = Path("runs") / "demo"
"""Where `jaximm demo` writes by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Compiling):
    """The main job on house prices: every method, assessed at the level quick by every probe.

    Attributes:
      out: a new directory; by default runs/demo, or the next free of runs/demo-2, -3, ...
      resume: continue an unfinished demo in --out (by default in runs/demo).
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    resume: bool = False


def run_command(args: Demo, command: str) -> None:
    """Runs the demo in a folder of its own and shows what it found."""
    from jaximm import run

    out = args.out or (DEMO_FOLDER if args.resume else _free_folder(DEMO_FOLDER))
    if args.out is None and out != DEMO_FOLDER:
        print(f"{DEMO_FOLDER} holds an earlier demo; this one goes to {out}.", file=sys.stderr)
    if not args.resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give --resume to continue it, or another --out.")
    try:
        with Progress(None if args.resume else len(run.DEMO_METHODS)) as progress:
            assessment = run.demo(out, resume=args.resume, command=command, progress=progress)
    except KeyboardInterrupt as stop:  # by default the folder is chosen anew each time
        stop.args = (shlex.join(["jaximm", "demo", "--out", str(out), "--resume"]),)
        raise
    results = ordered(run.load_results([out]))
    print_results(results)
    write_page(results, out / "report.html")
    show_assessment(assessment, assessment_folder(out) / assessment["name"])


def _free_folder(folder: Path) -> Path:
    """`folder`, or the first of ``folder-2``, ``folder-3``, ... that is not there or is empty."""
    candidate, number = folder, 1
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
