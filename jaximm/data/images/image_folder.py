"""A user's own photographs: a folder for each task, in it a sub-folder for each class.

Decoding is that of the usual evaluation of an ImageNet model: resize the shorter side (bicubic,
with Pillow's antialiasing), crop the centre. The crop stays uint8; the model scales it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaximm.data.files import DataFileError, check_regular, listed, reading, shown
from jaximm.data.folders import class_files, hand_split
from jaximm.data.images.rows import balanced_rows, read_source
from jaximm.data.tasks import Task, TaskPair, check_pair

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.Image import Transpose

SOURCE = "the user's own images"

# The resized image is this many squares long at most, so that a strip cannot fill the memory.
_MAX_ASPECT = 100

_MAX_FILE_BYTES = 2**29  # over the largest image that Pillow lets pass, uncompressed

# A scan of a JPEG goes over all pixels, some nanosecond each, and may take 95 bytes of the file.
_MAX_SCANNED_PIXELS = 2**32  # 48 scans of the largest image; a photograph has 1 to 12

_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # of JPEG: the others occur in its data

_ORIENTATION = 0x0112  # the EXIF tag

_REMEDY = "replace it or leave it out (image_folder: skip_broken=True)"

_ADDRESS = re.compile(r" <[^>]* at 0x[0-9a-f]+>")  # of a buffer, in Pillow's messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolderConfig:
    """Your own JPEG and PNG files: ``primary_path/CLASS/*``, ``harmful_path/CLASS/*``.

    A folder that holds ``train`` and one of ``val`` and ``test``, in any of their usual spellings
    (see `jaximm.data.folders.hand_split`), is taken as split by hand
    (``primary_path/train/CLASS/*``); otherwise each class gives up a part of its files.

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
        than refuse the folder. A class of which no training or no held-out file is left is refused.
      workers: threads that decode; 0: one a core.
    """

    targets: ClassVar = "classes"

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
    """Image files, decoded when asked for; an `jaximm.data.images.rows.ImageSource`.

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
        with reading(path, "a file"):
            if check_regular(path).stat().st_size > _MAX_FILE_BYTES:
                raise DataFileError(f"{shown(path)}: over {_MAX_FILE_BYTES} bytes; {_REMEDY}.")
            content = path.read_bytes()
        image = decode_image(content, size=self.size, resize=self.resize, name=shown(path))
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
    """The two splits of a folder, not decoded, and the names of its classes, sorted.

    `passed_over` names what else lies there: hidden entries, files beside the class folders, parts
    that are not used.
    """

    train: FileSource
    held_out: FileSource
    classes: tuple[str, ...]
    passed_over: tuple[str, ...] = ()


def load(config: ImageFolderConfig) -> TaskPair:
    """Both folders of `config`, decoded into memory.

    For more images than fit, stream the sources of `folder_task` with
    `jaximm.data.loader.image_loader`.

    Raises:
      ValueError: a path that is missing or no folder, fewer than two classes, a class without
        images, folders that look like the parts of a split but cannot be used as such, a file that
        cannot be decoded (unless `skip_broken`), too few rows.
    """
    for name in ("primary_path", "harmful_path"):
        if not getattr(config, name):
            raise ValueError(
                f"image_folder: give {name}=FOLDER, with a sub-folder of images for each class."
            )
    primary, notes_primary = _read_task("primary", config.primary_path, config)
    harmful, notes_harmful = _read_task("harmful", config.harmful_path, config)
    note = ""
    for what, primary_names, harmful_names in zip(
        ("broken files skipped", "entries passed over"), notes_primary, notes_harmful, strict=True
    ):
        if names := primary_names + harmful_names:
            note += f"; {len(names)} {what}: {listed(names)}"
    description = (
        f"{primary.name} (primary, {len(primary.classes)} classes, "
        f"{len(primary.train.y)} training rows) and {harmful.name} (harmful, "
        f"{len(harmful.classes)} classes, {len(harmful.train.y)} training rows) at "
        f"{config.size} px{note}"
    )
    return check_pair(TaskPair("image_folder", primary, harmful, description, SOURCE))


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
        raise ValueError(f"{shown(folder)}: no such folder.")
    parts = hand_split(folder)
    if parts is not None:
        by_part = {name: class_files(folder / name) for name in (parts.train, parts.held_out)}
        (train, in_train), (held_out, in_held_out) = by_part.values()
        passed_over = (*parts.unused, *in_train, *in_held_out)
        for one, other in ((parts.train, parts.held_out), (parts.held_out, parts.train)):
            lacking = sorted(set(by_part[one].files) - set(by_part[other].files))
            if lacking:
                raise DataFileError(
                    f"{shown(folder / one)}: class {shown(lacking[0])!r} is not in "
                    f"{shown(folder / other)} ({len(lacking)} such classes); give each class a "
                    "folder in both."
                )
    else:
        files, passed_over = class_files(folder)
        train, held_out = {}, {}
        if len(files) > 1:
            for name, paths in files.items():
                held_out[name], train[name] = _split_by_hash(folder / name, paths, config)
        else:
            train = files
    if len(train) < 2:
        raise ValueError(
            f"{shown(folder)}: needs a sub-folder of images for each of at least two classes, "
            f"found {[shown(name) for name in train]}."
        )

    def source(part: str, files: Mapping[str, Sequence[Path]], rows: int | None) -> FileSource:
        whole = file_source(files, size=config.size, resize=config.resize)
        labels = np.asarray(whole.labels)
        where = f"{shown(folder)} {part}"
        return whole.take(balanced_rows(labels, rows, seed=config.seed, where=where))

    return FolderTask(
        source("train", train, config.train_rows),
        source("held-out", held_out, config.held_out_rows),
        tuple(map(shown, train)),
        tuple(passed_over),
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

    Decodes every file once; for a stream, do it before training rather than in the midst of it. A
    class may lose all its files: compare the labels.
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

    Turned upright by its EXIF orientation, the only tag that is read; grey, palette and CMYK images
    become RGB, transparency is dropped, 16-bit grey is scaled to 8 bits; of an animation the first
    image is taken. The shorter side is resized to `resize` (bicubic; the longer one in proportion,
    rounded down), then the centre `size` x `size` is cut out.

    Args:
      content: the bytes of the file.
      size: height and width of the result.
      resize: at least `size`.
      name: what to call the file in a message.

    Raises:
      DataFileError: (a ValueError) not a JPEG or PNG file, cut short, too many pixels or scans of
        them, or a strip too long to cut a square from; names the file.
    """
    from PIL import Image

    image = open_rgb(content, name=name)
    width, height = image.size
    short = min(width, height)
    if max(width, height) > _MAX_ASPECT * short:
        raise DataFileError(
            f"{name}: {width} x {height} pixels is too long to cut a square from; crop it first."
        )
    scaled = (resize * width // short, resize * height // short)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def open_rgb(content: bytes, *, name: str) -> Picture:
    """The upright RGB image of a JPEG or PNG file, as Pillow's; see `decode_image`."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        pixels, most = math.prod(image.size), Image.MAX_IMAGE_PIXELS
        # Pillow warns here and refuses at twice as many, which takes a gigabyte to decode.
        if most is not None and pixels > most:
            raise Image.DecompressionBombError(f"{pixels} pixels exceeds limit of {most} pixels")
        if pixels * (scans := _scans(content)) > _MAX_SCANNED_PIXELS:
            raise Image.DecompressionBombError(f"{scans} scans of {pixels} pixels")
        image.load()
        turn = _turn(image)
        image = _to_rgb(image)
        return image if turn is None else image.transpose(turn)
    except UnidentifiedImageError as error:
        raise DataFileError(f"{name}: not a JPEG or PNG image; {_REMEDY}.") from error
    except Exception as error:  # Pillow does not say what it raises: TypeError, KeyError, ...
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        reason = _ADDRESS.sub("", reason).rstrip(".")
        raise DataFileError(f"{name}: cannot be decoded ({reason}); {_REMEDY}.") from error


def _scans(content: bytes) -> int:
    """How many scans a decoder makes of a JPEG file; 0 of a PNG file."""
    at, scans = 0, 0
    if not content.startswith(b"\xff\xd8"):
        return 0
    while marker := _MARKER.search(content, at):
        at, code = marker.end(), marker[1][0]
        if code == 0xD9:  # the end; what follows is another image, or nothing
            break
        scans += code == 0xDA
        if code not in (0x01, 0xD8):  # a segment, with its length in front
            at += int.from_bytes(content[at : at + 2], "big")
    return scans


def _turn(image: Picture) -> Transpose | None:
    """What brings a Pillow image upright, or None.

    `PIL.ImageOps.exif_transpose` also writes all EXIF tags anew, and fails on every tag whose type
    is not the usual one. A block that cannot be read says nothing of the orientation.
    """
    from PIL import Image

    how = Image.Transpose
    turns = (
        how.FLIP_LEFT_RIGHT,
        how.ROTATE_180,
        how.FLIP_TOP_BOTTOM,
        how.TRANSPOSE,
        how.ROTATE_270,
        how.TRANSVERSE,
        how.ROTATE_90,
    )  # of orientations 2 to 8
    try:
        tag = image.getexif().get(_ORIENTATION)
        number: Any = tag[0] if isinstance(tag, tuple | bytes) else tag  # not a single SHORT
        return dict(enumerate(turns, 2)).get(number)
    except Exception:
        return None


def check_sizes(*, size: int, resize: int) -> None:
    """Refuses sizes that no crop can have."""
    if not 1 <= size <= resize:
        raise ValueError(f"need 1 <= size <= resize, got {size} and {resize}.")


def _to_rgb(image: Picture) -> Picture:
    """A Pillow image as RGB."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray(np.clip(np.asarray(image) // 256, 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _split_by_hash(
    folder: Path, files: list[Path], config: ImageFolderConfig
) -> tuple[list[Path], list[Path]]:
    """(held out, left): the files whose names hash lowest are held out.

    So the split depends on the names alone, and a file that is added moves at most one other.
    """
    if len(files) < 2:
        raise ValueError(
            f"{shown(folder)}: 1 image cannot be split; add images, or split by hand into train "
            "and val."
        )
    count = min(max(round(config.held_out_fraction * len(files)), 1), len(files) - 1)

    def digest(path: Path) -> bytes:
        # As bytes: a file name need not be UTF-8.
        return hashlib.sha256(os.fsencode(path.relative_to(folder).as_posix())).digest()

    chosen = set(sorted(files, key=digest)[:count])
    return [path for path in files if path in chosen], [
        path for path in files if path not in chosen
    ]


def _read_task(
    role: str, path: str, config: ImageFolderConfig
) -> tuple[Task, tuple[tuple[str, ...], tuple[str, ...]]]:
    """One task in memory; the files that were skipped, with why, and what else was passed over."""
    task = folder_task(path, config)
    skipped: tuple[str, ...] = ()
    if config.skip_broken:
        train, in_train = without_broken(task.train)
        held_out, in_held_out = without_broken(task.held_out)
        for part, before, after in (
            ("training", task.train, train),
            ("held-out", task.held_out, held_out),
        ):
            for lost in sorted(set(before.labels) - set(after.labels)):
                raise ValueError(
                    f"{role} {shown(path)}: class {task.classes[lost]!r} has no {part} rows, since "
                    f"none of its {before.labels.count(lost)} {part} images can be decoded (such "
                    f"as {shown(before.files[before.labels.index(lost)])}); replace the files."
                )
        task = task._replace(train=train, held_out=held_out)
        skipped = in_train + in_held_out
    train, held_out = (
        read_source(source, workers=config.workers) for source in (task.train, task.held_out)
    )
    name = shown(Path(path).name) or role
    return Task(name, train, held_out, "classes", task.classes), (skipped, task.passed_over)
