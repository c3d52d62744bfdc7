r"""MUDMAN: unlearn what a relearning adversary sees, where the retain gradient agrees.

Beside theta an adversary phi is kept, which is theta again every `fork_every` steps. A step is,
with gradients of a batch of each task,

    a     <- m a + (1 - m) grad L_retain(theta)                     momentum of the retain gradient
    theta <- theta - retain_rate a - unlearn_rate (g * [sign g = sign a]) / |g|
    phi   <- phi - adversary_rate grad L_harm(phi),                 g = -grad L_harm(phi)

g is the gradient of -L_harm, one of the released code's unlearning losses (its default, negative
entropy, asks for logits, which a `losses_fn` does not give). As released, g is that of the
adversary before its step, its norm is taken before the mask, and all steps are plain SGD: the
problem's optimiser plays no part. Deviations: the released code moves one kind of matrix
(gate_proj), here all that trains; it ends when the retain loss has risen by a budget, here steps
end it.

Sondej, Yang, Kniejski, Windys (2025), Robust LLM unlearning with MUDMAN,
https://arxiv.org/abs/2506.12484.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaximm.immunisers import gradient
from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class MudmanConfig:
    """Unlearns in steps of fixed length what an adversary relearns, where retention agrees.

    Attributes:
      unlearn_rate: length of an unlearning step before the mask, > 0.
      retain_rate: of the retain steps, >= 0.
      adversary_rate: of the fork's steps, >= 0.
      retain_momentum: m, in [0, 1).
      fork_every: steps after which the adversary is the model again, >= 1.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="MUDMAN",
        source="Sondej et al. (2025), Robust LLM unlearning with MUDMAN: meta-unlearning with "
        "disruption masking and normalization, https://arxiv.org/abs/2506.12484",
        against="relearning by fine-tuning on harmful rows",
        broken_by="a rescaled or fresh head, or relearning for longer",
        traits=frozenset({"needs_harmful_head"}),
    )

    unlearn_rate: float = 0.01
    retain_rate: float = 0.1
    adversary_rate: float = 0.1
    retain_momentum: float = 0.9
    fork_every: int = 32
    steps: int = 300
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.unlearn_rate < math.inf:
            raise ValueError(f"unlearn_rate must be finite and > 0, got {self.unlearn_rate}.")
        for name in ("retain_rate", "adversary_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}.")
        if not 0 <= self.retain_momentum < 1:
            raise ValueError(f"retain_momentum must be in [0, 1), got {self.retain_momentum}.")
        if not isinstance(self.fork_every, int) or self.fork_every < 1:
            raise ValueError(f"fork_every must be an integer >= 1, got {self.fork_every!r}.")
        check_run(self.steps, self.batch_size)


class State(NamedTuple):
    """theta, the adversary phi, the momentum a of the retain gradient, and the updates done."""

    params: Params
    adversary: Params
    retain: Params
    step: Int[Array, ""]


class Info(NamedTuple):
    """Primary loss of theta, harmful loss of phi, and the share of |g| that passes the mask."""

    task_loss: Float[Array, ""]
    adversary_loss: Float[Array, ""]
    passed: Float[Array, ""]


class Both(NamedTuple):
    """The model and its adversary: one pass gives the gradients of both, apart."""

    model: Params
    adversary: Params


def mudman(config: MudmanConfig, problem: Problem) -> Immuniser:
    """One step of each; see the module.

    Raises:
      ValueError: a problem without classes and width, and without a losses_fn of its own.
    """
    if problem.losses_fn is None and (problem.classes is None or problem.width is None):
        raise ValueError(
            "mudman descends losses of rows: give the problem's classes and width, or a losses_fn."
        )

    def objective(both, batches, memory, rng_key):
        del rng_key
        primary, harmful = batches.primary, batches.harmful
        kept = problem.training_losses(both.model, primary)
        harm = problem.losses(problem.with_harmful_head(both.adversary), harmful)
        terms = {
            "task_loss": Weighted(kept, problem.weights(primary)),
            "adversary_loss": Weighted(harm, problem.weights(harmful)),
        }
        return terms, {}, memory

    def init(params: Params, rng_key) -> State:
        del rng_key
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(params, params, zeros, jnp.zeros((), jnp.int32))

    def update(state: State, batch, rng_key):
        fork = state.step % config.fork_every == 0
        adversary = jax.tree.map(
            lambda theta, phi: jnp.where(fork, theta, phi), state.params, state.adversary
        )
        both: Params = Both(state.params, adversary)
        seen = gradient.State(both, (), (), state.step)
        means = gradient._mean_gradient(problem, objective, seen, batch, rng_key)
        retain, relearn = means.gradient
        retain = jax.tree.map(
            lambda a, g: config.retain_momentum * a + (1 - config.retain_momentum) * g,
            state.retain,
            retain,
        )
        # grad U is minus the gradient that the adversary descends.
        masked = jax.tree.map(
            lambda h, a: jnp.where(jnp.sign(-h) == jnp.sign(a), -h, 0), relearn, retain
        )
        norm = optax.tree.norm(relearn)
        size = config.unlearn_rate / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
        params = jax.tree.map(
            lambda theta, a, g: (theta - config.retain_rate * a - size * g).astype(theta.dtype),
            state.params,
            retain,
            masked,
        )
        adversary = jax.tree.map(lambda phi, h: phi - config.adversary_rate * h, adversary, relearn)
        passed = size / config.unlearn_rate * optax.tree.norm(masked)
        info = Info(means.loss["task_loss"], means.loss["adversary_loss"], passed)
        return State(params, adversary, retain, state.step + 1), info

    return Immuniser(init, update, finish=lambda state: state.params)
