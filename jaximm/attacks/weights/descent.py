"""Gradient descent on weights, of which most attackers are made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaximm.attacks.grid import Hyper, check_positive, grid_product
from jaximm.attacks.probe.ridge import check_non_negative
from jaximm.attacks.weights.problem import (
    Access,
    Batches,
    FineTuneProblem,
    Head,
    ModelWeights,
    WeightAttack,
)


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


class State(NamedTuple):
    """ModelWeights and the optimiser's own state."""

    weights: ModelWeights
    opt_state: Any


OptimiserOf = Callable[[Hyper], optax.GradientTransformation]
Start = Callable[[Access, Hyper], ModelWeights]
Objective = Callable[[ModelWeights, Batches, Access, Hyper], jax.Array]
Trained = Callable[[ModelWeights], ModelWeights]


def harmful_loss(
    weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper
) -> jax.Array:
    """The harmful task's mean loss."""
    del hyper
    return access.loss_fn(weights, batches.harmful)


def scaled_head(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with their head times ``hyper["head_scale"]``."""
    weights = access.weights
    return weights._replace(head=Head(*(part * hyper["head_scale"] for part in weights.head)))


def descent(
    optimiser_of: OptimiserOf,
    start: Start,
    objective: Objective = harmful_loss,
    trained: Trained | None = None,
) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of an optax optimiser that is built from traced hyper-parameters.

    Args:
      optimiser_of: ``optimiser_of(hyper)``.
      start: ``start(access, hyper)``, the weights at step 0.
      objective: ``objective(weights, batches, access, hyper)``, what a step descends.
      trained: ``trained(weights)``, a tree of the same structure of bools, or of 0 and 1 by entry:
        what moves. If None: the parameters and the head (weight decay would move the benign head
        too, and so falsify the utility).
    """

    def init(access: Access, hyper: Hyper) -> State:
        weights = start(access, hyper)
        with jax.numpy_dtype_promotion("standard"):
            return State(weights, optimiser_of(hyper).init(weights))

    return init, _update_of(optimiser_of, objective, trained)


@functools.lru_cache(maxsize=32)
def _update_of(
    optimiser_of: OptimiserOf, objective: Objective, trained: Trained | None
) -> Callable[..., State]:
    """The `update` of `descent`: one object for all starts, so that it compiles once for them."""
    moves = by_path(lambda _: True) if trained is None else trained

    def update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        gradients = jax.grad(objective)(state.weights, batches, access, hyper)
        kept = moves(state.weights)

        def masked(tree):
            return jax.tree.map(lambda leaf, keep: leaf * jnp.asarray(keep, leaf.dtype), tree, kept)

        # Adam divides by 1 - b^count, a float to the power of an integer: not strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser_of(hyper).update(
                masked(gradients), state.opt_state, state.weights
            )
            # Weight decay and momentum are masked too.
            weights = jax.tree.map(optax.apply_updates, state.weights, masked(updates))
        return State(weights, opt_state)

    return update


def everything(weights: ModelWeights) -> ModelWeights:
    """A `trained` of `descent`: all there is, the benign head too."""
    return jax.tree.map(lambda _: True, weights)


def by_path(keep: Callable[[str], bool], *, head: bool = True) -> Trained:
    """A `trained` of `descent`: parameters whose dotted path passes, and perhaps the head."""

    def trained(weights: ModelWeights) -> ModelWeights:
        def marked(path, _):
            return keep(jax.tree_util.keystr(path, simple=True, separator="."))

        return weights._replace(
            params=jax.tree_util.tree_map_with_path(marked, weights.params),
            head=jax.tree.map(lambda _: head, weights.head),
            benign_head=jax.tree.map(lambda _: False, weights.benign_head),
            shift=jax.tree.map(lambda _: False, weights.shift),
        )

    return trained


def adam_of(hyper: Hyper) -> optax.GradientTransformation:
    """AdamW of a cell's learning rate and weight decay."""
    return optax.adamw(hyper["learning_rate"], weight_decay=hyper["weight_decay"])


_ADAM = descent(adam_of, scaled_head)

_HEAD_BOUNDS = (("head_scale", 0.0), ("head_scale", 1.0))


def tuning(
    config: FineTuneAdamConfig,
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    *,
    kind: str,
    bounds: tuple[tuple[str, float], ...] = (),
    needs: tuple[str, ...] = (),
    passes: float = 0.0,
    solve_flops: Callable[[FineTuneProblem], tuple[float, float]] | None = None,
    follows_loss: bool = True,
    **values: Sequence[float],
) -> WeightAttack:
    """An attacker on the grid of AdamW and of further hyper-parameters.

    Args:
      config: gives learning rates, weight decays and head scales.
      functions: `init` and `update`.
      bounds: natural bounds beside those of AdamW.
      kind, needs, passes, solve_flops, follows_loss: see `WeightAttack`.
      **values: those of each further hyper-parameter.
    """
    init, update = functions
    return WeightAttack(
        init=init,
        update=update,
        update_reads=("learning_rate", "weight_decay") if update is _ADAM[1] else None,
        grid=grid_product(
            learning_rate=config.learning_rates,
            weight_decay=config.weight_decays,
            head_scale=config.head_scales,
            **values,
        ),
        kind=kind,
        natural_bounds=(*_HEAD_BOUNDS, ("weight_decay", 0.0), *bounds),
        needs=needs,
        passes=passes,
        solve_flops=solve_flops,
        follows_loss=follows_loss,
    )
