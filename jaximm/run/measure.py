"""The measured sections of a result: conditioning, utilities, and what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaximm import checkpoint, measures, models
from jaximm.assessment.protocol import Progress
from jaximm.immunisers import THETA, Head, ProbeParams
from jaximm.immunisers.about import MethodConfig
from jaximm.measures import groups as row_groups
from jaximm.models import Trainable
from jaximm.objectives import objective
from jaximm.run.prepare import (
    SPLITS,
    TASKS,
    Features,
    Prepared,
    features_of,
    group_kappas,
    group_size,
    kappas_of,
    task_rows,
)
from jaximm.types import Batch, Json


class Immunised(NamedTuple):
    """A method's outcome: trained parameters, perhaps a neck, and the head that goes with them."""

    label: str
    params: ProbeParams
    trainable: Trainable
    config: MethodConfig
    trajectory: list[Json]
    seconds: float  # compilation and monitors included
    step_seconds: float  # of an update alone; NaN where none was measured after compiling
    steps: int


def features_after(
    prepared: Prepared,
    immunised: Immunised,
    params: Mapping[str, jax.Array] | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features of every row under the immunised backbone, or under other trained parameters."""
    closed = immunised.trainable is prepared.closed
    arrays = prepared.features if closed else prepared.activations
    used = immunised.params.backbone if params is None else params
    return features_of(immunised.trainable, used, arrays, progress)


def measure(prepared: Prepared, immunised: Immunised, *, progress: Progress | None = None) -> Json:
    """The sections conditioning, spectra, utility and harmful_utility; of classes also others."""
    config, baseline = prepared.config, prepared.baseline
    params = immunised.params.backbone
    bare = {path: value for path, value in params.items() if not models.under(path, models.NECK)}
    rows, after = prepared.rows, None
    if bare:  # else the rows before the neck stay what they were
        features = features_after(prepared, immunised, bare, progress)
        rows = task_rows(features, config.damping)
        after = features if len(bare) == len(params) else None
    conditioning: dict[str, dict[str, Json]] = {}
    spectra = {}
    for split, before in baseline.kappas.items():
        measured = measures.conditioning(
            before,
            kappas_of(rows[split], params, config),
            limit=baseline.limit[split],
            dampings=[task.damping for task in prepared.rows[split]],
            dtype=_dtype(prepared, config.compute_dtype),
        )
        for footing, row in measured.rows.items():
            conditioning.setdefault(footing, {})[split] = row
        if split == "train":
            spectra = measured.spectra
    if prepared.classes("primary") is None:
        quality = _of_numbers(prepared, immunised)
    else:
        after = features_after(prepared, immunised, None, progress) if after is None else after
        quality = _of_classes(prepared, immunised, after)
    return {"conditioning": conditioning, "spectra": spectra, **quality}


def _dtype(prepared: Prepared, of_network: str) -> str:
    """The dtype of fixed rows, or that of a network."""
    return str(prepared.train.primary.x.dtype) if prepared.exact else of_network


def _of_numbers(prepared: Prepared, immunised: Immunised) -> Json:
    """The quality of the best ridge head, of both tasks."""
    theta = immunised.params.backbone[THETA]
    utility, harmful = (
        measures.utility(
            measures.Rows(*(getattr(prepared.activations[split], task) for split in SPLITS)),
            theta,
            kind=getattr(prepared.pair, task).kind,
            fitted=prepared.stood_for(task),
        )
        for task in TASKS
    )
    return {"utility": utility, "harmful_utility": harmful}


def _of_classes(prepared: Prepared, immunised: Immunised, after: Features) -> Json:
    """Kappas by groups, what became of the logits, and accuracies."""
    groups = {
        split: row_groups.group_summary(
            before,
            group_kappas(after[split], prepared.config),
            size=group_size(after[split], prepared.config),
        )
        for split, before in prepared.baseline.groups.items()
    }
    return {
        "groups": groups,
        "logits_change": _logits_change(prepared, immunised, after),
        "utility": _shipped(prepared, immunised, after),
        "harmful_utility": _recoverable(prepared, after),
    }


def accuracy(head: Head, rows: Batch) -> float:
    """Accuracy of a classifier on features."""
    return float(jnp.mean(objective("classes").scores(head.outputs(rows.x), rows.y)))


def _logits_change(prepared: Prepared, immunised: Immunised, after: Features) -> float:
    """Largest change of a primary logit on held-out rows, over the largest logit before."""
    before = prepared.head.outputs(prepared.features["held_out"].primary.x)
    moved = immunised.params.head.outputs(after["held_out"].primary.x) - before
    return float(jnp.max(jnp.abs(moved)) / jnp.max(jnp.abs(before)))


def _shipped(prepared: Prepared, immunised: Immunised, after: Features) -> Json:
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


def _recoverable(prepared: Prepared, after: Features) -> Json:
    """Harmful accuracy of the best damped least-squares head, which no conditioning hinders."""
    section: Json = {"metric": "accuracy"}
    classes = prepared.classes("harmful")
    assert classes is not None
    for side, rows in (("before", prepared.features), ("after", after)):
        accuracies = measures.best_classifier_accuracy(
            *(rows[split].harmful for split in SPLITS), classes=classes
        )
        section[side] = {"train": accuracies.train, "held_out": accuracies.held_out}
    return section


def save(
    path: Path,
    prepared: Prepared,
    immunised: Immunised,
    conditioning: dict[str, dict[str, Json]],
) -> None:
    """Writes the immunised backbone with its head.

    Args:
      path: the checkpoint to make.
      prepared: the experiment.
      immunised: the outcome.
      conditioning: the section of `measure`.
    """
    head = immunised.params.head
    checkpoint.save_immunised(
        path,
        immunised.trainable.whole(immunised.params.backbone),
        {"kernel": head} if prepared.classes("primary") is None else head,
        method=immunised.label,
        config=immunised.config,
        conditioning=conditioning["damped"],
        classes=prepared.pair.primary.classes or None,
    )


def describe(prepared: Prepared, immunised: Immunised) -> Json:
    """What a result says of data and backbone.

    The hashes are those of all parameters: equal ones say that before and after are one model.
    """
    details = {
        "init": prepared.config.init,
        "dtype": _dtype(prepared, "float32"),
        "data": describe_data(prepared),
    }
    if prepared.classes("primary") is None:
        return details
    whole = immunised.trainable.whole(immunised.params.backbone)
    return details | {
        "backbone": {
            "model": prepared.backbone.name,
            "trained": immunised.trainable.pattern,
            "hash_before": checkpoint.content_hash(prepared.backbone.params),
            "hash_after": checkpoint.content_hash(whole.params),
        }
    }


def describe_data(prepared: Prepared) -> Json:
    """The data section of a result."""
    pair = prepared.pair
    section: Json = {
        "name": pair.name,
        "description": pair.description,
        "source": pair.source,
        "inputs_shared": prepared.inputs_shared.shared,
    }
    for task in TASKS:
        rows, classes = getattr(pair, task), prepared.classes(task)
        sizes = {
            f"n_{split}": getattr(prepared.activations[split], task).x.shape[0] for split in SPLITS
        } | {"n_train": len(rows.train.y)}
        kind = {"kind": rows.kind} | ({} if classes is None else {"classes": classes})
        section[task] = {"name": rows.name, **kind, **sizes, "d": prepared.backbone.width}
    return section
