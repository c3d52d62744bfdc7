"""What the globals of a checkpoint's pickle stand for: descriptions of arrays, and inert objects.

Nothing here is the thing that the pickle names. Arrays are built after the pickle has been read, by
NumPy, with sizes, strides and offsets checked against the bytes that are there. What training files
hold beside their weights (arguments, dates, paths, sizes, devices) is `Inert`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaximm.models.weights.errors import Refusal, shown
from jaximm.models.weights.machine import Call, Fillable, Inert, Unpickled, checked_key

STORAGES = {
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

PLAIN_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
"""Plain numbers: an object or structured dtype would make NumPy itself interpret the bytes."""

_AXES = 32


class Kind(NamedTuple):
    """Stands for a torch storage class."""

    dtype: np.dtype


class Storage(NamedTuple):
    """Numbers `start` to `start + count` of the storage `key`."""

    key: str
    dtype: np.dtype
    start: int
    count: int


class Tensor(NamedTuple):
    """A torch tensor: a strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Storages:
    """The storages that a pickle refers to, by key; called with a persistent id."""

    def __init__(self):
        self.dtypes: dict[str, np.dtype] = {}

    def __call__(self, pid: Unpickled) -> Storage:
        """What stands for one storage, as torch writes it.

        Raises:
          Refusal: another form of id, or one key with two types.
        """
        if type(pid) is not tuple or len(pid) not in (5, 6) or not _is_text(pid[0], "storage"):
            raise Refusal("it refers to something outside that is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        view = pid[5] if len(pid) == 6 else None
        if type(kind) is not Kind or type(key) is not str or not _is_count(count):
            raise Refusal("malformed storage")
        start = 0
        if view is not None:  # a part of another storage, which old versions of torch wrote
            if type(view) is not tuple or len(view) != 3 or not all(map(_is_count, view[1:])):
                raise Refusal("malformed storage")
            start, size = view[1:]
            if start + size > count:
                raise Refusal(f"view beyond the end of storage {shown(key)}")
            count = size
        if self.dtypes.setdefault(key, kind.dtype) != kind.dtype:
            raise Refusal(f"storage {shown(key)} has two types")
        return Storage(key, kind.dtype, start, count)


class Dtype(Fillable):
    """Stands for numpy.dtype; None where it is not that of plain numbers."""

    __slots__ = ("name", "value")

    def __init__(self, code: str):
        self.name = code
        self.value = np.dtype(code) if code in PLAIN_DTYPES else None

    def fill(self, state: Unpickled) -> None:
        """Sets the byte order."""
        if self.value is None:
            return
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        known = [mark for mark in "<>|=" if _is_text(order, mark)]
        if not known:
            raise Refusal("malformed byte order of a dtype")
        self.value = self.value.newbyteorder(known[0])  # pyrefly: ignore[bad-argument-type]


class Array(Fillable):
    """Stands for numpy.ndarray; without a value where its dtype is not that of plain numbers."""

    __slots__ = ("dtype", "value")

    def __init__(self):
        self.value: np.ndarray | None = None
        self.dtype = "?"

    def fill(self, state: Unpickled) -> None:
        """Sets shape, dtype, order and bytes."""
        if type(state) is not tuple or len(state) != 5:
            raise Refusal("malformed array")
        _, shape, dtype, is_fortran, raw = state
        self.take(raw, dtype, shape, "F" if is_fortran is True else "C")

    def take(self, raw: Unpickled, dtype: Unpickled, shape: Unpickled, order: str) -> None:
        """Sets the same; the number of bytes must fit."""
        if type(dtype) is not Dtype:
            raise Refusal("an array without a dtype")
        self.dtype = dtype.name
        if dtype.value is None:
            return
        if type(raw) is str:  # as Python 2 wrote bytes
            raw = raw.encode("latin1")
        if type(raw) not in (bytes, bytearray):
            raise Refusal("an array without plain bytes")
        if type(shape) is not tuple or len(shape) > _AXES or not all(map(_is_count, shape)):
            raise Refusal("malformed shape of an array")
        if math.prod(shape) * dtype.value.itemsize != len(raw):
            raise Refusal(f"{len(raw)} bytes for an array {list(shape)} of {dtype.value}")
        flat = np.frombuffer(raw, dtype.value).astype(dtype.value.newbyteorder("="), copy=False)
        self.value = flat.reshape(shape, order="F" if order == "F" else "C")


def _rebuild_tensor(
    storage: Unpickled, offset: Unpickled, shape: Unpickled, strides: Unpickled, *_: Unpickled
) -> Tensor:
    """Stands for torch._utils._rebuild_tensor_v2."""
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise Refusal("malformed tensor")
    if len(shape) > _AXES or not all(_is_count(side) for side in (offset, *shape, *strides)):
        raise Refusal("malformed tensor")
    if len(shape) != len(strides):
        raise Refusal(f"tensor of shape {list(shape)} with strides {list(strides)[:_AXES]}")
    return Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Unpickled, *_: Unpickled) -> Unpickled:
    """Stands for torch._utils._rebuild_parameter, with a state or without."""
    return tensor


