"""Full fine-tuning of the trainable blocks and the head: SGD, AdamW, and a probe first.

- `fine_tune_sgd`: w <- w - rate * v, v <- momentum * v + g;
- `fine_tune_adam`: AdamW, decoupled weight decay;
- `fresh_head_sgd`, `fresh_head_adam`: the same from a head of zeros;
- `probe_then_fine_tune`: AdamW on the head alone over frozen features, then on everything.

Every grid has a `head_scale` that multiplies the head before the first step: 1 keeps the warm head,
0 re-initialises it, and what lies between takes back a defence that only inflated the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jaximm.attacks.base import Hyper, grid_product
from jaximm.attacks.gradient_descent import check_positive
from jaximm.attacks.ridge import check_non_negative
from jaximm.attacks.weights import Head, LossFn, ModelWeights, WeightAttack
from jaximm.types import Batch

SOURCE = (
    "Loshchilov and Hutter (2019), Decoupled weight decay regularization, "
    "https://arxiv.org/abs/1711.05101; Kumar et al. (2022), Fine-tuning can distort pretrained "
    "features and underperform out-of-distribution, https://arxiv.org/abs/2202.10054"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneSGDConfig:
    """SGD with momentum.

    Attributes:
      learning_rates: > 0.
      momenta: in [0, 1).
      head_scales: factors on the head before the first step; 0 re-initialises it.
    """

    learning_rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    momenta: tuple[float, ...] = (0.9,)
    head_scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_positive("learning_rates", self.learning_rates)
        check_non_negative("head_scales", self.head_scales)
        if not self.momenta or not all(0 <= value < 1 for value in self.momenta):
            raise ValueError(
                f"momenta must be numbers in [0, 1), at least one, got {self.momenta}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshHeadSGDConfig(FineTuneSGDConfig):
    """SGD with momentum from a head of zeros."""

    head_scales: tuple[float, ...] = (0.0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneAdamConfig:
    """AdamW.

    Attributes:
      learning_rates: > 0.
      weight_decays: >= 0, decoupled: weights shrink by rate * decay a step.
      head_scales: factors on the head before the first step; 0 re-initialises it.
    """

    learning_rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    weight_decays: tuple[float, ...] = (0.0,)
    head_scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_positive("learning_rates", self.learning_rates)
        check_non_negative("weight_decays", self.weight_decays)
        check_non_negative("head_scales", self.head_scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshHeadAdamConfig(FineTuneAdamConfig):
    """AdamW from a head of zeros."""

    head_scales: tuple[float, ...] = (0.0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeThenFineTuneConfig(FineTuneAdamConfig):
    """AdamW on the head over frozen features, then on everything.

    Attributes:
      head_scales: factors on the head before the probe.
      probe_learning_rates: of the head over frozen features, > 0.
      probe_steps: mini-batches of that, >= 1.
    """

    head_scales: tuple[float, ...] = (0.0,)
    probe_learning_rates: tuple[float, ...] = (1e-2,)
    probe_steps: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("probe_learning_rates", self.probe_learning_rates)
        if self.probe_steps < 1:
            raise ValueError(f"probe_steps must be at least 1, got {self.probe_steps}.")


class State(NamedTuple):
    """ModelWeights and the optimiser's own state."""

    weights: ModelWeights
    opt_state: Any


def descent(
    optimiser_of: Callable[[Hyper], optax.GradientTransformation], *, scale_head: bool
) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of an optax optimiser that is built from traced hyper-parameters.

    Args:
      optimiser_of: ``optimiser_of(hyper)``.
      scale_head: whether `init` multiplies the head by ``hyper["head_scale"]``.
    """

    def init(weights: ModelWeights, hyper: Hyper) -> State:
        if scale_head:
            head = Head(*(part * hyper["head_scale"] for part in weights.head))
            weights = weights._replace(head=head)
        return State(weights, optimiser_of(hyper).init(weights))

    def update(state: State, batch: Batch, loss_fn: LossFn, hyper: Hyper) -> State:
        gradients = jax.grad(loss_fn)(state.weights, batch)
        # Adam divides by 1 - b^count, a float to the power of an integer: not strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser_of(hyper).update(
                gradients, state.opt_state, state.weights
            )
            weights = jax.tree.map(optax.apply_updates, state.weights, updates)
        return State(weights, opt_state)

    return init, update


def _sgd(hyper: Hyper) -> optax.GradientTransformation:
    return optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"])


def _adam(hyper: Hyper) -> optax.GradientTransformation:
    return optax.adamw(hyper["learning_rate"], weight_decay=hyper["weight_decay"])


def _probe_adam(hyper: Hyper) -> optax.GradientTransformation:
    return optax.adam(hyper["probe_learning_rate"])


# Built once: the same function objects each time, so that jit finds the compiled run again.
_SGD = descent(_sgd, scale_head=True)
_ADAM = descent(_adam, scale_head=True)
_ADAM_AS_IT_IS = descent(_adam, scale_head=False)
_PROBE = descent(_probe_adam, scale_head=True)

_BOUNDS = (("head_scale", 0.0), ("head_scale", 1.0), ("weight_decay", 0.0), ("momentum", 0.0))


def fine_tune_sgd(config: FineTuneSGDConfig) -> WeightAttack:
    """Fine-tuning by SGD with momentum."""
    init, update = _SGD
    return WeightAttack(
        init=init,
        update=update,
        grid=grid_product(
            learning_rate=config.learning_rates,
            momentum=config.momenta,
            head_scale=config.head_scales,
        ),
        natural_bounds=_BOUNDS,
    )


def fine_tune_adam(config: FineTuneAdamConfig) -> WeightAttack:
    """Fine-tuning by AdamW."""
    init, update = _ADAM
    return WeightAttack(
        init=init,
        update=update,
        grid=grid_product(
            learning_rate=config.learning_rates,
            weight_decay=config.weight_decays,
            head_scale=config.head_scales,
        ),
        natural_bounds=_BOUNDS,
    )


def probe_then_fine_tune(config: ProbeThenFineTuneConfig) -> WeightAttack:
    """A linear probe on frozen features, then fine-tuning by AdamW."""
    init, update = _ADAM_AS_IT_IS
    return WeightAttack(
        init=init,
        update=update,
        grid=grid_product(
            learning_rate=config.learning_rates,
            weight_decay=config.weight_decays,
            head_scale=config.head_scales,
            probe_learning_rate=config.probe_learning_rates,
        ),
        natural_bounds=_BOUNDS,
        probe_steps=config.probe_steps,
        probe=_PROBE,
    )
