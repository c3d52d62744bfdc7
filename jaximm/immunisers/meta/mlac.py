r"""MLAC: meta-learned adversarial censoring, through the steps of an attacker who learns too.

From (theta, w, a), the attacker's head w and rate a, K steps of descent on harmful rows give
theta^(k) and w^(k); l^(k) is the loss on held-out harmful rows. Each update descends

    theta: CE(x_d) - harmful_weight (1/K) sum_{k=1..K} l^(k),      (w, log a): sum_k l^(k),

the first through the inner steps (order 2) or as if they were none (order 1, where a stays). Before
l^(k) is taken, logits are calibrated: z -> z W with W in [-1, 1]^{C x C} of the largest likelihood,
so that a model which answers all classes the wrong way round has gained nothing. "flip" is its
stand-in for two classes, min(CE(z), CE(-z)). The released code learns a by itself, not its log.

Henderson, Mitchell, Manning, Jurafsky, Finn (2023), Self-destructing models: Increasing the costs
of harmful dual uses of foundation models, https://arxiv.org/abs/2211.14946.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted
from jaximm.immunisers.meta import adversary
from jaximm.immunisers.meta.inner import inner_steps
from jaximm.immunisers.problem import Problem, check_run
from jaximm.objectives import Classes
from jaximm.training.optimiser import optimiser_state, optimiser_step
from jaximm.types import AnyBatch, Immuniser, Params

CALIBRATION_STEPS = 30
"""Accelerated projected gradient steps of a convex problem of C^2 numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlacConfig:
    """Meta-learns weights from which an attacker's steps on the harmful task lead nowhere.

    Attributes:
      harmful_weight: of the mean harmful loss on the way of the attack.
      inner_steps: K.
      order: 2: through the attacker's steps; 1: as if they were the identity.
      calibration: "fit", "flip" (two classes) or "none".
      ceiling: of the mean harmful loss at a step, in units of that of guessing.
      inner_rate: the attacker's learning rate at the start.
      adversary_rate: of Adam, that moves the attacker's head and, at order 2, log rate.
      inner_rows: rows of an inner step, drawn with replacement; None: all rows of the attack.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="MLAC",
        source="Henderson et al. (2023), Self-destructing models, https://arxiv.org/abs/2211.14946",
        against="few-shot fine-tuning from a fresh head, as long as the attack it was made with",
        broken_by="a hundred examples or more, or an optimiser that it did not simulate",
        traits=frozenset({"needs_harmful_head"}),
    )

    harmful_weight: float = 1.0
    inner_steps: int = 16
    order: int = 2
    calibration: Literal["fit", "flip", "none"] = "fit"
    ceiling: float = 1.5
    inner_rate: float = 3e-4
    adversary_rate: float = 1e-4
    inner_rows: int | None = None
    steps: int = 1000
    batch_size: int | None = None

    def __post_init__(self):
        if self.calibration not in ("fit", "flip", "none"):
            raise ValueError(
                f'calibration must be "fit", "flip" or "none", got {self.calibration!r}.'
            )
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order}.")
        adversary.check_least(self, harmful_weight=0, inner_steps=1, ceiling=0, adversary_rate=0)
        if not 0 < self.inner_rate < math.inf:
            raise ValueError(f"inner_rate must be finite and > 0, got {self.inner_rate}.")
        adversary.check_rows(self.inner_rows)
        check_run(self.steps, self.batch_size)


class Adversary(NamedTuple):
    """What the attacker learns over the updates."""

    head: Params
    log_rate: Float[Array, ""]


class Memory(NamedTuple):
    """The attacker, and its optimiser's state."""

    adversary: Adversary
    opt_state: Any


class Game(NamedTuple):
    """What both sides move."""

    params: Params
    adversary: Adversary


