"""Folders of files, a sub-folder a class: what lies in them, and whether they are split by hand."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from jaximm.data.files import DataFileError, listed, shown

_PARTS = {
    "train": ("train", "training", "trn", "tr", "learn", "learning", "fit"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": ("test", "testing", "tst", "ts", "te", "eval", "evaluation", "heldout", "holdout"),
}
_PART_OF = {word: part for part, words in _PARTS.items() for word in words}

_FILLERS = ("set", "sets", "split", "data", "dataset", "image", "images", "img", "imgs")
_FILLERS += ("folder", "dir", "part", "files", "file", "photos", "pictures")

_GLUED = re.compile(f"({'|'.join(sorted(_PART_OF, key=len, reverse=True))})({'|'.join(_FILLERS)})?")


class HandSplit(NamedTuple):
    """Names of the two sub-folders that hold the classes, and of what beside them is not used."""

    train: str
    held_out: str
    unused: tuple[str, ...]


class ClassFiles(NamedTuple):
    """``{class: files}``, both sorted by name, and what was passed over."""

    files: dict[str, list[Path]]
    passed_over: tuple[str, ...]


def hand_split(folder: Path) -> HandSplit | None:
    """The parts of a folder that is split by hand, or None if its sub-folders are classes.

    A part is called train, val or test, or a usual other word for it (training, valid, validation,
    dev, testing, eval, holdout, ...), in any case, with digits and words such as set, data or
    images (``Training_Set``, ``val2017``, ``testImages``), or all with one more word in common
    (``seg_train`` and ``seg_test``). "train" alone may well be a class (car, ship, train). Of
    val and test, val is the held-out part.

    Raises:
      DataFileError: several sub-folders look like parts, but not like one train and one val or
        test; cannot be listed.
    """
    groups: defaultdict[str, defaultdict[str, list[str]]]
    groups = defaultdict(lambda: defaultdict(list))
    names = [entry.name for entry in _entries(folder)]
    for name in names:
        part_and_rest = None if name.startswith(".") else _part_and_rest(name)
        if part_and_rest is not None and (folder / name).is_dir():
            part, rest = part_and_rest
            groups[rest][part].append(name)
    splits = [group for group in groups.values() if sum(map(len, group.values())) > 1]
    if not splits:
        return None
    alike = sorted(itertools.chain.from_iterable(splits[0].values()))
    parts = splits[0]
    held_out = parts.get("val") or parts.get("test")
    if len(splits) > 1 or held_out is None or len(held_out) > 1 or len(parts["train"]) != 1:
        raise DataFileError(
            f"{shown(folder)}: {listed(alike)} look like the parts of a split, not like classes; "
            "call them train and val (or train and test), in each a folder for each class, or give "
            "the path of one of them."
        )
    used = parts["train"][0], held_out[0]
    for name in used:
        if not any(entry.is_dir() for entry in _entries(folder / name)):
            raise DataFileError(
                f"{shown(folder / name)}: looks like a part of a split, but holds no folder for "
                "each class; put the images into such folders."
            )
    return HandSplit(*used, tuple(shown(name) for name in names if name not in used))


def class_files(folder: Path) -> ClassFiles:
    """The files of the sub-folders of `folder`, which are its classes.

    Searched to any depth, links to folders included (each folder once). Hidden files and folders,
    and files that lie beside the class folders, are passed over and named. A link to nothing counts
    as a file: whoever reads it refuses it by name.

    Raises:
      DataFileError: a class has no files; the classes have sub-folders of the same names, as the
        parts of a split do; a folder cannot be listed.
    """
    classes: dict[str, list[Path]] = {}
    passed_over: list[str] = []
    inner: dict[str, set[str]] = {}
    for entry in _entries(folder):
        if entry.name.startswith(".") or not entry.is_dir():
            passed_over.append(shown(entry.name))
            continue
        files, hidden, folders = _walk(entry)
        passed_over += [shown(path.relative_to(folder)) for path in hidden]
        if not files:
            raise DataFileError(
                f"{shown(entry)}: class {shown(entry.name)!r} has no images"
                + (f" (but hidden: {listed([path.name for path in hidden])})" if hidden else "")
                + "; add some, or take the folder away."
            )
        classes[entry.name], inner[entry.name] = files, folders
    _check_no_parts(folder, inner)
    return ClassFiles(classes, tuple(passed_over))


def _walk(folder: Path) -> tuple[list[Path], list[Path], set[str]]:
    """Files below a class's folder, sorted; hidden entries; names of its own sub-folders."""
    files: list[Path] = []
    hidden: list[Path] = []
    inner: set[str] = set()
    seen = {os.path.realpath(folder)}  # links may lead back up
    waiting = [folder]
    while waiting:
        at = waiting.pop()
        for entry in _entries(at):
            if entry.name.startswith("."):
                hidden.append(entry)
            elif entry.is_dir():
                inner |= {entry.name} if at == folder else set()
                real = os.path.realpath(entry)
                if real not in seen:
                    seen.add(real)
                    waiting.append(entry)
            else:
                files.append(entry)
    return sorted(files), sorted(hidden), inner


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataFileError(f"{shown(folder)}: cannot be listed ({error.strerror}).") from error


def _check_no_parts(folder: Path, inner: dict[str, set[str]]) -> None:
    """Refuses "classes" that hold the same sub-folders, which are then the classes."""
    counts = Counter(itertools.chain.from_iterable(inner.values()))
    if not counts or max(counts.values()) < 2:
        return
    nested = [(name, folders) for name, folders in inner.items() if folders]
    for (one, first), (other, second) in itertools.combinations(nested[:1000], 2):
        common = sorted(first & second)
        # A single name in common may be "images"; two, or one of more, are classes in two parts.
        if len(common) > 1 or (common and first != second and (first < second or second < first)):
            raise DataFileError(
                f"{shown(folder)}: {listed([one, other])} hold the same sub-folders "
                f"({listed(common)}), so they look like the parts of a split rather than classes; "
                "call them train and val, or, if they are classes, move their images up into them."
            )


def _part_and_rest(name: str) -> tuple[str, str] | None:
    """(part of a split, the other words of the name), or None if the name is of no part.

    >>> _part_and_rest("Training_Set-2"), _part_and_rest("seg_test"), _part_and_rest("trainer")
    (('train', ''), ('test', 'seg'), None)
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+", spaced.casefold())
    if "held" in words and "out" in words:
        words = ["heldout", *(word for word in words if word not in ("held", "out"))]
    parts, rest = [], []
    for word in words:
        if glued := _GLUED.fullmatch(word):
            parts.append(_PART_OF[glued[1]])
        elif word not in _FILLERS:
            rest.append(word)
    return (parts[0], " ".join(rest)) if len(parts) == 1 else None
