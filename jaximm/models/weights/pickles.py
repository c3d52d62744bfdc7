"""Checkpoints that are pickles, read without torch and without running anything that they name.

A pickle is a program: its GLOBAL opcodes may fetch any importable object and its REDUCE opcodes
call it. Here a pickle gets nothing of the interpreter's. Each global that it may name stands for a
small pure function of this file, immutable, which only records what was asked for; every other
global is refused by name before anything is called. Arrays are built afterwards, by NumPy, with
sizes, strides and offsets checked against the bytes that are there.

Three formats:

* torch's legacy one (before 1.6): five pickles in sequence, magic number, protocol version, system
  info, the object, the storage keys, then each storage as its length and its raw bytes;
* torch's zip: ``NAME/data.pkl`` and one member ``NAME/data/KEY`` a storage;
* a pickle of nested dicts and lists of NumPy arrays.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

# Plain numbers only: an object or structured dtype would make NumPy itself interpret the bytes.
_NUMPY_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def read_torch_legacy(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a legacy torch checkpoint by key; read-only views of its storages.

    A tensor keeps its strides, and tensors that share a storage share memory. Dicts wrapped as
    ``{"state_dict": ...}`` or ``{"model": ...}`` are unwrapped; ``module.``, there when a
    parallel wrapper was saved, is stripped if every key has it.

    Raises:
      ValueError: naming the file: another format, a global that is not allowed (nothing of the
        pickle has run), truncated or inconsistent bytes.
    """
    path = Path(path)
    with path.open("rb") as stream, _Named(path):
        magic, protocol, system = (_Unpickler(stream, {}).load() for _ in range(3))
        if magic != _MAGIC or protocol != _PROTOCOL:
            raise ValueError("it is not a legacy torch checkpoint")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("it was written on a big-endian machine, which is not read")
        tree = _Unpickler(stream, _TORCH_GLOBALS).load()
        keys = _Unpickler(stream, {}).load()
        storages = _storages_of(tree)
        if not isinstance(keys, list) or not set(storages) <= set(keys):
            raise ValueError("its list of storages does not cover its tensors")
        buffers = {}
        for key in keys:
            count = int.from_bytes(_exactly(stream, 8), "little")
            if key not in storages:
                raise ValueError(f"storage {key!r} belongs to no tensor, so its type is unknown")
            dtype = storages[key].dtype
            buffers[key] = np.frombuffer(_exactly(stream, count * dtype.itemsize), dtype)
        return _finish(_unwrap(tree), buffers)


def read_torch_zip(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a zip torch checkpoint by key; views and names as `read_torch_legacy` says.

    Raises:
      ValueError: as `read_torch_legacy`; a TorchScript archive, whose pickle names code.
    """
    path = Path(path)
    with _Named(path), zipfile.ZipFile(path) as archive:
        (member,) = [name for name in archive.namelist() if is_data_pickle(name)]
        folder = member.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            order = archive.read(f"{folder}byteorder")
            if order != b"little":
                raise ValueError(f"its byte order is {order!r}, only b'little' is read")
        with archive.open(member) as stream:
            state = _unwrap(_Unpickler(stream, _TORCH_GLOBALS).load())
        buffers = {
            key: np.frombuffer(archive.read(f"{folder}data/{key}"), storage.dtype)
            for key, storage in _storages_of(state).items()
        }
        return _finish(state, buffers)


def read_numpy_pickle(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a pickle of nested dicts and lists of NumPy arrays, keys joined by dots.

    ``{"conv1": [kernel, bias]}`` gives ``conv1.0`` and ``conv1.1``.

    Raises:
      ValueError: naming the file: a global other than NumPy's array constructors (nothing of the
        pickle has run), a dtype that is not a plain number, truncated bytes.
    """
    path = Path(path)
    with path.open("rb") as stream, _Named(path):
        return _finish(_unwrap(_Unpickler(stream, _NUMPY_GLOBALS).load()), {})


def is_data_pickle(name: str) -> bool:
    """Whether a zip member is the pickle of a torch archive: ``data.pkl`` one folder deep."""
    return name.count("/") == 1 and name.endswith("/data.pkl")


def is_torch_legacy(path: str | Path) -> bool:
    """Whether a file that begins as a pickle begins with torch's magic number."""
    with open(path, "rb") as stream:
        # The number is the whole of the first pickle: whatever its protocol, it begins by byte 11.
        return b"\x8a\x0a" + _MAGIC.to_bytes(10, "little") in stream.read(32)


class _Named:
    """Turns whatever malformed bytes raise inside into a ValueError that names the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Hostile or torn bytes make the unpickler, zipfile and NumPy raise nearly anything.
        if isinstance(error, Exception) and not isinstance(error, OSError):
            reason = str(error).rstrip(".") or type(error).__name__
            raise ValueError(f"{self.path.name} cannot be read: {reason}.") from error


class _Unpickler(pickle.Unpickler):
    """An unpickler for which only the globals of one table exist."""

    def __init__(self, stream: IO[bytes], allowed: Mapping[tuple[str, str], Any]):
        super().__init__(stream)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of an allowed global; its arguments are exact, no dotted look-up."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(
                f"it names the global {module}.{name}, which is not allowed; nothing was run"
            )
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """What stands for one storage, as torch writes it."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {str(pid)[:60]!r}")
        kind, key, count = pid[1], pid[2], pid[4]
        view = pid[5] if len(pid) == 6 else None
        if kind not in _STORAGES or not isinstance(key, str) or not _is_count(count):
            raise pickle.UnpicklingError(f"malformed storage {str(key)[:60]!r}")
        if view is None:
            return _Storage(key, _STORAGES[kind], 0, count)
        _, offset, size = view  # a part of another storage, which old versions of torch wrote
        if not _is_count(offset) or not _is_count(size) or offset + size > count:
            raise pickle.UnpicklingError(f"view beyond the end of storage {key!r}")
        return _Storage(key, _STORAGES[kind], offset, size)


