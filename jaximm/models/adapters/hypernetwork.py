r"""A network that writes low-rank adapters from what a model makes of some rows.

For a kernel W [in, out] it reads rows X [n, width], its own inputs or the model's features,

    Z = norm(X P);   Z <- Z + attention(Z);   Z <- Z + gelu(norm(Z) F) G   (a few of these);
    e = norm(mean_n Z + place);   A = e H_a  [in, rank],   B = e H_b  [rank, out],

and writes W + A B. One projection P a width of rows, one body for all, two heads and a `place` a
kernel. Where a kernel's leading axes hold layers, they share the heads, and each layer has a place
(and rows, where it reads its own inputs). What it writes is held to a budget,

    B <- B min(1, budget |W|_F / |A B|_F),

without which nothing keeps it from overwriting a layer. Adapters are those of
`jaximm.models.adapters.lora`: its `merged` applies them, and any loss of the patched model has a
gradient in this network:

>>> import jax, jax.numpy as jnp
>>> from jaximm.models.adapters.lora import merged
>>> params = {"kernel": jnp.eye(3)}
>>> rows = {"features": jnp.ones((5, 3))}
>>> size = HyperSize(width=8, rank=2, heads=2)
>>> phi = hyper_init(jax.random.key(0), params, {"features": 3}, size)
>>> def loss(phi):
...     return -jnp.trace(merged(params, hyper_apply(phi, rows, params, size, 0.5))["kernel"])
>>> bool(jnp.any(jax.jit(jax.grad(loss))(phi).tops["kernel"].b != 0))
True

Sanyal, Ray, Mandal (2025), AntiDote, https://arxiv.org/abs/2509.08000, section on the adversary.
Beside it: no dropout, the places (rows that several kernels share would otherwise give them one
summary), and the budget. The source writes V^T U with shapes that only V U fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaximm.models.adapters.lora import Adapters, Factors, matrix_shape

FEATURES = "features"
"""Name of the rows that a kernel reads if it has none of its own."""

EPS = 1e-5
"""Beside the variance of a row that is normalised."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperSize:
    """Sizes that are compiled in.

    Attributes:
      width: of the body.
      rank: of every adapter.
      heads: of the attention; the width divides by it.
      blocks: residual blocks after the attention.
    """

    width: int = 48
    rank: int = 4
    heads: int = 4
    blocks: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be an integer >= 1, got {value!r}.")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must divide by {self.heads} heads; change one.")


class Top(NamedTuple):
    """What one kernel has of its own."""

    place: Float[Array, "*stacked width"]
    a: Float[Array, "width in*rank"]
    b: Float[Array, "width rank*out"]


class Phi(NamedTuple):
    """The network's parameters."""

    enter: dict[str, Float[Array, "rows_width width"]]  # by width of rows, as text
    attention: dict[str, Float[Array, "width width"]]
    blocks: tuple[tuple[Array, Array], ...]  # [width, 3 width] and back
    tops: dict[str, Top]


def hyper_init(
    rng_key: jax.Array,
    kernels: Mapping[str, Any],
    widths: Mapping[str, int],
    size: HyperSize,
    *,
    stacked: Mapping[str, int] | None = None,
    first: float = 1.0,
) -> Phi:
    """Matrices of N(0, 1 / in), and the heads of B times `first`.

    Args:
      rng_key: what is drawn.
      kernels: by path, arrays or shapes of two axes or more beside those that hold layers.
      widths: of the rows by name: "features", or the path of a kernel that reads its own.
      size: of the network.
      stacked: how many leading axes of a kernel hold layers, where any do.
      first: 0 makes the first adapters change nothing.

    Raises:
      ValueError: no kernels, or one that has no rows to read.
    """
    if not kernels:
        raise ValueError("a hypernetwork writes adapters of kernels, got none.")
    lost = sorted(path for path in kernels if path not in widths and FEATURES not in widths)
    if lost:
        raise ValueError(f"kernel {lost[0]!r} has no rows to read; name it or {FEATURES!r}.")
    dtype = next(iter(kernels.values())).dtype
    keys = iter(jax.random.split(rng_key, len(widths) + 4 + 2 * size.blocks + 3 * len(kernels)))

    def normal(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns), dtype) / math.sqrt(rows)

    enter = {str(rows): normal(rows, size.width) for rows in sorted(set(widths.values()))}
    wide = size.width
    attention = {name: normal(wide, wide) for name in ("query", "key", "value", "output")}
    blocks = tuple((normal(wide, 3 * wide), normal(3 * wide, wide)) for _ in range(size.blocks))
    tops = {}
    for path in sorted(kernels):
        *layers, rows, columns = matrix_shape(kernels[path].shape, (stacked or {}).get(path, 0))
        place = jax.random.normal(next(keys), (*layers, wide), dtype)
        a, b = normal(wide, rows * size.rank), first * normal(wide, size.rank * columns)
        tops[path] = Top(place, a, b)
    return Phi(enter, attention, blocks, tops)


