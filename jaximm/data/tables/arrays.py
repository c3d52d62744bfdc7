"""A user's own two tasks: from an .npz file, from two CSV files, or from a folder of .npy files."""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaximm.data.files import DataFileError, read_npz, shown
from jaximm.data.raw.tables import brief, csv_rows, number
from jaximm.data.rows import opened_or_read, read_targets
from jaximm.data.tasks import AskedKind, TaskPair, check_array, check_size, task_pair_from_arrays

SOURCE = "the user's own files"

_REQUIRED = ("primary_x", "primary_y", "harmful_x", "harmful_y")
_OPTIONAL = tuple(f"{name}_held_out" for name in _REQUIRED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraysConfig:
    """Your own arrays: an .npz file, a CSV file for each task, or a folder of .npy files.

    Attributes:
      path: an ``.npz`` file with arrays primary_x [n, d], primary_y [n] or [n, 1], harmful_x
        [m, d], harmful_y [m] or [m, 1] and perhaps the same names with _held_out; or the primary
        task's CSV file, one header line, numbers only; or a folder with these arrays as
        ``primary_x.npy`` and so on, each perhaps itself a folder of parts, ``part-000.npy``,
        ``part-001.npy`` ..., whose rows follow each other. Many rows of a folder stay there: they
        are read by blocks, and may be more than fit into memory.
      harmful_path: the harmful task's CSV file; leave empty for ``.npz``.
      primary_target: the CSV column to predict; empty: the last one.
      harmful_target: the same for the harmful task. Targets that the two files name differently are
        left out of the features of both.
      held_out_fraction: the share of rows, the last ones, that a task without held-out rows gives
        up.
      kind: what the targets are: "regression", "binary" (two values, or False and True) or
        "constant"; "auto" finds out for each task, and refuses what may be labels of more than two
        classes (see `jaximm.data.tasks.task_pair_from_arrays`).
    """

    path: str = ""
    harmful_path: str = ""
    primary_target: str = ""
    harmful_target: str = ""
    held_out_fraction: float = 0.25
    kind: AskedKind = "auto"

    def __post_init__(self):
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be in (0, 1), got {self.held_out_fraction}.")
        if self.kind not in get_args(AskedKind):
            raise ValueError(
                f"unknown kind {self.kind!r}; choose from {list(get_args(AskedKind))}."
            )


def load(config: ArraysConfig) -> TaskPair:
    """The pair in the file or files of `config`, values as they are (two labels as -1 and +1).

    Raises:
      ValueError: no path, or paths and targets that do not go together; the two tasks' features
        differ; what `jaximm.data.tasks.task_pair_from_arrays` refuses.
      DataFileError: (a ValueError) a file that is not there, cannot be read or lacks an array or
        column; entries that are not finite numbers.
    """
    path = Path(config.path)
    if not config.path:
        raise ValueError(
            "arrays: give path=FILE.npz, path=FOLDER of .npy files, or path=FILE.csv and "
            "harmful_path=FILE.csv."
        )
    packed = path.suffix.lower() == ".npz"
    if packed or path.is_dir():
        for name in ("harmful_path", "primary_target", "harmful_target"):
            if getattr(config, name):
                what = "an .npz file" if packed else "a folder"
                raise ValueError(
                    f"{shown(path)}: {what} holds both tasks and their targets by name; "
                    f"leave {name} empty."
                )
        arrays = _read_npz(path) if packed else _read_folder(path)
        where = shown(path)
    elif config.harmful_path:
        arrays = _read_csv_pair(config)
        where = f"{shown(path)} (primary), {shown(config.harmful_path)} (harmful)"
    else:
        raise ValueError(
            f"{shown(path)}: a CSV file holds one task; give harmful_path as well (or, for both "
            "tasks in one file, an .npz)."
        )
    try:
        for name, values in arrays.items():
            check_size(values, where=name)
        return task_pair_from_arrays(
            **arrays,
            held_out_fraction=config.held_out_fraction,
            kind=config.kind,
            description=f"two tasks from {shown(path.name)}",
            source=SOURCE,
        )
    except ValueError as error:
        raise DataFileError(f"{where}: {error}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    """The known arrays of an .npz file."""
    arrays = read_npz(path)
    _check_names(path, arrays)
    for name, values in arrays.items():
        is_target = "_y" in name
        where = f"{shown(path)}: {name}"
        arrays[name] = check_array(values, where=where, ndims=(1, 2) if is_target else (2,))
        if is_target and values.ndim == 2 and values.shape[1] > 1:
            raise DataFileError(
                f"{where} must have one target a row, got shape {values.shape}; give one of its "
                "columns (of one-hot labels: one class against the others)."
            )
    return arrays


def _read_folder(path: Path) -> dict[str, Any]:
    """The known arrays of a folder: x as rows of its files, read now if they are not many."""
    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    found = {name.removesuffix(".npy"): path / name for name in sorted(names)}
    if len(found) < len(names):
        raise DataFileError(f"{shown(path)}: a file and a folder of one name; keep one of them.")
    _check_names(path, found)
    arrays: dict[str, Any] = {}
    for name, file in found.items():
        if "_y" in name:
            arrays[name] = check_array(read_targets(file), where=shown(file), ndims=(1, 2))
        else:
            arrays[name] = opened_or_read(file)
    return arrays


def _check_names(path: Path, arrays: Collection[str]) -> None:
    """Refuses arrays that are missing, and those that are none of a pair's."""
    missing = [name for name in _REQUIRED if name not in arrays]
    unknown = sorted(set(arrays) - set(_REQUIRED) - set(_OPTIONAL))
    if missing or unknown:
        raise DataFileError(
            f"{shown(path)}: missing arrays {missing}, unknown arrays {brief(unknown)}; "
            f"expected {list(_REQUIRED)} and perhaps {list(_OPTIONAL)}."
        )


def _read_csv_pair(config: ArraysConfig) -> dict[str, Any]:
    """Features and targets from the two CSV files."""
    paths = {"primary": Path(config.path), "harmful": Path(config.harmful_path)}
    tables = {task: _read_csv(path) for task, path in paths.items()}
    targets = {}
    for task, wanted in (("primary", config.primary_target), ("harmful", config.harmful_target)):
        names = list(tables[task])
        targets[task] = wanted or names[-1]
        if targets[task] not in names:
            raise DataFileError(
                f"{shown(paths[task])}: no column {targets[task]!r}; it has {brief(names)}."
            )
    features = {
        task: [name for name in table if name not in targets.values()]
        for task, table in tables.items()
    }
    if features["primary"] != features["harmful"]:
        only = sorted(set(features["primary"]) ^ set(features["harmful"]))
        raise DataFileError(
            f"{shown(paths['primary'])} and {shown(paths['harmful'])} must have the same feature "
            "columns in the same order; "
            + (f"only one of them has {brief(only)}." if only else "their order differs.")
        )
    if not features["primary"]:
        raise DataFileError(f"{shown(paths['primary'])}: no feature column beside the targets.")
    arrays = {}
    for task, table in tables.items():
        arrays[f"{task}_x"] = np.stack([table[name] for name in features[task]], axis=1)
        arrays[f"{task}_y"] = table[targets[task]]
    return arrays


def _read_csv(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Columns of finite numbers by name."""
    path, name = Path(path), shown(path)
    rows = csv_rows(path)
    _, header = next(rows)
    values = array("d")
    for index, (line, row) in enumerate(rows):
        try:
            values.extend([number(text) for text in row])
        except ValueError as error:
            column, text = next(pair for pair in enumerate(row) if not _is_number(pair[1]))
            raise DataFileError(
                f"{name}: row {index}, column {brief(header[column])} is {brief(text)}, not a "
                f"number (line {line}); encode categories and fill in missing values first."
            ) from error
    table = np.frombuffer(values).reshape(-1, len(header)) if values else np.empty((0, 0))
    if not len(table):
        raise DataFileError(f"{name}: expected a header line and at least one row.")
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        row, column = map(int, bad[0])
        raise DataFileError(
            f"{name}: row {row}, column {brief(header[column])} is {table[row, column]} "
            f"({len(bad)} such entries in {len(np.unique(bad[:, 1]))} columns); remove these rows "
            "or fill them in."
        )
    return {name: table[:, column] for column, name in enumerate(header)}


def _is_number(text: str) -> bool:
    """Whether `number` takes it."""
    try:
        number(text)
    except ValueError:
        return False
    return True
