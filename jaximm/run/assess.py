"""From finished runs to assessments: what `jaximm.assessment.assess` takes, built from run folders.

Runs of one experiment are assessed together, with the undefended model beside them whether it is
among the runs or not. Held-out rows are halved as in `jaximm.run`: even ones choose an attacker's
hyper-parameters, odd ones are reported.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaximm import assessment, checkpoint, data, measures, models
from jaximm.assessment import Bench, Level, Model, TaskSplits
from jaximm.assessment.protocol import Progress
from jaximm.data import Task, images
from jaximm.records import assessment as assessment_record
from jaximm.records import result
from jaximm.run import deep as run_deep
from jaximm.run.config import DeepConfig, ExperimentConfig, read_config
from jaximm.run.folders import load_results, run_folders
from jaximm.types import Batch, Head

FILE = "assessment.json"


def assess(
    paths: Sequence[Path],
    out: Path,
    *,
    level: str | Level = "standard",
    attackers: Sequence[str] | None = None,
    retry_failed: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Assesses every finished run at or below the paths; one assessment an experiment.

    Args:
      paths: run directories, or folders that hold some.
      out: gets ``NAME/assessment.json`` and ``NAME/cells``. Cells that are there are not computed
        again.
      level, attackers, retry_failed, command, progress: see `jaximm.assessment.assess`.

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
    found, names = [], []
    for folders in groups.values():
        config = read_config(folders[0] / "config.json")
        if isinstance(config, DeepConfig):
            bench, subjects = deep_bench(config, folders)
        else:
            bench, subjects = linear_bench(config, folders)
        names.append(bench.name)
        where = Path(out) / (
            bench.name if names.count(bench.name) == 1 else f"{bench.name}-{len(names)}"
        )
        where.mkdir(parents=True, exist_ok=True)
        one = assessment.assess(
            bench,
            subjects,
            level=level,
            attackers=attackers,
            retry_failed=retry_failed,
            out=where,
            command=command,
            progress=progress,
        )
        assessment_record.write(where / FILE, one)
        found.append(one)
    return found


def _linear(params: Mapping[str, Any], x: Any) -> Any:
    return x @ params["backbone"]


def _rows(task: Task) -> TaskSplits:
    """A task's rows as arrays; binary targets become labels 0 and 1."""
    if task.kind == "constant":
        raise ValueError(
            f"task {task.name!r} has constant targets: there is nothing to attack. Choose another "
            "target, such as data.target=slant."
        )

    def batch(x, y):
        x = jnp.asarray(np.asarray(x), jnp.zeros(()).dtype)
        if task.kind == "binary":
            return Batch(x, jnp.asarray(np.asarray(y) > 0, jnp.int32))
        return Batch(x, jnp.asarray(np.asarray(y), x.dtype))

    held = task.held_out
    return TaskSplits(
        batch(*task.train),
        batch(held.x[0::2], held.y[0::2]),
        batch(held.x[1::2], held.y[1::2]),
        2 if task.kind == "binary" else None,
    )


def linear_bench(config: ExperimentConfig, folders: Sequence[Path]) -> tuple[Bench, list[Model]]:
    """The bench of an experiment on a linear backbone, and its runs as models.

    The primary head of every model is the best ridge head on its own features, chosen on selection
    rows; the public model is the identity.
    """
    pair = data.load(config.data, **config.data_fields)
    related = data.related_tasks(config.data, **config.data_fields)
    primary = _rows(pair.primary)
    bench = Bench(
        name=config.name,
        description=pair.description,
        source=pair.source,
        features_fn=_linear,
        harmful=_rows(pair.harmful),
        primary=primary,
        benign={name: _rows(task) for name, task in related.benign.items()},
        unseen={name: _rows(task) for name, task in related.unseen.items()},
        inputs_shared=data.inputs_shared(pair).shared,
    )
    dtype = primary.train.x.dtype
    identity = {"backbone": jnp.eye(primary.train.x.shape[1], dtype=dtype)}

    def model(label, method, seed, params, conditioning):
        head = ridge_head(primary, params["backbone"])
        return Model(
            label=label,
            method=method,
            seed=seed,
            params=params,
            benign_head=head,
            public=identity,
            conditioning=conditioning,
        )

    subjects = []
    for folder in folders:
        found = result.read(folder / "result.json")
        params, _ = checkpoint.load_backbone(folder / "backbone")
        subjects.append(
            model(
                label_of(found),
                found["method"],
                found["seed"],
                {"backbone": jnp.asarray(params["backbone"], dtype)},
                conditioning_of(found),
            )
        )
    if all(subject.method != "none" for subject in subjects):
        subjects.insert(0, model("none", "none", 0, identity, None))
    return bench, in_order(subjects)


