"""A Llama-family decoder as pure functions of a flat dict of arrays.

Parameters lie by dotted path, as those of every backbone do; a path below ``layers.`` holds all
layers, stacked on the first axis, and `jax.lax.scan` runs over them, so that a program is compiled
for one layer whatever their number. Kernels are [in, out].

The final hidden states come without logits: a vocabulary of 50,000 makes those the largest array of
a step, and a loss takes them in chunks from the hidden states and `unembedding`.

Papers: Touvron et al. (2023), https://arxiv.org/abs/2302.13971; RMSNorm, Zhang and Sennrich (2019),
https://arxiv.org/abs/1910.07467; RoPE, Su et al. (2021), https://arxiv.org/abs/2104.09864; grouped
queries, Ainslie et al. (2023), https://arxiv.org/abs/2305.13245; gated MLP, Shazeer (2020),
https://arxiv.org/abs/2002.05202; scaled frequencies, Grattafiori et al. (2024),
https://arxiv.org/abs/2407.21783; Qwen's biases and norms, https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaximm.models.adapters.lora import Factors
from jaximm.models.flat import FlatParams
from jaximm.models.llama.spec import LlamaConfig
from jaximm.types import Tree

LAYERS = "layers."
"""Prefix of the paths whose arrays hold all layers."""

LINEAR = ("query", "key", "value", "output", "gate", "up", "down")
"""Linear maps of a layer."""

KERNELS = frozenset(f"{name}.kernel" for name in LINEAR)

STREAM = "stream"
"""Name of what enters a layer, where it is tapped like the inputs of its linear maps."""


class Angles(NamedTuple):
    """Cosines and sines of positions, [n or 1, t, 1, head_width / 2]."""

    cos: Array
    sin: Array


Kept = Any
"""What attention keeps for later, a pytree of arrays: keys and values, or nothing."""

Attend = Callable[[Array, Array, Array], tuple[Array, Kept]]
"""Outputs [n, t, heads, head_width] of queries, keys and values, and what is to be kept."""


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path.

    >>> from jaximm.models.llama.spec import LlamaConfig
    >>> sizes = dict(vocabulary=7, width=4, layers=3, heads=2, kv_heads=1, head_width=2, hidden=5)
    >>> shapes(LlamaConfig(**sizes, tied=True))["layers.gate.kernel"]
    (3, 4, 5)
    """
    d, f, h = config.width, config.hidden, config.head_width
    queries, keys = config.heads * h, config.kv_heads * h
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm.scale": (d,),
        "query.kernel": (d, queries),
        "key.kernel": (d, keys),
        "value.kernel": (d, keys),
        "output.kernel": (queries, d),
        "mlp_norm.scale": (d,),
        "gate.kernel": (d, f),
        "up.kernel": (d, f),
        "down.kernel": (f, d),
    }
    if config.qkv_bias:
        layer |= {"query.bias": (queries,), "key.bias": (keys,), "value.bias": (keys,)}
    if config.qk_norm:
        layer |= {"query_norm.scale": (h,), "key_norm.scale": (h,)}
    whole: dict[str, tuple[int, ...]] = {
        "embedding.table": (config.vocabulary, d),
        "norm.scale": (d,),
    }
    if not config.tied:
        whole["unembedding.table"] = (config.vocabulary, d)
    return whole | {f"{LAYERS}{path}": (config.layers, *s) for path, s in layer.items()}


@functools.partial(jax.jit, static_argnames=("config", "dtype"))  # one program, not one a draw
def init(rng_key: jax.Array, config: LlamaConfig, *, dtype: DTypeLike = jnp.float32) -> FlatParams:
    """Random parameters: kernels N(0, 1 / in), those that end a branch N(0, 1 / (2 layers in)).

    Tables are N(0, 1 / width), norms 1, biases 0.
    """
    params = {}
    for index, (path, shape) in enumerate(sorted(shapes(config).items())):
        if path.endswith(".scale"):
            params[path] = jnp.ones(shape, dtype)
        elif path.endswith(".bias"):
            params[path] = jnp.zeros(shape, dtype)
        else:
            fan_in = shape[-1] if path.endswith(".table") else shape[-2]
            ends = path in (f"{LAYERS}output.kernel", f"{LAYERS}down.kernel")
            spread = (fan_in * (2 * config.layers if ends else 1)) ** -0.5
            drawn = jax.random.normal(jax.random.fold_in(rng_key, index), shape, dtype)
            params[path] = drawn * jnp.asarray(spread, dtype)
    return params


