"""Continuing texts with a cache of keys and values: one compiled program a shape.

A prompt is run once; then a `jax.lax.while_loop` adds a token a turn to all rows, until each has
ended or the given number is reached. Prompts of different lengths are padded on the right: what is
written at padding is overwritten before any later position looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaximm.models.llama.model import (
    _check,
    angles,
    attention,
    block,
    cast,
    final_norm,
    layers_of,
    unembed,
    unembedding,
)
from jaximm.models.llama.spec import LlamaConfig


class Generated(NamedTuple):
    """New tokens, and how many of them each row has, the one that ended it included.

    After its end a row holds the token that ended it.
    """

    tokens: Int[Array, "n steps"]
    lengths: Int[Array, "n"]


class Cache(NamedTuple):
    """Turned keys and values of all layers and positions."""

    key: Float[Array, "layers n s kv_heads h"]
    value: Float[Array, "layers n s kv_heads h"]


class _Carry(NamedTuple):
    cache: Cache
    logits: Array
    tokens: Array
    lengths: Array
    ended: Array
    step: Array


def generate_greedy(
    params: Mapping[str, jax.Array],
    prompt: Int[Array, "n t"],
    lengths: Int[Array, "n"],
    config: LlamaConfig,
    *,
    steps: int,
    stop: tuple[int, ...] = (),
    compute_dtype: DTypeLike | None = None,
) -> Generated:
    """Adds the likeliest token `steps` times; of equal ones the first.

    Jit it with `config`, `steps`, `stop` and `compute_dtype` static.

    Args:
      params: as `jaximm.models.llama.hidden` takes them.
      prompt: padded on the right with any token.
      lengths: of the prompts, each in 1..t.
      config: static.
      steps: new tokens at most, static.
      stop: tokens that end a row.
      compute_dtype: of layers and cache; None: as the parameters are.

    Raises:
      ValueError: parameters of another configuration, a prompt that is not [n, t] with its lengths
        [n], no steps, or more positions than the model has.
    """

    def choose(logits, step):
        del step
        return jnp.argmax(logits, axis=-1).astype(prompt.dtype)

    return _generate(params, prompt, lengths, config, choose, steps, stop, compute_dtype)


def generate_sampled(
    params: Mapping[str, jax.Array],
    prompt: Int[Array, "n t"],
    lengths: Int[Array, "n"],
    config: LlamaConfig,
    rng_key: jax.Array,
    *,
    steps: int,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    stop: tuple[int, ...] = (),
    compute_dtype: DTypeLike | None = None,
) -> Generated:
    """Draws each token from softmax(logits / temperature); others as `generate_greedy`.

    Args:
      params: as there; so are prompt, lengths, config, steps, stop and compute_dtype.
      prompt: see there.
      lengths: see there.
      config: see there.
      rng_key: token t is drawn with ``fold_in(rng_key, t)``.
      steps: see there.
      temperature: above 0; may be traced.
      top_k: draw among so many likeliest tokens; None: among all.
      stop: see there.
      compute_dtype: see there.

    Raises:
      ValueError: as `generate_greedy`; a `top_k` that is not in 1..vocabulary.
    """
    if top_k is not None and not 1 <= top_k <= config.vocabulary:
        raise ValueError(f"top_k must be in 1..{config.vocabulary}, got {top_k}.")

    def choose(logits, step):
        key = jax.random.fold_in(rng_key, step)
        scaled = logits / jnp.asarray(temperature, logits.dtype)
        if top_k is None:
            return jax.random.categorical(key, scaled).astype(prompt.dtype)
        likeliest, places = jax.lax.top_k(scaled, top_k)
        drawn = jax.random.categorical(key, likeliest)
        return jnp.take_along_axis(places, drawn[:, None], axis=1)[:, 0].astype(prompt.dtype)

    return _generate(params, prompt, lengths, config, choose, steps, stop, compute_dtype)


def _generate(
    params: Mapping[str, jax.Array],
    prompt: jax.Array,
    lengths: jax.Array,
    config: LlamaConfig,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    steps: int,
    stop: tuple[int, ...],
    compute_dtype: DTypeLike | None,
) -> Generated:
    """Generation with ``choose(logits [n, v], step) -> tokens [n]``."""
    _check(params, config)
    if prompt.ndim != 2 or lengths.shape != prompt.shape[:1]:
        raise ValueError(
            f"expected a prompt [n, t] and lengths [n], got {prompt.shape} and {lengths.shape}."
        )
    n, t = prompt.shape
    if steps < 1 or t + steps > config.context:
        raise ValueError(
            f"{t} tokens of the prompt and {steps} steps do not fit: need steps >= 1 and at most "
            f"{config.context} positions together."
        )
    dtype = params["embedding.table"].dtype if compute_dtype is None else compute_dtype
    shape = (config.layers, n, t + steps, config.kv_heads, config.head_width)
    cache = Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    table = unembedding(params)
    lengths = lengths.astype(jnp.int32)
    starts = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :], (n, t))
    states, cache = _extend(params, prompt, starts, cache, config)
    last = jnp.take_along_axis(states, lengths[:, None, None] - 1, axis=1)[:, 0]
    ends = jnp.asarray(stop, prompt.dtype)

    def running(carry):
        return (carry.step < steps) & ~jnp.all(carry.ended)

    def advance(carry):
        previous = carry.tokens[:, jnp.maximum(carry.step - 1, 0)]
        token = jnp.where(carry.ended, previous, choose(carry.logits, carry.step))
        counts = carry.lengths + (~carry.ended).astype(jnp.int32)
        ended = carry.ended | jnp.any(token[:, None] == ends[None, :], axis=1)
        places = (lengths + carry.step)[:, None]
        states, cache = _extend(params, token[:, None], places, carry.cache, config)
        written = carry.tokens.at[:, carry.step].set(token)
        out = unembed(states[:, 0], table)
        return _Carry(cache, out, written, counts, ended, carry.step + 1)

    carry = _Carry(
        cache,
        unembed(last, table),
        jnp.zeros((n, steps), prompt.dtype),
        jnp.zeros(n, jnp.int32),
        jnp.zeros(n, bool),
        jnp.zeros((), jnp.int32),
    )
    carry = jax.lax.while_loop(running, advance, carry)
    # Where all rows ended early the rest of the buffer was never reached.
    reached = jnp.arange(steps, dtype=jnp.int32)[None, :] < carry.step
    final = carry.tokens[:, carry.step - 1][:, None]
    return Generated(jnp.where(reached, carry.tokens, final), carry.lengths)


def _extend(
    params: Mapping[str, jax.Array],
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    config: LlamaConfig,
) -> tuple[jax.Array, Cache]:
    """Final hidden states of tokens [n, t] at their positions, and the cache with them in it."""
    dtype = cache.key.dtype
    turned = angles(positions, config, dtype)
    kept_at = jnp.arange(cache.key.shape[2], dtype=jnp.int32)
    visible = positions[:, :, None] >= kept_at[None, None, :]
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]

    def layer(carry, weights_and_index):
        (x, held), (weights, index) = carry, weights_and_index

        def attend(query, key, value):
            # Written in place: the cache is carried, a layer's part of it is read.
            kept = Cache(
                held.key.at[index, rows, positions].set(key),
                held.value.at[index, rows, positions].set(value),
            )
            return attention(query, kept.key[index], kept.value[index], visible), kept

        return block(x, cast(weights, dtype), config, turned, attend), None

    x = params["embedding.table"][tokens].astype(dtype)
    indices = jnp.arange(config.layers, dtype=jnp.int32)
    (x, cache), _ = jax.lax.scan(layer, (x, cache), (layers_of(params), indices))
    return final_norm(params, x, config), cache
