"""A Flax module of a user's own as a backbone, from `register` to a saved checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import random_backbone
from flax import nnx

import jaximm
from jaximm import checkpoint, models
from jaximm.models import backbone as base
from jaximm.models.spec import Preprocess
from jaximm.models.whole import WholeConfig, whole


class Net(nnx.Module):
    """Convolution, batch norm, ReLU, mean, dropout, two linear layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.fc1 = nnx.Linear(5, 7, rngs=rngs)
        self.fc2 = nnx.Linear(7, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.fc2(jnp.tanh(self.fc1(self.drop(x))))


SPEC = whole(Net, width=4, preprocess=Preprocess(size=4, resize=4), source="this file")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(models, "REGISTRY", dict(models.REGISTRY))
    jaximm.register("model", "mine", SPEC)


@pytest.fixture(scope="module")
def backbone():
    """Random numbers everywhere, so that no statistic is its initial one."""
    return random_backbone(SPEC, name="mine")


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 3)), jnp.float32)


def by_hand(flat, stats, x):
    """Features in float64 from the flat arrays."""
    p, s = (
        {path.removeprefix("net."): np.asarray(value, np.float64) for path, value in part.items()}
        for part in (flat, stats)
    )
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = p["conv.bias"] + sum(
        padded[:, i : i + 4, j : j + 4] @ p["conv.kernel"][i, j] for i in range(3) for j in range(3)
    )
    y = (y - s["norm.mean"]) / np.sqrt(s["norm.var"] + 1e-5) * p["norm.scale"] + p["norm.bias"]
    y = np.maximum(y, 0).mean((1, 2)) @ p["fc1.kernel"] + p["fc1.bias"]
    return np.tanh(y) @ p["fc2.kernel"] + p["fc2.bias"]


def test_features_are_the_modules_in_evaluation_mode(backbone, x):
    # Dropout on, or batch statistics in place of stored ones, would show.
    found = jax.jit(backbone.features)(backbone.params, x)
    np.testing.assert_allclose(found, by_hand(backbone.params, backbone.stats, x), atol=1e-5)
    assert sorted(backbone.stats) == ["net.norm.mean", "net.norm.var"]
    assert backbone.stage_names == ("net",)
    with pytest.raises(ValueError, match="no classifier"):
        backbone.logits(backbone.params, x)


def test_any_part_trains_and_nothing_is_cut_off(backbone, x):
    cut = backbone.split_at("net.fc1", sites=("net.fc2",))
    assert (cut.prefix_stages, cut.suffix_stages) == ((), ("net",))
    assert sorted(cut.params) == ["net.fc1.bias", "net.fc1.kernel"]
    moved = {path: value + 0.5 for path, value in cut.params.items()}
    found = jax.jit(cut.sites_fn)(moved, cut.prefix_fn(x))
    expected = by_hand({**backbone.params, **moved}, backbone.stats, x)
    np.testing.assert_allclose(found["features"], expected, atol=1e-5)
    assert found["net.fc2"].shape == (6, 7)


def test_a_registered_module_is_created_exported_and_saved_by_name(tmp_path, x):
    mine = models.create("mine", rng_key=jax.random.key(0))
    assert (mine.name, mine.width, mine.config) == ("mine", 4, WholeConfig())
    assert mine.preprocess.size == 4
    assert np.any(mine.params["net.fc2.kernel"] != 0)
    neck = {"neck.kernel": jnp.ones((4, 2), jnp.float32)}
    moved = mine.replace({"net.fc2.bias": jnp.full(4, 0.5, jnp.float32), **neck})

    path = models.export_backbone(moved, tmp_path / "w.safetensors")
    checkpoint.save_immunised(tmp_path / "saved", moved, method="none")
    loaded = checkpoint.load_immunised(tmp_path / "saved").backbone
    for again in (models.create("mine", weights=path), loaded):
        assert again.width == 2
        for ours, theirs in ((moved.params, again.params), (moved.stats, again.stats)):
            assert set(ours) == set(theirs)
            for name in ours:
                np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_array_equal(
            again.features(again.params, x), moved.features(moved.params, x)
        )


def split(spec):
    module = spec.build(spec.config, nnx.Rngs(0))
    return base.split(module, name="f", config=None, width=spec.width, preprocess=spec.preprocess)


class Positional(nnx.Module):
    def __init__(self, rngs):
        self.net = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.net(x)


def test_builders_take_rngs_by_position_or_by_keyword():
    spec = whole(lambda rngs: nnx.Sequential(Positional(rngs), nnx.relu), width=2)
    backbone = split(spec)
    assert set(backbone.params) == {"net.layers.0.net.kernel", "net.layers.0.net.bias"}
    assert backbone.features(backbone.params, jnp.ones((5, 3), jnp.float32)).shape == (5, 2)
    assert spec.preprocess == Preprocess()
    assert [entry.path for entry in spec.layouts["own"](spec.config).entries] == [*backbone.params]


class Noisy(Positional):
    """Draws in evaluation mode too."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.noise = rngs.fork()


class Counting(Positional):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.count = nnx.Variable(jnp.zeros(()))


def make(build, width=2):
    return split(whole(build, width=width))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Noisy, r"f holds a Rng\w+ at 'net\.noise\..*a dropout layer without rngs"),
        (Counting, r"f holds a Variable at 'net\.count'"),
        (lambda rngs: jnp.ones(3), "expected build to return an nnx.Module, got"),
        (lambda rngs: nnx.Dict({"a.b": nnx.Param(jnp.ones(3))}), "has a name with a dot"),
        (3, "expected a module class or a function of rngs, got int"),
        (Positional(nnx.Rngs(0)), "or a function of rngs, got Positional"),
    ],
)
def test_what_cannot_be_a_pure_function_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        make(build)


def test_wrong_widths_stages_and_fields_are_refused():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        make(Positional, width=0)
    wide = make(Positional, width=5)
    with pytest.raises(ValueError, match=r"Positional must return features \[4, 5\].*got \[4, 2\]"):
        wide.features(wide.params, jnp.ones((4, 3), jnp.float32))
    maps = make(Positional)
    with pytest.raises(ValueError, match=r"\[4, 2\] of inputs \[4, 6, 3\], got \[4, 6, 2\]"):
        maps.features(maps.params, jnp.ones((4, 6, 3), jnp.float32))
    with pytest.raises(ValueError, match=r"unknown stage 'fc'; there is only 'net'"):
        base.run_stages(maps, maps.params, jnp.ones((4, 3), jnp.float32), ["fc"])
    with pytest.raises(ValueError, match=r"mine: unknown config key 'depth'; choose from \[\]"):
        models.create("mine", rng_key=jax.random.key(0), depth=3)
