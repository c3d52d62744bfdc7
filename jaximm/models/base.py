"""A backbone as plain functions of plain arrays: the border between Flax NNX and everything else.

A model file defines an `nnx.Module` that is a chain of named stages. `Backbone` splits it once and
keeps its variables in two flat dicts by dotted path::

    params  {"blocks.11.attention.qkv.kernel": array, ...}   what may be trained
    stats   {"blocks.0.norm.mean": array, ...}               batch-norm statistics: never trained

Batch norm always runs on its stored statistics, which are those of the data the weights were
trained on: no batch of either task ever enters them.

`Backbone.split_at` cuts the chain before the first stage that a path pattern names: what lies
before it is frozen, and its outputs can be computed once and kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

FlatParams = dict[str, jax.Array]
"""Arrays by dotted path."""

NECK = "neck"
"""Stage after all others, there only when params hold ``neck.kernel``: features @ kernel + bias."""


class StagedModule(Protocol):
    """What a model file's NNX module offers.

    ``stage_names`` in the order in which they run, each the dotted path of a submodule (or of
    something without parameters, such as "pool"); the last one returns features [n, d].
    ``run_stage(name, x)`` runs one of them. ``classify(hidden, features)`` gives the logits of the
    original classifier from the last stage's input and output.
    """

    stage_names: tuple[str, ...]

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

    def __call__(self, images: jax.Array) -> Float[Array, "n size size 3"]:
        """Model inputs of uint8 RGB images [n, h, w, 3]; resized to ``size`` where they differ.

        For images that are square and small already (CIFAR); photographs are decoded, resized by
        their shorter side and cropped by `jaximm.data`.

        Raises:
          ValueError: another rank, channel number or dtype.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
            raise ValueError(
                f"expected uint8 RGB images [n, h, w, 3], got {images.dtype}{list(images.shape)}; "
                "repeat a grey channel three times."
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
    """

    config: Any
    build: Callable[[Any, nnx.Rngs], Any]
    width: int
    preprocess: Preprocess
    layouts: Mapping[str, Callable[[Any], Layout]]
    source: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Backbone:
    """A model, split: structure here, numbers in flat dicts.

    Attributes:
      name: key of `jaximm.models.REGISTRY`.
      config: the model's configuration.
      graphdef: NNX structure without numbers.
      params: trainable arrays by dotted path.
      stats: batch-norm statistics by dotted path; empty where there are none.
      stage_names: in order.
      width: d, the number of features.
      preprocess: what the weights expect.
    """

    name: str
    config: Any
    graphdef: Any
    params: FlatParams
    stats: FlatParams
    stage_names: tuple[str, ...]
    width: int
    preprocess: Preprocess

    def features(self, params: FlatParams, inputs: jax.Array) -> Float[Array, "n d"]:
        """Features of preprocessed inputs [n, size, size, 3], the neck included if there is one."""
        return run_stages(self, params, inputs, self.stage_names)

    def logits(self, params: FlatParams, inputs: jax.Array) -> Float[Array, "n k"]:
        """The original classifier's logits. A neck's inverse belongs into that classifier."""
        module = merge(self.graphdef, params, self.stats)
        for name in self.stage_names[:-1]:
            inputs = module.run_stage(name, inputs)
        features = _neck(params, module.run_stage(self.stage_names[-1], inputs))
        return module.classify(inputs, features)

    def split_at(
        self,
        pattern: str,
        *,
        compute_dtype: Any = None,
        sites: Sequence[str] = (),
    ) -> Trainable:
        """Freezes all but the parameters that a path pattern names.

        Args:
          pattern: dotted path prefixes, by whole components, separated by commas: "blocks.11",
            "layer4,neck". "" trains nothing (closed-form methods add a neck), "*" everything.
          compute_dtype: of the trained stages' arithmetic, for instance bfloat16; features come
            back in float32. None: as the parameters are.
          sites: paths of linear or 1 x 1 convolution layers after the cut, whose inputs
            `Trainable.sites_fn` returns.

        Raises:
          ValueError: a pattern that names nothing, with the stages there are; a site before the
            cut or of another kind.
        """
        patterns = [part.strip() for part in pattern.split(",") if part.strip()]
        for part in patterns:
            if part != "*" and not any(under(path, part) for path in self.params):
                raise ValueError(
                    f"pattern {part!r} names no parameter of {self.name}; stages are "
                    f"{list(self.stage_names)}."
                )
        trained = {
            path: value
            for path, value in self.params.items()
            if not under(path, "classifier")
            and any(part == "*" or under(path, part) for part in patterns)
        }
        touched = [
            index
            for index, stage in enumerate(self.stage_names)
            if any(under(path, stage) for path in trained)
        ]
        start = min(touched, default=len(self.stage_names))
        return Trainable(
            backbone=self,
            pattern=pattern,
            prefix_stages=self.stage_names[:start],
            suffix_stages=self.stage_names[start:],
            params=trained,
            compute_dtype=compute_dtype,
            sites=tuple(sites),
        )

    def replace(self, params: Mapping[str, jax.Array]) -> Backbone:
        """This backbone with some parameters replaced, or a neck added.

        Raises:
          ValueError: an unknown path, or another shape.
        """
        for path, value in params.items():
            if under(path, NECK):
                continue
            if path not in self.params:
                raise ValueError(f"{self.name} has no parameter {path!r}.")
            if value.shape != self.params[path].shape:
                raise ValueError(
                    f"{path} of {self.name} has shape {self.params[path].shape}, got {value.shape}."
                )
        merged = {**self.params, **params}
        width = merged["neck.kernel"].shape[1] if "neck.kernel" in merged else self.width
        return dataclasses.replace(self, params=merged, width=width)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Trainable:
    """A backbone cut in two: a frozen prefix, and a suffix some of whose parameters train.

    `features_fn` is what immunisers and attackers get: ``features_fn(params, activations) -> f``.
    Keep one object for runs of one shape: compilations are shared by its identity.

    Attributes:
      backbone: the whole, with all parameters as they were before training.
      pattern: what chose the trained parameters.
      prefix_stages: run once by `prefix_fn`.
      suffix_stages: run by `features_fn`.
      params: the trained parameters at their start.
      compute_dtype: of the suffix's arithmetic; None: as the parameters are.
      sites: layers whose inputs `sites_fn` returns.
    """

    backbone: Backbone
    pattern: str
    prefix_stages: tuple[str, ...]
    suffix_stages: tuple[str, ...]
    params: FlatParams
    compute_dtype: Any
    sites: tuple[str, ...]

    def __post_init__(self):
        module = merge(self.backbone.graphdef, self.backbone.params, self.backbone.stats)
        for site in self.sites:
            if not any(under(site, stage) for stage in self.suffix_stages):
                raise ValueError(
                    f"site {site!r} is not after the cut; stages there: {list(self.suffix_stages)}."
                )
            _check_site(module, site)

    def prefix_fn(self, inputs: jax.Array) -> jax.Array:
        """Activations at the cut, of preprocessed inputs."""
        backbone = self.backbone
        return run_stages(backbone, backbone.params, inputs, self.prefix_stages, neck=False)

    def features_fn(self, params: FlatParams, activations: jax.Array) -> Float[Array, "n d"]:
        """Features from activations at the cut, with ``params`` in place of the backbone's own."""
        return self._run(params, activations, ())[0]

    def sites_fn(self, params: FlatParams, activations: jax.Array) -> dict[str, jax.Array]:
        """``{"features": [n, d], site: [rows, d_in], ...}``: features, and inputs of the sites.

        A site's rows are all its positions: n for a linear layer on features, n * h * w for a
        1 x 1 convolution, n * tokens in a transformer. Their second-moment matrix is the input-side
        Kronecker factor of that layer's Gauss-Newton matrix.
        """
        features, found = self._run(params, activations, self.sites)
        return {"features": features, **found}

    def _run(self, params, activations, sites):
        kept = {
            path: value
            for path, value in self.backbone.params.items()
            if any(under(path, stage) for stage in (*self.suffix_stages, NECK))
        }
        merged, stats, x = {**kept, **params}, self.backbone.stats, activations
        if self.compute_dtype is not None:
            merged, stats, x = _cast((merged, stats, x), self.compute_dtype)
        whole = {**self.backbone.params, **merged}
        module = merge(self.backbone.graphdef, whole, {**self.backbone.stats, **stats})
        records = {site: _tap(module, site) for site in sites}
        for name in self.suffix_stages:
            x = module.run_stage(name, x)
        features = _neck(merged, x)
        found = {site: _site_rows(record) for site, record in records.items()}
        if self.compute_dtype is not None:
            features, found = _cast((features, found), jnp.float32)
        return features, found

    def whole(self, params: Mapping[str, jax.Array]) -> Backbone:
        """The whole backbone with trained parameters (and perhaps a neck) in place."""
        return self.backbone.replace(params)


def under(path: str, prefix: str) -> bool:
    """Whether a dotted path is `prefix` or lies below it, by whole components.

    >>> under("blocks.1.norm.scale", "blocks.1"), under("blocks.11.norm.scale", "blocks.1")
    (True, False)
    """
    return path == prefix or path.startswith(prefix + ".")


def run_stages(
    backbone: Backbone,
    params: FlatParams,
    x: jax.Array,
    stages: Sequence[str],
    *,
    neck: bool = True,
) -> jax.Array:
    """Runs some stages of a backbone in order."""
    module = merge(backbone.graphdef, params, backbone.stats)
    for name in stages:
        x = module.run_stage(name, x)
    return _neck(params, x) if neck else x


def split(module: Any, *, name: str, config: Any, width: int, preprocess: Preprocess) -> Backbone:
    """A `Backbone` of an NNX module with all its numbers in place."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return Backbone(
        name=name,
        config=config,
        graphdef=graphdef,
        params=_to_flat(params),
        stats=_to_flat(rest),
        stage_names=tuple(module.stage_names),
        width=width,
        preprocess=preprocess,
    )


def merge(graphdef: Any, params: FlatParams, stats: FlatParams) -> Any:
    """A fresh NNX module of a structure and numbers; a neck's are left out."""
    leaves = [
        (_from_dotted(path), kind(value))
        for flat, kind in ((params, nnx.Param), (stats, nnx.BatchStat))
        for path, value in flat.items()
        if not under(path, NECK)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves), copy=True)


