"""GGUF: each quantisation against ggml's loops, what a file says of itself, and what is refused."""

import struct

import gguf_files
import numpy as np
import pytest

from jaximm.models.weights import WeightFileError, read_weights
from jaximm.models.weights.gguf import dequantise, describe_precision, open_gguf


def half(block, at):
    return float(np.frombuffer(block, "<f2", 1, at)[0])


def q4_0(block):
    return [
        half(block, 0) * ((block[2 + j] & 15 if low else block[2 + j] >> 4) - 8)
        for low in (True, False)
        for j in range(16)
    ]


def q4_1(block):
    return [
        half(block, 0) * (block[4 + j] & 15 if low else block[4 + j] >> 4) + half(block, 2)
        for low in (True, False)
        for j in range(16)
    ]


def q8_0(block):
    return [half(block, 0) * value for value in struct.unpack("<32b", block[2:])]


def q4_k(block):
    """dequantize_row_q4_K of ggml-quants.c."""
    scales, packed, out = block[4:16], block[16:], []
    for j in range(8):
        if j < 4:
            scale, offset = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4)
            offset = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)
        for k in range(32):
            byte = packed[32 * (j // 2) + k]
            number = byte >> 4 if j % 2 else byte & 15
            out.append(half(block, 0) * scale * number - half(block, 2) * offset)
    return out


def q6_k(block):
    """dequantize_row_q6_K of ggml-quants.c."""
    out = [0.0] * 256
    scales = struct.unpack("<16b", block[192:208])
    for part in range(2):
        lower, upper = block[64 * part :], block[128 + 32 * part :]
        for k in range(32):
            numbers = (
                (lower[k] & 15) | ((upper[k] & 3) << 4),
                (lower[k + 32] & 15) | (((upper[k] >> 2) & 3) << 4),
                (lower[k] >> 4) | (((upper[k] >> 4) & 3) << 4),
                (lower[k + 32] >> 4) | (((upper[k] >> 6) & 3) << 4),
            )
            for row, number in enumerate(numbers):
                scale = scales[8 * part + k // 16 + 2 * row]
                out[128 * part + 32 * row + k] = half(block, 208) * scale * (number - 32)
    return out


QUANTISED = {  # ggml's number, values and bytes of a block, places of its float16, its loop
    "Q4_0": (2, 32, 18, (0,), q4_0),
    "Q4_1": (3, 32, 20, (0, 2), q4_1),
    "Q8_0": (8, 32, 34, (0,), q8_0),
    "Q4_K": (12, 256, 144, (0, 2), q4_k),
    "Q6_K": (14, 256, 210, (208,), q6_k),
}


def blocks_of(kind, count, seed=0):
    _, _, size, halves, _ = QUANTISED[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = rng.normal(size=(count, 1)).astype("<f2").view(np.uint8)
    return blocks.tobytes()


def small_content():
    """A file with a tensor of every quantisation and metadata of several kinds."""
    tensors = {
        kind: (number, (3, 2 * values), blocks_of(kind, 6))
        for kind, (number, values, *_) in QUANTISED.items()
    } | gguf_files.plain({"norm": np.arange(5.0)})
    metadata = {
        "general.architecture": "llama",
        "count": 7,
        "share": 0.5,
        "names": ["a", "bé", ""],
        "kinds": np.arange(4),
    }
    return gguf_files.gguf_bytes(metadata, tensors)


def small_file(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(small_content())
    return path


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_blocks_are_those_of_ggmls_loops(kind, tmp_path):
    _, values, size, _, loop = QUANTISED[kind]
    tensor = open_gguf(small_file(tmp_path)).tensors[kind]
    content = tensor.raw.tobytes()
    expected = [loop(content[at : at + size]) for at in range(0, len(content), size)]
    found = dequantise(tensor)
    assert found.dtype == np.float32
    # float32 after float64: a rounding each of a product, a sum.
    np.testing.assert_allclose(found, np.reshape(expected, (3, 2 * values)), rtol=1e-5, atol=1e-5)


def test_metadata_and_plain_tensors_are_read(tmp_path):
    file = open_gguf(small_file(tmp_path))
    kinds = file.metadata.pop("kinds")
    assert file.metadata == {
        "general.architecture": "llama",
        "count": 7,
        "share": 0.5,
        "names": ["a", "bé", ""],
    }
    np.testing.assert_array_equal(kinds, np.arange(4))
    arrays = read_weights(small_file(tmp_path))  # told by its content
    assert set(arrays) == {*QUANTISED, "norm"}
    np.testing.assert_array_equal(arrays["norm"], np.arange(5, dtype=np.float32))


def test_the_precision_is_said_lowest_first(tmp_path):
    path = tmp_path / "two.gguf"
    tensors = {"a": (3, (96, 32), blocks_of("Q4_1", 96)), **gguf_files.plain({"b": np.ones(1024)})}
    path.write_bytes(gguf_files.gguf_bytes({}, tensors))
    said = describe_precision(open_gguf(path))
    assert said == "4-bit weights; tensors and share of numbers: Q4_1 1 (75.0%), F32 1 (25.0%)"


def test_what_is_refused_names_file_place_and_remedy(tmp_path):
    good = small_file(tmp_path).read_bytes()
    one = (0, (4,), bytes(16))
    cases = {
        "version": (gguf_files.gguf_bytes({}, {}, version=4), r"version 4; convert it"),
        "turned": (good[:4] + struct.pack(">I", 3) + good[8:], r"version 50331648"),
        "short": (good[:-200], r"does not lie in its"),
        "head": (good[:60], r"ends before its"),
        "many": (good[:8] + struct.pack("<Q", 2**60) + good[16:], r"ends before its tables"),
        "kind": (
            gguf_files.gguf_bytes({}, {"w": (16, (4,), bytes(16))}),
            r"w is of ggml's kind 16",
        ),
        "rows": (gguf_files.gguf_bytes({}, {"w": (8, (2, 33), bytes(80))}), r"no blocks of 32"),
        "axes": (gguf_files.gguf_bytes({}, {"w": (0, (1,) * 5, bytes(4))}), r"w has 5 axes"),
        "empty": (gguf_files.gguf_bytes({}, {"w": (0, (0,), b"")}), r"w has shape \[0\]"),
        "align": (gguf_files.gguf_bytes({"general.alignment": 0}, {"w": one}), r"alignment is 0"),
        "magic": (b"GGUX" + good[4:], r"not of GGUF"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(WeightFileError, match=rf"{name}.gguf cannot be read: .*{message}"):
            open_gguf(path)


def test_many_names_of_the_same_bytes_are_refused(tmp_path):
    """They would unpack to a multiple of the file."""
    content = gguf_files.gguf_bytes({}, {f"w{i}": (0, (64,), bytes(256)) for i in range(9)})
    entries = [content.index(gguf_files.text(f"w{i}")) for i in range(9)]
    mutant = bytearray(content)
    for at in entries:
        mutant[at + 26 : at + 34] = bytes(8)  # every offset 0
    path = tmp_path / "same.gguf"
    path.write_bytes(bytes(mutant[: -8 * 256]))
    with pytest.raises(WeightFileError, match="does not lie in its"):
        open_gguf(path)
