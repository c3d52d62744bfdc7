r"""GRPO: answers are sampled in groups, and those better than their group become likelier.

For each row, `samples` answers a_g ~ pi are drawn from the model. An answer is worth the share of
its tokens that are right, r_g, and what is descended is

    -mean_{i,g} [ A_ig log pi(a_ig | x_i) / |a_ig| ] + anchor * mean_i KL(pi_0 || pi),
    A_ig = (r_ig - mean_g r_ig) / (std_g r_ig + eps),

pi_0 the model as it came. A group whose answers are worth the same teaches nothing. Of a text the
answer is the positions that count: they are drawn one after the other, each seen by the next, and
what stands between them is kept. A label is an answer of one token. Nobody shows the attacker a
right answer; he is told how many tokens of his own were.

Each batch of answers serves one step, so that the ratio of new to old probabilities, which Shao et
al. clip, is 1 and its gradient that of log pi. Their estimate of KL(pi || pi_0) from the sampled
tokens is replaced by the exact KL(pi_0 || pi) at each position, which has no noise of its own.

Drawing repeats the forward pass of a row for every position of an answer; it is priced as what it
costs with a cache of keys and values, one pass an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm import objectives
from jaximm.attacks.grid import Hyper, Values, check_whole
from jaximm.attacks.weights.descent import (
    AdamW,
    Objective,
    State,
    adam_of,
    by_path,
    descent,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack, outputs_of
from jaximm.objectives import TokenRows
from jaximm.types import Batch

SOURCE = (
    "Shao et al. (2024), DeepSeekMath: Pushing the limits of mathematical reasoning in open "
    "language models, https://arxiv.org/abs/2402.03300, equations 3 and 4"
)

EPS = 1e-4
"""Beside the standard deviation of a group's rewards."""

LEAST = 4
"""Answers a group at least: the mean of fewer says little of a row."""


class Answers(NamedTuple):
    """Sampled answers as rows of their own, a group after the other."""

    batch: Batch  # inputs with the answers in them, and the answers as targets
    reward: Float[Array, "n samples"]


def sampled_labels(
    outputs_fn: Callable[[Any], jax.Array], batch: Batch, rng_key: jax.Array, samples: int
) -> Answers:
    """Labels drawn from the softmax of the outputs; a right one is worth 1."""
    drawn = jax.random.categorical(rng_key, outputs_fn(batch.x), shape=(samples, len(batch.x))).T
    drawn = drawn.astype(batch.y.dtype)
    reward = (drawn == batch.y[:, None]).astype(jnp.zeros(()).dtype)
    return Answers(Batch(jnp.repeat(batch.x, samples, axis=0), drawn.reshape(-1)), reward)


def sampled_texts(
    outputs_fn: Callable[[Any], Any], batch: Batch, rng_key: jax.Array, samples: int
) -> Answers:
    """Continuations: tokens drawn at each position that counts, from left to right."""
    tokens, mask = (jnp.repeat(part, samples, axis=0) for part in batch.y)
    counts = jnp.any(mask, axis=0)
    last = tokens.shape[1] - 1

    def draw(position, carry):
        x, answers = carry
        states, table = outputs_fn(x)
        here = jax.lax.dynamic_index_in_dim(states, position, axis=1, keepdims=False)
        logits = jnp.matmul(here, table.T.astype(here.dtype))
        key = jax.random.fold_in(rng_key, position)
        drawn = jax.random.categorical(key, logits).astype(answers.dtype)
        answers = _put(answers, drawn, position, mask[:, position])
        seen = jnp.minimum(position + 1, last)
        return _put(x, drawn, seen, mask[:, position] & (position < last)), answers

    def turn(position, carry):  # most positions of a batch belong to no answer
        return jax.lax.cond(counts[position], draw, lambda _, same: same, position, carry)

    x = jnp.repeat(batch.x, samples, axis=0)
    x, answers = jax.lax.fori_loop(0, tokens.shape[1], turn, (x, tokens))
    counted = jnp.sum(mask, axis=1)
    right = jnp.sum((answers == tokens) & mask, axis=1) / jnp.maximum(counted, 1)
    reward = right.astype(jnp.zeros(()).dtype).reshape(-1, samples)
    return Answers(Batch(x, TokenRows(answers, mask)), reward)


def _put(
    rows: Int[Array, "m t"], values: Int[Array, "m"], position: jax.Array, where: jax.Array
) -> Int[Array, "m t"]:
    """Rows with one column replaced in some of them."""
    column = jnp.where(where, values.astype(rows.dtype), rows[:, position])
    return rows.at[:, position].set(column)


def advantages(reward: Float[Array, "n samples"]) -> Float[Array, "n samples"]:
    """Rewards less their group's mean, over its standard deviation.

    >>> advantages(jnp.array([[1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])).round(2).tolist()
    [[1.0, 1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    mean = jnp.mean(reward, axis=1, keepdims=True)
    return (reward - mean) / (jnp.std(reward, axis=1, keepdims=True) + EPS)


@functools.lru_cache(maxsize=16)
def surrogate(samples: int) -> Objective:
    """The function whose gradient is descended, for a number of answers a group."""

    def objective(
        weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper
    ) -> jax.Array:
        def outputs_fn(x: Any) -> Any:
            return outputs_of(access.features_fn, weights, x)

        is_text = isinstance(batches.harmful.y, TokenRows)
        sampled = sampled_texts if is_text else sampled_labels
        drawn = jax.lax.stop_gradient(
            sampled(outputs_fn, batches.harmful, batches.rng_key, samples)
        )
        kind = objectives.of_targets(drawn.batch.y)
        outputs = outputs_fn(drawn.batch.x)
        start = outputs_of(access.features_fn, access.weights, drawn.batch.x)
        losses = kind.losses(outputs, drawn.batch.y)
        advantage = advantages(drawn.reward).reshape(-1).astype(losses.dtype)
        drift = kind.divergences(outputs, jax.lax.stop_gradient(start), drawn.batch.y)
        return jnp.mean(advantage * losses + hyper["anchor"] * drift)

    return objective


@functools.lru_cache(maxsize=16)
def _grpo(samples: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` for a number of answers a group."""
    return descent(adam_of, scaled_head, surrogate(samples), by_path(lambda _: True))


def grpo(*, anchors: Values = (0.04,), samples: int = 8, **adamw: Unpack[AdamW]) -> WeightAttack:
    """Group-relative policy optimisation with AdamW.

    Args:
      anchors: >= 0, weights of the divergence from the model as it came.
      samples: answers a row and step, >= 4; compiled in.
      **adamw: see `AdamW`.
    """
    check_whole("samples", samples, least=LEAST)
    return tuning(
        _grpo(samples),
        adamw,
        rates=(1e-5, 1e-4, 1e-3, 1e-2),
        tried={"anchor": (anchors, "[0, inf)")},
        bounds=(("anchor", 0.0),),
        title="GRPO",
        kind="reinforcement",
        source=SOURCE,
        needs=("answers",),
        traits=frozenset({"rewarded"}),
        follows_loss=False,
        # Of each answer: drawn, descended (three), and seen by the model as it came.
        step_passes=5.0 * samples - 3.0,
    )
