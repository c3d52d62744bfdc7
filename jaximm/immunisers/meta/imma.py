"""IMMA for a linear probe: an adapter learns the harmful task, the backbone unlearns its progress.

Zheng, Yeh (2024), IMMA: immunizing text-to-image models against malicious adaptation,
https://arxiv.org/abs/2311.18815: alternate descent of the adapter on the harmful loss with ascent
of the released weights on the same loss. Here the adapter is the harmful task's linear head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaximm.immunisers.about import About
from jaximm.immunisers.conditioning.whole_data import replaced, task_step
from jaximm.immunisers.gradient import from_objective
from jaximm.immunisers.meta.inner import inner_steps
from jaximm.immunisers.problem import (
    NUMBERS,
    THETA,
    ProbeParams,
    Problem,
    check_run,
    global_batch,
)
from jaximm.types import Batch, Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImmaConfig:
    """Alternating bi-level baseline: adapt a harmful head, then move the backbone against it.

    Attributes:
      ascent_rate: relative size of an ascent step: |change of theta| / |theta|.
      weight: by gradients, of the ascent beside the primary cross-entropy (both in nats).
      adapter_steps: descent steps of the harmful head before each ascent step.
      adapter_rate: size of those, relative to the curvature, in (0, 1].
      task_rate: step on the primary loss, relative to its curvature, in [0, 1].
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="IMMA",
        source="Zheng and Yeh (2024), IMMA, https://arxiv.org/abs/2311.18815",
        against="an adapter that is trained by gradient steps, as the one it was made with",
        broken_by="longer training, other step sizes or a head that is solved for",
    )

    ascent_rate: float = 1e-3
    weight: float = 0.1
    adapter_steps: int = 5
    adapter_rate: float = 1.0
    task_rate: float = 0.5
    steps: int = 1000
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.ascent_rate < 1:
            raise ValueError(f"ascent_rate must be in (0, 1), got {self.ascent_rate}.")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {self.weight}.")
        if self.adapter_steps < 1:
            raise ValueError(f"adapter_steps must be >= 1, got {self.adapter_steps}.")
        if not 0 < self.adapter_rate <= 1:
            raise ValueError(f"adapter_rate must be in (0, 1], got {self.adapter_rate}.")
        check_run(self.steps, self.batch_size, self.task_rate)


class State(NamedTuple):
    """Parameters, the harmful head (the adapter), and the number of updates done."""

    params: ProbeParams
    harmful_head: Float[Array, "d"]
    step: Int[Array, ""]


class Info(NamedTuple):
    """The primary loss before the update, the harmful loss of the adapter before and after it."""

    task_loss: Float[Array, ""]
    harmful_loss_start: Float[Array, ""]
    harmful_loss_adapted: Float[Array, ""]


def imma(config: ImmaConfig, problem: Problem) -> Immuniser:
    """Descent of the harmful head, ascent of theta on the harmful loss, a step on the primary loss.

    For classes the adapter is a softmax classifier on the features, and the ascent stops at
    a harmful loss of twice log(classes), where more of it would only inflate logits.

    Raises:
      ValueError: numbers as targets and a backbone that is not linear.
    """
    problem.check_rows("imma")
    if problem.classes is not None:
        return _of_classes(config, problem)

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        return State(params, jnp.zeros_like(params.head), jnp.zeros((), jnp.int32))

    return Immuniser(init, _update(config), finish=lambda state: state.params)


class Batches(NamedTuple):
    """A batch of each task, and the harmful one again, which every part of a step sees whole."""

    primary: Batch
    harmful: Batch
    attack: Batch


def _of_classes(config: ImmaConfig, problem: Problem) -> Immuniser:
    task, width = problem.harmful, problem.width
    if width is None or task.classes is None:
        raise ValueError("imma fits a harmful head: give the problem's width and harmful_classes.")
    ceiling = 2 * math.log(task.classes)

    def features_of(params, inputs):
        # float64 where x64 is on, as every penalty
        return problem.features_fn(params.backbone, inputs).astype(jnp.zeros(()).dtype)

    def objective(params, batches, head, rng_key):
        del rng_key
        fixed = jax.lax.stop_gradient(features_of(params, batches.attack.x))

        def attack_loss(head, _):
            return task.loss(task.outputs(fixed, head), batches.attack.y)

        # The softmax loss has curvature at most |f|^2 / 2, and 1 / 2 in the bias.
        rate = 2 * config.adapter_rate / (jnp.mean(jnp.sum(fixed**2, axis=1)) + 1)
        head = _adapted(config, attack_loss, head, rate)
        outputs = task.outputs(features_of(params, batches.harmful.x), head)
        losses = task.objective.losses(outputs, batches.harmful.y)
        # The mean is cut off, not each row: a part of the rows cannot see it, the attack can.
        losses = jnp.where(attack_loss(head, None) >= ceiling, ceiling, losses)
        kept = problem.training_losses(params, batches.primary)
        terms = {"task_loss": kept, "penalty": -config.weight * losses.astype(kept.dtype)}
        return terms, {"accuracy": problem.scores(params, batches.primary)}, head

    def memory(params):
        del params
        return task.start(width, jnp.zeros(()).dtype)

    method = from_objective("imma", problem, objective, init_memory=memory, whole=("attack",))

    def update(state, batch, rng_key):
        return method.update(state, Batches(*batch, attack=batch.harmful), rng_key)

    return method._replace(update=update)


def _adapted(config: ImmaConfig, loss, head, rate):
    """The harmful head after some steps of descent."""
    optimiser, steps = optax.sgd(rate), config.adapter_steps
    return inner_steps(loss, head, None, optimiser, order=1, steps=steps).params


def _harmful_loss(backbone, head, batch: Batch):
    return NUMBERS.loss(batch.x @ backbone @ head, batch.y)


@functools.lru_cache(maxsize=64)
def _update(config: ImmaConfig):
    def update(state: State, batch, rng_key):
        del rng_key
        batch = global_batch(batch)
        theta, harmful = state.params.backbone[THETA], batch.harmful
        features = harmful.x @ theta
        curvature = jnp.maximum(jnp.mean(jnp.sum(features**2, 1)), jnp.finfo(theta.dtype).tiny)

        def attack_loss(head, _):
            return NUMBERS.loss(features @ head, harmful.y)

        rate = config.adapter_rate / curvature
        head = _adapted(config, attack_loss, state.harmful_head, rate)
        adapted, gradient = jax.value_and_grad(_harmful_loss)(theta, head, harmful)
        size = jnp.maximum(jnp.linalg.norm(gradient), jnp.finfo(theta.dtype).tiny)
        ascent = config.ascent_rate * jnp.linalg.norm(theta) / size * gradient
        stepped, task_loss = task_step(state.params, batch.primary, config.task_rate)
        params = replaced(stepped, stepped.backbone[THETA] + ascent)
        info = Info(task_loss, _harmful_loss(theta, state.harmful_head, harmful), adapted)
        return State(params, head, state.step + 1), info

    return update
