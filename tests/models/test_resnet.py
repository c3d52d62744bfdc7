"""Residual networks against a plain reference in torch's names, shapes and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import abstract_backbone, number_of_parameters, quick_jit, random_backbone
from flax import nnx
from helpers import thinned_rows

from jaximm.models import resnet
from jaximm.models.weights import export_state, import_state

SMALL = {
    "basic": resnet.ResNetConfig(depths=(2, 1), classes=5),
    "bottleneck": resnet.ResNetConfig(block="bottleneck", depths=(1, 1), classes=5),
}


@pytest.mark.parametrize(
    ("spec", "count", "width", "blocks"),
    thinned_rows([(resnet.RESNET50, 25_557_032, 2048, 16), (resnet.RESNET18, 11_689_512, 512, 8)]),
)
def test_shapes_dtypes_and_number_of_parameters(spec, count, width, blocks):
    backbone = abstract_backbone(spec)
    assert number_of_parameters(backbone) == count
    leaves = [*backbone.params.values(), *backbone.stats.values()]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    assert spec.width == width == backbone.params["classifier.kernel"].shape[0]
    assert len(backbone.stage_names) == blocks + 2
    assert backbone.stage_names[:3] == ("stem", "layer1.0", "layer1.1")
    assert backbone.stage_names[-1] == "pool"
    # Only a block that changes the shape has a shortcut of its own; the first bottleneck widens.
    shortcuts = [path for path in backbone.params if path.endswith("shortcut.kernel")]
    first = [1] if spec is resnet.RESNET50 else []
    assert shortcuts == [f"layer{i}.0.shortcut.kernel" for i in [*first, 2, 3, 4]]


def reference(state, x, *, block):
    """Logits of a state dict in torch's names, by convolutions in its own [O, I, H, W] order."""
    state = {key: jnp.asarray(value) for key, value in state.items()}
    x = jnp.asarray(x.transpose(0, 3, 1, 2))

    def conv(x, key, stride):
        kernel = state[f"{key}.weight"]
        pad = kernel.shape[2] // 2
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad), (pad, pad)))

    def norm(x, key):
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{key}.{n}"][None, :, None, None] for n in names)
        return (x - mean) / jnp.sqrt(var + 1e-5) * weight + bias

    x = jax.nn.relu(norm(conv(x, "conv1", 2), "bn1"))
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-jnp.inf)
    height, width = ((side + 1) // 2 for side in x.shape[2:])
    windows = [
        padded[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    x = jnp.max(jnp.stack(windows), axis=0)
    for at in sorted({".".join(key.split(".")[:2]) for key in state if key.startswith("layer")}):
        stride = 2 if at[5] != "1" and at.endswith(".0") else 1
        if block == "basic":
            y = jax.nn.relu(norm(conv(x, f"{at}.conv1", stride), f"{at}.bn1"))
            y = norm(conv(y, f"{at}.conv2", 1), f"{at}.bn2")
        else:
            y = jax.nn.relu(norm(conv(x, f"{at}.conv1", 1), f"{at}.bn1"))
            y = jax.nn.relu(norm(conv(y, f"{at}.conv2", stride), f"{at}.bn2"))
            y = norm(conv(y, f"{at}.conv3", 1), f"{at}.bn3")
        if f"{at}.downsample.0.weight" in state:
            x = norm(conv(x, f"{at}.downsample.0", stride), f"{at}.downsample.1")
        x = jax.nn.relu(x + y)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"][None, :]


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_logits_are_those_of_the_reference(block):
    config = SMALL[block]
    backbone = random_backbone(resnet.RESNET18, config)
    state = export_state(backbone.params, backbone.stats, resnet.torchvision_layout(config))
    x = np.random.default_rng(1).standard_normal((2, 33, 50, 3)).astype(np.float32)
    expected = quick_jit(lambda x: reference(state, x, block=block))(x)
    found = quick_jit(backbone.logits)(backbone.params, x)
    assert found.shape == (2, 5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "spec", [resnet.RESNET18, pytest.param(resnet.RESNET50, marks=pytest.mark.slow)]
)
def test_a_state_dict_comes_back_bit_for_bit_with_its_counters(spec):
    config = spec.config
    layout = spec.layouts["timm"](config)
    backbone = random_backbone(spec)
    exported = export_state(backbone.params, backbone.stats, layout)
    norms = [key for key in exported if key.endswith(".num_batches_tracked")]
    assert len(norms) == len([path for path in backbone.stats if path.endswith(".mean")])
    assert {exported[key].dtype for key in norms} == {np.dtype(np.int64)}
    assert {exported[key].shape for key in norms} == {()}
    assert exported["layer4.0.downsample.0.weight"].shape == (
        spec.width,
        spec.width // 2,
        1,
        1,
    )
    assert exported["fc.weight"].shape == (1000, spec.width)
    again = import_state(exported, layout, backbone.params, backbone.stats, name="export")
    for found, ours in ((again.params, backbone.params), (again.stats, backbone.stats)):
        assert set(found) == set(ours)
        for path in ours:
            np.testing.assert_array_equal(found[path], ours[path])


def test_errors():
    with pytest.raises(ValueError, match=r"block must be 'basic' or 'bottleneck', got 'wide'"):
        resnet.ResNetConfig(block="wide")
    with pytest.raises(ValueError, match=r"at least one block per layer.*\(2, 0\)"):
        resnet.ResNetConfig(depths=(2, 0))
    with pytest.raises(ValueError, match=r"at least one block per layer"):
        resnet.ResNetConfig(depths=())
    module = nnx.eval_shape(lambda: resnet.ResNet(SMALL["basic"], nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"unknown stage 'layer1'.*'layer1.0'"):
        module.run_stage("layer1", jnp.zeros((1, 8, 8, 64)))
