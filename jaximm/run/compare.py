"""Two checkpoints of immunised backbones side by side: identity, what moved, kappas, attacks.

Nothing is taken from what the files say about themselves but their identity: features, condition
numbers and attacks are computed anew from the stored parameters on the inputs that are given. Those
can be images of the run that a checkpoint lies in (`recorded_images`, `rows_of_pair`).
A is the reference and B what is measured against it: (i), (ii) and RIR are B over A.

`compare_checkpoints` returns plain JSON values, which `jaximm.report.checkpoints` shows.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaximm import attacks
from jaximm.attacks.probe.loop import cost_of
from jaximm.checkpoint import Immunised, load_immunised
from jaximm.measures.conditioning import (
    FEATURE_DAMPING,
    FEATURE_RTOL,
    TaskRows,
    Tasks,
    conditioning,
    kappas,
    log_rir_limit,
    task_rows,
    without_zeros,
)
from jaximm.measures.movement import movement
from jaximm.models.backbone import Backbone
from jaximm.models.flat import NECK, FlatParams, under
from jaximm.objectives import objective
from jaximm.records.comparison import (
    SCHEMA,
    SIDES,
    TASKS,
    Checkpoint,
    Comparison,
    Fitting,
    ProbeRow,
)
from jaximm.records.files import plain
from jaximm.records.result import FOOTINGS
from jaximm.run.config import read_config
from jaximm.types import Json

if TYPE_CHECKING:
    from jaximm.data import TaskPair

ATTACKERS = ("gd", "adam", "conjugate_gradients", "ridge")
"""Probe attackers of a comparison: one of each kind that matters."""


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that `jaximm.checkpoint` wrote, by its record.

    Cheap: what it holds, and whether it is sound, is for `jaximm.checkpoint` to say.
    """
    return (Path(path) / "record").is_dir()


Arrays = Mapping[str, Mapping[str, np.ndarray]]
Neck = tuple[Array | None, Array | None]


class TaskInputs(NamedTuple):
    """Rows of one task on which two checkpoints are compared.

    Attributes:
      inputs: preprocessed for the model, [n, ...]; or uint8 RGB images [n, h, w, 3], which each
        checkpoint's own preprocessing turns into its inputs.
      targets: what a probe fits, [n]: real numbers, or integer labels, whose one-hot rows it then
        fits. None: this task is not attacked.
    """

    inputs: ArrayLike
    targets: ArrayLike | None = None


def compare_checkpoints(
    a: str | os.PathLike[str] | Immunised,
    b: str | os.PathLike[str] | Immunised,
    *,
    primary: TaskInputs,
    harmful: TaskInputs,
    batch_size: int = 64,
    suite: str = "quick",
    attackers: Sequence[str] | None = ATTACKERS,
    template: Backbone | None = None,
    data: str = "",
) -> Comparison:
    """Everything about two checkpoints that can be computed from them and rows of both tasks.

    Args:
      a: the reference: a directory that `save_immunised` wrote, or what `load_immunised` gave.
      b: what is measured against it.
      primary: rows of the primary task; integer targets also give the stored heads' accuracy.
      harmful: rows of the harmful task.
      batch_size: rows a pass through the backbone.
      suite: budgets and grids of the attackers, a key of `jaximm.attacks.SUITES`.
      attackers: names; None: all of them; (): none.
      template: as for `load_immunised`, for models outside the registry.
      data: what the rows are, in words, for the reader.

    Returns:
      See `compare_features`, whose numbers come from the features computed here.

    Raises:
      ValueError: rows that do not fit, an unknown suite or attacker, or see `load_immunised`.
      CheckpointError: a directory that is damaged or no such checkpoint.
    """
    sides = {"a": _loaded(a, template), "b": _loaded(b, template)}
    rows = {"primary": primary, "harmful": harmful}
    runs = {"a": _feature_runner(sides["a"].backbone)}
    same_structure = all(
        getattr(sides["a"].backbone, key) == getattr(sides["b"].backbone, key)
        for key in ("graphdef", "preprocess")
    )
    runs["b"] = runs["a"] if same_structure else _feature_runner(sides["b"].backbone)
    arrays: Arrays = {
        side: {
            task: _features(runs[side], checkpoint.backbone, rows[task].inputs, batch_size)
            for task in TASKS
        }
        for side, checkpoint in sides.items()
    }
    targets: dict[str, ArrayLike] = {
        task: fitted for task in TASKS if (fitted := rows[task].targets) is not None
    }
    compared = compare_features(
        sides["a"],
        sides["b"],
        features=arrays,
        targets=targets,
        suite=suite,
        attackers=attackers,
        data=data,
    )
    for side, source in (("a", a), ("b", b)):
        if not isinstance(source, Immunised):
            compared[side]["path"] = os.fspath(source)
    return compared


