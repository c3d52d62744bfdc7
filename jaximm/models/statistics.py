"""Batch-norm statistics that are taken anew, and features that read them among the parameters.

A `Trainable` keeps its batch statistics out of reach of whoever trains its parameters. For AdaBN
(Li et al., 2016, https://arxiv.org/abs/1603.04779), `refresh_fn_of` gives a function that adds them
to the parameters, by their dotted paths and as one batch has them, and `features_with_statistics` a
features function that uses those it finds there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaximm.models.backbone import FlatParams, Trainable, merge, under

RefreshFn = Callable[[FlatParams, jax.Array], FlatParams]


@functools.lru_cache(maxsize=16)
def refresh_fn_of(trainable: Trainable) -> RefreshFn | None:
    """``refresh_fn(params, activations) -> params``, with the statistics of `activations` added.

    One forward pass of the trained stages in which every batch norm uses, and leaves behind, mean
    and (biased) variance of its own input; a later norm sees what the earlier ones let through, as
    in training. Statistics that `params` hold already are replaced. The pass runs in the dtype of
    the parameters, whatever the trainable's `compute_dtype`.

    Returns:
      The same function for the same trainable; None: no stage after the cut has batch statistics,
      or the module has none of `nnx.BatchNorm` to take them (those of a Linen module).
    """
    backbone, stages = trainable.backbone, trainable.suffix_stages
    refreshed = [path for path in backbone.stats if any(under(path, stage) for stage in stages)]
    whole = merge(backbone.graphdef, backbone.params, backbone.stats)
    has_layers = any(isinstance(layer, nnx.BatchNorm) for _, layer in nnx.iter_modules(whole))
    if not refreshed or not has_layers:
        return None

    def refresh_fn(params: FlatParams, activations: jax.Array) -> FlatParams:
        trained = {path: value for path, value in params.items() if path not in backbone.stats}
        module = merge(backbone.graphdef, {**backbone.params, **trained}, backbone.stats)
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.BatchNorm):
                layer.use_running_average = False
                layer.momentum = 0.0
                layer.use_fast_variance = False  # mean(x^2) - mean(x)^2 loses digits
        x = activations
        if trainable.compute_dtype is not None:  # prefix activations may be stored in it
            x = x.astype(jnp.float32)
        for stage in stages:
            x = module.run_stage(stage, x)
        found = {
            ".".join(map(str, path)): variable[...]
            for path, variable in nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
        }
        kept = {path: found[path].astype(backbone.stats[path].dtype) for path in refreshed}
        return {**trained, **kept}

    return refresh_fn


@functools.lru_cache(maxsize=16)
def features_with_statistics(trainable: Trainable) -> Callable[[FlatParams, jax.Array], jax.Array]:
    """`Trainable.features_fn` for parameters some of which may be batch statistics.

    Those take the place of the backbone's own, and are constants: no gradient goes to them. Without
    any it is `Trainable.features_fn`. The same function for the same trainable.
    """
    backbone = trainable.backbone

    def features_fn(params: FlatParams, activations: jax.Array) -> jax.Array:
        stats = {path: value for path, value in params.items() if path in backbone.stats}
        if not stats:
            return trainable.features_fn(params, activations)
        own = {path: value for path, value in params.items() if path not in stats}
        stats = {**backbone.stats, **jax.lax.stop_gradient(stats)}
        moved = dataclasses.replace(trainable, backbone=dataclasses.replace(backbone, stats=stats))
        return moved.features_fn(own, activations)

    return features_fn
