"""A user's own inputs with class labels, from an .npz file: images, or whatever a model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from jaximm.data.files import DataFileError, read_npz, shown
from jaximm.data.tasks import Split, Task, TaskPair, check_pair

SOURCE = "the user's own arrays"

_LONGEST = 80


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledArraysConfig:
    """Your own inputs with labels of classes, from an .npz file.

    Attributes:
      path: of a file with primary_x [n, ...] (uint8 images [n, h, w, 3], or floating numbers as the
        model takes them), primary_y [n], harmful_x, harmful_y, and perhaps the same names with
        _held_out. Labels are numbers or texts; each value is a class. With primary_classes [k],
        names, the labels are 0 .. k - 1; likewise harmful_classes.
      held_out_fraction: the share of rows, the last ones, that a task without held-out rows gives
        up.
    """

    targets: ClassVar = "classes"

    path: str = ""
    held_out_fraction: float = 0.25

    def __post_init__(self):
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be in (0, 1), got {self.held_out_fraction}.")


def load(config: LabelledArraysConfig) -> TaskPair:
    """The pair in the file of `config`.

    Raises:
      ValueError: no path; what `pair_of_arrays` refuses.
      DataFileError: (a ValueError) a file that cannot be read, or lacks an array.
    """
    if not config.path:
        raise ValueError("labelled_arrays: give path=FILE.npz.")
    path = Path(config.path)
    arrays: dict[str, Any] = read_npz(path)
    needed = [f"{task}_{part}" for task in ("primary", "harmful") for part in ("x", "y")]
    names = ["primary_classes", "harmful_classes"]
    known = [*needed, *(f"{name}_held_out" for name in needed), *names]
    wrong = [name for name in needed if name not in arrays] or sorted(set(arrays) - set(known))
    if wrong:
        raise DataFileError(
            f"{shown(path)}: expected {needed}, perhaps the same with _held_out, and {names}; "
            f"{shown(wrong[0])} is missing or unknown."
        )
    try:
        return pair_of_arrays(
            **arrays,
            held_out_fraction=config.held_out_fraction,
            description=f"two tasks from {shown(path.name)}",
        )
    except ValueError as error:
        raise DataFileError(f"{shown(path)}: {error}") from error


def pair_of_arrays(
    *,
    primary_x: ArrayLike,
    primary_y: ArrayLike,
    harmful_x: ArrayLike,
    harmful_y: ArrayLike,
    primary_x_held_out: ArrayLike | None = None,
    primary_y_held_out: ArrayLike | None = None,
    harmful_x_held_out: ArrayLike | None = None,
    harmful_y_held_out: ArrayLike | None = None,
    primary_classes: Sequence[str] | np.ndarray | None = None,
    harmful_classes: Sequence[str] | np.ndarray | None = None,
    held_out_fraction: float = 0.25,
    name: str = "arrays",
    description: str = "two tasks given as arrays",
    source: str = SOURCE,
) -> TaskPair:
    """Two tasks of inputs with class labels; every value among a task's labels is a class.

    Inputs are used as they are: no scaling, no shuffling. A task without held-out rows gives up its
    last ``round(held_out_fraction * n)`` rows.

    >>> x, y = np.eye(8, dtype=np.float32), np.array(list("abcaabca"))
    >>> pair = pair_of_arrays(primary_x=x, primary_y=y, harmful_x=x, harmful_y=y)
    >>> pair.primary.classes, pair.primary.held_out.y
    (('a', 'b', 'c'), array([2, 0], dtype=int32))

    Args:
      primary_x: [n, ...], uint8 images or floating numbers.
      primary_y: [n] labels: numbers or texts.
      harmful_x: as `primary_x`, of the same dtype.
      harmful_y: as `primary_y`.
      primary_x_held_out: rows for measurement only; give `primary_y_held_out` with it.
      primary_y_held_out: its labels.
      harmful_x_held_out: as for the primary task.
      harmful_y_held_out: its labels.
      primary_classes: names [k] of the classes, if the labels are their numbers.
      harmful_classes: likewise.
      held_out_fraction: in (0, 1).
      name: of the pair.
      description: one line for reports.
      source: where the arrays come from.

    Raises:
      ValueError: other shapes; labels that are no labels, or sorted before a split; a class without
        training rows; entries that are not finite.
    """

    def task(label, x, y, x_held_out, y_held_out, given):
        if (x_held_out is None) != (y_held_out is None):
            raise ValueError(f"{label}: give held-out inputs and their labels, not one of them.")
        x, y = np.asarray(x), _labels(y, f"{label}_y")
        if len(x) != len(y) or len(x) < 2:
            raise ValueError(f"{label}: {len(x)} inputs but {len(y)} labels; need 2 rows or more.")
        if x_held_out is None:
            n = len(x)
            cut = n - min(max(round(held_out_fraction * n), 1), n - 1)
            if n >= 8 and (y[:-1] <= y[1:]).all() and len(np.unique(y)) > 1:
                raise ValueError(
                    f"{label}_y: the rows are sorted by label, and the last ones would be held "
                    "out; shuffle the rows, or give held-out arrays."
                )
            x, x_held_out, y, y_held_out = x[:cut], x[cut:], y[:cut], y[cut:]
        else:
            x_held_out = np.asarray(x_held_out)
            y_held_out = _labels(y_held_out, f"{label}_y_held_out")
            if len(x_held_out) != len(y_held_out):
                raise ValueError(
                    f"{label}: {len(x_held_out)} held-out inputs but {len(y_held_out)} labels."
                )
        classes, numbers = np.unique(np.concatenate([y, y_held_out]), return_inverse=True)
        if given is not None:
            classes, numbers = np.ravel(given), np.concatenate([y, y_held_out])
            if numbers.dtype.kind not in "iu":
                raise ValueError(f"{label}_y: with names of classes, labels are their numbers.")
        numbers = numbers.astype(np.int32)
        names = tuple(str(value)[:_LONGEST] for value in classes)
        train = Split(x, numbers[: len(y)])
        return Task(label, train, Split(x_held_out, numbers[len(y) :]), "classes", names)

    pair = check_pair(
        TaskPair(
            name,
            task(
                "primary",
                primary_x,
                primary_y,
                primary_x_held_out,
                primary_y_held_out,
                primary_classes,
            ),
            task(
                "harmful",
                harmful_x,
                harmful_y,
                harmful_x_held_out,
                harmful_y_held_out,
                harmful_classes,
            ),
            description,
            source,
            as_inputs=np.asarray(primary_x).dtype != np.uint8,
        )
    )
    shapes = [_row(task) for task in (pair.primary, pair.harmful)]
    if pair.as_inputs and shapes[0] != shapes[1]:
        raise ValueError(
            f"the primary task's inputs are {shapes[0]}, the harmful task's {shapes[1]}; one model "
            "takes one shape and one dtype."
        )
    return pair


def _row(task: Task) -> str:
    """Shape and dtype of an input."""
    return f"{task.train.x.dtype} {list(task.train.x.shape[1:])}"


def _labels(values: ArrayLike, where: str) -> np.ndarray:
    """Labels [n]: whole numbers or texts.

    Raises:
      ValueError: another shape, or numbers that are not whole.
    """
    labels = np.asarray(values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels.flat):
        labels = labels.astype(str)
    if labels.ndim != 1:
        raise ValueError(f"{where}: expected one label a row, got shape {labels.shape}.")
    if labels.dtype.kind == "f" and (labels == np.round(labels)).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "biuUS":
        raise ValueError(
            f"{where}: expected whole numbers or texts as labels, got dtype {labels.dtype}; give "
            "numbers that are to be predicted as kind='regression'."
        )
    return labels
