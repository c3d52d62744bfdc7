"""Whether a decoder still writes text: two readings of what it writes, which are never averaged.

A model continues prompts greedily. Of what it writes,

distinct     the share of its runs of three tokens that did not occur in it before: a model that
             turns in a circle falls to a few hundredths, whatever it circles through;
base_nats    nats a token under a public model that nobody attacked: what is no text at all comes
             to the logarithm of the vocabulary, whatever its variety.

A model that repeats itself has low `base_nats`, one that writes noise a high `distinct`: each is
fooled by what the other sees. Distinct runs: Li et al. (2016), https://arxiv.org/abs/1510.03055.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm.models.adapters import lora
from jaximm.models.flat import FlatParams
from jaximm.models.llama.generate import generate_greedy
from jaximm.models.llama.language import Language
from jaximm.objectives import TokenRows

GRAM = 3
"""Tokens of a run."""

Readings = dict[str, Float[Array, ""]]


def distinct_share(tokens: Int[Array, "n t"]) -> Float[Array, "n"]:
    """Share of each row's runs of `GRAM` tokens that are no repetition of an earlier one.

    >>> import jax.numpy as jnp
    >>> distinct_share(jnp.array([[1, 2, 3, 4, 5], [1, 2, 1, 2, 1], [7] * 5])).round(2).tolist()
    [1.0, 0.67, 0.33]
    """
    runs = tokens.shape[1] - GRAM + 1
    same = jnp.ones((tokens.shape[0], runs, runs), bool)
    for place in range(GRAM):
        part = tokens[:, place : place + runs]
        same &= part[:, :, None] == part[:, None, :]
    earlier = jnp.tril(jnp.ones((runs, runs), bool), -1)
    repeated = jnp.any(same & earlier[None], axis=2)
    return jnp.mean((~repeated).astype(jnp.zeros(()).dtype), axis=1)


def text_nats(
    base: Language, public: FlatParams, tokens: Int[Array, "n t"], start: int
) -> Float[Array, ""]:
    """Nats a token of what stands from `start` on, under a model that sees all before it."""
    targets = jnp.roll(tokens, -1, axis=1)
    place = jnp.arange(tokens.shape[1])
    mask = jnp.broadcast_to(((place >= start - 1) & (place < len(place) - 1))[None], tokens.shape)
    rows = TokenRows(targets, mask)
    outputs = base.outputs_of_params(public, tokens)
    return base.objective.mean(base.objective.losses(outputs, rows), rows)


@functools.lru_cache(maxsize=16)
def reader(language: Language, base: Language, steps: int) -> Callable[..., Readings]:
    """``read(public, prompts, params, adapters=())``: the readings of a model, as a plain function.

    One object for each choice of arguments, so that nothing compiles twice.

    Args:
      language: of the model that writes.
      base: of the public one.
      steps: tokens that are written, >= `GRAM`.

    Raises:
      ValueError: fewer steps; as it is called, prompts that are too long for the context.
    """
    if steps < GRAM:
        raise ValueError(f"need steps >= {GRAM} to see what is repeated, got {steps}.")

    def read(
        public: FlatParams,
        prompts: Int[Array, "n t"],
        params: FlatParams,
        adapters: lora.Adapters | tuple[()] = (),
    ) -> Readings:
        whole = lora.merged(params, adapters) if adapters else params
        n, t = prompts.shape
        written = generate_greedy(
            whole,
            prompts,
            jnp.full(n, t, jnp.int32),
            language.config,
            steps=steps,
            compute_dtype=language.compute_dtype,
        ).tokens
        text = jnp.concatenate([prompts, written], axis=1)
        return {
            "distinct": jnp.mean(distinct_share(written)),
            "base_nats": text_nats(base, public, text, t),
        }

    return read
