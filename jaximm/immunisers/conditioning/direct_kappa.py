"""The strong iterative peer: Adam on log kappa(H_P) - log kappa(H_H) itself.

Zheng et al. (2025), https://arxiv.org/abs/2505.23760, the direct baseline of its tables. It has
no penalty to tune; its gradient is that of the two extreme pairs of each task, in closed form.

Adam's step has one size in every entry, which in theta itself swamps the small singular directions
(0.6 of the limit on house prices). It works on A = R_P theta instead, R_P^T R_P = K_P + lam I: the
primary task's whitened coordinates, in which H_P = A^T A.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from jaximm import linalg
from jaximm.immunisers.about import GRADIENT_STEPS, WHITENING, About
from jaximm.immunisers.conditioning.whole_data import replaced, task_step
from jaximm.immunisers.gradient import Penalty, from_penalty
from jaximm.immunisers.problem import (
    THETA,
    LinearTask,
    ProbeParams,
    Problem,
    check_run,
    global_batch,
)
from jaximm.linalg.arrays import as_matrix
from jaximm.training.optimiser import optimiser_step
from jaximm.types import Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectKappaConfig:
    """Adam on log kappa_P - log kappa_H: the strong iterative peer.

    Attributes:
      learning_rate: of Adam on A in the first step; cosine decay to a hundredth of it.
      primary_weight: weight of log kappa_P; 1 is log RIR itself.
      weight: by gradients, of the whole objective beside the cross-entropy in nats.
      task_rate: step on the primary loss, relative to its curvature, in [0, 1].
      steps: updates; the schedule is over these.
      batch_size: rows of a batch of the task loss; None: all.
    """

    about: ClassVar = About(
        title="direct log kappa",
        source=(
            "Zheng et al. (2025), direct baseline, https://arxiv.org/abs/2505.23760; "
            "optimiser: Kingma and Ba (2015)"
        ),
        against=GRADIENT_STEPS,
        broken_by=WHITENING,
    )

    learning_rate: float = 3e-2
    primary_weight: float = 1.0
    weight: float = 0.1
    task_rate: float = 0.1
    steps: int = 1500
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}.")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {self.weight}.")
        if not 0 <= self.primary_weight < math.inf:
            raise ValueError(f"primary_weight must be finite and >= 0, got {self.primary_weight}.")
        check_run(self.steps, self.batch_size, self.task_rate)


class State(NamedTuple):
    """Parameters, Adam's state for A, R_P, C = R_H R_P^{-1}, and the number of updates done."""

    params: ProbeParams
    opt_state: optax.OptState
    factor_primary: Float[Array, "d_in d_in"]
    relative: Float[Array, "d_in d_in"]
    step: Int[Array, ""]


class Info(NamedTuple):
    """Before the update: the primary loss, and primary_weight log kappa(H_P) - log kappa(H_H)."""

    task_loss: Float[Array, ""]
    objective: Float[Array, ""]


def log_condition(features: Float[Array, "n d"]) -> Float[Array, ""]:
    r"""log kappa(X^T X), differentiable: d log kappa = 2 (u_1^T dX v_1 / s_1 - u_k^T dX v_k / s_k).

    The singular vectors are held constant, so differentiating u^T X v gives the closed form and
    nothing is differentiated through the decomposition. Where an extreme value is repeated, the
    gradient is that of one of the tied pairs. Values at or below the rank tolerance are left out.

    Args:
      features: X [n, d], any float dtype; float16 and bfloat16 are computed in float32.

    Returns:
      Scalar in nats, in the dtype of X (float32 for the half precisions).

    >>> round(float(log_condition(jnp.diag(jnp.array([10.0, 1.0]))) / jnp.log(10.0)), 4)
    2.0
    """
    features = as_matrix(features, name="features")
    pairs = jax.lax.stop_gradient(linalg.gram_extremes(jax.lax.stop_gradient(features)))
    largest = pairs.largest_left @ features @ pairs.largest_right
    smallest = pairs.smallest_left @ features @ pairs.smallest_right
    return -2 * jnp.log(smallest / largest)


def direct_kappa(config: DirectKappaConfig, problem: Problem) -> Immuniser:
    """Descends ``primary_weight * log kappa(H_P) - log kappa(H_H)``, H_P = A^T A, H_H = |C A|^2.

    Raises:
      ValueError: numbers as targets and no whole-data factors.
    """
    factors = problem.factors
    if factors is None:
        return from_penalty("direct_kappa", problem, kappa_penalty(config))
    optimiser = _optimiser(config)

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        relative = solve_triangular(factors.primary, factors.harmful.T, trans=1).T
        opt_state = optimiser.init(params.backbone[THETA])
        return State(params, opt_state, factors.primary, relative, jnp.zeros((), jnp.int32))

    return Immuniser(init, _update(config, problem.primary), finish=lambda state: state.params)


def kappa_penalty(config: DirectKappaConfig) -> Penalty:
    """The same objective of a batch's features; kappas are those of its row space."""

    def penalty(features, memory):
        primary = log_condition(features.primary.x)
        harmful = log_condition(features.harmful.x)
        return config.weight * (config.primary_weight * primary - harmful), memory

    return penalty


def _optimiser(config: DirectKappaConfig) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha=0.01))


@functools.lru_cache(maxsize=64)
def _update(config: DirectKappaConfig, task: LinearTask):
    optimiser = _optimiser(config)

    def objective(whitened, relative):
        primary, harmful = log_condition(whitened), log_condition(relative @ whitened)
        return config.primary_weight * primary - harmful

    def update(state: State, batch, rng_key):
        del rng_key
        batch = global_batch(batch)
        stepped, task_loss = task_step(state.params, batch.primary, config.task_rate, task)
        whitened = state.factor_primary @ stepped.backbone[THETA]
        value, gradient = jax.value_and_grad(objective)(whitened, state.relative)
        moved, opt_state = optimiser_step(optimiser, gradient, state.opt_state, whitened)
        params = replaced(stepped, solve_triangular(state.factor_primary, moved))
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, Info(task_loss, value)

    return update
