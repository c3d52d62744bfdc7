"""Refreshed batch-norm statistics against NumPy's moments of what each norm gets."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from backbones import quick_jit, random_backbone
from flax import nnx

from jaximm import attacks, immunisers
from jaximm.attacks.weights import refresh_statistics
from jaximm.models import efficientnet, mlp, resnet, statistics
from jaximm.models.flat import under
from jaximm.models.layers import batch_norm
from jaximm.models.spec import Preprocess
from jaximm.models.whole import whole
from jaximm.run.prepare import batched
from jaximm.training import fit
from jaximm.types import Batch, PairedBatch

SIDE = 8


@functools.cache
def _resnet():
    config = resnet.ResNetConfig(depths=(1,), classes=3)
    return random_backbone(resnet.RESNET18, config).split_at("layer1.0")


@functools.cache
def _efficientnet():
    config = efficientnet.EfficientNetConfig(width_multiplier=0.25, depth_multiplier=0.3, classes=3)
    return random_backbone(efficientnet.EFFICIENTNET_LITE0, config).split_at("head")


def _activations(channels, n=6):
    rng = np.random.default_rng(0)
    return jnp.asarray(2 + rng.normal(size=(n, SIDE, SIDE, channels)), jnp.float32)


def _convolved(x, kernel):
    """A same-size convolution with stride 1, position by position."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    side = kernel.shape[0]
    pad = side // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return sum(
        padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
        for i in range(side)
        for j in range(side)
    )


def _moments(x):
    return x.mean((0, 1, 2)), x.var((0, 1, 2))


def test_statistics_of_a_residual_block_are_those_of_its_inputs_in_turn():
    trainable, x = _resnet(), _activations(64)
    params, stats = trainable.params, trainable.backbone.stats
    refresh_fn = statistics.refresh_fn_of(trainable)
    found = quick_jit(refresh_fn)(params, x)
    assert set(found) - set(params) == {
        f"layer1.0.norm{i}.{name}" for i in (1, 2) for name in ("mean", "var")
    }
    first = _convolved(x, params["layer1.0.conv1.kernel"])
    mean, var = _moments(first)
    np.testing.assert_allclose(found["layer1.0.norm1.mean"], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["layer1.0.norm1.var"], var, rtol=1e-4)
    scale, bias = (
        np.asarray(params[f"layer1.0.norm1.{name}"], np.float64) for name in ("scale", "bias")
    )
    normed = (first - mean) / np.sqrt(var + resnet.NORM_EPSILON) * scale + bias
    second = _convolved(np.maximum(normed, 0), params["layer1.0.conv2.kernel"])
    mean, var = _moments(second)
    np.testing.assert_allclose(found["layer1.0.norm2.mean"], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["layer1.0.norm2.var"], var, rtol=1e-4)
    for path, value in params.items():
        np.testing.assert_array_equal(found[path], value)
    for path, value in stats.items():  # nothing was written into the backbone
        assert not isinstance(value, jax.core.Tracer), path
    assert not np.allclose(found["layer1.0.norm1.mean"], stats["layer1.0.norm1.mean"])
    # Statistics that are there already are replaced.
    again = quick_jit(refresh_fn)({**params, "layer1.0.norm1.var": jnp.full((64,), jnp.nan)}, x)
    for path, value in found.items():
        np.testing.assert_array_equal(again[path], value)


def test_statistics_of_a_pointwise_head_and_features_that_use_them():
    trainable = _efficientnet()
    kernel = trainable.params["head.conv.kernel"]
    x = _activations(kernel.shape[2])
    found = quick_jit(statistics.refresh_fn_of(trainable))(trainable.params, x)
    assert all(under(path, "head") for path in found)
    inside = _convolved(x, kernel)
    mean, var = _moments(inside)
    np.testing.assert_allclose(found["head.norm.mean"], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["head.norm.var"], var, rtol=1e-4)
    features_fn = statistics.features_with_statistics(trainable)
    scale, bias = (
        np.asarray(trainable.params[f"head.norm.{name}"], np.float64) for name in ("scale", "bias")
    )
    stored = [
        np.asarray(trainable.backbone.stats[f"head.norm.{name}"], np.float64)
        for name in ("mean", "var")
    ]
    for params, (centre, spread) in ((found, (mean, var)), (trainable.params, stored)):
        normed = (inside - centre) / np.sqrt(spread + efficientnet.NORM_EPSILON) * scale + bias
        expected = np.clip(normed, 0, 6).mean((1, 2))
        np.testing.assert_allclose(
            quick_jit(features_fn)(params, x), expected, rtol=1e-4, atol=1e-4
        )
    np.testing.assert_array_equal(
        quick_jit(features_fn)(trainable.params, x),
        quick_jit(trainable.features_fn)(trainable.params, x),
    )
    with pytest.raises(ValueError, match="has no parameter 'other'"):
        features_fn({**found, "other": kernel}, x)


def test_statistics_have_no_gradient_and_parameters_do():
    trainable = _efficientnet()
    x = _activations(trainable.params["head.conv.kernel"].shape[2])
    found = quick_jit(statistics.refresh_fn_of(trainable))(trainable.params, x)
    features_fn = statistics.features_with_statistics(trainable)
    slopes = quick_jit(jax.grad(lambda params: jnp.sum(features_fn(params, x) ** 2)))(found)
    for path, slope in slopes.items():
        assert np.asarray(slope).any() == (path in trainable.params), path


