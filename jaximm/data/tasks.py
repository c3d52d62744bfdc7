"""What a data set hands over: two tasks, each with training and held-out rows, checked at the door.

Everything here is NumPy on the host. A task's rows become JAX arrays in `jaximm.data.batches`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike

from jaximm.data.rows import (
    MANY,
    FileRows,
    all_alike,
    all_finite,
    all_zero,
    are_many,
    blocks,
    condensed,
    largest,
    spaced,
)

Kind = Literal["regression", "constant", "binary", "classes"]
"""What a task's rows and targets are.

``"regression"``: rows of numbers, targets that are real numbers. ``"constant"``: one number for
every row, so only the inputs mean anything: report condition numbers, attack nothing. ``"binary"``:
-1 and +1. ``"classes"``: images, or inputs as a model takes them, and the number of each one's
class.
"""

AskedKind = Literal["auto", "regression", "constant", "binary"]
"""A `Kind` of numbers, or ``"auto"``: found in the targets, see `task_pair_from_arrays`."""

_MOST_LABELS = 100


class Split(NamedTuple):
    """Rows of one task.

    Of numbers: `x` [n, d_in] and `y` [n] (or [n, k]), both float64; `x` may stay in its files. Of
    classes: `x` uint8 [n, h, w, 3], or floating [n, ...], and `y` int32 [n].
    """

    x: Any  # Shaped[np.ndarray, "n ..."] or FileRows
    y: Shaped[np.ndarray, "n ..."]


class Task(NamedTuple):
    """One task: its name, the rows that methods may see, the rows that they may not, its kind.

    `classes`: the names of classes; empty where targets are numbers.
    """

    name: str
    train: Split
    held_out: Split
    kind: Kind
    classes: tuple[str, ...] = ()


ReadTask = Callable[[], Task]
"""Reads a task when it is asked for."""


class TaskPair(NamedTuple):
    """The primary task (keep it easy) and the harmful task (make it hard) of one data set.

    Tasks of numbers have one width; images may differ in size, classes and number of rows.

    Attributes:
      name: of the data set.
      primary: the task that is kept.
      harmful: the task that is made hard.
      description: one line for reports.
      source: where the rows come from.
      as_inputs: in place of images there are floating numbers [n, ...] that models take as they
        are.
      unseen: harmful tasks on inputs of the same kind that no method gets to see, by name: does a
        defence generalise to them?
      benign: tasks that are not harmful, likewise: can the model still be trained on them?
    """

    name: str
    primary: Task
    harmful: Task
    description: str
    source: str
    as_inputs: bool = False
    unseen: Mapping[str, ReadTask] = MappingProxyType({})
    benign: Mapping[str, ReadTask] = MappingProxyType({})


class SharedInputs(NamedTuple):
    """Whether two tasks have the same inputs as far as a Hessian can tell, and what follows.

    Attributes:
      shared: the Hessians are equal, up to a factor, for every backbone.
      message: one sentence.
      overlap: of images: harmful training rows whose image is also a primary training image.
    """

    shared: bool
    message: str
    overlap: int = 0


def check_array(values: ArrayLike | FileRows, *, where: str, ndims: Sequence[int]) -> Any:
    """`values` as float64, or a `ValueError` that names the place of the first bad entry.

    Booleans, integers and floats pass; text, objects and complex numbers do not, nor do NaN and
    infinities, nor an array without rows or columns.

    Args:
      values: anything that NumPy turns into an array.
      where: what to call the array in a message, such as ``"primary train x"``.
      ndims: the numbers of axes that are allowed.

    Returns:
      A float64 array; the same object when `values` is one already, or rows of files, which were
      checked when they were opened.

    Raises:
      ValueError: as said above.
    """
    if isinstance(values, FileRows):
        return values
    try:
        array = np.asarray(values)
    except ValueError as error:  # ragged lists
        raise ValueError(f"{where}: rows have different lengths; give a full table.") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{where}: expected numbers, got dtype {array.dtype}{_first_non_number(array)}; "
            "encode categories as numbers first."
        )
    if array.ndim not in ndims:
        expected = " or ".join(str(ndim) for ndim in ndims)
        raise ValueError(
            f"{where}: expected {expected} axes, got shape {array.shape}; give one row an example "
            "(x.reshape(len(x), -1) flattens images)."
        )
    if array.size == 0:
        raise ValueError(f"{where}: no rows or no columns, got shape {array.shape}.")
    with np.errstate(over="ignore"):  # of a longer float: refused below as infinite
        array = array.astype(np.float64, copy=False)
    if not all_finite(array):
        bad = np.argwhere(~np.isfinite(array))
        row, column = int(bad[0][0]), int(bad[0][1]) if array.ndim > 1 else 0
        raise ValueError(
            f"{where}: row {row}, column {column} is {array[tuple(bad[0])]} "
            f"({len(bad)} such entries); remove these rows or fill them in."
        )
    return array


_LARGEST = 1e75
"""Largest size of a table's largest entry, and one over the least: products of four fit float64."""


