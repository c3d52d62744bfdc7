"""The image sets of the paper under their published names: ImageNet, Stanford Cars, Country211.

The first two are read from tensorflow-datasets' files (``imagenet2012``, ``cars196``), prepared as
array_record and read without TensorFlow; the third from the folders in which it is published. None
of them is fetched here: ImageNet asks each user to register.

Every set is a pair of `jaximm.data.images.rows.ImageSource` that decode when asked, so that a
loader can stream all of it; the entries below read a limited number of rows a class into memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaximm.carriers import MissingCarrierError
from jaximm.data.files import listed, reading, shown
from jaximm.data.folders import class_files
from jaximm.data.images.image_folder import check_sizes, decode_image, file_source, open_rgb
from jaximm.data.images.rows import ImageSource, read_source
from jaximm.data.raw.fashion_mnist import ImageParts
from jaximm.data.tasks import Split, Task, TaskPair, check_pair

IMAGENET_SOURCE = "ImageNet, Russakovsky et al. (2015), https://arxiv.org/abs/1409.0575"
CARS_SOURCE = "Stanford Cars, Krause et al. (2013), https://doi.org/10.1109/ICCVW.2013.77"
COUNTRY211_SOURCE = "Country211, Radford et al. (2021), https://arxiv.org/abs/2103.00020"
SOURCE = (
    f"Zheng et al. (2025), https://arxiv.org/abs/2505.23760; {IMAGENET_SOURCE}; {CARS_SOURCE}; "
    f"{COUNTRY211_SOURCE}"
)


class PublishedSet(NamedTuple):
    """A tensorflow-datasets name: its splits, and how to get its files."""

    name: str
    train: str
    held_out: str
    source: str
    advice: str


PUBLISHED = {
    "imagenet2012": PublishedSet(
        "imagenet2012",
        "train",
        "validation",
        IMAGENET_SOURCE,
        "register on image-net.org, put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into "
        "{folder}/downloads/manual",
    ),
    "cars196": PublishedSet(
        "cars196",
        "train",
        "test",
        CARS_SOURCE,
        "where the links that tensorflow-datasets knows no longer answer, get the archives "
        "elsewhere and put them into {folder}/downloads/manual, or use image_folder",
    ),
}
"""Sets that are read through tensorflow-datasets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PublishedConfig:
    """Fields that both entries have; see `ImagenetCarsConfig`."""

    targets: ClassVar = "classes"

    data_dir: str = ""
    primary_train_per_class: int = 5
    primary_held_out_per_class: int = 2
    harmful_train_per_class: int = 20
    harmful_held_out_per_class: int = 10
    classes: int | None = None
    size: int = 224
    resize: int = 256
    seed: int = 0
    workers: int = 0

    def __post_init__(self):
        check_sizes(size=self.size, resize=self.resize)
        for name in (
            "primary_train_per_class",
            "primary_held_out_per_class",
            "harmful_train_per_class",
            "harmful_held_out_per_class",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.classes is not None and self.classes < 2:
            raise ValueError(f"classes must be at least 2 (or None), got {self.classes}.")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenetCarsConfig(_PublishedConfig):
    """ImageNet (primary, 1,000 classes) against Stanford Cars (harmful, 196 classes).

    Attributes:
      data_dir: where tensorflow-datasets keeps ``imagenet2012`` and ``cars196``; empty: its own
        default.
      primary_train_per_class: training rows of each class of ImageNet.
      primary_held_out_per_class: rows of each class of ImageNet's validation part.
      harmful_train_per_class: training rows of each class of the harmful task.
      harmful_held_out_per_class: rows of each class of its test part.
      classes: keep only the first so many classes of each task; None: all. Other rows are passed
        over, but their labels are read until every class kept is full.
      size: height and width of the images.
      resize: shorter side before the centre crop to `size`.
      seed: which rows, and their order.
      workers: threads that decode; 0: one a core.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenetCountry211Config(_PublishedConfig):
    """ImageNet (primary, 1,000 classes) against Country211 (harmful, 211 countries).

    Attributes:
      country211_path: the folder with ``train``, ``valid`` and ``test``, in each a folder of JPEG
        files for each ISO code of a country.
      held_out_part: "test" or "valid" of Country211.

    The other fields are those of `ImagenetCarsConfig`.
    """

    country211_path: str = ""
    held_out_part: Literal["test", "valid"] = "test"

    def __post_init__(self):
        super().__post_init__()
        if self.held_out_part not in ("test", "valid"):
            raise ValueError(
                f"held_out_part must be 'test' or 'valid', got {self.held_out_part!r}."
            )


class SourcePair(NamedTuple):
    """The two splits of one set, not decoded, its classes' names, and what was passed over."""

    train: ImageSource
    held_out: ImageSource
    classes: tuple[str, ...]
    passed_over: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource:
    """Rows of a split that tensorflow-datasets prepared; an `ImageSource`.

    Images are stored as JPEG or PNG and decoded here, not by tensorflow-datasets, so that
    photographs of every set get the same treatment.

    Attributes:
      name: of the data set, for messages.
      records: tensorflow-datasets' data source, its images not decoded.
      rows: which records, in which order.
      size: see `jaximm.data.images.image_folder.decode_image`; 0: leave the image as it is.
      resize: see `jaximm.data.images.image_folder.decode_image`.
    """

    name: str
    records: Any
    rows: Int[np.ndarray, "rows"]
    size: int = 224
    resize: int = 256

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
        """One decoded image and its label."""
        number = int(self.rows[row])
        name = f"{self.name}, record {number}"
        with reading(name, "a prepared data set"):
            record = self.records[number]
            content, label = bytes(record["image"]), int(record["label"])
        if self.size:
            image = decode_image(content, size=self.size, resize=self.resize, name=name)
        else:
            image = np.asarray(open_rgb(content, name=name))
        return image, label

    def label(self, row: int) -> int:
        """The label alone: the image is read but not decoded."""
        number = int(self.rows[row])
        with reading(f"{self.name}, record {number}", "a prepared data set"):
            return int(self.records[number]["label"])

    def take(self, rows: Int[np.ndarray, "taken"]) -> TfdsSource:
        """The source of some of the rows, in the given order."""
        return dataclasses.replace(self, rows=self.rows[rows])


def load_imagenet_cars(config: ImagenetCarsConfig) -> TaskPair:
    """The pair that `config` names.

    Raises:
      MissingCarrierError: a set is not prepared; says what to do.
      ValueError: a class has too few rows.
    """
    return _pair(
        "imagenet_cars",
        config,
        tfds_sources("imagenet2012", data_dir=config.data_dir or None, **_sizes(config)),
        tfds_sources("cars196", data_dir=config.data_dir or None, **_sizes(config)),
        "cars196",
        f"{IMAGENET_SOURCE}; {CARS_SOURCE}",
    )


def load_imagenet_country211(config: ImagenetCountry211Config) -> TaskPair:
    """The pair that `config` names; errors as in `load_imagenet_cars`."""
    if not config.country211_path:
        raise ValueError(
            "imagenet_country211: give country211_path=FOLDER with train, valid and test, unpacked "
            "from country211.tgz (https://github.com/openai/CLIP/blob/main/data/country211.md)."
        )
    harmful = country211_sources(
        config.country211_path, held_out_part=config.held_out_part, **_sizes(config)
    )
    return _pair(
        "imagenet_country211",
        config,
        tfds_sources("imagenet2012", data_dir=config.data_dir or None, **_sizes(config)),
        harmful,
        "country211",
        f"{IMAGENET_SOURCE}; {COUNTRY211_SOURCE}",
    )


def tfds_sources(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    size: int = 224,
    resize: int = 256,
) -> SourcePair:
    """All rows of ``"imagenet2012"`` or ``"cars196"``, for streaming.

    Args:
      name: a key of `PUBLISHED`; with a version (``"cars196:2.1.0"``) for another than the newest.
      data_dir: where tensorflow-datasets keeps it; None: its own default.
      size: see `jaximm.data.images.image_folder.decode_image`.
      resize: see `jaximm.data.images.image_folder.decode_image`.

    Raises:
      MissingCarrierError: not prepared as array_record; says what to do.
      ValueError: another name, or files without images and labels.
    """
    check_sizes(size=size, resize=resize)
    known = name.split(":")[0]
    if known not in PUBLISHED:
        raise ValueError(f"unknown published set {name!r}; choose from {sorted(PUBLISHED)}.")
    chosen = PUBLISHED[known]
    builder = _prepared_builder(name, data_dir, advice=chosen.advice)
    return SourcePair(
        _source(builder, chosen.train, size=size, resize=resize),
        _source(builder, chosen.held_out, size=size, resize=resize),
        _class_names(builder),
    )


def country211_sources(
    path: str | os.PathLike[str],
    *,
    held_out_part: Literal["test", "valid"] = "test",
    size: int = 224,
    resize: int = 256,
) -> SourcePair:
    """All rows of Country211 in its published folders, for streaming.

    The classes are the ISO codes in ``train``, sorted; as published there are 211, with 150
    training, 50 validation and 100 test photographs each. A copy with fewer is read as it is.

    Args:
      path: the folder with ``train``, ``valid`` and ``test``.
      held_out_part: "test" or "valid".
      size: see `jaximm.data.images.image_folder.decode_image`.
      resize: see `jaximm.data.images.image_folder.decode_image`.

    Raises:
      ValueError: a folder is missing, a country has no images, or the parts differ in countries.
    """
    check_sizes(size=size, resize=resize)
    folder = Path(path)
    parts = {}
    for part in ("train", held_out_part):
        if not (folder / part).is_dir():
            raise ValueError(
                f"{shown(folder / part)}: no such folder; country211_path must hold train, valid "
                "and test, as country211.tgz unpacks."
            )
        parts[part] = class_files(folder / part)
    (train, in_train), (held_out, in_held_out) = parts["train"], parts[held_out_part]
    differing = sorted(set(train) ^ set(held_out))
    if differing:
        raise ValueError(
            f"{shown(folder)}: country {shown(differing[0])!r} is in one of train and "
            f"{held_out_part} only ({len(differing)} such); unpack country211.tgz again."
        )
    return SourcePair(
        file_source(train, size=size, resize=resize),
        file_source(held_out, size=size, resize=resize),
        tuple(map(shown, train)),
        (*in_train, *in_held_out),
    )


def read_small(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, download: bool = False
) -> ImageParts:
    """All images of ``cifar10``, ``mnist``, ``fashion_mnist``, ... through tensorflow-datasets.

    Args:
      name: a set of images of one size with splits ``train`` and ``test``.
      data_dir: where tensorflow-datasets keeps it; None: its own default.
      download: download and prepare it if it is not (the network, and TensorFlow for the official
        sets).

    Returns:
      Grey images in three equal channels. tensorflow-datasets shuffles rows when it writes, so
      their order is not that of the carriers.

    Raises:
      MissingCarrierError: not prepared, or could not be.
      ValueError: no such splits or features.
    """
    builder = _prepared_builder(name, data_dir, download=download)
    return ImageParts(
        *(read_source(_source(builder, part, size=0, resize=0)) for part in ("train", "test"))
    )


def _prepared_builder(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    advice: str = "",
    download: bool = False,
) -> Any:
    """The builder of a set whose files are there and can be read row by row."""
    from jaximm.data.raw import tfds as builders

    folder = os.fspath(data_dir) if data_dir else None
    command = f"tfds build {name} --file_format=array_record" + (
        f" --data_dir={folder}" if folder else ""
    )
    builder = builders.open_builder(name, folder)
    if not builders.is_prepared(builder):
        root = folder or "~/tensorflow_datasets"
        first = f"{advice.format(folder=root)}; then run" if advice else "with a network, run"
        message = (
            f"{name} is not prepared in {root}: {first} `{command}` "
            "(needs `pip install 'jaximm[tfds-tensorflow]'`)"
        )
        if not download:
            raise MissingCarrierError(f"{message}.")
        try:
            builder = builders.open_builder(name, folder, file_format="array_record")
            builders.prepare(builder)
        except (OSError, ImportError) as error:
            raise MissingCarrierError(f"{message}; this try failed: {error}") from error
    formats = {kind.value for kind in builder.info.available_file_formats()}
    if not formats & {"array_record", "bagz"}:
        raise MissingCarrierError(
            f"{name} in {builder.data_path} is prepared as {', '.join(formats)}, which cannot be "
            f"read row by row; prepare it again with `{command}` in another data_dir."
        )
    return builder


def _source(builder: Any, split: str, *, size: int, resize: int) -> TfdsSource:
    """One split of a prepared set."""
    import tensorflow_datasets as tfds

    from jaximm.data.raw import tfds as builders

    features, splits = builder.info.features, builder.info.splits
    if not {"image", "label"} <= set(features) or split not in splits:
        raise ValueError(
            f"{builder.name}: expected features image and label and a split {split}, got features "
            f"{sorted(features)} and splits {sorted(splits)}."
        )
    if not isinstance(features["image"], tfds.features.Image):
        raise ValueError(
            f"{builder.name}: expected the feature image to hold encoded images, got "
            f"{type(features['image']).__name__}."
        )
    with reading(builder.data_path, "a prepared data set", builders.AGAIN):
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        rows = np.arange(len(records))
    return TfdsSource(
        name=f"{builder.name} {split}", records=records, rows=rows, size=size, resize=resize
    )


def _class_names(builder: Any) -> tuple[str, ...]:
    """Names of the labels; numbers where the set does not name them."""
    label = builder.info.features["label"]
    return tuple(label.names or map(str, range(label.num_classes)))


def _sizes(config: _PublishedConfig) -> dict[str, int]:
    """The two sizes, by name."""
    return {"size": config.size, "resize": config.resize}


def rows_per_class(
    label_of: Callable[[int], int],
    n: int,
    *,
    classes: int,
    per_class: int,
    seed: int,
    where: str,
) -> Int[np.ndarray, "rows"]:
    """A random choice of `per_class` rows of each of the classes 0.. `classes` - 1.

    Rows are looked at in an order keyed by `seed` until every class is full, so few labels are read
    where the set is large and the choice small. The result is in that order.

    Args:
      label_of: gives a row's label; rows of other classes are passed over.
      n: number of rows.
      classes: how many classes to fill.
      per_class: rows of each.
      seed: fixes the order.
      where: what to call the rows in a message.

    Raises:
      ValueError: a class has fewer than `per_class` rows.
    """
    chosen, counts, missing = [], np.zeros(classes, np.int64), classes * per_class
    for row in np.random.default_rng(seed).permutation(n):
        label = label_of(int(row))
        if 0 <= label < classes and counts[label] < per_class:
            counts[label] += 1
            chosen.append(row)
            missing -= 1
            if not missing:
                return np.asarray(chosen)
    short = int(np.argmin(counts))
    raise ValueError(
        f"{where}: asked for {per_class} rows of each class, but class {short} has "
        f"{counts[short]}; ask for fewer."
    )


def _pair(
    name: str,
    config: _PublishedConfig,
    primary: SourcePair,
    harmful: SourcePair,
    harmful_name: str,
    source: str,
) -> TaskPair:
    """The checked pair of limited rows, in memory."""
    tasks = (
        _task("imagenet2012", primary, config, "primary"),
        _task(harmful_name, harmful, config, "harmful"),
    )
    parts = (
        f"{task.name} ({role}, {len(task.classes)} classes, {len(task.train.y)} training rows)"
        for role, task in zip(("primary", "harmful"), tasks, strict=True)
    )
    description = f"{' and '.join(parts)} at {config.size} px, seed {config.seed}"
    if names := primary.passed_over + harmful.passed_over:
        description += f"; {len(names)} entries passed over: {listed(names)}"
    return check_pair(TaskPair(name, *tasks, description, source))


def _task(name: str, sources: SourcePair, config: _PublishedConfig, role: str) -> Task:
    """Limited rows of one set, decoded."""
    classes = len(sources.classes)
    if config.classes is not None:
        classes = min(classes, config.classes)

    def read(source: Any, part: str) -> Split:
        rows = rows_per_class(
            source.label,
            len(source),
            classes=classes,
            per_class=getattr(config, f"{role}_{part}_per_class"),
            seed=config.seed,
            where=f"{name} {part.replace('_', '-')}",
        )
        return read_source(source.take(rows), workers=config.workers)

    return Task(
        name,
        read(sources.train, "train"),
        read(sources.held_out, "held_out"),
        "classes",
        sources.classes[:classes],
    )
