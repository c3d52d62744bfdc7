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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaximm.immunisers.base import (
    Factors,
    ProbeParams,
    Problem,
    Spectrum,
    check_run,
    multiplied,
    spectrum,
    task_step,
)
from jaximm.immunisers.condition_gap import ill_slope, well_slope
from jaximm.types import Immuniser

SOURCE = (
    "jaximm, after Zheng et al. (2025), https://arxiv.org/abs/2505.23760; "
    "switching rule: Polyak (1967)"
)


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
      both_ends: also regularise the inverse Hessians; False is the paper's two terms alone.
      task_rate: step on the primary loss, relative to its curvature, in [0, 1].
      steps: updates; the rate's schedule is over these.
      batch_size: rows of a batch of the task loss; None: all.
    """

    budget: float = -4.0
    rate: float = 0.3
    final_rate: float = 0.03
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
      ValueError: if the problem has no whole-data factors.
    """
    factors = problem.whole_data("balanced_gap")

    def init(params: ProbeParams, rng_key) -> State:
        del rng_key
        raw = jnp.linalg.svd(factors.primary, compute_uv=False)
        return State(
            params, factors, 2 * (jnp.log(raw[0]) - jnp.log(raw[-1])), jnp.zeros((), jnp.int32)
        )

    return Immuniser(init, _update(config), finish=lambda state: state.params)


@functools.lru_cache(maxsize=64)
def _update(config: BalancedGapConfig):
    def side(theta, found: Spectrum, slope, rate):
        rates = _unit(slope(found)[0])
        if config.both_ends:
            # In H's basis the inverse has values 1 / s, in the opposite order; raising one of them
            # lowers the other, hence the sign.
            inverse = Spectrum(1 / found.values[::-1], found.vectors)
            rates -= _unit(slope(inverse)[0])[::-1]
        return multiplied(theta, found, rate * rates)

    def update(state: State, batch, rng_key):
        del rng_key
        theta = state.params.backbone
        along = jnp.minimum(state.step / max(config.steps - 1, 1), 1).astype(theta.dtype)
        rate = config.rate * (config.final_rate / config.rate) ** along
        primary = spectrum(state.factors.primary, theta)
        log_kappa = jnp.log(primary.values[-1]) - jnp.log(primary.values[0])
        over_budget = log_kappa - state.log_kappa_raw - config.budget
        harmful_turn = over_budget <= 0
        change = jax.lax.cond(
            harmful_turn,
            lambda: side(theta, spectrum(state.factors.harmful, theta), ill_slope, rate),
            lambda: side(theta, primary, well_slope, rate),
        )
        stepped, task_loss = task_step(state.params, batch.primary, config.task_rate)
        # kappa has no scale, so theta may be kept at norm sqrt(d) for free if the head makes up.
        moved = stepped.backbone - change
        scale = jnp.linalg.norm(moved) / moved.shape[0] ** 0.5
        params = ProbeParams(moved / scale, stepped.head * scale)
        info = Info(task_loss, over_budget, harmful_turn.astype(theta.dtype))
        return State(params, state.factors, state.log_kappa_raw, state.step + 1), info

    return update


def _unit(rates: Float[Array, "d"]) -> Float[Array, "d"]:
    """Rates scaled to a largest absolute value of 1."""
    return rates / jnp.maximum(jnp.max(jnp.abs(rates)), jnp.finfo(rates.dtype).tiny)