def stacked_axes(path: str) -> int:
    """How many leading axes of a parameter hold layers.

    >>> stacked_axes("layers.query.kernel"), stacked_axes("norm.scale")
    (1, 0)
    """
    return int(path.startswith(LAYERS))


def hidden(
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "n t"],
    config: LlamaConfig,
    *,
    adapters: Mapping[str, Factors] | None = None,
    remat: bool = False,
    compute_dtype: DTypeLike | None = None,
) -> Float[Array, "n t d"]:
    """Hidden states after the final norm; position t sees tokens 0 to t.

    Args:
      params: by path, of `shapes`. Tokens outside the vocabulary are not looked for: jax clips.
      tokens: rows of one length.
      config: static.
      adapters: of kernels of the layers, see `jaximm.models.adapters.lora`.
      remat: True: a layer's activations are computed again in the backward pass, so that memory is
        that of one layer and the residuals between layers.
      compute_dtype: of the layers, for instance bfloat16; each layer's parameters are cast inside
        the loop, so that no second copy of the model is there. Mean squares and softmax are taken
        in float32 at least, and the states come back in it. None: as the parameters are.

    Raises:
      ValueError: paths or shapes that are not the configuration's, adapters of something else than
        kernels of its layers, or tokens that are not [n, t].
    """
    _check(params, config)
    x = embed(params, tokens, compute_dtype)
    x, _ = advance(x, layers_of(params), config, adapters=layers_of(adapters or {}), remat=remat)
    return final_norm(params, x, config)


def embed(
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "n t"],
    compute_dtype: DTypeLike | None = None,
) -> Float[Array, "n t d"]:
    """What enters the first layer, in the compute dtype.

    Raises:
      ValueError: tokens that are not integers [n, t].
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"expected integer tokens [n, t], got {tokens.dtype}{list(tokens.shape)}.")
    table = params["embedding.table"]
    return table[tokens].astype(table.dtype if compute_dtype is None else compute_dtype)


def advance(
    x: Float[Array, "n t d"],
    layers: Mapping[str, jax.Array],
    config: LlamaConfig,
    *,
    adapters: Mapping[str, Factors] | None = None,
    remat: bool = False,
    taps: Mapping[str, Sequence[int]] | None = None,
    offsets: Mapping[str, Float[Array, "taps n t width"]] | None = None,
) -> tuple[Float[Array, "n t d"], dict[str, Float[Array, "taps n t width"]]]:
    """The residual stream after some consecutive layers, and inputs of some of their linear maps.

    Args:
      x: before them; its dtype is that of the arithmetic.
      layers: stacked arrays of these layers, as `layers_of` gives them.
      config: static.
      adapters: by path without ``layers.``, stacked alike.
      remat: see `hidden`.
      taps: numbers of layers (0 is the first of these), by the name of a linear map, whose inputs
        are returned, or by `STREAM`, for what enters a layer. They are written into one buffer that
        goes through the loop: the memory is that of those asked for.
      offsets: by name of a tap, what is added to its inputs after they are seen.

    Raises:
      ValueError: adapters of something else than kernels of the layers.
    """
    adapters, taps, offsets = adapters or {}, taps or {}, offsets or {}
    wrong = sorted(path for path in adapters if path not in KERNELS)
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} of the layers has no adapter; those of the kernels {sorted(KERNELS)} do."
        )
    dtype, count = x.dtype, jax.tree.leaves(layers)[0].shape[0]
    positions = jnp.arange(x.shape[1])[None, :]
    turned = angles(positions, config, dtype)
    visible = positions[:, :, None] >= positions[:, None, :]
    places, held = {}, {}
    for name, chosen in taps.items():
        place = np.full(count, len(chosen), np.int32)  # past the end: dropped
        place[list(chosen)] = np.arange(len(chosen))
        width = x.shape[-1] if name == STREAM else layers[f"{name}.kernel"].shape[1]
        places[name], held[name] = jnp.asarray(place), jnp.zeros((len(chosen), *x.shape[:2], width))
        held[name] = held[name].astype(dtype)

    def layer(carry, stacked):
        (x, held), (weights, factors, places) = carry, stacked
        seen: dict[str, Array] = {}

        def see(name, inputs):
            seen[name] = inputs
            if name not in offsets:
                return inputs
            here = offsets[name].at[places[name]].get(mode="fill", fill_value=0)
            return inputs + here.astype(dtype)

        def causal(query, key, value):
            return attention(query, key, value, visible), None

        x, _ = block(
            x,
            cast(weights, dtype),
            config,
            turned,
            causal,
            adapters=cast(factors, dtype),
            see=see,
        )
        held = {
            name: buffer.at[places[name]].set(seen[name], mode="drop")
            for name, buffer in held.items()
        }
        return (x, held), None

    if remat:
        layer = jax.checkpoint(layer)
    return jax.lax.scan(layer, (x, held), (dict(layers), dict(adapters), places))[0]


def logits(
    params: Mapping[str, jax.Array], tokens: Int[Array, "n t"], config: LlamaConfig, **options: Any
) -> Float[Array, "n t v"]:
    """All logits at once, for short texts: ``hidden(params, tokens, config, **options) @ table^T``.

    Raises:
      ValueError: as `hidden`.
    """
    states = hidden(params, tokens, config, **options)
    return unembed(states, unembedding(params))


def unembedding(params: Mapping[str, jax.Array]) -> Float[Array, "v d"]:
    """The table whose rows are multiplied with hidden states; the embedding where it is tied."""
    return params.get("unembedding.table", params["embedding.table"])


def unembed(states: Float[Array, "... d"], table: Float[Array, "v d"]) -> Float[Array, "... v"]:
    """Logits in the states' dtype."""
    return jnp.matmul(states, table.T.astype(states.dtype))


