"""`jaximm immunise` of a language model: a folder of the hub in, a folder of the hub out."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, UseAppendAction

from jaximm.cli.common import Common
from jaximm.cli.errors import UsageError
from jaximm.cli.language import ROLES, field_names, refuse_unknown, text_fields
from jaximm.cli.output import stdout
from jaximm.cli.progress import Progress
from jaximm.cli.values import assignments_of, field_value, given, scalar_fields, with_flags

if TYPE_CHECKING:
    from jaximm.run.language import LanguageExperiment
    from jaximm.types import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImmuniseLanguage(Common):
    """Immunise a language model: write it in the layout it came in, with what was measured of it.

    Attributes:
      model: a folder of the Hugging Face hub (config.json, safetensors, tokenizer.json), a .gguf
        file, or smollm2.
      out: a new folder: the model, its tokenizer, and jaximm.json with everything that is printed.
      method: condition_gap, or with fields gauge@spread=100,moves=neurons.
      site: measure here too: inputs of a linear map, layers.5.down. May be repeated.
      dry_run: say what would be done and the memory that a step takes a device; write nothing.
      load: a Python file to run first, which registers what is yours.
      set: KEY=VALUE: a field of the run, optimiser.FIELD, or primary.FIELD, harmful.FIELD,
        control.FIELD of a text, as harmful.count=8 or primary.path=FOLDER of text:folder.
    """

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    method: Annotated[str, tyro.conf.arg(metavar="METHOD")] = "condition_gap"
    site: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="SITE")] = ()
    dry_run: bool = False
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    set: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()


def with_experiment_flags() -> type:
    """`ImmuniseLanguage` with a flag for each scalar field of the run."""
    from jaximm.run.language import LanguageExperiment

    return with_flags(ImmuniseLanguage, LanguageExperiment)


def run_command(args: ImmuniseLanguage, command: str) -> None:
    """Immunises the model, or says what that would be."""
    from jaximm.report import language_tables
    from jaximm.run import language

    config = experiment_of(args)
    if args.dry_run:
        for line in language_tables.plan_lines(config, language.plan_language(config)):
            print(line)
        return
    with Progress(1) as progress:
        record = language.immunise_language(config, args.out, command=command, progress=progress)
    console = stdout()
    for part in language_tables.terminal(record, width=console.width):
        console.print(part)
    print(f"model: {args.out}")
    print(f"record: {args.out / language.RECORD}")
    print(f"next: {shlex.join(['jaximm', 'assess', str(args.out), '--base', config.model])}")


def experiment_of(args: ImmuniseLanguage) -> LanguageExperiment:
    """The run that the flags describe.

    Raises:
      UsageError: an unknown name or key, or a value that its class refuses.
    """
    from jaximm.run.language import LanguageExperiment
    from jaximm.training.optimiser import OptimiserConfig

    assignments = assignments_of(args.set)
    for key, text in given(args, scalar_fields(LanguageExperiment)).items():
        if key in assignments:
            raise UsageError(f"{key} is given twice, by its flag and by --set; give it once.")
        assignments[key] = text
    own, optimiser, of_texts = {}, {}, {}
    for key, text in assignments.items():
        owner, dot, field = key.partition(".")
        if owner == "optimiser" and dot:
            optimiser[field] = field_value(key, field, text, OptimiserConfig)
        elif dot:
            of_texts[key] = text
        else:
            own[key] = field_value(key, key, text, LanguageExperiment)
    refuse_unknown(of_texts, field_names(LanguageExperiment))
    fields: Json = {"model": args.model, "method": args.method} | own
    if args.site:
        fields["sites"] = args.site
    defaults = {field.name: field.default for field in dataclasses.fields(LanguageExperiment)}
    names = {role: fields.get(role, defaults[role]) for role in ROLES}
    fields["text_fields"] = text_fields(of_texts, names, fields.get("text_fields", {}))
    try:
        if optimiser:
            fields["optimiser"] = OptimiserConfig(**optimiser)
        return LanguageExperiment(**fields)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
