r"""TAR: tamper-resistant safeguards, by first-order meta-learning against a mix of attackers.

    min_theta  tamper_weight sum_k w_k L_TR(theta^(k)) + retain_weight CE(x_r) + distance_weight D,

theta^(0 .. K-1) on the way of an attacker who is drawn anew every update, with k = 0, every,
2 every, .. and w_k = exp(decay (k - (K - 1))); d theta^(k) / d theta is taken to be 1. L_TR is the
negative entropy of the attacked model on held-out harmful rows, its clamped negative cross-entropy,
or a preference loss (IPO) of primary rows, as safe answers, over harmful ones. D is the distance
|h - h_ref| of activations from those of theta_0, averaged over positions and sites, or its square.
The attacker trains on harmful rows, or on primary rows up to step floor(Beta(6, 3) K) first. In
``mapping_steps`` updates before (the paper's phase 1) harmful activations are instead mapped to
random directions of their tokens. K = 0 is plain unlearning: L_TR of theta itself, with weight 1.

The paper's bio setting is the default; the retain mix and the outer optimiser (schedule-free AdamW,
2e-5) are the caller's. The released code takes the norm, the authors of MUDMAN call the square
right; its fork draws the mix per batch of adversaries (weights 4 / number), here one is drawn a
step. On batches of two tasks without a batch ``retain``, the primary rows are what is retained.

Tamirisa et al. (2025), Tamper-resistant safeguards for open-weight LLMs,
https://arxiv.org/abs/2408.00761.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted
from jaximm.immunisers.meta import adversary
from jaximm.immunisers.meta.inner import inner_steps
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import AnyBatch, Immuniser, Params

SWITCH = (6, 3)
"""Of the Beta distribution of the step at which an attacker turns to harmful rows."""


def switch_step(rng_key: jax.Array, steps: int) -> Int[Array, ""]:
    """floor(b * steps), b of Beta(6, 3): the 6th smallest of 6 + 3 - 1 uniform numbers."""
    rank, others = SWITCH
    uniform = jnp.sort(jax.random.uniform(rng_key, (rank + others - 1,), jnp.float32))
    return jnp.floor(steps * uniform[rank - 1]).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarConfig:
    """Keeps a simulated fine-tuning attacker from the harmful task, to first order.

    Attributes:
      tamper_loss: "entropy", "cross_entropy" (clamped) or "preference".
      tamper_weight: of the sum over an attack; the paper's lambda_TR.
      inner_steps: K; 0: plain unlearning.
      every: only every so many steps of an attack count.
      decay: of the weights w_k towards the start of an attack.
      inner_optimiser: the attacker's, "adam", "adamw" (decay .01) or "sgd"; as the one to be met.
      inner_rates: learning rates, of which an attacker has one.
      inner_rows: rows of an inner step, drawn with replacement; None: all rows of the attack.
      retain_first: share of the attackers who train on the primary task first, in [0, 1].
      retain_weight: of the primary loss.
      distance_weight: of the distance of primary activations from theta_0's.
      distance: "norm" or "squared".
      ceiling: of the clamped cross-entropy, in units of that of guessing.
      beta: of the preference loss, > 0.
      fresh_head: whether an attacker of classes draws a head; else has the one fitted to theta_0.
      mapping_steps: of random mapping, before.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="TAR",
        source="Tamirisa et al. (2025), Tamper-resistant safeguards for open-weight LLMs, "
        "https://arxiv.org/abs/2408.00761",
        against="fine-tuning of all weights by the optimisers and rates that it simulates",
        broken_by="a longer warm-up with a cosine schedule, a hundred examples, or LoRA",
        traits=frozenset({"needs_harmful_head"}),
    )

    tamper_loss: Literal["entropy", "cross_entropy", "preference"] = "entropy"
    tamper_weight: float = 4.0
    inner_steps: int = 64
    every: int = 4
    decay: float = 0.0625
    inner_optimiser: adversary.InnerOptimiser = "adamw"
    inner_rates: tuple[float, ...] = (2e-6, 2e-5, 4e-5)
    inner_rows: int | None = None
    retain_first: float = 1 / 3
    retain_weight: float = 1.0
    distance_weight: float = 1.0
    distance: Literal["norm", "squared"] = "norm"
    ceiling: float = 1.5
    beta: float = 0.1
    fresh_head: bool = True
    mapping_steps: int = 0
    steps: int = 750
    batch_size: int | None = None

    def __post_init__(self):
        if self.tamper_loss not in ("entropy", "cross_entropy", "preference"):
            raise ValueError(
                'tamper_loss must be "entropy", "cross_entropy" or "preference", got '
                f"{self.tamper_loss!r}."
            )
        if self.distance not in ("norm", "squared"):
            raise ValueError(f'distance must be "norm" or "squared", got {self.distance!r}.')
        adversary.check_least(
            self, tamper_weight=0, decay=0, retain_weight=0, distance_weight=0, ceiling=0,
            inner_steps=0, every=1, mapping_steps=0,
        )  # fmt: skip
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be finite and > 0, got {self.beta}.")
        if not 0 <= self.retain_first <= 1:
            raise ValueError(f"retain_first must be in [0, 1], got {self.retain_first}.")
        adversary.check_attack(self)
        check_run(self.steps, self.batch_size)


class Memory(NamedTuple):
    """The model that a run starts from, and the updates done."""

    reference: Params
    step: Int[Array, ""]


