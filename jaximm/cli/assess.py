"""`jaximm assess` and `jaximm attack`: attackers on the models of finished runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from jaximm.cli.assessments import assessment_folder, check_attackers, show_assessment
from jaximm.cli.common import Compiling, load_code_of
from jaximm.cli.errors import UsageError
from jaximm.cli.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assess(Compiling):
    """Assess finished runs: every attacker on every model, worst case, certificates, flags.

    Hyper-parameters are chosen on some seeds and rows and reported on others. What is interrupted
    goes on where it was when it is started again with the same --out.

    Attributes:
      run_dirs: run directories, or directories that hold several.
      out: directory of the assessments; by default assessment in the first run directory.
      level: how hard attackers try: quick, standard or full.
      attack: use this attacker only; by default all.
      retry_failed: compute again what failed in an earlier call.
      load: a Python file to run first, which registers what is yours: attackers, models, data.
    """

    as_configured: ClassVar[bool] = False  # budgets and attackers are those of the experiment
    run_dirs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_DIR ...")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    retry_failed: bool = False
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    level: Literal["quick", "standard", "full"] = "standard"
    attack: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(Assess):
    """Assess finished runs by the attackers and budgets that their experiment names.

    The same as assess, which takes all attackers at the level standard where none are named.

    Attributes:
      level: how hard attackers try: quick, standard or full; by default the experiment's budgets.
      attack: use this attacker only; by default those of the experiment.
    """

    as_configured: ClassVar[bool] = True
    level: Annotated[
        Literal["quick", "standard", "full"] | None, tyro.conf.arg(aliases=["--suite"])
    ] = None
    attack: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()


def run_command(args: Assess, command: str) -> None:
    """Assesses the runs and shows each assessment."""
    from jaximm.run import assess as run_assess

    if not args.run_dirs:
        name = "attack" if args.as_configured else "assess"
        raise UsageError(f"{name} takes at least one run directory.")
    out = assessment_folder(args.run_dirs[0]) if args.out is None else args.out
    load_code_of(args.run_dirs)
    check_attackers(args.attack)
    with Progress() as progress:
        assessments = run_assess.assess(
            args.run_dirs,
            out,
            level=args.level,
            attackers=args.attack or None,
            as_configured=args.as_configured,
            retry_failed=args.retry_failed,
            command=command,
            progress=progress,
        )
    for assessment in assessments:
        show_assessment(assessment, out / assessment["name"])
