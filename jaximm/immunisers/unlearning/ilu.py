r"""ILU: unlearning plus a penalty that makes it stationary under honest users' fine-tuning.

    base unlearning (NPO or RMU)  +  weight * g(e)^2  +  environment_weight * loss of e

e are rows of an environment: the batch ``environment`` where the caller gives one (an honest user's
data, unrelated to the harmful task), else the primary rows. g is one of three readings of the
paper's d/dw l(w o theta) (`jaximm.immunisers.unlearning.invariance`), which its text leaves open
and no code settles: the public repository has no invariance term at all, so this is no port.
``two_batches`` takes g of the two halves of the rows, whose product is unbiased.

Two rivals are options: the control that the paper lacks, the environment as further retain data
(``weight=0, environment_weight=1``), and sharpness-aware unlearning (``weight=0, sam_radius=r``):
the forget term at theta + r s / |s|, s its gradient over the whole batch. Where the environment is
fitted already, g is about 0 and ILU is its base.

Wang et al. (2025), Invariance makes LLM unlearning resilient, https://arxiv.org/abs/2506.01339; Fan
et al. (2025), LLM unlearning resilient to relearning attacks, https://arxiv.org/abs/2502.05374.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Rows, Weighted, from_objective
from jaximm.immunisers.problem import FEATURES, Problem, check_run
from jaximm.immunisers.unlearning import invariance, npo, rmu
from jaximm.types import AnyBatch, Immuniser


@dataclasses.dataclass(frozen=True, kw_only=True)
class IluConfig:
    """Unlearning whose model is stationary for an honest user, in one of three readings.

    Attributes:
      base: what unlearns: "npo" or "rmu".
      reading: of the penalty: "logit_scale", "parameter_scale" or "gradient_norm".
      weight: of the penalty; 0: the base alone.
      two_batches: g of two halves of the rows, unbiased; False: the square of one g.
      environment_weight: of the environment's own loss, as a control.
      sam_radius: of sharpness-aware unlearning; 0: plain.
      retain_weight: of the base's retain term (RMU's published: 1200).
      beta: of NPO.
      steering: of RMU.
      site: of RMU.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="ILU",
        source="Wang et al. (2025), Invariance makes LLM unlearning resilient to unanticipated "
        "downstream fine-tuning, https://arxiv.org/abs/2506.01339",
        against="honest users who fine-tune on data of their own",
        broken_by="relearning from a few harmful rows, or a fresh or rescaled head",
        traits=frozenset({"needs_harmful_head"}),
    )

    base: Literal["npo", "rmu"] = "npo"
    reading: invariance.Reading = "logit_scale"
    weight: float = 0.1
    two_batches: bool = True
    environment_weight: float = 0.0
    sam_radius: float = 0.0
    retain_weight: float = 1.0
    beta: float = 0.1
    steering: float = 6.5
    site: str = FEATURES
    steps: int = 300
    batch_size: int | None = None

    def __post_init__(self):
        if self.base not in ("npo", "rmu"):
            raise ValueError(f'base must be "npo" or "rmu", got {self.base!r}.')
        if self.reading not in invariance.READINGS:
            raise ValueError(f"reading must be one of {invariance.READINGS}, got {self.reading!r}.")
        for name in ("weight", "environment_weight", "sam_radius", "retain_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}.")
        for name in ("beta", "steering"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}.")
        check_run(self.steps, self.batch_size)


class Batches(NamedTuple):
    """What the terms see; every part of a step sees the last two whole."""

    primary: AnyBatch
    harmful: AnyBatch
    retain: AnyBatch
    environment: AnyBatch
    ascent: AnyBatch  # the harmful rows, for the direction of SAM


def ilu(config: IluConfig, problem: Problem) -> Immuniser:
    """Descends the base's terms and the penalty.

    Raises:
      ValueError: what `from_objective` refuses; reading "logit_scale" on a problem with a
        `losses_fn` and no `scaled_losses_fn`; fewer than two rows of an environment, at trace time.
    """
    scales_logits = config.weight > 0 and config.reading == "logit_scale"
    if scales_logits and problem.losses_fn is not None and problem.scaled_losses_fn is None:
        raise ValueError(
            'ilu with reading "logit_scale" scales logits: give the problem a scaled_losses_fn '
            'beside its losses_fn, or choose reading "parameter_scale" or "gradient_norm".'
        )
    steering = rmu.RmuConfig(steering=config.steering, site=config.site)

    def forget(params, reference, batches):
        if config.base == "rmu":
            return rmu.steered_rows(problem, params, reference, batches, steering).forget
        rows = npo.forget_rows(problem, params, reference, batches.harmful, config.beta).values
        return Weighted(rows, jnp.ones_like(rows))

    def objective(params, batches, reference, rng_key):
        del rng_key
        moved = params
        if config.sam_radius:
            seen = batches._replace(harmful=batches.ascent)
            step = jax.grad(lambda theta: _mean(forget(theta, reference, seen)))(params)
            step = jax.lax.stop_gradient(step)
            size = config.sam_radius / jnp.maximum(optax.tree.norm(step), 1e-30)
            moved = jax.tree.map(lambda p, s: p + (size * s).astype(p.dtype), params, step)
        loss: dict[str, Rows] = {"forget": forget(moved, reference, batches)}
        if config.base == "rmu":
            kept, counts = rmu.steered_rows(problem, params, reference, batches, steering).retain
        else:
            kept = problem.training_losses(params, batches.retain)
            counts = problem.weights(batches.retain)
        loss["retain"] = Weighted(config.retain_weight * kept, counts)
        if config.weight:
            parts = (batches.environment,) * 2
            if config.two_batches:
                parts = invariance.halves(batches.environment)
            value = invariance.penalty(config.reading, problem, params, *parts)
            loss["penalty"] = (config.weight * value).astype(kept.dtype)
        if config.environment_weight:
            rows = problem.losses(params, batches.environment)
            mean = _mean(Weighted(rows, problem.weights(batches.environment)))
            loss["environment"] = config.environment_weight * mean
        return loss, {}, reference

    method = from_objective(
        "ilu",
        problem,
        objective,
        init_memory=problem.reference_of,
        whole=("environment", "ascent"),
    )

    def update(state, batch, rng_key):
        seen = Batches(
            batch.primary,
            batch.harmful,
            getattr(batch, "retain", batch.primary),
            getattr(batch, "environment", batch.primary),
            batch.harmful,
        )
        return method.update(state, seen, rng_key)

    return method._replace(update=update)


def _mean(rows: Weighted):
    weights = jax.lax.stop_gradient(rows.weights).astype(rows.values.dtype)
    total = jnp.sum(weights)
    return jnp.sum(weights * rows.values) / jnp.where(total > 0, total, 1)