def _rebuild_from_type(
    fun: Unpickled, kind: Unpickled, arguments: Unpickled, state: Unpickled
) -> Unpickled:
    """Stands for torch._tensor._rebuild_from_type_v2: a tensor that had attributes."""
    del kind, state
    if type(fun) is not Call or fun.fun not in (_rebuild_tensor, _rebuild_parameter):
        raise Refusal("malformed tensor")
    return fun.fun(*arguments) if type(arguments) is tuple else None


def _size(sides: Unpickled = ()) -> Unpickled:
    """Stands for torch.Size: a plain tuple."""
    return sides if type(sides) is tuple else Inert("torch.Size")


def _numpy_dtype(code: Unpickled, *_: Unpickled) -> Dtype:
    return Dtype(code.lstrip("<|=") if type(code) is str else "")


def _numpy_reconstruct(*_: Unpickled) -> Array:
    return Array()


def _numpy_frombuffer(
    raw: Unpickled, dtype: Unpickled, shape: Unpickled, order: Unpickled
) -> Array:
    array = Array()
    array.take(raw, dtype, shape, "F" if _is_text(order, "F") else "C")
    return array


def _numpy_scalar(*_: Unpickled) -> Inert:
    return Inert("NumPy scalar")


def _encode(text: Unpickled, encoding: Unpickled = None) -> bytes:
    """Stands for _codecs.encode, as which protocol 2 writes bytes."""
    if type(text) is not str or not _is_text(encoding, "latin1"):
        raise Refusal("bytes in another encoding than latin1")
    return text.encode("latin1")


def _empty_bytes(*_: Unpickled) -> bytes:
    """Stands for bytes, as which protocol 2 writes those of no length."""
    return b""


def _dict(*arguments: Unpickled) -> dict:
    """Stands for OrderedDict, defaultdict and Counter; the last argument may hold items."""
    items = arguments[-1] if arguments else ()
    if type(items) is dict:
        return dict(items)
    pairs = items if type(items) in (list, tuple) else ()
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise Refusal("malformed dict")
    return {checked_key(key): value for key, value in pairs}


def _is_text(value: Unpickled, text: str) -> bool:
    # By type first: comparing what a pickle nests may have no end.
    return type(value) is str and value == text


def _is_count(value: Unpickled) -> bool:
    return type(value) is int and 0 <= value < 2**63


