"""Layers that several convolutional networks share, and where a torch checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.spec import Entry, Layout

COUNTER = "num_batches_tracked"
"""Last part of the key under which torch's batch norms count batches."""


def conv(
    in_features: int,
    out_features: int,
    side: int,
    rngs: nnx.Rngs,
    *,
    stride: int = 1,
    padding: Literal["SAME"] | int | None = None,
) -> nnx.Conv:
    """A square convolution [side, side, in, out] without bias, its padding that of torch.

    ``padding=None`` is symmetric and keeps the size at stride 1: ``side // 2``.
    """
    return nnx.Conv(
        in_features,
        out_features,
        (side, side),
        strides=stride,
        padding=side // 2 if padding is None else padding,
        use_bias=False,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def batch_norm(features: int, epsilon: float, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm on its stored statistics."""
    return nnx.BatchNorm(
        features,
        use_running_average=True,
        epsilon=epsilon,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def max_pool(
    x: Float[Array, "n h w c"], *, padding: Sequence[tuple[int, int]]
) -> Float[Array, "n h2 w2 c"]:
    """Maximum over 3 x 3 windows at stride 2; the padding of either axis never wins."""
    pads = ((0, 0), *padding, (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)


def conv_norm_entries(conv: str, norm: str, conv_key: str, norm_key: str) -> list[Entry]:
    """A convolution without bias and its batch norm, paths here and torch's keys there."""
    return [
        Entry(f"{conv}.kernel", (f"{conv_key}.weight",), "conv"),
        Entry(f"{norm}.scale", (f"{norm_key}.weight",)),
        Entry(f"{norm}.bias", (f"{norm_key}.bias",)),
        Entry(f"{norm}.mean", (f"{norm_key}.running_mean",)),
        Entry(f"{norm}.var", (f"{norm_key}.running_var",)),
    ]


def batch_norm_layout(entries: list[Entry]) -> Layout:
    """A layout whose batch norms count batches there: not read, and written as zeros."""
    ends = ".running_mean"
    norms = [entry.keys[0].removesuffix(ends) for entry in entries if entry.keys[0].endswith(ends)]
    return Layout(
        entries=tuple(entries),
        ignored=(COUNTER,),
        constants={f"{norm}.{COUNTER}": np.zeros((), np.int64) for norm in norms},
    )