def check_size(array: Any, *, where: str) -> Any:
    """An array, or a `ValueError` where products of its entries would leave float64.

    A pair may be of any scale, and so may what `jaximm.linalg` is given; the methods and attacks
    multiply features with features and targets as they are.
    """
    size = largest(array)
    if size > 0 and not 1 / _LARGEST <= size <= _LARGEST:
        raise ValueError(
            f"{where}: the largest entry is {size:.3g} in size, expected {1 / _LARGEST:g} to "
            f"{_LARGEST:g}; give it in other units."
        )
    return array


def _first_non_number(array: np.ndarray) -> str:
    """Where the first entry of `array` is that Python cannot read as a number, or nothing."""
    if array.dtype.kind not in "OSU":
        return ""
    for place, value in np.ndenumerate(array):
        try:
            float(value)
        except (TypeError, ValueError):
            row, column = place[0] if place else 0, place[1] if len(place) > 1 else 0
            return f" (row {row}, column {column} is {str(value)[:60]!r})"
    return ""


def check_split(split: Split, *, where: str) -> Split:
    """`split` as float64 with matching rows, or a `ValueError` naming task, row and column.

    One column of targets, [n, 1], becomes [n].
    """
    x = check_array(split.x, where=f"{where} x", ndims=(2,))
    y = check_array(split.y, where=f"{where} y", ndims=(1, 2))
    if len(x) != len(y):
        raise ValueError(f"{where}: x has {len(x)} rows but y has {len(y)}; give one target a row.")
    return Split(x, y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y)


def check_task(task: Task, *, as_inputs: bool = False) -> Task:
    """`task` with checked splits of one width or image size.

    Args:
      task: of any kind.
      as_inputs: see `TaskPair`.

    Raises:
      ValueError: bad entries, no rows, different widths in the two splits, an unknown kind, or
        targets that do not fit the kind; of classes also fewer than two, two of one name, or one
        without training rows.
    """
    if task.kind not in get_args(Kind):
        raise ValueError(
            f"task {task.name!r}: unknown kind {task.kind!r}; choose from {get_args(Kind)}."
        )
    if task.kind == "classes":
        return _check_classes(task, as_inputs)
    train = check_split(task.train, where=f"{task.name} train")
    held_out = check_split(task.held_out, where=f"{task.name} held-out")
    if train.x.shape[1] != held_out.x.shape[1]:
        raise ValueError(
            f"task {task.name!r}: {train.x.shape[1]} features in the training rows but "
            f"{held_out.x.shape[1]} in the held-out rows."
        )
    if train.y.shape[1:] != held_out.y.shape[1:]:
        raise ValueError(
            f"task {task.name!r}: training targets have shape {train.y.shape}, held-out targets "
            f"{held_out.y.shape}; only the number of rows may differ."
        )
    if task.kind == "binary" and not np.isin(np.concatenate([train.y, held_out.y]), (-1, 1)).all():
        raise ValueError(
            f"task {task.name!r}: a binary task's targets must be -1 or +1 (or any two values, "
            "which task_pair_from_arrays turns into these)."
        )
    return task._replace(train=train, held_out=held_out)


