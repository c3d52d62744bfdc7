"""An experiment's tasks and model, prepared: everything that does not depend on the method.

The frozen stages of the backbone run once over all rows (`jaximm.run.activations`); what trains
sees their activations. A
table's rows are those of a linear model, whose neck trains. Where only a neck trains, methods take
their exact steps on fixed rows. theta_0 in every ratio is the backbone as its weights came, or the
identity.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaximm import data, immunisers, measures, models
from jaximm.assessment.estimates import SAID_SECONDS
from jaximm.assessment.protocol import Progress
from jaximm.immunisers import THETA, Head, LinearTask
from jaximm.measures import groups as row_groups
from jaximm.models import Backbone, Trainable
from jaximm.models.statistics import features_with_statistics
from jaximm.objectives import objective
from jaximm.run.activations import at_cut
from jaximm.run.config import LINEAR, OWN, Experiment, is_closed_form
from jaximm.training.optimiser import Stepped, optimiser_state, optimiser_step
from jaximm.types import Batch, FeaturesFn, Json, PairedBatch, Params, as_argument

SPLITS = ("train", "selection", "held_out")
TASKS = ("primary", "harmful")

Features = dict[str, PairedBatch]
"""Rows of both tasks by split."""


class PairRows(NamedTuple):
    """Rows of both tasks before the neck, with the measure's lam."""

    primary: measures.TaskRows
    harmful: measures.TaskRows


class Baseline(NamedTuple):
    """Condition numbers under theta_0, by split."""

    kappas: dict[str, measures.Tasks]
    limit: dict[str, float]  # the largest damped log RIR of a linear map after theta_0's features
    groups: dict[str, dict[str, np.ndarray]]  # of classes


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """An experiment's rows through the frozen stages.

    Attributes:
      config: the experiment.
      pair: its tasks.
      backbone: theta_0.
      trainable: what methods with steps train.
      closed: the same without anything that trains, for closed forms: they add a neck.
      exact: whether only a linear map of fixed rows trains, from the identity on.
      activations: rows at the cut by split: a table's in the default float with numbers as targets,
        others in float32 with int32 labels. Held-out rows are halved: even ones select, odd ones
        are reported. Many rows of a table are in few (`jaximm.data.tasks.in_few_rows`), unless a
        method draws batches of them.
      features: theta_0's of them, before the neck where only that trains.
    """

    config: Experiment
    pair: data.TaskPair
    backbone: Backbone
    trainable: Trainable
    closed: Trainable
    exact: bool
    activations: Features
    features: Features

    def alone(self, config: Experiment) -> Prepared:
        """The same for one method and seed of the experiment; what is computed once stays so."""
        own = dataclasses.replace(self, config=config)
        for name in ("rows", "head", "baseline"):
            own.__dict__[name] = getattr(self, name)
        return own

    @property
    def train(self) -> PairedBatch:
        """Training rows at the cut."""
        return self.activations["train"]

    @property
    def selection(self) -> PairedBatch:
        """Rows that choose."""
        return self.activations["selection"]

    @property
    def held_out(self) -> PairedBatch:
        """Rows that are reported."""
        return self.activations["held_out"]

    def classes(self, task: str) -> int | None:
        """Number of a task's classes; None: its targets are numbers."""
        return len(getattr(self.pair, task).classes) or None

    @functools.cached_property
    def inputs_shared(self) -> data.SharedInputs:
        """`jaximm.data.inputs_shared`; of many rows from those that stand for them."""
        few = {
            task: getattr(self.pair, task)._replace(train=data.Split(*map(np.asarray, rows)))
            for task, rows in zip(TASKS, self.train, strict=True)
            if self.stood_for(task)
        }
        return data.inputs_shared(self.pair._replace(**few))

    def stood_for(self, task: str) -> data.Split | None:
        """A task's training rows where those of `train` are few that stand for them; or None."""
        rows = getattr(self.pair, task).train
        few = getattr(self.train, task).x.shape[0] < len(rows.y)
        return rows if few else None

    @property
    def primary_task(self) -> LinearTask:
        """Of the primary task."""
        return LinearTask(self.classes("primary"))

    @functools.cached_property
    def rows(self) -> dict[str, PairRows]:
        """By split: theta_0's features and the measure's lam."""
        rows = task_rows(self.features, self.config.damping)
        return rows | {
            "train": PairRows(
                *(
                    one._replace(count=len(getattr(self.pair, task).train.y))
                    for task, one in zip(TASKS, rows["train"], strict=True)
                )
            )
        }

    @functools.cached_property
    def head(self) -> Params:
        """The primary head of theta_0: fitted to classes, zeros for numbers."""
        x, y = self.features["train"].primary
        classes = self.classes("primary")
        if classes is None:
            return self.primary_task.start(x.shape[1], x.dtype)
        return fit_head(x, y, classes)

    @functools.cached_property
    def harmful_head(self) -> Head:
        """The harmful head of theta_0, fitted; for methods with the trait "needs_harmful_head"."""
        x, y = self.features["train"].harmful
        classes = self.classes("harmful")
        if classes is None:
            raise ValueError(
                "unlearning works on the loss of classes, got a harmful task whose targets are "
                "numbers; use a data set of classes, or another method."
            )
        return fit_head(x, y, classes)

    @functools.cached_property
    def baseline(self) -> Baseline:
        """Condition numbers under theta_0."""
        splits = ("train", "held_out")
        return Baseline(
            {split: kappas_of(self.rows[split], {}, self.config) for split in splits},
            {split: float(measures.log_rir_limit(*self.rows[split])) for split in splits},
            {
                split: group_kappas(self.features[split], self.config)
                for split in splits
                if self.classes("primary") is not None
            },
        )


