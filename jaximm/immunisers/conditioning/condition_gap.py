"""The paper's method: raise the harmful task's condition number, lower the primary task's.

Zheng et al. (2025), https://arxiv.org/abs/2505.23760, Algorithm 1: gradient descent on
``L_task + lambda_P R_well(H_P) + lambda_H R_ill(H_H)``, each regulariser's gradient multiplied by
its own task's inverse input covariance.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int

from jaximm import linalg, regularisers
from jaximm.immunisers.about import GRADIENT_STEPS, WHITENING, About
from jaximm.immunisers.conditioning.whole_data import (
    Spectrum,
    capped,
    multiplied,
    replaced,
    spectrum,
    task_step,
)
from jaximm.immunisers.gradient import Penalty, from_penalty, normalised
from jaximm.immunisers.problem import (
    THETA,
    Factors,
    LinearTask,
    ProbeParams,
    Problem,
    check_run,
    global_batch,
)
from jaximm.types import Immuniser

KRYLOV_SIDE = 256
"""From this width on, the extreme pairs come from Krylov iterations: 2 to 3 times faster."""

KRYLOV_STEPS = 48
KRYLOV_RTOL = 1e-4
"""Loose on purpose: a residual of 1e-4 leaves the extreme value right to 1e-8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionGapConfig:
    """Two condition-number regularisers under per-task inverse covariances (the paper's method).

    Attributes:
      primary_weight: of R_well(H_P); 0 leaves the term out. In the exact step it is the learning
        rate times lambda_P, by default 0.2; by gradients lambda_P, of features scaled to a mean
        eigenvalue of 1, beside a cross-entropy in nats, by default 1e-3.
      harmful_weight: of R_ill(H_H), likewise; by default 20, and by gradients 10.
      task_rate: step on the primary loss, relative to its curvature, in [0, 1].
      rows: whose Hessian the regularisers see: "full", the damped Hessian of all training rows
        (then the preconditioned step is exact); "batch", the rows of the mini-batch, as in the
        released code, worked on the n x n side.
      cap: largest relative change of any singular direction of theta by one term in one step; with
        rows="batch" of theta as a whole, in the Frobenius norm.
      steps: updates.
      batch_size: rows of each task a batch; None: all of them.
    """

    about: ClassVar = About(
        title="condition gap",
        source=(
            "Zheng et al. (2025), Model immunization from a condition number perspective, "
            "Algorithm 1, https://arxiv.org/abs/2505.23760"
        ),
        against=GRADIENT_STEPS,
        broken_by=WHITENING,
    )

    primary_weight: float | None = None
    harmful_weight: float | None = None
    task_rate: float = 0.5
    rows: Literal["full", "batch"] = "full"
    cap: float = 0.3
    steps: int = 1000
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("primary_weight", "harmful_weight"):
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < math.inf:
                raise ValueError(f"weights must be finite and >= 0, got {name}={weight}.")
        if self.rows not in ("full", "batch"):
            raise ValueError(f'rows must be "full" or "batch", got {self.rows!r}.')
        if not 0 < self.cap < 1:
            raise ValueError(f"cap must be in (0, 1), got {self.cap}.")
        check_run(self.steps, self.batch_size, self.task_rate)

    def with_weights(self, *, primary: float, harmful: float) -> ConditionGapConfig:
        """The same, with these weights where none are given."""
        return dataclasses.replace(
            self,
            primary_weight=primary if self.primary_weight is None else self.primary_weight,
            harmful_weight=harmful if self.harmful_weight is None else self.harmful_weight,
        )


class State(NamedTuple):
    """Parameters, the whole-data factors that the step needs, and the number of updates done."""

    params: ProbeParams
    factors: Factors
    step: Int[Array, ""]


class Info(NamedTuple):
    """Before the update: the primary loss, and the two regularisers of the rows they saw.

    A regulariser with weight 0 is not computed and reads 0.
    """

    task_loss: Float[Array, ""]
    well: Float[Array, ""]
    ill: Float[Array, ""]


