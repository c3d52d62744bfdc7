"""Every backbone of the registry: its size, its layouts, its features, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import cli, models
from jaximm.models.weights import export_state, import_state
from tests.backbones import SMALL, each, random_state, shapes

pytestmark = pytest.mark.heavy

LAYOUTS = [(name, layout) for name, spec in models.REGISTRY.items() for layout in spec.layouts]

LATE = (
    "resnet50",
    "vit_b16",
    "vit_b16_torchvision",
    "dinov2_s14",
    "efficientnet_lite0",
)
"""Of others' files, with other numbers, or with tests of their own."""

# Of the published networks, without batch-norm statistics.
SIZES = {
    "squeezenet1_1": 1_235_496,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vit_s16": 22_050_664,
    "vit_b16": 86_567_656,
    "vit_b16_torchvision": 86_567_656,
    "dinov2_s14": 22_056_192,
}


# The files of these models count their parameters too.
@pytest.mark.parametrize(
    "name",
    each(
        models.REGISTRY,
        slow=("resnet50", "vit_b16", "vit_b16_torchvision", "dinov2_s14", "efficientnet_lite0"),
    ),
)
def test_it_is_float32_and_of_its_published_size(name):
    spec = models.REGISTRY[name]
    params, stats = shapes(name, spec.config)
    leaves = [*params.values(), *stats.values()]
    # A linear backbone has none: its neck is added.
    assert {leaf.dtype for leaf in leaves} == ({np.dtype(np.float32)} if leaves else set())
    assert leaves or name == "linear"
    if name in SIZES:
        assert sum(leaf.size for leaf in params.values()) == SIZES[name]
    assert spec.source
    assert spec.layouts


@pytest.mark.parametrize(("name", "layout"), each(LAYOUTS, slow=LATE))
def test_every_layout_round_trips_bitwise_and_is_found_from_its_keys(name, layout):
    config, params, stats = random_state(name)
    chosen = models.REGISTRY[name].layouts[layout](config)
    exported = export_state(params, stats, chosen)
    assert all(type(value) is np.ndarray for value in exported.values())
    back = import_state(exported, chosen, params, stats, name="x")
    assert set(back.params) == set(params)
    assert set(back.stats) == set(stats)
    for path, value in {**params, **stats}.items():
        found = {**back.params, **back.stats}[path]
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value, err_msg=path)
    again = export_state(*back, chosen)
    assert {key: value.tobytes() for key, value in again.items()} == {
        key: value.tobytes() for key, value in exported.items()
    }
    backbone = models.create(name, weights=exported, **SMALL[name])
    for path, value in {**params, **stats}.items():
        np.testing.assert_array_equal({**backbone.params, **backbone.stats}[path], value)
    assert (backbone.name, backbone.config) == (name, config)


@pytest.mark.parametrize("name", each(models.REGISTRY, slow=LATE))
def test_features_are_rows_of_its_width_and_lower_for_accelerators(name):
    config, params, stats = random_state(name)
    backbone = models.create(
        name,
        weights=export_state(params, stats, models.REGISTRY[name].layouts["own"](config))
        if "own" in models.REGISTRY[name].layouts
        else None,
        rng_key=jax.random.key(0),
        **SMALL[name],
    )
    side = backbone.preprocess.size
    shape = SMALL[name]["input_shape"] if name == "linear" else (side, side, 3)
    rows = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    traced = jax.jit(backbone.features).trace(backbone.params, rows)
    assert (traced.out_info.shape, traced.out_info.dtype) == ((2, backbone.width), jnp.float32)
    traced.lower(lowering_platforms=("tpu", "cuda"))


@pytest.mark.parametrize("name", models.REGISTRY)
def test_an_unknown_field_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"{name}: unknown config key 'speed'; choose from"):
        models.make_config(name, speed=1)


def test_every_one_is_listed_with_its_source():
    listed = cli.catalogue()["models"]
    assert [entry["name"] for entry in listed] == list(models.REGISTRY)
    assert all(entry["source"] and entry["description"] for entry in listed)
