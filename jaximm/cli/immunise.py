"""`jaximm immunise`: an experiment, its fields replaced by flags, run by its methods."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from jaximm.cli.common import Common
from jaximm.cli.errors import UsageError
from jaximm.cli.output import check_ours, ordered, print_results, tell, write_page
from jaximm.cli.progress import Progress
from jaximm.cli.values import assignments_of, changes_of, given, scalar_fields, with_flags

if TYPE_CHECKING:
    from jaximm.cli.output import Results
    from jaximm.run.config import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Immunise(Common):
    """Run the methods of an experiment, measure them, write results and report.html.

    Flags that name a field of the experiment replace its value there. A language model is immunised
    by the same command: see jaximm immunise FOLDER --help.

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
      peer_timeout: seconds of silence after which a process counts as dead, and the others end.
      start_timeout: seconds to wait for all processes to appear.
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
    peer_timeout: Annotated[int, tyro.conf.arg(metavar="S")] = 100
    start_timeout: Annotated[int, tyro.conf.arg(metavar="S")] = 300
    load: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    set: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()


def run_command(args: Immunise, command: str) -> None:
    """Runs the experiment and shows all results below its folder."""
    from jaximm import run

    check_ours(args.out / "report.html")
    first = _join(args, command)
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
    everything = ordered(_all_finished(args.out) or results)
    print_results(everything)
    write_page(everything, args.out / "report.html")
    print(f"next: {shlex.join(['jaximm', 'attack', str(args.out)])}")


def _join(args: Immunise, command: str) -> bool:
    """Joins the processes of the run; whether this is the first of them.

    Raises:
      UsageError: flags that do not fit together.
    """
    by_hand = (args.coordinator, args.processes, args.process_id)
    if args.distributed == "none" and by_hand == (None, None, None):
        return True
    from jaximm import training

    cluster = "auto" if args.distributed == "none" else args.distributed
    try:
        config = training.DistributedConfig(
            coordinator=args.coordinator,
            num_processes=args.processes,
            process_id=args.process_id,
            cluster=cluster,
            heartbeat_timeout=args.peer_timeout,
            init_timeout=args.start_timeout,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    info = training.initialise(config)
    if info.process_count > 1:  # said now: the runtime aborts a process that lost another
        goes_on = command if args.resume else f"{command} --resume"
        tell(
            f"process {info.process_index} of {info.process_count}. If one dies, the others are "
            f"ended after {args.peer_timeout} s of silence; then `{goes_on}` in all of them goes "
            "on from the last checkpoint."
        )
    return info.process_index == 0


def experiment_of(args: Immunise) -> Experiment:
    """The experiment that the flags of `immunise` describe.

    Raises:
      UsageError: an unknown name or key, or a value that its config class refuses.
    """
    from jaximm import run
    from jaximm.run.config import RENAMED, Experiment, load_code

    path = Path(args.experiment)
    if path.suffix == ".py" and path.is_file():
        tell(f"running {path}: a .py configuration is code that runs.")
    is_file = path.suffix in (".json", ".py") and path.is_file()
    if is_file and path.suffix == ".json":
        load_code([path], tell=tell)
    try:
        config = run.load_experiment(args.experiment)
    except ValueError as error:
        raise error if is_file else UsageError(str(error)) from None
    assignments = assignments_of(args.set)
    for flag, text in given(args, (*scalar_fields(Experiment), *RENAMED)).items():
        key = RENAMED.get(flag, flag)
        if key in assignments:
            raise UsageError(f"{key} is given twice, by its flag and by --set; give it once.")
        assignments[key] = text
    changes = changes_of(config, assignments)
    if args.method:
        changes["methods"] = args.method
    if args.seed:
        changes["seeds"] = args.seed
    try:
        return dataclasses.replace(config, **changes)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _all_finished(out: Path) -> Results:
    """Results of the finished runs below `out`, those of earlier calls included."""
    from jaximm import run

    folders = [folder for folder in run.run_folders(out) if (folder / "result.json").exists()]
    return run.load_results(folders)


def with_experiment_flags() -> type:
    """`Immunise` with a flag for each scalar field of the experiment."""
    from jaximm.run.config import RENAMED, Experiment

    default = "(by default the experiment's)"
    return with_flags(Immunise, Experiment, renamed=RENAMED, default=default)
