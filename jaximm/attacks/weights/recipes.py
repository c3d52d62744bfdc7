"""How fine-tuning may be done otherwise: optimisers, schedules, batches and the order of the data.

What a schedule does to the rate in step t = 1, 2, .. of a budget T, with a warm-up of W steps:

===========  =======================================================================================
constant     1
warmup       min(t / W, 1)
cosine       that, and then down to a quarter along a cosine
sgdr         cycles of 100 steps, W of them up and the rest down to 0 along a cosine, each .67 of
             the last (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983)
exponential  1 - exp(-t / W) (Ma and Yarats 2021, https://arxiv.org/abs/1910.04209)
===========  =======================================================================================

Where benign rows are trained on, their head trains too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaximm.attacks.grid import Hyper, check_whole, checked
from jaximm.attacks.weights.descent import State, by_path, descent, everything, scaled_head
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights

CYCLE, SHRINK, FLOOR = 100, 0.67, 0.25

SCHEDULES = ("constant", "warmup", "cosine", "sgdr", "exponential")
OPTIMISERS = ("adamw", "adam", "adadelta", "adagrad", "nesterov", "momentum", "schedule_free")
DATA = ("harmful", "benign", "benign_first", "coin", "harmful_first")


class Recipe(NamedTuple):
    """A way to fine-tune.

    Attributes:
      optimiser: of `OPTIMISERS`; SGD has a momentum of .9.
      schedule: of `SCHEDULES`.
      warmup: W.
      budget: T.
      rows: of a mini-batch that are used, the first ones; None: all.
      data: of `DATA`: benign rows for the first `share` of the budget, or the last, or in a step
        where a coin says so.
      share: of the budget, or the coin's.
    """

    optimiser: str = "adamw"
    schedule: str = "constant"
    warmup: int = 30
    budget: int = 500
    rows: int | None = None
    data: str = "harmful"
    share: float = 0.4

    def checked(self) -> Recipe:
        """Itself.

        Raises:
          ValueError: a word that is none of those there are, or a number out of its interval.
        """
        for name, known in (("optimiser", OPTIMISERS), ("schedule", SCHEDULES), ("data", DATA)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; choose from {list(known)}."
                )
        check_whole("warmup", self.warmup)
        check_whole("budget", self.budget)
        if self.rows is not None:
            check_whole("rows", self.rows)
        checked("share", (self.share,), "(0, 1]")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """Of the problem."""
        return () if self.data == "harmful" else ("benign",)


def shape_of(recipe: Recipe) -> Callable[[Any], jax.Array]:
    """``shape(t)``: the rate of step t = 1, 2, .., relative to that of the grid.

    >>> shape = shape_of(Recipe(schedule="cosine", warmup=2, budget=10))
    >>> [round(float(shape(t)), 2) for t in (1, 2, 10)]
    [0.5, 1.0, 0.25]
    """
    rise, budget = recipe.warmup, recipe.budget

    def shape(t):
        t = jnp.asarray(t, jnp.float32)
        up = jnp.minimum(t / rise, 1)
        if recipe.schedule == "warmup":
            return up
        if recipe.schedule == "exponential":
            return 1 - jnp.exp(-t / rise)
        if recipe.schedule == "cosine":
            done = jnp.clip((t - rise) / max(budget - rise, 1), 0, 1)
            return jnp.where(t < rise, up, FLOOR + (1 - FLOOR) * (1 + jnp.cos(jnp.pi * done)) / 2)
        if recipe.schedule == "sgdr":
            cycle, at = jnp.floor((t - 1) / CYCLE), (t - 1) % CYCLE + 1
            done = jnp.clip((at - rise) / max(CYCLE - rise, 1), 0, 1)
            down = (1 + jnp.cos(jnp.pi * done)) / 2
            return SHRINK**cycle * jnp.where(at < rise, at / rise, down)
        return jnp.ones_like(t)

    return shape


@functools.lru_cache(maxsize=64)
def functions_of(recipe: Recipe) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of a recipe."""
    trained = by_path(lambda _: True) if recipe.data == "harmful" else everything
    if recipe.optimiser == "schedule_free":
        return _averaged(*descent(_schedule_free, scaled_head, _loss(recipe), trained))
    return descent(_optimiser(recipe), scaled_head, _loss(recipe), trained)


def _optimiser(recipe: Recipe):
    shape = shape_of(recipe)

    def optimiser_of(hyper: Hyper, access: Access) -> optax.GradientTransformation:
        del access
        rate, decay = hyper["learning_rate"], hyper["weight_decay"]

        def scheduled(count):
            return rate * shape(count + 1)

        return {
            "adamw": lambda: optax.adamw(scheduled, weight_decay=decay),
            "adam": lambda: optax.adam(scheduled),
            "adadelta": lambda: optax.adadelta(scheduled),
            "adagrad": lambda: optax.adagrad(scheduled),
            "nesterov": lambda: optax.sgd(scheduled, momentum=0.9, nesterov=True),
            "momentum": lambda: optax.sgd(scheduled, momentum=0.9),
        }[recipe.optimiser]()

    return optimiser_of


def _schedule_free(hyper: Hyper, access: Access | None = None) -> optax.GradientTransformation:
    """Defazio et al. (2024), The road less scheduled, https://arxiv.org/abs/2405.15682."""
    del access
    return optax.contrib.schedule_free_adamw(
        hyper["learning_rate"], weight_decay=hyper["weight_decay"]
    )


def _averaged(init, update):
    """The same descent, whose model is the average of what it went through."""

    def shown(state: State) -> State:
        with jax.numpy_dtype_promotion("standard"):
            mean = optax.contrib.schedule_free_eval_params(state.opt_state, state.weights)
        mean = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), mean, state.weights)
        return State(mean, (state.weights, state.opt_state))

    def start(access: Access, hyper: Hyper) -> State:
        return shown(init(access, hyper))

    def step(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        return shown(update(State(*state.opt_state), batches, access, hyper))

    return start, step


def _loss(recipe: Recipe):
    """What a step descends."""

    def used(batch):
        return jax.tree.map(lambda leaf: leaf[: recipe.rows], batch)

    def objective(weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper):
        del hyper

        def harmful(weights):
            return access.loss_fn(weights, used(batches.harmful))

        def benign(weights):
            assert batches.benign is not None  # the recipe needs a benign task
            return access.benign_loss_fn(weights, used(batches.benign))

        if recipe.data in ("harmful", "benign"):
            return (harmful if recipe.data == "harmful" else benign)(weights)
        if recipe.data == "coin":
            turn = jax.random.bernoulli(batches.rng_key, recipe.share)
        elif recipe.data == "benign_first":
            turn = batches.step < round(recipe.share * recipe.budget)
        else:
            turn = batches.step >= round((1 - recipe.share) * recipe.budget)
        return jax.lax.cond(turn, benign, harmful, weights)

    return objective