def _check_classes(task: Task, as_inputs: bool) -> Task:
    names = task.classes
    if len(names) < 2:
        raise ValueError(f"task {task.name!r}: needs at least two classes, got {names}.")
    if len(set(names)) != len(names):
        raise ValueError(f"task {task.name!r}: two classes have one name: {names}.")
    train, held_out = (
        _check_labelled(split, f"{task.name} {words}", len(names), as_inputs)
        for split, words in ((task.train, "train"), (task.held_out, "held-out"))
    )
    if train.x.shape[1:] != held_out.x.shape[1:]:
        raise ValueError(
            f"task {task.name!r}: training images are {train.x.shape[1:]}, held-out images "
            f"{held_out.x.shape[1:]}; resize them to one size."
        )
    missing = np.setdiff1d(np.arange(len(names)), train.y)
    if len(missing):
        raise ValueError(
            f"task {task.name!r}: class {names[missing[0]]!r} has no training rows "
            f"({len(missing)} such classes)."
        )
    return task._replace(train=train, held_out=held_out)


def _check_labelled(split: Split, where: str, classes: int, as_inputs: bool) -> Split:
    """Images or inputs with int32 labels in 0..classes - 1."""
    x, labels = np.asarray(split.x), np.asarray(split.y)
    if as_inputs:
        _check_inputs(x, where)
    elif x.dtype != np.uint8:
        raise ValueError(
            f"{where}: expected uint8 pixels in 0..255, got dtype {x.dtype}; "
            "models scale them themselves."
        )
    elif x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(
            f"{where}: expected RGB images [n, h, w, 3], got shape {x.shape}; "
            "repeat a grey channel three times."
        )
    if x.size == 0:
        raise ValueError(f"{where}: no images, or empty ones: shape {x.shape}.")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: expected one whole number a row as label, got {labels.dtype} "
            f"of shape {labels.shape}."
        )
    if len(labels) != len(x):
        raise ValueError(f"{where}: {len(x)} images but {len(labels)} labels.")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise ValueError(
            f"{where}: row {outside[0]} has label {labels[outside[0]]}, expected 0 to "
            f"{classes - 1} ({len(outside)} such rows)."
        )
    return Split(x, labels.astype(np.int32, copy=False))


def _check_inputs(inputs: np.ndarray, where: str) -> None:
    """Refuses what is no finite array [n, ...] of floating numbers."""
    if inputs.dtype.kind != "f" or inputs.ndim < 2:
        raise ValueError(
            f"{where}: expected floating inputs [n, ...], got {inputs.dtype} of shape "
            f"{inputs.shape}."
        )
    finite = np.isfinite(inputs).all(axis=tuple(range(1, inputs.ndim)))
    if not finite.all():
        raise ValueError(
            f"{where}: row {np.argmin(finite)} has an entry that is not finite ({np.sum(~finite)} "
            "such rows); remove these rows or fill them in."
        )


def check_pair(pair: TaskPair) -> TaskPair:
    """`pair` with checked tasks, those of numbers of one input width; every loader ends here.

    Raises:
      ValueError: see `check_task`; or the two tasks have different widths.
    """
    primary, harmful = (
        check_task(task, as_inputs=pair.as_inputs) for task in (pair.primary, pair.harmful)
    )
    of_numbers = primary.kind != "classes"
    if of_numbers and primary.train.x.shape[1] != harmful.train.x.shape[1]:
        raise ValueError(
            f"{pair.name}: the primary task has {primary.train.x.shape[1]} features but the "
            f"harmful task has {harmful.train.x.shape[1]}; one backbone needs one width."
        )
    return pair._replace(primary=primary, harmful=harmful)


