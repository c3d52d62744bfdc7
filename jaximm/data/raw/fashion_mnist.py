"""Fashion-MNIST from its Debian package: 60,000 and 10,000 grey images of 28 x 28, ten garments."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaximm.carriers import DebianCarrier, cache_folder, debian_files
from jaximm.data.files import read_idx
from jaximm.data.images.rows import grey_to_rgb
from jaximm.data.tasks import Split

SOURCE = "Fashion-MNIST, Xiao, Rasul & Vollgraf (2017), https://arxiv.org/abs/1708.07747"

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

_FOLDER = "usr/share/datasets/fashion-mnist"
_SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
    ),
    "train-labels-idx1-ubyte.gz": (
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
    ),
}

CARRIER = DebianCarrier(
    package="dataset-fashion-mnist",
    members={f"{_FOLDER}/{name}": digest for name, digest in _SHA256.items()},
)


class ImageParts(NamedTuple):
    """A data set's own training and test part."""

    train: Split
    test: Split


def fashion_mnist_folder() -> Path:
    """Where `jaximm fetch` puts the four files."""
    return cache_folder() / "fashion_mnist"


def read_fashion_mnist(folder: Path | None = None) -> ImageParts:
    """All images in their official order, grey in three equal channels.

    Args:
      folder: where the four ``.gz`` files lie; by default ``fashion_mnist`` in the cache folder,
        else where the installed Debian package has them.

    Raises:
      MissingCarrierError: neither fetched nor installed.
      ValueError: a file is not the pinned one.
    """
    paths = debian_files(CARRIER, Path(folder or fashion_mnist_folder()))
    images, labels, test_images, test_labels = map(read_idx, paths)
    return ImageParts(
        Split(grey_to_rgb(images), labels.astype(np.int32)),
        Split(grey_to_rgb(test_images), test_labels.astype(np.int32)),
    )
