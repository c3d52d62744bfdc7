"""MLP: against NumPy in float64; the last layer folds a linear change of the features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from backbones import abstract_backbone, quick_jit
from flax import nnx

from jaximm.models import mlp, statistics

CONFIG = mlp.MLPConfig(input_shape=(2, 3, 3), widths=(7, 5, 4), activation="tanh", classes=3)

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "tanh": np.tanh,
}


def make(config=CONFIG, seed=0):
    """A backbone with random biases too."""
    backbone = abstract_backbone(mlp.MLP._replace(width=config.widths[-1]), config, name="mlp")
    rng = np.random.default_rng(seed)
    return backbone.replace(
        {
            path: jnp.asarray(rng.normal(size=value.shape), jnp.float32)
            for path, value in backbone.params.items()
        }
    )


def inputs(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_features_and_logits_match_numpy(activation):
    config = mlp.MLPConfig(
        input_shape=(2, 3, 3), widths=(7, 5, 4), activation=activation, classes=3
    )
    backbone = make(config)
    w = {path: np.asarray(value, np.float64) for path, value in backbone.params.items()}
    x = inputs(1, (6, 2, 3, 3))
    h = np.asarray(x, np.float64).reshape(6, 18)
    for i in range(3):
        h = h @ w[f"layers.{i}.kernel"] + w[f"layers.{i}.bias"]
        h = h if i == 2 else ACTIVATIONS[activation](h)
    found = quick_jit(backbone.features)(backbone.params, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, h, rtol=0, atol=1e-4)
    assert (h < -1).any()  # an activation after the last layer would show
    logits = h @ w["classifier.kernel"] + w["classifier.bias"]
    np.testing.assert_allclose(backbone.logits(backbone.params, x), logits, rtol=0, atol=1e-3)


def test_a_linear_change_of_the_features_folds_into_the_last_layer():
    backbone = make()
    x, theta = inputs(2, (6, 18)), inputs(3, (4, 4))
    last = backbone.params
    folded = backbone.replace(
        {
            "layers.2.kernel": last["layers.2.kernel"] @ theta,
            "layers.2.bias": last["layers.2.bias"] @ theta,
        }
    )
    expected = backbone.features(backbone.params, x) @ theta
    np.testing.assert_allclose(folded.features(folded.params, x), expected, rtol=0, atol=1e-4)


def test_stages_in_two_parts_equal_the_whole_and_only_the_named_ones_train():
    backbone = make()
    x = inputs(4, (6, 2, 3, 3))
    cut = backbone.split_at("layers.2", sites=("layers.2",))
    assert set(cut.params) == {"layers.2.kernel", "layers.2.bias"}
    activations = cut.prefix_fn(x)
    assert activations.shape == (6, 5)
    found = cut.sites_fn(cut.params, activations)
    np.testing.assert_array_equal(found["layers.2"], activations)
    whole = backbone.features(backbone.params, x)
    np.testing.assert_allclose(found["features"], whole, rtol=0, atol=1e-5)


def test_offsets_are_added_to_what_enters_a_site_and_to_the_features():
    backbone = make()
    cut = backbone.split_at("layers.2", sites=("layers.2",))
    activations = cut.prefix_fn(inputs(4, (6, 2, 3, 3)))
    offsets = {"layers.2": inputs(5, (6, 5)), "features": inputs(6, (6, 4))}
    moved = cut.features_fn(cut.params, activations + offsets["layers.2"]) + offsets["features"]
    for perturbed_fn in (cut.perturbed_fn, statistics.perturbed_fn_of(cut)):
        found = perturbed_fn(cut.params, activations, offsets)
        np.testing.assert_allclose(found, moved, rtol=1e-6)
    assert statistics.perturbed_fn_of(backbone.split_at("layers.2")) is None


def test_the_registered_one_takes_small_colour_images():
    spec = mlp.MLP
    backbone = abstract_backbone(spec)
    # 3072 * 256 + 256, 256 * 128 + 128, 128 * 10 + 10
    assert sum(value.size for value in backbone.params.values()) == 786_688 + 32_896 + 1_290
    assert {value.dtype for value in backbone.params.values()} == {jnp.dtype("float32")}
    pixels = spec.preprocess(jnp.full((2, 32, 32, 3), 255, jnp.uint8))
    np.testing.assert_allclose(pixels, 1.0, rtol=1e-6)
    assert jax.eval_shape(backbone.features, backbone.params, pixels).shape == (2, 128)


def test_own_layout_is_our_own_paths():
    entries = mlp.own_layout(CONFIG).entries
    assert {entry.path for entry in entries} == set(make().params)
    assert all(entry.keys == (entry.path,) and entry.transform == "same" for entry in entries)


def test_wrong_inputs_stages_and_configurations_are_refused():
    backbone = make()
    module = nnx.eval_shape(lambda: mlp.build(CONFIG, nnx.Rngs(0)))
    for shape in ((6, 17), (18,)):
        with pytest.raises(ValueError, match="18 numbers"):
            backbone.features(backbone.params, jnp.zeros(shape, jnp.float32))
    with pytest.raises(ValueError, match="choose from"):
        module.run_stage("layers.3", jnp.zeros((1, 4), jnp.float32))
    wrong: list[dict[str, Any]] = [
        {"widths": ()},
        {"input_shape": (0,)},
        {"activation": "swish"},
        {"classes": 0},
    ]
    for fields in wrong:
        with pytest.raises(ValueError, match=next(iter(fields))):
            mlp.MLPConfig(**fields)