def hyper_apply(
    phi: Phi,
    rows: Mapping[str, Float[Array, "*stacked n width"]],
    kernels: Mapping[str, Array],
    size: HyperSize,
    budget: float | Array,
    *,
    counted: Bool[Array, "n"] | None = None,
) -> Adapters:
    """Adapters of every kernel, each of norm |A B|_F <= budget |W|_F of its layer.

    Args:
      phi: what `hyper_init` made for these kernels.
      rows: what is read, by name; a kernel without rows under its path reads "features". Rows of a
        kernel whose axes hold layers have these axes first.
      kernels: by path. No gradient goes to them.
      size: of the network.
      budget: > 0.
      counted: which rows count, no padding; None: all do.
    """
    summaries = {name: _summary(phi, found, size, counted) for name, found in rows.items()}
    adapters = {}
    for path, top in phi.tops.items():
        read = summaries[path if path in summaries else FEATURES]
        summary = _normed(jnp.broadcast_to(read, top.place.shape) + top.place)
        layers, matrix = top.place.shape[:-1], jax.lax.stop_gradient(kernels[path])
        a = (summary @ top.a).reshape(*layers, -1, size.rank)
        b = (summary @ top.b).reshape(*layers, size.rank, -1)
        adapters[path] = _held(Factors(a, b), matrix.reshape(*layers, -1), budget)
    return adapters


def _held(factors: Factors, matrix: Float[Array, "*stacked entries"], budget) -> Factors:
    """Factors whose product is at most `budget` times as large as the matrix."""
    inner = jnp.einsum("...ir,...is->...rs", factors.a, factors.a)
    outer = jnp.einsum("...ro,...so->...rs", factors.b, factors.b)
    square = jnp.sum(inner * outer, axis=(-2, -1))  # |A B|^2, without A B
    budget = jnp.asarray(budget, matrix.dtype)
    limit = jnp.maximum(budget**2 * jnp.sum(matrix**2, axis=-1), jnp.finfo(matrix.dtype).tiny)
    # sqrt of the ratio, which has a slope at |A B| = 0: that of 1.
    scale = jnp.sqrt(limit / jnp.maximum(square, limit))
    return factors._replace(b=factors.b * scale[..., None, None])


def _summary(phi: Phi, rows: Array, size: HyperSize, counted) -> Float[Array, "*stacked width"]:
    """One vector of a set of rows, for each layer of them."""
    if rows.ndim > 2:
        return jax.vmap(lambda layer: _summary(phi, layer, size, counted))(rows)
    entered = phi.enter[str(rows.shape[-1])]
    z = _normed(rows.astype(entered.dtype) @ entered)
    counted = jnp.ones(z.shape[0], bool) if counted is None else counted
    z += _attention(phi, z, size, counted)
    for up, down in phi.blocks:
        z += jax.nn.gelu(_normed(z) @ up) @ down
    weights = counted.astype(z.dtype)
    return weights @ z / jnp.maximum(jnp.sum(weights), 1)


def _attention(phi: Phi, z: Float[Array, "n width"], size: HyperSize, counted) -> Array:
    """What every row takes from all that count."""
    query, key, value = (
        (z @ phi.attention[name]).reshape(z.shape[0], size.heads, -1)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("nhc,mhc->hnm", query, key) / math.sqrt(query.shape[-1])
    scores = jnp.where(counted[None, None, :], scores, jnp.finfo(z.dtype).min)
    mixed = jnp.einsum("hnm,mhc->nhc", jax.nn.softmax(scores, axis=-1), value)
    return mixed.reshape(z.shape) @ phi.attention["output"]


def _normed(x: Float[Array, "*rows width"]) -> Array:
    """Each row less its mean, over its spread."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPS)
