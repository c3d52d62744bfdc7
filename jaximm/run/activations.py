"""Activations at the cut: the frozen stages run once over all rows, whichever run asks for them.

What took long, or is large, is kept in a file below ``activations`` in the cache folder
(`jaximm.carriers.cache_folder`), whose name is a digest of all that decides the numbers: the
lowered program of the frozen stages with the preprocessing, their weights, the rows, the device and
jax's version. The file is checked against its digest and mapped: on a CPU the arrays *are* the
file, so that they take no memory but what the system can take back at any time. Least recently used
files go when there is no room within ``JAXIMM_CACHE_GB``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaximm import models
from jaximm.assessment.estimates import SAID_SECONDS, about, size
from jaximm.assessment.protocol import Progress
from jaximm.carriers import cache_folder
from jaximm.models import Trainable
from jaximm.models.flat import NECK, under
from jaximm.models.statistics import Stages
from jaximm.models.weights import CLASSIFIER
from jaximm.records import files

ROWS = 100
"""Most rows a pass through the frozen stages."""

PASS = 2**24
"""Bytes of inputs a pass on a CPU, from one row on: first layers hold some 60 times as many."""

IN_MEMORY = 2**28
"""Bytes of activations from which on they lie in a file."""

KEPT_SECONDS = 10.0
"""Time from which on activations are kept, however small they are."""

LIMIT, LIMIT_GB = "JAXIMM_CACHE_GB", 50.0
"""Variable with the most GB that all kept activations may take, and what it is unless set. 0: none
are kept, and all lie in memory."""


def at_cut(
    trainable: Trainable, parts: Sequence[np.ndarray], *, progress: Progress | None = None
) -> list[jax.Array]:
    """Activations at the cut of uint8 images, or of inputs as the model takes them.

    All parts go through one stream of passes, so that few rows are computed in vain.

    Args:
      trainable: the backbone and its cut.
      parts: rows [n, ...] of each.
      progress: gets the number of images that are done, and first, where it takes long, a line with
        time and size (`jaximm.assessment.estimates`).

    Returns:
      For each part, [n, ...].

    Raises:
      ValueError: no room for the file, or less than it needs within ``JAXIMM_CACHE_GB``.
    """
    activations: dict[int, jax.Array] = {}
    kinds: dict[tuple, list[int]] = {}
    for index, part in enumerate(parts):
        kinds.setdefault((part.shape[1:], part.dtype), []).append(index)
    for indices in kinds.values():
        arrays = _of_one_kind(trainable, [parts[index] for index in indices], progress)
        activations.update(zip(indices, arrays, strict=True))
    return [activations[index] for index in range(len(parts))]


def _of_one_kind(
    trainable: Trainable, parts: Sequence[np.ndarray], progress: Progress | None
) -> list[jax.Array]:
    """`at_cut` of rows of one shape and dtype."""
    ends = np.cumsum([len(part) for part in parts]).tolist()
    total = ends[-1]
    most = ROWS
    if jax.default_backend() == "cpu":
        most = max(1, min(ROWS, PASS // _input_bytes(trainable, parts[0])))
    # Blocks of one size, as many as there must be: fewer rows are padded than there are blocks.
    rows = math.ceil(total / math.ceil(total / most))
    program = _program(Stages(trainable), (rows, *parts[0].shape[1:]), str(parts[0].dtype))
    shape = (total, *program.out.shape[1:])
    store = Store.of_user()
    address = "" if store is None else _address(trainable, program, parts)
    whole = None if store is None else store.read(address, shape, program.out.dtype)
    if whole is None:
        whole = _computed(trainable, program, parts, shape, store, address, progress)
    starts = [0, *ends[:-1]]
    # On a CPU what lies at a multiple of 64 bytes is not copied, even of a file.
    return [jax.device_put(whole[start:end]) for start, end in zip(starts, ends, strict=True)]


def _input_bytes(trainable: Trainable, rows: np.ndarray) -> int:
    """Of what enters the first stage, a row."""
    if rows.dtype == np.uint8:
        return 12 * trainable.backbone.preprocess.size**2
    return max(1, rows[:1].nbytes)


class _Program:
    """The frozen stages for blocks of one shape."""

    def __init__(self, stages: Stages, shape: tuple[int, ...], dtype: str):
        shell = stages.trainable.backbone
        shapes = [
            {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
            for flat in (shell.params, shell.stats)
        ]
        pixels = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        self._lowered = _prefix.lower(stages, *shapes, pixels)
        self.rows = shape[0]
        self.out = self._lowered.out_info
        self.digest = hashlib.sha256(self._lowered.as_text().encode()).hexdigest()

    @functools.cached_property
    def compiled(self) -> Any:
        """Called with params, stats and rows."""
        return self._lowered.compile()


@functools.lru_cache(maxsize=16)
def _program(stages: Stages, shape: tuple[int, ...], dtype: str) -> _Program:
    return _Program(stages, shape, dtype)


@functools.partial(jax.jit, static_argnames="stages")
def _prefix(stages: Stages, params, stats, pixels):
    # Numbers as arguments: as constants of the program they would be copied into it.
    trainable = stages.trainable
    backbone = dataclasses.replace(trainable.backbone, params=params, stats=stats)
    inputs = backbone.preprocess(pixels) if pixels.dtype == jnp.uint8 else pixels
    return models.run_stages(backbone, params, inputs, trainable.prefix_stages, neck=False)


def _address(trainable: Trainable, program: _Program, parts: Sequence[np.ndarray]) -> str:
    """A digest of all that decides the activations."""
    digest = hashlib.sha256()
    device = jax.devices()[0]
    said = [program.digest, device.platform, device.device_kind, jax.__version__]
    after = (*trainable.suffix_stages, NECK, CLASSIFIER)
    backbone = trainable.backbone
    for kind, flat in (("params", backbone.params), ("stats", backbone.stats)):
        for path, value in sorted(flat.items()):
            if not any(under(path, stage) for stage in after):
                said.append(f"{kind} {path} {_sha256(np.asarray(value))}")
    said += [f"{part.dtype} {part.shape} {_sha256(part)}" for part in parts]
    digest.update(json.dumps(said).encode())
    return digest.hexdigest()[:32]


def _sha256(array: np.ndarray) -> str:
    """Of the numbers in order, a block at a time: rows that are every second of others are none."""
    digest = hashlib.sha256()
    rows = array.reshape(-1) if array.ndim == 0 else array
    for start in range(0, len(rows), 256):
        digest.update(_bytes(rows[start : start + 256]))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _computed(
    trainable: Trainable,
    program: _Program,
    parts: Sequence[np.ndarray],
    shape: tuple[int, ...],
    store: Store | None,
    address: str,
    progress: Progress | None,
) -> np.ndarray:
    """All rows through the program, into memory or a file."""
    backbone, total = trainable.backbone, shape[0]
    run = functools.partial(program.compiled, backbone.params, backbone.stats)
    blocks = _blocks(parts, program.rows)
    first = next(blocks)
    started = time.perf_counter()
    done = np.asarray(run(first))
    seconds = (time.perf_counter() - started) * math.ceil(total / program.rows)
    dtype, large = done.dtype, math.prod(shape) * done.dtype.itemsize

    def tell(count: int, **record: Any) -> None:
        if progress is not None and seconds >= SAID_SECONDS:
            progress("frozen stages", count, total, {"unit": "images", **record})

    def outputs() -> Iterator[np.ndarray]:
        yield done
        for number, block in enumerate(blocks, start=1):
            tell(number * program.rows)
            yield np.asarray(run(block))[: total - number * program.rows]

    is_kept = store is not None and (large > IN_MEMORY or seconds > KEPT_SECONDS)
    where = f", kept in {store.folder}" if is_kept and store is not None else ""
    side = f" at {backbone.preprocess.size} px" if first.dtype == np.uint8 else ""
    long = f"{about(seconds)}, {size(large)}{where}, for {total:,} images{side}"
    tell(0, says=f"{long} through the frozen stages")
    if is_kept and store is not None:
        return store.write(address, shape, dtype, outputs())
    whole = np.empty(shape, dtype)
    for number, block in enumerate(outputs()):
        start = number * program.rows
        whole[start : start + len(block)] = block
    return whole


def _blocks(parts: Sequence[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The rows of all parts in order, in blocks of one size; the last is filled up."""
    held: list[np.ndarray] = []
    for part in parts:
        start = 0
        while start < len(part):
            taken = part[start : start + rows - sum(map(len, held))]
            held.append(taken)
            start += len(taken)
            if sum(map(len, held)) == rows:
                yield np.concatenate(held)
                held = []
    if held:
        missing = rows - sum(map(len, held))
        yield np.concatenate([*held, np.repeat(held[-1][-1:], missing, axis=0)])