def mlac(config: MlacConfig, problem: Problem) -> Immuniser:
    """Descends the primary loss less the harmful one, while the attacker descends the latter.

    Raises:
      ValueError: what `from_objective` refuses; a problem without `harmful_classes`; calibration
        where predictions are no classes of a head, "flip" of other than two.
    """
    if config.calibration != "none" and problem.losses_fn is not None:
        raise ValueError(
            f"calibration={config.calibration!r} is a matrix of the classes of a harmful head, "
            'and this problem has no such head; take calibration="none".'
        )
    if config.calibration == "flip" and problem.harmful_classes != 2:
        raise ValueError(
            f'calibration="flip" is of two classes, got {problem.harmful_classes}; take "fit".'
        )
    optimiser = optax.adam(config.adversary_rate)

    def objective(params, batches, memory, rng_key):
        rows = adversary.rows_of(batches)

        def gained(game: Game):
            return _harmful_loss(config, problem, game, rows, rng_key)

        # Both sides' slopes in one pass: the defender's goes on as a linear function of params.
        game = Game(params, memory.adversary)
        loss, slope = jax.value_and_grad(gained)(jax.lax.stop_gradient(game))
        moves = jax.tree.map(lambda leaf: leaf - jax.lax.stop_gradient(leaf), params)
        linear = jax.tree.map(lambda one, move: jnp.sum(one * move), slope.params, moves)
        harm = loss + sum(leaf.astype(loss.dtype) for leaf in jax.tree.leaves(linear))
        moved = optimiser_step(optimiser, slope.adversary, memory.opt_state, memory.adversary)

        primary, weights = batches["primary"], problem.weights(batches["primary"])
        kept = problem.training_losses(params, primary)
        terms = {
            "harm": -config.harmful_weight * harm,
            "retain": Weighted(kept, weights),
        }
        info = {"harmful_loss": loss, "rate": jnp.exp(memory.adversary.log_rate)}
        return terms, info, Memory(*moved)

    def first_memory(params):
        start = adversary.taken_over(problem, params, jax.random.key(0), fresh_head=True).start
        dtype = jnp.result_type(*jax.tree.leaves(start))
        learner = Adversary(start.head, jnp.log(jnp.asarray(config.inner_rate, dtype)))
        return Memory(learner, optimiser_state(optimiser, learner))

    return adversary.meta_method("mlac", problem, objective, init_memory=first_memory)


def _harmful_loss(
    config: MlacConfig, problem: Problem, game: Game, rows: adversary.Rows, rng_key: jax.Array
) -> Float[Array, ""]:
    """(1/K) sum_{k=1..K} l^(k)."""
    target = adversary.taken_over(problem, game.params, rng_key)
    start = target.start._replace(head=game.adversary.head)
    numbers = jnp.arange(config.inner_steps, dtype=jnp.int32)

    def loss(held):
        return _calibrated(config, target, held, rows.held_out)

    def observed(held, k):  # theta^(0) is no step of the attack
        value = loss(held)
        return (k > 0).astype(value.dtype) * value

    inner = inner_steps(
        adversary.attack_loss(target, rows, rng_key, config.inner_rows),
        start,
        adversary.Step(numbers, numbers < 0),
        adversary.optimiser_of("sgd", jnp.exp(game.adversary.log_rate)),
        order=config.order,
        observe=observed,
    )
    return (inner.observed + loss(inner.params)) / config.inner_steps


def _calibrated(
    config: MlacConfig, target: adversary.Target, held: adversary.Held, batch: AnyBatch
) -> Float[Array, ""]:
    """l: the harmful loss of calibrated logits, at most `ceiling` times that of guessing."""
    if config.calibration == "none":
        loss = target.loss(target.harmful(held), batch)
    else:
        logits = target.logits(held, batch)
        if config.calibration == "fit":
            logits = logits @ calibrate(logits, batch.y)
        loss = jnp.mean(Classes().losses(logits, batch.y))
        if config.calibration == "flip":
            loss = jnp.minimum(loss, jnp.mean(Classes().losses(-logits, batch.y)))
    return jnp.minimum(loss, config.ceiling * target.guessing(batch))


def calibrate(
    logits: Float[Array, "rows k"],
    y: Int[Array, "rows"],
    low: float = -1.0,
    high: float = 1.0,
) -> Float[Array, "k k"]:
    """W in [low, high]^{k x k} of the largest likelihood of labels under logits @ W.

    Convex in W; accelerated projected gradient from the identity, at the inverse of a bound on the
    curvature.
    No gradient goes through W: where it is the optimum, it has none.
    """
    logits = jax.lax.stop_gradient(logits)
    k = logits.shape[1]
    bound = jnp.mean(jnp.sum(logits**2, axis=1)) / 2
    rate = 1 / jnp.maximum(bound, jnp.finfo(logits.dtype).tiny)
    hot = jax.nn.one_hot(y, k, dtype=logits.dtype)

    def step(t, carry):
        w, ahead = carry
        slope = logits.T @ (jax.nn.softmax(logits @ ahead) - hot) / logits.shape[0]
        new = jnp.clip(ahead - rate * slope, low, high)
        t = t.astype(w.dtype)
        return new, new + t / (t + 3) * (new - w)

    w = jnp.clip(jnp.eye(k, dtype=logits.dtype), low, high)
    return jax.lax.fori_loop(0, CALIBRATION_STEPS, step, (w, w))[0]