class _Allowed(NamedTuple):
    """A callable that a pickle may call and cannot alter (no __dict__, no __setstate__)."""

    fun: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.fun(*args)


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    start: int
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dtype:
    """Stands for numpy.dtype; a pickle sets the byte order by __setstate__."""

    __slots__ = ("value",)

    def __init__(self, code: str):
        if code not in _NUMPY_DTYPES:
            raise ValueError(f"dtype {code!r} is not a plain number")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"byte order {order!r} of a dtype")
        self.value = self.value.newbyteorder(order)


class _Array:
    """Stands for numpy.ndarray; a pickle gives its content by __setstate__."""

    __slots__ = ("value",)

    def __init__(self):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.value = _array_of_bytes(raw, dtype, shape, "F" if is_fortran else "C")


def _array_of_bytes(raw: Any, dtype: _Dtype, shape: Any, order: str) -> np.ndarray:
    """An array of raw bytes whose number must fit."""
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype):
        raise ValueError("an array without plain bytes")
    if not isinstance(shape, tuple) or not all(_is_count(side) for side in shape):
        raise ValueError(f"array shape {str(shape)[:60]}")
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise ValueError(f"{len(raw)} bytes for an array {list(shape)} of {dtype.value}")
    flat = np.frombuffer(raw, dtype.value).astype(dtype.value.newbyteorder("="), copy=False)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2."""
    sides = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(_is_count(side) for side in sides):
        raise ValueError("malformed tensor")
    if len(shape) != len(strides):
        raise ValueError(f"tensor of shape {list(shape)} with strides {list(strides)}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    """Stands for torch._utils._rebuild_parameter."""
    return tensor


def _numpy_dtype(code: Any, *_: Any) -> _Dtype:
    return _Dtype(str(code).lstrip("<|="))


def _numpy_reconstruct(*_: Any) -> _Array:
    return _Array()


def _numpy_frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.value = _array_of_bytes(raw, dtype, shape, order)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands for _codecs.encode, as which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"encoding {str(encoding)[:60]!r}")
    return text.encode("latin1")


# OrderedDict is the interpreter's own: a C type, which a pickle can fill and cannot alter.
_TORCH_GLOBALS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Allowed(_rebuild_parameter),
    **{("torch", name): name for name in _STORAGES},
}

_NUMPY_GLOBALS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): _Allowed(_numpy_dtype),
    ("numpy", "ndarray"): "numpy.ndarray",
    ("_codecs", "encode"): _Allowed(_encode),
    **{
        (f"numpy.{core}.{module}", name): _Allowed(fun)
        for core in ("core", "_core")
        for module, name, fun in (
            ("multiarray", "_reconstruct", _numpy_reconstruct),
            ("numeric", "_frombuffer", _numpy_frombuffer),
        )
    },
}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise ValueError(f"it ends {count - len(content)} bytes too early")
    return content


def _storages_of(tree: Any) -> dict[str, _Storage]:
    """Every storage that a tree's tensors lie in, by key; one key has one type."""
    found: dict[str, _Storage] = {}
    rest, seen = [tree], set()
    while rest:
        node = rest.pop()
        if isinstance(node, _Tensor):
            storage = node.storage
            if found.setdefault(storage.key, storage).dtype != storage.dtype:
                raise ValueError(f"storage {storage.key!r} has two types")
        elif isinstance(node, dict | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            rest += node.values() if isinstance(node, dict) else node
    return found


def _flatten(tree: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists by dotted path."""
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    # A pickle can build cycles, and lists of itself whose flattening has no end in practice.
    if id(tree) in seen:
        raise ValueError(f"{path} holds a container that occurs elsewhere too")
    seen.add(id(tree))
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _flatten(value, f"{path}.{key}" if path else str(key), seen)


def _unwrap(tree: Any) -> dict:
    """The state dict in what a checkpoint holds."""
    for wrapper in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a dict of arrays")
    return tree


def _finish(state: dict, buffers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A flat dict of arrays of a state dict and its storages."""
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in _flatten(state, "", set()):
        if isinstance(leaf, _Array) and leaf.value is not None:
            value = leaf.value
        elif isinstance(leaf, _Tensor):
            value = _materialise(leaf, buffers[leaf.storage.key], path)
        else:
            raise ValueError(f"{path} is a {type(leaf).__name__}, not an array")
        if path in arrays:
            raise ValueError(f"two arrays are named {path}")
        arrays[path] = value
    if arrays and all(path.startswith("module.") for path in arrays):
        arrays = {path.removeprefix("module."): value for path, value in arrays.items()}
    return arrays


def _materialise(tensor: _Tensor, buffer: np.ndarray, name: str) -> np.ndarray:
    """A tensor's view of its storage; read-only, no copy."""
    storage = tensor.storage
    if storage.start + storage.count > buffer.size:
        raise ValueError(
            f"the storage of {name} holds {buffer.size} numbers, {storage.start + storage.count} "
            "are declared"
        )
    part = buffer[storage.start : storage.start + storage.count]
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, part.dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((side - 1) * stride for side, stride in steps)
    if last >= part.size:
        raise ValueError(f"{name} reaches number {last} of a storage of {part.size}")
    return np.lib.stride_tricks.as_strided(
        part[tensor.offset :],
        tensor.shape,
        [stride * part.itemsize for stride in tensor.strides],
        writeable=False,
    )
