"""What an image data set hands over: two tasks of uint8 images with class labels, checked.

Everything here is NumPy on the host. Images stay uint8 at the size they were read in; a model's
`jaximm.models.backbone.Preprocess` resizes and scales them on the device.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from jaximm.types import Batch, PairedBatch


class ImageSplit(NamedTuple):
    """Rows of one task: RGB images and the number of each one's class."""

    images: UInt8[np.ndarray, "n h w 3"] | Float[np.ndarray, "n ..."]
    labels: Int32[np.ndarray, "n"]


class ImageTask(NamedTuple):
    """One classification task: its name, training and held-out rows, the names of its classes."""

    name: str
    train: ImageSplit
    held_out: ImageSplit
    classes: tuple[str, ...]


class ImagePair(NamedTuple):
    """The primary task (keep it easy) and the harmful task (make it hard).

    The two may differ in image size, classes and number of rows. `as_inputs`: in place of images
    there are floating numbers [n, ...] that models take as they are.
    """

    name: str
    primary: ImageTask
    harmful: ImageTask
    description: str
    source: str
    as_inputs: bool = False


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


class SharedImages(NamedTuple):
    """Whether two tasks' training images are the same ones, and what follows.

    Attributes:
      shared: the same images in the same proportions: the Hessians are equal for every backbone.
      overlap: harmful training rows whose image is also a primary training image.
      message: one sentence.
    """

    shared: bool
    overlap: int
    message: str


def check_image_split(
    split: ImageSplit, *, where: str, classes: int, as_inputs: bool = False
) -> ImageSplit:
    """`split` with int32 labels, or a `ValueError` that names the place.

    Args:
      split: images [n, h, w, 3] of uint8 and whole-number labels [n] in 0..classes - 1.
      where: what to call it in a message, such as ``"primary train"``.
      classes: number of classes.
      as_inputs: floating numbers [n, ...] are expected in place of images.
    """
    images, labels = np.asarray(split.images), np.asarray(split.labels)
    if as_inputs:
        _check_inputs(images, where)
    elif images.dtype != np.uint8:
        raise ValueError(
            f"{where}: expected uint8 pixels in 0..255, got dtype {images.dtype}; "
            "models scale them themselves."
        )
    elif images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{where}: expected RGB images [n, h, w, 3], got shape {images.shape}; "
            "repeat a grey channel three times."
        )
    if images.size == 0:
        raise ValueError(f"{where}: no images, or empty ones: shape {images.shape}.")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: expected one whole number a row as label, got {labels.dtype} "
            f"of shape {labels.shape}."
        )
    if len(labels) != len(images):
        raise ValueError(f"{where}: {len(images)} images but {len(labels)} labels.")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise ValueError(
            f"{where}: row {outside[0]} has label {labels[outside[0]]}, expected 0 to "
            f"{classes - 1} ({len(outside)} such rows)."
        )
    return ImageSplit(images, labels.astype(np.int32, copy=False))


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


def check_image_task(task: ImageTask, *, as_inputs: bool = False) -> ImageTask:
    """`task` with checked splits of one image size.

    Raises:
      ValueError: fewer than two classes, two of one name, a class without training rows, images or
        labels that `check_image_split` refuses, or two image sizes.
    """
    k = len(task.classes)
    if k < 2:
        raise ValueError(f"task {task.name!r}: needs at least two classes, got {task.classes}.")
    if len(set(task.classes)) != k:
        raise ValueError(f"task {task.name!r}: two classes have one name: {task.classes}.")
    train, held_out = (
        check_image_split(split, where=f"{task.name} {words}", classes=k, as_inputs=as_inputs)
        for split, words in ((task.train, "train"), (task.held_out, "held-out"))
    )
    if train.images.shape[1:] != held_out.images.shape[1:]:
        raise ValueError(
            f"task {task.name!r}: training images are {train.images.shape[1:]}, held-out images "
            f"{held_out.images.shape[1:]}; resize them to one size."
        )
    missing = np.setdiff1d(np.arange(k), train.labels)
    if len(missing):
        raise ValueError(
            f"task {task.name!r}: class {task.classes[missing[0]]!r} has no training rows "
            f"({len(missing)} such classes)."
        )
    return task._replace(train=train, held_out=held_out)