def test_functions_share_programs_by_structure_and_frozen_numbers_are_leaves():
    trainable = _resnet()
    path = next(path for path in trainable.params if path.endswith("kernel"))
    other = trainable.backbone.replace({path: 2 * trainable.backbone.params[path]})
    moved = other.split_at(trainable.pattern)  # the same but for what trains
    stats = {path: 2 * value for path, value in trainable.backbone.stats.items()}
    frozen = dataclasses.replace(
        trainable, backbone=dataclasses.replace(trainable.backbone, stats=stats)
    )
    made = statistics.refresh_fn_of, statistics.features_with_statistics
    for make in made:
        functions = make(trainable), make(moved), make(frozen)
        leaves, structures = zip(*map(jax.tree.flatten, functions), strict=True)
        assert structures[0] == structures[1] == structures[2]
        assert len(set(map(hash, structures))) == 1
        for ours, same, twice in zip(*leaves, strict=True):
            np.testing.assert_array_equal(ours, same)
            np.testing.assert_array_equal(2 * ours, twice)
        assert leaves[0]
    assert len({jax.tree.structure(make(trainable)) for make in made}) == 2
    assert statistics.refresh_fn_of(trainable.backbone.split_at("")) is None  # norms before the cut
    plain = random_backbone(mlp.MLP, mlp.MLPConfig(widths=(4, 3)))
    assert statistics.refresh_fn_of(plain.split_at("*")) is None


@pytest.mark.slow
def test_no_program_keeps_what_is_frozen_after_the_cut():
    config = mlp.MLPConfig(input_shape=(6,), widths=(5, 4), classes=3)
    rows = Batch(_activations(6)[:, 0, 0], jnp.arange(6) % 3)

    def run(seed):
        backbone = random_backbone(mlp.MLP, config)
        backbone = backbone.replace({path: seed + x for path, x in backbone.params.items()})
        trainable = backbone.split_at("layers.0.kernel")
        assert set(backbone.params) > set(trainable.params)
        features_fn = statistics.features_with_statistics(trainable)
        features = batched(features_fn, trainable.params, rows.x)
        head = immunisers.init_head(4, 3, features.dtype)
        problem = immunisers.Problem(
            features_fn=features_fn, width=4, classes=3, harmful_classes=3, harmful_head=head,
            optimiser=optax.sgd(0.1),
        )  # fmt: skip
        method = immunisers.make_immuniser("npo", immunisers.make_config("npo"), problem)
        draw = jax.tree_util.Partial(lambda pair, step: pair, PairedBatch(rows, rows))
        start = immunisers.ProbeParams(dict(trainable.params), head)
        fitted = fit(method, start, draw, steps=1, log_every=1, seed=0)
        assert np.isfinite(fitted.trajectory[-1]["harmful_loss"])

    def alive():
        gc.collect()
        return len(jax.live_arrays())

    run(1.0)  # constants of programs, once a process
    before = alive()
    run(2.0)
    assert alive() == before


class Net(nnx.Module):
    """A linear layer, a batch norm, tanh."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(5, 7, rngs=rngs)
        self.norm = batch_norm(7, 1e-5, rngs)

    def __call__(self, x):
        return jnp.tanh(self.norm(self.linear(x)))


def _net(compute_dtype=None):
    spec = whole(Net, width=7, preprocess=Preprocess(size=4, resize=4))
    trainable = random_backbone(spec).split_at("*", compute_dtype=compute_dtype)
    rng = np.random.default_rng(1)
    x = jnp.asarray(3 + rng.normal(size=(60, 5)), compute_dtype or jnp.float32)
    return trainable, Batch(x, jnp.asarray(rng.integers(0, 2, 60), jnp.int32))


def _check(found, trainable, x):
    kernel, bias = (
        np.asarray(trainable.params[f"net.linear.{name}"], np.float64)
        for name in ("kernel", "bias")
    )
    inside = np.asarray(x, np.float64) @ kernel + bias
    np.testing.assert_allclose(found["net.norm.mean"], inside.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["net.norm.var"], inside.var(0), rtol=1e-5)


def test_statistics_are_taken_in_the_dtype_of_the_parameters():
    trainable, rows = _net(jnp.bfloat16)
    found = quick_jit(statistics.refresh_fn_of(trainable))(trainable.params, rows.x)
    _check(found, trainable, rows.x)
    assert all(leaf.dtype == jnp.float32 for leaf in found.values())
    features = quick_jit(statistics.features_with_statistics(trainable))(found, rows.x)
    assert features.dtype == jnp.float32
    assert features.shape == (60, 7)


@pytest.mark.heavy
def test_an_attacker_runs_on_refreshed_statistics():
    trainable, rows = _net()
    problem = attacks.fine_tune_problem(
        features_fn=statistics.features_with_statistics(trainable),
        refresh_fn=statistics.refresh_fn_of(trainable),
        params=trainable.params,
        head=attacks.zero_head(7, 2, jnp.float32),
        train=rows,
        held_out=rows,
    )
    attack = refresh_statistics.refresh_statistics(learning_rates=(1e-2,))
    trace = attacks.run_fine_tune(
        attack, problem, steps=20, batch_size=None, record=2, keep_weights=True
    )
    assert trace.weights is not None
    found = {path: np.asarray(leaf[0, 0]) for path, leaf in trace.weights.params.items()}
    _check(found, trainable, problem.train.x)
    assert float(trace.train_loss[0, 0, -1]) < float(trace.train_loss[0, 0, 0])
