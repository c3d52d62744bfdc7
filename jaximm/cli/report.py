"""`jaximm report`: the pages of results and assessments, made again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from jaximm.cli.assessments import assessment_folder, assessments_of
from jaximm.cli.common import Common
from jaximm.cli.errors import UsageError
from jaximm.cli.output import check_free, check_ours, ordered, write_page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Make report.html again from the results in a directory, and the pages of assessments there.

    Attributes:
      run_dir: a run directory, or one that holds several; or the folder of an assessment.
      out: the file to write; by default report.html in the run directory. With it, no other page.
      replace: replace that file if it is there.
    """

    run_dir: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    replace: bool = False


def run_command(args: Report, command: str) -> None:
    """Writes the pages of what the directory holds."""
    del command
    from jaximm import report, run
    from jaximm.records import assessment as assessment_record

    check_free([args.out], replace=args.replace)
    if args.out is None:
        check_ours(args.run_dir / "report.html")
    files = assessments_of(args.run_dir)
    if len(files) > 1 and args.out is not None:
        raise UsageError(f"{args.run_dir} holds {len(files)} assessments, and --out is one file.")
    if not files:
        results = ordered(run.load_results([args.run_dir]))
        write_page(results, args.out or args.run_dir / "report.html")
        files = [] if args.out else assessments_of(assessment_folder(args.run_dir))
    for file in files:
        page = file.with_suffix(".html") if args.out is None else args.out
        report.write_assessment_page(assessment_record.read(file), page)
        print(f"report: {page}")
