"""EfficientNet-Lite: published weights recognise photographs; depthwise convolutions; layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import abstract_backbone, cropped, number_of_parameters, quick_jit, random_backbone
from flax import nnx
from helpers import thinned_rows
from jax.sharding import AxisType, PartitionSpec
from skimage import data as photographs

from jaximm import models
from jaximm.carriers import MissingCarrierError
from jaximm.models import efficientnet
from jaximm.models.pretrained import pretrained_weights
from jaximm.models.weights import export_state

pytestmark = pytest.mark.heavy

SPECS = {
    "efficientnet_lite0": efficientnet.EFFICIENTNET_LITE0,
    "efficientnet_lite1": efficientnet.EFFICIENTNET_LITE1,
    "efficientnet_lite2": efficientnet.EFFICIENTNET_LITE2,
}


@functools.cache
def load(name):
    try:
        return models.create(name, weights="pretrained")
    except MissingCarrierError as error:
        pytest.skip(str(error))


def recognised(backbone):
    """Classes and their probabilities for a cat and for a cup of coffee."""
    size = backbone.preprocess.size
    images = [cropped(p, size) for p in (photographs.chelsea(), photographs.coffee())]
    logits = jax.jit(backbone.logits)(
        backbone.params, backbone.preprocess(jnp.asarray(np.stack(images)))
    )
    assert logits.shape == (2, 1000)
    assert logits.dtype == jnp.float32
    return list(logits.argmax(1)), jax.nn.softmax(logits).max(1)


@pytest.mark.slow
def test_published_weights_recognise_a_cat_and_a_cup_of_coffee():
    classes, probabilities = recognised(load("efficientnet_lite0"))
    assert classes == [285, 967]  # Egyptian cat, espresso
    # Of a plain implementation with XLA's grouped convolutions in place of the shifted sums.
    np.testing.assert_allclose(probabilities, [0.3846, 0.9398], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_the_larger_ones_recognise_them_too(name):
    assert recognised(load(name))[0] == [285, 967]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name.endswith("0") else pytest.param(name, marks=pytest.mark.slow) for name in SPECS],
)
def test_the_published_arrays_come_back_bit_for_bit(name):
    backbone, source = load(name), pretrained_weights(name)
    layout = efficientnet.efficientnet_pytorch_layout(backbone.config)
    exported = export_state(backbone.params, backbone.stats, layout)
    assert set(exported) == set(source)  # the counters of batches too, which a strict loader wants
    for key, value in exported.items():
        np.testing.assert_array_equal(value, source[key], err_msg=key)
        assert value.dtype == source[key].dtype


@pytest.mark.parametrize(
    ("name", "count", "blocks"),
    [
        ("efficientnet_lite0", 4_652_008, 16),
        pytest.param("efficientnet_lite1", 5_416_680, 21, marks=pytest.mark.slow),
        pytest.param("efficientnet_lite2", 6_092_072, 21, marks=pytest.mark.slow),
    ],
)
def test_shapes_dtypes_and_number_of_parameters(name, count, blocks):
    backbone = abstract_backbone(SPECS[name])
    assert number_of_parameters(backbone) == count
    leaves = [*backbone.params.values(), *backbone.stats.values()]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    assert backbone.stage_names == ("stem", *(f"blocks.{i}" for i in range(blocks)), "head")


def test_blocks_with_multipliers():
    assert [
        (s.side, s.stride, s.in_features, s.out_features)
        for s in efficientnet.block_shapes(efficientnet.EFFICIENTNET_LITE2.config)[:4]
    ] == [(3, 1, 32, 16), (3, 2, 16, 24), (3, 1, 24, 24), (3, 1, 24, 24)]
    widths = [s.out_features for s in efficientnet.block_shapes(SPECS["efficientnet_lite2"].config)]
    # 1.1 times 40, 80, 112, 192, 320, to the nearest multiple of 8.
    assert sorted(set(widths)) == [16, 24, 48, 88, 120, 208, 352]
    # 1.3 * 16 = 20.8 would round to 24, 0.6 * 24 = 14.4 to 16; 0.7 * 16 = 11.2 rounds to 8, which
    # loses more than a tenth, so 16.
    shapes = efficientnet.block_shapes(efficientnet.EfficientNetConfig(width_multiplier=0.7))
    assert shapes[0].out_features == 16


@pytest.fixture(scope="module")
def small():
    """A narrow network of eight blocks with random weights, its statistics included."""
    config = efficientnet.EfficientNetConfig(width_multiplier=0.25, depth_multiplier=0.3, classes=3)
    return random_backbone(efficientnet.EFFICIENTNET_LITE0, config)


@pytest.mark.slow
def test_prefix_and_suffix_are_the_whole(small):
    x = jax.random.normal(jax.random.key(1), (2, 37, 50, 3), jnp.float32)
    trainable = small.split_at("blocks.7", sites=("blocks.7.expand", "head.conv"))
    assert trainable.prefix_stages[-1] == "blocks.6"
    assert trainable.suffix_stages == ("blocks.7", "head")
    assert all(path.startswith("blocks.7.") for path in trainable.params)

    @quick_jit
    def run(x):
        activations = trainable.prefix_fn(x)
        sites = trainable.sites_fn(trainable.params, activations)
        return activations, sites, small.features(small.params, x)

    activations, sites, whole = run(x)
    assert activations.shape == (2, 2, 2, 48)  # 37 and 50 pixels, halved upwards five times
    np.testing.assert_allclose(sites["features"], whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        sites["blocks.7.expand"], activations.reshape(8, 48), rtol=1e-5, atol=1e-6
    )
    assert sites["head.conv"].shape == (8, 80)
    with pytest.raises(ValueError, match=r"depthwise.*must be a linear or an ungrouped"):
        small.split_at("blocks.7", sites=("blocks.7.depthwise",))


# Odd, even, and smaller than the kernel.
FORMS = (efficientnet.shifted_sum, efficientnet.grouped_conv)
SHAPES = [(5, 2, 6, 11), (3, 1, 7, 6), (3, 2, 8, 5), (5, 2, 1, 2)]


@pytest.mark.parametrize(("side", "stride", "height", "width"), thinned_rows(SHAPES, keep=2))
def test_shifted_sums_are_the_grouped_convolution_with_its_gradients(side, stride, height, width):
    x = jax.random.normal(jax.random.key(0), (2, height, width, 5))
    kernel = jax.random.normal(jax.random.key(1), (side, side, 1, 5))
    assert x.dtype == jnp.float64

    def both(fun, x, kernel):
        def loss(x, kernel):
            y = fun(x, kernel, stride=stride)
            weights = jnp.arange(1.0, y.size + 1).reshape(y.shape)
            return (weights * y**2).sum(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    run = quick_jit(lambda x, kernel: [both(form, x, kernel) for form in FORMS])
    ((gx, gk), y), ((gx_ref, gk_ref), y_ref) = run(x, kernel)
    for found, expected in ((y, y_ref), (gx, gx_ref), (gk, gk_ref)):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-8)


def test_same_padding_of_an_even_image_is_on_the_far_side_only():
    x = jax.random.normal(jax.random.key(0), (1, 6, 8, 2))
    corner = np.zeros((3, 3, 1, 2))
    corner[0, 0] = 1
    found = quick_jit(functools.partial(efficientnet.depthwise_conv, stride=2))(x, corner)
    np.testing.assert_array_equal(found, np.asarray(x)[:, ::2, ::2])


def test_sums_of_bfloat16_are_accumulated_in_float32():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (5, 5, 1, 3)).astype(jnp.bfloat16)
    run = quick_jit(functools.partial(efficientnet.depthwise_conv, stride=1))
    found, exact = run(x, kernel), run(x.astype(jnp.float64), kernel.astype(jnp.float64))
    assert found.dtype == jnp.bfloat16
    # One rounding to 8 bits of mantissa.
    np.testing.assert_allclose(found.astype(jnp.float64), exact, rtol=2**-8, atol=1e-6)


def test_accelerators_get_a_convolution_and_cpus_do_not():
    fun = jax.jit(functools.partial(efficientnet.depthwise_conv, stride=2))
    traced = fun.trace(jnp.zeros((2, 8, 8, 4), jnp.float32), jnp.zeros((3, 3, 1, 4), jnp.float32))
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    assert "stablehlo.convolution" not in texts["cpu"]
    for platform in ("cuda", "tpu"):
        assert "stablehlo.convolution" in texts[platform]
        assert "feature_group_count = 4" in texts[platform]


def test_depthwise_gradients_over_a_mesh_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (16, 5, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 3))

    def loss(kernel, x):
        return (efficientnet.depthwise_conv(x, kernel, stride=2) ** 3).sum()

    def local(kernel, x):
        kernel = jax.lax.pcast(kernel, "data", to="varying")
        return jax.lax.psum(jax.grad(loss)(kernel, x), "data")

    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = quick_jit(jax.shard_map(local, mesh=mesh, in_specs=(whole, rows), out_specs=whole))
    plain = quick_jit(jax.grad(loss))
    np.testing.assert_allclose(sharded(kernel, x), plain(kernel, x), rtol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match=r"positive multipliers.*got width 0, depth"):
        efficientnet.EfficientNetConfig(width_multiplier=0)
    with pytest.raises(ValueError, match=r"at least one class"):
        efficientnet.EfficientNetConfig(classes=0)
    config = efficientnet.EfficientNetConfig(depth_multiplier=0.3)
    module = nnx.eval_shape(lambda: efficientnet.EfficientNet(config, nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"unknown stage 'blocks\.8'"):
        module.run_stage("blocks.8", jnp.zeros((1, 32, 32, 3)))
