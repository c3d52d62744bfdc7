"""Backbones and photographs for the tests of the model files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaximm import models
from jaximm.models import backbone as base

SMALL = {
    "linear": {"input_shape": (5,)},
    "mlp": {"input_shape": (4, 4, 3), "widths": (8, 5), "classes": 3},
    "squeezenet1_1": {"classes": 3},
    "efficientnet_lite0": {"width_multiplier": 0.25, "depth_multiplier": 0.3, "classes": 3},
    "efficientnet_lite1": {"width_multiplier": 0.25, "depth_multiplier": 0.3, "classes": 4},
    "efficientnet_lite2": {"width_multiplier": 0.25, "depth_multiplier": 0.3, "classes": 5},
    "resnet18": {"depths": (1, 1), "classes": 3},
    "resnet50": {"depths": (1, 1), "classes": 3},
    "vit_s16": {"depth": 2, "width": 8, "heads": 2, "hidden": 6, "grid": 3, "classes": 4},
    "vit_b16": {"depth": 2, "width": 8, "heads": 2, "hidden": 6, "grid": 3, "classes": 4},
    "vit_b16_torchvision": {"depth": 1, "width": 4, "heads": 2, "hidden": 3, "grid": 2},
    "dinov2_s14": {"depth": 2, "width": 8, "heads": 2, "hidden": 6, "grid": 3},
}
AGAIN = ("efficientnet_lite1", "efficientnet_lite2")  # lite0 with other numbers


def each(cases, *, slow=()):
    """Test parameters, those of the slow models marked; `slow` adds to them."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = pytest.mark.slow if values[0] in (*AGAIN, *slow) else ()
        found.append(pytest.param(*values, marks=marks))
    return found


def cropped(photograph, size):
    """The central square of a photograph [h, w, 3], as Pillow shrinks it to `size`."""
    side = min(photograph.shape[:2])
    top, left = ((length - side) // 2 for length in photograph.shape[:2])
    square = photograph[top : top + side, left : left + side]
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


def abstract_backbone(spec, config=None, *, name="model"):
    """A backbone whose arrays are shapes only: nothing is computed or compiled."""
    config = spec.config if config is None else config
    found = []

    def run():
        module = spec.build(config, nnx.Rngs(0))
        found.append(
            base.split(
                module, name=name, config=config, width=spec.width, preprocess=spec.preprocess
            )
        )
        return found[0].params, found[0].stats

    params, stats = jax.eval_shape(run)
    return dataclasses.replace(found[0], params=params, stats=stats)


def random_backbone(spec, config=None, *, name="model", seed=0):
    """Random weights that keep the scale of the activations, batch-norm statistics included."""
    backbone, rng = abstract_backbone(spec, config, name=name), np.random.default_rng(seed)

    def draw(path, shape, dtype):
        values = rng.standard_normal(shape)
        if path.endswith(".kernel"):
            values *= np.sqrt(2 / max(1, np.prod(shape[:-1])))
        elif path.endswith((".scale", ".var")):
            values = 1 + 0.1 * np.abs(values)
        else:
            values *= 0.1
        return jnp.asarray(values, dtype)

    params, stats = (
        {path: draw(path, leaf.shape, leaf.dtype) for path, leaf in flat.items()}
        for flat in (backbone.params, backbone.stats)
    )
    return dataclasses.replace(backbone, params=params, stats=stats)


def quick_jit(fun):
    """`fun` compiled without optimisation: for small shapes, where compiling is the waiting."""
    return jax.jit(fun, compiler_options={"xla_backend_optimization_level": 0})


def number_of_parameters(backbone):
    return sum(leaf.size for leaf in backbone.params.values())


@functools.cache
def shapes(name, config):
    """Shapes of a model's parameters and statistics, without a number computed."""
    spec = models.REGISTRY[name]

    def parts(key):
        module = spec.build(config, nnx.Rngs(key))
        whole = base.split(
            module, name=name, config=config, width=spec.width, preprocess=spec.preprocess
        )
        return whole.params, whole.stats

    return jax.eval_shape(parts, jax.random.key(0))


def random_state(name, seed=0):
    """Small random parameters and statistics of a model, with their configuration."""
    config = models.make_config(name, **SMALL[name])
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        return jnp.asarray(np.abs(values) if path.endswith(".var") else values, leaf.dtype)

    params, stats = (
        {path: draw(path, leaf) for path, leaf in flat.items()} for flat in shapes(name, config)
    )
    return config, params, stats