def step_weight(config: TarConfig, k: Array, dtype) -> Float[Array, ""]:
    """w_k = exp(decay (k - (K - 1)))."""
    return jnp.exp(config.decay * (k - (config.inner_steps - 1)).astype(dtype))


def tar(config: TarConfig, problem: Problem) -> Immuniser:
    """Descends the sum of the module over batches of both tasks.

    Raises:
      ValueError: what `from_objective` refuses; a problem without `harmful_classes`; entropy on
        losses of the problem's own without an `entropies_fn`.
    """
    if config.tamper_loss == "entropy" and problem.losses_fn and problem.entropies_fn is None:
        raise ValueError(
            'tamper_loss="entropy" needs the problem\'s entropies_fn beside its losses_fn; give '
            'it, or take tamper_loss="cross_entropy".'
        )

    def objective(params, batches, memory, rng_key):
        primary, weights = batches["primary"], problem.weights(batches["primary"])
        kept = problem.training_losses(params, primary)
        far = adversary.distances(
            problem, params, memory.reference, primary, squared=config.distance == "squared"
        )

        def tampered(params):
            return _tampered(config, problem, params, batches, memory.reference, rng_key)

        if config.mapping_steps:
            mapped = jax.random.key(0)  # the table is one for the whole run

            def random(params):
                value = adversary.random_mapping(problem, params, batches["harmful"], mapped)
                return value, jnp.zeros(2, value.dtype)

            first = memory.step < config.mapping_steps
            tamper, attack = jax.lax.cond(first, random, tampered, params)
        else:
            tamper, attack = tampered(params)
        terms = {
            "tamper": config.tamper_weight * tamper,
            "retain": Weighted(config.retain_weight * kept, weights),
            "distance": far._replace(values=config.distance_weight * far.values),
        }
        info = {
            "task_loss": Weighted(kept, weights),
            "inner_loss_start": attack[0],
            "inner_loss_end": attack[1],
        }
        return terms, info, memory._replace(step=memory.step + 1)

    def first_memory(params):
        return Memory(problem.reference_of(params), jnp.zeros((), jnp.int32))

    return adversary.meta_method(
        "tar", problem, objective, init_memory=first_memory, retain=_retains(config)
    )


def _retains(config: TarConfig) -> bool:
    """Whether primary rows take part in an attack, or in what it is denied."""
    return config.retain_first > 0 or config.tamper_loss == "preference"


def _tampered(
    config: TarConfig,
    problem: Problem,
    params: Params,
    batches: dict[str, AnyBatch],
    reference: Params,
    rng_key: jax.Array,
) -> tuple[Float[Array, ""], Float[Array, "2"]]:
    """The weighted sum of L_TR over an attack, and the first and last loss of it."""
    head_key, rate_key, kind_key, switch_key, rows_key = jax.random.split(rng_key, 5)
    target = adversary.taken_over(problem, params, head_key, fresh_head=config.fresh_head)
    rows = adversary.rows_of(batches)

    def tamper(held: adversary.Held):
        if config.tamper_loss == "entropy":
            return adversary.negative_entropy(target, held, rows.held_out)
        if config.tamper_loss == "cross_entropy":
            return adversary.clamped_cross_entropy(target, held, rows.held_out, config.ceiling)
        return _preferred(config, target, held, rows.held_out, batches["retain"], reference)

    if not config.inner_steps:
        value = tamper(target.start)
        return value, jnp.zeros(2, value.dtype)
    numbers = jnp.arange(config.inner_steps, dtype=jnp.int32)
    retains = jax.random.bernoulli(kind_key, config.retain_first)
    switch = switch_step(switch_key, config.inner_steps)
    plan = adversary.Step(numbers, retains & (numbers < switch))
    loss = adversary.attack_loss(
        *(target, rows, rows_key, config.inner_rows),
        retain=batches["retain"] if config.retain_first else None,
    )
    rate = adversary.one_of(config.inner_rates, rate_key)

    def observed(held, k):
        value = tamper(held)
        return step_weight(config, k, value.dtype) * value

    inner = inner_steps(
        loss,
        target.start,
        plan,
        adversary.optimiser_of(config.inner_optimiser, rate, weight_decay=0.01),
        order=1,
        observe=observed,
        every=config.every,
    )
    return inner.observed, inner.losses[jnp.array([0, -1])]


def _preferred(
    config: TarConfig,
    target: adversary.Target,
    held: adversary.Held,
    harmful: AnyBatch,
    safe: AnyBatch,
    reference: Params,
) -> Float[Array, ""]:
    """IPO of the i-th safe answer over the i-th harmful one, as many as there are of both."""
    problem = target.problem
    before = dataclasses.replace(target, params=reference)
    start = target.start._replace(params=_trained(reference, target.start.params))

    def log_ratio(model, old, batch):
        length = problem.weights(batch)
        losses, past = problem.losses(model, batch), problem.losses(old, batch)
        return length.astype(losses.dtype) * (jax.lax.stop_gradient(past) - losses)

    preferred = log_ratio(target.primary(held), before.primary(start), safe)
    rejected = log_ratio(target.harmful(held), before.harmful(start), harmful)
    pairs = min(preferred.shape[0], rejected.shape[0])
    return adversary.preference(preferred[:pairs], rejected[:pairs], config.beta)


def _trained(params: Params, like: Params) -> Params:
    """Of whole parameters those that an attacker holds."""
    return params._replace(frozen=like.frozen) if hasattr(params, "frozen") else params
