"""The command line: parse, call one library function, print.

Results go to stdout, progress and errors to stderr. Exit code 0: done; 1: failed, with one readable
line; 2: a usage error, unknown names included; 130: stopped from the keyboard.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json as json_module
import os
import re
import shlex
import sys
import time
import traceback as traceback_module
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional, UseAppendAction

if TYPE_CHECKING:
    from rich.console import Console

    from jaximm.run.config import Experiment

Results = list[dict[str, Any]]

PIPE_WIDTH = 120
"""Columns of the tables where stdout is no terminal and COLUMNS is not set."""

DEMO_FOLDER = Path("runs") / "demo"
"""Where `jaximm demo` writes by default."""


_NOT_GIVEN = "\0"
"""Of a flag that is not there: no text that a command line can hold, so that None is a value."""


class UsageError(ValueError):
    """Something on the command line that cannot be run: exit code 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every command.

    Attributes:
      traceback: on an error, show where in the code it arose.
    """

    traceback: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiling(Common):
    """Flags of commands that compile more than they run.

    Attributes:
      no_cache: keep no compiled programs on disk. By default they are, in
        JAX_COMPILATION_CACHE_DIR or the user's cache folder, and the next call finds them.
      full_optimisation: compile with all of XLA's optimisations. By default with few, which is
        faster for programs that run for seconds.
    """

    no_cache: bool = False
    full_optimisation: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class List(Common):
    """Methods, attacks, data sets and experiments: what each is, and its source.

    Attributes:
      json: machine-readable.
    """

    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Immunise(Common):
    """Run the methods of an experiment, measure them, write results and report.html.

    Flags that name a field of the experiment replace its value there.

    Attributes:
      experiment: a name from `jaximm list`, a config.json, or a .py file that defines CONFIG,
        which is code that runs.
      out: directory of the results; each run gets a directory in it.
      method: run this one only: condition_gap, or with fields limit@t=1,damping=0.01.
      seed: run this one only.
      resume: continue unfinished runs in --out, keep finished ones.
      distributed: joins the processes of a job: of the cluster named, or auto: of the one whose
        variables are set. The next three flags describe them by hand. none: one process.
      coordinator: address of process 0 as HOST:PORT, with --processes and --process-id.
      processes: how many there are.
      process_id: number of this one, from 0.
      load: a Python file to run first, which registers what is yours: attackers, models, data.
      set: KEY=VALUE, KEY being a field of the experiment, data.FIELD or METHOD.FIELD (for a deep
        experiment also images.FIELD, backbone.FIELD, optimiser.FIELD, preprocess.FIELD); VALUE is
        JSON, or else text.
    """

    experiment: Annotated[Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    method: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="METHOD")] = ()
    seed: UseAppendAction[tuple[int, ...]] = ()
    resume: bool = False
    distributed: Literal["auto", "slurm", "ompi", "tpu", "none"] = "none"
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    process_id: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    set: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()


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

    level: Annotated[
        Literal["quick", "standard", "full"] | None, tyro.conf.arg(aliases=["--suite"])
    ] = None
    attack: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(Compiling):
    """Immunise the linear cases by every method and assess them: what `make suite` runs.

    Attributes:
      out: directory; what it holds of an earlier call is kept.
      level: how hard attackers try: quick, standard or full.
      attack: use this attacker only.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs") / "suite"
    level: Literal["quick", "standard", "full"] = "standard"
    attack: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()


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
      load: a Python file to run first, which registers what is yours: attackers, models, data.
    """

    run_dirs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_DIR ...")]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path(".")
    markdown: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    csv: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    images: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    set: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    rows: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Make report.html again from the results in a directory, and the pages of assessments there.

    Attributes:
      run_dir: a run directory, or one that holds several; or the folder of an assessment.
      out: the file to write; by default report.html in the run directory. With it, no other page.
    """

    run_dir: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Write a run's immunised backbone and its classifier for other tools.

    Attributes:
      run_dir: a run directory.
      layout: names and shapes: timm or torchvision, where the model has them (or another layout of
        its own), as safetensors; npz: a NumPy archive with jaximm's own names.
      out: the file to write; by default backbone-LAYOUT.safetensors or backbone.npz in RUN_DIR.
      force: replace that file if it is there.
      load: a Python file to run first, which registers what is yours: attackers, models, data.
    """

    run_dir: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    layout: Annotated[str, tyro.conf.arg(metavar="timm|torchvision|npz")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    force: bool = False
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebalance(Common):
    """Write a language model in canonical weights: the same function, whatever gauge it came in.

    It needs the weights alone. It undoes defences that only rescale a model inside, and repairs
    what such scales cost when weights are rounded to few bits.

    Attributes:
      model: a folder of the Hugging Face hub (config.json, safetensors), or a .gguf file.
      out: a new folder.
      norms: one: fold the scales of norms into what follows; columns: give that equal lengths.
    """

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    norms: Literal["one", "columns"] = "one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Compiling):
    """The main job on house prices: every method, assessed at the level quick by every probe.

    Attributes:
      out: a new directory; by default runs/demo, or the next free of runs/demo-2, -3, ...
      resume: continue an unfinished demo in --out (by default in runs/demo).
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    resume: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (without the program name; by default that of the process).

    Returns:
      The exit code, see the module's docstring.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Before NumPy is first imported: LAPACK's own threads only get in the way of XLA's.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        args = parse(argv)
        said = _set_compilation(args) if isinstance(args, Compiling) else None
        _start()
        _run_own_file(args)
        _, run_command = COMMANDS[_command_name(args)]
        run_command(args, shlex.join(["jaximm", *argv]))
        if said is not None:  # of what ran: an error is one line
            _tell(said)
        sys.stdout.flush()
    except SystemExit as stop:  # from the parser: help, or a usage error that it has printed
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # `jaximm list | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--traceback" in argv:
            traceback_module.print_exc(file=sys.stderr)
        print(f"jaximm: {_message(error, argv)}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1 + isinstance(error, UsageError)
    return 0


def parse(argv: Sequence[str]) -> Any:
    """The command in `argv` as an instance of its class.

    Raises:
      SystemExit: 0 after printing help, 2 after printing a usage error.
    """
    if list(argv) == ["--version"]:
        print(f"jaximm {importlib.import_module('jaximm').__version__}")
        raise SystemExit(0)
    classes = {name: class_ for name, (class_, _) in COMMANDS.items()}
    if argv and argv[0] == "immunise":  # only it pays for reading the experiment's fields
        classes["immunise"] = _with_experiment_flags()
    members = tuple(
        Annotated[class_, tyro.conf.subcommand(name=name)] for name, class_ in classes.items()
    )
    union: Any = Union[members]  # noqa: UP007 (its members are known at run time only)
    args = tyro.cli(
        union,
        prog="jaximm",
        description="Immunise models, attack them, report what held. Start with `jaximm demo`.",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    if isinstance(args, Compare) and not args.run_dirs:
        print("jaximm: compare needs at least one RUN_DIR.", file=sys.stderr)
        raise SystemExit(2)
    if twice := _given_twice(args, argv):
        print(f"jaximm: {twice} is given twice; it takes one value.", file=sys.stderr)
        raise SystemExit(2)
    return args


def _given_twice(args: Any, argv: Sequence[str]) -> str | None:
    """A flag that is there more than once though it holds one value; the parser keeps the last."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    keys = [flag.removeprefix("--").replace("-", "_") for flag in flags]
    for place, (flag, key) in enumerate(zip(flags, keys, strict=True)):
        holds_one = not isinstance(getattr(args, key, True), tuple | bool)
        if holds_one and key in keys[:place]:
            return flag
    return None


def _command_name(args: Any) -> str:
    return next(name for name, (class_, _) in COMMANDS.items() if isinstance(args, class_))


def _set_compilation(args: Compiling) -> str:
    """Sets how programs are compiled and whether they are kept, and gives the line that says it.

    JAX is not imported yet.
    """
    from jaximm import compilation

    set_before = bool(os.environ.get(compilation.FLAGS))
    if args.full_optimisation:
        compilation.optimise_fully()
    else:
        # `suite` starts processes that share the cores; the others have them alone.
        compilation.compile_quickly(one_thread=isinstance(args, Suite))
    how = "with few optimisations (--full-optimisation: with all)"
    if args.full_optimisation:
        how = "with all optimisations"
    if set_before:
        how = "as XLA_FLAGS says"
    folder, why = (None, "--no-cache") if args.no_cache else compilation.keep_programs()
    kept = f"kept in {folder} (--no-cache: nowhere)" if folder else f"not kept: {why}"
    return f"programs were compiled {how}; {kept}."


def _start() -> None:
    """Double precision, in which the linear experiments are stated, and entries from outside."""
    import jax

    import jaximm

    jax.config.update("jax_enable_x64", True)
    jaximm.load_entry_points()


def _run_own_file(args: Any) -> None:
    """Runs the file of --load."""
    file = getattr(args, "load", None)
    if file is None:
        return
    if not file.is_file():
        raise UsageError(f"--load takes a Python file, got {file}.")
    from jaximm import registry

    registry.run_file(file)


def _tell(line: str) -> None:
    print(f"jaximm: {line}", file=sys.stderr)


def _load_code_of(run_dirs: Iterable[Path]) -> None:
    """Runs what the configurations of runs need, and says so.

    Raises:
      ValueError: see `jaximm.run.config.load_code`.
    """
    from jaximm.run import config

    files = [file for path in run_dirs for file in sorted(path.rglob("config.json"))]
    config.load_code(files, tell=_tell)


def _message(error: BaseException, argv: Sequence[str]) -> str:
    """One line for a reader who wants to know what to do next."""
    if isinstance(error, KeyboardInterrupt):
        if error.args:  # the command that goes on
            return f"stopped; `{error}` goes on."
        if argv[:1] in (["immunise"], ["demo"]):
            return "stopped; the same with --resume goes on."
        # Their cells and runs are kept whenever one is done.
        goes_on = argv[:1] in (["attack"], ["assess"], ["suite"])
        return "stopped; the same command goes on." if goes_on else "stopped."
    text = " ".join(str(error).split())[:600]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    expected: tuple[type, ...] = (ValueError, FloatingPointError, OSError)
    checkpoint = sys.modules.get("jaximm.checkpoint")  # not loaded: then the error is not its own
    if checkpoint is not None:
        expected += (checkpoint.CheckpointError,)
    if not isinstance(error, expected):
        if missing := _missing_device():
            return missing
        return f"unexpected {type(error).__name__}: {text} (--traceback shows where)"
    return text or type(error).__name__


def _missing_device() -> str:
    """What to do where the platform that JAX was told to use has no device; else nothing.

    JAX itself raises an `AssertionError` without a word for a CUDA that is not installed.
    """
    jax, platforms = sys.modules.get("jax"), os.environ.get("JAX_PLATFORMS")
    if jax is None or not platforms:
        return ""
    try:
        jax.devices()
    except Exception:
        first = platforms.split(",")[0]
        name, package = {
            "cuda": ("CUDA", "jax[cuda]"),
            "gpu": ("GPU", "jax[cuda]"),
            "rocm": ("ROCm", "jax[rocm]"),
            "tpu": ("TPU", "jax[tpu]"),
        }.get(first, (first, ""))
        advice = f" or install {package}" if package else ""
        return f"no {name} device: unset JAX_PLATFORMS{advice}"
    return ""


# list


def _list(args: List, command: str) -> None:
    del command
    families = catalogue()
    if args.json:
        print(json_module.dumps(families, indent=1, ensure_ascii=False))
        return
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    console = _stdout()
    width = max(len(entry["name"]) for entries in families.values() for entry in entries)
    for family, entries in families.items():
        table = RichTable(
            title=Text(family.capitalize(), style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_header=False,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column(no_wrap=True, min_width=width)
        table.add_column(overflow="fold")
        for entry in entries:
            about = Text(entry["description"])
            if "kind" in entry:  # an attacker
                about = Text(f"{entry['title']}: {entry['description']} [{entry['kind']}]")
                about += Text(f"\nIt {entry['threat_model']}.")
            elif entry.get("threat_model"):  # a method
                about += Text(f"\nIt is {entry['threat_model']}.")
            table.add_row(Text(entry["name"]), about + Text(f"\n{entry['source']}", style="dim"))
        console.print(table)


def catalogue() -> dict[str, list[dict[str, str]]]:
    """Everything there is to choose from: ``{family: [{name, description, source, ...}]}``."""
    from jaximm import attacks, data, immunisers, models
    from jaximm.run import EXPERIMENTS

    found = {
        "methods": [_said(immunisers.describe(name)) for name in immunisers.REGISTRY],
        "attacks": [_said(attacks.describe(name)) for name in attacks.REGISTRY],
        "attacks on weights": [_said(attacks.describe(name)) for name in attacks.WEIGHT_REGISTRY],
        "data sets": [_entry(*item) for item in data.REGISTRY.items()],
    }
    found["models"] = [
        {
            "name": name,
            "description": (type(spec.config).__doc__ or "").strip().partition("\n")[0],
            "source": spec.source,
        }
        for name, spec in models.REGISTRY.items()
    ]
    found["experiments"] = [
        {
            "name": name,
            "description": experiment.description,
            "source": _entry(experiment.data, data.REGISTRY[experiment.data])["source"],
        }
        for name, experiment in EXPERIMENTS.items()
    ]
    return found


def _said(of_itself: dict[str, Any]) -> dict[str, Any]:
    """What an attacker or a method says of itself, its sentence under the key of every family."""
    return {"description": of_itself.pop("what")} | of_itself


def _entry(name: str, entry: tuple[type, Any]) -> dict[str, str]:
    """Name, first docstring line and source of a registry entry."""
    config_class = entry[0]
    module = config_class.__module__
    source = getattr(sys.modules.get(module), "SOURCE", "") or f"module {module}"
    text = (config_class.__doc__ or "").strip()
    return {"name": name, "description": text.partition("\n")[0], "source": source}


# immunise


def _immunise(args: Immunise, command: str) -> None:
    from jaximm import run

    first = _join(args)
    config = experiment_of(args)
    expected = len(config.methods) * len(config.seeds)
    with Progress(None if args.resume else expected) as progress:
        results = run.immunise(
            config,
            args.out,
            resume=args.resume,
            command=command,
            source=args.experiment,
            progress=progress,
        )
    if not first:  # process 0 speaks for all
        return
    everything = _ordered(_all_finished(args.out) or results)
    _print_results(everything)
    _write_page(everything, args.out / "report.html")
    print(f"next: {shlex.join(['jaximm', 'attack', str(args.out)])}")


def _join(args: Immunise) -> bool:
    """Joins the processes of the run; whether this is the first of them.

    Raises:
      UsageError: flags that do not fit together.
    """
    given = args.coordinator is not None or args.processes is not None
    given = given or args.process_id is not None
    if args.distributed == "none" and not given:
        return True
    from jaximm import training

    cluster = "auto" if args.distributed == "none" else args.distributed
    try:
        config = training.DistributedConfig(
            coordinator=args.coordinator,
            num_processes=args.processes,
            process_id=args.process_id,
            cluster=cluster,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return training.initialise(config).process_index == 0


def experiment_of(args: Immunise) -> Experiment:
    """The experiment that the flags of `immunise` describe.

    Raises:
      UsageError: an unknown name or key, or a value that its config class refuses.
    """
    from jaximm import run
    from jaximm.run.config import RENAMED, load_code

    path = Path(args.experiment)
    if path.suffix == ".py" and path.is_file():
        _tell(f"running {path}: a .py configuration is code that runs.")
    is_file = path.suffix in (".json", ".py") and path.is_file()
    if is_file and path.suffix == ".json":
        load_code([path], tell=_tell)
    try:
        config = run.load_experiment(args.experiment)
    except ValueError as error:
        raise error if is_file else UsageError(str(error)) from None
    assignments = _assignments(args.set)
    for flag in (*_scalar_fields(), *RENAMED):
        text = getattr(args, flag, _NOT_GIVEN)
        if text == _NOT_GIVEN:
            continue
        key = RENAMED.get(flag, flag)
        if key in assignments:
            raise UsageError(f"{key} is given twice, by its flag and by --set; give it once.")
        assignments[key] = text
    changes = _changes(config, assignments)
    if args.method:
        changes["methods"] = args.method
    if args.seed:
        changes["seeds"] = args.seed
    try:
        return dataclasses.replace(config, **changes)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _assignments(texts: Sequence[str]) -> dict[str, str]:
    """What each --set assigns to its key, under today's name."""
    from jaximm.run.config import RENAMED

    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        owner, *field = key.strip().split(".", 1)
        key = ".".join([RENAMED.get(owner, owner), *field])
        if not equals or not key:
            raise UsageError(f"--set takes KEY=VALUE, got {text!r}.")
        if key in found:
            raise UsageError(f"--set {key} is given twice; give it once.")
        found[key] = value
    return found


def _changes(config: Experiment, assignments: Mapping[str, str]) -> dict[str, Any]:
    """Values of experiment fields from assignments to them, to their parts and to METHOD.FIELD."""
    from jaximm import immunisers, registry

    hints = registry.field_types(type(config))
    changes: dict[str, Any] = {}
    for key, text in assignments.items():
        if "." not in key:
            if key not in hints:
                raise UsageError(
                    f"unknown experiment key {key!r}; choose from {list(hints)}, or METHOD.FIELD "
                    "and the like (see --set)."
                )
            changes[key] = _value(key, text, hints[key])
    parts = _parts(config, changes)
    methods = {
        method: dict(fields)
        for method, fields in changes.get("method_fields", config.method_fields).items()
    }
    for key, text in assignments.items():
        owner, dot, field = key.partition(".")
        if not dot:
            continue
        if owner in parts:
            parts[owner].fields[field] = _field_value(key, field, text, parts[owner].config_class)
        elif owner in immunisers.REGISTRY:
            class_ = immunisers.REGISTRY[owner][0]
            fields = methods.setdefault(owner, {})
            fields[field] = _field_value(key, field, text, class_)
        else:
            raise UsageError(
                f"unknown key {key!r}: {owner!r} is neither {' nor '.join(parts)} nor a method; "
                f"methods: {sorted(immunisers.REGISTRY)}."
            )
    for method, fields in methods.items():  # those that this call does not run, too
        try:
            immunisers.make_config(method, **fields)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{method}: {str(error).removeprefix(f'{method}: ')}") from error
    changes["method_fields"] = methods
    for part in parts.values():
        try:
            changes[part.key] = part.fields if part.as_mapping else part.config_class(**part.fields)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{part.key}: {error}") from error
    return changes


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of an experiment whose fields can be set one by one."""

    key: str  # the experiment's field that holds it
    config_class: type
    fields: dict[str, Any]
    as_mapping: bool = True


def _parts(config: Experiment, changes: Mapping[str, Any]) -> dict[str, _Part]:
    """The parts of an experiment, after the fields in `changes`, by the name that --set uses."""
    from jaximm import data, models

    def part(owner: str, key: str, registry: Mapping[str, Any], what: str) -> _Part:
        name = changes.get(owner, getattr(config, owner))
        if name not in registry:
            raise UsageError(f"unknown {what} {name!r}; choose from {sorted(registry)}.")
        # The fields of another entry's config mean nothing to this one.
        kept = getattr(config, key) if name == getattr(config, owner) else {}
        entry = registry[name][0]
        class_ = entry if isinstance(entry, type) else type(entry)
        return _Part(key, class_, dict(changes.get(key, kept)))

    optimiser = dataclasses.asdict(config.optimiser)
    preprocess = dict(changes.get("preprocess", config.preprocess))
    return {
        "data": part("data", "data_fields", data.REGISTRY, "data set"),
        "model": part("model", "model_fields", models.REGISTRY, "model"),
        "optimiser": _Part("optimiser", type(config.optimiser), optimiser, as_mapping=False),
        "preprocess": _Part("preprocess", models.Preprocess, preprocess),
    }


def _field_value(key: str, field: str, text: str, class_: type) -> Any:
    from jaximm import registry

    hints = registry.field_types(class_)
    if field not in hints:
        raise UsageError(f"unknown key {key!r}; choose from {list(hints)}.")
    return _value(key, text, hints[field])


def _value(key: str, text: str, hint: Any) -> Any:
    """`text` as JSON (None is null), else as it is, if that fits `hint`."""
    from jaximm import registry

    try:
        value = json_module.loads("null" if text == "None" else text)
    except json_module.JSONDecodeError:
        value = text
    for candidate in (value, text):
        fitting = registry.fit(candidate, hint)
        if fitting is not registry.NO_FIT:
            return fitting
    raise UsageError(f"{key} must be {registry.type_name(hint)}, got {text!r}.")


def _scalar_fields() -> dict[str, Any]:
    """The fields of an experiment that hold one value, with their types."""
    from jaximm import registry
    from jaximm.run.config import Experiment

    def is_scalar(hint: Any) -> bool:
        if typing.get_origin(hint) in (Union, types.UnionType):
            return all(map(is_scalar, typing.get_args(hint)))
        scalars = (int, float, str, bool, type(None))
        return typing.get_origin(hint) is Literal or hint in scalars

    hints = registry.field_types(Experiment)
    return {key: hint for key, hint in hints.items() if is_scalar(hint)}


def _with_experiment_flags() -> type:
    """`Immunise` with a flag for each scalar field of the experiment."""
    from jaximm import registry
    from jaximm.run.config import RENAMED, Experiment

    hints, about = _scalar_fields(), _attribute_texts(Experiment.__doc__ or "")
    for old, new in RENAMED.items():
        if new in hints:
            hints[old], about[old] = hints[new], f"earlier name of --{new}."
    flags = []
    for key, hint in hints.items():
        names = registry.type_name(hint).removesuffix(" or null").upper()
        if typing.get_origin(hint) is Literal:
            names = "|".join(map(str, typing.get_args(hint)))
        # Text to tyro: the value is read by the same rules as that of --set.
        flag = tyro.conf.arg(
            metavar={"STR": "TEXT"}.get(names, names),
            help=about.get(key, ""),
            help_behavior_hint="(by default the experiment's)",
        )
        flags.append((key, Annotated[str, flag], dataclasses.field(default=_NOT_GIVEN)))
    made = dataclasses.make_dataclass(
        "Immunise", flags, bases=(Immunise,), frozen=True, kw_only=True
    )
    made.__doc__ = Immunise.__doc__
    return made


def _attribute_texts(docstring: str) -> dict[str, str]:
    """The texts of an ``Attributes:`` section by name."""
    section = docstring.partition("Attributes:\n")[2]
    items = re.findall(r"^ +(\w+): (.*(?:\n(?! +\w+: ).*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


# attack, assess, compare, report, demo


def _assess(args: Assess, command: str) -> None:
    from jaximm.run import assess as run_assess

    as_configured = isinstance(args, Attack)
    if not args.run_dirs:
        name = "attack" if as_configured else "assess"
        raise UsageError(f"{name} takes at least one run directory.")
    out = _assessment_folder(args.run_dirs[0]) if args.out is None else args.out
    _load_code_of(args.run_dirs)
    _check_attackers(args.attack)
    with Progress() as progress:
        found = run_assess.assess(
            args.run_dirs,
            out,
            level=args.level,
            attackers=args.attack or None,
            as_configured=as_configured,
            retry_failed=args.retry_failed,
            command=command,
            progress=progress,
        )
    for one in found:
        _show_assessment(one, out / one["name"])


def _suite(args: Suite, command: str) -> None:
    from jaximm import run

    _check_attackers(args.attack)
    with Progress() as progress:
        found = run.suite(
            args.out,
            level=args.level,
            attackers=args.attack or None,
            command=command,
            progress=progress,
        )
    for one in found:
        _show_assessment(one, args.out / one["name"])


def _check_attackers(names: Sequence[str]) -> None:
    from jaximm import attacks

    try:
        for name in names:
            attacks.describe(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _assessment_folder(run_dir: Path) -> Path:
    """Where `assess` writes by default."""
    return run_dir / "assessment"


def _show_assessment(found: dict[str, Any], folder: Path) -> None:
    """Prints an assessment and writes its page, its tables and its exports beside it."""
    from jaximm import report

    console = _stdout()
    for part in report.terminal_assessment(found, width=console.width):
        console.print(part)
    report.write_assessment_page(found, folder / "assessment.html")
    print(f"report: {folder / 'assessment.html'}")
    _write_text(folder / "assessment.md", report.assessment_markdown(found), name="markdown")
    _write_text(folder / "assessment.csv", report.assessment_csv(found), name="csv")
    _write_text(folder / "curves.csv", report.curves_csv(found), name="csv")
    heat_map = json_module.dumps(report.tamperbench_heat_map(found), indent=1)
    _write_text(folder / "heat_map.json", heat_map + "\n", name="heat map")
    cards = {
        model["label"]: report.robustbench_card(found, model["label"]) for model in found["models"]
    }
    _write_text(folder / "cards.json", json_module.dumps(cards, indent=1) + "\n", name="cards")


def _assessments(path: Path) -> list[Path]:
    """The assessment that a path is, or those in a folder and in its folders."""
    if path.is_file() and path.suffix == ".json":
        return [path]
    return sorted({*path.glob("assessment.json"), *path.glob("*/assessment.json")})


def _compare(args: Compare, command: str) -> None:
    del command
    from jaximm import report, run
    from jaximm.run.compare import is_checkpoint

    if any(map(_assessments, args.run_dirs)):
        _leaderboard(args)
        return
    checkpoints = sum(map(is_checkpoint, args.run_dirs))
    page = args.out if args.out.suffix == ".html" else args.out / "compare.html"
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
    results = _ordered(run.load_results(args.run_dirs))
    _print_results(results, everything=True)
    _write_page(results, page, name="comparison")
    if args.markdown is not None:
        _write_text(args.markdown, report.markdown(results), name="markdown")
    if args.csv is not None:
        _write_text(args.csv, report.csv(results), name="csv")
        if any("groups" in result for result in results):
            second = args.csv.with_name(f"{args.csv.stem}-groups{args.csv.suffix}")
            _write_text(second, report.csv(results, what="groups"), name="csv")


def _read_assessment(file: Path) -> dict[str, Any]:
    """An assessment, with verdicts if it was written before it held them."""
    from jaximm.records import assessment as assessment_record

    found = assessment_record.read(file)
    if found["schema"] == assessment_record.SCHEMA_VERSION:
        return found
    from jaximm.assessment.verdict import with_verdicts

    return with_verdicts(found)


def _leaderboard(args: Compare) -> None:
    """Every model of some assessments, best first."""
    from jaximm import report
    from jaximm.report.table import shown

    others = [path for path in args.run_dirs if not _assessments(path)]
    if others:
        command = shlex.join(["jaximm", "assess", str(others[0])])
        raise UsageError(
            f"no assessment at {', '.join(map(str, others))}: assessments are compared with "
            f"assessments only. `{command}` makes one of runs, in {_assessment_folder(others[0])}."
        )
    if args.images is not None or args.set or args.rows is not None or args.out != Path("."):
        raise UsageError(
            "--out, --images, --set and --rows are for runs and checkpoints; the leaderboard of "
            "assessments goes to --markdown FILE and --csv FILE."
        )
    found = [_read_assessment(file) for path in args.run_dirs for file in _assessments(path)]
    table, console = report.leaderboard(found), _stdout()
    for part in shown([table], width=console.width):
        console.print(part)
    if args.markdown is not None:
        _write_text(args.markdown, report.to_markdown(table) + "\n", name="markdown")
    if args.csv is not None:
        text = "".join(report.assessment_csv(one) for one in found[:1])
        text += "".join(report.assessment_csv(one).partition("\n")[2] for one in found[1:])
        _write_text(args.csv, text, name="csv")


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
    config.load_code([file for file in runs if file.exists()], tell=_tell)
    pair = data.load(*_images_of(args))
    inputs = run_compare.rows_of_pair(pair, rows=rows)
    compared = run_compare.compare_checkpoints(
        *args.run_dirs,
        primary=inputs["primary"],
        harmful=inputs["harmful"],
        data=f"the training images of {pair.name}",
    )
    console = _stdout()
    for part in checkpoints.terminal(compared, width=console.width):
        console.print(part)
    page.parent.mkdir(parents=True, exist_ok=True)
    report.write_comparison_page(compared, page)
    print(f"comparison: {page}")
    if args.markdown is not None:
        _write_text(args.markdown, checkpoints.markdown(compared), name="markdown")


def _images_of(args: Compare) -> tuple[str, Any]:
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
    for key, text in _assignments(args.set).items():
        fields[key] = _field_value(key, key, text, class_)
    try:
        return name, data.make_config(name, **fields)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _report(args: Report, command: str) -> None:
    del command
    from jaximm import report, run

    files = _assessments(args.run_dir)
    if not files:
        results = _ordered(run.load_results([args.run_dir]))
        _write_page(results, args.out or args.run_dir / "report.html")
        files = [] if args.out else _assessments(_assessment_folder(args.run_dir))
    for file in files:
        page = file.with_suffix(".html") if args.out is None else args.out
        report.write_assessment_page(_read_assessment(file), page)
        print(f"report: {page}")


def _export(args: Export, command: str) -> None:
    del command
    from jaximm.models import NPZ
    from jaximm.run.export import export

    if args.layout != NPZ:  # names of arrays are those of the code
        _load_code_of([args.run_dir])
    written = export(args.run_dir, args.layout, out=args.out, force=args.force)
    for key, text in written.metadata.items():
        if key in ("model", "method", "classes", "neck", "head"):
            print(f"{key}: {text}")
    print(f"export: {written.path}")


def _rebalance(args: Rebalance, command: str) -> None:
    del command
    from jaximm.run.rebalance import rebalance

    written = rebalance(args.model, args.out, norms=args.norms)
    print(f"weights that came in: {written.precision}")
    for name, spread in written.spreads.items():
        print(f"{name}: factors {spread:.3g} apart")
    print(
        f"largest change of a logit: {written.change:.1e} (of logits up to {written.largest:.1f})"
    )
    print(f"rebalance: {written.path}")


def _demo(args: Demo, command: str) -> None:
    from jaximm import run

    out = args.out or (DEMO_FOLDER if args.resume else _free_folder(DEMO_FOLDER))
    if args.out is None and out != DEMO_FOLDER:
        print(f"{DEMO_FOLDER} holds an earlier demo; this one goes to {out}.", file=sys.stderr)
    if not args.resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give --resume to continue it, or another --out.")
    try:
        with Progress(None if args.resume else len(run.DEMO_METHODS)) as progress:
            found = run.demo(out, resume=args.resume, command=command, progress=progress)
    except KeyboardInterrupt as stop:  # by default the folder is chosen anew each time
        words = ["jaximm", "demo", "--out", str(out), "--resume"]
        raise KeyboardInterrupt(shlex.join(words)) from stop
    results = _ordered(run.load_results([out]))
    _print_results(results)
    _write_page(results, out / "report.html")
    _show_assessment(found, _assessment_folder(out) / found["name"])


def _free_folder(folder: Path) -> Path:
    """`folder`, or the first of ``folder-2``, ``folder-3``, ... that is not there or is empty."""
    candidate, number = folder, 1
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _all_finished(out: Path) -> Results:
    """Results of the finished runs below `out`, those of earlier calls included."""
    from jaximm import run

    folders = [folder for folder in run.run_folders(out) if (folder / "result.json").exists()]
    return run.load_results(folders)


def _ordered(results: Iterable[dict[str, Any]]) -> Results:
    """By experiment, then method as in its registry, then seed."""
    from jaximm import immunisers

    rank = {name: place for place, name in enumerate(immunisers.REGISTRY)}

    def key(result: dict[str, Any]) -> tuple[str, int, str, int]:
        label = result["method"]
        name = label.partition("@")[0]
        return result["experiment"], rank.get(name, len(rank)), label, result["seed"]

    return sorted(results, key=key)


def _write_page(results: Results, path: Path, *, name: str = "report") -> None:
    from jaximm import report

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        report.write_page(results, path)
    except OSError as error:  # name the page, not the draft beside it
        raise OSError(error.errno, error.strerror, str(path)) from error
    print(f"{name}: {path}")


def _write_text(path: Path, text: str, *, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"{name}: {path}")


# What is printed


class Progress:
    """Progress on stderr: a live bar on a terminal, and a line for each finished run everywhere.

    Call it as `jaximm.run` does: ``progress(label, done, total, record)``.
    """

    def __init__(self, runs: int | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, highlight=False)
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._runs, self._finished, self._last = runs, 0, time.monotonic()
        self._label = ""
        self._task = None

    def __enter__(self) -> Progress:
        self._bars.start()
        self._task = self._bars.add_task("preparing", total=None, note="")
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def __call__(self, label: str, done: int, total: int, record: Mapping[str, Any]) -> None:
        """Shows how far the run `label` is."""
        assert self._task is not None
        if label != self._label:
            self._label = label
            self._bars.reset(self._task, total=total if done else None, description=label, note="")
        self._bars.update(
            self._task, completed=done, total=total if done else None, note=_log_rir(record)
        )
        if done < total:
            return
        self._finished += 1
        place = f"[{self._finished}/{self._runs}]" if self._runs else f"[{self._finished}]"
        now = time.monotonic()
        steps = f"{total:,} {record.get('unit', 'steps')}" if total > 1 else ""
        facts = [fact for fact in (steps, _log_rir(record), f"{now - self._last:.1f} s") if fact]
        self._last = now
        line = f"{place} {label}: {', '.join(facts)}"
        self._console.print(line, markup=False, soft_wrap=True)
        self._bars.reset(self._task, total=None, description="measuring", note="")


def _log_rir(record: Mapping[str, Any]) -> str:
    if "log_ratio_harmful" not in record:
        return ""
    return f"log RIR {record['log_ratio_harmful'] - record['log_ratio_primary']:.2f}"


def _stdout() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False)


def _print_results(results: Results, *, everything: bool = False) -> None:
    """The tables a terminal has room for; the page has all of them."""
    from jaximm.report import run_tables

    console = _stdout()
    for part in run_tables.terminal(_ordered(results), width=console.width, everything=everything):
        console.print(part)


COMMANDS: dict[str, tuple[type, Callable[[Any, str], None]]] = {
    "list": (List, _list),
    "immunise": (Immunise, _immunise),
    "attack": (Attack, _assess),  # before "assess", whose class it extends
    "assess": (Assess, _assess),
    "suite": (Suite, _suite),
    "compare": (Compare, _compare),
    "report": (Report, _report),
    "export": (Export, _export),
    "rebalance": (Rebalance, _rebalance),
    "demo": (Demo, _demo),
}
"""Command name to the class of its arguments and the function that runs it."""


if __name__ == "__main__":
    sys.exit(main())
