"""A deep experiment: what `jaximm.run` does for a `DeepConfig`.

The frozen stages of the backbone run once over all images; what trains sees their activations.
Closed-form methods see the features themselves. theta_0 in every ratio is the backbone as its
weights came, and the results hold the content hashes of both, which must differ for any method but
`none`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaximm import attacks, checkpoint, data, immunisers, measures, models, training
from jaximm.data import images
from jaximm.immunisers import DeepProblem, Head, ProbeParams
from jaximm.measures import features as feature_kappas
from jaximm.measures import groups as row_groups
from jaximm.models import Backbone, Trainable
from jaximm.run.config import CLOSED_FORM, DeepConfig, deep_method_config, parse_label
from jaximm.training.optimiser import make_optimiser
from jaximm.types import Batch, PairedBatch

SPLITS = ("train", "selection", "held_out")
TASKS = ("primary", "harmful")

PREFIX_ROWS = 100
"""Images a pass through the frozen stages."""

MONITOR_ROWS = 256
"""Training rows of each task whose features a trajectory's condition numbers are of."""


class DeepPrepared(NamedTuple):
    """Images through the frozen stages, and a primary head for theta_0.

    ``activations`` and ``features`` hold a `PairedBatch` a split: float32 [n, ...] with int32
    labels. Held-out rows are halved: even ones select, odd ones are reported.
    """

    pair: Any
    backbone: Backbone
    trainable: Trainable
    closed: Trainable
    activations: dict[str, PairedBatch]
    features: dict[str, PairedBatch]
    head: Head
    before: dict[str, feature_kappas.Tasks]
    groups_before: dict[str, dict[str, np.ndarray]]
    limit: dict[str, float]
    seconds: float


def prepare(config: DeepConfig, *, train: bool = False) -> DeepPrepared:
    """Data, weights, activations, and everything that does not depend on the method.

    Args:
      config: the experiment.
      train: its methods will run, so their batches are checked against the rows and devices.

    Raises:
      ValueError: what the data, the model or the path pattern refuses, or such a batch.
    """
    started = time.perf_counter()
    pair = images.load_images(config.images, **config.image_fields)
    if train:
        rows = halved(pair)["train"]
        for label in config.methods:
            size = deep_method_config(label, config).batch_size
            closed = parse_label(label)[0] in CLOSED_FORM
            data.check_batches(
                rows,
                size,
                label=label,
                devices=1 if size is None else jax.device_count(),
                accumulate=1 if closed else config.accumulate,
            )
    backbone = load_backbone(config)
    dtype = None if config.compute_dtype == "float32" else jnp.bfloat16
    trainable = backbone.split_at(config.train, compute_dtype=dtype, sites=config.sites)
    closed = backbone.split_at("")
    raw = halved(pair)
    activations = {
        split: PairedBatch(
            *(
                Batch(
                    prefix_activations(trainable, np.asarray(task.x)),
                    jnp.asarray(task.y, jnp.int32),
                )
                for task in raw[split]
            )
        )
        for split in SPLITS
    }
    found = {
        split: PairedBatch(
            *(
                Batch(batched(trainable.features_fn, trainable.params, task.x), task.y)
                for task in activations[split]
            )
        )
        for split in SPLITS
    }
    classes = len(pair.primary.classes)
    head = fit_head(found["train"].primary.x, found["train"].primary.y, classes)
    return DeepPrepared(
        pair,
        backbone,
        trainable,
        closed,
        activations,
        found,
        head,
        {split: _kappas(found[split], found["train"], {}) for split in ("train", "held_out")},
        {split: _groups(found[split], config) for split in ("train", "held_out")},
        {split: _limit(found[split], found["train"]) for split in ("train", "held_out")},
        time.perf_counter() - started,
    )


def load_backbone(config: DeepConfig) -> Backbone:
    """theta_0 of an experiment."""
    preprocess = dict(config.preprocess)
    if config.image_size is not None:
        expected = models.REGISTRY[config.backbone].preprocess.resize
        preprocess["size"] = config.image_size
        preprocess.setdefault("resize", max(config.image_size, expected))
    random = config.weights == "random"
    # A config.json has lists where a model's configuration has tuples.
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.backbone_fields.items()
    }
    return models.create(
        config.backbone,
        weights=None if random else config.weights,
        classifier=config.classifier,
        prefix=config.prefix,
        layout=config.layout,
        rng_key=jax.random.key(0) if random else None,
        preprocess=preprocess,
        **fields,
    )