def condition_gap(config: ConditionGapConfig, problem: Problem) -> Immuniser:
    """Algorithm 1: exact as below where a linear map of fixed rows trains, else by `gap_penalty`.

    One step, with rates capped term by term:
    ``theta <- theta - 2 eta lambda_P K_P^{-1} dR_well - 2 eta lambda_H K_H^{-1} dR_ill - eta dL``.

    Deviations from the paper and its released code, each on purpose: the inverse covariances are
    those of all training rows (the code inverts that of the mini-batch) and multiply theta
    [d_in, d] from the left (the code's side leaves the monotone statement without its premise);
    a cap bounds the relative step of each term, because R_ill's gradient grows without bound in
    growing H. The task loss takes no inverse.

    Raises:
      ValueError: numbers as targets and no whole-data factors.
    """
    factors = problem.factors
    if factors is None:
        return from_penalty("condition_gap", problem, gap_penalty(config))
    config = config.with_weights(primary=0.2, harmful=20.0)

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        return State(params, factors, jnp.zeros((), jnp.int32))

    return Immuniser(init, _update(config, problem.primary), finish=lambda state: state.params)


@functools.lru_cache(maxsize=64)
def _update(config: ConditionGapConfig, task: LinearTask):
    """One function object a config, so that runs of one shape share a compilation."""
    regularise = _full_rows if config.rows == "full" else _batch_rows

    def update(state: State, batch, rng_key):
        batch = global_batch(batch)
        theta = state.params.backbone[THETA]
        change, well, ill = regularise(config, theta, state.factors, batch, rng_key)
        stepped, task_loss = task_step(state.params, batch.primary, config.task_rate, task)
        params = replaced(stepped, stepped.backbone[THETA] - change)
        return State(params, state.factors, state.step + 1), Info(task_loss, well, ill)

    return update


def gap_penalty(config: ConditionGapConfig) -> Penalty | None:
    """lambda_P R_well(H_P) + lambda_H R_ill(H_H) of a batch's features, on the smaller side.

    The paper's inverse covariances are those of a linear backbone's inputs and have no counterpart
    here; the optimiser's own scaling takes their place. With both weights 0 only the primary task
    is trained: the control for what immunising adds to fine-tuning.
    """
    config = config.with_weights(primary=1e-3, harmful=10.0)
    if not config.primary_weight and not config.harmful_weight:
        return None

    def penalty(features, memory):
        value = jnp.zeros((), features.primary.x.dtype)
        if config.primary_weight:
            value += config.primary_weight * _WELL(normalised(features.primary.x))
        if config.harmful_weight:
            value += config.harmful_weight * _ILL(normalised(features.harmful.x))
        return value, memory

    return penalty


class Terms(NamedTuple):
    """What both regularisers take off theta, and their values."""

    change: Float[Array, "d_in d"]
    well: Float[Array, ""]
    ill: Float[Array, ""]


def _full_rows(config, theta, factors, batch, rng_key) -> Terms:
    """Both terms of the damped whole-data Hessians; K^{-1} dR/dtheta is 2 theta dR/dH exactly."""
    del batch
    terms = _krylov_terms if theta.shape[0] >= KRYLOV_SIDE else _dense_terms
    zero = jnp.zeros((), theta.dtype)
    change, well, ill = jnp.zeros_like(theta), zero, zero
    if config.primary_weight:
        step, well = terms("well", theta, factors.primary, config.primary_weight, config, rng_key)
        change += step
    if config.harmful_weight:
        step, ill = terms("ill", theta, factors.harmful, config.harmful_weight, config, rng_key)
        change += step
    return Terms(change, well, ill)


def _dense_terms(which, theta, factor, weight, config, rng_key):
    """From H's eigen-decomposition: the cheaper way for small d."""
    del rng_key
    hessian = spectrum(factor, theta)
    slope, value = (well_slope if which == "well" else ill_slope)(hessian)
    return multiplied(theta, hessian, capped(2 * weight * slope, config.cap)), value


