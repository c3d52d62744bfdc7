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
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaximm.attacks.grid import Hyper, check_positive, grid_product
from jaximm.attacks.probe.ridge import check_non_negative
from jaximm.attacks.weights.descent import (
    _ADAM,
    _HEAD_BOUNDS,
    FineTuneAdamConfig,
    State,
    adam_of,
    descent,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.problem import (
    Access,
    FineTuneProblem,
    ModelWeights,
    WeightAttack,
    logits_of,
    losses,
)
from jaximm.data.batches import batch_indices
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
      clips: > 0; a longer gradient of all weights together is shortened to this norm, so that
        features that a defence made large do not make every rate diverge.
      head_scales: factors on the head before the first step; 0 re-initialises it.
    """

    learning_rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    momenta: tuple[float, ...] = (0.9,)
    clips: tuple[float, ...] = (1.0,)
    head_scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_positive("learning_rates", self.learning_rates)
        check_positive("clips", self.clips)
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
      probe_batch_size: rows of each, or all of them if there are fewer; >= 1.
    """

    head_scales: tuple[float, ...] = (0.0,)
    probe_learning_rates: tuple[float, ...] = (1e-2,)
    probe_steps: int = 300
    probe_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("probe_learning_rates", self.probe_learning_rates)
        for name in ("probe_steps", "probe_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def _sgd(hyper: Hyper) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(hyper["clip"]),
        optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"]),
    )


@functools.lru_cache(maxsize=16)
def _probe_first(steps: int, batch_size: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """AdamW from a head that Adam trained on the features of the untouched backbone."""

    def start(access: Access, hyper: Hyper) -> ModelWeights:
        features = access.features
        n = features.x.shape[0]
        optimiser = optax.adam(hyper["probe_learning_rate"])

        def loss_fn(head, batch):
            return jnp.mean(losses(logits_of(head, batch.x), batch.y))

        def one_step(t, carry):
            head, opt_state = carry
            rows = batch_indices(access.seed, t, n=n, batch_size=min(batch_size, n))
            slopes = jax.grad(loss_fn)(head, Batch(features.x[rows], features.y[rows]))
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimiser.update(slopes, opt_state, head)
                head = jax.tree.map(optax.apply_updates, head, updates)
            return head, opt_state

        weights = scaled_head(access, hyper)
        carry = weights.head, optimiser.init(weights.head)
        # Nothing is convolved in this loop: the features are there.
        head, _ = jax.lax.fori_loop(0, steps, one_step, carry)
        return weights._replace(head=head)

    return descent(adam_of, start)


# Built once: the same function objects each time, so that jit finds the compiled run again.
_SGD = descent(_sgd, scaled_head)


def fine_tune_sgd(config: FineTuneSGDConfig) -> WeightAttack:
    """Fine-tuning by SGD with momentum."""
    init, update = _SGD
    return WeightAttack(
        init=init,
        update=update,
        grid=grid_product(
            learning_rate=config.learning_rates,
            momentum=config.momenta,
            clip=config.clips,
            head_scale=config.head_scales,
        ),
        natural_bounds=(*_HEAD_BOUNDS, ("momentum", 0.0)),
    )


def fine_tune_adam(config: FineTuneAdamConfig) -> WeightAttack:
    """Fine-tuning by AdamW."""
    return tuning(config, _ADAM, kind="fine-tuning")


def probe_then_fine_tune(config: ProbeThenFineTuneConfig) -> WeightAttack:
    """A linear probe on frozen features, then fine-tuning by AdamW."""
    functions = _probe_first(config.probe_steps, config.probe_batch_size)

    def probe_flops(problem: FineTuneProblem) -> tuple[float, float]:
        d, k = problem.head.kernel.shape
        rows = min(config.probe_batch_size, problem.train.x.shape[0])
        return config.probe_steps * 4.0 * rows * d * k, 0.0

    return tuning(
        config,
        functions,
        kind="fine-tuning",
        passes=1.0,
        solve_flops=probe_flops,
        probe_learning_rate=config.probe_learning_rates,
    )
