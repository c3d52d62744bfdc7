"""Residual networks with the stride in the 3 x 3 convolution (torchvision's "v1.5").

Stages: "stem" (7 x 7 convolution and max-pool), one per residual block ("layer1.0", "layer1.1",
...), and "pool" (global mean). Padding is symmetric and explicit, as where the weights come from:
"SAME" would pad the strided layers of an even image on one side only.

Source: He et al. (2016), https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.layers import batch_norm, batch_norm_layout, conv, conv_norm_entries, max_pool
from jaximm.models.spec import Entry, Layout, ModelSpec, Preprocess

NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Architecture of a residual network.

    Attributes:
      block: "basic", two 3 x 3 convolutions, or "bottleneck", 1 x 1, 3 x 3, 1 x 1.
      depths: number of blocks in each of the layers.
      classes: outputs of the classifier.
    """

    block: Literal["basic", "bottleneck"] = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    classes: int = 1000

    def __post_init__(self):
        if self.block not in ("basic", "bottleneck"):
            raise ValueError(f"block must be 'basic' or 'bottleneck', got {self.block!r}.")
        if not self.depths or min(self.depths) < 1 or self.classes < 1:
            raise ValueError(
                f"need at least one block per layer and one class, got depths {self.depths} and "
                f"{self.classes} classes."
            )

    @property
    def expansion(self) -> int:
        """Channels that leave a block, per channel of its 3 x 3 convolution."""
        return 4 if self.block == "bottleneck" else 1

    @property
    def width(self) -> int:
        """Number of features d."""
        return 64 * 2 ** (len(self.depths) - 1) * self.expansion


class Stem(nnx.Module):
    """7 x 7 convolution with stride 2, batch norm, ReLU, 3 x 3 max-pool with stride 2."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = conv(3, 64, 7, rngs, stride=2)
        self.norm = batch_norm(64, NORM_EPSILON, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n h4 w4 64"]:
        """A quarter of the height and width."""
        x = jax.nn.relu(self.norm(self.conv(x)))
        return max_pool(x, padding=((1, 1), (1, 1)))


class Block(nnx.Module):
    """A residual block: relu(shortcut(x) + branch(x)); the branch ends with a batch norm.

    The shortcut is the identity, or a strided 1 x 1 convolution with batch norm where the shape
    changes. ``sides`` are the kernel sides of the branch; the first 3 x 3 carries the stride.
    """

    def __init__(self, sides: tuple[int, ...], widths: tuple[int, ...], stride: int, rngs):
        self.count = len(sides)
        strides = [1] * len(sides)
        strides[sides.index(3)] = stride
        for index, side in enumerate(sides):
            layer = conv(widths[index], widths[index + 1], side, rngs, stride=strides[index])
            setattr(self, f"conv{index + 1}", layer)
            setattr(self, f"norm{index + 1}", batch_norm(widths[index + 1], NORM_EPSILON, rngs))
        moves = stride != 1 or widths[0] != widths[-1]
        self.shortcut = conv(widths[0], widths[-1], 1, rngs, stride=stride) if moves else None
        self.shortcut_norm = batch_norm(widths[-1], NORM_EPSILON, rngs) if moves else None

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """The block's output."""
        y = x
        for index in range(1, self.count + 1):
            y = getattr(self, f"norm{index}")(getattr(self, f"conv{index}")(y))
            if index < self.count:
                y = jax.nn.relu(y)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """The network as a chain of stages; a `jaximm.models.backbone.StagedModule`."""

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs):
        self.stem = Stem(rngs)
        names, width = ["stem"], 64
        for layer, depth in enumerate(config.depths, start=1):
            inner = 64 * 2 ** (layer - 1)
            blocks = []
            for index in range(depth):
                stride = 2 if layer > 1 and index == 0 else 1
                out = inner * config.expansion
                if config.block == "bottleneck":
                    blocks.append(Block((1, 3, 1), (width, inner, inner, out), stride, rngs))
                else:
                    blocks.append(Block((3, 3), (width, inner, out), stride, rngs))
                width = out
                names.append(f"layer{layer}.{index}")
            setattr(self, f"layer{layer}", nnx.List(blocks))
        self.classifier = nnx.Linear(width, config.classes, param_dtype=jnp.float32, rngs=rngs)
        self.stage_names = (*names, "pool")

    def run_stage(self, name: str, x: jax.Array) -> jax.Array:
        """The output of one stage; "pool" gives features [n, d].

        Raises:
          ValueError: an unknown stage.
        """
        if name not in self.stage_names:
            raise ValueError(f"unknown stage {name!r}; choose from {list(self.stage_names)}.")
        if name == "stem":
            return self.stem(x)
        if name == "pool":
            return x.mean((1, 2))
        layer, index = name.split(".")
        return getattr(self, layer)[int(index)](x)

    def classify(self, hidden: jax.Array, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """Logits from features."""
        del hidden
        return self.classifier(features)


def torchvision_layout(config: ResNetConfig) -> Layout:
    """Keys of torchvision's and timm's state dicts, which agree."""
    entries = conv_norm_entries("stem.conv", "stem.norm", "conv1", "bn1")
    count = 3 if config.block == "bottleneck" else 2
    for layer, depth in enumerate(config.depths, start=1):
        for index in range(depth):
            at = f"layer{layer}.{index}"
            for i in range(1, count + 1):
                entries += conv_norm_entries(
                    f"{at}.conv{i}", f"{at}.norm{i}", f"{at}.conv{i}", f"{at}.bn{i}"
                )
            # A basic block of the first layer keeps its shape; a bottleneck widens it.
            if index == 0 and (layer > 1 or config.expansion > 1):
                entries += conv_norm_entries(
                    f"{at}.shortcut",
                    f"{at}.shortcut_norm",
                    f"{at}.downsample.0",
                    f"{at}.downsample.1",
                )
    entries += [
        Entry("classifier.kernel", ("fc.weight",), "linear"),
        Entry("classifier.bias", ("fc.bias",)),
    ]
    return batch_norm_layout(entries)


def _spec(config: ResNetConfig, timm: str) -> ModelSpec:
    return ModelSpec(
        config=config,
        build=ResNet,
        width=config.width,
        preprocess=Preprocess(),
        layouts={"torchvision": torchvision_layout, "timm": torchvision_layout},
        source="He et al. (2016), https://arxiv.org/abs/1512.03385; a state dict of torchvision "
        "or timm",
        timm=timm,
    )


RESNET18 = _spec(ResNetConfig(), "resnet18")
RESNET50 = _spec(ResNetConfig(block="bottleneck", depths=(3, 4, 6, 3)), "resnet50")
