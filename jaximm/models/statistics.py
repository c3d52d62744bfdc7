"""Batch-norm statistics that are taken anew, and features that read them among the parameters.

A `Trainable` keeps its batch statistics out of reach of whoever trains its parameters. For AdaBN
(Li et al., 2016, https://arxiv.org/abs/1603.04779), `refresh_fn_of` gives a function that adds them
to the parameters, by their dotted paths and as one batch has them, and `features_with_statistics` a
features function that uses those it finds there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from jaximm.models.backbone import Trainable
from jaximm.models.flat import NECK, FlatParams, merge, under

RefreshFn = Callable[[FlatParams, jax.Array], FlatParams]
SitesFn = Callable[[FlatParams, jax.Array], dict[str, jax.Array]]
PerturbedFn = Callable[[FlatParams, jax.Array, dict[str, jax.Array]], jax.Array]


class Stages:
    """Stages of a backbone as a function of all their numbers: a program of it keeps none alive.

    One is equal to another of the same structure, so that programs are shared by backbones that are
    loaded again.

    Args:
      trainable: the backbone and its cut.
    """

    def __init__(self, trainable: Trainable):
        backbone = trainable.backbone

        def places(flat: FlatParams) -> dict[str, Any]:
            return {
                path: np.broadcast_to(np.zeros((), value.dtype), value.shape)
                for path, value in flat.items()
            }

        shell = dataclasses.replace(
            backbone, params=places(backbone.params), stats=places(backbone.stats)
        )
        self.trained = frozenset(trainable.params)
        self.trainable = dataclasses.replace(trainable, backbone=shell, params={})
        numbers = {**shell.params, **shell.stats}
        self._key = (
            type(self),
            _hashable(backbone.graphdef),
            backbone.preprocess,
            tuple(backbone.params),
            trainable.prefix_stages,
            trainable.suffix_stages,
            trainable.sites,
            self.trained,
            str(trainable.compute_dtype),
            tuple((path, *map(str, (leaf.shape, leaf.dtype))) for path, leaf in numbers.items()),
        )

    def filled(self, numbers: Mapping[str, FlatParams]) -> Trainable:
        """The cut backbone with some of its numbers in place."""
        shell = self.trainable.backbone
        params, stats = ({**getattr(shell, kind), **numbers[kind]} for kind in ("params", "stats"))
        backbone = dataclasses.replace(shell, params=params, stats=stats)
        return dataclasses.replace(self.trainable, backbone=backbone)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stages) and self._key == other._key


def _hashable(structure: object) -> object:
    """A structure, or itself alone where something in it has no hash (a model of the user's)."""
    try:
        hash(structure)
    except TypeError:
        return _Alone(structure)
    return structure


class _Alone:
    """Equal to nothing else, while what it holds is there."""

    def __init__(self, held: object):
        self._held = held


def _with_frozen(stages: Stages, trainable: Trainable) -> Partial:
    """The stages with the numbers after the cut that do not train: an argument of programs."""
    after = (*trainable.suffix_stages, NECK)

    def frozen(flat: FlatParams) -> FlatParams:
        return {
            path: value
            for path, value in flat.items()
            if path not in trainable.params and any(under(path, stage) for stage in after)
        }

    backbone = trainable.backbone
    numbers = {"params": frozen(backbone.params), "stats": frozen(backbone.stats)}
    return Partial(stages, numbers)


class _Refresh(Stages):
    def __call__(self, frozen, params: FlatParams, activations: jax.Array) -> FlatParams:
        trainable = self.filled(frozen)
        backbone = trainable.backbone
        refreshed = _refreshed(trainable)
        trained = {path: value for path, value in params.items() if path not in backbone.stats}
        module: Any = merge(backbone.graphdef, {**backbone.params, **trained}, backbone.stats)
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.BatchNorm):
                layer.use_running_average = False
                layer.momentum = 0.0
                layer.use_fast_variance = False  # mean(x^2) - mean(x)^2 loses digits
        x = activations
        if trainable.compute_dtype is not None:  # prefix activations may be stored in it
            x = x.astype(jnp.float32)
        for stage in trainable.suffix_stages:
            x = module.run_stage(stage, x)
        found = {
            ".".join(map(str, path)): variable[...]
            for path, variable in nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
        }
        kept = {path: found[path].astype(backbone.stats[path].dtype) for path in refreshed}
        return {**trained, **kept}


