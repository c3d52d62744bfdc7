"""Every reader of weights against damaged files, in a process of its own with bounds on it.

Mutants are by bytes, and by structure: opcodes of pickles, fields of zip directories, heads of
safetensors and npy, fields of ONNX, numbers in the tables of GGUF. A mutant may be read or refused
by `WeightFileError`, within 10 s and 1 GB; it ends no process and raises nothing else.
"""

import io
import json
import pickle
import pickletools
import struct
import zipfile

import fuzz_worker
import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch_files
from torch_files import Made, View

from jaximm.models.weights import read_safetensors_metadata, read_weights
from tests.models.test_weights import onnx_model
from tests.models.test_weights_gguf import small_content

GATE, MANY = 100, 4000

ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "conv.bias": np.ones(2, np.float16),
    "norm.running_var": np.ones(2, np.float64),
    "count": np.array(7, np.int64),
}
TREE = {
    "state_dict": ARRAYS
    | {"part": View(np.arange(9, dtype=np.float32), 1, (2, 3), (3, 1))}
    | {"table": Made("torch._utils", "_rebuild_parameter", (np.zeros((3, 2), np.float32), True))},
    "epoch": 3,
    "args": Made("argparse", "Namespace", (), {"lr": 0.1}),
    "optimizer": {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}, "param_groups": [{"lr": 1}]},
}

HOSTILE = (
    *(b"2", b"0", b"1", b"(", b"t", b"R", b"b", b"Q", b"\x94", b"\x85", b"\x86", b"\x87", b"\x81"),
    *(b"l", b"d", b"}", b"]", b"u", b"s", b"e", b"a", b"o", b"\x90", b"\x91", b"\x92", b"\x93"),
    *(b"\x85" * 5000, b"(" * 5000, b"]" * 3000 + b"a" * 2999, b"2\x86" * 40, b"2\x86" * 40 + b"Q"),
    b")" + b"\x85" * 4000 + b"Ns",
    b")" + b"2\x86" * 50 + b"Ns",
    *(b"r" + struct.pack("<I", size) for size in (2**31 - 1, 2**32 - 1)),
    *(b"j" + struct.pack("<I", size) for size in (1, 2**32 - 1)),
    *(op + struct.pack("<I", 2**31 - 1) for op in (b"X", b"B", b"T", b"\x8b")),
    *(op + struct.pack("<Q", 2**62) for op in (b"\x8d", b"\x8e", b"\x96")),
    *(b"\x8a" + bytes([n]) + b"\xff" * n for n in (1, 8, 255)),
    *(b"c%s\n" % name for name in (b"os\nsystem", b"builtins\neval", b"torch\nFloatStorage")),
    *(b"c%s\n" % name for name in (b"numpy\ndtype", b"numpy\nndarray", b"torch\nSize")),
    b"cnumpy.core.multiarray\n_reconstruct\n)R",
    *(b"ios\nsystem\n", b"\x82\x01", b"\x97", b"\x98", b"P1\n", b"I" + b"9" * 4000 + b"\n"),
    *(b"G\xff\xf0\0\0\0\0\0\0", b"F1e999\n", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff"),
)


def by_opcodes(content, rng):
    """A pickle with opcodes left out, repeated, moved, or with hostile ones put in."""
    starts = [at for _, _, at in pickletools.genops(content)]
    parts = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            parts.insert(at, parts[rng.randrange(len(parts))])
        elif kind == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts.insert(at, rng.choice(HOSTILE) * rng.choice((1, 1, 1, 30)))
        parts = parts or [b"."]
    return b"".join(parts)


def by_directory(content, rng):
    """A zip file with fields of its directory, its local heads or its end record changed."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        sign, width = rng.choice(((b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)))
        places = [at for at in range(len(made) - width) if made[at : at + 4] == sign]
        if places:
            at, size = rng.choice(places) + rng.randrange(4, width - 4), rng.choice((1, 2, 4))
            value = rng.choice((0, 1, 8, 12, 14, 255, 2**16 - 1, 2**31, 2**32 - 1))
            made[at : at + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(made)


def by_members(content, rng):
    """A zip file, well formed, with a member's content damaged, or named or packed otherwise."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        victim = rng.randrange(len(old.namelist()))
        for index, name in enumerate(old.namelist()):
            body, kind = old.read(name), zipfile.ZIP_STORED
            if index == victim:
                choice = rng.randrange(6)
                if choice == 0:
                    continue
                if choice == 1:
                    name = rng.choice(("/", "../x", "net/data.pkl", "a" * 3000))
                body = b"\0" * 3_000_000 if choice == 2 else fuzz_worker.flip(body, rng)
                kind = rng.choice((0, 8, 12, 14)) if choice == 3 else kind
            new.writestr(name, body, kind)
    return out.getvalue()


JSON_VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**53, 2**64 - 1, 2**70, 1e308, "", "F32", "F8_E4M3", "BF16"),
    *([], [0], [-1], [2**40, 2**40], [1] * 70, [0, 2**63], [2**64 - 1, 2**64 - 1], {}, [[]]),
)