def block(
    x: Float[Array, "n t d"],
    weights: Mapping[str, jax.Array],
    config: LlamaConfig,
    turned: Angles,
    attend: Attend,
    *,
    adapters: Mapping[str, Factors] | None = None,
    see: Callable[[str, Array], Array] = lambda name, inputs: inputs,
) -> tuple[Float[Array, "n t d"], Kept]:
    """One layer: x + attention(norm x), then x + down(silu(gate) * up) of the norm of that.

    Args:
      x: residual stream.
      weights: of one layer, without ``layers.``.
      config: static.
      turned: of the positions of `x`.
      attend: takes queries, turned keys and values; its second result is returned beside x.
      adapters: of one layer, by path.
      see: is called with the name and the inputs of each linear map as it is traced, and with
        `STREAM` and x; what it returns goes in.
    """
    adapters = adapters or {}
    norm = functools.partial(rms_norm, eps=config.norm_eps)

    def linear(name, inputs):
        inputs = see(name, inputs)
        out = inputs @ weights[f"{name}.kernel"]
        factors = adapters.get(f"{name}.kernel")
        if factors is not None:
            out = out + (inputs @ factors.a) @ factors.b
        bias = weights.get(f"{name}.bias")
        return out if bias is None else out + bias[None, None, :]

    def heads(name, inputs):
        out = linear(name, inputs)
        return out.reshape(*out.shape[:2], -1, config.head_width)

    x = see(STREAM, x)
    inputs = norm(x, weights["attention_norm.scale"])
    query, key, value = (heads(name, inputs) for name in ("query", "key", "value"))
    if config.qk_norm:
        query = norm(query, weights["query_norm.scale"])
        key = norm(key, weights["key_norm.scale"])
    query, key = (turn(side, turned, config) for side in (query, key))
    mixed, kept = attend(query, key, value)
    x = x + linear("output", mixed.reshape(*mixed.shape[:2], -1))
    inputs = norm(x, weights["mlp_norm.scale"])
    return x + linear("down", jax.nn.silu(linear("gate", inputs)) * linear("up", inputs)), kept