def _refreshed(trainable: Trainable) -> list[str]:
    """Paths of the batch statistics after the cut."""
    stats, stages = trainable.backbone.stats, trainable.suffix_stages
    return [path for path in stats if any(under(path, stage) for stage in stages)]


def refresh_fn_of(trainable: Trainable) -> RefreshFn | None:
    """``refresh_fn(params, activations) -> params``, with the statistics of `activations` added.

    One forward pass of the trained stages in which every batch norm uses, and leaves behind, mean
    and (biased) variance of its own input; a later norm sees what the earlier ones let through, as
    in training. Statistics that `params` hold already are replaced. The pass runs in the dtype of
    the parameters, whatever the trainable's `compute_dtype`.

    Returns:
      A `Partial`, as `features_with_statistics` makes it; None: no stage after the cut has batch
      statistics, or the module has none of `nnx.BatchNorm` to take them (those of a Linen module).
    """
    backbone = trainable.backbone
    whole: Any = merge(backbone.graphdef, backbone.params, backbone.stats)
    has_layers = any(isinstance(layer, nnx.BatchNorm) for _, layer in nnx.iter_modules(whole))
    if not _refreshed(trainable) or not has_layers:
        return None
    return _with_frozen(_Refresh(trainable), trainable)


class _Features(Stages):
    def __call__(self, frozen, params: FlatParams, activations: jax.Array) -> jax.Array:
        trainable = self.filled(frozen)
        backbone = trainable.backbone
        if missing := sorted(self.trained - set(params)):
            raise ValueError(f"params lack {missing[0]!r}, which trains; pass all that do.")
        stats = {path: value for path, value in params.items() if path in backbone.stats}
        if not stats:
            return trainable.features_fn(params, activations)
        own = {path: value for path, value in params.items() if path not in stats}
        stats = {**backbone.stats, **jax.lax.stop_gradient(stats)}
        moved = dataclasses.replace(trainable, backbone=dataclasses.replace(backbone, stats=stats))
        return moved.features_fn(own, activations)


def features_with_statistics(trainable: Trainable) -> Callable[[FlatParams, jax.Array], jax.Array]:
    """`Trainable.features_fn` for parameters some of which may be batch statistics.

    Those take the place of the backbone's own, and are constants: no gradient goes to them. Without
    any it is `Trainable.features_fn`. What is frozen after the cut is a leaf of the function, a
    `Partial`: compiled functions take it as an argument, and equal structures share a program.
    """
    return _with_frozen(_Features(trainable), trainable)


class _Sites(Stages):
    def __call__(self, frozen, params: FlatParams, activations: jax.Array) -> dict[str, jax.Array]:
        return self.filled(frozen).sites_fn(params, activations)


def sites_fn_of(trainable: Trainable) -> SitesFn | None:
    """`Trainable.sites_fn` as `features_with_statistics` makes it; None: no sites are asked for."""
    return _with_frozen(_Sites(trainable), trainable) if trainable.sites else None


class _Perturbed(Stages):
    def __call__(
        self, frozen, params: FlatParams, activations: jax.Array, offsets: dict[str, jax.Array]
    ) -> jax.Array:
        return self.filled(frozen).perturbed_fn(params, activations, offsets)


def perturbed_fn_of(trainable: Trainable) -> PerturbedFn | None:
    """`Trainable.perturbed_fn` in the same way; None: no sites are asked for."""
    return _with_frozen(_Perturbed(trainable), trainable) if trainable.sites else None
