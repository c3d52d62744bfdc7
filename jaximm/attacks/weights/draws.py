"""The rows of every step, drawn once for all trajectories."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaximm.attacks.grid import MAX_STEPS
from jaximm.attacks.weights.measure import (
    _blocks,
    _features_of,
)
from jaximm.attacks.weights.problem import (
    Access,
    Batches,
    FineTuneProblem,
    Functions,
    ModelWeights,
    WeightAttack,
)
from jaximm.data.batches import Stream, stream, stream_indices
from jaximm.types import Batch, as_argument


class _Held(NamedTuple):
    """Arrays of a problem that the compiled functions take."""

    params: Any
    head: Any
    train: Batch
    features: Batch | None
    benign_head: Any
    benign_train: Batch | None
    benign_features: Batch | None
    public: Any
    canonical: Any = ()  # for an `init` that needs it, see `with_canonical`


def _held(problem: FineTuneProblem, block: int) -> _Held:
    """The features of all training rows, a block at a time, and the rest; once a problem."""

    features_fn = as_argument(problem.features_fn)

    def features(batch):
        if not problem.head:
            return None
        parts = [
            np.asarray(_features_of(features_fn, problem.params, batch.x, rows))[counted]
            for rows, counted in _blocks(batch.x.shape[0], block)
        ]
        return Batch(jnp.asarray(np.concatenate(parts)), batch.y)

    def make() -> _Held:
        benign = problem.benign
        return _Held(
            problem.params,
            problem.head,
            problem.train,
            features(problem.train),
            () if benign is None else benign.head,
            None if benign is None else benign.train,
            None if benign is None else features(benign.train),
            problem.public,
        )

    return problem.once(("held", block), make)


def with_canonical(held: _Held, attack: WeightAttack, problem: FineTuneProblem) -> _Held:
    """What `init` gets: the weights of the same function too, if the attacker needs them.

    They lie on the host, and no step holds them.
    """
    if "canonical" not in attack.needs:
        return held
    return held._replace(canonical=tuple(form.params for form in problem.canonical))


def _access(held: _Held, seed, functions: Functions) -> Access:
    return Access(
        weights=ModelWeights(held.params, held.head, held.benign_head),
        features=held.features,
        benign_features=held.benign_features,
        public=held.public,
        seed=seed,
        inputs=held.train,
        functions=functions,
        canonical=held.canonical,
    )


class _Drawn(NamedTuple):
    """Row numbers of `DRAWN` consecutive steps, of each task."""

    harmful: Int[Array, "*c steps m"]
    benign: Int[Array, "*c steps b"] | None


DRAWN = 256
"""Steps whose batches are drawn at once: the drawing is then no part of an attacker's program."""


def _draw(held: _Held, seeds, begin, *, batch_size, batched) -> _Drawn:
    """The rows of steps begin .. begin + DRAWN - 1."""

    def rows(n: int, benign: bool):
        if batch_size is None:  # all of them, in order
            shape = (*np.shape(seeds), DRAWN, n)
            return jnp.asarray(np.broadcast_to(np.arange(n, dtype=np.int32), shape))
        return _draw_rows(
            seeds,
            begin,
            stream(n),
            np.bool_(benign),
            batch_size=min(batch_size, n),
            batched=batched,
        )

    other = held.benign_train
    return _Drawn(
        rows(held.train.x.shape[0], False),
        None if other is None else rows(other.x.shape[0], True),
    )


@functools.partial(jax.jit, static_argnames=("batch_size", "batched"))
def _draw_rows(seeds, begin, rows: Stream, benign, *, batch_size, batched):
    """Row numbers of one task; how many rows it has is data, so that all share the program."""

    def one(seed):
        # A stream of its own: tasks that share inputs would meet the same images twice a step.
        other = jax.random.bits(
            jax.random.fold_in(jax.random.key(seed), MAX_STEPS + 2), (), "uint32"
        )
        own = jnp.where(benign, (other >> 1).astype(jnp.int32), seed)
        return jax.lax.map(
            lambda t: stream_indices(own, t, rows, batch_size=batch_size),
            begin + jnp.arange(DRAWN, dtype=jnp.int32),
        )

    return jax.vmap(one)(seeds) if batched else one(seeds)


def _batches(held: _Held, drawn: _Drawn, seed, t) -> Batches:
    """The rows of step t, whose numbers were drawn."""
    place = t % DRAWN

    def taken(batch: Batch, rows) -> Batch:
        return jax.tree.map(lambda leaf: leaf[rows], batch)

    harmful, benign = taken(held.train, drawn.harmful[place]), None
    if drawn.benign is not None:
        assert held.benign_train is not None
        benign = taken(held.benign_train, drawn.benign[place])
    # Not the keys that `batch_indices` draws from, nor that of `start_key`.
    steps_key = jax.random.fold_in(jax.random.key(seed), MAX_STEPS + 1)
    return Batches(harmful, benign, jax.random.fold_in(steps_key, t), t)