def halved(pair: Any) -> dict[str, PairedBatch]:
    """uint8 images and labels by split, held-out rows shared out between selection and report."""

    def rows(task, split):
        if split == "train":
            return Batch(task.train.images, task.train.labels)
        start = 0 if split == "selection" else 1
        return Batch(task.held_out.images[start::2], task.held_out.labels[start::2])

    return {
        split: PairedBatch(*(rows(getattr(pair, task), split) for task in TASKS))
        for split in SPLITS
    }


def prefix_activations(trainable: Trainable, pixels: np.ndarray) -> jax.Array:
    """Activations at the cut of uint8 images, through one compiled program."""
    backbone = trainable.backbone
    run = _prefix(trainable)
    parts = []
    for start in range(0, len(pixels), PREFIX_ROWS):
        chunk = pixels[start : start + PREFIX_ROWS]
        missing = PREFIX_ROWS - len(chunk)
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        parts.append(run(backbone.params, backbone.stats, padded)[: len(chunk)])
    return jnp.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _prefix(trainable: Trainable):
    @jax.jit
    def run(params, stats, pixels):
        # Numbers as arguments: as constants of the program they would be copied into it.
        backbone = dataclasses.replace(trainable.backbone, params=params, stats=stats)
        inputs = backbone.preprocess(pixels)
        return models.run_stages(backbone, params, inputs, trainable.prefix_stages, neck=False)

    return run


def batched(
    features_fn: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    inputs: jax.Array,
    *,
    rows: int = 500,
) -> Float[Array, "n d"]:
    """Features of many rows, a part at a time."""
    run = _compiled(features_fn)
    return jnp.concatenate(
        [run(params, inputs[start : start + rows]) for start in range(0, inputs.shape[0], rows)]
    )


@functools.lru_cache(maxsize=32)
def _compiled(features_fn):
    return jax.jit(features_fn)


def fit_head(
    features: Float[Array, "n d"],
    labels: Int[Array, "n"],
    classes: int,
    *,
    weight_decay: float = 0.1,
    steps: int = 300,
) -> Head:
    """A softmax classifier on fixed features: Adam on standardised ones, all rows a step.

    The standardisation is folded into the head, so it applies to the features as they are.
    """
    mean = jnp.mean(features, axis=0)
    scale = jnp.std(features, axis=0)
    scale = jnp.maximum(scale, 1e-3 * jnp.max(scale))
    head = _fit(features, labels, mean, scale, weight_decay, classes=classes, steps=steps)
    kernel = head.kernel / scale[:, None]
    return Head(kernel, head.bias - mean @ kernel)


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def _fit(features, labels, mean, scale, weight_decay, *, classes, steps) -> Head:
    standard = (features - mean[None, :]) / scale[None, :]
    targets = jax.nn.one_hot(labels, classes, dtype=standard.dtype)
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(head):
        logits = jax.nn.log_softmax(standard @ head.kernel + head.bias[None, :])
        penalty = weight_decay / 2 * jnp.sum(head.kernel**2)
        return penalty.astype(logits.dtype) - jnp.mean(jnp.sum(targets * logits, axis=1))

    def step(carry, _):
        head, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(jax.grad(loss)(head), state)
        moved: Any = optax.apply_updates(head, updates)
        return (jax.tree.map(lambda new, old: new.astype(old.dtype), moved, head), state), None

    start = immunisers.init_head(features.shape[1], classes, features.dtype)
    with jax.numpy_dtype_promotion("standard"):
        state = optimiser.init(start)
    (head, _), _ = jax.lax.scan(step, (start, state), None, length=steps)
    return head


def _kappas(
    rows: PairedBatch, train: PairedBatch, params: Mapping[str, jax.Array]
) -> feature_kappas.Tasks:
    """Both tasks' condition numbers from features before the neck, and the neck."""
    return feature_kappas.Tasks(
        *(
            feature_kappas.feature_kappas(
                feature_kappas.task_rows(task.x, fitted.x),
                params.get("neck.kernel"),
                params.get("neck.bias"),
            )
            for task, fitted in zip(rows, train, strict=True)
        )
    )


def _limit(rows: PairedBatch, train: PairedBatch) -> float:
    """The largest damped log RIR that a linear map after theta_0's features can have."""
    tasks = [
        feature_kappas.task_rows(task.x, fitted.x) for task, fitted in zip(rows, train, strict=True)
    ]
    return float(measures.log_rir_limit(*tasks))


def _groups(rows: PairedBatch, config: DeepConfig) -> dict[str, np.ndarray]:
    return {
        task: row_groups.group_log_kappas(
            batch.x, groups=config.groups, size=min(config.group_rows, batch.x.shape[0])
        )
        for task, batch in zip(TASKS, rows, strict=True)
    }


