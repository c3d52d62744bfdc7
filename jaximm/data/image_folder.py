"""A user's own photographs: a folder for each task, in it a sub-folder for each class.

Decoding is that of the usual evaluation of an ImageNet model: resize the shorter side (bicubic,
with Pillow's antialiasing), crop the centre. The crop stays uint8; the model scales it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaximm.data.image_tasks import (
    ImagePair,
    ImageTask,
    balanced_rows,
    check_image_pair,
    read_source,
)

SOURCE = "the user's own images"

_TRAIN = "train"
_HELD_OUT = ("val", "valid", "validation", "test")

# The resized image is this many squares long at most, so that a strip cannot fill the memory.
_MAX_ASPECT = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolderConfig:
    """Your own JPEG and PNG files: ``primary_path/CLASS/*``, ``harmful_path/CLASS/*``.

    A folder that holds ``train`` and one of ``val``, ``valid``, ``validation`` or ``test`` is taken
    as split by hand (``primary_path/train/CLASS/*``); otherwise each class gives up a part of its
    files.

    Attributes:
      primary_path: folder of the task to keep easy.
      harmful_path: folder of the task to make hard.
      size: height and width of the images.
      resize: shorter side before the centre crop to `size`.
      held_out_fraction: in (0, 1), the share of each class that is held out (at least one file, and
        one is left), chosen by a hash of the file names; not used for folders split by hand.
      train_rows: training rows a task, balanced over the classes; None: all files.
      held_out_rows: the same for the held-out rows.
      seed: which rows, and their order.
      skip_broken: leave out files that cannot be decoded, and count them in the description, rather
        than refuse the folder.
      workers: threads that decode; 0: one a core.
    """

    primary_path: str = ""
    harmful_path: str = ""
    size: int = 224
    resize: int = 256
    held_out_fraction: float = 0.25
    train_rows: int | None = None
    held_out_rows: int | None = None
    seed: int = 0
    skip_broken: bool = False
    workers: int = 0

    def __post_init__(self):
        check_sizes(size=self.size, resize=self.resize)
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be in (0, 1), got {self.held_out_fraction}.")
        for name in ("train_rows", "held_out_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (or None), got {value}.")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSource:
    """Image files, decoded when asked for; an `jaximm.data.image_tasks.ImageSource`.

    Attributes:
      files: paths.
      labels: class number of each.
      size: see `decode_image`.
      resize: see `decode_image`.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    size: int = 224
    resize: int = 256

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[UInt8[np.ndarray, "size size 3"], int]:
        """One decoded image and its label."""
        path = self.files[row]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
        image = decode_image(content, size=self.size, resize=self.resize, name=str(path))
        return image, self.labels[row]

    def label(self, row: int) -> int:
        """The label alone."""
        return self.labels[row]

    def take(self, rows: Sequence[int] | np.ndarray) -> FileSource:
        """The source of some of the rows, in the given order."""
        return dataclasses.replace(
            self,
            files=tuple(self.files[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows),
        )


class FolderTask(NamedTuple):
    """The two splits of a folder, not decoded, and the names of its classes, sorted."""

    train: FileSource
    held_out: FileSource
    classes: tuple[str, ...]


def load(config: ImageFolderConfig) -> ImagePair:
    """Both folders of `config`, decoded into memory.

    For more images than fit, stream the sources of `folder_task` with
    `jaximm.data.loader.image_loader`.

    Raises:
      ValueError: a path that is missing or no folder, fewer than two classes, a class without
        images, a file that cannot be decoded (unless `skip_broken`), too few rows.
    """
    for name in ("primary_path", "harmful_path"):
        if not getattr(config, name):
            raise ValueError(
                f"image_folder: give {name}=FOLDER, with a sub-folder of images for each class."
            )
    primary, skipped_primary = _read_task("primary", config.primary_path, config)
    harmful, skipped_harmful = _read_task("harmful", config.harmful_path, config)
    skipped = skipped_primary + skipped_harmful
    note = ""
    if skipped:
        shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        note = f"; {len(skipped)} broken files skipped: {shown}"
    description = (
        f"{primary.name} (primary, {len(primary.classes)} classes, "
        f"{len(primary.train.labels)} training rows) and {harmful.name} (harmful, "
        f"{len(harmful.classes)} classes, {len(harmful.train.labels)} training rows) at "
        f"{config.size} px{note}"
    )
    return check_image_pair(ImagePair("image_folder", primary, harmful, description, SOURCE))


def folder_task(path: str | os.PathLike[str], config: ImageFolderConfig) -> FolderTask:
    """The files of one task's folder and their split, without decoding any.

    Args:
      path: ``path/CLASS/*``, or ``path/train/CLASS/*`` with ``path/val/CLASS/*``. Class folders are
        searched to any depth; hidden files and folders are passed over.
      config: sizes, held-out fraction, rows and seed (its two paths are not read).

    Raises:
      ValueError: see `load`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder.")
    held_out_folder = next(
        (folder / name for name in _HELD_OUT if (folder / name).is_dir()),
        None,
    )
    # Both, since "train" alone may well be a class among others (car, ship, train).
    if (folder / _TRAIN).is_dir() and held_out_folder is not None:
        train = class_files(folder / _TRAIN)
        held_out = class_files(held_out_folder)
        unknown = sorted(set(held_out) - set(train))
        if unknown:
            raise ValueError(
                f"{held_out_folder}: class {unknown[0]!r} is not in {folder / _TRAIN}."
            )
        held_out = {name: held_out.get(name, []) for name in train}
    else:
        train, held_out = {}, {}
        for name, files in class_files(folder).items():
            held_out[name], train[name] = _split_by_hash(folder / name, files, config)
    if len(train) < 2:
        raise ValueError(
            f"{folder}: needs a sub-folder of images for each of at least two classes, found "
            f"{sorted(train)}."
        )

    def source(part: str, files: Mapping[str, Sequence[Path]], rows: int | None) -> FileSource:
        whole = file_source(files, size=config.size, resize=config.resize)
        labels = np.asarray(whole.labels)
        where = f"{folder} {part}"
        return whole.take(balanced_rows(labels, rows, seed=config.seed, where=where))

    return FolderTask(
        source("train", train, config.train_rows),
        source("held-out", held_out, config.held_out_rows),
        tuple(train),
    )


def file_source(files: Mapping[str, Sequence[Path]], *, size: int, resize: int) -> FileSource:
    """The files of all classes, class by class, labelled 0.. in the order of the mapping."""
    return FileSource(
        files=tuple(path for paths in files.values() for path in paths),
        labels=tuple(
            number for number, paths in enumerate(files.values()) for _ in range(len(paths))
        ),
        size=size,
        resize=resize,
    )


def without_broken(source: FileSource) -> tuple[FileSource, tuple[str, ...]]:
    """`source` without the files that cannot be decoded, and the messages about those.

    Decodes every file once; for a stream, do it before training rather than in the midst of it.
    """
    kept, messages = [], []
    for row in range(len(source)):
        try:
            source[row]
        except ValueError as error:
            messages.append(str(error))
        else:
            kept.append(row)
    return source.take(kept), tuple(messages)


def decode_image(
    content: bytes, *, size: int, resize: int, name: str = "image"
) -> UInt8[np.ndarray, "size size 3"]:
    """A JPEG or PNG file as an RGB square.

    Turned upright by its EXIF orientation; grey, palette and CMYK images become RGB, transparency
    is dropped, 16-bit grey is scaled to 8 bits. The shorter side is resized to `resize` (bicubic;
    the longer one in proportion, rounded down), then the centre `size` x `size` is cut out.

    Args:
      content: the bytes of the file.
      size: height and width of the result.
      resize: at least `size`.
      name: what to call the file in a message.

    Raises:
      ValueError: not a JPEG or PNG file, or cut short; names the file.
    """
    from PIL import Image

    image = open_rgb(content, name=name)
    width, height = image.size
    short = min(width, height)
    if max(width, height) > _MAX_ASPECT * short:
        raise ValueError(f"{name}: {width} x {height} pixels is too long to cut a square from.")
    scaled = (resize * width // short, resize * height // short)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def open_rgb(content: bytes, *, name: str) -> Any:
    """The upright RGB image of a JPEG or PNG file, as Pillow's; see `decode_image`."""
    from PIL import Image, ImageOps

    damaged = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        return _to_rgb(ImageOps.exif_transpose(image))
    except (*damaged, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: {_reason(error)}") from error


def check_sizes(*, size: int, resize: int) -> None:
    """Refuses sizes that no crop can have."""
    if not 1 <= size <= resize:
        raise ValueError(f"need 1 <= size <= resize, got {size} and {resize}.")


def _reason(error: BaseException) -> str:
    """Why an image cannot be decoded, in one line, without Pillow's address of a buffer."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not a JPEG or PNG image."
    return f"cannot be decoded ({str(error).splitlines()[0] or type(error).__name__})."


def _to_rgb(image: Any) -> Any:
    """A Pillow image as RGB."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide // 256, 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def class_files(folder: Path) -> dict[str, list[Path]]:
    """``{class: files}`` of the sub-folders of `folder`, both sorted by name.

    Raises:
      ValueError: a class has no files.
    """
    classes: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        classes[entry.name] = sorted(
            path
            for path in entry.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(entry).parts)
        )
        if not classes[entry.name]:
            raise ValueError(f"{entry}: class {entry.name!r} has no images.")
    return classes


def _split_by_hash(
    folder: Path, files: list[Path], config: ImageFolderConfig
) -> tuple[list[Path], list[Path]]:
    """(held out, left): the files whose names hash lowest are held out.

    So the split depends on the names alone, and a file that is added moves at most one other.
    """
    if len(files) < 2:
        raise ValueError(
            f"{folder}: 1 image cannot be split; add images, or split by hand into train and val."
        )
    count = min(max(round(config.held_out_fraction * len(files)), 1), len(files) - 1)

    def digest(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()

    chosen = set(sorted(files, key=digest)[:count])
    return [path for path in files if path in chosen], [
        path for path in files if path not in chosen
    ]


def _read_task(
    role: str, path: str, config: ImageFolderConfig
) -> tuple[ImageTask, tuple[str, ...]]:
    """One task in memory, and the names of the files that were skipped."""
    task = folder_task(path, config)
    skipped: tuple[str, ...] = ()
    if config.skip_broken:
        train, in_train = without_broken(task.train)
        held_out, in_held_out = without_broken(task.held_out)
        task = FolderTask(train, held_out, task.classes)
        skipped = in_train + in_held_out
    for part, source in (("training", task.train), ("held-out", task.held_out)):
        if not len(source):
            raise ValueError(f"{role} {path}: no {part} image can be decoded.")
    train, held_out = (
        read_source(source, workers=config.workers) for source in (task.train, task.held_out)
    )
    return ImageTask(Path(path).name or role, train, held_out, task.classes), skipped
