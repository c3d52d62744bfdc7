"""Optimisers of deep runs: optax transformations from a plain configuration."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import optax

from jaximm.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """An optimiser and its schedule.

    Attributes:
      name: "sgd" (with momentum) or "adamw".
      learning_rate: at its peak.
      momentum: of sgd, in [0, 1).
      weight_decay: decoupled, for both; 0: none.
      schedule: over the run's updates: "constant", "cosine" to zero, "linear" to zero.
      warmup: part of the run in which the rate rises from zero, in [0, 1).
      clip_norm: largest norm of a gradient over all parameters; None: no clipping.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = 1.0

    def __post_init__(self):
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f'optimiser name must be "sgd" or "adamw", got {self.name!r}.')
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(
                f'schedule must be "constant", "cosine" or "linear", got {self.schedule!r}.'
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}.")
        if not (0 <= self.momentum < 1 and 0 <= self.warmup < 1):
            raise ValueError(
                f"momentum and warmup must be in [0, 1), got {self.momentum} and {self.warmup}."
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and >= 0, got {self.weight_decay}.")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be > 0, or None, got {self.clip_norm}.")


def make_schedule(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """The learning rate by update, 0 .. steps - 1.

    >>> schedule = make_schedule(OptimiserConfig(learning_rate=1.0, warmup=0.1), 100)
    >>> [round(float(schedule(step)), 3) for step in (0, 10, 100)]
    [0.0, 1.0, 0.0]
    """
    rising = round(config.warmup * steps)
    rest = max(steps - rising, 1)
    main = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, rest),
    }[config.schedule]()
    if not rising:
        return main
    ramp = optax.linear_schedule(0.0, config.learning_rate, rising)
    return optax.join_schedules([ramp, main], [rising])


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """An optimiser for `steps` updates; its state holds the count that drives the schedule.

    Raises:
      ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}.")
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adamw":
        parts.append(optax.scale_by_adam())
    elif config.momentum:
        parts.append(optax.trace(config.momentum))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, steps)))
    return optax.chain(*parts)


def optimiser_state(optimiser: optax.GradientTransformation, params: Params) -> optax.OptState:
    """The optimiser's first state; optax mixes float32 schedules in, whatever the parameters."""
    with jax.numpy_dtype_promotion("standard"):
        return optimiser.init(params)


class Stepped(NamedTuple):
    """After a step."""

    params: Params
    opt_state: optax.OptState


def optimiser_step(
    optimiser: optax.GradientTransformation,
    gradients: Params,
    opt_state: optax.OptState,
    params: Params,
) -> Stepped:
    """One step of any of optax, each parameter in its own dtype."""
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimiser.update(gradients, opt_state, params)
    return Stepped(optax.apply_updates(params, updates), opt_state)