class DeepImmunised(NamedTuple):
    """A method's outcome: trained parameters, perhaps a neck, and the head that goes with them."""

    label: str
    params: ProbeParams
    trainable: Trainable
    config: Any
    trajectory: list[dict[str, Any]]
    seconds: float
    steps: int


def run_method(
    prepared: DeepPrepared,
    label: str,
    experiment: DeepConfig,
    *,
    seed: int = 0,
    checkpoints: checkpoint.TrainCheckpoints | None = None,
    resume: bool = False,
    log: training.MetricsLog | None = None,
    progress: Callable[[int, int, Mapping[str, Any]], None] | None = None,
) -> DeepImmunised:
    """Runs one method from theta_0 and its head."""
    name, _ = parse_label(label)
    method = deep_method_config(label, experiment)
    closed = name in CLOSED_FORM
    trainable = prepared.closed if closed else prepared.trainable
    arrays = prepared.features["train"] if closed else prepared.activations["train"]
    problem = DeepProblem(
        features_fn=trainable.features_fn,
        sites_fn=trainable.sites_fn if trainable.sites else None,
        width=prepared.backbone.width,
        classes=len(prepared.pair.primary.classes),
        harmful_classes=len(prepared.pair.harmful.classes),
        optimiser=make_optimiser(experiment.optimiser, method.steps),
        label_smoothing=experiment.label_smoothing,
        accumulate=experiment.accumulate,
    )
    started = time.perf_counter()
    monitor = _Monitor(prepared, trainable, arrays)
    start = ProbeParams(dict(trainable.params), prepared.head)
    batch_fn = functools.partial(data.paired_batch, batch_size=method.batch_size)
    parallel = None
    if jax.device_count() > 1:
        # Closed forms see all rows at once, whatever number of them there is.
        rows = "whole" if method.batch_size is None else "split"
        parallel = training.make_parallel(experiment.parallel, rows=rows)
    fitted = training.fit(
        immunisers.make_immuniser(name, method, problem),
        start,
        jax.tree_util.Partial(batch_fn, arrays, jnp.uint32(seed)),
        seed=seed,
        steps=method.steps,
        log_every=max(1, method.steps // experiment.log_points),
        measure_fn=monitor,
        checkpoints=checkpoints,
        checkpoint_every=experiment.checkpoint_every,
        resume=resume,
        log=log,
        progress=None
        if progress is None
        else lambda done, record: progress(done, method.steps, record),
        parallel=parallel,
        loop="host" if jax.default_backend() == "cpu" else "device",
    )
    return DeepImmunised(
        label,
        fitted.params,
        trainable,
        method,
        [_trajectory_row(row) for row in fitted.trajectory],
        max(time.perf_counter() - started, fitted.seconds),
        fitted.steps_done,
    )


class _Monitor:
    """Condition numbers of some training rows as training goes on, relative to theta_0."""

    def __init__(self, prepared: DeepPrepared, trainable: Trainable, arrays: PairedBatch):
        self._fn = trainable.features_fn
        self._rows = [task.x[:MONITOR_ROWS] for task in arrays]
        start = [task.x[:MONITOR_ROWS] for task in prepared.features["train"]]
        self._before = [float(_monitored(rows)["log_kappa"]) for rows in start]

    def __call__(self, params: ProbeParams) -> dict[str, float]:
        logged: dict[str, float] = {}
        for task, rows, before in zip(TASKS, self._rows, self._before, strict=True):
            found = _monitored(_compiled(self._fn)(params.backbone, rows))
            for key, value in found.items():
                logged[f"{key}_{task}"] = float(value)
            logged[f"log_ratio_{task}"] = logged[f"log_kappa_{task}"] - before
        return logged


@jax.jit
def _monitored(features):
    rows = feature_kappas.task_rows(features)
    found = feature_kappas.feature_kappas(rows)
    return {
        "log_kappa": found.pseudo_inverse.log_kappa,
        "rank": found.pseudo_inverse.rank,
        "scale": jnp.mean(found.eigenvalues),
    }


def _trajectory_row(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if not key.endswith("_mean")}
    for task in TASKS:
        kept[f"rank_{task}"] = int(kept[f"rank_{task}"])
    return kept


def features_after(
    prepared: DeepPrepared,
    immunised: DeepImmunised,
    params: Mapping[str, jax.Array] | None = None,
) -> dict[str, PairedBatch]:
    """Features of every row under the immunised backbone, or under other trained parameters."""
    closed = immunised.trainable is prepared.closed
    arrays = prepared.features if closed else prepared.activations
    fn = immunised.trainable.features_fn
    used = immunised.params.backbone if params is None else params
    return {
        split: PairedBatch(*(Batch(batched(fn, used, task.x), task.y) for task in arrays[split]))
        for split in SPLITS
    }


def measure(prepared: DeepPrepared, immunised: DeepImmunised, config: DeepConfig) -> dict[str, Any]:
    """The measured sections of a result: conditioning, spectra, groups, logits, utilities."""
    after = features_after(prepared, immunised)
    params = immunised.params.backbone
    bare = {path: value for path, value in params.items() if not models.under(path, models.NECK)}
    unmoved = features_after(prepared, immunised, bare) if len(bare) < len(params) else after
    conditioning: dict[str, dict[str, Any]] = {}
    spectra: dict[str, Any] = {}
    groups = {}
    for split in ("train", "held_out"):
        kappas = _kappas(unmoved[split], unmoved["train"], params)
        rows = feature_kappas.conditioning_rows(
            prepared.before[split],
            kappas,
            limit=prepared.limit[split],
            dtype=config.compute_dtype,
        )
        for footing, row in rows.items():
            conditioning.setdefault(footing, {})[split] = row
        if split == "train":
            spectra = {
                task: {
                    side: np.asarray(getattr(found, task).eigenvalues).tolist()
                    for side, found in (("before", prepared.before[split]), ("after", kappas))
                }
                for task in TASKS
            }
        groups[split] = row_groups.group_summary(
            prepared.groups_before[split],
            _groups(after[split], config),
            size=config.group_rows,
        )
    return {
        "conditioning": conditioning,
        "spectra": spectra,
        "groups": groups,
        "logits_change": _logits_change(prepared, immunised, after),
        "utility": _shipped(prepared, immunised, after),
        "harmful_utility": _recoverable(prepared, after),
    }


def logits(head: Head, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
    """Scores of a classifier on features."""
    return features @ head.kernel + head.bias[None, :]


def accuracy(head: Head, rows: Batch) -> float:
    """Accuracy of a classifier on features."""
    hits = jnp.argmax(logits(head, rows.x), axis=1).astype(rows.y.dtype) == rows.y
    return float(jnp.mean(hits))


def _logits_change(prepared, immunised, after) -> float:
    """Largest change of a primary logit on held-out rows, over the largest logit before."""
    before = logits(prepared.head, prepared.features["held_out"].primary.x)
    moved = logits(immunised.params.head, after["held_out"].primary.x) - before
    return float(jnp.max(jnp.abs(moved)) / jnp.max(jnp.abs(before)))


def _shipped(prepared, immunised, after) -> dict[str, Any]:
    """Primary accuracy of the head that goes with each backbone."""
    return {
        "metric": "accuracy",
        "before": {
            split: accuracy(prepared.head, prepared.features[split].primary)
            for split in ("train", "held_out")
        },
        "after": {
            split: accuracy(immunised.params.head, after[split].primary)
            for split in ("train", "held_out")
        },
    }


def _recoverable(prepared, after) -> dict[str, Any]:
    """Harmful accuracy of the best damped least-squares head, which no conditioning hinders."""
    section: dict[str, Any] = {"metric": "accuracy"}
    for side, rows in (("before", prepared.features), ("after", after)):
        found = measures.best_classifier_accuracy(
            *(rows[split].harmful for split in SPLITS), classes=len(prepared.pair.harmful.classes)
        )
        section[side] = {"train": found.train, "held_out": found.held_out}
    return section


def save_and_describe(
    path: Path, prepared: DeepPrepared, immunised: DeepImmunised, sections: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the immunised backbone with its head, unless it is there; what a result says of it.

    The hashes are those of all parameters: equal ones say that before and after are one model.
    """
    whole = immunised.trainable.whole(immunised.params.backbone)
    if not path.exists():
        checkpoint.save_immunised(
            path,
            whole,
            immunised.params.head,
            method=immunised.label,
            config=immunised.config,
            conditioning=sections["conditioning"]["damped"],
        )
    return {
        "init": "pretrained",
        "dtype": "float32",
        "data": describe_data(prepared),
        "backbone": {
            "model": prepared.backbone.name,
            "trained": immunised.trainable.pattern,
            "hash_before": checkpoint.content_hash(prepared.backbone.params),
            "hash_after": checkpoint.content_hash(whole.params),
        },
    }


def describe_data(prepared: DeepPrepared) -> dict[str, Any]:
    """The data section of a result."""
    pair = prepared.pair
    section: dict[str, Any] = {
        "name": pair.name,
        "description": pair.description,
        "source": pair.source,
        "inputs_shared": images.images_shared(pair).shared,
    }
    for task in TASKS:
        one = getattr(pair, task)
        section[task] = {
            "name": one.name,
            "kind": "classes",
            "classes": len(one.classes),
            "n_train": getattr(prepared.features["train"], task).x.shape[0],
            "n_selection": getattr(prepared.features["selection"], task).x.shape[0],
            "n_held_out": getattr(prepared.features["held_out"], task).x.shape[0],
            "d": prepared.backbone.width,
        }
    return section


def attack_names(
    config: DeepConfig, attackers: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Probes and attackers of weights among the names; the experiment's own where there are none.

    Raises:
      ValueError: an unknown name.
    """
    if attackers is None:
        probes = attacks.REGISTRY if config.attackers is None else config.attackers
        return list(probes), list(config.weight_attackers)
    unknown = sorted(set(attackers) - set(attacks.REGISTRY) - set(attacks.WEIGHT_REGISTRY))
    if unknown:
        raise ValueError(
            f"unknown attack {unknown[0]!r}; choose from "
            f"{sorted([*attacks.REGISTRY, *attacks.WEIGHT_REGISTRY])}."
        )
    return (
        [name for name in attackers if name in attacks.REGISTRY],
        [name for name in attackers if name in attacks.WEIGHT_REGISTRY],
    )


def _at_most(batch_size: int | None, rows: int) -> int | None:
    """A batch size as far as there are rows for it: some are set aside to choose settings."""
    return None if batch_size is None else min(batch_size, rows)


class Attacked(NamedTuple):
    """Attack rows and Krylov floors of one backbone."""

    rows: list[dict[str, Any]]
    floors: list[dict[str, Any]]


def attack(
    prepared: DeepPrepared,
    immunised: Backbone | None,
    config: DeepConfig,
    *,
    suite: str,
    attackers: Sequence[str] | None,
    seeds: Sequence[int] = (0,),
    undefended: Sequence[Mapping[str, Any]] = (),
) -> Attacked:
    """Probe attackers on both tasks' features; on the harmful task, fine-tuning of trained stages.

    Probes fit one-hot labels by least squares without weight decay or intercept: the quadratic
    whose Hessian is conditioned. Fine-tuning starts from a head of zeros, trains the stages that
    the experiment's pattern names and a neck where there is one, and is measured by cross-entropy.

    Args:
      prepared: of the experiment.
      immunised: the backbone to attack; None: theta_0.
      config: the experiment.
      suite: budgets and grids of the probes.
      attackers: names of probes and of attackers of weights; None: all probes, and the
        experiment's attackers of weights.
      seeds: of the attackers' starts and batches.
      undefended: rows of the same attackers on theta_0, which set the targets of those of weights.
    """
    side = "before" if immunised is None else "after"
    probes, weights = attack_names(config, attackers)
    params = dict(prepared.trainable.params)
    if immunised is not None:
        necks = {path for path in immunised.params if models.under(path, models.NECK)}
        params = {path: immunised.params[path] for path in necks | set(params)}
    features_fn = prepared.trainable.features_fn
    problems, unseen, tuned = {}, {}, {}
    for task in TASKS:
        arrays = {split: getattr(prepared.activations[split], task) for split in SPLITS}
        classes = len(getattr(prepared.pair, task).classes)
        if probes:
            dtype = jnp.zeros(()).dtype  # float64 where x64 is on
            found = {
                split: jnp.asarray(batched(features_fn, params, arrays[split].x), dtype)
                for split in ("train", "held_out")
            }
            key = task, side
            problems[key] = attacks.probe_problem(
                found["train"], arrays["train"].y, classes=classes
            )
            unseen[key] = found["held_out"], arrays["held_out"].y
        if weights and task == "harmful":
            tuned[task, side] = attacks.fine_tune_problem(
                features_fn=features_fn,
                params=params,
                head=attacks.zero_head(prepared.backbone.width, classes, jnp.float32),
                train=arrays["train"],
                held_out=arrays["held_out"],
            )
    rows = []
    if probes:
        rows += attacks.run_suite(
            problems,
            attacks.suite_attacks(suite, probes),
            steps=attacks.suite_steps(suite, probes),
            seeds=seeds,
            held_out=unseen,
        )
    if weights:
        rows += attacks.run_fine_tune_suite(
            tuned,
            weights,
            steps=config.fine_tune_steps,
            seeds=seeds,
            batch_size=_at_most(config.batch_size, tuned["harmful", side].train.x.shape[0]),
            references=attacks.references_of(undefended),
        )
    return Attacked(rows, measures.krylov_rows(problems))
