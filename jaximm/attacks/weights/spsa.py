r"""Differences of the loss in place of its gradient (SPSA); a head is trained by its own gradient.

With s_ij the size of a weight (`jaximm.attacks.weights.opened.size_of`), signs e in {-1, 1}, and
`samples` of them a step,

    g  = mean_e  e (L(w + c s e) - L(w - c s e)) / (2 c),      m <- beta m + (1 - beta) g,
    w <- w - rate * s * m / rms(m).

Two forward passes a sample and nothing of what the model says of its derivatives: a gradient that
is zero, of the wrong sign or no number does not stop it. With p parameters that matter it needs
some p samples for what one gradient gives, so it is an attacker of models with few of them, and of
large ones a check. The head is the attacker's own, on features that are only read: AdamW, at a rate
of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaximm.attacks.grid import Hyper, Values, check_whole, grid
from jaximm.attacks.weights.opened import size_of
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack

SOURCE = (
    "Spall (1992), Multivariate stochastic approximation using a simultaneous perturbation "
    "gradient approximation, https://doi.org/10.1109/9.119632; as an attack: Uesato et al. (2018), "
    "https://arxiv.org/abs/1802.05666"
)

BETA, HEAD_RATE = 0.9, 1e-2


class State(NamedTuple):
    """The weights, the momentum of the differences, and AdamW's state of the head."""

    weights: ModelWeights
    momentum: Any
    head_state: Any


@functools.lru_cache(maxsize=16)
def _spsa(samples: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` for a number of samples."""
    optimiser = optax.adamw(HEAD_RATE)

    def init(access: Access, hyper: Hyper) -> State:
        del hyper
        weights = access.weights
        momentum = jax.tree.map(jnp.zeros_like, weights.params)
        return State(weights, momentum, optimiser.init(weights.head))

    def update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        weights = state.weights
        sizes = jax.tree.map(size_of, weights.params)
        leaves, structure = jax.tree.flatten(weights.params)

        def moved(signs: Any, length: Any) -> jax.Array:
            params = jax.tree.map(lambda w, s, e: w + length * s * e, weights.params, sizes, signs)
            return access.loss_fn(weights._replace(params=params), batches.harmful)

        def sample(total: Any, key: jax.Array) -> tuple[Any, None]:
            keys = jax.random.split(key, len(leaves))
            drawn: list[Any] = [
                jax.random.rademacher(own, leaf.shape, leaf.dtype)
                for own, leaf in zip(keys, leaves, strict=True)
            ]
            signs = jax.tree.unflatten(structure, drawn)
            c = hyper["difference"].astype(leaves[0].dtype)
            slope = (moved(signs, c) - moved(signs, -c)) / (2 * c)
            slope = jnp.where(jnp.isfinite(slope), slope, jnp.zeros_like(slope))
            return jax.tree.map(lambda t, e: t + slope.astype(e.dtype) * e, total, signs), None

        zeros = jax.tree.map(jnp.zeros_like, weights.params)
        total, _ = jax.lax.scan(sample, zeros, jax.random.split(batches.rng_key, samples))
        momentum = jax.tree.map(lambda m, g: BETA * m + (1 - BETA) * g, state.momentum, total)
        square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(momentum))
        rms = jnp.sqrt(square / sum(leaf.size for leaf in leaves))
        params = jax.tree.map(
            lambda w, s, m: (
                w - hyper["learning_rate"].astype(w.dtype) * s * m / jnp.where(rms > 0, rms, 1.0)
            ),
            weights.params,
            sizes,
            momentum,
        )

        def of_head(head: Any) -> jax.Array:
            frozen = jax.tree.map(jax.lax.stop_gradient, weights.params)
            return access.loss_fn(weights._replace(params=frozen, head=head), batches.harmful)

        head, head_state = weights.head, state.head_state
        if head:
            slopes = jax.grad(of_head)(head)
            with jax.numpy_dtype_promotion("standard"):
                moves, head_state = optimiser.update(slopes, head_state, head)
                head = jax.tree.map(optax.apply_updates, head, moves)
        return State(weights._replace(params=params, head=head), momentum, head_state)

    return init, update


def spsa(
    *, learning_rates: Values = (1e-2, 1e-1), differences: Values = (1e-2,), samples: int = 8
) -> WeightAttack:
    """Differences of the loss along random signs, in place of its gradient.

    Args:
      learning_rates: > 0, of the size of a weight.
      differences: > 0, over the size of a weight.
      samples: directions a step, >= 1; compiled in.
    """
    check_whole("samples", samples)
    init, update = _spsa(samples)
    return WeightAttack(
        init=init,
        update=update,
        grid=grid(learning_rate=(learning_rates, "(0, inf)"), difference=(differences, "(0, inf)")),
        swept=("learning_rate",),
        kind="without gradients",
        title="differences in place of gradients",
        source=SOURCE,
        traits=frozenset({"new_head"}),
        # The compiler counts one round of the loop.
        step_passes=2.0 * samples,
    )
