"""What a model file says of its model: stages, preprocessing, layouts of published weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaximm.registry import Config


class StagedModule(Protocol):
    """What a model file's NNX module offers.

    ``stage_names`` in the order in which they run, each the dotted path of a submodule (or of
    something without parameters, such as "pool"); the last one returns features [n, d].
    ``run_stage(name, x)`` runs one of them. ``classify(hidden, features)`` gives the logits of the
    original classifier from the last stage's input and output.
    """

    @property
    def stage_names(self) -> tuple[str, ...]:
        """In order."""
        ...

    def run_stage(self, name: str, x: jax.Array) -> jax.Array:
        """The output of one stage."""
        ...

    def classify(self, hidden: jax.Array, features: jax.Array) -> jax.Array:
        """Logits from the last stage's input and output."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From uint8 RGB images to a model's inputs: ``(pixels - mean) / std``, pixels in 0..255.

    Attributes:
      size: height and width of the inputs.
      resize: shorter side before the centre crop to `size`, for photographs.
      interpolation: "bicubic" or "bilinear".
      mean: per channel, in the model's channel order.
      std: per channel.
      channels: order that the model expects, "rgb" or "bgr".
    """

    size: int = 224
    resize: int = 256
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channels: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self):
        if not 1 <= self.size <= self.resize:
            raise ValueError(f"need 1 <= size <= resize, got {self.size} and {self.resize}.")
        for name, known in (
            ("interpolation", ("bicubic", "bilinear")),
            ("channels", ("rgb", "bgr")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}."
                )
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        if mean.shape != (3,) or std.shape != (3,):
            raise ValueError(f"need three means and deviations, got {self.mean} and {self.std}.")
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError(
                f"means must be finite and deviations positive, got {self.mean} and {self.std}."
            )

    def __call__(self, images: jax.Array) -> Float[Array, "n size size 3"]:
        """Model inputs of uint8 RGB images [n, h, h, 3]; resized to ``size`` where they differ.

        For images that are square already (CIFAR); photographs are decoded, resized by their
        shorter side and cropped by `jaximm.data`.

        Raises:
          ValueError: another rank, channel number or dtype, or images that are not square.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
            raise ValueError(
                f"expected uint8 RGB images [n, h, w, 3], got {images.dtype}{list(images.shape)}; "
                "repeat a grey channel three times."
            )
        if images.shape[1] != images.shape[2]:
            raise ValueError(
                f"expected square images, got {images.shape[1]} x {images.shape[2]} pixels, which "
                "would be stretched; crop them first, as jaximm.data does with photographs."
            )
        x = images.astype(jnp.float32)
        if self.channels == "bgr":
            x = x[..., ::-1]
        if x.shape[1:3] != (self.size, self.size):
            shape = (x.shape[0], self.size, self.size, 3)
            x = jnp.clip(jax.image.resize(x, shape, self.interpolation), 0, 255)
        shape = (1, 1, 1, 3)
        mean, std = (np.asarray(side, np.float32).reshape(shape) for side in (self.mean, self.std))
        return (x - mean) / std


class Entry(NamedTuple):
    """Where one of our arrays lies in somebody else's checkpoint.

    Attributes:
      path: ours, dotted, in params or stats.
      keys: theirs; several are joined (query, key, value).
      transform: "same"; "linear", [out, in] there and [in, out] here; "conv", [O, I, H, W] there
        and [H, W, I, O] here.
      axis: along which several are joined, after the transform.
      sizes: of their parts along that axis, for export; empty: equal parts.
    """

    path: str
    keys: tuple[str, ...]
    transform: Literal["same", "linear", "conv"] = "same"
    axis: int = -1
    sizes: tuple[int, ...] = ()


class Layout(NamedTuple):
    """A checkpoint layout of one model.

    ``ignored`` are suffixes of keys that a source may hold and that we do not need; ``constants``
    what an export must add for a strict loader (batch-norm counters).
    """

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()
    constants: Mapping[str, np.ndarray] = {}


class ModelSpec(NamedTuple):
    """One line of the model registry.

    Attributes:
      config: frozen dataclass of the architecture.
      build: ``build(config, rngs) -> nnx.Module``, a `StagedModule`.
      width: d.
      preprocess: of its published weights.
      layouts: ``{"torchvision": layout_fn, ...}`` with ``layout_fn(config) -> Layout``.
      source: paper and where its weights come from, one line.
      timm: name of the architecture there, which is in the layout "timm"; "" where timm has none.
    """

    config: Config
    build: Callable[[Any, nnx.Rngs], StagedModule]
    width: int
    preprocess: Preprocess
    layouts: Mapping[str, Callable[[Any], Layout]]
    source: str
    timm: str = ""
