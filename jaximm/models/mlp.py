"""Multi-layer perceptron: linear layers with an activation between them, none after the last.

The last layer is thus the "last linear map": features = h @ kernel + bias, so a linear change of
the features, such as a closed-form theta, folds into it without a trace (`kernel @ theta`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.spec import Entry, Layout, ModelSpec, Preprocess

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Shape of a multi-layer perceptron.

    Attributes:
      input_shape: of one example; inputs [n, ...] of as many numbers are flattened. ``(32, 32, 3)``
        for small images, ``(79,)`` for a table's rows.
      widths: of the layers in order; the last one is d.
      activation: between the layers; "gelu" is the exact one.
      classes: of the classifier, one more linear layer, on the features.
    """

    input_shape: tuple[int, ...] = (32, 32, 3)
    widths: tuple[int, ...] = (256, 128)
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    classes: int = 10

    def __post_init__(self):
        for name in ("input_shape", "widths"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name} must be one or more sizes of at least 1, got {sizes}.")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; choose from {sorted(_ACTIVATIONS)}."
            )
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1, got {self.classes}.")


class Perceptron(nnx.Module):
    """A multi-layer perceptron in stages "layers.0", "layers.1", ...

    The first stage flattens its inputs [n, ...]; the last one gives the features [n, d], linear in
    its input.
    """

    def __init__(self, config: MLPConfig, rngs: nnx.Rngs):
        self.d_in = math.prod(config.input_shape)
        sizes = (self.d_in, *config.widths)
        self.layers = nnx.List([_linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])
        self.classifier = _linear(sizes[-1], config.classes, rngs=rngs)
        self.activation = config.activation
        self.stage_names = tuple(f"layers.{i}" for i in range(len(config.widths)))

    def run_stage(self, name: str, x: jax.Array) -> jax.Array:
        """The output of one stage.

        Raises:
          ValueError: an unknown stage; inputs of another size.
        """
        if name not in self.stage_names:
            raise ValueError(f"unknown stage {name!r}; choose from {list(self.stage_names)}.")
        index = self.stage_names.index(name)
        if index == 0:
            if x.ndim < 2 or math.prod(x.shape[1:]) != self.d_in:
                raise ValueError(
                    f"expected inputs [n, ...] of {self.d_in} numbers each, got {list(x.shape)}; "
                    "set input_shape."
                )
            x = x.reshape(x.shape[0], self.d_in)
        x = self.layers[index](x)
        last = index == len(self.stage_names) - 1
        return x if last else _ACTIVATIONS[self.activation](x)

    def classify(self, hidden: jax.Array, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """Logits, linear in the features."""
        del hidden
        return self.classifier(features)


def build(config: MLPConfig, rngs: nnx.Rngs) -> Perceptron:
    """A multi-layer perceptron with random weights: normal of variance 1 / d_in, zero biases."""
    return Perceptron(config, rngs)


def own_layout(config: MLPConfig) -> Layout:
    """Our own dotted paths, unchanged."""
    layers = [f"layers.{i}" for i in range(len(config.widths))] + ["classifier"]
    paths = [f"{layer}.{part}" for layer in layers for part in ("kernel", "bias")]
    return Layout(tuple(Entry(path, (path,)) for path in paths))


def _linear(d_in: int, d_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(d_in, d_out, param_dtype=jnp.float32, rngs=rngs)


_DEFAULT = MLPConfig()

MLP = ModelSpec(
    config=_DEFAULT,
    build=build,
    width=_DEFAULT.widths[-1],
    preprocess=Preprocess(
        size=32, resize=32, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5)
    ),
    layouts={"own": own_layout},
    source="multi-layer perceptron; no published weights: train it, or load an npz of your own",
)
