"""What the methods of this family share: batches that every part sees whole, and one step of them.

Each keeps the primary loss. On one label space (a language model, or one head for both tasks) the
primary rows hold harmful prompts with their safe answers beside the benign ones: the alignment
data of the papers. No other batch of safe answers is drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaximm.immunisers.gradient import Weighted
from jaximm.immunisers.problem import Problem
from jaximm.types import AnyBatch, Immuniser, Params


def with_copies(immuniser: Immuniser, **copies: str) -> Immuniser:
    """The method on a dict of batches: those that are given, and copies of some by further names.

    A copy is what a method names in `whole`. A caller of `jaximm.training.fit` whose batches have a
    field of that name gives other rows instead.
    """

    def update(state, batch, rng_key):
        given = batch._asdict()
        added = {name: given[copied] for name, copied in copies.items()}
        return immuniser.update(state, {**added, **given}, rng_key)

    return immuniser._replace(update=update)


def aligned(problem: Problem, params: Params, batches: AnyBatch) -> Weighted:
    """The primary task's rows as they are trained on."""
    rows = batches["primary"]
    return Weighted(problem.training_losses(params, rows), problem.weights(rows))


def harmful_rows(problem: Problem, params: Params, rows: AnyBatch) -> Weighted:
    """The harmful task's."""
    losses = problem.losses(problem.with_harmful_head(params), rows)
    return Weighted(losses, problem.weights(rows))


def mean(rows: Weighted) -> Float[Array, ""]:
    """Of a whole batch, by the weights; 0 where there are none."""
    weights = lax.stop_gradient(rows.weights).astype(rows.values.dtype)
    total = jnp.sum(weights)
    kept = jnp.where(weights > 0, rows.values, 0) * weights
    return jnp.sum(kept) / jnp.where(total > 0, total, 1)


def inner_product(one: Params, other: Params) -> Float[Array, ""]:
    """Of two trees, in the default float."""
    dtype = jnp.zeros(()).dtype
    products = jax.tree.map(lambda a, b: jnp.sum(a.astype(dtype) * b.astype(dtype)), one, other)
    return sum(jax.tree.leaves(products), jnp.zeros((), dtype))


def norm(tree: Params) -> Float[Array, ""]:
    """Euclidean, of all numbers of a tree; not below the root of the smallest normal number.

    Whatever is divided by it is then 0 where the tree is, and so is the slope.
    """
    square = inner_product(tree, tree)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))


def scaled(scale: Float[Array, ""], tree: Params) -> Params:
    """A tree times a number, each leaf in its own dtype."""
    return jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, tree)


def one_step(
    loss_fn: Callable[[Params], Float[Array, ""]], params: Params, length: float, *, exact: bool
) -> Params:
    """theta - length g / |g| with g the loss's gradient: a simulated step of the attacker.

    Not `jaximm.immunisers.meta.inner`, whose optimisers do not take a step of a given length.

    Args:
      loss_fn: of all rows of the attack.
      params: theta.
      length: of the step.
      exact: whether g / |g| is differentiated, which is a Hessian-vector product; else it is
        constant.
    """
    gradient = jax.grad(loss_fn)(params)
    gradient = gradient if exact else lax.stop_gradient(gradient)
    return jax.tree.map(jnp.subtract, params, scaled(length / norm(gradient), gradient))
