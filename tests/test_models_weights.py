"""Weight files: formats, hostile and torn ones, layouts. The writers here are torch's, by hand."""

import argparse
import collections
import datetime
import decimal
import io
import json
import os
import pathlib
import pickle
import random
import sys
import types
import zipfile

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_files
from torch_files import Made, Raw, View

from jaximm.models.spec import Entry, Layout
from jaximm.models.weights import (
    WeightFileError,
    errors,
    export_state,
    fitting,
    import_state,
    machine,
    read_weights,
)
from jaximm.models.weights.readers import read_safetensors_metadata

KINDS = {"float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16"}
KINDS |= {"int64": "Long", "bool": "Bool"}


class Storage:
    def __init__(self, key, values, claim=None):
        self.key, self.values = key, np.asarray(values)
        self.claim = self.values.size if claim is None else claim


class Tensor:
    def __init__(self, storage, offset, shape, strides):
        self.storage, self.args = storage, (offset, shape, strides)

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (self.storage, *self.args, False, collections.OrderedDict())


def contiguous(key, values):
    values = np.asarray(values)
    strides = tuple(step // values.itemsize for step in values.strides)
    return Tensor(Storage(key, values.ravel()), 0, values.shape, strides)


@pytest.fixture
def torch_names(monkeypatch):
    """Modules that have torch's names, so that a pickle can be written which mentions them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in KINDS.values():
        setattr(torch, f"{kind}Storage", type(f"{kind}Storage", (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*args):
        raise AssertionError("a reader called into torch")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = (
        "torch._utils",
        "_rebuild_tensor_v2",
    )
    setattr(utils, "_rebuild_tensor_v2", _rebuild_tensor_v2)  # noqa: B010 (a module of no type)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


def dump(tree, stream, torch, *, legacy, protocol=2):
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if not isinstance(item, Storage):
                return None
            storages[item.key] = item.values
            kind = getattr(torch, f"{KINDS[item.values.dtype.name]}Storage")
            return ("storage", kind, item.key, "cpu", item.claim, *((None,) if legacy else ()))

    Pickler(stream, protocol).dump(tree)
    return storages


def write_legacy(path, tree, torch, *, little_endian=True, protocol=2):
    with open(path, "wb") as stream:
        pickle.dump(0x1950A86A20F9469CFC6C, stream, protocol)
        pickle.dump(1001, stream, protocol)
        pickle.dump({"protocol_version": 1001, "little_endian": little_endian}, stream, protocol)
        storages = dump(tree, stream, torch, legacy=True, protocol=protocol)
        pickle.dump(sorted(storages), stream, protocol)
        for key in sorted(storages):
            stream.write(storages[key].size.to_bytes(8, "little") + storages[key].tobytes())
    return path


def write_zip(path, tree, torch, *, byteorder=b"little", protocol=2):
    stream = io.BytesIO()
    storages = dump(tree, stream, torch, legacy=False, protocol=protocol)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", stream.getvalue())
        archive.writestr("net/byteorder", byteorder)
        for key, values in storages.items():
            archive.writestr(f"net/data/{key}", values.tobytes())
    return path


WRITERS = {"legacy": write_legacy, "zip": write_zip}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_torch_files_keep_strides_views_and_dtypes(form, protocol, tmp_path, torch_names):
    base = np.arange(24, dtype=np.float32)
    shared = Storage("0", base)
    tree = {
        "whole": Tensor(shared, 0, (4, 6), (6, 1)),
        "transposed": Tensor(shared, 0, (6, 4), (1, 6)),
        "part": Tensor(shared, 7, (2, 3), (6, 2)),
        "expanded": Tensor(shared, 5, (3, 2), (0, 1)),
        "empty": Tensor(shared, 24, (0, 3), (3, 1)),
        "half": contiguous("1", np.array([0.5, -2], np.float16)),
        "brain": contiguous("2", np.array([0.5, -2], ml_dtypes.bfloat16)),
        "count": contiguous("3", np.array(7, np.int64)),
    }
    path = WRITERS[form](tmp_path / "w.pth", tree, torch_names, protocol=protocol)
    found = read_weights(path)
    square = base.reshape(4, 6)
    expected = {
        "whole": square,
        "transposed": square.T,
        "part": square[1:3, 1::2],
        "expanded": np.stack([base[5:7]] * 3),
        "empty": np.zeros((0, 3), np.float32),
        "half": np.array([0.5, -2], np.float16),
        "brain": np.array([0.5, -2], ml_dtypes.bfloat16),
        "count": np.array(7),
    }
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value)
    assert np.shares_memory(found["whole"], found["part"])
    assert not found["expanded"].flags.writeable


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_wrapped_state_dicts_are_unwrapped(form, wrapper, tmp_path, torch_names):
    state = {"module.a.weight": contiguous("0", np.ones((2, 3), np.float32))}
    rest = {"epoch": 3, "optimizer": [{"m": contiguous("1", np.zeros(4, np.float32))}]}
    tree = state if wrapper is None else {wrapper: state, **rest}
    found = read_weights(WRITERS[form](tmp_path / "w.pt", tree, torch_names))
    assert list(found) == ["a.weight"]
    # Only a prefix of all: a network may have a part that is named so.
    tree = {**state, "b": contiguous("2", np.zeros(1, np.float32))}
    found = read_weights(WRITERS[form](tmp_path / "v.pt", tree, torch_names))
    assert set(found) == {"module.a.weight", "b"}


class Attack:
    """Reduces to a call that leaves a trace."""

    def __init__(self, fun, *args):
        self.call = (fun, args)

    def __reduce__(self):
        return self.call


def attacks(trace):
    """Pickle bytes that would make `trace` if a global of theirs were called, and that global."""
    command = f"touch {trace}"
    code = f"open({str(trace)!r}, 'w')"
    protocol0 = f"cposix\nsystem\n(S'{command}'\ntR."
    return {
        "os.system": (pickle.dumps(Attack(os.system, command), 2), "posix.system"),
        "eval": (pickle.dumps({"a": Attack(eval, code)}, 2), "__builtin__.eval"),
        "eval4": (pickle.dumps({"a": [Attack(eval, code)]}, 4), "builtins.eval"),
        "exec": (pickle.dumps(Attack(exec, code), 4), "builtins.exec"),
        "posix": (b"\x80\x02" + protocol0.encode(), "posix.system"),
        "nested load": (
            b"\x80\x02ctorch.storage\n_load_from_bytes\nq\x00C\x02hiq\x01\x85R.",
            "torch.storage._load_from_bytes",
        ),
        # The name of an allowed module does not open what it imports.
        "dotted": (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", "torch.os.system"),
        "numpy": (b"\x80\x02cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        "getattr": (b"\x80\x02c__builtin__\ngetattr\n.", "__builtin__.getattr"),
        "instance": (b"\x80\x02(X\x01\x00\x00\x00aiposix\nsystem\n.", "posix.system"),
    }


@pytest.mark.parametrize("attack", attacks("x"))
@pytest.mark.parametrize("form", ["plain", "legacy", "zip"])
def test_hostile_pickles_are_refused_and_nothing_runs(attack, form, tmp_path):
    trace = tmp_path / "trace"
    content, named = attacks(trace)[attack]
    path = tmp_path / "evil.pth"
    if form == "legacy":
        head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        content = b"".join(pickle.dumps(part, 2) for part in head) + content
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net/data.pkl", content)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read.*not allowed") as error:
        read_weights(path)
    assert f"global {named}," in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("form", WRITERS)
def test_a_hostile_object_among_good_tensors_is_refused(form, tmp_path, torch_names):
    trace = tmp_path / "trace"
    good = contiguous("0", np.ones(3, np.float32))
    for tree in (
        {"a": good, "b": Attack(os.system, f"touch {trace}")},
        {"state_dict": {"a": good}, "optimizer": Attack(os.system, f"touch {trace}")},
    ):
        path = WRITERS[form](tmp_path / "w.pth", tree, torch_names)
        with pytest.raises(ValueError, match=r"w.pth.*posix.system"):
            read_weights(path)
    assert not trace.exists()


def test_the_attacks_would_run_in_a_plain_unpickler(tmp_path):
    trace = tmp_path / "trace"
    pickle.loads(attacks(trace)["eval4"][0])
    assert trace.exists()


def test_a_pickle_cannot_alter_what_it_may_call(tmp_path, torch_names):
    # BUILD sets attributes of whatever lies on the stack, a global included.
    good = write_zip(
        tmp_path / "good.pth", {"a": contiguous("0", np.ones(2, np.float32))}, torch_names
    )
    slots = pickle.dumps((None, {"fun": "x", "__defaults__": (1,), "__call__": "y"}), 2)[2:-1]
    fields = pickle.dumps({"fun": "x", "__call__": "y"}, 2)[2:-1]
    names = ("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict")
    for name in names:
        for state in (slots, fields):
            module, _, attribute = name.partition(" ")
            evil = b"\x80\x02c%s\n%s\n" % (module.encode(), attribute.encode()) + state + b"b."
            path = tmp_path / "evil.pth"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("net/data.pkl", evil)
            with pytest.raises(ValueError, match=r"evil\.pth"):
                read_weights(path)
            np.testing.assert_array_equal(read_weights(good)["a"], [1, 1])


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(Storage("0", np.ones(6, np.float32)), 0, (2, 4), (4, 1)), "reaches number 7 of"),
        (Tensor(Storage("0", np.ones(6, np.float32)), 3, (2, 2), (2, 1)), "reaches number 6 of"),
        (Tensor(Storage("0", np.ones(6, np.float32)), -1, (2,), (1,)), "malformed tensor"),
        (Tensor(Storage("0", np.ones(6, np.float32)), 5, (3,), (-1,)), "malformed tensor"),
        (Tensor(Storage("0", np.ones(6, np.float32)), 0, (3,), (1, 1)), "with strides"),
        (Tensor(Storage("0", np.ones(6, np.float32), 9), 0, (9,), (1,)), "holds 6 numbers, 9 are"),
        (Tensor(Storage("0", np.ones(6, np.float32), -2), 0, (2,), (1,)), "malformed storage"),
        (3, "a is a int, not an array"),
        ("text", "a is a str"),
    ],
)
def test_inconsistent_tensors_are_refused(form, tensor, message, tmp_path, torch_names):
    path = WRITERS[form](tmp_path / "w.pth", {"a": tensor}, torch_names)
    with pytest.raises(ValueError, match=rf"w\.pth cannot be read: .*{message}"):
        read_weights(path)


def test_containers_within_themselves_are_refused(tmp_path):
    loop: list = []
    loop.append(loop)
    nested = [np.ones(1)]
    for _ in range(60):
        nested = [nested, nested]  # 2^60 leaves when flattened
    for tree in ({"a": loop}, {"a": nested}):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(tree, 3))
        with pytest.raises(ValueError, match=r"w\.pkl"):
            read_weights(tmp_path / "w.pkl")


@pytest.mark.parametrize("form", WRITERS)
def test_other_byte_orders_and_forms_are_refused(form, tmp_path, torch_names):
    tree = {"a": contiguous("0", np.ones(2, np.float32))}
    other = {"little_endian": False} if form == "legacy" else {"byteorder": b"big"}
    with pytest.raises(ValueError, match=r"w\.pth cannot be read: .*(endian|byte order)"):
        read_weights(WRITERS[form](tmp_path / "w.pth", tree, torch_names, **other))
    with pytest.raises(ValueError, match=r"w\.pth.*holds a list"):
        read_weights(WRITERS[form](tmp_path / "w.pth", [tree["a"]], torch_names))


@pytest.mark.parametrize("form", ["legacy", "zip", "pickle", "safetensors", "npz", "onnx"])
def test_truncated_files_are_refused_by_name(form, tmp_path, torch_names):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "whole"
    if form in WRITERS:
        WRITERS[form](path, {"a": contiguous("0", values)}, torch_names)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"a": [values]}, 3))
    elif form == "safetensors":
        safetensors.numpy.save_file({"a": values}, path)
    elif form == "npz":
        with open(path, "wb") as stream:
            np.savez(stream, a=values)
    else:
        path.write_bytes(onnx_model({"a": values}, []).SerializeToString())
    content = path.read_bytes()
    assert next(iter(read_weights(path).values())).shape == (3, 4)
    torn = tmp_path / "torn.bin"
    for size in (*range(0, 40, 3), len(content) // 2, len(content) - 20, len(content) - 1):
        torn.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"torn\.bin"):
            read_weights(torn)


@hypothesis.given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x08"])
)
def test_any_bytes_are_refused_by_name(tmp_path_factory, content, head):
    path = tmp_path_factory.mktemp("fuzz") / "f.bin"
    path.write_bytes(head + content)
    with pytest.raises(ValueError, match=r"f\.bin"):
        read_weights(path)


@pytest.mark.parametrize("first", [0x80, 0x08, 0x50])
def test_a_safetensors_head_may_begin_like_another_format(first, tmp_path):
    for pad in range(256):
        path = tmp_path / f"{pad}.safetensors"
        safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, path, {"pad": "x" * 8 * pad})
        if path.read_bytes()[0] == first:
            np.testing.assert_array_equal(read_weights(path)["a"], [1, 1])
            return
    pytest.fail("no head of that length was written")


def test_a_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"no weight file.*none\.pth"):
        read_weights(tmp_path / "none.pth")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_pickles_are_flattened(protocol, tmp_path):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {
        "conv1": [kernel, np.ones(3, ">f8")],
        "fire2/squeeze1x1": [np.asfortranarray(kernel), np.array([1, 2], np.int64)],
    }
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(tree, protocol))
    found = read_weights(tmp_path / "w.pkl")
    assert list(found) == ["conv1.0", "conv1.1", "fire2/squeeze1x1.0", "fire2/squeeze1x1.1"]
    for name, value in tree.items():
        for i in range(2):
            np.testing.assert_array_equal(found[f"{name}.{i}"], value[i])
            assert found[f"{name}.{i}"].dtype == value[i].dtype.newbyteorder("=")


@pytest.mark.parametrize(
    "value",
    [
        np.array([{"a": 1}, None], object),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.array(["text"]),
        np.array(["2020-01-01"], "M8[D]"),
    ],
)
def test_numpy_pickles_of_other_dtypes_are_refused(value, tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"a": value}, 3))
    with pytest.raises(ValueError, match=r"w\.pkl cannot be read: .*not a plain number"):
        read_weights(tmp_path / "w.pkl")


def test_safetensors_with_every_float_dtype(tmp_path):
    values = {
        "f64": np.array([[1.5, 2]], np.float64),
        "f32": np.array([1.5, -0.0], np.float32),
        "f16": np.array(1.5, np.float16),
        "i64": np.array([3], np.int64),
    }
    safetensors.numpy.save_file(values, tmp_path / "w.safetensors", {"who": "test"})
    found = read_weights(tmp_path / "w.safetensors")
    assert {key: value.dtype for key, value in found.items()} == {
        key: value.dtype for key, value in values.items()
    }
    for key, value in values.items():
        np.testing.assert_array_equal(found[key], value)
    assert read_safetensors_metadata(tmp_path / "w.safetensors") == {"who": "test"}
    # By hand, since the library's NumPy side need not know bfloat16: the format's own words.
    head = json.dumps({"b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    body = np.array([1.5, -3], ml_dtypes.bfloat16).tobytes()
    (tmp_path / "b.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + body)
    found = read_weights(tmp_path / "b.safetensors")["b"]
    np.testing.assert_array_equal(found.astype(np.float32), [1.5, -3])


def test_npz_is_read_without_pickles(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.ones((2, 3)), b=np.zeros(1, np.float16))
    assert {k: v.shape for k, v in read_weights(tmp_path / "w.npz").items()} == {
        "a": (2, 3),
        "b": (1,),
    }
    trace = tmp_path / "trace"
    evil = np.array([Attack(os.system, f"touch {trace}")], object)
    np.savez(tmp_path / "evil.npz", evil)
    with pytest.raises(ValueError, match=r"evil\.npz"):
        read_weights(tmp_path / "evil.npz")
    assert not trace.exists()


def onnx_model(weights, nodes):
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node(op, inputs, [f"{name}_out"], name=name) for op, name, inputs in nodes],
        "graph",
        [],
        [],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph)


def test_onnx_initialisers_get_names_from_their_nodes(tmp_path):
    weights = {
        "backbone.fc.bias": np.ones(3, np.float32),
        "onnx::MatMul_7": np.arange(6, dtype=np.float32).reshape(2, 3),
        "onnx::Concat_8": np.zeros((1, 1, 2), np.float32),
        "onnx::Reshape_9": np.zeros((1, 4, 2), np.float32),
        "decoder.weight": np.ones(1, np.float32),
    }
    nodes = [
        ("MatMul", "/backbone/layer.0/fc/MatMul", ["x", "onnx::MatMul_7"]),
        ("Concat", "/backbone/embeddings/Concat_6", ["onnx::Concat_8", "y"]),
        ("Reshape", "/backbone/embeddings/Reshape_1", ["onnx::Reshape_9", "z"]),
    ]
    path = tmp_path / "w.onnx"
    path.write_bytes(onnx_model(weights, nodes).SerializeToString())
    found = read_weights(path, prefix="backbone.")
    assert {name: value.shape for name, value in found.items()} == {
        "fc.bias": (3,),
        "layer.0.fc.kernel": (2, 3),
        "pos_cls": (1, 1, 2),
        "pos": (1, 4, 2),
    }
    assert "decoder.weight" in read_weights(path)
    with pytest.raises(ValueError, match=r"no array of w\.onnx begins with 'encoder\.'"):
        read_weights(path, prefix="encoder.")


def test_onnx_weights_in_other_files_are_refused(tmp_path):
    import onnx

    model = onnx_model({"a": np.ones(3, np.float32)}, [])
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "w.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"w\.onnx.*another file"):
        read_weights(tmp_path / "w.onnx")


LAYOUT = Layout(
    entries=(
        Entry("conv.kernel", ("c.weight",), "conv"),
        Entry("qkv.kernel", ("q.weight", "k.weight", "v.weight"), "linear"),
        Entry("position", ("pos_a", "pos_b"), "same", 1),
        Entry("norm.mean", ("n.running_mean",)),
        Entry("classifier.kernel", ("fc.weight",), "linear"),
        Entry("classifier.bias", ("fc.bias",)),
    ),
    ignored=("num_batches_tracked",),
    constants={"n.num_batches_tracked": np.zeros((), np.int64)},
)
SHAPES = {
    "conv.kernel": (2, 3, 4, 5),
    "qkv.kernel": (4, 9),
    "position": (1, 6, 2),
    "classifier.kernel": (4, 7),
    "classifier.bias": (7,),
}


def random_source(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {
        "c.weight": (5, 4, 2, 3),
        **{f"{part}.weight": (3, 4) for part in "qkv"},
        "pos_a": (1, 3, 2),
        "pos_b": (1, 3, 2),
        "n.running_mean": (5,),
        "fc.weight": (7, 4),
        "fc.bias": (7,),
    }
    source = {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}
    return source | {"n.num_batches_tracked": np.array(0)}


def templates(dtype=np.float32):
    params = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SHAPES.items()}
    return params, {"norm.mean": jax.ShapeDtypeStruct((5,), dtype)}


def run_import(source, layout=LAYOUT, **options):
    return import_state(source, layout, *templates(), name="w.pth", **options)


def test_import_transforms_then_joins():
    source = random_source()
    params, stats = run_import(source)
    expected = np.concatenate([source[f"{part}.weight"].T for part in "qkv"], axis=1)
    np.testing.assert_array_equal(params["qkv.kernel"], expected)
    np.testing.assert_array_equal(
        params["conv.kernel"], np.einsum("oihw->hwio", source["c.weight"])
    )
    np.testing.assert_array_equal(
        params["position"], np.concatenate([source["pos_a"], source["pos_b"]], axis=1)
    )
    np.testing.assert_array_equal(stats["norm.mean"], source["n.running_mean"])
    assert set(params) == set(SHAPES)


def test_export_is_the_inverse_of_import_bitwise():
    source = random_source()
    source["fc.bias"][:2] = -0.0, np.float32(1e-42)  # a sign and a subnormal
    source["neck.weight"] = np.arange(12, dtype=np.float32).reshape(3, 4)
    source["neck.bias"] = np.ones(3, np.float32)
    params, stats = run_import(source)
    assert params["neck.kernel"].shape == (4, 3)
    exported = export_state(params, stats, LAYOUT)
    assert set(exported) == set(source)
    for key, value in source.items():
        assert exported[key].tobytes() == value.tobytes(), key
        assert exported[key].shape == value.shape
        assert exported[key].flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_dtypes_are_cast_to_the_template(dtype):
    source = random_source(dtype)
    params, stats = run_import(source)
    assert {x.dtype for x in (*params.values(), *stats.values())} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        params["classifier.kernel"], source["fc.weight"].T.astype(np.float32)
    )


def test_import_refuses_what_does_not_fit():
    source = random_source()
    short = {key: value for key, value in source.items() if key not in ("k.weight", "fc.bias")}
    with pytest.raises(ValueError, match=r"w\.pth: it lacks k\.weight, fc\.bias"):
        run_import(short)
    more = source | {f"extra.{i}": source["fc.bias"] for i in range(7)}
    with pytest.raises(ValueError, match=r"extra\.0, .*extra\.4 and 2 more, for which"):
        run_import(more)
    with pytest.raises(ValueError, match=r"c\.weight gives shape \[3, 2, 4, 5\], conv\.kernel has"):
        run_import(source | {"c.weight": source["c.weight"].swapaxes(2, 3)})
    with pytest.raises(ValueError, match=r"c\.weight has shape \[7, 4\].*4 axes"):
        run_import(source | {"c.weight": source["fc.weight"]})
    with pytest.raises(ValueError, match=r"q\.weight, k\.weight, v\.weight do not join"):
        run_import(source | {"k.weight": np.ones((3, 5), np.float32)})
    with pytest.raises(ValueError, match=r"fc\.bias has dtype int8"):
        run_import(source | {"fc.bias": source["fc.bias"].astype(np.int8)})
    partial = LAYOUT._replace(entries=LAYOUT.entries[1:])
    with pytest.raises(ValueError, match=r"layout and the model differ in conv\.kernel"):
        run_import({k: v for k, v in source.items() if k != "c.weight"}, partial)


def test_a_classifier_of_other_classes_can_be_left():
    source = random_source() | {"fc.weight": np.ones((3, 4), np.float32)}
    with pytest.raises(ValueError, match=r"fc\.weight gives shape \[4, 3\].*classifier=False"):
        run_import(source)
    params, _ = run_import(source, classifier=False)
    assert set(params) == set(SHAPES) - {"classifier.kernel", "classifier.bias"}
    del source["fc.weight"], source["fc.bias"]
    assert set(run_import(source, classifier=False).params) == set(params)


def test_export_refuses_paths_that_the_layout_lacks():
    params, stats = run_import(random_source())
    with pytest.raises(ValueError, match=r"differ in other\.kernel"):
        export_state({**params, "other.kernel": params["position"]}, stats, LAYOUT)
    del params["position"]
    with pytest.raises(ValueError, match="differ in position"):
        export_state(params, stats, LAYOUT)
    odd = {"qkv": np.ones((4, 10))}
    with pytest.raises(ValueError, match=r"axis -1 of \[4, 10\] does not split"):
        export_state(odd, {}, Layout((Entry("qkv", ("q", "k", "v")),)))


def put(folder, content, name="w.pth"):
    path = folder / name
    path.write_bytes(content)
    return path


def state(offset=0.0, prefix=""):
    return {f"{prefix}a.weight": np.full((2, 3), 1 + offset, np.float32)}


TRAINING = {
    "optimizer": {
        "state": {0: {"exp_avg": np.zeros(3, np.float32)}},
        "param_groups": [{"lr": 0.1}],
    },
    "epoch": 3,
    "acc": 0.9,
    "rng_state": np.zeros(4, np.uint8),
    "arch": "resnet18",
}
FORMS = {"zip": torch_files.zip_bytes, "legacy": torch_files.legacy_bytes}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model_state_dict", "net", "ema", "model_ema", "best_model_weights"]
)
def test_the_weights_of_a_training_file_are_taken_and_said(form, wrapper, tmp_path, caplog):
    tree = {**TRAINING, wrapper: state(prefix="module.")}
    path = put(tmp_path, FORMS[form](tree))
    assert list(read_weights(path)) == ["a.weight"]
    assert f"w.pth: took 1 arrays of '{wrapper}'; left optimizer, epoch, acc" in caplog.text
    # From the file's root, with or without what a parallel wrapper put there, and inside.
    for prefix in (f"{wrapper}.", f"{wrapper}.module.", "module."):
        assert list(read_weights(path, prefix=prefix)) == ["a.weight"]
    assert list(read_weights(path, prefix="a.")) == ["weight"]


@pytest.mark.parametrize("form", FORMS)
def test_two_sets_of_weights_ask_for_a_choice(form, tmp_path):
    tree = {**TRAINING, "state_dict": state(), "state_dict_ema": state(1, "module.")}
    path = put(tmp_path, FORMS[form](tree))
    with pytest.raises(
        WeightFileError, match=r"w\.pth.*weights 'state_dict' and 'state_dict_e"
    ) as e:
        read_weights(path)
    for name, value in (("state_dict", 1), ("state_dict_ema", 2)):
        assert f"pass prefix='{name}.' (on the command line: --prefix {name}.)" in str(e.value)
        found = read_weights(path, prefix=f"{name}.")
        np.testing.assert_array_equal(found["a.weight"], np.full((2, 3), value))
    with pytest.raises(WeightFileError, match=r"prefix='state_dict_ema\.a\.'"):
        read_weights(path, prefix="a.")
    with pytest.raises(WeightFileError, match=r"prefix='state_dict_ema\.'"):
        read_weights(path, prefix="nowhere.")
    assert list(read_weights(path, prefix="state_dict_ema.module.a.")) == ["weight"]
    inner = {"model": {"student": state(), "teacher": state(1)}, "epoch": 1}
    with pytest.raises(WeightFileError, match=r"'student' and 'teacher'"):
        read_weights(put(tmp_path, FORMS[form](inner)))


def test_what_the_standard_library_pickles_beside_the_weights_is_left(tmp_path):
    beside = {
        "args": argparse.Namespace(out=pathlib.PurePosixPath("a"), seed=np.int64(3)),
        "when": [datetime.datetime.now(datetime.UTC), datetime.date.today()],
        "counts": collections.Counter("aab"),
        "names": collections.defaultdict(list, a=[1]),
        "random": [random.getstate(), np.random.default_rng(0), np.random.RandomState(0)],
        "kinds": {1, 2, frozenset([3]), 1j, range(3), decimal.Decimal(1), ...},
        "arrays": [np.array(["a"]), np.array([None], object), np.zeros(1, [("a", "i4")])],
    }
    for protocol in range(2, 6):
        content = pickle.dumps({"model": {"w": np.ones(2)}, **beside}, protocol)
        assert list(read_weights(put(tmp_path, content, "w.pkl"))) == ["w"]


def test_parts_that_are_no_wrappers_stay_parts(tmp_path):
    tree = {"encoder": state(), "decoder": state(1), "epoch": 3}
    path = put(tmp_path, torch_files.zip_bytes(tree))
    assert set(read_weights(path)) == {"encoder.a.weight", "decoder.a.weight"}
    assert list(read_weights(path, prefix="decoder.")) == ["a.weight"]
    flax = {"params": {"a": np.ones(2)}, "batch_stats": {"b": np.ones(2)}}
    path = put(tmp_path, pickle.dumps(flax, 3), "w.pkl")
    assert set(read_weights(path)) == {"params.a", "batch_stats.b"}
    # A name within a wrapper of the same name is found; one object under two names is no choice.
    path = put(tmp_path, torch_files.zip_bytes({"model": state(prefix="model.")}))
    assert list(read_weights(path, prefix="model.")) == ["a.weight"]
    one = {"a": np.ones(2)}
    path = put(tmp_path, pickle.dumps({"model": one, "ema": one}, 3), "w.pkl")
    assert list(read_weights(path)) == ["a"]


HARMLESS = {
    "namespace": Made(
        "argparse", "Namespace", (), {"lr": 0.1, "path": Made("pathlib", "PosixPath")}
    ),
    "old object": Made("copy_reg", "_reconstructor", (Made("argparse", "Namespace", None),) * 2),
    "scalar": Made(
        "numpy.core.multiarray", "scalar", (Made("numpy", "dtype", ("f8",)), b"12345678")
    ),
    "new scalar": Made("numpy._core.multiarray", "scalar", (Made("numpy", "dtype", ("i4",)), b"")),
    "size": Made("torch", "Size", ((1, 2, 3),)),
    "device": Made("torch", "device", ("cuda", 0)),
    "dtype": Made("torch", "float32", None),
    "defaultdict": Made("collections", "defaultdict", (Made("builtins", "list", None),)),
    "counter": Made("collections", "Counter", ({"a": 1},)),
    "deque": Made("collections", "deque", ([1, 2], 3)),
    "set": Made("__builtin__", "set", ([1, 2],)),
    "path": Made("pathlib", "PosixPath", ("a", "b")),
    "date": Made("datetime", "datetime", (b"1234567890",)),
    "enum": Made("torchvision.transforms.functional", "InterpolationMode", ("bilinear",)),
    "words": pickle.dumps,  # replaced below: a NumPy array of text
    "decimal": Made("decimal", "Decimal", ("0.1",)),
    "complex": Made("builtins", "complex", (1.0, 2.0)),
    "class as key": {Made("builtins", "int", None): 1},
}
HARMLESS["words"] = Raw(pickle.dumps(np.array(["cat", "dog"]), 2)[2:-1])


@pytest.mark.parametrize("form", FORMS)
def test_harmless_objects_beside_the_weights_hold_nothing(form, tmp_path):
    path = put(tmp_path, FORMS[form]({"state_dict": state(), "args": HARMLESS, **HARMLESS}))
    assert list(read_weights(path)) == ["a.weight"]
    path = put(tmp_path, FORMS[form](state() | HARMLESS))
    assert list(read_weights(path)) == ["a.weight"]


@pytest.mark.parametrize("form", FORMS)
def test_parameters_and_tensors_with_attributes_are_arrays(form, tmp_path):
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = View(base.ravel(), 0, (2, 3), (3, 1))
    tree = {
        "a": Made("torch._utils", "_rebuild_parameter", (tensor, True, {})),
        "b": Made("torch._utils", "_rebuild_parameter_with_state", (tensor, True, {}, {"x": 1})),
        "c": Made(
            "torch._tensor",
            "_rebuild_from_type_v2",
            (
                Made("torch._utils", "_rebuild_parameter", None),
                Made("torch.nn.parameter", "Parameter", None),
                (tensor, True, {}),
                {},
            ),
        ),
        "d": Raw(pickle.dumps(base, 2)[2:-1]),
    }
    found = read_weights(put(tmp_path, FORMS[form](tree)))
    assert list(found) == list("abcd")
    for value in found.values():
        np.testing.assert_array_equal(value, base)


@pytest.mark.parametrize(
    "name",
    ["os system", "functools partial", "torch.optim.sgd SGD", "mine Net", "builtins eval", "x y"],
)
@pytest.mark.parametrize("args", [(), None])
def test_other_objects_are_refused_by_name(name, args, tmp_path):
    module, _, attribute = name.partition(" ")
    tree = {"state_dict": state(), "other": Made(module, attribute, args)}
    with pytest.raises(WeightFileError, match=rf"w\.pth.*{module}\.{attribute}, which is not all"):
        read_weights(put(tmp_path, torch_files.zip_bytes(tree)))


def key(opcodes):
    return b"\x80\x02}" + opcodes + b"K\x01s."


HOSTILE = {
    "deep key": (key(b")" + b"\x85" * 200_000), "a key of a dict is a tuple"),
    "many opcodes": (b"\x80\x02)" + b"\x85" * 1_500_000 + b".", "more than 500000 opcodes"),
    "wide key": (key(b")" + b"2\x86" * 50), "a key of a dict is a tuple"),
    "wide id": (b"\x80\x02)" + b"2\x86" * 50 + b"Q.", "refers to something outside"),
    "memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "holds a NoneType"),
    "long": (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", "not enough data"),
    "integer": (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", "an integer of 2033 bits"),
    "colliding": (key(b"\x8a\x0a" + b"\x01" * 10), "an integer of 73 bits"),
    "text": (b"\x80\x02\x8d" + b"\xff" * 7 + b"\x7f.", "expected 9223372036854775807 bytes"),
    "deep list": (b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 999 + b"a" * 998 + b"s.", "deeper than"),
    "extension": (b"\x80\x02\x82\x01.", "the opcode EXT1 is not read"),
    "underflow": (b"\x80\x02\x86.", "do not fit together"),
    "no stop": (b"\x80\x02N", "exhausted"),
    "name": (key(b"X\x02\x00\x00\x00a\n"), r"a\\n is a int"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_opcodes_are_refused_quickly(case, tmp_path):
    content, message = HOSTILE[case]
    with pytest.raises(WeightFileError, match=rf"w\.pkl cannot be read: .*{message}") as error:
        read_weights(put(tmp_path, content, "w.pkl"))
    assert len(str(error.value)) < 600
    assert str(error.value).isprintable()


def test_the_machine_computes_what_python_does():
    tree = {"a": [1, 2.5, None, True, (3,), (4, 5), (6, 7, 8), (9, 8, 7, 6)], 3: b"x", -1: "\xe9\n"}
    tree["again"] = tree["a"]
    for protocol in range(6):
        text = pickle.dumps(tree, protocol)
        table = {("_codecs", "encode"): machine.Call(lambda s, e: s.encode(e))}
        found = machine.run(io.BytesIO(text + b"rest"), table)
        assert found == tree
        assert found["again"] is found["a"]


def zipped(folder, members, kind=zipfile.ZIP_DEFLATED, name="w.npz"):
    with zipfile.ZipFile(folder / name, "w", kind) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return folder / name


def test_archives_that_unpack_without_a_bound_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "UNPACKED_FLOOR", 100_000)
    with pytest.raises(WeightFileError, match=r"w\.npz.*would unpack to 1000000, more than"):
        read_weights(zipped(tmp_path, {"a.npy": b"\0" * 1_000_000}))
    halves = {f"{i}.npy": b"\0" * 90_000 for i in range(9)}
    with pytest.raises(WeightFileError, match="would unpack to 810000"):
        read_weights(zipped(tmp_path, halves))
    with pytest.raises(WeightFileError, match=r"w\.pth.*would unpack"):
        read_weights(zipped(tmp_path, {"n/data.pkl": b"N0" * 500_000}, name="w.pth"))
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(WeightFileError, match=r"a\.npy is packed by method"):
            read_weights(zipped(tmp_path, {"a.npy": b"\0"}, kind))
    repeated = View(np.ones(1, np.float32), 0, (1000, 1000), (0, 0))
    with pytest.raises(WeightFileError, match="a repeats its storage to more than"):
        read_weights(put(tmp_path, torch_files.zip_bytes({"a": repeated})))


def test_what_a_zip_directory_says_of_a_size_is_not_believed(tmp_path):
    path = zipped(tmp_path, {"a.npy": b"\0" * 3_000_000})
    content = path.read_bytes().replace(
        (3_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")
    )
    with pytest.raises(WeightFileError, match=r"w\.npz cannot be read: Bad CRC"):
        read_weights(put(tmp_path, content, "w.npz"))


def folder_of(root, arrays, *, shards=None, weights="model.safetensors", **index):
    """A folder as the hub has it."""
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text('{"architecture": "resnet18"}')
    if shards is None:
        safetensors.numpy.save_file(arrays, root / weights)
        return root
    places = {
        key: f"model-{number}.safetensors" for number, keys in enumerate(shards) for key in keys
    }
    for number, keys in enumerate(shards):
        part = {key: arrays[key] for key in keys}
        safetensors.numpy.save_file(part, root / f"model-{number}.safetensors")
    content = {"metadata": {}, "weight_map": places} | index
    (root / "model.safetensors.index.json").write_text(json.dumps(content))
    return root


def test_folders_of_the_hub_are_weights(tmp_path):
    arrays = {f"net.{key}": np.full((2, 3), ord(key), np.float32) for key in "abc"}
    for name, shards in (("one", None), ("many", (["net.c", "net.a"], ["net.b"]))):
        folder = folder_of(tmp_path / name, arrays, shards=shards)
        found = read_weights(folder)
        assert set(found) == set(arrays)
        assert all((found[key] == arrays[key]).all() for key in arrays)
        assert set(read_weights(folder, prefix="net.")) == set("abc")
    (tmp_path / "bin").mkdir()
    put(tmp_path / "bin", torch_files.zip_bytes({**TRAINING, "net": state()}), "pytorch_model.bin")
    assert list(read_weights(tmp_path / "bin", prefix="net.")) == ["a.weight"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../model-0.safetensors"}}, "the shard of a is no file name"),
        ({"weight_map": {"a": 3}}, "the shard of a is no file name"),
        ({"weight_map": {"a": "absent.safetensors"}}, "shard absent.safetensors is not there"),
        ({"weight_map": {"a": "model-0.safetensors"}}, "model-0.safetensors differ in b"),
        ({"weight_map": {"a": "model-0.safetensors", "c": "model-0.safetensors"}}, "differ in b"),
        ({"weight_map": []}, "has no weight_map"),
    ],
)
def test_an_index_must_agree_with_its_shards(index, message, tmp_path):
    arrays = {key: np.ones(2, np.float32) for key in "ab"}
    folder = folder_of(tmp_path, arrays, shards=(["a", "b"],), **index)
    with pytest.raises(WeightFileError, match=rf"model\.safetensors\.index\.json.*{message}"):
        read_weights(folder)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(WeightFileError, match=r"index\.json cannot be read"):
        read_weights(folder)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(WeightFileError, match=r"holds none of model\.safetensors.*notes\.txt"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("c.weight", lambda x: np.where(x > 1, np.nan, x), r"c\.weight has \d+ NaN of 120"),
        (
            "k.weight",
            lambda x: np.where(x == x[0, 0], np.inf, x),
            r"k\.weight has 1 infinite of 12 ",
        ),
        (
            "v.weight",
            lambda x: np.full_like(x, 1e39, np.float64),
            "v.weight has 12 infinite as float32 of 12",
        ),
        ("pos_b", lambda x: np.full_like(x, -np.inf), r"pos_b has 6 infinite of 6"),
        ("fc.bias", lambda x: (x * np.nan).astype(ml_dtypes.bfloat16), r"fc\.bias has 7 NaN of 7"),
        (
            "n.running_var",
            lambda x: -x,
            r"n\.running_var is a variance and has 5 of 5 values below 0",
        ),
        ("n.running_var", lambda x: x / 0, r"n\.running_var has 5 infinite of 5"),
    ],
)
def test_numbers_that_no_model_has_are_counted_by_key(key, change, message):
    layout = LAYOUT._replace(entries=(*LAYOUT.entries, Entry("norm.var", ("n.running_var",))))
    source = random_source() | {"n.running_var": np.ones(5, np.float32)}
    params, stats = templates()
    stats["norm.var"] = jax.ShapeDtypeStruct((5,), np.float32)
    import_state(source, layout, params, stats, name="w.pth")
    with np.errstate(divide="ignore"):
        source[key] = change(source[key])
    with pytest.raises(WeightFileError, match=rf"w\.pth: {message}"):
        import_state(source, layout, params, stats, name="w.pth")


def test_what_is_left_out_may_be_anything():
    source = random_source()
    source["fc.weight"] = source["fc.weight"] * np.nan
    run_import(source, classifier=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_bytes_in_the_other_order_are_recognised(dtype):
    source = {
        key: value if value.ndim == 0 else np.resize(value, value.shape).byteswap()
        for key, value in random_source(dtype).items()
    }
    with pytest.raises(WeightFileError, match=r"w\.pth: .*bytes in the other order.*byteswap"):
        run_import(source)
    # An order that the dtype itself names is no fault.
    if dtype is np.float32:
        named = {k: v.view(v.dtype.newbyteorder()) if v.ndim else v for k, v in source.items()}
        np.testing.assert_array_equal(run_import(named).params["classifier.bias"], named["fc.bias"])


def test_a_big_endian_zip_without_its_marker_is_recognised(tmp_path):
    swapped = {k: v if v.ndim == 0 else v.byteswap() for k, v in random_source().items()}
    path = put(tmp_path, torch_files.zip_bytes(swapped, byteorder=None))
    with pytest.raises(WeightFileError, match="bytes in the other order"):
        run_import(read_weights(path))


def test_small_and_dead_weights_are_not_taken_for_swapped_ones():
    for factor in (1e-20, 1e-38, 0.0, 1e20):
        source = {k: v * np.float32(factor) if v.ndim else v for k, v in random_source().items()}
        run_import(source)


def test_prefixes_that_would_fit_are_found():
    plain = random_source()
    source = {f"{prefix}{key}": v for prefix in ("ema.net.", "module.") for key, v in plain.items()}
    assert fitting(source, LAYOUT) == ["ema.net.", "module."]
    assert fitting(plain, LAYOUT) == [""]
    del source["module.fc.bias"]
    assert fitting(source, LAYOUT) == ["ema.net."]
    assert fitting(source, LAYOUT, classifier=False) == ["ema.net.", "module."]
    assert fitting(plain | {"x": 0}, LAYOUT) == []


def test_bfloat16_of_onnx_is_its_numbers_and_not_its_bits(tmp_path):
    import onnx

    model = onnx_model({"a": np.ones(2, np.float32)}, [])
    tensor = model.graph.initializer[0]
    tensor.data_type = onnx.TensorProto.BFLOAT16
    tensor.raw_data = np.array([1.5, -2.0]).astype(ml_dtypes.bfloat16).tobytes()
    (tmp_path / "w.onnx").write_bytes(model.SerializeToString())
    found = read_weights(tmp_path / "w.onnx")["a"]
    np.testing.assert_array_equal(found.astype(np.float32), [1.5, -2.0])
    tensor.data_type, tensor.raw_data = onnx.TensorProto.FLOAT8E4M3FN, b"\x38\x40"
    (tmp_path / "w.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"w\.onnx cannot be read: a has dtype .*not read"):
        read_weights(tmp_path / "w.onnx")


def test_a_name_that_is_too_long_is_one_error(tmp_path):
    with pytest.raises(WeightFileError, match=r"y\.\.\. cannot be read: File name too long"):
        read_weights(tmp_path / (1000 * "y"))
