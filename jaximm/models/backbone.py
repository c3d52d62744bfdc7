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
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaximm.models.flat import NECK, FlatParams, merge, to_flat, under
from jaximm.models.spec import Preprocess, StagedModule
from jaximm.models.taps import check_site, site_rows, tapped
from jaximm.registry import Config
from jaximm.types import Tree


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
      width: d, the number of features, the neck's if there is one.
      preprocess: what the weights expect.
    """

    name: str
    config: Config
    graphdef: nnx.GraphDef
    params: FlatParams
    stats: FlatParams
    stage_names: tuple[str, ...]
    width: int
    preprocess: Preprocess

    @property
    def stage_width(self) -> int:
        """Number of features that leave the last stage, before a neck."""
        kernel = self.params.get("neck.kernel")
        return self.width if kernel is None else kernel.shape[0]

    def features(self, params: FlatParams, inputs: jax.Array) -> Float[Array, "n d"]:
        """Features of preprocessed inputs [n, size, size, 3], the neck included if there is one.

        Raises:
          ValueError: ``params`` that are not this backbone's, with a path that differs.
        """
        return run_stages(self, params, inputs, self.stage_names)

    def logits(self, params: FlatParams, inputs: jax.Array) -> Float[Array, "n k"]:
        """The original classifier's logits. A neck's inverse belongs into that classifier.

        Raises:
          ValueError: as `features`; a model without a classifier.
        """
        _check_whole(self, params)
        module = merge(self.graphdef, params, self.stats)
        for name in self.stage_names[:-1]:
            inputs = module.run_stage(name, inputs)
        features = _neck(params, module.run_stage(self.stage_names[-1], inputs))
        return module.classify(inputs, features)

    def split_at(
        self,
        pattern: str,
        *,
        compute_dtype: DTypeLike | None = None,
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
          ValueError: a pattern that names nothing, with the stages there are, or only the original
            classifier; a parameter that it names and no stage holds; a site before the cut or of
            another kind; numbers after the cut that are finite and would not be so in
            `compute_dtype`.
        """
        patterns = [part.strip() for part in pattern.split(",") if part.strip()]
        for part in patterns:
            named = [path for path in self.params if part == "*" or under(path, part)]
            if not named:
                raise ValueError(
                    f"pattern {part!r} names no parameter of {self.name}; stages are "
                    f"{list(self.stage_names)}."
                )
            if all(under(path, "classifier") for path in named):
                raise ValueError(
                    f"pattern {part!r} names only the original classifier of {self.name}, which no "
                    "feature depends on; the head is trained separately. Stages are "
                    f"{list(self.stage_names)}."
                )
        trained = {
            path: value
            for path, value in self.params.items()
            if not under(path, "classifier")
            and any(part == "*" or under(path, part) for part in patterns)
        }
        for path in trained:
            if not any(under(path, stage) for stage in (*self.stage_names, NECK)):
                raise ValueError(
                    f"parameter {path!r} of {self.name} lies under no stage, so that the cut "
                    f"cannot be placed before its use; stages are {list(self.stage_names)}."
                )
        touched = [
            index
            for index, stage in enumerate(self.stage_names)
            if any(under(path, stage) for path in trained)
        ]
        start = min(touched, default=len(self.stage_names))
        if compute_dtype is not None:
            _check_cast(self, (*self.stage_names[start:], NECK), compute_dtype)
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

        A neck is ``neck.kernel`` [d, d'], with d the width of the last stage, with or without
        ``neck.bias`` [d'].

        Raises:
          ValueError: an unknown path, another shape, or a neck's bias without a kernel.
        """
        merged, width = {**self.params, **params}, self.width
        _check_paths(self, params, merged)
        for path, value in params.items():
            if not under(path, NECK) and value.shape != self.params[path].shape:
                raise ValueError(
                    f"{path} of {self.name} has shape {self.params[path].shape}, got {value.shape}."
                )
        if "neck.kernel" in merged:
            shape, d = merged["neck.kernel"].shape, self.stage_width
            if len(shape) != 2 or shape[0] != d or shape[1] < 1:
                raise ValueError(
                    f"the last stage of {self.name} has {d} features: expected a neck.kernel "
                    f"[{d}, d'], got {list(shape)}."
                )
            width = shape[1]
            bias = merged.get("neck.bias")
            if bias is not None and bias.shape != (width,):
                raise ValueError(
                    f"expected a neck.bias [{width}] for a neck.kernel {list(shape)}, got "
                    f"{list(bias.shape)}."
                )
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
    compute_dtype: DTypeLike | None
    sites: tuple[str, ...]

    def __post_init__(self):
        module = merge(self.backbone.graphdef, self.backbone.params, self.backbone.stats)
        for site in self.sites:
            if not any(under(site, stage) for stage in self.suffix_stages):
                raise ValueError(
                    f"site {site!r} is not after the cut; stages there: {list(self.suffix_stages)}."
                )
            check_site(module, site)

    def prefix_fn(self, inputs: jax.Array) -> jax.Array:
        """Activations at the cut, of preprocessed inputs.

        The backbone's numbers are not arguments here: under `jax.jit` each compiled program holds a
        copy of them. For a large backbone, jit a function of ``(params, stats, inputs)`` that calls
        `run_stages` on ``dataclasses.replace(backbone, params=params, stats=stats)`` with
        `prefix_stages` and ``neck=False``. `features_fn` holds the untrained numbers after the cut
        in the same way.
        """
        backbone = self.backbone
        return run_stages(backbone, backbone.params, inputs, self.prefix_stages, neck=False)

    def features_fn(self, params: FlatParams, activations: jax.Array) -> Float[Array, "n d"]:
        """Features from activations at the cut, with ``params`` in place of the backbone's own.

        ``params`` may be any of the backbone's parameters, and a neck; others stay as they are.

        Raises:
          ValueError: a path that the backbone does not have.
        """
        return self._run(params, activations, ())[0]

    def sites_fn(self, params: FlatParams, activations: jax.Array) -> dict[str, jax.Array]:
        """``{"features": [n, d], site: [rows, d_in], ...}``: features, and inputs of the sites.

        A site's rows are all its positions: n for a linear layer on features, n * h * w for a
        1 x 1 convolution, n * tokens in a transformer. Their second-moment matrix is the input-side
        Kronecker factor of that layer's Gauss-Newton matrix.
        """
        features, rows = self._run(params, activations, self.sites)
        return {"features": features, **rows}

    def perturbed_fn(
        self, params: FlatParams, activations: jax.Array, offsets: Mapping[str, jax.Array]
    ) -> Float[Array, "n d"]:
        """Features with offsets of the form of `sites_fn` added to every site and to them."""
        features, _ = self._run(params, activations, self.sites, offsets)
        return features + offsets["features"].astype(features.dtype)

    def _run(self, params, activations, sites, offsets: Mapping[str, jax.Array] | None = None):
        kept = {
            path: value
            for path, value in self.backbone.params.items()
            if any(under(path, stage) for stage in (*self.suffix_stages, NECK))
        }
        merged, stats, x = {**kept, **params}, self.backbone.stats, activations
        _check_paths(self.backbone, params, merged)
        if self.compute_dtype is not None:
            merged, stats, x = _cast((merged, stats, x), self.compute_dtype)
        whole = {**self.backbone.params, **merged}
        module = merge(self.backbone.graphdef, whole, {**self.backbone.stats, **stats})
        records = {site: tapped(module, site, (offsets or {}).get(site)) for site in sites}
        for name in self.suffix_stages:
            x = module.run_stage(name, x)
        features = _neck(merged, x)
        rows = {site: site_rows(record) for site, record in records.items()}
        if self.compute_dtype is not None:
            features, rows = _cast((features, rows), jnp.float32)
        return features, rows

    def whole(self, params: Mapping[str, jax.Array]) -> Backbone:
        """The whole backbone with trained parameters (and perhaps a neck) in place."""
        return self.backbone.replace(params)


def run_stages(
    backbone: Backbone,
    params: FlatParams,
    x: jax.Array,
    stages: Sequence[str],
    *,
    neck: bool = True,
) -> jax.Array:
    """Runs some stages of a backbone in order.

    Raises:
      ValueError: ``params`` that are not the backbone's, with a path that differs.
    """
    _check_whole(backbone, params)
    module = merge(backbone.graphdef, params, backbone.stats)
    for name in stages:
        x = module.run_stage(name, x)
    return _neck(params, x) if neck else x


def split(
    module: StagedModule, *, name: str, config: Config, width: int, preprocess: Preprocess
) -> Backbone:
    """A `Backbone` of an NNX module with all its numbers in place.

    Raises:
      ValueError: variables other than parameters and batch statistics, such as the keys of a
        dropout layer; or names that dotted paths cannot hold.
    """
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    for path, variable in nnx.to_flat_state(rest):
        if not isinstance(variable, nnx.BatchStat):
            raise ValueError(
                f"{name} holds a {type(variable).__name__} at {'.'.join(map(str, path))!r}: a "
                "backbone is a function of nnx.Param and nnx.BatchStat variables alone. Build it "
                "without that, for instance a dropout layer without rngs."
            )
    return Backbone(
        name=name,
        config=config,
        graphdef=graphdef,
        params=to_flat(params),
        stats=to_flat(rest),
        stage_names=tuple(module.stage_names),
        width=width,
        preprocess=preprocess,
    )


def _check_paths(backbone: Backbone, params: Iterable[str], merged: Iterable[str]) -> None:
    """Refuses paths that the backbone has not; those of a whole neck may be new."""
    necks = ("neck.kernel", "neck.bias")
    for path in params:
        if path not in backbone.params and path not in necks:
            there = f"; a neck is {' and '.join(necks)}" if under(path, NECK) else ""
            raise ValueError(f"{backbone.name} has no parameter {path!r}{there}.")
    if "neck.bias" in merged and "neck.kernel" not in merged:
        raise ValueError("a neck.bias needs a neck.kernel.")


def _check_whole(backbone: Backbone, params: FlatParams) -> None:
    """Refuses params that are not all of the backbone's, with or without a neck."""
    _check_paths(backbone, params, params)
    for path in backbone.params:
        if path not in params and not under(path, NECK):
            raise ValueError(
                f"params lack {path!r} of {backbone.name}; pass all of its parameters."
            )


def _neck(params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    if "neck.kernel" not in params:
        return features
    moved = features @ params["neck.kernel"]
    return moved + params["neck.bias"][None, :] if "neck.bias" in params else moved


def _cast(tree: Tree, dtype: DTypeLike) -> Tree:
    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _check_cast(backbone: Backbone, stages: Sequence[str], dtype: DTypeLike) -> None:
    """Refuses numbers of some stages that the dtype of their arithmetic cannot hold."""
    for path, value in {**backbone.params, **backbone.stats}.items():
        # Only a shape, or not known yet: nothing to see.
        if not isinstance(value, jax.Array) or isinstance(value, Tracer):
            continue
        if value.is_fully_addressable and any(under(path, stage) for stage in stages):
            host = np.asarray(value)
            with np.errstate(over="ignore"):
                lost = int((np.isfinite(host) & ~np.isfinite(host.astype(dtype))).sum())
            if lost:
                raise ValueError(
                    f"{path} of {backbone.name} has {lost} of {host.size} values that are infinite "
                    f"as {jnp.dtype(dtype)}; pass compute_dtype='float32' (on the command line: "
                    "--compute-dtype float32)."
                )
