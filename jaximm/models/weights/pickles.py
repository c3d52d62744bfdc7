"""Checkpoints that are pickles, read without torch and without running anything that they name.

`jaximm.models.weights.machine` reads the pickles, `standins` says what their globals stand for,
`trees` finds the weights in what comes out. Three formats:

* torch's legacy one (before 1.6): five pickles in sequence, magic number, protocol version, system
  info, the object, the storage keys, then each storage as its length and its raw bytes;
* torch's zip: ``NAME/data.pkl`` and one member ``NAME/data/KEY`` a storage;
* a pickle of nested dicts and lists of NumPy arrays.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from jaximm.models.weights import trees
from jaximm.models.weights.archives import Archive
from jaximm.models.weights.errors import Refusal, reading, shown, unpacked_bound
from jaximm.models.weights.machine import run
from jaximm.models.weights.standins import GLOBALS, Storages

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LINE = 1 << 16

_logger = logging.getLogger(__name__)


def read_torch_legacy(path: str | Path, *, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a legacy torch checkpoint by key; read-only views of its storages.

    A tensor keeps its strides, and tensors that share a storage share memory. Of a training file
    the weights are taken, and a line of the log says which; ``module.``, there when a parallel
    wrapper was saved, is stripped if every key has it. Of what is no array nothing is kept.

    Args:
      path: the file.
      prefix: as `jaximm.models.weights.read_weights` takes it; from the file's root too.

    Raises:
      WeightFileError: naming the file: another format, a global that is not allowed (nothing of
        the pickle has run), truncated or inconsistent bytes, no arrays, or several sets of weights
        and no prefix that names one.
    """
    path = Path(path)
    with reading(path), path.open("rb") as stream:
        source = _Bounded(stream, path.stat().st_size)
        magic, protocol, system = (run(source, {}) for _ in range(3))
        if magic != _MAGIC or protocol != _PROTOCOL:
            raise Refusal("it is not a legacy torch checkpoint")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise Refusal(
                "it was written on a big-endian machine, which is not read",
                "save it on a little-endian one",
            )
        storages = Storages()
        chosen = trees.choose(run(source, GLOBALS, storages), prefix)
        keys = run(source, {})
        needed = trees.storage_keys(chosen.tree)
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise Refusal("its list of storages is malformed")
        if not needed <= set(keys):
            raise Refusal("its list of storages does not cover its tensors")
        buffers = {}
        for key in keys:
            if key not in storages.dtypes:
                raise Refusal(f"storage {shown(key)} belongs to no tensor: its type is unknown")
            dtype = storages.dtypes[key]
            count = int.from_bytes(source.exactly(8), "little")
            content = source.exactly(count * dtype.itemsize)
            if key in needed:
                buffers[key] = np.frombuffer(content, dtype)
        return _finish(path, chosen, buffers)


def read_torch_zip(path: str | Path, *, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a zip torch checkpoint by key; views, names and prefix as `read_torch_legacy` says.

    Raises:
      WeightFileError: as `read_torch_legacy`; a TorchScript archive, whose pickle names code.
    """
    path = Path(path)
    with reading(path), Archive(path) as archive:
        members = [name for name in archive.names if is_data_pickle(name)]
        if len(members) != 1:
            raise Refusal(f"it holds {len(members)} members data.pkl")
        folder = members[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.names:
            order = archive.read(f"{folder}byteorder")
            if order != b"little":
                raise Refusal(
                    f"its byte order is {order[:20]!r}, only b'little' is read",
                    "save it on a little-endian machine",
                )
        storages = Storages()
        chosen = trees.choose(run(io.BytesIO(archive.read(members[0])), GLOBALS, storages), prefix)
        buffers = {
            key: np.frombuffer(archive.read(f"{folder}data/{key}"), storages.dtypes[key])
            for key in sorted(trees.storage_keys(chosen.tree))
        }
        return _finish(path, chosen, buffers)


def read_numpy_pickle(path: str | Path, *, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a pickle of nested dicts and lists of NumPy arrays, keys joined by dots.

    ``{"conv1": [kernel, bias]}`` gives ``conv1.0`` and ``conv1.1``. Weights, names and prefix as
    `read_torch_legacy` says.

    Raises:
      WeightFileError: naming the file: a global that is not allowed (nothing of the pickle has
        run), no arrays of plain numbers, truncated bytes.
    """
    path = Path(path)
    with reading(path), path.open("rb") as stream:
        tree = run(_Bounded(stream, path.stat().st_size), GLOBALS)
        return _finish(path, trees.choose(tree, prefix), {})


def is_data_pickle(name: str) -> bool:
    """Whether a zip member is the pickle of a torch archive: ``data.pkl`` one folder deep."""
    return name.count("/") == 1 and name.endswith("/data.pkl")


def is_torch_legacy(path: str | Path) -> bool:
    """Whether a file that begins as a pickle begins with torch's magic number."""
    with open(path, "rb") as stream:
        # The number is the whole of the first pickle: whatever its protocol, it begins by byte 11.
        return b"\x8a\x0a" + _MAGIC.to_bytes(10, "little") in stream.read(32)


class _Bounded:
    """A file that gives no more memory away than it has bytes."""

    def __init__(self, stream: IO[bytes], size: int):
        self._stream, self._size = stream, size

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes."""
        return self._stream.read(max(0, min(size, self._size)))

    def readline(self) -> bytes:
        """Up to the next newline, if that is near."""
        return self._stream.readline(_LINE)

    def exactly(self, size: int) -> bytes:
        """`size` bytes.

        Raises:
          Refusal: the file ends before.
        """
        content = self.read(size)
        if len(content) != size:
            raise Refusal(f"it ends {size - len(content)} bytes too early")
        return content


def _finish(
    path: Path, chosen: trees.Chosen, buffers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A flat dict of arrays of the weights that were chosen; says what was left."""
    if not isinstance(chosen.tree, dict):
        raise Refusal(
            f"it holds a {type(chosen.tree).__name__}, not a dict of arrays",
            "save a model's state dict",
        )
    bound = unpacked_bound(path.stat().st_size)
    arrays, others = trees.arrays_of(chosen.tree, buffers, bound=bound)
    if chosen.path or others:
        left = [*chosen.beside, *(text.partition(" is a ")[0] for text in others)]
        _logger.warning(
            "%s: took %d arrays%s%s.",
            shown(path.name),
            len(arrays),
            f" of {shown(chosen.path.removesuffix('.'))!r}" if chosen.path else "",
            f"; left {trees.some(left)}" if left else "",
        )
    return trees.select(arrays, chosen.prefix, path.name, strip=True)
