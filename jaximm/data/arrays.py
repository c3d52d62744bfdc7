"""A user's own two tasks, from an .npz file or from two CSV files."""

from __future__ import annotations

import csv
import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaximm.data.tasks import Kind, TaskPair, task_pair_from_arrays

SOURCE = "the user's own files"

_REQUIRED = ("primary_x", "primary_y", "harmful_x", "harmful_y")
_OPTIONAL = tuple(f"{name}_held_out" for name in _REQUIRED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraysConfig:
    """Your own arrays: an .npz file, or a CSV file for each task.

    Attributes:
      path: an ``.npz`` file with arrays primary_x [n, d], primary_y [n], harmful_x [m, d],
        harmful_y [m] and perhaps the same names with _held_out; or the primary task's CSV file,
        one header line, numbers only.
      harmful_path: the harmful task's CSV file; leave empty for ``.npz``.
      primary_target: the CSV column to predict; empty: the last one.
      harmful_target: the same for the harmful task. Targets that the two files name differently are
        left out of the features of both.
      held_out_fraction: the share of rows, the last ones, that a task without held-out rows gives
        up.
      kind: what the targets are: "regression", "binary" (-1, +1) or "constant".
    """

    path: str = ""
    harmful_path: str = ""
    primary_target: str = ""
    harmful_target: str = ""
    held_out_fraction: float = 0.25
    kind: Kind = "regression"

    def __post_init__(self):
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be in (0, 1), got {self.held_out_fraction}.")


def load(config: ArraysConfig) -> TaskPair:
    """The pair in the file or files of `config`, values as they are.

    Raises:
      ValueError: no path; a file that is not there, cannot be read or lacks an array or column;
        entries that are not finite numbers; the two tasks' features differ.
    """
    if not config.path:
        raise ValueError("arrays: give path=FILE.npz, or path=FILE.csv and harmful_path=FILE.csv.")
    if Path(config.path).suffix == ".npz":
        arrays = _read_npz(Path(config.path))
    elif config.harmful_path:
        arrays = _read_csv_pair(config)
    else:
        raise ValueError(f"{config.path}: a CSV file holds one task; give harmful_path as well.")
    return task_pair_from_arrays(
        **arrays,
        held_out_fraction=config.held_out_fraction,
        kind=config.kind,
        description=f"two tasks from {Path(config.path).name}",
        source=SOURCE,
    )


def _read_npz(path: Path) -> dict[str, Any]:
    """The known arrays of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as .npz: {error}") from error
    missing = [name for name in _REQUIRED if name not in arrays]
    unknown = sorted(set(arrays) - set(_REQUIRED) - set(_OPTIONAL))
    if missing or unknown:
        raise ValueError(
            f"{path}: missing arrays {missing}, unknown arrays {unknown}; "
            f"expected {list(_REQUIRED)} and perhaps {list(_OPTIONAL)}."
        )
    return arrays


def _read_csv_pair(config: ArraysConfig) -> dict[str, Any]:
    """Features and targets from the two CSV files."""
    paths = {"primary": Path(config.path), "harmful": Path(config.harmful_path)}
    tables = {task: _read_csv(path) for task, path in paths.items()}
    targets = {}
    for task, wanted in (("primary", config.primary_target), ("harmful", config.harmful_target)):
        names = list(tables[task])
        targets[task] = wanted or names[-1]
        if targets[task] not in names:
            raise ValueError(f"{paths[task]}: no column {targets[task]!r}; it has {names}.")
    features = {
        task: [name for name in table if name not in targets.values()]
        for task, table in tables.items()
    }
    if features["primary"] != features["harmful"]:
        only = sorted(set(features["primary"]) ^ set(features["harmful"]))
        raise ValueError(
            "the two CSV files must have the same feature columns in the same order; "
            + (f"only one of them has {only}." if only else "their order differs.")
        )
    if not features["primary"]:
        raise ValueError(f"{paths['primary']}: no feature column beside the targets.")
    arrays = {}
    for task, table in tables.items():
        arrays[f"{task}_x"] = np.stack([table[name] for name in features[task]], axis=1)
        arrays[f"{task}_y"] = table[targets[task]]
    return arrays


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns of numbers by name; NaN and infinities are left for the checks at the door."""
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as CSV: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a header line and at least one row.")
    header = rows[0]
    if len(set(header)) != len(header):
        raise ValueError(f"{path}: two columns have the same name; header {header}.")
    table = np.empty((len(rows) - 1, len(header)))
    for index, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise ValueError(
                f"{path}: row {index} has {len(row)} fields, the header has {len(header)}."
            )
        for column, text in enumerate(row):
            try:
                table[index, column] = float(text)
            except ValueError as error:
                raise ValueError(
                    f"{path}: row {index}, column {header[column]!r} is {text!r}, not a number; "
                    "encode categories and fill in missing values first."
                ) from error
    return {name: table[:, column] for column, name in enumerate(header)}
