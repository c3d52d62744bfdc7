"""From finished runs to assessments: what `jaximm.assessment.assess` takes, built from run folders.

Runs of one experiment are assessed together, with the undefended model beside them whether it is
among the runs or not. Held-out rows are halved as in `jaximm.run`: even ones choose an attacker's
hyper-parameters, odd ones are reported.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp

from jaximm import assessment, attacks, checkpoint, data, measures, models
from jaximm.assessment import LEVELS, Bench, Level, Model, TaskSplits
from jaximm.assessment.protocol import Progress
from jaximm.assessment.workers import Workers
from jaximm.data.rows import are_many, condensed
from jaximm.immunisers import THETA
from jaximm.models import Backbone
from jaximm.models.backbone import Trainable
from jaximm.models.flat import FlatParams, under
from jaximm.models.statistics import features_with_statistics, refresh_fn_of
from jaximm.records import assessment as assessment_record
from jaximm.run.config import Experiment, read_config
from jaximm.run.folders import load_results, read_result, run_folders
from jaximm.run.prepare import SPLITS, TASKS, Prepared, encoded, halved, prepare
from jaximm.types import Batch, Head, Json, Params

FILE = "assessment.json"


def assess(
    paths: Sequence[Path],
    out: Path,
    *,
    level: str | Level | None = "standard",
    attackers: Sequence[str] | None = None,
    as_configured: bool = False,
    harmful_rows: Sequence[int] = (),
    retry_failed: bool = False,
    command: str = "",
    progress: Progress | None = None,
    executor: Callable[[], Executor] | None = None,
) -> list[Json]:
    """Assesses every finished run at or below the paths; one assessment an experiment.

    Args:
      paths: run directories, or folders that hold some.
      out: gets ``NAME/assessment.json`` and ``NAME/cells``. Cells that are there are not computed
        again.
      level: see `jaximm.assessment.assess`; None: the budgets of the experiment (`level_of`).
      attackers: names; None: all that are registered.
      as_configured: take the experiment's own attackers where `attackers` is None.
      harmful_rows: how many labelled harmful rows attackers have; an assessment for each
        (`jaximm.assessment.of_few_harmful_rows`). None given: all that there are.
      retry_failed, command, progress: see `jaximm.assessment.assess`.
      executor: starts one whose workers compute the cells (`jaximm.assessment.workers`); they read
        the runs themselves. None: this process computes them.

    Returns:
      The assessments.

    Raises:
      ValueError: no runs, an unfinished run, constant targets, or what `assess` refuses.
      CheckpointError: a damaged backbone.
    """
    load_results(paths)  # so that a damaged one is reported before hours of work
    groups: dict[str, list[Path]] = {}
    for path in paths:
        for folder in run_folders(Path(path)):
            config = read_config(folder / "config.json")
            same = dataclasses.replace(config, methods=("none",), seeds=(0,), method_fields={})
            groups.setdefault(json.dumps(same.to_json(), sort_keys=True), []).append(folder)
    assessments, names = [], []
    for folders in groups.values():
        config = read_config(folders[0] / "config.json")
        where = [folder.absolute() for folder in folders]
        for count in harmful_rows or (None,):
            rebuild = functools.partial(bench_of, config, where, harmful_rows=count)
            bench, subjects = rebuild(progress)
            names.append(bench.name)
            place = Path(out) / (
                bench.name if names.count(bench.name) == 1 else f"{bench.name}-{len(names)}"
            )
            place.mkdir(parents=True, exist_ok=True)
            configured = attackers is None and as_configured
            document = assessment.assess(
                bench,
                subjects,
                level=level_of(config) if level is None else level,
                attackers=attackers_of(config) if configured else attackers,
                retry_failed=retry_failed,
                out=place,
                command=command,
                progress=progress,
                workers=None if executor is None else Workers(executor, rebuild),
            )
            assessment_record.write(place / FILE, document)
            assessments.append(document)
    return assessments


def level_of(config: Experiment) -> Level:
    """The quick level with the budgets and batches that an experiment names."""
    quick = LEVELS["quick"]
    return dataclasses.replace(
        quick,
        probes=config.suite,
        weight_steps=config.fine_tune_steps,
        batch_size=config.batch_size or quick.batch_size,  # pyrefly: ignore[bad-argument-type]
    )


def attackers_of(config: Experiment) -> list[str]:
    """The attackers that an experiment names: all probes where it names none."""
    probes = attacks.REGISTRY if config.attackers is None else config.attackers
    return [*probes, *(config.weight_attackers or ())]


def load_run(folder: Path, prepared: Prepared) -> checkpoint.Immunised:
    """The backbone of a run and its head; those of tables also as version 1 wrote them.

    Raises:
      CheckpointError: damaged.
    """
    path, template = folder / "backbone", prepared.backbone
    if prepared.config.is_table:
        tree, metadata = checkpoint.load_backbone(path)
        if set(tree) == {"backbone", "head"}:
            backbone = template.replace({THETA: jnp.asarray(tree["backbone"])})
            head = {"kernel": jnp.asarray(tree["head"])}
            return checkpoint.Immunised(backbone, head, metadata)
    return checkpoint.load_immunised(path, template=template)


def params_of(prepared: Prepared, backbone: Backbone | None) -> FlatParams:
    """What trains, and a neck where there is one, of an immunised backbone; None: of theta_0."""
    params = dict(prepared.trainable.params)
    if backbone is None:
        return params
    necks = {path for path in backbone.params if models.under(path, models.NECK)}
    params = {path: backbone.params[path] for path in necks | set(params)}
    if prepared.exact:  # a run in float32 is read in float64, too
        dtype = prepared.train.primary.x.dtype
        params = {path: array.astype(dtype) for path, array in params.items()}
    return params


def bench_of(
    config: Experiment,
    folders: Sequence[Path],
    progress: Progress | None = None,
    *,
    harmful_rows: int | None = None,
) -> tuple[Bench, list[Model]]:
    """The bench of an experiment, and its runs as models, the undefended one first.

    Raises:
      ValueError: constant targets; what `assessment.of_few_harmful_rows` refuses.
    """
    prepared = prepare(config, progress=progress)
    bench = bench_of_tasks(prepared)
    subjects = []
    for folder in folders:
        content = read_result(folder)
        loaded = load_run(folder, prepared)
        assert loaded.head is not None  # a run saves its head
        subjects.append(
            model_of(
                prepared,
                bench,
                loaded.backbone,
                head=_head_of(loaded.head),
                label=label_of(content),
                method=content["method"],
                seed=content["seed"],
                conditioning=conditioning_of(content),
                chosen_on_held_out=bool(content["config"].get("chosen_on_held_out")),
            )
        )
    if all(subject.method != "none" for subject in subjects):
        subjects.insert(0, model_of(prepared, bench, None, head=prepared.head))
    if harmful_rows is not None:
        bench = assessment.of_few_harmful_rows(bench, harmful_rows)
    return bench, in_order(subjects)


def _head_of(arrays: FlatParams) -> Head | None:
    """A stored head; None of numbers, which has no bias and is not used (`model_of`)."""
    return Head(arrays["kernel"], arrays["bias"]) if "bias" in arrays else None


def bench_of_tasks(prepared: Prepared) -> Bench:
    """The bench of a prepared experiment.

    Raises:
      ValueError: constant targets.
    """
    config, trainable = prepared.config, prepared.trainable
    unseen, benign = _related(prepared)
    described = prepared.pair.description
    if not config.is_table:
        described = f"{config.model}, {config.train}: {described}"
    return Bench(
        name=config.name,
        description=described,
        source=prepared.pair.source,
        features_fn=features_with_statistics(trainable),
        harmful=_splits(prepared, prepared.pair.harmful, "harmful"),
        primary=_splits(prepared, prepared.pair.primary, "primary"),
        benign=benign,
        unseen=unseen,
        refresh_fn=refresh_fn_of(trainable),
        convolutions=_convolves(trainable),
        inputs_shared=prepared.inputs_shared.shared,
    )


def model_of(
    prepared: Prepared,
    bench: Bench,
    backbone: Backbone | None,
    *,
    head: Params,
    label: str = "none",
    method: str = "none",
    seed: int = 0,
    conditioning: Conditioning | None = None,
    chosen_on_held_out: bool = False,
) -> Model:
    """A backbone as a model of the bench; None: theta_0.

    Attackers of weights train what the experiment's pattern names, and a neck where a model has
    one. The public model is theta_0. The primary head is the one that is shipped, `head`; of
    numbers, the best ridge head on the model's own features, chosen on selection rows.
    """
    params, public = params_of(prepared, backbone), params_of(prepared, None)
    for path in set(params) - set(public):
        shape, dtype = params[path].shape, params[path].dtype
        public[path] = jnp.eye(*shape, dtype=dtype) if len(shape) == 2 else jnp.zeros(shape, dtype)
    if prepared.classes("primary") is None:
        head = ridge_head(bench.primary, params[THETA])
    return Model(
        label=label,
        method=method,
        seed=seed,
        params=params,
        benign_head=head,
        public=public,
        conditioning=conditioning,
        # What `features_fn` holds beside its parameters, for the hash of a model.
        frozen={"params": prepared.backbone.params, "stats": prepared.backbone.stats},
        chosen_on_held_out=chosen_on_held_out,
    )


def _convolves(trainable: Trainable) -> bool:
    """Whether what trains may convolve: a kernel of three or more axes after the cut."""
    return any(
        array.ndim > 2
        for path, array in trainable.backbone.params.items()
        if any(under(path, stage) for stage in trainable.suffix_stages)
    )


def _splits(prepared: Prepared, task: data.Task, name: str | None = None) -> TaskSplits:
    """A task's rows at the cut; binary targets become labels 0 and 1.

    With `name`, those of the pair's own task of that name, which are there. Many rows of a table
    stay where they are, with the few that stand for them beside them.
    """
    if task.kind == "constant":
        raise ValueError(
            f"task {task.name!r} has constant targets: there is nothing to attack. Choose another "
            "target, such as data.target=slant."
        )
    if name is None:
        few = data.in_few_rows if task.kind != "classes" else lambda pair: pair
        rows = halved(few(prepared.pair._replace(primary=task, harmful=task)))
        parts = encoded(prepared.trainable, [rows[split].primary for split in SPLITS])
    else:
        parts = [getattr(prepared.activations[split], name) for split in SPLITS]
    classes, few = len(task.classes) or None, None
    if task.kind != "classes" and are_many(task.train.x):
        few = parts[0]
        if few.x.shape[0] == len(task.train.y):  # a method of this experiment draws batches of them
            few = Batch(*map(jnp.asarray, condensed(*task.train)))
        if task.kind == "binary":
            few = Batch(few.x, jnp.stack([1 - few.y, 1 + few.y], axis=1) / 2)  # one-hot labels
        parts[0] = Batch(task.train.x, task.train.y)
    if task.kind == "binary":
        parts = [Batch(part.x, jnp.asarray(part.y > 0, jnp.int32)) for part in parts]
        classes = 2
    train, selection, held_out = parts
    return TaskSplits(train, selection, held_out, classes, few)


def _related(prepared: Prepared) -> tuple[dict[str, TaskSplits], dict[str, TaskSplits]]:
    """Tasks that no method has seen: harmful ones, and benign ones."""
    pair = prepared.pair
    unseen, benign = (
        {
            name: _splits(prepared, data.check_task(read(), as_inputs=pair.as_inputs))
            for name, read in tasks.items()
        }
        for tasks in (pair.unseen, pair.benign)
    )
    return unseen, benign


def ridge_head(rows: TaskSplits, theta: jax.Array) -> Head:
    """The ridge head of best selection quality, as a `Head`."""

    def signed(part):
        if part.y.ndim == 2:  # one-hot
            return Batch(part.x, part.y[:, 1] - part.y[:, 0])
        y = part.y if rows.classes is None else 2 * part.y.astype(theta.dtype) - 1
        return Batch(part.x, y)

    train = rows.train if rows.few is None else rows.few
    parts = measures.Rows(*map(signed, (train, rows.selection, rows.held_out)))
    weights = measures.best_head(parts, theta, metric=rows.metric)
    kernel = weights[:, None] if rows.classes is None else jnp.stack([-weights, weights], axis=1)
    return Head(kernel, jnp.zeros(kernel.shape[1], kernel.dtype))


def label_of(content: Json) -> str:
    """A run's label among others: its method, and its seed unless that is 0."""
    method, seed = content["method"], content["seed"]
    return method if seed == 0 else f"{method} s{seed}"


class Conditioning(TypedDict):
    """What an assessment says of a model's condition numbers: the damped training row in short."""

    log_ratio_harmful: float | None
    log_ratio_primary: float | None
    log_rir: float | None
    log_rir_limit: float | None
    log_fraction: float | None
    log_rir_held_out: float | None
    dominated_by: dict[str, str]  # by task


def conditioning_of(content: Json) -> Conditioning:
    """That of a run, from its result."""
    damped = content["conditioning"]["damped"]
    row = damped["train"]
    return {
        "log_ratio_harmful": row["log_ratio_harmful"],
        "log_ratio_primary": row["log_ratio_primary"],
        "log_rir": row["log_rir"],
        "log_rir_limit": row["log_rir_limit"],
        "log_fraction": row["log_fraction"],
        "log_rir_held_out": damped["held_out"]["log_rir"],
        "dominated_by": {task: row[task]["after"]["dominated_by"] for task in TASKS},
    }


def in_order(subjects: list[Model]) -> list[Model]:
    """The undefended model first, the others as they came."""
    return sorted(subjects, key=lambda subject: subject.method != "none")
