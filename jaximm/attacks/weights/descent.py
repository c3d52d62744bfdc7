"""Gradient descent on weights, of which most attackers are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax

from jaximm.attacks.grid import Hyper, Values, grid
from jaximm.attacks.weights.problem import (
    Access,
    Batches,
    ModelWeights,
    WeightAttack,
)


class AdamW(TypedDict, total=False):
    """Options of every attacker that trains by AdamW.

    learning_rates: > 0.
    weight_decays: >= 0, decoupled: weights shrink by rate * decay a step.
    head_scales: factors on the head before the first step; 0 re-initialises it.
    """

    learning_rates: Values
    weight_decays: Values
    head_scales: Values


RATES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Learning rates that are tried."""

EDIT_RATES = (1e-4, 1e-3, 1e-2)
"""Of attackers that edit the weights first."""


class State(NamedTuple):
    """ModelWeights and the optimiser's own state."""

    weights: ModelWeights
    opt_state: Any


OptimiserOf = Callable[[Hyper, Access], optax.GradientTransformation]
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
    """The weights with their head, or what stands for it, times ``hyper["head_scale"]``."""
    weights, path = access.weights, access.functions.scale_path
    params = weights.params
    if path is not None:
        params = {**params, path: params[path] * hyper["head_scale"].astype(params[path].dtype)}
    head = jax.tree.map(lambda part: part * hyper["head_scale"], weights.head)
    return weights._replace(params=params, head=head)


def descent(
    optimiser_of: OptimiserOf,
    start: Start,
    objective: Objective = harmful_loss,
    trained: Trained | None = None,
) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of an optax optimiser that is built from traced hyper-parameters.

    Args:
      optimiser_of: ``optimiser_of(hyper, access)``.
      start: ``start(access, hyper)``, the weights at step 0.
      objective: ``objective(weights, batches, access, hyper)``, what a step descends.
      trained: ``trained(weights)``, a tree of the same structure of bools, or of 0 and 1 by entry:
        what moves. If None: the parameters and the head (weight decay would move the benign head
        too, and so falsify the utility).
    """

    def init(access: Access, hyper: Hyper) -> State:
        weights = start(access, hyper)
        with jax.numpy_dtype_promotion("standard"):
            return State(weights, optimiser_of(hyper, access).init(weights))

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
            updates, opt_state = optimiser_of(hyper, access).update(
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
            adapters=jax.tree.map(lambda _: False, weights.adapters),
        )

    return trained


def adam_of(hyper: Hyper, access: Access | None = None) -> optax.GradientTransformation:
    """AdamW of a cell's learning rate and weight decay."""
    del access
    return optax.adamw(hyper["learning_rate"], weight_decay=hyper["weight_decay"])


_ADAM = descent(adam_of, scaled_head)

_HEAD_BOUNDS = (("head_scale", 0.0), ("head_scale", 1.0))


def tuning(
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    adamw: AdamW,
    *,
    rates: Values = RATES,
    heads: Values = (1.0,),
    bounds: tuple[tuple[str, float], ...] = (),
    tried: Mapping[str, tuple[Values, str]] | None = None,
    **said: Any,
) -> WeightAttack:
    """An attacker on the grid of AdamW and of further hyper-parameters.

    Args:
      functions: `init` and `update`.
      adamw: options that were given.
      rates, heads: learning rates and head scales where none were.
      bounds: natural bounds beside those of AdamW.
      tried: further hyper-parameters, as `grid` takes them.
      **said: further fields of `WeightAttack`.

    Raises:
      ValueError: an unknown option, or a value out of its interval.
    """
    unknown = sorted(set(adamw) - set(AdamW.__annotations__))
    if unknown:
        known = [*AdamW.__annotations__, *(tried or ())]
        raise ValueError(f"unknown option {unknown[0]!r}; this attacker tries {known}.")
    init, update = functions
    return WeightAttack(
        init=init,
        update=update,
        update_reads=("learning_rate", "weight_decay") if update is _ADAM[1] else None,
        grid=grid(
            learning_rate=(adamw.get("learning_rates", rates), "(0, inf)"),
            weight_decay=(adamw.get("weight_decays", (0.0,)), "[0, inf)"),
            head_scale=(adamw.get("head_scales", heads), "[0, inf)"),
            **(tried or {}),
        ),
        natural_bounds=(*_HEAD_BOUNDS, ("weight_decay", 0.0), *bounds),
        swept=("learning_rate",),
        **said,
    )