def task_pair_from_arrays(
    *,
    primary_x: ArrayLike,
    primary_y: ArrayLike,
    harmful_x: ArrayLike,
    harmful_y: ArrayLike,
    primary_x_held_out: ArrayLike | None = None,
    primary_y_held_out: ArrayLike | None = None,
    harmful_x_held_out: ArrayLike | None = None,
    harmful_y_held_out: ArrayLike | None = None,
    held_out_fraction: float = 0.25,
    name: str = "arrays",
    kind: AskedKind = "auto",
    description: str = "two tasks given as arrays",
    source: str = "the caller",
) -> TaskPair:
    """A `TaskPair` from a caller's own arrays, used as they are (no scaling, no shuffling).

    A task that comes without held-out rows gives up its last ``round(held_out_fraction * n)`` rows
    (at least one): shuffle first if the order of the rows means something.

    With ``kind="auto"`` each task's kind is that of its targets, training and held-out rows taken
    together. Two whole numbers (False and True, 0 and 1, -1 and +1, 3 and 8) that repeat are labels
    of two classes: the task is "binary", the smaller one becomes -1, the larger +1. More whole
    numbers that repeat may be labels of several classes, which least squares on them would rank by
    their numbers: refused, since only the caller knows. Anything else is "regression".

    >>> import numpy as np
    >>> x, y = np.eye(8), np.arange(8)
    >>> pair = task_pair_from_arrays(primary_x=x, primary_y=y, harmful_x=2 * x, harmful_y=y)
    >>> pair.harmful.train.x.shape, pair.harmful.held_out.y
    ((6, 8), array([6., 7.]))

    Args:
      primary_x: [n, d_in] numbers; `harmful_x` may have another n, not another d_in.
      primary_y: [n] or [n, k] numbers; [n, 1] becomes [n].
      harmful_x: as `primary_x`.
      harmful_y: as `primary_y`.
      primary_x_held_out: rows for measurement only; give `primary_y_held_out` with it.
      primary_y_held_out: its targets.
      harmful_x_held_out: as for the primary task.
      harmful_y_held_out: its targets.
      held_out_fraction: in (0, 1), used for a task without held-out rows.
      name: of the pair.
      kind: of both tasks; "binary" takes any two values.
      description: one line for reports.
      source: where the arrays come from.

    Raises:
      ValueError: see `check_pair`; or only one of a task's two held-out arrays is given; or a task
        without held-out rows has fewer than two rows; inputs that are all zero, or all rows the
        same; one target for all rows without ``kind="constant"``; labels of several classes.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be in (0, 1), got {held_out_fraction}.")
    if kind not in get_args(AskedKind):
        raise ValueError(f"unknown kind {kind!r}; choose from {list(get_args(AskedKind))}.")

    def task(label, x, y, x_held_out, y_held_out):
        if (x_held_out is None) != (y_held_out is None):
            raise ValueError(f"{label}: give both {label}_x_held_out and {label}_y_held_out.")
        train = check_split(Split(x, y), where=f"{label} train")
        held_out, n = Split(x_held_out, y_held_out), len(train.x)
        if x_held_out is None:
            if n < 2:
                raise ValueError(f"{label}: {n} row cannot be split; give held-out arrays as well.")
            cut = n - min(max(round(held_out_fraction * n), 1), n - 1)
            train, held_out = (
                Split(train.x[part], train.y[part]) for part in (slice(cut), slice(cut, n))
            )
        checked = check_task(Task(label, train, held_out, "regression"))  # whatever its targets
        return _of_kind(checked, kind, own_split=x_held_out is None)

    return check_pair(
        TaskPair(
            name,
            task("primary", primary_x, primary_y, primary_x_held_out, primary_y_held_out),
            task("harmful", harmful_x, harmful_y, harmful_x_held_out, harmful_y_held_out),
            description,
            source,
        )
    )


def _of_kind(task: Task, kind: AskedKind, *, own_split: bool) -> Task:
    """A checked task with the kind of its targets, or a `ValueError` where there is nothing to do.

    Refuses inputs that are zero or one row n times, whose condition number says nothing, and two
    classes that the split takes apart.
    """
    x, n, where = task.train.x, len(task.train.x), f"{task.name}_x"
    if all_zero(x) or (len(x) > 1 and all_alike(x)):
        same = "are 0 in every entry" if all_zero(x) else "are the same (every column is constant)"
        raise ValueError(
            f"{where}: all {n} training rows {same}, so there is nothing to condition; check how "
            "they were made."
        )
    if all_zero(task.held_out.x):
        raise ValueError(
            f"{where}{'' if own_split else '_held_out'}: all {len(task.held_out.x)} held-out rows "
            "are 0 in every entry; check how they were made."
        )
    y = np.concatenate([task.train.y, task.held_out.y])
    own_kind, y = _kind_and_targets(kind, y, f"{task.name}_y")
    if own_kind == "binary" and y.ndim == 1 and set(np.unique(y)) == {-1, 1}:
        if (y[:n] == y[0]).all():
            raise ValueError(
                f"{task.name}_y: the {n} training rows hold one of the two labels only; shuffle "
                "the rows."
            )
        if own_split and len(y) >= 8 and np.count_nonzero(np.diff(y)) == 1:
            raise ValueError(
                f"{task.name}_y: the rows are sorted by label, and the last ones would be held "
                "out; shuffle the rows, or give held-out arrays."
            )
    return Task(task.name, Split(x, y[:n]), Split(task.held_out.x, y[n:]), own_kind)


def _kind_and_targets(
    kind: AskedKind, y: Float[np.ndarray, "n ..."], where: str
) -> tuple[Kind, Float[np.ndarray, "n ..."]]:
    """The kind of a task with targets `y`, and those targets, two labels as -1 and +1."""
    if y.ndim > 1:  # several targets a row
        return ("regression" if kind == "auto" else kind), y
    values = np.unique(y)
    n, k = len(y), len(values)
    if kind == "binary" and k == 2:
        return kind, np.where(y == values[1], 1.0, -1.0)
    if kind != "auto":
        return kind, y
    if k == 1:
        raise ValueError(
            f"{where}: every target is {values[0]:g}: nothing to predict. Give kind='constant' if "
            "condition numbers alone are wanted."
        )
    if k == n or (values != np.round(values)).any():
        return "regression", y
    if k == 2:
        return "binary", np.where(y == values[1], 1.0, -1.0)
    in_turn = values[0] in (0, 1) and values[-1] - values[0] == k - 1  # 0 .. k-1, or 1 .. k
    if in_turn or (k <= _MOST_LABELS and n >= 2 * k):
        shown = ", ".join(f"{value:g}" for value in values[:3])
        raise ValueError(
            f"{where}: {k} different whole numbers ({shown}, ...) in {n} rows: numbers or labels "
            "of classes? For numbers give kind='regression'. A task on feature rows has two "
            "classes at most: keep two, or label one class 1 and the others 0; photographs of "
            "several classes go through image_folder."
        )
    return "regression", y


def in_few_rows(pair: TaskPair) -> TaskPair:
    """A pair of tables whose many rows are few, for what is a function of their moments.

    Many training rows become the few of `jaximm.data.rows.condensed`. Held-out rows are rows of the
    data: of more than 2 `MANY` so many, evenly spaced. What rows there are few of stays as it is.
    """

    def few(task: Task) -> Task:
        train, held_out = task.train, task.held_out
        if are_many(train.x):
            train = Split(*condensed(*train))
        held_out = Split(*(spaced(part, 2 * MANY) for part in held_out))
        return task._replace(train=train, held_out=held_out)

    return pair._replace(primary=few(pair.primary), harmful=few(pair.harmful))


def inputs_shared(pair: TaskPair) -> SharedInputs:
    """Whether a Hessian sees the same inputs in both tasks: then RIR is 1 for every backbone.

    It never sees a label, so two tasks that differ in labels alone have the same one. Training rows
    are compared. Of numbers, Gram matrices up to a factor. Of classes, images byte for byte: each
    must be in both tasks, in the same proportion (n rows against the same rows twice count as the
    same).

    Returns:
      A verdict and one sentence; a shared input distribution is a finding, not an error.
    """
    return _grams_shared(pair) if pair.primary.kind != "classes" else _images_shared(pair)


_RTOL = 1e-8


def _grams_shared(pair: TaskPair) -> SharedInputs:
    """Whether the tasks' Gram matrices agree up to a factor.

    With ``K = X^T X / n`` and ``K_H = c K_P`` the Hessians are ``c`` times each other whatever the
    backbone, so their condition numbers are equal. The matrices are never formed: both are applied
    to eight fixed Gaussian vectors V, and ``||K_H V - c K_P V||_F <= 1e-8 ||K_H V||_F`` decides,
    with ``c = tr K_H / tr K_P``; O(n d_in) work, a block of rows at a time.
    """
    probes = np.random.default_rng(0).standard_normal((pair.primary.train.x.shape[1], 8))
    (trace_primary, applied_primary, e_primary), (trace_harmful, applied_harmful, e_harmful) = (
        _gram_applied(task.train.x, probes) for task in (pair.primary, pair.harmful)
    )
    if trace_primary == 0 or trace_harmful == 0:
        return SharedInputs(False, "A task's inputs are all zero: its condition number is 1.")
    scale = trace_harmful / trace_primary
    difference = np.linalg.norm(applied_harmful - scale * applied_primary)
    if difference > _RTOL * np.linalg.norm(applied_harmful):
        return SharedInputs(False, "The tasks have different input distributions.")
    with np.errstate(over="ignore", under="ignore"):
        scale = np.ldexp(scale, 2 * (e_harmful - e_primary))
    factor = "" if np.isclose(scale, 1.0, rtol=_RTOL, atol=0) else f" up to the factor {scale:.6g}"
    return SharedInputs(
        True,
        f"Both tasks have the same input Gram matrix (K_H = K_P{factor}): the relative "
        "immunisation ratio is 1 for every backbone, conditioning cannot separate them.",
    )


class _Applied(NamedTuple):
    trace: float  # of K / 4^exponent
    applied: Float[np.ndarray, "d_in 8"]  # K / 4^exponent times the probes
    exponent: int


def _gram_applied(x: Float[np.ndarray, "n d_in"] | FileRows, probes: np.ndarray) -> _Applied:
    """The Gram matrix K = X^T X / n by its trace and products, with the largest |x| in [1/2, 1).

    A power of two off the rows: squares of 1e-200 would be 0, of 1e200 infinite.
    """
    exponent = int(np.frexp(largest(x))[1])
    trace, applied = 0.0, np.zeros(probes.shape)
    for block in blocks(x):
        scaled = np.ldexp(block, -exponent)
        trace += np.einsum("nd,nd->", scaled, scaled)
        applied += scaled.T @ (scaled @ probes)
    return _Applied(trace / len(x), applied / len(x), exponent)


def _images_shared(pair: TaskPair) -> SharedInputs:
    """Whether the tasks' training images are the same ones in the same proportions."""
    primary, harmful = (_image_counts(task.train.x) for task in (pair.primary, pair.harmful))
    n_primary, n_harmful = len(pair.primary.train.y), len(pair.harmful.train.y)
    overlap = sum(count for image, count in harmful.items() if image in primary)
    if primary.keys() == harmful.keys() and all(
        count * n_primary == primary[image] * n_harmful for image, count in harmful.items()
    ):
        return SharedInputs(
            True,
            "Both tasks have the same training images: their Hessians are equal for every "
            "backbone, the relative immunisation ratio is 1, conditioning cannot separate them.",
            overlap,
        )
    if overlap:
        return SharedInputs(
            False,
            f"{overlap} of the {n_harmful} harmful training images are also primary training "
            "images: the two Hessians have that part in common.",
            overlap,
        )
    return SharedInputs(False, "The tasks share no training image.")


def _image_counts(images: np.ndarray) -> Counter[bytes]:
    """How often each image comes, by a digest of its shape and pixels."""
    shape = repr(images.shape[1:]).encode()
    return Counter(
        blake2b(shape + image.tobytes(), digest_size=16).digest()
        for image in np.ascontiguousarray(images)
    )