def prepare(
    config: Experiment,
    *,
    pair: data.TaskPair | None = None,
    backbone: Backbone | None = None,
    train: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Data, weights and activations.

    Args:
      config: the experiment.
      pair: its tasks, if they are there already.
      backbone: theta_0, if it is there already.
      train: its methods will run, so their batches are checked against the rows and devices.
      progress: of the frozen stages, where they take long.

    Raises:
      ValueError: what the data, the model or the path pattern refuses, fewer than two held-out rows
        in a task, more than one target a row, such a batch, or no room for the activations.
    """
    pair = data.load(config.data, **config.data_fields) if pair is None else pair
    numbers = pair.primary.kind != "classes"
    drawn = train and any(config.method(label).batch_size for label in config.methods)
    rows = halved(data.in_few_rows(pair) if numbers and not drawn else pair)
    exact = False
    if train:
        _check_batches(config, rows["train"])
    x = rows["train"].primary.x
    if backbone is None:
        backbone = load_backbone(config, width=int(np.prod(x.shape[1:])))
    if config.train == "neck" and THETA not in backbone.params:
        dtype = jnp.float32 if x.dtype == np.uint8 else x.dtype
        backbone = backbone.replace({THETA: jnp.eye(backbone.width, dtype=dtype)})
        exact = True
    compute_dtype = None if config.compute_dtype == "float32" else jnp.bfloat16
    trainable = backbone.split_at(config.train, compute_dtype=compute_dtype, sites=config.sites)
    parts = encoded(trainable, [part for split in SPLITS for part in rows[split]], progress)
    activations = {
        split: PairedBatch(*parts[2 * place : 2 * place + 2]) for place, split in enumerate(SPLITS)
    }
    features = activations
    if not exact:
        features = features_of(trainable, trainable.params, activations, progress)
    return Prepared(
        config=config,
        pair=pair,
        backbone=backbone,
        trainable=trainable,
        closed=backbone.split_at(""),
        exact=exact,
        activations=activations,
        features=features,
    )


def _check_batches(config: Experiment, rows: PairedBatch) -> None:
    """Refuses batches that a step would refuse, before anything runs."""
    for label in config.methods:
        size = config.method(label).batch_size
        closed = is_closed_form(label)
        alone = size is None or config.train == "neck"
        data.check_batches(
            rows,
            size,
            label=label,
            devices=1 if alone else jax.device_count(),
            accumulate=1 if closed else config.accumulate,
        )


def load_backbone(config: Experiment, *, width: int | None = None) -> Backbone:
    """theta_0 of an experiment, without a neck that is to be trained.

    Args:
      config: the experiment.
      width: numbers a row, which a linear model takes.

    Raises:
      ValueError: what `jaximm.models.create` refuses; a model that was handed over in Python and is
        not registered here.
    """
    name = config.model.removeprefix(OWN)
    if name != config.model and name not in models.REGISTRY:
        raise ValueError(
            f"the model {name!r} was handed over in Python, and its numbers alone do not make it: "
            f"use jaximm.assess there, or register it here (a file with jaximm.register('model', "
            f"{name!r}, jaximm.models.whole(...)), which the command line runs by --load FILE)."
        )
    preprocess = dict(config.preprocess)
    if config.image_size is not None:
        expected = models.REGISTRY[name].preprocess.resize
        preprocess["size"] = config.image_size
        preprocess.setdefault("resize", max(config.image_size, expected))
    # A config.json has lists where a model's configuration has tuples.
    fields: Json = {
        key: tuple(entry) if isinstance(entry, list) else entry
        for key, entry in config.model_fields.items()
    }
    random = config.weights == "random"
    if name == LINEAR:
        random = True  # it has no numbers of its own
        fields.setdefault("input_shape", (width,))
    return models.create(
        name,
        weights=None if random else config.weights,
        classifier=config.classifier,
        prefix=config.prefix,
        layout=config.layout,
        rng_key=jax.random.key(0) if random else None,
        preprocess=preprocess,
        **fields,
    )


def halved(pair: data.TaskPair) -> Features:
    """Rows by split, those held out shared out between selection and report.

    A table's are numbers in the default float; others images, or inputs as the model takes them,
    and labels.

    Raises:
      ValueError: fewer than two held-out rows in a task, or more than one target a row.
    """
    numbers = pair.primary.kind != "classes"
    whole = {
        split: data.paired_arrays(pair, split=split)
        if numbers
        else PairedBatch(*(Batch(*getattr(getattr(pair, task), split)) for task in TASKS))
        for split in ("train", "held_out")
    }
    for task, batch in zip(TASKS, whole["held_out"], strict=True):
        if batch.y.ndim != 1:
            raise ValueError(
                f"the {task} task must have one target a row, got targets of shape {batch.y.shape}."
            )
        if batch.x.shape[0] < 2:
            raise ValueError(
                f"the {task} task needs at least 2 held-out rows (one half selects, the other is "
                f"reported), got {batch.x.shape[0]}."
            )
    selection, held_out = (
        PairedBatch(*(_every_second(rows, start) for rows in whole["held_out"])) for start in (0, 1)
    )
    return {"train": whole["train"], "selection": selection, "held_out": held_out}


def _every_second(rows: Batch, start: int) -> Batch:
    """Cut on the host; of JAX arrays again JAX arrays."""
    back: Any = jnp.asarray if isinstance(rows.x, jax.Array) else np.asarray
    return Batch(*(back(np.asarray(part)[start::2]) for part in rows))


def encoded(
    trainable: Trainable, parts: Sequence[Batch], progress: Progress | None = None
) -> list[Batch]:
    """Activations at the cut of parts of the rows: uint8 images, or inputs as the model takes them.

    A table's rows are those of its linear model.
    """
    images = parts[0].x.dtype == np.uint8
    linear = all(models.under(path, models.NECK) for path in trainable.backbone.params)
    x = [part.x for part in parts]
    if images or (trainable.prefix_stages and not linear):
        x = at_cut(trainable, [np.asarray(rows) for rows in x], progress=progress)
    return [
        Batch(jnp.asarray(rows), jnp.asarray(part.y, jnp.int32 if images else None))
        for rows, part in zip(x, parts, strict=True)
    ]


def features_of(
    trainable: Trainable,
    params: Mapping[str, jax.Array],
    activations: Features,
    progress: Progress | None = None,
) -> Features:
    """Features of every row under some parameters; where that takes long, `progress` is told."""
    features_fn = features_with_statistics(trainable)
    total = sum(task.x.shape[0] for rows in activations.values() for task in rows)
    started, done, features = time.monotonic(), 0, {}
    for split, rows in activations.items():
        parts = []
        for task in rows:
            parts.append(Batch(batched(features_fn, params, task.x), task.y))
            done += task.x.shape[0]
            jax.block_until_ready(parts[-1].x)
            is_long = time.monotonic() - started >= SAID_SECONDS
            if progress is not None and is_long and done < total:
                progress("features of all rows", done, total, {"unit": "images"})
        features[split] = PairedBatch(*parts)
    return features


AT_ONCE = 2**26
"""Bytes of rows whose features are computed at once, from one row on."""


def batched(
    features_fn: FeaturesFn,
    params: Params,
    inputs: jax.Array,
    *,
    rows: int = 500,
    count: int | None = None,
) -> Float[Array, "n d"]:
    """Features of many rows, or of the first `count`: at most `rows` and `AT_ONCE` at a time."""
    features_fn = as_argument(features_fn)
    total = inputs.shape[0] if count is None else min(count, inputs.shape[0])
    rows = max(1, min(rows, AT_ONCE // max(1, inputs.nbytes // max(1, inputs.shape[0]))))
    return jnp.concatenate(
        [
            _run(features_fn, params, inputs[start : min(start + rows, total)])
            for start in range(0, total, rows)
        ]
    )


@jax.jit
def _run(features_fn, params, inputs):
    return features_fn(params, inputs)


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
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(head):
        losses = objective("classes").losses(head.outputs(standard), labels)
        penalty = weight_decay / 2 * jnp.sum(head.kernel**2)
        return penalty.astype(losses.dtype) + jnp.mean(losses)

    def step(carry, _):
        head, state = carry
        return optimiser_step(optimiser, jax.grad(loss)(head), state, head), None

    start = immunisers.init_head(features.shape[1], classes, features.dtype)
    first = Stepped(start, optimiser_state(optimiser, start))
    return jax.lax.scan(step, first, None, length=steps)[0].params


def task_rows(features: Features, damping: float | None) -> dict[str, PairRows]:
    """By split: lam is that of the training rows of the same features."""
    assert damping is not None  # filled in
    return {
        split: PairRows(
            *(
                measures.task_rows(task.x, fitted.x, damping=damping)
                for task, fitted in zip(rows, features["train"], strict=True)
            )
        )
        for split, rows in features.items()
    }


def kappas_of(
    rows: PairRows,
    params: Mapping[str, jax.Array],
    config: Experiment,
) -> measures.Tasks:
    """Both tasks' condition numbers from rows before the neck, and the neck among parameters."""
    kernel, bias = measures.without_zeros(params.get(THETA), params.get("neck.bias"))
    return measures.Tasks(
        *(measures.kappas(task, kernel, bias, rtol=config.tolerance) for task in rows)
    )


def group_size(rows: PairedBatch, config: Experiment) -> int:
    """Rows of a group of either task: as asked for, or all of the smaller task's."""
    return min(config.group_rows, *(batch.x.shape[0] for batch in rows))


def group_kappas(rows: PairedBatch, config: Experiment) -> dict[str, np.ndarray]:
    """log kappas by groups of rows, by task; groups of both have one size."""
    size = group_size(rows, config)
    return {
        task: row_groups.group_log_kappas(batch.x, groups=config.groups, size=size)
        for task, batch in zip(TASKS, rows, strict=True)
    }
