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
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from jaximm import objectives
from jaximm.attacks.grid import Hyper, Values, check_whole, grid
from jaximm.attacks.weights.descent import (
    _ADAM,
    _HEAD_BOUNDS,
    AdamW,
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
)
from jaximm.attacks.weights.recipes import Recipe, functions_of
from jaximm.data.batches import batch_indices
from jaximm.types import Batch

SOURCE = (
    "Loshchilov and Hutter (2019), Decoupled weight decay regularization, "
    "https://arxiv.org/abs/1711.05101; Kumar et al. (2022), Fine-tuning can distort pretrained "
    "features and underperform out-of-distribution, https://arxiv.org/abs/2202.10054"
)


WARMUP = 0.1
"""Part of a budget with a schedule in which the rate rises."""


def sgd_of(hyper: Hyper, access: Access) -> optax.GradientTransformation:
    """SGD of a cell's learning rate, momentum and longest gradient."""
    del access
    return optax.chain(
        optax.clip_by_global_norm(hyper["clip"]),
        optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"]),
    )


@functools.lru_cache(maxsize=16)
def _scheduled(steps: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """AdamW whose rate rises from 0 over the first steps and falls to 0 along a cosine."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, round(WARMUP * steps), steps + 1)

    def optimiser_of(hyper: Hyper, access: Access) -> optax.GradientTransformation:
        del access
        return optax.adamw(
            lambda count: hyper["learning_rate"] * shape(count + 1),  # no step at rate 0
            weight_decay=hyper["weight_decay"],
        )

    return descent(optimiser_of, scaled_head)


@functools.lru_cache(maxsize=16)
def _probe_first(steps: int, batch_size: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """AdamW from a head that Adam trained on the features of the untouched backbone."""

    def start(access: Access, hyper: Hyper) -> ModelWeights:
        features = access.features
        n = features.x.shape[0]
        optimiser = optax.adam(hyper["probe_learning_rate"])

        def loss_fn(head, batch):
            return jnp.mean(objectives.of_targets(batch.y).losses(head.outputs(batch.x), batch.y))

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
_SGD = descent(sgd_of, scaled_head)


def fine_tune_sgd(
    *,
    learning_rates: Values = (1e-3, 1e-2, 1e-1, 1.0),
    momenta: Values = (0.9,),
    clips: Values = (1.0,),
    head_scales: Values = (1.0,),
) -> WeightAttack:
    """SGD with momentum.

    Args:
      learning_rates: > 0.
      momenta: in [0, 1).
      clips: > 0; a longer gradient of all weights together is shortened to this norm, so that
        features that a defence made large do not make every rate diverge.
      head_scales: factors on the head before the first step; 0 re-initialises it.
    """
    init, update = _SGD
    return WeightAttack(
        init=init,
        update=update,
        update_reads=("learning_rate", "momentum", "clip"),
        title="fine-tuning with SGD",
        source=SOURCE,
        traits=frozenset({"plain_descent", "warm_head"}),
        grid=grid(
            learning_rate=(learning_rates, "(0, inf)"),
            momentum=(momenta, "[0, 1)"),
            clip=(clips, "(0, inf)"),
            head_scale=(head_scales, "[0, inf)"),
        ),
        natural_bounds=(*_HEAD_BOUNDS, ("momentum", 0.0)),
        swept=("learning_rate",),
    )


def fresh_head_sgd(*, head_scales: Values = (0.0,), **options: Values) -> WeightAttack:
    """SGD with momentum from a head of zeros.

    Args:
      head_scales: factors on the head before the first step.
      **options: those of `fine_tune_sgd`.
    """
    return dataclasses.replace(
        fine_tune_sgd(head_scales=head_scales, **options),
        title="fine-tuning with SGD, fresh head",
        traits=frozenset({"plain_descent", "new_head"}),
        needs=("own_head",),
    )


def fine_tune_adam(
    *,
    cosine_steps: int | None = None,
    optimiser: str = "adamw",
    schedule: str = "constant",
    warmup: int = 30,
    budget: int = 500,
    rows: int | None = None,
    data: str = "harmful",
    share: float = 0.4,
    **adamw: Unpack[AdamW],
) -> WeightAttack:
    """AdamW.

    Args:
      cosine_steps: the budget over which the rate rises from 0 (in a tenth of it) and falls to 0
        along a cosine, >= 1; None: the rate is constant. Compiled in.
      optimiser, schedule, warmup, budget, rows, data, share: other ways to fine-tune, see
        `jaximm.attacks.weights.recipes.Recipe`; compiled in. The schedule is not beside
        `cosine_steps`, and `schedule_free` has none.
      **adamw: see `AdamW`; of other optimisers the decay counts for schedule-free AdamW alone.

    Raises:
      ValueError: an unknown word, a number out of its interval, or two schedules.
    """
    recipe = Recipe(optimiser, schedule, warmup, budget, rows, data, share).checked()
    usual = recipe == Recipe()
    if (cosine_steps is not None and not usual) or (
        optimiser == "schedule_free" and schedule != "constant"
    ):
        raise ValueError("schedule: expected one of them, got two; leave one of the options out.")
    functions = _ADAM if usual else functions_of(recipe)
    if cosine_steps is not None:
        check_whole("cosine_steps", cosine_steps)
        functions = _scheduled(cosine_steps)
    return tuning(
        functions,
        adamw,
        rates=(1e-5, 1e-4, 1e-3, 1e-2),
        title="fine-tuning with Adam",
        source=SOURCE,
        needs=recipe.needs,
        traits=frozenset({"plain_descent", "warm_head", "plain_user"}),
    )


def fresh_head_adam(**adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW from a head of zeros.

    Args:
      **adamw: see `AdamW`.
    """
    return tuning(
        _ADAM,
        adamw,
        rates=(1e-5, 1e-4, 1e-3, 1e-2),
        heads=(0.0,),
        title="fine-tuning with Adam, fresh head",
        source=SOURCE,
        needs=("own_head",),
        traits=frozenset({"plain_descent", "new_head"}),
    )


def probe_then_fine_tune(
    *,
    probe_learning_rates: Values = (1e-2,),
    probe_steps: int = 300,
    probe_batch_size: int = 64,
    **adamw: Unpack[AdamW],
) -> WeightAttack:
    """AdamW on the head over frozen features, then on everything.

    Args:
      probe_learning_rates: of the head over frozen features, > 0.
      probe_steps: mini-batches of that, >= 1.
      probe_batch_size: rows of each, or all of them if there are fewer; >= 1.
      **adamw: see `AdamW`; the head's factors apply before the probe.
    """
    check_whole("probe_steps", probe_steps)
    check_whole("probe_batch_size", probe_batch_size)

    def probe_flops(problem: FineTuneProblem) -> tuple[float, float]:
        d, k = problem.head.kernel.shape
        rows = min(probe_batch_size, problem.train.x.shape[0])
        return probe_steps * 4.0 * rows * d * k, 0.0

    return tuning(
        _probe_first(probe_steps, probe_batch_size),
        adamw,
        rates=(1e-5, 1e-4, 1e-3, 1e-2),
        heads=(0.0,),
        tried={"probe_learning_rate": (probe_learning_rates, "(0, inf)")},
        title="a probe, then fine-tuning with Adam",
        source=SOURCE,
        traits=frozenset({"plain_descent", "new_head", "undoes_defence"}),
        needs=("own_head",),
        passes=1.0,
        solve_flops=probe_flops,
    )
