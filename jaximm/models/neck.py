"""Folding a neck, the linear map after a backbone's features, into the layer before it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaximm.models.backbone import Backbone, run_stages
from jaximm.models.flat import NECK, under


def fold_neck(backbone: Backbone) -> Backbone:
    """The same features without a neck, where the last stage is a linear layer of the same width.

    Of ``f = (h K + b) N + n`` the new layer is ``K' = K N``, ``b' = b N + n``, taken in float64 and
    rounded once to the layer's dtype. A backbone whose features come out of a ReLU, a layer norm or
    a mean over positions cannot take a linear map into its own weights and keeps its neck: it
    is returned as it is. So is one whose neck changes the number of features, for its
    configuration would have to change too, and one without a neck.
    """
    last = backbone.stage_names[-1]
    kernel, bias = backbone.params.get(f"{last}.kernel"), backbone.params.get(f"{last}.bias")
    neck = backbone.params.get("neck.kernel")
    if neck is None or kernel is None or bias is None or neck.shape[0] != neck.shape[1]:
        return backbone
    if not _is_linear(backbone, last):
        return backbone
    shift = backbone.params.get("neck.bias", np.zeros(neck.shape[1]))
    kernel64, bias64, neck64, shift64 = (
        np.asarray(part, np.float64) for part in (kernel, bias, neck, shift)
    )
    folded = {
        f"{last}.kernel": (kernel64 @ neck64).astype(kernel.dtype),
        f"{last}.bias": (bias64 @ neck64 + shift64).astype(bias.dtype),
    }
    params = {path: value for path, value in backbone.params.items() if not under(path, NECK)}
    return dataclasses.replace(backbone, params=params | jax.tree.map(jax.numpy.asarray, folded))


def _is_linear(backbone: Backbone, stage: str) -> bool:
    """Whether a stage is ``x @ kernel + bias`` and no more, seen from what it does to numbers."""
    kernel, bias = backbone.params[f"{stage}.kernel"], backbone.params[f"{stage}.bias"]
    if kernel.ndim != 2 or bias.shape != kernel.shape[1:]:
        return False
    # Rows of both signs: an activation that passed them all would have to be the identity there.
    inputs = np.random.default_rng(0).normal(size=(32, kernel.shape[0])).astype(kernel.dtype)
    outputs = run_stages(backbone, backbone.params, jax.numpy.asarray(inputs), [stage], neck=False)
    expected = inputs.astype(np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    scale = np.abs(inputs).astype(np.float64) @ np.abs(np.asarray(kernel)) + np.abs(
        np.asarray(bias)
    )
    # Matrix products on an accelerator may round to 10 bits.
    return bool(np.all(np.abs(np.asarray(outputs) - expected) <= 1e-2 * scale))
