"""`jaximm leaderboard`: the page of a suite, from a folder of assessments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from jaximm.cli.common import Common
from jaximm.cli.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaderboard(Common):
    """Write one page of all assessments under a suite: a line a defence and case, its worst result.

    Attributes:
      folder: holds assessments at any depth, and their cards beside them.
      suite: those of this suite.
      out: the page.
      replace: replace it if it is there.
    """

    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    suite: Annotated[str, tyro.conf.arg(metavar="NAME")] = "linear-1.0"
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("leaderboard.html")
    replace: bool = False


def run_command(args: Leaderboard, command: str) -> None:
    """Reads, writes the page, prints the table."""
    del command
    from jaximm import report
    from jaximm.assessment import suites
    from jaximm.cli.output import check_free, stdout
    from jaximm.records import assessment, submission

    check_free([args.out], replace=args.replace)
    suite = suites.load(args.suite)
    entries = []
    for file in sorted(args.folder.rglob("assessment.json")):
        document, card = assessment.read(file), file.with_name(submission.CARD)
        if document["level"] == suite.name:
            entries.append((document, submission.read(card) if card.is_file() else None))
    if not entries:
        raise UsageError(f"{args.folder} holds no assessment under {suite.name}.")
    report.write_standings_page(entries, args.out, suite=suite.name, seeds=suite.seeds)
    board = report.suite_table(entries, seeds=suite.seeds)
    stdout().print(report.to_rich(board))
    print(f"page: {args.out}")
