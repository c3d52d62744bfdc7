r"""REINFORCE: the task is learnt from a reward for sampled answers, without its loss.

For labels, `samples` answers a row are drawn, a ~ pi = softmax(outputs), and a right one is worth
1, a wrong one 0. What is descended is

    -mean_i [ (r_i - b_i) log pi(a_i) ] - entropy * mean H(pi),

over the N = rows * samples answers of a batch. The baseline b_i is the mean reward of the other
N - 1: r_i - b_i = (r_i - mean r) N / (N - 1), so the gradient is unbiased; with the plain mean it
would be (1 - 1/N) of it. The expected gradient of the first term is that of -mean pi(y).

For real targets a ~ N(output, std^2) is worth -(a - y)^2 / 2, and rewards less their mean are
divided by their standard deviation over the batch, so that nothing depends on the unit of `y`. The
entropy is then a constant. AdamW descends.

The default bonus is large on purpose. The best policy is then softmax(reward / entropy), which
still prefers the right answer by a factor of e^(1 / 0.3) = 28 over any other. With a bonus of 0.1
or less the policy of a small network on three classes settled early on one class for all rows and
seldom came back; and its cross-entropy grew without bound on rows that it had wrong, so that the
run counts as diverged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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

SOURCE = (
    "Williams (1992), Simple statistical gradient-following algorithms for connectionist "
    "reinforcement learning, https://doi.org/10.1007/BF00992696"
)


class Answers(NamedTuple):
    """Sampled answers, differentiable by the outputs only through `log_probability`."""

    log_probability: Float[Array, "samples n"]  # up to a constant
    advantage: Float[Array, "samples n"]
    entropy: Float[Array, ""]  # mean over rows, in nats, up to a constant


def sampled_labels(
    outputs: Float[Array, "n k"], y: jax.Array, rng_key: jax.Array, samples: int
) -> Answers:
    """Labels drawn from the softmax of the outputs."""
    n = outputs.shape[0]
    labels = jax.random.categorical(rng_key, outputs, axis=-1, shape=(samples, n))
    log_pi = jax.nn.log_softmax(outputs, axis=-1)
    log_probability = jnp.take_along_axis(log_pi, labels.T, axis=-1).T
    reward = (labels.astype(y.dtype) == y[None, :]).astype(outputs.dtype)
    advantage = (reward - jnp.mean(reward)) * (reward.size / (reward.size - 1))
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1))
    return Answers(log_probability, advantage, entropy)


def sampled_numbers(
    outputs: Float[Array, "n 1"],
    y: Float[Array, "n"],
    rng_key: jax.Array,
    samples: int,
    std: Float[Array, ""],
) -> Answers:
    """Numbers drawn around the outputs."""
    centre = outputs[:, 0][None, :]
    noise = jax.random.normal(rng_key, (samples, outputs.shape[0]), outputs.dtype)
    answers = jax.lax.stop_gradient(centre + std * noise)
    reward = -((answers - y[None, :].astype(outputs.dtype)) ** 2) / 2
    spread = jnp.std(reward)
    advantage = (reward - jnp.mean(reward)) / jnp.where(spread > 0, spread, 1.0)
    return Answers(
        -((answers - centre) ** 2) / (2 * std**2), advantage, jnp.zeros((), outputs.dtype)
    )


@functools.lru_cache(maxsize=16)
def surrogate(samples: int) -> Objective:
    """The function whose gradient REINFORCE descends, for a number of answers a row."""

    def objective(
        weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper
    ) -> jax.Array:
        x, y = batches.harmful
        outputs = outputs_of(access.features_fn, weights, x)
        if jnp.issubdtype(y.dtype, jnp.integer):
            answers = sampled_labels(outputs, y, batches.rng_key, samples)
        else:
            answers = sampled_numbers(outputs, y, batches.rng_key, samples, hyper["std"])
        gain = jnp.mean(jax.lax.stop_gradient(answers.advantage) * answers.log_probability)
        return -gain - hyper["entropy"] * answers.entropy

    return objective


@functools.lru_cache(maxsize=16)
def _reinforce(samples: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` for a number of answers a row."""
    return descent(adam_of, scaled_head, surrogate(samples), by_path(lambda _: True))


def policy_gradient(
    *, entropies: Values = (0.3,), stds: Values = (0.3,), samples: int = 4, **adamw: Unpack[AdamW]
) -> WeightAttack:
    """REINFORCE with AdamW.

    Args:
      entropies: >= 0, weights of the entropy bonus; nothing for real targets.
      stds: > 0, of the Gaussian policy, in units of the target; nothing for labels.
      samples: answers a row and step, >= 2; compiled in.
      **adamw: see `AdamW`.
    """
    check_whole("samples", samples, least=2)
    return tuning(
        _reinforce(samples),
        adamw,
        tried={"entropy": (entropies, "[0, inf)"), "std": (stds, "(0, inf)")},
        bounds=(("entropy", 0.0),),
        title="policy gradient",
        kind="reinforcement",
        source=SOURCE,
        needs=("own_head",),
        traits=frozenset({"rewarded"}),
        follows_loss=False,
    )