_INERT = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "collections": ("deque", "UserDict", "UserList"),
    "copyreg": ("_reconstructor",),
    "copy_reg": ("_reconstructor",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "enum": ("Enum", "IntEnum", "StrEnum", "Flag", "IntFlag"),
    "fractions": ("Fraction",),
    "uuid": ("UUID", "SafeUUID"),
    "zoneinfo": ("ZoneInfo", "ZoneInfo._unpickle"),
    "typing": ("Any",),
    **dict.fromkeys(
        ("pathlib", "pathlib._local"),
        ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    ),
    **dict.fromkeys(
        ("builtins", "__builtin__"),
        (
            *(
                "Ellipsis",
                "NotImplemented",
                "bool",
                "bytearray",
                "complex",
                "dict",
                "float",
                "frozenset",
                "int",
                "list",
                "long",
            ),
            *("object", "range", "set", "slice", "str", "tuple", "unicode", "xrange"),
        ),
    ),
    **dict.fromkeys(
        ("numpy.random._pickle",),
        ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"),
    ),
    "numpy.random._mt19937": ("MT19937",),
    "numpy.random._pcg64": ("PCG64", "PCG64DXSM"),
    "numpy.random._philox": ("Philox",),
    "numpy.random._sfc64": ("SFC64",),
    "numpy.random.bit_generator": ("SeedSequence", "__pyx_unpickle_SeedSequence"),
    "numpy.random._generator": ("Generator",),
    "numpy.random.mtrand": ("RandomState",),
    "numpy": (
        *("ndarray", "bool", "bool_", "float16", "float32", "float64", "int8", "int16", "int32"),
        *("int64", "uint8", "uint16", "uint32", "uint64", "str_", "bytes_"),
    ),
    "numpy.dtypes": tuple(
        f"{kind}DType"
        for kind in (
            *("Bool", "Float16", "Float32", "Float64", "Int8", "Int16", "Int32", "Int64"),
            *("UInt8", "UInt16", "UInt32", "UInt64", "Str", "Bytes"),
        )
    ),
    "torch": (
        *("device", "Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "LongTensor"),
        *("IntTensor", "ByteTensor", "BoolTensor", "BFloat16Tensor"),
        *("float16", "float32", "float64", "bfloat16", "half", "float", "double", "uint8", "int8"),
        *("int16", "int32", "int64", "short", "int", "long", "bool", "complex64", "complex128"),
        *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "strided", "sparse_coo"),
        *("contiguous_format", "channels_last", "preserve_format"),
    ),
    "torch.serialization": ("_get_layout",),
    "torch.nn.parameter": ("Parameter", "Buffer"),
    "torch._tensor": ("Tensor",),
    "torchvision.transforms.functional": ("InterpolationMode",),
    # Configurations that training tools save beside the weights.
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.nodes": (
        *("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "EnumNode"),
        "PathNode",
    ),
    "easydict": ("EasyDict",),
    "addict.addict": ("Dict",),
    "yacs.config": ("CfgNode",),
    **dict.fromkeys(
        (
            "lightning_fabric.utilities.data",
            "lightning.fabric.utilities.data",
            "pytorch_lightning.utilities.parsing",
        ),
        ("AttributeDict",),
    ),
    **dict.fromkeys(
        (
            "pytorch_lightning.callbacks.model_checkpoint",
            "lightning.pytorch.callbacks.model_checkpoint",
        ),
        ("ModelCheckpoint",),
    ),
}

GLOBALS: dict[tuple[str, str], Unpickled] = {
    **{(module, name): Inert(name) for module, names in _INERT.items() for name in names},
    ("collections", "OrderedDict"): Call(_dict),
    ("collections", "defaultdict"): Call(_dict),
    ("collections", "Counter"): Call(_dict),
    ("_codecs", "encode"): Call(_encode),
    ("builtins", "bytes"): Call(_empty_bytes),
    ("__builtin__", "bytes"): Call(_empty_bytes),
    **{("torch", name): Kind(dtype) for name, dtype in STORAGES.items()},
    ("torch", "Size"): Call(_size),
    ("torch._utils", "_rebuild_tensor"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Call(_rebuild_from_type),
    ("numpy", "dtype"): Call(_numpy_dtype),
    **{
        (f"numpy.{core}.{module}", name): Call(fun)
        for core in ("core", "_core")
        for module, name, fun in (
            ("multiarray", "_reconstruct", _numpy_reconstruct),
            ("multiarray", "scalar", _numpy_scalar),
            ("numeric", "_frombuffer", _numpy_frombuffer),
        )
    },
}
"""Every global that a checkpoint may name, by module and name. All others are refused."""