def recorded_images(*paths: str | os.PathLike[str]) -> tuple[str, Json]:
    """Name and fields of the image pair that the runs of the checkpoints at `paths` used.

    A run keeps its ``config.json`` beside its checkpoint. A checkpoint without one has no say.

    Raises:
      ValueError: no checkpoint has one, one is not of a deep experiment, or they differ.
    """
    images: dict[Path, tuple[str, Json]] = {}
    for path in paths:
        file = Path(path).absolute().parent / "config.json"
        if not file.exists():
            continue
        config = read_config(file)
        if config.is_table:
            raise ValueError(f"{file} is of an experiment without images; name an image pair.")
        images[file] = config.data, dict(config.data_fields)
    if not images:
        raise ValueError(
            "no checkpoint has its run's config.json beside it, which names the images; name an "
            "image pair."
        )
    first, *others = images.values()
    if any(other != first for other in others):
        files = " and ".join(map(str, images))
        raise ValueError(f"{files} name different images; name the image pair to compare on.")
    return first


def rows_of_pair(pair: TaskPair, *, rows: int) -> dict[str, TaskInputs]:
    """At most `rows` training images of each task with their labels, evenly spaced over all.

    Raises:
      ValueError: `rows` below 1.
    """
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}.")
    inputs: dict[str, TaskInputs] = {}
    for task in TASKS:
        images, labels = getattr(pair, task).train
        places = np.linspace(0, len(images) - 1, min(rows, len(images))).round().astype(int)
        inputs[task] = TaskInputs(np.asarray(images)[places], np.asarray(labels)[places])
    return inputs


def compare_features(
    a: Immunised,
    b: Immunised,
    *,
    features: Mapping[str, Mapping[str, ArrayLike]],
    targets: Mapping[str, ArrayLike] | None = None,
    suite: str = "quick",
    attackers: Sequence[str] | None = ATTACKERS,
    data: str = "",
) -> Comparison:
    """`compare_checkpoints` on features that are there already.

    Args:
      a: the reference.
      b: what is measured against it.
      features: ``{"a": {"primary": [n, d], "harmful": [n, d]}, "b": ...}`` of the same rows, before
        the neck where there is one: the damped footing needs them so. Necks are the checkpoints'.
      targets: by task, as `TaskInputs.targets`.
      suite: see `compare_checkpoints`.
      attackers, data: see `compare_checkpoints`.

    Returns:
      Plain JSON values: ``a`` and ``b`` (path, model, method, config, content_hash, width, stored
      conditioning, primary_accuracy of the stored head or None); ``same_numbers``: whether the two
      hold bitwise the same arrays; ``movement`` (`Movement.to_json`) or None with the reason in
      ``movement_note``; ``conditioning`` by footing, with a kappa row a task and side and the log
      ratios (i), (ii) and RIR with their bounds (`conditioning_rows`), where "before" is A and
      "after" is B; ``attacks``, a row a task and probe: attacker, title, kind, task, steps of the
      budget, and under ``a`` and ``b`` the fit (`jaximm.attacks.fit_of`) and the FLOPs of set-up
      and step; ``rows``, the number of rows by task.

    Raises:
      ValueError: features that are not [n, d], of other rows in A and B, or targets of other rows.
    """
    fitted = {task: np.asarray(values) for task, values in (targets or {}).items()}
    arrays: Arrays = {
        side: {task: np.asarray(features[side][task]) for task in TASKS} for side in SIDES
    }
    _check_rows(arrays, fitted)
    necks = {"a": _neck(a.backbone), "b": _neck(b.backbone)}
    after_neck: Arrays = {
        side: {task: _through(array, *necks[side]) for task, array in arrays[side].items()}
        for side in SIDES
    }
    moves, note = _movement(a.backbone, b.backbone)
    return plain(
        {
            "schema": SCHEMA,
            "a": _identity(a, after_neck["a"]["primary"], fitted.get("primary")),
            "b": _identity(b, after_neck["b"]["primary"], fitted.get("primary")),
            "same_numbers": a.metadata["content_hash"] == b.metadata["content_hash"],
            "movement": moves,
            "movement_note": note,
            "conditioning": _conditioning(arrays, necks),
            "attacks": _attacks(after_neck, fitted, suite, attackers),
            "rows": {task: len(arrays["a"][task]) for task in TASKS},
            "data": data,
        }
    )


