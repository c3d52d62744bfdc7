"""`jaximm submit`: a bundle, checked, or made from finished runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction

from jaximm.cli.common import Common
from jaximm.cli.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submit(Common):
    """Check a bundle, weights of a defence and a card, for a suite with a name (docs/suites.md).

    Attributes:
      bundle: its folder; with --run a new one, which is made.
      run: finished runs of one method on the cases of the suite.
      card: with --run, a JSON file of the card without its schema and seeds.
    """

    bundle: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    run: Annotated[UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_DIR")] = ()
    card: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


def run_command(args: Submit, command: str) -> None:
    """Makes the bundle if runs are given, checks it, and says how to assess it."""
    del command
    from jaximm.run import submission

    if bool(args.run) != (args.card is not None):
        raise UsageError("submit makes a bundle from --run and --card together.")
    if args.card is not None:
        try:
            card = json.loads(args.card.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{args.card} is no JSON ({error}).") from error
        if not isinstance(card, dict):
            raise UsageError(f"{args.card} must be an object, got {type(card).__name__}.")
        submission.make(args.bundle, args.run, card)
    card = submission.check(args.bundle)
    print(
        f"{args.bundle}: {card['name']}, {len(card['seeds'])} seeds, complete for {card['suite']}."
    )
    print(f"next: jaximm assess {args.bundle} --suite {card['suite']}")
