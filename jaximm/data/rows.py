"""Rows by the million: read by blocks, from memory or from files, and what stands for them.

A least-squares problem knows its rows by their first and second moments alone. So many rows of
numbers become few that have the same moments (`condensed`), by QR of one block after the other:
time n d^2, memory that of a block, whatever n. Whoever needs the rows themselves (an accuracy, a
hash) goes over them with `blocks`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaximm.data.files import DataFileError, check_regular, listed, npy_header, reading, shown

MANY = 2**15
"""Training rows above which moments stand for them; half of the held-out rows that are measured."""

BLOCK_BYTES = 2**24
"""Of a block in float64: the memory beside the rows, a few times over."""


class _Part(NamedTuple):
    """One ``.npy`` file of rows, and where in it they begin."""

    path: Path
    rows: int
    dtype: np.dtype
    offset: int


class FileRows:
    """A table [n, d] of finite numbers that stays in its ``.npy`` files; float64 when it is read.

    ``rows[a:b]`` are rows of the same files, and ``np.asarray(rows[a:b])`` reads them. `largest` is
    the largest size of an entry of the files.
    """

    ndim = 2
    dtype = np.dtype(np.float64)

    def __init__(self, parts: tuple[_Part, ...], width: int, span: range, largest: float):
        self._parts, self._width, self._span, self.largest = parts, width, span, largest

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self._span), self._width

    def __len__(self) -> int:
        return len(self._span)

    def __getitem__(self, place: slice) -> FileRows:
        span = self._span[place]
        if span.step != 1:
            raise ValueError(f"rows of files are taken one after the other, got {place}.")
        return FileRows(self._parts, self._width, span, self.largest)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy  # what is read is new
        rows, filled, first = np.empty(self.shape, dtype or self.dtype), 0, 0
        for part in self._parts:
            start = max(self._span.start - first, 0)
            count = min(self._span.stop - first, part.rows) - start
            first += part.rows
            if count <= 0:
                continue
            offset = part.offset + start * self._width * part.dtype.itemsize
            with reading(part.path, "an array"):
                read = np.fromfile(part.path, part.dtype, count * self._width, offset=offset)
                rows[filled : filled + count] = read.reshape(count, self._width)
            filled += count
        return rows


def opened(path: str | os.PathLike[str]) -> FileRows:
    """The rows of a ``.npy`` file, or of a folder of parts, checked; none of them stay in memory.

    Args:
      path: a table [n, d] written by ``np.save``; or a folder of such, ``part-000.npy``,
        ``part-001.npy`` and so on, whose rows follow each other.

    Raises:
      DataFileError: no file, no part or one that is missing between others; no table of numbers;
        columns written one after the other; parts of other widths or dtypes than the first; an
        entry that is not finite, by file, row and column.
    """
    parts, widths = [], []
    for file in _files(path):
        with reading(file, "an array"), open(check_regular(file), "rb") as stream:
            header = npy_header(stream, file.stat().st_size, where=shown(file))
            offset = stream.tell()
        if header.dtype.kind not in "biuf":
            raise DataFileError(f"{shown(file)}: expected numbers, got dtype {header.dtype}.")
        if len(header.shape) != 2 or 0 in header.shape:
            raise DataFileError(
                f"{shown(file)}: expected a table [rows, columns], got shape {header.shape}."
            )
        if header.fortran_order:
            raise DataFileError(
                f"{shown(file)}: its columns lie one after the other, so that rows cannot be read "
                "by blocks; write it with np.save(file, np.ascontiguousarray(x))."
            )
        parts.append(_Part(file, header.shape[0], header.dtype, offset))
        widths.append(header.shape[1])
    for part, width in zip(parts, widths, strict=True):
        for what, found, expected in (
            ("columns", width, widths[0]),
            ("dtype", part.dtype, parts[0].dtype),
        ):
            if found != expected:
                raise DataFileError(
                    f"{shown(part.path)}: {what} {found}, but {shown(parts[0].path)} has "
                    f"{expected}; all parts must be alike."
                )
    size = max(
        _largest_finite(FileRows((part,), widths[0], range(part.rows), 0.0), shown(part.path))
        for part in parts
    )
    return FileRows(tuple(parts), widths[0], range(sum(part.rows for part in parts)), size)


def opened_or_read(path: str | os.PathLike[str]) -> FileRows | np.ndarray:
    """`opened`; an array where the rows are not many."""
    rows = opened(path)
    return rows if are_many(rows) else np.asarray(rows)


def read_targets(path: str | os.PathLike[str]) -> np.ndarray:
    """Targets from a ``.npy`` file or a folder of parts, as `opened`, in memory."""
    values = []
    for file in _files(path):
        with reading(file, "an array"):
            values.append(np.load(check_regular(file), allow_pickle=False))
        if values[-1].shape[1:] != values[0].shape[1:] or values[-1].ndim == 0:
            raise DataFileError(
                f"{shown(file)}: expected targets [rows] as in the first part, got shape "
                f"{values[-1].shape}."
            )
    return values[0] if len(values) == 1 else np.concatenate(values)


def _files(path: str | os.PathLike[str]) -> list[Path]:
    """One file, or the parts of a folder in their order."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    numbers = {}
    for file in sorted(path.iterdir()):
        found = re.fullmatch(r"part-(\d+)\.npy", file.name)
        if found is None:
            if file.name.startswith("."):
                continue
            raise DataFileError(
                f"{shown(file)}: a folder of rows holds part-000.npy, part-001.npy and so on, "
                "and nothing else."
            )
        numbers.setdefault(int(found[1]), []).append(file)
    if not numbers:
        raise DataFileError(f"{shown(path)}: no rows in this folder; expected part-000.npy.")
    missing = [f"part-{place:03d}.npy" for place in range(max(numbers)) if place not in numbers]
    twice = [file.name for files in numbers.values() if len(files) > 1 for file in files]
    if missing or twice:
        found = f"{listed(missing)} missing" if missing else f"{listed(twice)} have one number"
        raise DataFileError(f"{shown(path)}: {found}; parts are numbered from 0 without a gap.")
    return [numbers[place][0] for place in sorted(numbers)]


