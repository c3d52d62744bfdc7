"""One call from Python: `immunise`, `attack`, `assess`, for arrays and for models of your own.

The functions build what the command line reads from files, an `Experiment` with its tasks and its
model, and go the same way: `jaximm.run.prepare`, `run_method`, `result_of`; `jaximm.assessment`. As
there, everything runs with double precision on (whatever ``jax_enable_x64`` says outside, and says
again afterwards): a linear map of arrays is computed in float64, a network in its float32, where a
neck alone trains with its steps in float64. The result's ``document["dtype"]`` says which.

>>> import numpy as np
>>> draw = np.random.default_rng(0).normal
>>> x, x_harmful = draw(size=(80, 4)), draw(size=(80, 4)) * [3.0, 1.0, 1.0, 0.2]
>>> done = immunise((x, x[:, 0]), harmful=(x_harmful, x_harmful[:, 1]), method="limit", t=1.0)
>>> done.model.shape, done.document["dtype"]
((4, 4), 'float64')
>>> bool(done.document["conditioning"]["damped"]["train"]["log_rir"] > 1)
True
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaximm import assessment, immunisers, models, registry, report
from jaximm.assessment import Level
from jaximm.data.images.labelled_arrays import pair_of_arrays
from jaximm.data.rows import opened_or_read, read_targets
from jaximm.data.tasks import TaskPair, check_array, check_size, task_pair_from_arrays
from jaximm.immunisers import THETA
from jaximm.models import Backbone, Preprocess, Trainable
from jaximm.models.flat import FlatParams
from jaximm.models.own import Model, Own, numbers_of, own_model
from jaximm.models.statistics import features_with_statistics
from jaximm.records import assessment as assessment_record
from jaximm.records import result
from jaximm.run.assess import FILE, bench_of_tasks, conditioning_of, in_order, label_of, model_of
from jaximm.run.config import LINEAR, OWN, Experiment, code_of, config_json
from jaximm.run.folders import check_folder, write_json
from jaximm.run.immunise import Progress, result_of, run_method
from jaximm.run.measure import Immunised as Outcome
from jaximm.run.measure import save as save_run_backbone
from jaximm.run.prepare import (
    TASKS,
    Prepared,
    batched,
    encoded,
    fit_head,
    prepare,
)
from jaximm.types import Batch, Fields, Json

Rows = ArrayLike | str | os.PathLike[str]
"""An array; or of a table the path of a ``.npy`` file, or of a folder of parts of one, whose rows
stay there and are read by blocks (`jaximm.data.rows.opened`)."""

PATHS = (str, os.PathLike)

Task = tuple[Rows, Rows]
"""``(x, y)`` of a task."""

Table = Any
"""A pandas DataFrame; without pandas a list of dicts."""

KINDS = ("auto", "classes", "regression", "binary", "constant")
"""What targets may be."""

FIELDS = (
    *("steps", "batch_size", "optimiser", "label_smoothing", "accumulate", "sites", "init"),
    *("compute_dtype", "parallel", "damping", "tolerance", "groups", "group_rows", "log_points"),
    "description",
)
"""Fields of `Experiment` that `immunise` takes, beside those of the method."""

DATA_FILE, BEFORE_FILE = "data.npz", "before.npz"
"""In a folder that `Immunised.save` wrote: the rows; the numbers of a network before."""

_SMALLEST_BATCH = 64


class Case(NamedTuple):
    """What a call is about, as the command line would have read it.

    Attributes:
      config: the experiment.
      pair: its tasks.
      own: the user's model; None: rows are features.
      backbone: theta_0; None: the linear model.
      front: the network whose features are the rows, of targets that are numbers.
      images: whether the model takes uint8 images.
    """

    config: Experiment
    pair: TaskPair
    own: Own | None
    backbone: Backbone | None
    front: Trainable | None
    images: bool


# ---------------------------------------------------------------- immunise


def immunise(
    primary: Task,
    *,
    harmful: Task,
    model: Model = None,
    method: str = "condition_gap",
    train: str = "",
    held_out: Task | None = None,
    harmful_held_out: Task | None = None,
    held_out_fraction: float = 0.25,
    kind: str = "auto",
    preprocess: Preprocess | None = None,
    seed: int = 0,
    name: str = "mine",
    progress: Progress | None = None,
    **fields: Any,
) -> Immunised:
    """Makes the harmful task hard to fine-tune for, the primary task staying easy.

    Args:
      primary: ``(x, y)`` of the task to keep. Without a model x [n, d] are the features of a linear
        backbone; with one, its inputs [n, ...]: floating numbers as it takes them, or uint8 images
        with `preprocess`. They are used as they are: no scaling, no shuffling. Rows of a table may
        be a path (`Rows`) or a memory-mapped array of float64, and more than fit into memory.
      harmful: ``(x, y)`` of the task to make hard; x of the same shape but for its rows.
      model: a Flax NNX module, ``(Linen module, variables)``, an Equinox module, ``(function,
        parameters)`` or a `Backbone`, that gives features [n, d] (`jaximm.models.own`). None:
        a linear map of the rows.
      method: a name or label of `jaximm.immunisers.REGISTRY`: "limit", "limit@t=1".
      train: path pattern of what a trained method may change: "*", the default of a network, is
        everything, "neck" a linear map after the features.
      held_out: rows for measurement alone; None: the last `held_out_fraction` of each task's rows.
      harmful_held_out: likewise.
      held_out_fraction: in (0, 1).
      kind: what the targets are: "classes" (two or more labels, numbers or texts), "regression",
        "binary" (two values, by least squares), "constant" (none). "auto": texts are classes;
        integers are, too, where there is a network; two repeated values of a table are binary;
        what may be classes or numbers is asked about. Numbers as targets train no network: a neck
        after its features is what trains.
      preprocess: from uint8 images to the network's inputs.
      seed: of the run.
      name: of the experiment, in tables and on pages.
      progress: ``progress(label, done, total, record)``.
      fields: of the method (``t=1.0``), or of the experiment (`FIELDS`): ``steps=200``.

    Returns:
      The model in the form that it came in, and its measurement.

    Raises:
      ValueError: rows, labels, numbers or a model that do not fit; an unknown method or field.
    """
    with jax.enable_x64(True):
        case = _case(
            primary, harmful, model, train, held_out, harmful_held_out, held_out_fraction, kind,
            preprocess, name, (method, seed), fields,
        )  # fmt: skip
        prepared = prepare(
            case.config, pair=case.pair, backbone=case.backbone, train=True, progress=progress
        )
        outcome = run_method(
            prepared,
            method,
            seed=seed,
            progress=None if progress is None else functools.partial(progress, f"{method} s{seed}"),
        )
        document = result_of(prepared, outcome, command="jaximm.immunise(...)", progress=progress)
        whole = outcome.trainable.whole(outcome.params.backbone)
        return Immunised(_returned(case, whole), document, case, prepared, outcome)


def _returned(case: Case, whole: Backbone) -> Model:
    """The immunised model in the user's form: theta of arrays."""
    if case.own is None:
        return np.asarray(whole.params[THETA])
    if case.front is None:
        return case.own.returned(whole)
    before = case.front.backbone
    necks = {path: value for path, value in whole.params.items() if models.under(path, models.NECK)}
    dtype = jax.tree.leaves(before.params)[0].dtype  # computed in float64, the model's own after
    return case.own.returned(before.replace({k: v.astype(dtype) for k, v in necks.items()}))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Immunised:
    """An immunised model and its measurement.

    Attributes:
      model: in the form that it came in, a neck included (`jaximm.models.own`); of arrays theta
        [d, d'], float64, whose features are ``x @ theta``.
      document: what ``result.json`` holds, as plain values; see `jaximm.records.result`.
      case: what was asked.
      prepared: the experiment's rows.
      outcome: the method's own.
    """

    model: Model
    document: Json
    case: Case
    prepared: Prepared
    outcome: Outcome

    def features(self, x: ArrayLike) -> np.ndarray:
        """Features [n, d] of inputs [n, ...], of whatever kind the model is; neck included."""
        with jax.enable_x64(True):
            rows = np.asarray(_inputs(x, "x", self.case.own, self.case.images))
            if self.case.front is not None:
                rows = np.asarray(_features(self.case.front, rows), np.float64)
            return np.asarray(_features(self._whole, rows))

    @functools.cached_property
    def _whole(self) -> Trainable:
        return self.outcome.trainable.whole(self.outcome.params.backbone).split_at("")

    def table(self) -> Table:
        """Condition numbers and ratios, a row for each footing and split: a pandas DataFrame.

        Without pandas a list of dicts. The columns are those of ``jaximm compare --csv``.
        """
        return _frame(report.csv([self.document]))

    def to_html(self, path: str | Path) -> Path:
        """Writes the page of ``jaximm report``."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write_page([self.document], path)
        return path

    def save(self, path: str | Path) -> Path:
        """Writes the run directory that ``jaximm immunise`` writes, and the rows beside it.

        ``jaximm report``, ``compare`` and ``export`` work on it, and for a linear map also
        ``assess`` and ``attack``. A network cannot be made again from its numbers alone, and has no
        import path here: assess it by `jaximm.assess`, or give the command line ``--load FILE``
        with a file that registers ``jaximm.models.whole(...)`` under the name in config.json. Of
        targets that are numbers the rows are the network's features, and the network is not in the
        folder.

        Raises:
          ValueError: the folder holds something already.
        """
        folder, case = Path(path).absolute(), self.case
        check_folder(folder, case.config, [], False)
        folder.mkdir(parents=True, exist_ok=True)
        fields = {**case.config.data_fields, "path": str(folder / DATA_FILE)}
        changes: Json = {"data_fields": fields}
        np.savez(folder / DATA_FILE, **_arrays(case.pair))
        if case.backbone is not None:
            numbers: Json = {key: np.asarray(v) for key, v in numbers_of(case.backbone).items()}
            np.savez(folder / BEFORE_FILE, **numbers)
            changes["weights"] = str(folder / BEFORE_FILE)
        config = dataclasses.replace(case.config, **changes)
        write_json(folder / "config.json", config_json(config, code_of(config)), of="config")
        with jax.enable_x64(True):
            save_run_backbone(
                folder / "backbone", self.prepared, self.outcome, self.document["conditioning"]
            )
        document = self.document | {"config": self.document["config"] | config.to_json()}
        result.write(folder / "result.json", document)
        return folder

    def __repr__(self) -> str:
        rows = self.document["conditioning"]["damped"]
        utility = self.document["utility"]
        return (
            f"<jaximm.Immunised by {self.document['method']}: "
            f"{'linear map' if self.case.own is None else self.case.own.kind}, "
            f"{self.document['dtype']}; log RIR {_shown(rows['train']['log_rir'])} of at most "
            f"{_shown(rows['train']['log_rir_limit'])}, {_shown(rows['held_out']['log_rir'])} held "
            f"out; primary {utility['metric']} {_shown(utility['before']['held_out'])} -> "
            f"{_shown(utility['after']['held_out'])}>"
        )


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


# ---------------------------------------------------------------- attack, assess


def assess(
    models: Immunised | tuple[Model, Model],
    *,
    primary: Task | None = None,
    harmful: Task | None = None,
    level: str | Level = "standard",
    attackers: str | Sequence[str] | None = None,
    harmful_rows: int | None = None,
    out: str | Path | None = None,
    train: str = "",
    held_out: Task | None = None,
    harmful_held_out: Task | None = None,
    held_out_fraction: float = 0.25,
    kind: str = "auto",
    preprocess: Preprocess | None = None,
    name: str = "mine",
    progress: Progress | None = None,
) -> Assessed:
    """Sets attackers on a model before and after, and says what held.

    Args:
      models: what `immunise` returned; or any ``(before, after)``, two models of one structure as
        `immunise` takes them (arrays [d, d'] are linear maps of the rows), with their tasks:
      primary: see `immunise`.
      harmful: see `immunise`.
      level: how hard attackers try: "quick", "standard", "full", or a `Level`.
      attackers: names; None: all.
      harmful_rows: how many labelled harmful rows they have to train on; None: all.
      out: folder in which finished attacks are kept, so that an interrupted call goes on.
      train: what attackers of weights may change; the default is everything.
      held_out: see `immunise`; likewise the rest.
      harmful_held_out: see `immunise`.
      held_out_fraction: see `immunise`.
      kind: see `immunise`.
      preprocess: see `immunise`.
      name: of the assessment.
      progress: see `immunise`.

    Returns:
      The assessment.

    Raises:
      ValueError: an unknown level or attacker; constant targets; two models that differ in
        structure or in what is frozen; networks with numbers as targets; too few harmful rows, or
        more than there are; what `immunise` refuses.
    """
    with jax.enable_x64(True):
        if isinstance(models, Immunised):
            given = {
                "primary": primary,
                "harmful": harmful,
                "held_out": held_out,
                "harmful_held_out": harmful_held_out,
                "train": train or None,
                "preprocess": preprocess,
            }
            if others := [key for key, value in given.items() if value is not None]:
                raise ValueError(
                    f"what immunise returned has its tasks and what trains; leave {others[0]} out."
                )
            bench, subjects = _subjects_of_run(models)
        else:
            if primary is None or harmful is None:
                raise ValueError(
                    "assess takes what immunise returned, or (before, after) with primary=(x, y) "
                    "and harmful=(x, y)."
                )
            before, after = _both(models)
            linear = _is_map(before)
            case = _case(
                primary, harmful, None if linear else before, train, held_out, harmful_held_out,
                held_out_fraction, kind, preprocess, name, ("none", 0), {},
            )  # fmt: skip
            prepared = prepare(
                case.config, pair=case.pair, backbone=case.backbone, progress=progress
            )
            changed = _map_changes if linear else _network_changes
            bench = bench_of_tasks(prepared)
            subjects = [
                _subject(prepared, bench, numbers, label)
                for label, numbers in zip(
                    ("none", "after"), changed(case, prepared, before, after), strict=True
                )
            ]
        if harmful_rows is not None:
            bench = assessment.of_few_harmful_rows(bench, harmful_rows)
        document = assessment.assess(
            bench,
            subjects,
            level=level,
            attackers=[attackers] if isinstance(attackers, str) else attackers,
            out=None if out is None else Path(out),
            command="jaximm.assess(...)",
            progress=progress,
        )
        return Assessed(document)


def attack(
    models: Immunised | tuple[Model, Model],
    *,
    attackers: str | Sequence[str],
    level: str | Level = "quick",
    **options: Any,
) -> Assessed:
    """`assess` by chosen attackers alone, at the level "quick" unless said otherwise.

    Args:
      models: see `assess`.
      attackers: one name or several, of `jaximm.attacks`.
      level: see `assess`.
      options: others of `assess`.

    Raises:
      ValueError: see `assess`; no attackers.
    """
    if not attackers:
        raise ValueError("attackers must name at least one; jaximm.assess takes all of them.")
    return assess(models, attackers=attackers, level=level, **options)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Assessed:
    """What attackers reached, and what held.

    Attributes:
      document: what ``assessment.json`` holds, as plain values; see `jaximm.records.assessment`.
    """

    document: Json

    def table(self) -> Table:
        """A row for every attacker on every model: a pandas DataFrame; without pandas dicts.

        The columns are those of ``assessment.csv``.
        """
        return _frame(report.assessment_csv(self.document))

    def to_html(self, path: str | Path) -> Path:
        """Writes the page of the assessment."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write_assessment_page(self.document, path)
        return path

    def save(self, path: str | Path) -> Path:
        """Writes assessment.json, .html, .md and .csv; ``jaximm compare`` and ``report`` read them.

        Raises:
          ValueError: the folder holds an assessment already.
        """
        folder = Path(path)
        if (folder / FILE).exists():
            raise ValueError(f"{folder} holds an assessment already; give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        assessment_record.write(folder / FILE, self.document)
        self.to_html(folder / "assessment.html")
        for suffix, write in (("md", report.assessment_markdown), ("csv", report.assessment_csv)):
            text = write(self.document)
            (folder / f"assessment.{suffix}").write_text(text, encoding="utf-8")
        return folder

    def __repr__(self) -> str:
        models = ", ".join(model["label"] for model in self.document["models"])
        count = len(self.document["attackers"])
        return f"<jaximm.Assessed: {models}; {count} attackers, level {self.document['level']}>"


def _subjects_of_run(done: Immunised) -> tuple[assessment.Bench, list[assessment.Model]]:
    """The bench of a run, the undefended model and the immunised one."""
    prepared, outcome, document = done.prepared, done.outcome, done.document
    bench = bench_of_tasks(prepared)
    subjects = [
        model_of(
            prepared,
            bench,
            outcome.trainable.whole(outcome.params.backbone),
            head=outcome.params.head,
            label=label_of(document),
            method=document["method"],
            seed=document["seed"],
            conditioning=conditioning_of(document),
        )
    ]
    if document["method"] != "none":
        subjects.append(model_of(prepared, bench, None, head=prepared.head))
    return bench, in_order(subjects)


def _both(models: object) -> tuple[Model, Model]:
    if not (isinstance(models, tuple | list) and len(models) == 2):
        raise ValueError(
            f"assess takes what immunise returned, or two models (before, after), got "
            f"{type(models).__name__}."
        )
    return models[0], models[1]


def _is_map(model: Model) -> bool:
    """Whether a model is the matrix of a linear map."""
    return getattr(model, "ndim", None) == 2


def _map_changes(
    case: Case, prepared: Prepared, before: ArrayLike, after: ArrayLike
) -> list[FlatParams]:
    """theta before and after."""
    del case
    x = prepared.train.primary.x
    maps = []
    for side, theta in (("before", before), ("after", after)):
        theta = check_array(theta, where=side, ndims=(2,))
        if theta.shape[0] != x.shape[1]:
            raise ValueError(
                f"{side}: rows have {x.shape[1]} features, but the map is {list(theta.shape)}."
            )
        maps.append({THETA: jnp.asarray(theta, x.dtype)})
    return maps


def _network_changes(
    case: Case, prepared: Prepared, before: Model, after: Model
) -> list[FlatParams]:
    """What differs between two networks of one structure."""
    del before
    if case.front is not None or case.backbone is None:
        raise ValueError(
            "two networks are assessed on classes; for numbers as targets give their features, as "
            "arrays, and linear maps of them."
        )
    rows = jax.ShapeDtypeStruct(
        prepared.pair.primary.train[0].shape, prepared.pair.primary.train[0].dtype
    )
    other = own_model(after, case.backbone.preprocess).backbone(rows)
    ours, theirs = ({**backbone.params, **backbone.stats} for backbone in (case.backbone, other))
    if wrong := sorted(
        path
        for path in {*ours, *theirs}
        if getattr(ours.get(path), "shape", None) != getattr(theirs.get(path), "shape", None)
    ):
        raise ValueError(
            f"before and after must have one structure, but {wrong[0]!r} differs in shape or is in "
            f"one of them alone ({len(wrong)} such)."
        )
    moved = [path for path in ours if not np.array_equal(ours[path], theirs[path])]
    trained = {*prepared.trainable.params, *case.backbone.stats}
    if frozen := sorted(set(moved) - trained):
        raise ValueError(
            f"{frozen[0]!r} differs between before and after, but train={case.config.train!r} "
            f"freezes it ({len(frozen)} such); name all that differs."
        )
    kept = [path for path in moved if path in case.backbone.stats] + list(prepared.trainable.params)
    return [{path: side[path] for path in kept} for side in (ours, theirs)]


def _subject(
    prepared: Prepared, bench: assessment.Bench, numbers: FlatParams, label: str
) -> assessment.Model:
    """A model of the bench with some numbers in place of theta_0's."""
    classes = prepared.classes("primary")
    head = None
    if classes is not None:
        rows = bench.primary.train
        head = fit_head(batched(bench.features_fn, numbers, rows.x), rows.y, classes)
    backbone = prepared.backbone
    stats = {path: value for path, value in numbers.items() if path in backbone.stats}
    own = {path: value for path, value in numbers.items() if path not in stats}
    model = model_of(prepared, bench, backbone.replace(own), head=head, label=label, method=label)
    public = {**model.public, **{path: backbone.stats[path] for path in stats}}
    return dataclasses.replace(model, params={**model.params, **stats}, public=public)


# ---------------------------------------------------------------- what was handed over


def _case(
    primary: Task,
    harmful: Task,
    model: Model,
    train: str,
    held_out: Task | None,
    harmful_held_out: Task | None,
    fraction: float,
    kind: str,
    preprocess: Preprocess | None,
    name: str,
    run: tuple[str, int],
    fields: Fields,
) -> Case:
    """Checks what was handed over, and says it as an experiment."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose from {list(KINDS)}.")
    own = None if model is None else own_model(model, preprocess)
    images = preprocess is not None or isinstance(model, Backbone)
    arrays: dict[str, Any] = {}
    for task, rows, unseen in (
        ("primary", primary, held_out),
        ("harmful", harmful, harmful_held_out),
    ):
        for suffix, given in (("", rows), ("_held_out", unseen)):
            if given is not None:
                x, y = _pair_of(given, f"{task}{suffix}")
                arrays[f"{task}_x{suffix}"] = _inputs(x, f"{task}_x{suffix}", own, images)
                arrays[f"{task}_y{suffix}"] = _targets(y)
    method, seed = run
    settings = _settings(method, fields)
    common = {"name": name, "methods": (method,), "seeds": (seed,), "held_out_fraction": fraction}
    if _is_of_classes(arrays, kind, own is not None):
        return _of_classes(arrays, own, train, preprocess, common, settings)
    return _of_numbers(arrays, own, train, kind, common, settings)


def _targets(y: Rows) -> np.ndarray:
    return read_targets(y) if isinstance(y, PATHS) else np.asarray(y)


def _pair_of(rows: object, where: str) -> Task:
    if not (isinstance(rows, tuple | list) and len(rows) == 2):
        raise ValueError(f"{where} must be (x, y), got {type(rows).__name__}.")
    return rows[0], rows[1]


def _inputs(x: Rows, where: str, own: Own | None, images: bool) -> Any:
    """Inputs as the model takes them: float64 rows [n, d], float32 of a network, or uint8 images.

    Rows of a table may stay in their files.

    Raises:
      ValueError: other dtypes, no rows, entries that are not finite, or rows of numbers so large
        or small that products of them leave float64.
    """
    if isinstance(x, PATHS):
        if own is not None:
            raise ValueError(f"{where}: the inputs of a network are arrays, got the path {x!s}.")
        return check_size(opened_or_read(x), where=where)
    if own is None:
        return check_size(check_array(x, where=where, ndims=(2,)), where=where)
    inputs = np.asarray(x)
    if inputs.ndim < 2 or not inputs.size:
        raise ValueError(f"{where}: expected inputs [n, ...], got shape {inputs.shape}.")
    if inputs.dtype == np.uint8:
        if not images:
            raise ValueError(
                f"{where}: uint8 images need preprocess=jaximm.models.Preprocess(...), or scale "
                "them to what the model takes."
            )
        return inputs
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(f"{where}: expected floating inputs, got dtype {inputs.dtype}.")
    return check_array(inputs.astype(np.float32), where=where, ndims=(inputs.ndim,)).astype(
        np.float32
    )


def _is_of_classes(arrays: Mapping[str, np.ndarray], kind: str, network: bool) -> bool:
    """Whether the targets are labels of classes, as `immunise` says.

    Raises:
      ValueError: one task's are and the other's are not; or they may be either.
    """
    if kind != "auto":
        return kind == "classes"
    targets = {
        task: np.concatenate(
            [np.ravel(arrays[key]) for key in (f"{task}_y", f"{task}_y_held_out") if key in arrays]
        )
        for task in TASKS
    }
    kinds = "OSUbiu" if network else "OSU"
    are_classes = {task: y.dtype.kind in kinds for task, y in targets.items()}
    if are_classes["primary"] != are_classes["harmful"]:
        dtypes = " and ".join(str(y.dtype) for y in targets.values())
        raise ValueError(
            f"the primary task's targets and the harmful task's have dtypes {dtypes}: give classes "
            "in both, or numbers in both, or say kind='classes' or kind='regression'."
        )
    for task, y in targets.items() if not are_classes["primary"] else ():
        values = np.unique(y) if y.dtype.kind in "fiu" else y[:0]
        if 2 < len(values) <= len(y) // 2 and (values == np.round(values)).all():
            raise ValueError(
                f"{task}_y: {len(values)} different whole numbers in {len(y)} rows: give "
                "kind='classes' if they are labels, kind='regression' if they are numbers."
            )
    return are_classes["primary"]


def _settings(method: str, fields: Fields) -> Json:
    """Fields of an experiment: those given that are the method's are its own.

    Raises:
      ValueError: an unknown method or field.
    """
    label, _ = registry.parse_label(method)
    if label not in immunisers.REGISTRY:
        raise ValueError(f"unknown method {label!r}; choose from {sorted(immunisers.REGISTRY)}.")
    known = registry.field_types(immunisers.REGISTRY[label][0])
    of_method = {key: value for key, value in fields.items() if key in known}
    others = {key: value for key, value in fields.items() if key not in known}
    if unknown := sorted(set(others) - set(FIELDS)):
        raise ValueError(
            f"unknown field {unknown[0]!r}; {label} has {list(known)}, the experiment "
            f"{list(FIELDS)}."
        )
    return others | ({"method_fields": {label: of_method}} if of_method else {})


def _of_classes(
    arrays: Fields,
    own: Own | None,
    train: str,
    preprocess: Preprocess | None,
    common: Fields,
    settings: Json,
) -> Case:
    """Two tasks of classes: after a network, or on rows."""
    name, fraction = common["name"], common["held_out_fraction"]
    pair = pair_of_arrays(**arrays, held_out_fraction=fraction, name=name, source="the caller")
    rows = min(len(task.train.y) for task in (pair.primary, pair.harmful))
    if rows < _SMALLEST_BATCH:
        settings.setdefault("batch_size", None)
    described: Json = {"model": LINEAR, "train": train or "neck"}
    backbone = None
    if own is not None:
        backbone = own.backbone(pair.primary.train.x)
        described = {
            "model": OWN + own.name,
            "weights": "as handed over",
            "train": train or "*",
        }
        if preprocess is not None:
            described["preprocess"] = dataclasses.asdict(preprocess)
    elif described["train"] != "neck":
        raise ValueError(f'of a linear map the "neck" trains; got train={train!r}; leave it out.')
    config = _experiment("labelled_arrays", {}, common, described | settings)
    return Case(config, pair, own, backbone, None, pair.primary.train.x.dtype == np.uint8)


def _of_numbers(
    arrays: Fields,
    own: Own | None,
    train: str,
    kind: str,
    common: Fields,
    settings: Json,
) -> Case:
    """Two tasks of numbers: a linear map of the rows, or of a network's features.

    Raises:
      ValueError: more of a network is to train.
    """
    if train not in ("", "neck"):
        raise ValueError(
            f"of targets that are numbers a linear map of the features trains, train='neck', got "
            f"{train!r}; for labels say kind='classes'."
        )
    front, words = None, "two tasks given as arrays"
    arrays = dict(arrays)
    images = arrays["primary_x"].dtype == np.uint8
    if own is not None:
        backbone = own.backbone(arrays["primary_x"])
        if THETA in backbone.params:
            raise ValueError("a backbone that has a neck gets no other; give one without.")
        front = backbone.split_at("")
        for key in [key for key in arrays if "_x" in key]:
            arrays[key] = np.asarray(_features(front, arrays[key]), np.float64)
        words = f"features of {own.name}"
    pair = task_pair_from_arrays(
        **arrays,
        held_out_fraction=common["held_out_fraction"],
        kind=kind,  # pyrefly: ignore[bad-argument-type]
        name=common["name"],
        description=words,
    )
    config = _experiment("arrays", {"kind": kind}, common, settings)
    return Case(config, pair, own, None, front, images)


def _experiment(data: str, fields: Json, common: Fields, settings: Fields) -> Experiment:
    shared = {key: value for key, value in common.items() if key != "held_out_fraction"}
    fields = fields | {"held_out_fraction": common["held_out_fraction"]}
    return Experiment(data=data, data_fields=fields, **shared, **settings)


def _features(trainable: Trainable, x: np.ndarray) -> jax.Array:
    """Features of inputs through a whole backbone, of which nothing trains."""
    inputs: Any = x
    (rows,) = encoded(trainable, [Batch(inputs, jnp.zeros(len(x)))])
    return batched(features_with_statistics(trainable), trainable.params, rows.x)


def _arrays(pair: TaskPair) -> Json:
    """A pair as the arrays that its data set reads."""
    arrays = {}
    for task in TASKS:
        rows = getattr(pair, task)
        for split, suffix in (("train", ""), ("held_out", "_held_out")):
            arrays[f"{task}_x{suffix}"], arrays[f"{task}_y{suffix}"] = getattr(rows, split)
        if rows.kind == "classes":
            arrays[f"{task}_classes"] = np.array(rows.classes)
    return arrays


def _frame(text: str) -> Table:
    """CSV as a pandas DataFrame, or without pandas as dicts of numbers and texts."""
    try:
        import pandas
    except ImportError:
        rows = csv.DictReader(io.StringIO(text))
        return [{key: _value(cell) for key, cell in row.items()} for row in rows]
    return pandas.read_csv(io.StringIO(text))


def _value(cell: str) -> object:
    try:
        return json.loads(cell.lower()) if cell else None
    except json.JSONDecodeError:
        return cell