def by_head(content, rng):
    """A safetensors file with a value of its head replaced or nested, or its length changed."""
    size = int.from_bytes(content[:8], "little")
    head, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = rng.choice(list(head))
    choice = rng.randrange(5)
    if choice < 3 and isinstance(head[name], dict):
        head[name][rng.choice(("dtype", "shape", "data_offsets", "x"))] = rng.choice(JSON_VALUES)
    elif choice == 3:
        head[rng.choice(("", "__metadata__", "a" * 5000, "\0"))] = rng.choice(JSON_VALUES)
    text = json.dumps(head)
    if choice == 4:
        nested = rng.choice(("[", '{"a":')) * rng.choice((50, 200, 5000))
        text = rng.choice((text[:-1] + ',"b":' + nested, text.replace("}", "},", 1), text + nested))
    length = len(text) if rng.random() < 0.8 else rng.choice((0, 1, 2**31, 2**40, len(text) - 1))
    return length.to_bytes(8, "little") + text.encode() + body


NPY_HEADS = (
    *(
        repr({"descr": descr, "fortran_order": order, "shape": shape})
        for descr, order, shape in (
            *(("<f4", False, shape) for shape in ((-1,), (2**40,), (3,), (0, 2**9), (1,) * 2000)),
            *((descr, False, (2,)) for descr in ("O", "|V8", "<U9", "M8", "", [("a", "O")])),
            ("<f4", 7, (2**62, 2**62)),
        )
    ),
    *("(" * 300 + ")" * 300, "-" * 9000 + "1", "[" * 9000, "{" * 150, "'" * 9000, "", "\0" * 64),
)


