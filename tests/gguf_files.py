"""GGUF files for the tests, written from the format's description."""

import struct

import numpy as np

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(value):
    """A value with the number of its kind before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, U32, len(value)) + value.astype("<u4").tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text, value))


def gguf_bytes(metadata, tensors, *, version=3):
    """A file of ``{key: value}`` and ``{name: (number of the kind, shape, bytes)}``."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + typed(value) for key, value in metadata.items())
    body = b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + body


def plain(arrays):
    """Tensors of float32 arrays by name."""
    return {k: (0, v.shape, v.astype("<f4").tobytes()) for k, v in arrays.items()}