def _to_flat(state: Any) -> FlatParams:
    return {
        ".".join(str(part) for part in path): variable[...]
        for path, variable in nnx.to_flat_state(state)
    }


def _from_dotted(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def _neck(params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    if "neck.kernel" not in params:
        return features
    moved = features @ params["neck.kernel"]
    return moved + params["neck.bias"][None, :] if "neck.bias" in params else moved


def _cast(tree: Any, dtype: Any) -> Any:
    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


class _Tap(nnx.Module):
    """A layer that also keeps its input, in a module that lives for one trace only."""

    def __init__(self, layer: Any, record: Callable[[jax.Array], None]):
        self.layer = layer
        self.record = record

    def __call__(self, x: jax.Array) -> jax.Array:
        self.record(x)
        return self.layer(x)


def _parent(module: Any, site: str) -> tuple[Any, str | int]:
    *front, last = _from_dotted(site)
    for part in front:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module, last


def _tap(module: Any, site: str) -> list[jax.Array]:
    """Replaces a layer by one that records its inputs into the list returned."""
    parent, name = _parent(module, site)
    inputs: list[jax.Array] = []
    if isinstance(name, int):
        parent[name] = _Tap(parent[name], inputs.append)
    else:
        setattr(parent, name, _Tap(getattr(parent, name), inputs.append))
    return inputs


def _site_rows(record: list[jax.Array]) -> Float[Array, "rows d_in"]:
    (x,) = record
    return x.reshape(-1, x.shape[-1])


def _check_site(module: Any, site: str) -> None:
    try:
        parent, name = _parent(module, site)
        layer = parent[name] if isinstance(name, int) else getattr(parent, name)
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"there is no layer {site!r}: {error}.") from error
    linear = isinstance(layer, nnx.Linear)
    pointwise = (
        isinstance(layer, nnx.Conv)
        and all(side == 1 for side in layer.kernel_size)
        and layer.feature_group_count == 1
    )
    if not (linear or pointwise):
        raise ValueError(
            f"site {site!r} must be a linear or an ungrouped 1 x 1 convolution layer, whose input "
            f"rows are a Kronecker factor, got {type(layer).__name__}."
        )
