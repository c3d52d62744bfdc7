r"""Private mask pre-training: only a secret share of the parameters trains.

    m = 1 where sum_t |g_t| over a search of some steps is among the largest rho p of all p entries
    theta <- start;  then  theta <- theta + m * optimiser(m * g)

Everything is released, m is kept. The claim of the paper is that tuning without m moves coordinates
that training did not use, and gains less. What may be claimed here: nothing beyond that m itself is
kept back. The owner of the weights tunes all of them, or the complement alone, or finds m again:
entries that are where they started are known by their start (its seed, or its distribution), and a
complement that is shrunk is known by its size (`recovery_auc`).

The text keeps the complement at its start. The released code differs: the gradient of one batch a
step, a new mask each time until it settles, weight decay on the complement, and a projection of the
complement onto a ball of radius 2 (`radius`); the ascent that it advertises is never applied.

Private mask pre-training (2026), https://arxiv.org/abs/2602.00446.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int

from jaximm.immunisers import gradient
from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import Immuniser, Params, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmpConfig:
    """Trains the primary task on a secret share of the entries; all others stay at their start.

    Attributes:
      density: rho, the share of all entries that trains, in (0, 1).
      search_steps: updates of all entries that choose the mask and are then taken back.
      radius: of the ball onto which the rest is projected after each step, as the released code
        does; None: it stays at its start.
      steps: updates, those of the search among them.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="private mask pre-training",
        source="Private mask pre-training (2026), https://arxiv.org/abs/2602.00446",
        against="users who tune without the mask",
        broken_by="tuning all entries or the others alone, nor against reading the mask off the "
        "sizes or the start of the entries",
        traits=frozenset({"needs_classes"}),
    )

    density: float = 0.3
    search_steps: int = 50
    radius: float | None = None
    steps: int = 1000
    batch_size: int | None = None

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise ValueError(f"density must be in (0, 1), got {self.density}.")
        if self.search_steps < 1:
            raise ValueError(f"search_steps must be >= 1, got {self.search_steps}.")
        if self.radius is not None and not 0 <= self.radius < math.inf:
            raise ValueError(f"radius must be finite and >= 0, or None, got {self.radius}.")
        check_run(self.steps, self.batch_size)


class Masked(NamedTuple):
    """The optimiser's own state, sums of |gradient| by entry, the mask, and the updates done."""

    inner: optax.OptState
    scores: Params
    mask: Params
    count: Int[Array, ""]


def pmp(config: PmpConfig, problem: Problem) -> Immuniser:
    """Searches the mask, goes back to the start, and trains the primary task on the mask alone.

    The mask is ``state.opt_state.mask``; `finish` gives all parameters and no mask. Parameters that
    the problem's optimiser freezes take places in the mask: give it those that train.

    Raises:
      ValueError: what `from_objective` refuses.
    """

    def objective(params, batches, start, rng_key):
        del rng_key
        kept = problem.training_losses(params, batches.primary)
        weights = problem.weights(batches.primary)
        scores = Weighted(problem.scores(params, batches.primary), weights)
        return {"task_loss": Weighted(kept, weights)}, {"accuracy": scores}, start

    if problem.optimiser is not None:
        problem = dataclasses.replace(problem, optimiser=_masking(config, problem.optimiser))
    method = from_objective("pmp", problem, objective, init_memory=lambda params: params)

    def update(state: gradient.State, batch, rng_key):
        stepped, info = method.update(state, batch, rng_key)
        # Not by an update of start - params: the complement is to be the start to the last bit.
        found = stepped.step == config.search_steps
        params = jax.tree.map(
            lambda leaf, start: jnp.where(found, start, leaf), stepped.params, state.memory
        )
        return stepped._replace(params=params), info

    return method._replace(update=update)


def _masking(
    config: PmpConfig, optimiser: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimiser on all entries during the search, from then on on the mask, from afresh."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
        return Masked(optimiser.init(params), zeros, everything, jnp.zeros((), jnp.int32))

    def update(gradients, state: Masked, params):
        masked = masked_update(gradients, state.mask)
        updates, inner = optimiser.update(masked, state.inner, params)
        updates = masked_update(updates, state.mask)
        if config.radius is not None:
            updates = _into_ball(updates, params, state.mask, config.radius)
        count = state.count + 1

        def search(scores):
            scores = jax.tree.map(lambda score, slope: score + jnp.abs(slope), scores, gradients)
            ends = count == config.search_steps
            mask = lax.cond(
                ends, lambda scores: largest(scores, config.density), lambda _: state.mask, scores
            )
            afresh = jax.tree.map(
                lambda new, old: jnp.where(ends, new, old), optimiser.init(params), inner
            )
            return Masked(afresh, scores, mask, count)

        return updates, lax.cond(
            count <= config.search_steps,
            search,
            lambda scores: Masked(inner, scores, state.mask, count),
            state.scores,
        )

    return optax.GradientTransformation(init, update)  # pyrefly: ignore[bad-argument-type]


def largest(scores: Params, density: float) -> Params:
    """The mask of the largest ``round(density * p)`` scores, >= 1, over all arrays; ties are in.

    >>> import jax.numpy as jnp
    >>> largest({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 0.5])}, 0.5)["a"].tolist()
    [True, False]
    """
    flat = jnp.concatenate([score.ravel() for score in jax.tree.leaves(scores)])
    least = lax.top_k(flat, max(1, round(density * flat.size)))[0][-1]
    return jax.tree.map(lambda score: score >= least, scores)


def masked_update(updates: Tree, mask: Params) -> Tree:
    """Updates of the mask's entries, 0 of the others."""
    return jax.tree.map(lambda change, free: jnp.where(free, change, 0), updates, mask)


def _into_ball(updates: Params, params: Params, mask: Params, radius: float) -> Params:
    """Updates that also bring all entries outside of the mask onto a ball about 0."""
    others = jax.tree.map(lambda leaf, free: jnp.where(free, 0, leaf), params, mask)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(others)))
    shrink = jnp.minimum(radius / jnp.where(norm > 0, norm, 1), 1) - 1
    return jax.tree.map(
        lambda change, leaf: change + shrink.astype(leaf.dtype) * leaf, updates, others
    )


def recovery_auc(scores: Params, mask: Params) -> float:
    """How well scores of entries tell the mask: the area under the ROC curve, .5 blind, 1 found.

    The chance that an entry of the mask has a larger score than another one; ties count half.
    """
    values = np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(scores)])
    inside = np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(mask)])
    inside = inside.astype(bool)
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # mean rank of equal values, from 1
    n_in, n_out = int(inside.sum()), int((~inside).sum())
    if not n_in or not n_out:
        raise ValueError(
            f"the mask has {n_in} entries inside and {n_out} outside; both are needed."
        )
    return float((ranks[inside].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))