def _loaded(source: str | os.PathLike[str] | Immunised, template: Backbone | None) -> Immunised:
    return source if isinstance(source, Immunised) else load_immunised(source, template=template)


def _feature_runner(backbone: Backbone) -> Callable[[FlatParams, FlatParams, Array], Array]:
    """A compiled features function; numbers are its arguments, not constants in it.

    uint8 inputs are images, still to be preprocessed.
    """
    structure = dataclasses.replace(backbone, params={}, stats={})

    @jax.jit
    def run(params: FlatParams, stats: FlatParams, inputs: Array) -> Array:
        if inputs.dtype == jnp.uint8:
            inputs = structure.preprocess(inputs)
        backbone = dataclasses.replace(structure, params=params, stats=stats)
        return backbone.features(params, inputs)

    return run


def _features(
    run: Callable[[FlatParams, FlatParams, Array], Array],
    backbone: Backbone,
    inputs: ArrayLike,
    batch_size: int,
) -> Float[np.ndarray, "n d"]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}.")
    rows = np.asarray(inputs)
    n = len(rows)
    if n == 0:
        raise ValueError("a task has no rows; kappas need at least one, better more than d.")
    size = min(batch_size, n)
    params = {path: value for path, value in backbone.params.items() if not under(path, NECK)}
    parts = []
    for start in range(0, n, size):
        batch = rows[start : start + size]
        missing = size - len(batch)
        if missing:  # the last batch is filled up: another shape would compile again
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        features = run(params, backbone.stats, jnp.asarray(batch))
        parts.append(np.asarray(features)[: size - missing])
    return np.concatenate(parts)


def _check_rows(arrays: Arrays, targets: Mapping[str, np.ndarray]) -> None:
    unknown = sorted(set(targets) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r} of targets; tasks are {TASKS}.")
    for task in TASKS:
        shapes = [arrays[side][task].shape for side in SIDES]
        if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] != shapes[1][0]:
            raise ValueError(
                f"features of the {task} task must be [n, d] of the same rows, got {shapes[0]} for "
                f"A and {shapes[1]} for B."
            )
        if task in targets and np.shape(targets[task]) != shapes[0][:1]:
            raise ValueError(
                f"targets of the {task} task must be [n] = {shapes[0][:1]}, got "
                f"{np.shape(targets[task])}."
            )


def _identity(checkpoint: Immunised, array: np.ndarray, targets: np.ndarray | None) -> Checkpoint:
    metadata = checkpoint.metadata
    return {
        "path": None,
        "model": metadata["model"],
        "model_config": metadata["model_config"],
        "method": metadata["method"],
        "config": metadata["config"],
        "content_hash": metadata["content_hash"],
        "conditioning": metadata["conditioning"],
        "width": array.shape[1],
        "primary_accuracy": _head_accuracy(checkpoint.head, array, targets),
    }


