"""`jaximm suite`: the linear cases, every method, every attacker."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from tyro.conf import UseAppendAction

from jaximm.cli.assessments import check_attackers, show_assessment
from jaximm.cli.common import Compiling
from jaximm.cli.errors import UsageError
from jaximm.cli.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(Compiling):
    """Immunise the linear cases by every method and assess them: what `make suite` runs.

    Attributes:
      out: directory; what it holds of an earlier call is kept.
      level: how hard attackers try: quick, standard or full; or linear-1.0, whose cases these are.
      attack: use this attacker only.
      case: this case only, of those that `make suite` runs.
      seed: seed of the methods; by default 0.
    """

    shares_cores: ClassVar[bool] = True
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs") / "suite"
    level: Annotated[
        Literal["quick", "standard", "full", "linear-1.0"], tyro.conf.arg(aliases=["--suite"])
    ] = "standard"
    attack: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()
    case: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()
    seed: Annotated[UseAppendAction[tuple[int, ...]], tyro.conf.arg(metavar="N")] = ()


def run_command(args: Suite, command: str) -> None:
    """Immunises and assesses, and shows each assessment."""
    from jaximm import run
    from jaximm.run.cases import DOMINATED

    check_attackers(args.attack)
    if unknown := [name for name in args.case if name not in run.SUITE]:
        raise UsageError(f"unknown case {unknown[0]!r}; choose from {[*run.SUITE]}.")
    if args.level == "linear-1.0" and args.attack:
        raise UsageError("linear-1.0 brings its attackers: leave --attack out.")
    with Progress() as progress:
        assessments = run.suite(
            args.out,
            level=args.level,
            attackers=args.attack or None,
            cases=args.case or None,
            seeds=args.seed or (0,),
            command=command,
            progress=progress,
        )
    if args.level in ("quick", "standard") and not args.attack:
        left = ", ".join(DOMINATED)
        print(f"Left out, as others do better on these cases: {left} (--level full takes them).\n")
    for assessment in assessments:
        show_assessment(assessment, args.out / assessment["name"])
