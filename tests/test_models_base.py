"""Splitting, cutting and running a backbone; the inputs of sites; preprocessing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from backbones import cropped, random_backbone
from flax import nnx
from PIL import Image
from skimage import data as photographs

from jaximm.models import backbone as base
from jaximm.models.flat import merge, under
from jaximm.models.spec import ModelSpec, Preprocess


class Unit(nnx.Module):
    """relu(norm(mix(x))), `mix` a 1 x 1 convolution."""

    def __init__(self, width, rngs):
        self.mix = nnx.Conv(width, width, (1, 1), param_dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.BatchNorm(
            width, use_running_average=True, param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.mix(x)))


class Tiny(nnx.Module):
    """Two layers whose names begin alike, and eleven blocks in a list."""

    stage_names = ("stem", "layer4.0", "layer40.0", *(f"blocks.{i}" for i in range(11)), "head")

    def __init__(self, config, rngs):
        del config
        self.stem = nnx.Conv(3, 4, (3, 3), param_dtype=jnp.float32, rngs=rngs)
        self.layer4 = nnx.List([Unit(4, rngs)])
        self.layer40 = nnx.List([Unit(4, rngs)])
        self.blocks = nnx.List(
            [nnx.Linear(4, 4, param_dtype=jnp.float32, rngs=rngs) for _ in range(11)]
        )
        self.head = nnx.Linear(4, 6, param_dtype=jnp.float32, rngs=rngs)
        self.classifier = nnx.Linear(6, 2, param_dtype=jnp.float32, rngs=rngs)

    def run_stage(self, name, x):
        if name == "head":
            return self.head(x.mean((1, 2)))
        first, *rest = name.split(".")
        layer = getattr(self, first)
        return layer[int(rest[0])](x) if rest else layer(x)

    def classify(self, hidden, features):
        del hidden
        return self.classifier(features)


SPEC = ModelSpec(
    config=None,
    build=Tiny,
    width=6,
    preprocess=Preprocess(),
    layouts={},
    source="this file",
)


@pytest.fixture(scope="module")
def tiny():
    return random_backbone(SPEC)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (5, 3, 2, 3), jnp.float32)


@pytest.fixture(scope="module")
def neck():
    kernel, bias = np.random.default_rng(1).standard_normal((2, 6, 3)).astype(np.float32)
    return {"neck.kernel": jnp.asarray(kernel), "neck.bias": jnp.asarray(bias[0])}


def by_hand(tiny, x, start=0):
    """Features in float64 by the formulas, from the stage with number `start`."""
    p, s = (
        {path: np.asarray(value, np.float64) for path, value in flat.items()}
        for flat in (tiny.params, tiny.stats)
    )
    x = np.asarray(x, np.float64)
    for name in tiny.stage_names[start:]:
        if name == "stem":
            _, h, w, _ = x.shape
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = p["stem.bias"] + sum(
                padded[:, i : i + h, j : j + w] @ p["stem.kernel"][i, j]
                for i in range(3)
                for j in range(3)
            )
        elif name.startswith("layer"):
            y = x @ p[f"{name}.mix.kernel"][0, 0] + p[f"{name}.mix.bias"]
            at = f"{name}.norm"
            y = (y - s[f"{at}.mean"]) / np.sqrt(s[f"{at}.var"] + 1e-5)
            x = np.maximum(y * p[f"{at}.scale"] + p[f"{at}.bias"], 0)
        else:
            x = x.mean((1, 2)) if name == "head" else x
            x = x @ p[f"{name}.kernel"] + p[f"{name}.bias"]
    return x


def test_params_and_stats_have_dotted_paths_and_are_apart(tiny):
    assert tiny.params["blocks.10.kernel"].shape == (4, 4)
    assert tiny.params["layer4.0.mix.kernel"].shape == (1, 1, 4, 4)
    assert sorted(tiny.stats) == [
        "layer4.0.norm.mean",
        "layer4.0.norm.var",
        "layer40.0.norm.mean",
        "layer40.0.norm.var",
    ]


def test_merge_then_split_gives_the_same_arrays_by_path(tiny, neck):
    module = merge(tiny.graphdef, {**tiny.params, **neck}, tiny.stats)
    # In a list of eleven the order of paths as text is not that of numbers.
    for index in (1, 2, 10):
        np.testing.assert_array_equal(
            module.blocks[index].kernel[...], tiny.params[f"blocks.{index}.kernel"]
        )
    np.testing.assert_array_equal(module.layer40[0].norm.var[...], tiny.stats["layer40.0.norm.var"])
    again = base.split(module, name="again", config=None, width=6, preprocess=tiny.preprocess)
    for found, ours in ((again.params, tiny.params), (again.stats, tiny.stats)):
        assert set(found) == set(ours)
        for path in ours:
            np.testing.assert_array_equal(found[path], ours[path])
    assert again.stage_names == tiny.stage_names


def test_features_and_logits_follow_the_formulas(tiny, x, neck):
    expected = by_hand(tiny, x)
    np.testing.assert_allclose(tiny.features(tiny.params, x), expected, rtol=1e-4, atol=1e-5)
    p = {path: np.asarray(value, np.float64) for path, value in tiny.params.items()}
    logits = expected @ p["classifier.kernel"] + p["classifier.bias"]
    np.testing.assert_allclose(tiny.logits(tiny.params, x), logits, rtol=1e-4, atol=1e-5)
    moved = expected @ np.asarray(neck["neck.kernel"], np.float64) + np.asarray(neck["neck.bias"])
    with_neck = tiny.replace(neck)
    assert with_neck.width == 3
    assert tiny.width == 6
    found = with_neck.features(with_neck.params, x)
    np.testing.assert_allclose(found, moved, rtol=1e-4, atol=1e-5)
    without_bias = {"neck.kernel": neck["neck.kernel"]}
    found = tiny.features({**tiny.params, **without_bias}, x)
    np.testing.assert_allclose(found, moved - np.asarray(neck["neck.bias"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "prefix", "trained"),
    [
        ("head", 14, {"head"}),
        ("layer4", 1, {"layer4.0"}),
        ("layer40", 2, {"layer40.0"}),
        ("layer4.0.norm", 1, {"layer4.0.norm"}),
        ("blocks.1", 4, {"blocks.1"}),
        ("head, blocks.9", 12, {"blocks.9", "head"}),
        ("", 15, set()),
    ],
)
def test_a_pattern_freezes_what_lies_before_and_beside_it(tiny, x, pattern, prefix, trained):
    cut = tiny.split_at(pattern)
    assert (cut.prefix_stages, cut.suffix_stages) == (
        tiny.stage_names[:prefix],
        tiny.stage_names[prefix:],
    )
    expected = {p for p in tiny.params for name in trained if p.startswith(f"{name}.")}
    assert set(cut.params) == expected
    activations = cut.prefix_fn(x)
    whole = tiny.features(tiny.params, x)
    np.testing.assert_allclose(
        cut.features_fn(cut.params, activations), whole, rtol=1e-6, atol=1e-6
    )
    # The suffix starts at the activations: the formulas from there give the same.
    np.testing.assert_allclose(by_hand(tiny, activations, prefix), whole, rtol=1e-4, atol=1e-5)


def test_star_trains_everything_but_the_classifier(tiny):
    cut = tiny.split_at("*")
    assert cut.prefix_stages == ()
    assert set(cut.params) == {p for p in tiny.params if not p.startswith("classifier")}


def test_the_classifier_alone_is_no_pattern(tiny):
    for pattern in ("classifier", "classifier.bias", "head,classifier"):
        with pytest.raises(ValueError, match=r"only the original classifier.*trained separately"):
            tiny.split_at(pattern)


class Scaled(Tiny):
    """With a parameter that `run_stage` may use anywhere."""

    def __init__(self, config, rngs):
        super().__init__(config, rngs)
        self.scale = nnx.Param(jnp.ones(4))


def test_a_trained_parameter_outside_all_stages_is_an_error():
    stray = random_backbone(SPEC._replace(build=Scaled))
    for pattern in ("*", "scale", "scale,head"):
        with pytest.raises(ValueError, match=r"'scale' of model lies under no stage.*'layer4.0'"):
            stray.split_at(pattern)
    assert set(stray.split_at("head").params) == {"head.kernel", "head.bias"}


@pytest.mark.parametrize(
    "pattern", ["layer", "layer4.1", "blocks.11", "layer4.0.norm.mean", "neck"]
)
def test_a_pattern_that_names_nothing_is_an_error_with_the_stages(tiny, pattern):
    with pytest.raises(ValueError, match=r"names no parameter of model.*'layer40.0'") as caught:
        tiny.split_at(f"head,{pattern}")
    assert repr(pattern) in str(caught.value)


def test_given_parameters_stand_in_for_the_frozen_ones(tiny, x):
    cut = tiny.split_at("layer40")
    moved = {path: value + 0.1 for path, value in cut.params.items()}
    activations = cut.prefix_fn(x)
    found = cut.features_fn(moved, activations)
    whole = cut.whole(moved)
    np.testing.assert_allclose(found, by_hand(whole, x), rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, cut.features_fn(cut.params, activations), atol=1e-3)
    np.testing.assert_array_equal(
        whole.params["layer40.0.mix.bias"], tiny.params["layer40.0.mix.bias"] + jnp.float32(0.1)
    )
    assert whole.params["stem.kernel"] is tiny.params["stem.kernel"]


def test_a_neck_trains_alone_and_with_a_stage(tiny, x, neck):
    with_neck = tiny.replace(neck)
    alone = with_neck.split_at("neck")
    assert alone.suffix_stages == ()
    assert set(alone.params) == set(neck)
    activations = alone.prefix_fn(x)
    np.testing.assert_allclose(activations, tiny.features(tiny.params, x), rtol=1e-6, atol=1e-6)
    expected = activations @ neck["neck.kernel"] + neck["neck.bias"][None, :]
    found = alone.features_fn(neck, activations)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    both = with_neck.split_at("head,neck")
    assert set(both.params) == {"head.kernel", "head.bias", *neck}
    found = both.features_fn(both.params, both.prefix_fn(x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    frozen = with_neck.split_at("head")  # the neck runs, and does not train
    assert set(frozen.params) == {"head.kernel", "head.bias"}
    found = frozen.features_fn(frozen.params, frozen.prefix_fn(x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_training_through_features_fn_moves_the_trained_and_leaves_all_else(tiny, x):
    cut = tiny.split_at("layer40")
    before = {path: np.array(value) for path, value in {**tiny.params, **tiny.stats}.items()}
    activations, optimiser = cut.prefix_fn(x), optax.sgd(1e-3)

    def loss(params):
        return (cut.features_fn(params, activations) ** 2).mean()

    @jax.jit
    def step(params, state):
        updates, state = optimiser.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, state = cut.params, optimiser.init(cut.params)
    for _ in range(3):
        params, state = step(params, state)
    assert loss(params) < loss(cut.params)
    assert all(np.any(params[path] != before[path]) for path in params)
    whole = cut.whole(params)
    assert whole.stats is tiny.stats
    for path, value in {**tiny.params, **tiny.stats}.items():
        np.testing.assert_array_equal(value, before[path])


def test_sites_rows_are_the_layers_inputs(tiny, x):
    sites = ("layer40.0.mix", "blocks.10", "head")
    cut = tiny.split_at("layer40", sites=sites)
    activations = cut.prefix_fn(x)
    found = jax.jit(cut.sites_fn)(cut.params, activations)
    assert set(found) == {"features", *sites}
    np.testing.assert_array_equal(found["layer40.0.mix"], activations.reshape(30, 4))
    np.testing.assert_allclose(found["features"], by_hand(tiny, x), rtol=1e-4, atol=1e-5)
    # By hand: what enters a layer, times its kernel, plus its bias, is what leaves it.
    p = {path: np.asarray(value) for path, value in tiny.params.items()}
    leaves = found["blocks.10"] @ p["blocks.10.kernel"] + p["blocks.10.bias"][None, :]
    np.testing.assert_allclose(leaves.reshape(5, 6, 4).mean(1), found["head"], rtol=1e-5, atol=1e-5)
    leaves = found["head"] @ p["head.kernel"] + p["head.bias"][None, :]
    np.testing.assert_allclose(leaves, found["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("stem", r"ungrouped 1 x 1 convolution.*got Conv"),
        ("layer4.0.norm", r"must be a linear.*got BatchNorm"),
        ("layer4.0", r"must be a linear.*got Unit"),
        ("layer4.0.mixed", r"there is no layer 'layer4.0.mixed'"),
        ("blocks.10.0", r"there is no layer 'blocks.10.0'"),
    ],
)
def test_a_site_must_be_there_and_have_rows(tiny, site, message):
    with pytest.raises(ValueError, match=message):
        tiny.split_at("*", sites=(site,))


class Mixed(nnx.Module):
    """One layer, of which `_check_site` sees the settings alone."""

    stage_names = ("mix",)

    def __init__(self, rngs, **settings):
        fields: dict[str, Any] = {"kernel_size": (1, 1)} | settings
        self.mix = nnx.Conv(4, 4, param_dtype=jnp.float32, rngs=rngs, **fields)

    def run_stage(self, name, x):
        del name
        return self.mix(x)


def sited(**settings):
    module = Mixed(nnx.Rngs(0), **settings)
    whole = base.split(module, name="m", config=None, width=4, preprocess=Preprocess())
    return whole.split_at("*", sites=("mix",))


@pytest.mark.parametrize(
    "settings",
    [
        {"strides": 2},
        {"strides": (1, 2)},
        {"padding": 1},
        {"padding": (0, 1)},
        {"padding": ((0, 0), (1, 0))},
        {"padding": (0, (0, 1))},
        {"input_dilation": 2},
        {"input_dilation": (2, 1)},
    ],
    ids=str,
)
def test_a_site_that_skips_or_adds_positions_is_refused(settings):
    with pytest.raises(ValueError, match=r"'mix' must see each position of its input once, got"):
        sited(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strides": None},
        {"strides": [1, 1]},
        {"padding": "VALID"},
        {"padding": (0, (0, 0))},
        {"input_dilation": None, "kernel_dilation": 3},
        {"kernel_size": (1,)},
    ],
    ids=str,
)
def test_a_site_that_sees_each_position_once_has_as_many_rows_as_its_layer(settings):
    cut = sited(**settings)
    shape = (2, 3, 4) if "kernel_size" in settings else (2, 3, 5, 4)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert jax.eval_shape(cut.features_fn, cut.params, x).shape == shape
    rows = jax.eval_shape(cut.sites_fn, cut.params, x)["mix"]
    assert rows.shape == (np.prod(shape) // 4, 4)


def test_a_site_before_the_cut_is_an_error(tiny):
    with pytest.raises(ValueError, match=r"site 'blocks.1' is not after the cut.*'blocks.2'"):
        tiny.split_at("blocks.2", sites=("blocks.1",))


def test_bfloat16_arithmetic_gives_float32_features_and_gradients(tiny, x):
    exact = tiny.split_at("layer40")
    cut = tiny.split_at("layer40", compute_dtype=jnp.bfloat16, sites=("head",))
    activations = cut.prefix_fn(x)
    assert activations.dtype == jnp.float32
    found = jax.jit(cut.sites_fn)(cut.params, activations)
    expected = np.asarray(exact.features_fn(cut.params, activations))
    assert {value.dtype for value in found.values()} == {jnp.dtype(jnp.float32)}
    error = np.abs(found["features"] - expected).max() / np.abs(expected).max()
    assert 1e-6 < error < 0.05  # rounded, at 8 bits of mantissa over fourteen layers

    def loss(params):
        return cut.features_fn(params, activations).sum()

    grads = jax.jit(jax.grad(loss))(cut.params)
    assert {value.dtype for value in grads.values()} == {jnp.dtype(jnp.float32)}
    text = str(jax.make_jaxpr(cut.features_fn)(cut.params, activations))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("bf16" in line for line in products)


def test_replace_refuses_unknown_paths_and_other_shapes(tiny):
    with pytest.raises(ValueError, match=r"model has no parameter 'blocks.11.kernel'"):
        tiny.replace({"blocks.11.kernel": jnp.zeros((4, 4))})
    with pytest.raises(ValueError, match=r"has no parameter 'layer4.0.norm.mean'"):
        tiny.replace({"layer4.0.norm.mean": jnp.zeros(4)})
    with pytest.raises(ValueError, match=r"head.kernel of model has shape \(4, 6\), got \(6, 4\)"):
        tiny.replace({"head.kernel": jnp.zeros((6, 4))})


def test_replace_refuses_all_but_a_whole_neck(tiny, neck):
    kernel, bias = neck["neck.kernel"], neck["neck.bias"]
    with_neck = tiny.replace(neck)
    assert (with_neck.width, with_neck.stage_width, tiny.stage_width) == (3, 6, 6)
    # Another one takes its place, wider than the first: d is that of the last stage.
    wider = {"neck.kernel": jnp.ones((6, 8), jnp.float32), "neck.bias": jnp.ones(8, jnp.float32)}
    again = with_neck.replace(wider)
    assert (again.width, again.stage_width) == (8, 6)
    cases: list[tuple[base.Backbone, dict[str, jax.Array], str]] = [
        (tiny, {"neck.kernel": kernel.T}, r"\[6, d'\], got \[3, 6\]"),
        (with_neck, {"neck.kernel": kernel[:3]}, r"has 6 features.*got \[3, 3\]"),
        (tiny, {"neck.kernel": bias}, r"\[6, d'\], got \[3\]"),
        (tiny, {"neck.kernel": kernel[:, :0]}, r"\[6, d'\], got \[6, 0\]"),
        (tiny, {"neck.bias": bias}, "a neck.bias needs a neck.kernel"),
        (tiny, {**neck, "neck.bias": bias[:2]}, r"neck.bias \[3\].*got \[2\]"),
        (with_neck, {"neck.kernel": wider["neck.kernel"]}, r"neck.bias \[8\].*got \[3\]"),
        (tiny, {**neck, "neck.scale": bias}, "'neck.scale'; a neck is neck.kernel and neck.bias"),
        (tiny, {"neck": kernel}, "has no parameter 'neck'"),
    ]
    for backbone, params, message in cases:
        with pytest.raises(ValueError, match=message):
            backbone.replace(params)


def test_params_of_another_model_are_refused_by_path(tiny, x, neck):
    cut, strange = tiny.split_at("head"), {"layer5.0.mix.kernel": jnp.zeros((1, 1, 4, 4))}
    for run in (tiny.features, tiny.logits):
        with pytest.raises(ValueError, match=r"model has no parameter 'layer5.0.mix.kernel'"):
            run({**tiny.params, **strange}, x)
        with pytest.raises(ValueError, match=r"params lack 'layer4.0.mix.*' of model"):
            run({p: v for p, v in tiny.params.items() if p != "layer4.0.mix.kernel"}, x)
        with pytest.raises(ValueError, match=r"a neck.bias needs"):
            run({**tiny.params, "neck.bias": neck["neck.bias"]}, x)
    activations = jnp.zeros((2, 3, 2, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"model has no parameter 'layer5.0.mix.kernel'"):
        cut.features_fn({**cut.params, **strange}, activations)
    with pytest.raises(ValueError, match=r"a neck.bias needs"):
        cut.features_fn({**cut.params, "neck.bias": neck["neck.bias"]}, activations)


def test_split_refuses_what_is_neither_a_parameter_nor_a_statistic():
    class Dropping(Mixed):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(ValueError, match=r"m holds a Rng\w+ at 'drop\.rngs\.\w+'"):
        base.split(Dropping(nnx.Rngs(0)), name="m", config=None, width=4, preprocess=Preprocess())


def test_trainables_are_their_own_keys_of_compilations(tiny):
    one, other = tiny.split_at("head"), tiny.split_at("head")
    assert hash(one) != hash(other)
    assert one != other
    assert one.features_fn == one.features_fn


@pytest.mark.parametrize("size", [48, 150])
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_resizing_is_pillows(size, name):
    image = cropped(photographs.chelsea(), 96)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    expected = np.asarray(Image.fromarray(image).resize((size, size), filters[name]), np.float64)
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)
    preprocess = Preprocess(size=size, interpolation=name, mean=mean, std=std)
    found = preprocess(jnp.asarray(image)[None])
    assert found.dtype == jnp.float32
    pixels = np.asarray(found[0], np.float64) * std + mean
    # Pillow rounds to whole pixel values after each of its two passes.
    assert np.abs(pixels - expected).max() <= 1.5
    assert np.abs(pixels - expected).mean() <= 0.4


def test_bicubic_overshoot_is_clipped_as_pillow_does():
    edge = np.zeros((1, 8, 8, 3), np.uint8)
    edge[:, :, 4:] = 255
    neutral: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    pixels = Preprocess(size=24, **neutral)(jnp.asarray(edge))
    assert pixels.min() == 0
    assert pixels.max() == 255


def test_pixels_become_inputs_by_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    preprocess = Preprocess(size=4, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 5.0))
    expected = (pixels.astype(np.float64) - [1, 2, 3]) / [2, 4, 5]
    np.testing.assert_allclose(preprocess(jnp.asarray(pixels)), expected, rtol=1e-6)
    swapped = dataclasses.replace(preprocess, channels="bgr")(jnp.asarray(pixels))
    expected = (pixels[..., ::-1].astype(np.float64) - [1, 2, 3]) / [2, 4, 5]
    np.testing.assert_allclose(swapped, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 4, 3), np.uint8), ((2, 4, 4, 1), np.uint8), ((2, 4, 4, 3), np.float32)],
)
def test_preprocessing_refuses_other_images(shape, dtype):
    with pytest.raises(ValueError, match=r"expected uint8 RGB images \[n, h, w, 3\], got"):
        Preprocess(size=4)(jnp.zeros(shape, dtype))


def test_preprocessing_refuses_to_stretch():
    with pytest.raises(ValueError, match=r"square images, got 4 x 6 pixels.*crop them first"):
        Preprocess(size=4)(jnp.zeros((2, 4, 6, 3), jnp.uint8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": "grb"}, "channels must be 'rgb' or 'bgr', got 'grb'"),
        (
            {"interpolation": "linear"},
            "interpolation must be 'bicubic' or 'bilinear', got 'linear'",
        ),
        ({"std": (1.0, 0.0, 1.0)}, "deviations positive"),
        ({"std": (1.0, -2.0, 1.0)}, "deviations positive"),
        ({"std": (1.0, float("nan"), 1.0)}, "deviations positive"),
        ({"mean": (1.0, float("inf"), 1.0)}, "means must be finite"),
        ({"mean": (1.0, 2.0)}, "three means and deviations"),
        ({"std": 1.0}, "three means and deviations"),
    ],
)
def test_preprocessing_refuses_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**fields)


def test_preprocessing_refuses_a_crop_larger_than_the_image():
    with pytest.raises(ValueError, match=r"need 1 <= size <= resize, got 300 and 256"):
        Preprocess(size=300)


def test_under_compares_whole_components():
    assert under("layer4.0.norm", "layer4")
    assert under("layer4", "layer4")
    assert not under("layer40.0", "layer4")
    assert not under("layer4", "layer4.0")
