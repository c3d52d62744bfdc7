"""tensorflow-datasets builders for jaximm's data, prepared and read without TensorFlow.

Tensor features in array_record files. The classes are not registered (an import should not change
another package), and need not be: once prepared, ``tfds.data_source("house_prices",
split="primary", data_dir=...)`` finds them by their files.

tensorflow-datasets shuffles rows when it writes; each row carries its ``index``, and the readers
here sort by it, so they return the arrays of the direct readers, bit for bit.

This module imports tensorflow_datasets (half a second); `jaximm.data` imports it only when asked.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.registered import DatasetNotFoundError

from jaximm.carriers import MissingCarrierError, cache_folder
from jaximm.data.files import reading, shown
from jaximm.data.tables import house_prices, mnist


class HousePrices(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """House-price rows by zone, label-encoded per task, not scaled: splits primary, harmful."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "index": np.int64,
            # tf.train.Example holds float32 lists only; bytes keep float64 exact.
            "x": tfds.features.Tensor(shape=(79,), dtype=np.float64, encoding="bytes"),
            "y": tfds.features.Tensor(shape=(), dtype=np.float64, encoding="bytes"),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("x", "y"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the carrier package is installed, nothing is downloaded
        primary, harmful = house_prices.read_encoded()
        return {
            "primary": self._generate_examples(primary),
            "harmful": self._generate_examples(harmful),
        }

    def _generate_examples(self, task: house_prices.EncodedTask):
        for index, (x, y) in enumerate(zip(task.x, task.y, strict=True)):
            yield index, {"index": index, "x": x, "y": y}


class MnistDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """MNIST from jaximm's carriers: config 5k (split train) or full (splits train, test)."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  tensorflow-datasets' own way to declare them
        tfds.core.BuilderConfig(name="5k", description="500 images a digit"),
        tfds.core.BuilderConfig(name="full", description="60,000 and 10,000 images"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "index": np.int64,
            # Not features.Image: encoding an image needs TensorFlow.
            "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8, encoding="zlib"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # read from an installed package or from what `make data` fetched
        name = self.builder_config.name if self.builder_config else "5k"
        digits = mnist.read_5k() if name == "5k" else mnist.read_full()
        splits = {"train": self._generate_examples(digits.images, digits.labels)}
        if len(digits.test_labels):
            splits["test"] = self._generate_examples(digits.test_images, digits.test_labels)
        return splits

    def _generate_examples(self, images, labels):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"index": index, "image": image[..., None], "label": int(label)}


OWN_DIGITS = {
    f"{MnistDigits.name}/{config.name}": config.name for config in MnistDigits.BUILDER_CONFIGS
}
"""Names of digit sets that need no download, with the builder config behind each."""


AGAIN = "delete this folder and prepare the data set again"
"""What to do about prepared files that are damaged."""


def tfds_folder() -> Path:
    """Where jaximm's builders are prepared unless told otherwise."""
    return cache_folder() / "tfds"


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the files of `builder` are written; quiet, also where the folder is not there."""
    return builder.data_path.exists() and builder.is_prepared()


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    """`builder` with its files written, if they were not; says nothing on stdout."""
    if not is_prepared(builder):
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    return builder


def open_builder(
    name: str, data_dir: str | None, make: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """The builder of a data set, with what its files say of it.

    Args:
      name: for `tfds.builder`, and for messages.
      data_dir: where the data set is, or would be.
      make: what makes the builder in place of `tfds.builder`.
      options: for either.

    Raises:
      MissingCarrierError: unknown to tensorflow-datasets.
      DataFileError: its files are damaged.
    """
    where = f"{name} in {shown(data_dir or 'the default data_dir')}"
    try:
        with reading(where, "a prepared data set", AGAIN, unless=(DatasetNotFoundError,)):
            if make is not None:
                return make(data_dir=data_dir, **options)
            return tfds.builder(name, data_dir=data_dir, **options)
    except DatasetNotFoundError as error:
        raise MissingCarrierError(f"{name} is unknown to tensorflow-datasets.") from error


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Mapping[str, np.ndarray]:
    """Every row of a prepared split as one array a feature, sorted by ``index`` where there is one.

    Official data sets have no ``index``: their rows come in the order of their files, which is
    fixed once prepared.

    Raises:
      DataFileError: files that are damaged or gone.
    """
    with reading(builder.data_path, "a prepared data set", AGAIN):
        source = builder.as_data_source(split)
        rows = source.__getitems__(range(builder.info.splits[split].num_examples))
        columns = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    if "index" not in columns:
        return columns
    order = np.argsort(columns["index"])
    return {key: values[order] for key, values in columns.items()}


def read_house_prices(
    data_dir: str | os.PathLike[str] | None = None,
) -> tuple[house_prices.EncodedTask, house_prices.EncodedTask]:
    """(primary, harmful), through the builder, prepared in `data_dir` at the first call.

    Equal, bit for bit, to `jaximm.data.tables.house_prices.read_encoded`.
    """
    folder = os.fspath(data_dir or tfds_folder())
    builder = prepare(open_builder("house_prices", folder, HousePrices, file_format="array_record"))
    primary, harmful = (read_split(builder, name) for name in ("primary", "harmful"))
    return (
        house_prices.EncodedTask(primary["x"], primary["y"]),
        house_prices.EncodedTask(harmful["x"], harmful["y"]),
    )


def read_digits(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, download: bool = False
) -> mnist.Digits:
    """Images and labels of the tensorflow-datasets data set `name`.

    jaximm's own builders (``"mnist_digits/5k"``, ``"mnist_digits/full"``) are prepared when they
    are not. Any other name must be prepared in `data_dir`, as array_record, unless `download`.

    Args:
      name: ``"mnist"``, ``"mnist:3.0.1"``, ``"mnist_digits/5k"``...: a set of 28 x 28 images with
        features ``image`` and ``label``, a split ``train`` and perhaps a split ``test``. With a
        version, the features are read from the files rather than from the registered code.
      data_dir: by default jaximm's cache folder for its own builders, tensorflow-datasets' own
        default for others.
      download: prepare another name too: needs the network and, for the official image sets,
        TensorFlow. Not the default, since without a network it retries for minutes.

    Raises:
      MissingCarrierError: the data set is not prepared there, or could not be.
      ValueError: unknown to tensorflow-datasets, damaged, or not 28 x 28 grey images with labels.
    """
    own = name in OWN_DIGITS
    folder = os.fspath(data_dir or tfds_folder()) if own or data_dir else None
    advice = (
        f"{name} is not prepared as array_record in {folder or 'the default data_dir'}; with a "
        "network, and `pip install 'jaximm[tfds-tensorflow]'` for the official sets, set "
        "download=True"
    )
    builder = open_builder(
        name,
        folder,
        (lambda **options: MnistDigits(config=OWN_DIGITS[name], **options)) if own else None,
        file_format="array_record",
    )
    if own:
        prepare(builder)
    elif download:
        try:
            prepare(builder)
        except (OSError, ImportError) as error:
            raise MissingCarrierError(f"{advice}; this try failed: {error}") from error
    elif not is_prepared(builder):
        raise MissingCarrierError(f"{advice}.")
    features: Any = builder.info.features
    splits = builder.info.splits
    if not {"image", "label"} <= set(features) or "train" not in splits:
        raise ValueError(
            f"{name}: expected features image and label and a split train, got features "
            f"{sorted(features)} and splits {sorted(splits)}."
        )
    train = read_split(builder, "train")
    if train["image"].shape[1:] not in ((28, 28, 1), (28, 28)):
        raise ValueError(f"{name}: expected images of 28 x 28 x 1, got {train['image'].shape[1:]}.")
    test = (
        read_split(builder, "test")
        if "test" in splits
        else {key: train[key][:0] for key in ("image", "label")}
    )
    return mnist.Digits(
        train["image"].reshape(-1, 28, 28),
        train["label"].astype(np.int64),
        test["image"].reshape(-1, 28, 28),
        test["label"].astype(np.int64),
    )
