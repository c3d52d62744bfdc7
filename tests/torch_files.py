"""Torch checkpoints written opcode by opcode, without torch, with whatever globals a test likes."""

import io
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import numpy as np

KINDS = {"float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16"}
KINDS |= {"int64": "Long", "uint8": "Byte", "bool": "Bool"}
MAGIC = 0x1950A86A20F9469CFC6C


class Made(NamedTuple):
    """``module.name(*args)``, then its state, as REDUCE and BUILD write it."""

    module: str
    name: str
    args: tuple | None = ()  # None: the global itself
    state: Any = None


class Raw(NamedTuple):
    """Opcodes as they are."""

    opcodes: bytes


class View(NamedTuple):
    """A tensor of shape and strides on a storage of its own."""

    values: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def opcodes(value: Any, storages: list[np.ndarray], *, legacy: bool = False) -> bytes:
    """Protocol 2 of a tree of plain values, arrays (as tensors) and `Made`; no memo."""

    def encode(item):
        return opcodes(item, storages, legacy=legacy)

    if isinstance(value, Raw):
        return value.opcodes
    if isinstance(value, View):
        key, kind = str(len(storages)), f"{KINDS[value.values.dtype.name]}Storage"
        storages.append(value.values)
        pid = ("storage", Made("torch", kind, None), key, "cpu", value.values.size)
        storage = Raw(encode((*pid, None) if legacy else pid) + b"Q")
        hooks = Made("collections", "OrderedDict")
        args = (storage, value.offset, value.shape, value.strides, False, hooks)
        return encode(Made("torch._utils", "_rebuild_tensor_v2", args))
    if isinstance(value, Made):
        made = b"c%s\n%s\n" % (value.module.encode(), value.name.encode())
        if value.args is not None:
            made += encode(tuple(value.args)) + b"R"
        return made + (b"" if value.state is None else encode(value.state) + b"b")
    if isinstance(value, np.ndarray):
        strides = tuple(step // value.itemsize for step in value.strides)
        return encode(View(value.ravel(), 0, value.shape, strides))
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    return pickle.dumps(value, 2)[2:-1]


def zip_bytes(tree: Any, *, byteorder: bytes | None = b"little", mutate: Any = None) -> bytes:
    """A zip checkpoint; ``mutate(pickle)`` may change the pickle first."""
    storages: list[np.ndarray] = []
    content = b"\x80\x02" + opcodes(tree, storages) + b"."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("net/data.pkl", content if mutate is None else mutate(content))
        if byteorder is not None:
            archive.writestr("net/byteorder", byteorder)
        for key, values in enumerate(storages):
            archive.writestr(f"net/data/{key}", values.tobytes())
    return out.getvalue()


def legacy_bytes(tree: Any, *, mutate: Any = None) -> bytes:
    """A legacy checkpoint; ``mutate(pickle)`` may change the pickle first."""
    storages: list[np.ndarray] = []
    content = b"\x80\x02" + opcodes(tree, storages, legacy=True) + b"."
    head = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True})]
    keys = pickle.dumps([str(key) for key in range(len(storages))], 2)
    raw = [values.size.to_bytes(8, "little") + values.tobytes() for values in storages]
    content = content if mutate is None else mutate(content)
    return b"".join([*head, content, keys, *raw])
