"""`jaximm assess` and `jaximm attack`: attackers on the models of finished runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from tyro.conf import Positional, UseAppendAction

from jaximm.cli.assessments import assessment_folder, check_attackers, show_assessment
from jaximm.cli.common import Spread, executor_of, load_code_of
from jaximm.cli.errors import UsageError
from jaximm.cli.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assess(Spread):
    """Assess finished runs: every attacker on every model, worst case, certificates, flags.

    Hyper-parameters are chosen on some seeds and rows and reported on others. What is interrupted
    goes on where it was when it is started again with the same --out.

    Attributes:
      run_dirs: run directories, or directories that hold several; or a bundle (jaximm submit).
      out: directory of the assessments; by default assessment in the first run directory.
      level: how hard attackers try: quick, standard or full; or a suite, which brings its own:
        linear-1.0, vision-1.0, jaximm-28@rate=1e-3. By default standard, of a bundle its suite.
      attack: use this attacker only; by default all.
      harmful_rows: attackers have only so many labelled harmful rows; an assessment for each.
      retry_failed: compute again what failed in an earlier call.
      load: a Python file to run first, which registers what is yours: attackers, models, data.
    """

    as_configured: ClassVar[bool] = False  # budgets and attackers are those of the experiment
    run_dirs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_DIR ...")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    retry_failed: bool = False
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    level: Annotated[str | None, tyro.conf.arg(aliases=["--suite"], metavar="NAME")] = None
    attack: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()
    harmful_rows: Annotated[UseAppendAction[tuple[int, ...]], tyro.conf.arg(metavar="N")] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(Assess):
    """Assess finished runs by the attackers and budgets that their experiment names.

    The same as assess, which takes all attackers at the level standard where none are named.

    Attributes:
      level: how hard attackers try, or a suite; by default the experiment's budgets.
      attack: use this attacker only; by default those of the experiment.
    """

    as_configured: ClassVar[bool] = True


def run_command(args: Assess, command: str) -> None:
    """Assesses the runs, or a bundle, and shows each assessment."""
    from jaximm.run import assess as run_assess
    from jaximm.run import submission

    if not args.run_dirs:
        name = "attack" if args.as_configured else "assess"
        raise UsageError(f"{name} takes at least one run directory.")
    folders: tuple[Path, ...] = tuple(args.run_dirs)
    first = folders[0]
    out = assessment_folder(first) if args.out is None else args.out
    _check_level(args.level)
    executor = executor_of(args)
    is_bundle = any(map(submission.is_bundle, folders))
    if is_bundle and (len(folders) > 1 or args.attack or args.harmful_rows):
        raise UsageError(
            "a bundle is assessed alone, by its suite's attackers on its rows: leave others out."
        )
    load_code_of(folders)
    check_attackers(args.attack)
    with Progress() as progress:
        if is_bundle:
            assessments = submission.assess(
                first,
                out,
                level=args.level,
                retry_failed=args.retry_failed,
                command=command,
                progress=progress,
                executor=executor,
            )
        else:
            assessments = run_assess.assess(
                folders,
                out,
                level=args.level or (None if args.as_configured else "standard"),
                attackers=args.attack or None,
                as_configured=args.as_configured,
                harmful_rows=args.harmful_rows,
                retry_failed=args.retry_failed,
                command=command,
                progress=progress,
                executor=executor,
            )
    for assessment in assessments:
        show_assessment(assessment, out / assessment["name"])


def _check_level(level: str | None) -> None:
    from jaximm.assessment import LEVELS, suites

    known = [*LEVELS, *suites.names()]
    if level is not None and level not in known and suites.table(level) is None:
        raise UsageError(f"unknown level {level!r}; choose from {known}.")