def ridge_head(rows: TaskSplits, theta: Any) -> Head:
    """The ridge head of best selection quality, as a `Head`."""

    def signed(part):
        y = part.y if rows.classes is None else 2 * part.y.astype(theta.dtype) - 1
        return Batch(part.x, y)

    metric = "r2" if rows.classes is None else "accuracy"
    parts = measures.Rows(*map(signed, (rows.train, rows.selection, rows.held_out)))
    weights = measures.best_head(parts, theta, metric=metric)
    kernel = weights[:, None] if rows.classes is None else jnp.stack([-weights, weights], axis=1)
    return Head(kernel, jnp.zeros(kernel.shape[1], kernel.dtype))


def deep_bench(config: DeepConfig, folders: Sequence[Path]) -> tuple[Bench, list[Model]]:
    """The bench of an experiment on a deep backbone, and its runs as models.

    Attackers of weights train the stages that the experiment's pattern names, and a neck where a
    model has one. The primary head is the one that is shipped; the public model is theta_0.
    """
    from jaximm.models.statistics import features_with_statistics, refresh_fn_of

    prepared = run_deep.prepare(config)
    trainable = prepared.trainable

    def rows(task):
        parts = {split: getattr(prepared.activations[split], task) for split in run_deep.SPLITS}
        return TaskSplits(**parts, classes=len(getattr(prepared.pair, task).classes))

    unseen = {}
    other = RELATED_IMAGES.get(config.images)
    if other is not None:
        task = images.load_images(other, **_shared_fields(other, config.image_fields)).harmful
        unseen[other] = _unseen_rows(prepared, task)
    bench = Bench(
        name=config.name,
        description=f"{config.backbone}, {config.train}: {prepared.pair.description}",
        source=prepared.pair.source,
        features_fn=features_with_statistics(trainable),
        harmful=rows("harmful"),
        primary=rows("primary"),
        unseen=unseen,
        refresh_fn=refresh_fn_of(trainable),
        convolutions=True,
        inputs_shared=images.images_shared(prepared.pair).shared,
    )
    undefended = dict(trainable.params)
    # What `features_fn` holds beside its parameters, for the hash of a model.
    held = {"params": prepared.backbone.params, "stats": prepared.backbone.stats}

    def model(label, method, seed, backbone, head, conditioning):
        params, public = dict(undefended), dict(undefended)
        if backbone is not None:
            necks = {path for path in backbone.params if models.under(path, models.NECK)}
            params = {path: backbone.params[path] for path in necks | set(params)}
            for path in necks:
                shape, dtype = params[path].shape, params[path].dtype
                public[path] = (
                    jnp.eye(*shape, dtype=dtype) if len(shape) == 2 else jnp.zeros(shape, dtype)
                )
        return Model(
            label=label,
            method=method,
            seed=seed,
            params=params,
            benign_head=head,
            public=public,
            conditioning=conditioning,
            frozen=held,
        )

    subjects = []
    for folder in folders:
        found = result.read(folder / "result.json")
        loaded = checkpoint.load_immunised(folder / "backbone", template=prepared.backbone)
        assert loaded.head is not None  # a run saves its head
        subjects.append(
            model(
                label_of(found),
                found["method"],
                found["seed"],
                loaded.backbone,
                Head(loaded.head["kernel"], loaded.head["bias"]),
                conditioning_of(found),
            )
        )
    if all(subject.method != "none" for subject in subjects):
        subjects.insert(0, model("none", "none", 0, None, prepared.head, None))
    return bench, in_order(subjects)


RELATED_IMAGES = {"cifar10_split": "cifar10_fashion"}
"""Image pairs whose harmful task no defence of the first pair has seen."""


def _shared_fields(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(images.IMAGE_REGISTRY[name][0])}
    return {key: value for key, value in fields.items() if key in known}


def _unseen_rows(prepared: run_deep.DeepPrepared, task: Any) -> TaskSplits:
    """Activations of another task's images at the cut."""

    def batch(pixels, labels):
        x = run_deep.prefix_activations(prepared.trainable, np.asarray(pixels))
        return Batch(x, jnp.asarray(labels, jnp.int32))

    held = task.held_out
    return TaskSplits(
        batch(task.train.images, task.train.labels),
        batch(held.images[0::2], held.labels[0::2]),
        batch(held.images[1::2], held.labels[1::2]),
        len(task.classes),
    )


def label_of(found: Mapping[str, Any]) -> str:
    """A run's label among others: its method, and its seed unless that is 0."""
    return found["method"] if found["seed"] == 0 else f"{found['method']} s{found['seed']}"


def conditioning_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What an assessment says of a run's condition numbers: the damped training row in short."""
    row = found["conditioning"]["damped"]["train"]
    held_out = found["conditioning"]["damped"]["held_out"]
    short = {
        key: row[key]
        for key in (
            "log_ratio_harmful",
            "log_ratio_primary",
            "log_rir",
            "log_rir_limit",
            "log_fraction",
        )
    }
    return short | {
        "log_rir_held_out": held_out["log_rir"],
        "dominated_by": {
            task: row[task]["after"]["dominated_by"] for task in ("primary", "harmful")
        },
    }


def in_order(subjects: list[Model]) -> list[Model]:
    """The undefended model first, the others as they came."""
    return sorted(subjects, key=lambda subject: subject.method != "none")