class Store:
    """Arrays in files, ``ADDRESS.npy`` beside ``ADDRESS.json``, which holds shape and digest.

    Attributes:
      folder: where they lie.
      most: bytes that all of them may take.
    """

    def __init__(self, folder: Path, most: int):
        self.folder, self.most = folder, most

    @classmethod
    def of_user(cls) -> Store | None:
        """The store of the cache folder; None: nothing is to be kept.

        Raises:
          ValueError: ``JAXIMM_CACHE_GB`` is no number, or below 0.
        """
        text = os.environ.get(LIMIT, "") or str(LIMIT_GB)
        try:
            most = float(text)
        except ValueError:
            most = math.nan
        if not 0 <= most < math.inf:
            raise ValueError(f"{LIMIT} must be a number of GB, 0 or more, got {text!r}.")
        return cls(cache_folder() / "activations", int(most * 1e9)) if most else None

    def read(self, address: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
        """The array at an address, mapped from its file; None: it is not there.

        A file that is not what was written is removed, with a warning.
        """
        record, path = self._record(address), self._array(address)
        if not record.exists():
            return None
        try:
            content = files.opened(files.parse(record), of=address)
            if content["sha256"] != _sha256_of_file(path):
                raise files.ResultError("its content is not what was written: damaged.")
            array = self._mapped(address, dtype)
            if array.shape != shape:
                raise files.ResultError(f"it holds {list(array.shape)}, not {list(shape)}.")
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is computed again: {error}", files.FileWarning, stacklevel=2)
            self._remove(address)
            return None
        with contextlib.suppress(OSError):  # of another user
            os.utime(record)  # the least recently used go first
        return array

    def write(
        self, address: str, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterator[np.ndarray]
    ) -> np.ndarray:
        """Writes the rows that come block by block, whole or not at all; the array, mapped.

        Raises:
          ValueError: no room for it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files.sweep(self.folder)
        self._make_room(math.prod(shape) * dtype.itemsize)
        path, digest, header = self._array(address), hashlib.sha256(), io.BytesIO()
        described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, described)
        draft = files.draft_of(path)
        try:
            with open(draft, "xb") as file:
                for piece in itertools.chain([header.getbuffer()], map(_bytes, blocks)):
                    file.write(piece)
                    digest.update(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except OSError as error:
            raise ValueError(f"{draft}: {error.strerror or error}; {_REMEDY}.") from error
        finally:
            draft.unlink(missing_ok=True)
        content = files.sealed({"sha256": digest.hexdigest()}, of=address)
        files.write_text(self._record(address), json.dumps(content) + "\n")
        return self._mapped(address, dtype)

    def _mapped(self, address: str, dtype: np.dtype) -> np.ndarray:
        with open(self._array(address), "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)  # its dtype knows no bfloat16
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            array = np.frombuffer(whole, dtype, offset=file.tell()).reshape(shape)
        _give_back(whole)
        return array

    def _array(self, address: str) -> Path:
        return self.folder / f"{address}.npy"

    def _record(self, address: str) -> Path:
        return self.folder / f"{address}.json"

    def _remove(self, address: str) -> None:
        """The record first: without it nothing is there. Who has mapped the array keeps it."""
        for path in (self._record(address), self._array(address)):
            path.unlink(missing_ok=True)

    def _make_room(self, need: int) -> None:
        """Removes the least recently used arrays, as far as it must.

        Raises:
          ValueError: there would be too little room all the same.
        """
        if need > self.most:
            raise ValueError(
                f"the activations at the cut take {size(need)}, more than the {size(self.most)} "
                f"that {LIMIT} allows; {_REMEDY}."
            )
        # Arrays without a record are of a process that was killed between the two.
        used = {path: path.stat() for path in self.folder.glob("*.npy")}
        held = sum(stat.st_size for stat in used.values())

        def last_use(path: Path) -> float:
            record = self._record(path.stem)
            return record.stat().st_mtime if record.exists() else 0.0

        for path in sorted(used, key=last_use):
            if held + need <= self.most:
                break
            self._remove(path.stem)
            held -= used[path].st_size
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(
                f"the activations at the cut take {size(need)}, and {self.folder} has {size(free)} "
                f"left; {_REMEDY}."
            )


GIVEN_BACK_SECONDS = 0.25
"""Time after which pages of mapped files that were read are given back."""

_MAPPED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_LOCK = threading.Lock()


def _give_back(whole: mmap.mmap) -> None:
    """Lets go of a file's pages again and again, while it is mapped.

    What was read once counts as this process's memory until the system wants it back; limits of
    batch systems, which count it as well, would end a run that needs a fraction of it.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):  # not on this system
        return
    with _LOCK:
        is_first = not _MAPPED
        _MAPPED.add(whole)
    if is_first:
        threading.Thread(target=_keep_giving_back, daemon=True).start()


def _keep_giving_back() -> None:
    while True:
        with _LOCK:
            mapped = list(_MAPPED)
        if not mapped:
            return
        for whole in mapped:
            whole.madvise(mmap.MADV_DONTNEED)  # of a file that nobody writes: it is read again
        del mapped, whole
        time.sleep(GIVEN_BACK_SECONDS)


_REMEDY = (
    f"cut later or take fewer images, give another disk by JAXIMM_DATA, or set {LIMIT} (0: hold "
    "them in memory)"
)


def _sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
