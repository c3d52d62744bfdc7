"""`jaximm assess` of language models: attackers on them and on their public base."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from jaximm.cli.assessments import assessment_folder, check_attackers, show_assessment
from jaximm.cli.common import Spread, executor_of
from jaximm.cli.errors import UsageError
from jaximm.cli.language import ROLES, refuse_unknown, text_fields
from jaximm.cli.progress import Progress
from jaximm.cli.values import assignments_of

if TYPE_CHECKING:
    from jaximm.types import Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssessLanguage(Spread):
    """Assess language models beside their public base: harm and utility by attack step.

    Texts and sizes are those with which the first model was immunised, where a flag says nothing
    else. What is interrupted goes on where it was when it is started again with the same --out.

    Attributes:
      models: folders as jaximm immunise writes them, or others of the Hugging Face hub.
      base: the public model, which stands as undefended; by default that of the first folder's
        record.
      out: directory of the assessment; by default assessment in the first folder.
      level: how hard attackers try: quick, standard or full.
      attack: use this attacker only, as fine_tune_adam or lora@rank=64,learning_rates=1e-4|1e-3.
        May be repeated.
      primary: the text that should stay.
      harmful: the text that should be hard to teach.
      control: a benign text that should stay easy to teach.
      length: tokens of a row.
      measured_rows: of each part of a text, at most so many are used.
      harmful_rows: attackers have only so many harmful rows to train on.
      retry_failed: compute again what failed in an earlier call.
      load: a Python file to run first, which registers what is yours.
      set: KEY=VALUE: primary.FIELD, harmful.FIELD, control.FIELD of a text.
    """

    models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL ...")]
    base: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    level: Annotated[Literal["quick", "standard", "full"], tyro.conf.arg(aliases=["--suite"])] = (
        "quick"
    )
    attack: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="LABEL")] = ()
    primary: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    harmful: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    control: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    length: int | None = None
    measured_rows: int | None = None
    harmful_rows: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    retry_failed: bool = False
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    set: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()


def run_command(args: AssessLanguage, command: str) -> None:
    """Assesses the models and shows the assessment."""
    from jaximm.run.assess_language import assess_language

    if not args.models:
        raise UsageError("assess takes at least one model.")
    check_attackers(args.attack)
    out = assessment_folder(Path(args.models[0])) if args.out is None else args.out
    with Progress() as progress:
        assessment = assess_language(
            args.models,
            args.base,
            out,
            texts=texts_of(args),
            level=args.level,
            attackers=args.attack or None,
            harmful_rows=args.harmful_rows,
            retry_failed=args.retry_failed,
            command=command,
            progress=progress,
            executor=executor_of(args),
        )
    show_assessment(assessment, out)


def texts_of(args: AssessLanguage) -> Fields:
    """What the flags say of the texts.

    Raises:
      UsageError: an unknown key, text or field, or a value that it does not take.
    """
    from jaximm.run.assess_language import read_record
    from jaximm.run.language import LanguageExperiment

    record = read_record(Path(args.models[0]))
    earlier: Fields = {} if record is None else record["config"]
    keys = (*ROLES, "length", "measured_rows")
    flags = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    assignments = assignments_of(args.set)
    refuse_unknown(assignments, ())
    defaults = {field.name: field.default for field in dataclasses.fields(LanguageExperiment)}
    names = {role: flags.get(role, earlier.get(role, defaults[role])) for role in ROLES}
    # Fields of one text mean nothing to another that stands in its place.
    kept = {
        role: fields
        for role, fields in earlier.get("text_fields", {}).items()
        if names[role] == earlier.get(role)
    }
    return flags | {"text_fields": text_fields(assignments, names, kept)}