def _krylov_terms(which, theta, factor, weight, config, rng_key):
    """From H's extreme pairs and its Frobenius norm: no decomposition."""
    features = factor @ theta
    hessian = jnp.matmul(features.T, features, precision="highest")
    k = hessian.shape[0]
    if which == "well":
        vector, _ = linalg.dominant_vector(
            lambda v: hessian @ v, k, rng_key, KRYLOV_STEPS, KRYLOV_RTOL, hessian.dtype
        )
        extreme = largest = vector @ hessian @ vector
    else:
        pairs = linalg.inverse_krylov_extremes(
            hessian, rng_key, steps=KRYLOV_STEPS, residual_rtol=KRYLOV_RTOL
        )
        vector, extreme, largest = pairs.smallest_right, pairs.smallest, pairs.largest
    mean_square = jnp.sum(hessian**2) / k
    if which == "well":
        value = (extreme**2 - mean_square) / 2
        scale = 2 * weight
    else:
        value = 2 / (mean_square - extreme**2)
        scale = 2 * weight * value**2
    # The largest relative rates of dR/dH = extreme v v^T - H / k, at v and at the other end.
    rate = scale * jnp.maximum(extreme * (1 - 1 / k), largest / k)
    scale *= jnp.minimum(1, config.cap / rate)
    change = scale * (extreme * jnp.outer(theta @ vector, vector) - theta @ hessian / k)
    return change, value


def well_slope(hessian: Spectrum) -> tuple[Float[Array, "d"], Float[Array, ""]]:
    """Eigenvalues of dR_well/dH in H's own basis, and R_well(H)."""
    s, k = hessian.values, hessian.values.shape[0]
    return (-s / k).at[-1].add(s[-1]), jnp.mean(s[-1] ** 2 - s**2) / 2


def ill_slope(hessian: Spectrum) -> tuple[Float[Array, "d"], Float[Array, ""]]:
    """Eigenvalues of dR_ill/dH in H's own basis, and R_ill(H)."""
    s, k = hessian.values, hessian.values.shape[0]
    gap = jnp.mean(s**2 - s[0] ** 2) / 2
    gap = jnp.maximum(gap, jnp.finfo(s.dtype).eps * s[-1] ** 2)  # kappa = 1: a pole
    return (-s / k).at[0].add(s[0]) / gap**2, 1 / gap


def _batch_rows(config, theta, factors, batch, rng_key) -> Terms:
    """Both terms from the mini-batch, on the n x n side, with whole-data inverse covariances."""
    del rng_key
    zero = jnp.zeros((), theta.dtype)
    change, well, ill = jnp.zeros_like(theta), zero, zero
    limit = config.cap * jnp.linalg.norm(theta)
    if config.primary_weight:
        step, well = _batch_term(_WELL, theta, factors.primary, batch.primary.x)
        change += _shortened(config.primary_weight * step, limit)
    if config.harmful_weight:
        step, ill = _batch_term(_ILL, theta, factors.harmful, batch.harmful.x)
        change += _shortened(config.harmful_weight * step, limit)
    return Terms(change, well, ill)


_WELL = regularisers.well_conditioning_of_features
_ILL = regularisers.ill_conditioning_of_features


def _batch_term(regulariser, theta, factor, inputs):
    """K^{-1} dR/dtheta and R, with K^{-1} = (R^T R)^{-1} of all rows and dR/dtheta of a batch.

    dR/dtheta = X^T dR/d(X theta) has rank n: solving for the n columns of X^T in place of the d
    columns of the gradient is what makes a step at d = 784 cheap.
    """
    value, slope = jax.value_and_grad(regulariser)(inputs @ theta)
    return cho_solve((factor, False), inputs.T) @ slope, value


def _shortened(step, limit):
    """The step, scaled down to a Frobenius norm of at most `limit`."""
    size = jnp.maximum(jnp.linalg.norm(step), jnp.finfo(step.dtype).tiny)
    return step * jnp.minimum(1, limit / size)