def by_npy(content, rng):
    """An npz file, well formed as a zip, with the head of one array changed."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(out, "w", rng.choice((0, 8))) as new,
    ):
        victim = rng.choice(old.namelist())
        for name in old.namelist():
            body = old.read(name)
            if name == victim:
                text = rng.choice(NPY_HEADS).encode("latin1") + b"\n"
                version = rng.choice((1, 1, 1, 2, 3, 255))
                size = struct.pack("<H" if version == 1 else "<I", len(text))
                body = b"\x93NUMPY" + bytes([version, 0]) + size + text + body[128:]
            new.writestr(name, body)
    return out.getvalue()


def by_fields(content, rng):
    """An ONNX model with fields of its tensors or nodes set to what does not fit."""
    model = onnx.ModelProto.FromString(content)
    for _ in range(rng.randint(1, 3)):
        tensor = rng.choice(model.graph.initializer)
        choice = rng.randrange(9)
        if choice == 0:
            tensor.dims[:] = rng.choice(([-1], [2**40], [2**62, 4], [0], [], [1] * 70, [2, 3]))
        elif choice == 1:
            tensor.data_type = rng.choice((*range(-1, 28), 99, 2**31 - 1))
        elif choice == 2:
            tensor.raw_data = rng.randbytes(rng.randrange(40))
        elif choice == 3:
            tensor.ClearField("raw_data")
            tensor.float_data[:] = [1.0] * rng.randrange(5)
        elif choice == 4:
            tensor.data_location = 1
        elif choice == 5:
            tensor.name = rng.choice(("", "onnx::MatMul_7", model.graph.initializer[0].name))
        elif choice == 6:
            tensor.string_data.append(b"\xff\xfe")
        elif choice == 7:
            model.graph.initializer.append(tensor)
        else:
            node = rng.choice(model.graph.node)
            node.name = rng.choice(("", "/", "//////", "a" * 3000, "/embeddings/x"))
    return model.SerializeToString()


def by_numbers(content, rng):
    """A GGUF file with some numbers of its metadata and tables changed; its tensors stay."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(4, 700), rng.choice((1, 4, 8))
        value = rng.choice((0, 1, 3, 8, 9, 14, 255, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1))
        made[at : at + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(made)


def seeds():
    """``{reader: (suffix, whole files, [mutator by structure, ...])}``"""
    npz = io.BytesIO()
    np.savez(npz, **ARRAYS)
    packed = io.BytesIO()
    np.savez_compressed(packed, **ARRAYS)
    onnx_file = onnx_model(
        ARRAYS | {"onnx::MatMul_7": np.ones((2, 3), np.float32)},
        [("MatMul", "/layer.0/fc/MatMul", ["x", "onnx::MatMul_7"])],
    )
    tree = {"conv1": [ARRAYS["conv.weight"], np.ones(2)], "epoch": 3, "lr": np.float64(0.1)}

    def in_zip(_, rng):
        return torch_files.zip_bytes(TREE, mutate=lambda content: by_opcodes(content, rng))

    def in_legacy(_, rng):
        return torch_files.legacy_bytes(TREE, mutate=lambda content: by_opcodes(content, rng))

    return {
        "zip": (".pth", [torch_files.zip_bytes(TREE)], [in_zip, by_directory, by_members]),
        "legacy": (".pth", [torch_files.legacy_bytes(TREE)], [in_legacy]),
        "pickle": (".pkl", [pickle.dumps(tree, protocol) for protocol in (2, 5)], [by_opcodes]),
        "npz": (".npz", [npz.getvalue(), packed.getvalue()], [by_npy, by_directory, by_members]),
        "safetensors": (
            ".safetensors",
            [safetensors.numpy.save(ARRAYS, {"who": "test"})],
            [by_head],
        ),
        "onnx": (".onnx", [onnx_file.SerializeToString()], [by_fields]),
        "gguf": (".gguf", [small_content()], [by_numbers]),
    }


def jobs(count):
    made = {}
    for number, (name, (suffix, files, structural)) in enumerate(seeds().items()):
        by = [fuzz_worker.flip, *structural]
        parts = [
            fuzz_worker.mutants(files, -(-count // len(by)), seed=100 * number + index, by=one)
            for index, one in enumerate(by)
        ]
        mutants = [*files, *(mutant for part in parts for mutant in part)]
        made[name] = fuzz_worker.Job("tests.models.test_weights_fuzz:load", suffix, mutants)
    return made


def load(path):
    """Reads, and copies what was read: a view may claim more than it has."""
    found = read_weights(path)
    assert found
    for key, value in found.items():
        assert type(key) is str
        assert np.array(value).dtype.kind in "fiubV"
    if path.suffix == ".safetensors":
        read_safetensors_metadata(path)


def check(reports, files):
    for name, report in reports.items():
        assert report.others("WeightFileError") == [], name
        whole = len(files[name][1])
        assert report.outcomes[:whole] == [["read"]] * whole
        assert report.refused("WeightFileError") > len(report.outcomes) // 3, name
        assert max(report.seconds) < fuzz_worker.SECONDS
        assert report.grown < fuzz_worker.MEMORY


def test_damaged_files_are_read_or_refused(tmp_path):
    check(fuzz_worker.run_jobs(jobs(GATE), tmp_path), seeds())


@pytest.mark.slow
def test_thousands_of_damaged_files_are_read_or_refused(tmp_path):
    reports = fuzz_worker.run_jobs(jobs(MANY), tmp_path, timeout=3000)
    check(reports, seeds())
    for name, report in reports.items():  # shown by pytest -s
        print(
            f"{name}: {len(report.outcomes)} mutants, {report.refused('WeightFileError')} refused, "
            f"at most {max(report.seconds):.2f} s, {report.grown >> 20} MiB"
        )
