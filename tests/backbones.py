"""Backbones and photographs for the tests of the model files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from jaximm.models import backbone as base


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