def _head_accuracy(
    head: Mapping[str, Array] | None, array: np.ndarray, targets: np.ndarray | None
) -> float | None:
    if head is None or targets is None or targets.dtype.kind not in "iu":
        return None
    logits = array.astype(np.float64) @ np.asarray(head["kernel"], np.float64)
    logits += np.asarray(head.get("bias", 0.0), np.float64)
    return float(np.mean(objective("classes").scores(logits, targets)))


def _movement(a: Backbone, b: Backbone) -> tuple[Json | None, str]:
    if a.name != b.name:
        return None, f"A is a {a.name}, B a {b.name}"
    if a.config != b.config:
        return None, f"A and B are {a.name} of two configurations"
    names = (*a.stage_names, *(["neck"] if "neck" not in a.stage_names else []), "classifier")
    return movement(a.params, b.params, stage_names=names).to_json(), ""


def _neck(backbone: Backbone) -> Neck:
    """Kernel and bias of the neck, None where there is none."""
    return backbone.params.get(f"{NECK}.kernel"), backbone.params.get(f"{NECK}.bias")


def _through(array: np.ndarray, kernel: Array | None, bias: Array | None) -> np.ndarray:
    """Features after the neck."""
    moved = array if kernel is None else array @ np.asarray(kernel)
    return moved if bias is None else moved + np.asarray(bias)


def _conditioning(arrays: Arrays, necks: Mapping[str, Neck]) -> dict[str, Json]:
    rows: dict[str, dict[str, TaskRows]] = {
        side: {
            task: task_rows(jnp.asarray(arrays[side][task]), damping=FEATURE_DAMPING)
            for task in TASKS
        }
        for side in SIDES
    }
    kept = {side: without_zeros(*necks[side]) for side in SIDES}
    before, after = (
        Tasks(**{task: kappas(rows[side][task], *kept[side], rtol=FEATURE_RTOL) for task in TASKS})
        for side in SIDES
    )
    limit = math.nan  # that of linear maps after A is known where A has none yet
    if necks["a"][0] is None:
        limit = float(log_rir_limit(rows["a"]["primary"], rows["a"]["harmful"]))
    measured = conditioning(
        before,
        after,
        limit=limit,
        dampings=[rows["a"][task].damping for task in Tasks._fields],
        dtype=arrays["a"]["primary"].dtype.name,
    )
    return {footing: measured.rows[footing] for footing in FOOTINGS}


def _attacks(
    arrays: Arrays,
    targets: Mapping[str, np.ndarray],
    suite: str,
    attackers: Sequence[str] | None,
) -> list[ProbeRow]:
    """What fitting the rows takes each probe on A and on B."""
    chosen = attacks.suite_attacks(suite, attackers)
    budgets = attacks.suite_steps(suite, attackers)
    rows = []
    for task in (task for task in TASKS if task in targets and chosen):
        problems = {side: _problem(arrays[side][task], targets[task]) for side in SIDES}
        for name, attack in chosen.items():
            said, steps = attacks.describe(name), budgets[name]
            row: ProbeRow = {
                "attacker": name,
                "title": said["title"],
                "kind": said["kind"],
                "task": task,
                "steps": steps,
                "a": _fitting(attack, problems["a"], steps),
                "b": _fitting(attack, problems["b"], steps),
            }
            rows.append(row)
    return rows


def _fitting(attack: attacks.Attack, problem: attacks.ProbeProblem, steps: int) -> Fitting:
    cost = cost_of(attack, problem)
    trace = attacks.run_attack(attack, problem, steps=steps)
    return {
        "fit": attacks.fit_of(attack, trace),
        "setup_flops": cost.setup,
        "step_flops": cost.step,
    }


def _problem(array: np.ndarray, targets: np.ndarray) -> attacks.ProbeProblem:
    wide = jnp.asarray(array, jax.dtypes.canonicalize_dtype(np.float64))
    if targets.dtype.kind not in "iub":
        return attacks.probe_problem(wide, jnp.asarray(targets, wide.dtype))
    # Labels as they occur, so that those of a subset of the classes need no renumbering.
    names, labels = np.unique(targets, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"labels of an attacked task need two classes, got only {names[0]}.")
    return attacks.probe_problem(wide, jnp.asarray(labels, jnp.int32), classes=len(names))
