"""The two regularisers at both ends of both spectra, under a budget on the primary kappa.

Ours, after Zheng et al. (2025). R_well and R_ill act on the largest eigenvalue of H_P and on the
smallest of H_H (and, through the Frobenius norm, on the largest): two of the four extremes that
make up RIR. The other two are the same statements for the inverse, since kappa(S) = kappa(S^{-1}):
R_well(H_P^{-1}) raises the smallest of H_P, R_ill(H_H^{-1}) pushes the largest of H_H up.

The sum of the terms carries no guarantee, so a step takes one side only (switching subgradient):
the harmful terms while ``log kappa(H_P) <= log kappa(K_P) + budget``, else the primary ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm.immunisers.about import GRADIENT_STEPS, WHITENING, About
from jaximm.immunisers.conditioning.condition_gap import ill_slope, well_slope
from jaximm.immunisers.conditioning.whole_data import (
    Spectrum,
    multiplied,
    replaced,
    spectrum,
    task_step,
)
from jaximm.immunisers.gradient import Penalty, from_penalty
from jaximm.immunisers.problem import (
    THETA,
    Factors,
    LinearTask,
    ProbeParams,
    Problem,
    check_run,
    global_batch,
)
from jaximm.linalg.arrays import exponent_of, times_power_of_two
from jaximm.types import Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancedGapConfig:
    """The paper's regularisers on H and on its inverse, held under a budget on the primary kappa.

    Attributes:
      budget: allowed log (ii) in nats: log kappa(H_P) - log kappa(K_P), damped. Steps overshoot
        it by up to one step's change; a negative budget leaves room for that. Below
        -log kappa(K_P) it cannot be met, and only the primary side ever moves.
      rate: relative change of theta's singular directions in the first step, in (0, 0.5); with
        `both_ends`, that of each of the two terms.
      final_rate: the same in the last step; geometric in between.
      weight: by gradients, of the penalty beside the cross-entropy; the rates are not read there.
      both_ends: also regularise the inverse Hessians; False is the paper's two terms alone.
      task_rate: step on the primary loss, relative to its curvature, in [0, 1].
      steps: updates; the rate's schedule is over these.
      batch_size: rows of a batch of the task loss; None: all.
    """

    about: ClassVar = About(
        title="balanced gap",
        source=(
            "jaximm, after Zheng et al. (2025), https://arxiv.org/abs/2505.23760; "
            "switching rule: Polyak (1967)"
        ),
        against=GRADIENT_STEPS,
        broken_by=WHITENING,
    )

    budget: float = -4.0
    rate: float = 0.3
    final_rate: float = 0.03
    weight: float = 0.1
    both_ends: bool = True
    task_rate: float = 0.5
    steps: int = 1000
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.final_rate <= self.rate < 0.5:
            raise ValueError(
                "rates must satisfy 0 < final_rate <= rate < 0.5, got "
                f"rate={self.rate} and final_rate={self.final_rate}."
            )
        if not math.isfinite(self.budget):
            raise ValueError(f"budget must be finite (nats), got {self.budget}.")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {self.weight}.")
        check_run(self.steps, self.batch_size, self.task_rate)


class State(NamedTuple):
    """Parameters, factors, log kappa(K_P) damped, and the number of updates done."""

    params: ProbeParams
    factors: Factors
    log_kappa_raw: Float[Array, ""]
    step: Int[Array, ""]


class Info(NamedTuple):
    """Before the update: primary loss, log (ii) less the budget, whether the harmful side moved."""

    task_loss: Float[Array, ""]
    over_budget: Float[Array, ""]
    harmful_turn: Float[Array, ""]


def balanced_gap(config: BalancedGapConfig, problem: Problem) -> Immuniser:
    """Switches between lowering kappa(H_P) and raising kappa(H_H), under a budget.

    Raises:
      ValueError: numbers as targets and no whole-data factors.
    """
    factors = problem.factors
    if factors is None:
        return from_penalty(
            "balanced_gap",
            problem,
            gap_penalty(config),
            init_memory=lambda params: jnp.full((), jnp.nan, float),
        )

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        raw = jnp.linalg.svd(factors.primary, compute_uv=False, full_matrices=False)
        log_kappa_raw = -2 * jnp.log(raw[-1] / raw[0])
        return State(params, factors, log_kappa_raw, jnp.zeros((), jnp.int32))

    return Immuniser(init, _update(config, problem.primary), finish=lambda state: state.params)


def gap_penalty(config: BalancedGapConfig) -> Penalty:
    """The same rule on a batch's features: relative rates become slopes of log eigenvalues.

    The penalty is ``sum_i rate_i log h_i`` with the rates held constant, so that its gradient moves
    each log eigenvalue by its rate, as the linear step does. Its memory is log kappa(H_P) of the
    first batch, before any update, which the budget is relative to.
    """

    def penalty(features, reference):
        primary = _log_spectrum(features.primary.x)
        harmful = _log_spectrum(features.harmful.x)
        log_kappa = jax.lax.stop_gradient(primary[-1] - primary[0])
        reference = jnp.where(jnp.isnan(reference), log_kappa, reference)
        harmful_turn = log_kappa - reference <= config.budget
        value = jnp.where(
            harmful_turn,
            jnp.sum(_rates(config, harmful, ill_slope) * harmful),
            jnp.sum(_rates(config, primary, well_slope) * primary),
        )
        return config.weight * value, reference

    return penalty


def _log_spectrum(features: Float[Array, "n d"]) -> Float[Array, "k"]:
    """Logs of the min(n, d) eigenvalues, ascending; vectors are held constant in the gradient."""
    n, d = features.shape
    exponent = exponent_of(features)
    rows = times_power_of_two(features if n <= d else features.T, -exponent)
    fixed = jax.lax.stop_gradient(rows)
    values, vectors = jnp.linalg.eigh(jnp.matmul(fixed, fixed.T, precision="highest") / n)
    projected = jnp.matmul(vectors.T, rows, precision="highest")
    floor = jnp.finfo(rows.dtype).eps * max(n, d) * values[-1]
    logs = jnp.log(jnp.maximum(jnp.sum(projected**2, axis=1) / n, floor))
    return logs + 2 * math.log(2) * exponent.astype(logs.dtype)


def _rates(config: BalancedGapConfig, log_values, slope) -> Float[Array, "k"]:
    """What the linear step would move each eigenvalue by, relative; its vectors play no part."""
    values = jnp.exp(jax.lax.stop_gradient(log_values - log_values[-1]))
    return _side_rates(config, Spectrum(values, jnp.zeros((0, 0), values.dtype)), slope)


def _side_rates(config: BalancedGapConfig, hessian: Spectrum, slope) -> Float[Array, "k"]:
    rates = _unit(slope(hessian)[0])
    if config.both_ends:
        # In H's basis the inverse has values 1 / s, in the opposite order; raising one of them
        # lowers the other, hence the sign.
        inverse = Spectrum(1 / hessian.values[::-1], hessian.vectors)
        rates -= _unit(slope(inverse)[0])[::-1]
    return rates


@functools.lru_cache(maxsize=64)
def _update(config: BalancedGapConfig, task: LinearTask):
    def side(theta, hessian: Spectrum, slope, rate):
        return multiplied(theta, hessian, rate * _side_rates(config, hessian, slope))

    def update(state: State, batch, rng_key):
        del rng_key
        batch = global_batch(batch)
        theta = state.params.backbone[THETA]
        along = jnp.minimum(state.step / max(config.steps - 1, 1), 1).astype(theta.dtype)
        rate = config.rate * (config.final_rate / config.rate) ** along
        primary = spectrum(state.factors.primary, theta)
        log_kappa = -jnp.log(primary.values[0] / primary.values[-1])
        over_budget = log_kappa - state.log_kappa_raw - config.budget
        harmful_turn = over_budget <= 0
        change = jax.lax.cond(
            harmful_turn,
            lambda: side(theta, spectrum(state.factors.harmful, theta), ill_slope, rate),
            lambda: side(theta, primary, well_slope, rate),
        )
        stepped, task_loss = task_step(state.params, batch.primary, config.task_rate, task)
        # kappa has no scale, so theta may be kept at norm sqrt(d) for free if the head makes up.
        moved = stepped.backbone[THETA] - change
        scale = jnp.linalg.norm(moved) / moved.shape[0] ** 0.5
        params = replaced(stepped._replace(head=task.scaled(stepped.head, scale)), moved / scale)
        info = Info(task_loss, over_budget, harmful_turn.astype(theta.dtype))
        return State(params, state.factors, state.log_kappa_raw, state.step + 1), info

    return update


def _unit(rates: Float[Array, "d"]) -> Float[Array, "d"]:
    """Rates scaled to a largest absolute value of 1."""
    return rates / jnp.maximum(jnp.max(jnp.abs(rates)), jnp.finfo(rates.dtype).tiny)
