"""`jaximm compare`: runs side by side, assessments as a leaderboard, or two checkpoints."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, UseAppendAction

from jaximm.cli.assessments import assessment_folder, assessments_of
from jaximm.cli.common import Common
from jaximm.cli.errors import UsageError
from jaximm.cli.output import (
    check_free,
    ordered,
    print_results,
    stdout,
    tell,
    write_page,
    write_text,
)
from jaximm.cli.values import assignments_of, field_value

if TYPE_CHECKING:
    from jaximm.registry import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Set runs side by side: conditioning, quality, paired differences.

    Of assessments (files assessment.json, or their folders): the leaderboard; --csv writes a line
    for every attacker on every model.

    Of two checkpoints of immunised backbones (RUN_DIR/backbone of a deep run) instead: layers
    moved, condition numbers and attacks, computed anew on images.

    Attributes:
      run_dirs: run directories, or directories that hold several; or two checkpoints.
      out: directory of compare.html, or a name that ends in .html.
      markdown: also write the tables as Markdown.
      csv: also write the raw numbers as CSV; those of groups of rows go to a file beside it, with
        -groups in its name.
      images: image pair on which two checkpoints are compared; by default that of their runs.
      set: KEY=VALUE, KEY being a field of that image pair.
      rows: images of each task for two checkpoints, at most; by default 1000.
      replace: replace files that are there.
      load: a Python file to run first, which registers what is yours: attackers, models, data.
    """

    run_dirs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_DIR ...")]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path(".")
    markdown: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    csv: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    images: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    set: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    rows: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    replace: bool = False
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


def run_command(args: Compare, command: str) -> None:
    """Compares what the paths are: assessments, two checkpoints, or runs."""
    del command
    from jaximm import report, run
    from jaximm.run.compare import is_checkpoint

    if any(map(assessments_of, args.run_dirs)):
        check_free([args.markdown, args.csv], replace=args.replace)
        _leaderboard(args)
        return
    checkpoints = sum(map(is_checkpoint, args.run_dirs))
    page = args.out if args.out.suffix == ".html" else args.out / "compare.html"
    groups = None if args.csv is None else _groups_of(args.csv)
    check_free([page, args.markdown, args.csv, groups], replace=args.replace)
    if checkpoints:
        if checkpoints != 2 or len(args.run_dirs) != 2:
            raise UsageError(
                f"compare takes run directories, or exactly two checkpoints; got {checkpoints} "
                f"checkpoint{'s' * (checkpoints > 1)} among {len(args.run_dirs)} paths."
            )
        _compare_checkpoints(args, page)
        return
    if args.images is not None or args.set or args.rows is not None:
        raise UsageError("--images, --set and --rows are for two checkpoints; these are runs.")
    results = ordered(run.load_results(args.run_dirs))
    print_results(results, everything=True)
    write_page(results, page, name="comparison")
    if args.markdown is not None:
        write_text(args.markdown, report.markdown(results), name="markdown")
    if args.csv is not None:
        write_text(args.csv, report.csv(results), name="csv")
        if any("groups" in result for result in results):
            write_text(_groups_of(args.csv), report.csv(results, what="groups"), name="csv")


def _groups_of(csv: Path) -> Path:
    """The file of the numbers of groups, beside that of the others."""
    return csv.with_name(f"{csv.stem}-groups{csv.suffix}")


def _leaderboard(args: Compare) -> None:
    """Every model of some assessments, best first."""
    from jaximm import report
    from jaximm.records import assessment as assessment_record
    from jaximm.report.table import shown

    others = [path for path in args.run_dirs if not assessments_of(path)]
    if others:
        command = shlex.join(["jaximm", "assess", str(others[0])])
        raise UsageError(
            f"no assessment at {', '.join(map(str, others))}: assessments are compared with "
            f"assessments only. `{command}` makes one of runs, in {assessment_folder(others[0])}."
        )
    if args.images is not None or args.set or args.rows is not None or args.out != Path("."):
        raise UsageError(
            "--out, --images, --set and --rows are for runs and checkpoints; the leaderboard of "
            "assessments goes to --markdown FILE and --csv FILE."
        )
    files = [file for path in args.run_dirs for file in assessments_of(path)]
    assessments = list(map(assessment_record.read, files))
    table, console = report.leaderboard(assessments), stdout()
    for part in shown([table], width=console.width):
        console.print(part)
    if args.markdown is not None:
        write_text(args.markdown, report.to_markdown(table) + "\n", name="markdown")
    if args.csv is not None:
        header, *_ = report.assessment_csv(assessments[0]).partition("\n")
        rows = [report.assessment_csv(document).partition("\n")[2] for document in assessments]
        write_text(args.csv, "".join([f"{header}\n", *rows]), name="csv")


def _compare_checkpoints(args: Compare, page: Path) -> None:
    from jaximm import data, report
    from jaximm.report import checkpoints
    from jaximm.run import compare as run_compare
    from jaximm.run import config

    if args.csv is not None:
        raise UsageError("--csv is for runs; two checkpoints have --markdown.")
    rows = 1000 if args.rows is None else args.rows
    if rows < 1:
        raise UsageError(f"--rows must be at least 1, got {rows}.")
    runs = [path.absolute().parent / "config.json" for path in args.run_dirs]
    config.load_code([file for file in runs if file.exists()], tell=tell)
    pair = data.load(*_images_of(args))
    inputs = run_compare.rows_of_pair(pair, rows=rows)
    compared = run_compare.compare_checkpoints(
        *args.run_dirs,
        primary=inputs["primary"],
        harmful=inputs["harmful"],
        data=f"the training images of {pair.name}",
    )
    console = stdout()
    for part in checkpoints.terminal(compared, width=console.width):
        console.print(part)
    page.parent.mkdir(parents=True, exist_ok=True)
    report.write_comparison_page(compared, page)
    print(f"comparison: {page}")
    if args.markdown is not None:
        write_text(args.markdown, checkpoints.markdown(compared), name="markdown")


def _images_of(args: Compare) -> tuple[str, Config]:
    """Name and configuration of the image pair: that of --images, else that of the runs."""
    from jaximm import data
    from jaximm.run.compare import recorded_images

    name, fields = args.images, {}
    if name is None:
        try:
            name, fields = recorded_images(*args.run_dirs)
        except ValueError as error:
            raise UsageError(f"{error} (--images NAME)") from error
    known = sorted(name for name in data.REGISTRY if data.targets_of(name) == "classes")
    if name not in known:
        raise UsageError(f"unknown image pair {name!r}; choose from {known}.")
    class_ = data.REGISTRY[name][0]
    for key, text in assignments_of(args.set).items():
        fields[key] = field_value(key, key, text, class_)
    try:
        return name, data.make_config(name, **fields)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