def attention(
    query: Float[Array, "n t heads h"],
    key: Float[Array, "n s kv_heads h"],
    value: Float[Array, "n s kv_heads h"],
    visible: Array,
) -> Float[Array, "n t heads h"]:
    """softmax(q k^T / sqrt(h)) v; consecutive query heads share a key head, which is not repeated.

    `visible` [n or 1, t, s] says which keys a query sees; each must see one. Not
    `jax.nn.dot_product_attention`, whose softmax is float32 also for float64.
    """
    n, t, heads, h = query.shape
    grouped = query.reshape(n, t, key.shape[2], -1, h)
    scores = jnp.einsum("ntkgh,nskh->nkgts", grouped, key, preferred_element_type=wide(query.dtype))
    scores = jnp.where(visible[:, None, None], scores * h**-0.5, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("nkgts,nskh->ntkgh", shares, value).reshape(n, t, heads, h)


def rms_norm(
    x: Float[Array, "... d"], scale: Float[Array, "d"], *, eps: float
) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32 at least; the result has the dtype of x."""
    precise = x.astype(wide(x.dtype))
    precise = precise * jax.lax.rsqrt(jnp.mean(precise**2, axis=-1, keepdims=True) + eps)
    scale = scale.astype(precise.dtype).reshape(*(1,) * (x.ndim - 1), -1)
    return (precise * scale).astype(x.dtype)


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a position of each rotary pair, [head_width / 2] in float64.

    theta^(-2 i / head_width); with `RopeScaling`, times ``s + (1 - s) / factor`` where
    s = clip((original_context / wavelength - low) / (high - low), 0, 1).
    """
    radians = config.rope_theta ** (-np.arange(0, config.head_width, 2) / config.head_width)
    scaling = config.rope_scaling
    if scaling is None:
        return radians
    turns = scaling.original_context * radians / (2 * math.pi)  # within the original context
    low, high = scaling.low_frequency, scaling.high_frequency
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return radians * (kept + (1 - kept) / scaling.factor)


def angles(positions: Int[Array, "n t"], config: LlamaConfig, dtype: DTypeLike) -> Angles:
    """Cosines and sines in `dtype`, computed in float32 at least."""
    precise = wide(dtype)
    turns = positions[:, :, None, None].astype(precise) * jnp.asarray(
        frequencies(config), precise
    ).reshape(1, 1, 1, -1)
    return Angles(jnp.cos(turns).astype(dtype), jnp.sin(turns).astype(dtype))


def turn(
    x: Float[Array, "n t heads h"], turned: Angles, config: LlamaConfig
) -> Float[Array, "n t heads h"]:
    """RoPE: every pair (a, b) of a head becomes (a cos - b sin, a sin + b cos)."""
    cos, sin = turned
    if config.rope_pairs == "halves":
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def layers_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a scan over layers takes: stacked arrays, or adapters, by path without ``layers.``."""
    return {
        path.removeprefix(LAYERS): value
        for path, value in params.items()
        if path.startswith(LAYERS)
    }


def final_norm(params: Mapping[str, jax.Array], x: Array, config: LlamaConfig) -> Array:
    """The last norm, in float32 at least."""
    x = x.astype(wide(x.dtype))
    return rms_norm(x, params["norm.scale"], eps=config.norm_eps)


def cast(weights: Tree, dtype: DTypeLike) -> Tree:
    """A tree of arrays in another dtype."""
    return jax.tree.map(lambda value: value.astype(dtype), weights)


def wide(dtype: DTypeLike) -> DTypeLike:
    """float32 for half precisions, whose sums lose digits; others as they are."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _check(params: Mapping[str, jax.Array], config: LlamaConfig) -> None:
    """Refuses parameters of another shape."""
    check_shapes({path: value.shape for path, value in params.items()}, config)


def check_shapes(given: Mapping[str, tuple[int, ...]], config: LlamaConfig) -> None:
    """Refuses shapes by path that are not the configuration's.

    Raises:
      ValueError: as said, with the first path that differs.
    """
    wanted = shapes(config)
    wrong = sorted(set(wanted) ^ set(given)) or sorted(
        path for path, shape in wanted.items() if tuple(given[path]) != shape
    )
    if wrong:
        path = wrong[0]
        got, expected = (
            list(shapes_by_path[path]) if path in shapes_by_path else "nothing"
            for shapes_by_path in (given, wanted)
        )
        raise ValueError(
            f"the configuration and the parameters differ in {path!r}: expected {expected}, got "
            f"{got}; give the configuration that came with them."
        )
