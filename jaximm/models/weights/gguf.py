"""GGUF files (llama.cpp): metadata, and tensors in full or block-quantised numbers.

A file is ``GGUF``, a version, two counts, the metadata, the table of tensors, and after padding the
tensors' bytes. It is mapped, not read: only what is dequantised takes memory. Every count and every
length is held against the bytes that are left before it is believed.

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ``ggml-quants.c`` there.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaximm.models.weights.errors import Refusal, reading, shown

_NUMBERS = dict(
    zip(
        (0, 1, 2, 3, 4, 5, 6, 10, 11, 12),
        ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8"),
        strict=True,
    )
)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NAME = 64 << 10
"""Bytes of a key or a tensor's name."""


class GgufTensor(NamedTuple):
    """A tensor as it lies in the file.

    Attributes:
      kind: "F32", "Q4_1" and so on.
      shape: as NumPy has it, a linear map [out, in]; the file lists it the other way round.
      raw: its bytes.
    """

    kind: str
    shape: tuple[int, ...]
    raw: np.ndarray


class Gguf(NamedTuple):
    """A file: its name, its metadata by key, its tensors by name."""

    name: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def open_gguf(path: str | Path) -> Gguf:
    """Metadata and table of a GGUF file of version 2 or 3, little-endian; tensors stay on disk.

    Arrays of numbers are NumPy arrays, arrays of texts are lists.

    Raises:
      WeightFileError: naming the file: not there, malformed, truncated, of another version, or with
        tensors of a quantisation that is not read.
    """
    path = Path(path)
    with reading(path):
        cursor = _Cursor(np.asarray(np.memmap(path, np.uint8, mode="r")))
        if bytes(cursor.take(4)) != b"GGUF":
            raise Refusal("it is not of GGUF", "give a .gguf file")
        version = cursor.number("<u4")
        if version not in (2, 3):
            raise Refusal(f"it is of version {version}", "convert it to version 3, little-endian")
        tensors, pairs = (cursor.number("<u8") for _ in range(2))
        cursor.expect(tensors * 24 + pairs * 12, "tables")  # the least that an entry takes
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text(_NAME)
            if key in metadata:
                raise Refusal(f"two entries are named {shown(key)}")
            metadata[key] = cursor.value(key)
        table = [_table_entry(cursor) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise Refusal(f"general.alignment is {shown(str(alignment))}")
        start = -(-cursor.at // alignment) * alignment
        return Gguf(path.name, metadata, _tensors(cursor.content, table, start, alignment))


def read_gguf(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF file by name, quantised ones as float32.

    Raises:
      WeightFileError: as `open_gguf`.
    """
    return {name: dequantise(tensor) for name, tensor in open_gguf(path).tensors.items()}


def dequantise(tensor: GgufTensor) -> np.ndarray:
    """A tensor's numbers: float32 of quantised ones; F32, F16 and BF16 views of the file.

    Of a block with scale d and offset m: Q4_0 d (q - 8), Q4_1 d q + m, Q8_0 d q; Q4_K d s q - m t
    and Q6_K d s (q - 32) with a small integer s (and t) for each 32 or 16 numbers.
    """
    kind = _KINDS[tensor.kind]
    if kind.decode is None:
        return tensor.raw.view(kind.dtype).reshape(tensor.shape)
    return kind.decode(tensor.raw.reshape(-1, kind.size)).reshape(tensor.shape)


def number_type(tensor: GgufTensor) -> Any:
    """The dtype that `dequantise` gives."""
    kind = _KINDS[tensor.kind]
    return kind.dtype if kind.decode is None else np.dtype(np.float32)


def describe_precision(file: Gguf) -> str:
    """Which numbers the file holds, the lowest precision first, for whoever reports a result.

    "4-bit weights; tensors and share of numbers: Q4_1 210 (78.9%), Q8_0 1 (21.0%), F32 61 (0.0%)".
    """
    sizes: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for tensor in file.tensors.values():
        sizes[tensor.kind] += math.prod(tensor.shape)
        counts[tensor.kind] += 1
    if not counts:
        return "no weights"
    kinds = sorted(counts, key=lambda kind: _KINDS[kind].bits)
    shares = (f"{kind} {counts[kind]} ({sizes[kind] / sizes.total():.1%})" for kind in kinds)
    return f"{_KINDS[kinds[0]].bits}-bit weights; tensors and share of numbers: {', '.join(shares)}"


class _Cursor:
    """A place in a file's bytes that cannot leave them."""

    def __init__(self, content: np.ndarray):
        self.content, self.at = content, 0

    def expect(self, count: int, what: str) -> None:
        """Refuses a count of bytes that are not there."""
        if count > len(self.content) - self.at:
            raise Refusal(f"it ends before its {what}, {count} bytes at {self.at}")

    def take(self, count: int, what: str = "metadata") -> np.ndarray:
        """The next bytes."""
        self.expect(count, what)
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, dtype: str) -> Any:
        """The next number."""
        return self.take(int(dtype[2])).view(dtype)[0].item()

    def text(self, limit: int | None = None) -> str:
        """The next length and text."""
        length = self.number("<u8")
        if limit is not None and length > limit:
            raise Refusal(f"a name has {length} bytes")
        return bytes(self.take(length)).decode("utf-8")

    def value(self, key: str) -> Any:
        """The next kind and value; a list holds numbers or texts, no lists."""
        kind = self.number("<u4")
        if kind != _ARRAY:
            return self._plain(kind, key)
        kind, length = self.number("<u4"), self.number("<u8")
        if kind == _STRING:
            self.expect(8 * length, f"list {shown(key)}")
            return [self.text() for _ in range(length)]
        dtype = "?" if kind == _BOOL else _NUMBERS.get(kind)
        if dtype is None:
            raise Refusal(f"{shown(key)} is a list of kind {kind}, which is not read")
        return self.take(length * np.dtype(dtype).itemsize, f"list {shown(key)}").view(dtype)

    def _plain(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _BOOL:
            return self.number("<u1") != 0
        if kind not in _NUMBERS:
            raise Refusal(f"{shown(key)} is of kind {kind}, which is not read")
        return self.number(_NUMBERS[kind])


def _table_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the kind and offset of the next tensor."""
    name = cursor.text(_NAME)
    rank = cursor.number("<u4")
    if not 1 <= rank <= 4:
        raise Refusal(f"{shown(name)} has {rank} axes")
    shape = tuple(cursor.number("<u8") for _ in range(rank))[::-1]
    return name, shape, cursor.number("<u4"), cursor.number("<u8")


def _tensors(content, table, start: int, alignment: int) -> dict[str, GgufTensor]:
    """Tensors by name, each within the file, together no larger than it."""
    numbers = {kind.number: name for name, kind in _KINDS.items()}
    tensors: dict[str, GgufTensor] = {}
    left = len(content)
    for name, shape, number, offset in table:
        if name in tensors:
            raise Refusal(f"two tensors are named {shown(name)}")
        if number not in numbers:
            raise Refusal(
                f"{shown(name)} is of ggml's kind {number}, which is not read",
                f"convert it to one of {', '.join(_KINDS)}",
            )
        kind = _KINDS[numbers[number]]
        if min(shape) < 1 or shape[-1] % kind.values:
            raise Refusal(
                f"{shown(name)} has shape {list(shape)}, whose rows are no blocks of {kind.values}"
            )
        size = math.prod(shape) // kind.values * kind.size
        left -= size
        # The sum as well: a thousand names for the same bytes would unpack to a thousand times.
        if offset % alignment or start + offset + size > len(content) or left < 0:
            raise Refusal(
                f"{shown(name)}, {size} bytes at {start + offset}, does not lie in its "
                f"{len(content)} bytes"
            )
        raw = np.asarray(content[start + offset : start + offset + size])
        tensors[name] = GgufTensor(numbers[number], shape, raw)
    return tensors


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a place of each block, as a column of float32."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., k] bytes to [..., 2 k] numbers: all lower halves, then all upper ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    out = _nibbles(blocks[:, 2:]).astype(np.float32)
    out -= 8
    out *= _half(blocks, 0)
    return out


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    out = _nibbles(blocks[:, 4:]).astype(np.float32)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)
    return out


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    out = blocks[:, 2:].view(np.int8).astype(np.float32)
    out *= _half(blocks, 0)
    return out


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, 4:16]  # eight scales and eight offsets of 6 bits
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    out = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).astype(np.float32)
    out *= (_half(blocks, 0) * scales)[:, :, None]
    out -= (_half(blocks, 2) * offsets)[:, :, None]
    return out


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    # Two halves of 128 numbers: lower 4 bits [2, 64] as nibbles, upper 2 bits [2, 32], four a byte.
    lower = _nibbles(blocks[:, :128].reshape(-1, 2, 64))
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    numbers = lower | (upper & 3).reshape(lower.shape) << 4
    out = numbers.reshape(-1, 16, 16).astype(np.float32)
    out -= 32
    out *= (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[:, :, None]
    return out


class _Kind(NamedTuple):
    """A kind of numbers: ggml's, bits of one, numbers and bytes of a block."""

    number: int
    bits: int
    values: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    dtype: Any = None


_KINDS = {
    "F32": _Kind(0, 32, 1, 4, dtype=np.dtype("<f4")),
    "F16": _Kind(1, 16, 1, 2, dtype=np.dtype("<f2")),
    "BF16": _Kind(30, 16, 1, 2, dtype=np.dtype(ml_dtypes.bfloat16)),
    "Q4_0": _Kind(2, 4, 32, 18, _q4_0),
    "Q4_1": _Kind(3, 4, 32, 20, _q4_1),
    "Q8_0": _Kind(8, 8, 32, 34, _q8_0),
    "Q4_K": _Kind(12, 4, 256, 144, _q4_k),
    "Q6_K": _Kind(14, 6, 256, 210, _q6_k),
}
