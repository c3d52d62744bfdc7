"""Rows of image tasks: read from a source, balanced, of some classes.

Everything here is NumPy on the host. Images stay uint8 at the size they were read in; a model's
`jaximm.models.backbone.Preprocess` resizes and scales them on the device.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from jaxtyping import Int, UInt8

from jaximm.data.tasks import Split


class ImageSource(Protocol):
    """Images that are decoded when asked for: ``len(source)``, ``source[row] -> (image, label)``.

    The image is uint8 [h, w, 3] of one size for all rows, the label a Python int. Several threads
    may ask at once.
    """

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, row: int, /) -> tuple[np.ndarray, int]:
        """One image and its label."""
        ...


def balanced_rows(
    labels: Int[np.ndarray, "n"], rows: int | None, *, seed: int, where: str
) -> Int[np.ndarray, "rows"]:
    """Which rows a balanced subset takes, in a random order.

    The classes are the values in `labels`; each gets ``rows // k`` rows, the first ``rows % k``
    classes one more. Rows are drawn by one permutation keyed by `seed`, so a smaller subset of the
    same seed is part of a larger one, and any run of consecutive rows is a random sample.

    >>> labels = np.array([0, 0, 0, 1, 1, 1, 2])
    >>> chosen = balanced_rows(labels, 5, seed=0, where="train")
    >>> np.bincount(labels[chosen])
    array([2, 2, 1])

    Args:
      labels: class of each row.
      rows: how many; None: all, balanced or not, in the same random order.
      seed: fixes the permutation.
      where: what to call the rows in a message.

    Raises:
      ValueError: fewer rows than classes asked for, or a class with too few rows.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    if rows is None:
        return order
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    k = len(classes)
    if rows < k:
        raise ValueError(f"{where}: {rows} rows cannot hold each of {k} classes once.")
    quota = rows // k + (np.arange(k) < rows % k)
    short = np.flatnonzero(quota > counts)
    if len(short):
        raise ValueError(
            f"{where}: asked for {rows} rows, {quota[short[0]]} of class {classes[short[0]]}, "
            f"which has {counts[short[0]]}; ask for fewer rows, or None for all."
        )
    grouped = np.argsort(numbers[order], kind="stable")  # class by class, each in its random order
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = np.zeros(len(order), bool)
    keep[grouped] = rank < np.repeat(quota, counts)
    return order[keep]


def take_classes(
    split: Split,
    wanted: tuple[int, ...] | None,
    rows: int | None,
    *,
    seed: int,
    where: str,
) -> Split:
    """A balanced subset of the rows of some classes, renumbered 0.. in the order of `wanted`.

    Args:
      split: rows to draw from.
      wanted: class numbers to keep; None: all, with their numbers.
      rows: see `balanced_rows`.
      seed: see `balanced_rows`.
      where: see `balanced_rows`.
    """
    labels = split.y
    if wanted is None:
        chosen = balanced_rows(labels, rows, seed=seed, where=where)
        return _rows(split.x, chosen, labels[chosen])
    renumbered = np.full(int(labels.max()) + 1, -1, np.int32)
    renumbered[list(wanted)] = np.arange(len(wanted))
    candidates = np.flatnonzero(renumbered[labels] >= 0)
    chosen = candidates[balanced_rows(labels[candidates], rows, seed=seed, where=where)]
    return _rows(split.x, chosen, renumbered[labels[chosen]])


def _rows(images: np.ndarray, chosen: np.ndarray, labels: np.ndarray) -> Split:
    """Copies of some rows; contiguous, also where `images` is a view of `grey_to_rgb`."""
    return Split(np.ascontiguousarray(images[chosen]), labels.astype(np.int32))


def grey_to_rgb(images: UInt8[np.ndarray, "n h w"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Grey images with their channel three times: a read-only view, which costs no memory.

    >>> grey_to_rgb(np.full((1, 2, 2), 7, np.uint8))[0, 0, 0]
    array([7, 7, 7], dtype=uint8)
    """
    return np.broadcast_to(images[..., None], (*images.shape, 3))


def read_source(source: ImageSource, *, workers: int = 0) -> Split:
    """All images of a source in memory, in its order.

    Args:
      source: images of one size.
      workers: threads that decode; 0: one a core.

    Raises:
      ValueError: an empty source, or what it raises for a row.
    """
    if not len(source):
        raise ValueError("the source has no images.")
    first, label = source[0]
    images = np.empty((len(source), *first.shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    images[0], labels[0] = first, label

    def read(row: int) -> None:
        images[row], labels[row] = source[row]

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(read, range(1, len(source))):
            pass  # raises what a thread raised
    return Split(images, labels)