def check_image_pair(pair: ImagePair) -> ImagePair:
    """`pair` with checked tasks; every loader ends here. See `check_image_task`."""
    primary, harmful = (
        check_image_task(task, as_inputs=pair.as_inputs) for task in (pair.primary, pair.harmful)
    )
    return pair._replace(primary=primary, harmful=harmful)


def images_shared(pair: ImagePair) -> SharedImages:
    """Whether the tasks' training images are the same: then RIR is 1 for every backbone.

    The Hessian of a probe never sees a label, so two tasks that differ in labels alone have the
    same one. Images are compared byte for byte: the verdict needs each image in both tasks, in
    the same proportion (n rows against the same rows twice count as the same).
    """
    primary, harmful = (_image_counts(task.train.images) for task in (pair.primary, pair.harmful))
    n_primary, n_harmful = len(pair.primary.train.labels), len(pair.harmful.train.labels)
    overlap = sum(count for image, count in harmful.items() if image in primary)
    if primary.keys() == harmful.keys() and all(
        count * n_primary == primary[image] * n_harmful for image, count in harmful.items()
    ):
        return SharedImages(
            True,
            overlap,
            "Both tasks have the same training images: their Hessians are equal for every "
            "backbone, the relative immunisation ratio is 1, conditioning cannot separate them.",
        )
    if overlap:
        return SharedImages(
            False,
            overlap,
            f"{overlap} of the {n_harmful} harmful training images are also primary training "
            "images: the two Hessians have that part in common.",
        )
    return SharedImages(False, 0, "The tasks share no training image.")


def _image_counts(images: np.ndarray) -> Counter[bytes]:
    """How often each image comes, by a digest of its shape and pixels."""
    shape = repr(images.shape[1:]).encode()
    return Counter(
        blake2b(shape + image.tobytes(), digest_size=16).digest()
        for image in np.ascontiguousarray(images)
    )


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
    split: ImageSplit,
    wanted: tuple[int, ...] | None,
    rows: int | None,
    *,
    seed: int,
    where: str,
) -> ImageSplit:
    """A balanced subset of the rows of some classes, renumbered 0.. in the order of `wanted`.

    Args:
      split: rows to draw from.
      wanted: class numbers to keep; None: all, with their numbers.
      rows: see `balanced_rows`.
      seed: see `balanced_rows`.
      where: see `balanced_rows`.
    """
    labels = split.labels
    if wanted is None:
        chosen = balanced_rows(labels, rows, seed=seed, where=where)
        return _rows(split.images, chosen, labels[chosen])
    renumbered = np.full(int(labels.max()) + 1, -1, np.int32)
    renumbered[list(wanted)] = np.arange(len(wanted))
    candidates = np.flatnonzero(renumbered[labels] >= 0)
    chosen = candidates[balanced_rows(labels[candidates], rows, seed=seed, where=where)]
    return _rows(split.images, chosen, renumbered[labels[chosen]])


def _rows(images: np.ndarray, chosen: np.ndarray, labels: np.ndarray) -> ImageSplit:
    """Copies of some rows; contiguous, also where `images` is a view of `grey_to_rgb`."""
    return ImageSplit(np.ascontiguousarray(images[chosen]), labels.astype(np.int32))


def grey_to_rgb(images: UInt8[np.ndarray, "n h w"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Grey images with their channel three times: a read-only view, which costs no memory.

    >>> grey_to_rgb(np.full((1, 2, 2), 7, np.uint8))[0, 0, 0]
    array([7, 7, 7], dtype=uint8)
    """
    return np.broadcast_to(images[..., None], (*images.shape, 3))


def read_source(source: ImageSource, *, workers: int = 0) -> ImageSplit:
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
    return ImageSplit(images, labels)


def paired_images(pair: ImagePair, *, split: str = "train") -> PairedBatch:
    """All rows of a split of both tasks as JAX arrays: x uint8 [n, h, w, 3], y int32 [n].

    What `jaximm.data.paired_batch` draws from, for images that fit in the device's memory.

    Args:
      pair: the tasks.
      split: ``"train"`` or ``"held_out"``.

    Raises:
      ValueError: another split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}.")

    def batch(task: ImageTask) -> Batch:
        rows: Any = task.train if split == "train" else task.held_out
        return Batch(jnp.asarray(rows.images), jnp.asarray(rows.labels, jnp.int32))

    return PairedBatch(batch(pair.primary), batch(pair.harmful))