def _largest_finite(rows: FileRows, where: str) -> float:
    """The largest size of an entry, or the first that is not finite as an error."""
    start, size = 0, 0.0
    for block in blocks(rows):
        finite = np.isfinite(block)
        if not finite.all():
            row, column = map(int, np.argwhere(~finite)[0])
            raise DataFileError(
                f"{where}: row {start + row}, column {column} is {block[row, column]}; remove such "
                "rows or fill them in."
            )
        size = max(size, float(block.max()), -float(block.min()))
        start += len(block)
    return size


# --- over all rows, a block at a time -------------------------------------------------------------


Rows = Any
"""``Shaped[np.ndarray, "n ..."]`` or `FileRows`."""


def blocks(x: Rows) -> Iterator[np.ndarray]:
    """Rows [b, ...] one block after the other; in float64, whose arrays are not copied."""
    step = max(1, BLOCK_BYTES // (8 * max(1, int(np.prod(x.shape[1:])))))
    for start in range(0, len(x), step):
        yield np.asarray(x[start : start + step], np.float64)


def largest(x: Rows) -> float:
    """The largest size of an entry."""
    if isinstance(x, FileRows):
        return x.largest
    return max(float(max(block.max(), -block.min())) for block in blocks(x))


def all_finite(x: Rows) -> bool:
    """Whether every entry is a finite number."""
    return all(np.isfinite(block).all() for block in blocks(x))


def all_zero(x: Rows) -> bool:
    """Whether no entry is other than 0."""
    return not any(block.any() for block in blocks(x))


def all_alike(x: Rows) -> bool:
    """Whether every row is the first one."""
    first = np.asarray(x[:1])
    return all((block == first).all() for block in blocks(x))


def are_many(x: Rows) -> bool:
    """Whether few rows stand for these (`condensed`): above `MANY`, and four times the columns."""
    return x.shape[0] > max(MANY, 4 * x.shape[1])


class Condensed(NamedTuple):
    """Few rows with the moments of many: x [m, d] and y [m] or [m, k], m = d + 1 + k."""

    x: Float[np.ndarray, "m d"]
    y: Float[np.ndarray, "m ..."]


def condensed(x: Rows, y: Float[np.ndarray, "n ..."]) -> Condensed:
    r"""Rows with the same means and mean products of x and y, but for rounding.

    T^T T = [1 X Y]^T [1 X Y] with T upper triangular, by QR of one block after the other below the
    triangle of those before. Its first column is sqrt(n) e_1; the reflection that takes e_1 to
    1 / sqrt(m) makes it a column of ones once more, and sqrt(m / n) makes sums means. So the means
    over the m rows of x, y, x x^T, x y^T and y y^T are those over the n.

    >>> x = np.arange(12.0).reshape(6, 2) % 5
    >>> few = condensed(x, x[:, 0])
    >>> few.x.shape, np.allclose(few.x.T @ few.x / 4, x.T @ x / 6)
    ((4, 2), True)

    Args:
      x: [n, d], n >= d + 1 + k.
      y: [n] or [n, k].
    """
    n, d = x.shape
    targets = y.reshape(n, -1)
    m, start = 1 + d + targets.shape[1], 0
    triangle: np.ndarray = np.zeros((0, m))
    for block in blocks(x):
        held = len(triangle)
        table = np.empty((held + len(block), m))
        table[:held], table[held:, 0], table[held:, 1 : 1 + d] = triangle, 1.0, block
        table[held:, 1 + d :] = targets[start : start + len(block)]
        triangle = np.linalg.qr(table, mode="r")  # pyrefly: ignore[bad-assignment]
        start += len(block)
    normal = np.full(m, -(m**-0.5))
    normal[0] += 1
    normal /= np.linalg.norm(normal)
    rows = triangle * np.sign(triangle[0, 0])
    rows = (rows - 2 * np.outer(normal, normal @ rows)) * (m / n) ** 0.5
    return Condensed(rows[:, 1 : 1 + d], rows[:, 1 + d :].reshape(m, *y.shape[1:]))


def spaced(x: Rows, most: int) -> np.ndarray:
    """At most so many rows, in float64, as far from each other as they can be."""
    n = len(x)
    places = np.arange(n) if n <= most else np.arange(most) * n // most
    if not isinstance(x, FileRows):
        return x if len(places) == len(x) else x[places]
    taken, start = [], 0
    for block in blocks(x):
        first, last = np.searchsorted(places, (start, start + len(block)))
        taken.append(block[places[first:last] - start])
        start += len(block)
    return np.concatenate(taken)
