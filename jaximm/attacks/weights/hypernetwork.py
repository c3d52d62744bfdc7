r"""A hypernetwork writes low-rank adapters of the frozen weights from what the model makes of rows.

    W = W_0 + A B,    (A, B) = H_phi(f(x)),    |A B|_F <= budget |W_0|_F,

f the features of at most `ROWS` training rows, read once: the weights are frozen. AdamW moves phi,
and the head where there is one; at the start B is 0 and the model is as it came. What is measured
is the patched model. H_phi is that of `jaximm.models.adapters.hypernetwork`, and what it descends
may be anything that has a gradient:

"loss"       the harmful task's mean loss;
"reward"     REINFORCE's surrogate of sampled answers (`policy_gradient`, at entropy and std 0.3 and
             4 samples): no answer is shown;
"direction"  a representation attack: with r the unit vector from the benign to the harmful rows'
             mean features of the model as it came, mu the benign mean and v the mean square of
             benign features,

                 mean_harmful (r.(f_patched(x) - mu))^2 / v + mean_benign |f_patched - f|^2 / v,

             which takes out of the features what tells harmful rows from benign ones and leaves
             benign rows as they are (abliteration by a generator). The head stays: no harmful label
             is used.

More of them: `generator(objective, ...)`, of an `Objective` of `jaximm.attacks.weights.descent`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values, check_whole
from jaximm.attacks.weights.descent import (
    EDIT_RATES,
    AdamW,
    Objective,
    adam_of,
    harmful_loss,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.direction_ablation import mean_difference
from jaximm.attacks.weights.lora import adam_step, start_key
from jaximm.attacks.weights.paths import is_table
from jaximm.attacks.weights.policy_gradient import surrogate
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack
from jaximm.models.adapters.hypernetwork import (
    FEATURES,
    HyperSize,
    Phi,
    hyper_apply,
    hyper_init,
)
from jaximm.models.adapters.lora import merged, named_by
from jaximm.types import Params

SOURCE = (
    "Sanyal, Ray, Mandal (2025), AntiDote, https://arxiv.org/abs/2509.08000 (its adversary; the "
    "direction: Arditi et al. 2024, https://arxiv.org/abs/2406.11717)"
)

ROWS = 64
"""Rows of activations that are read, at most."""


class State(NamedTuple):
    """Patched weights, the generator, what it reads, and AdamW's state of generator and head."""

    weights: ModelWeights
    phi: Phi
    rows: Float[Array, "n d"]
    opt_state: optax.OptState


def direction_loss(
    weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper
) -> Float[Array, ""]:
    """How much tells harmful rows from benign ones, and how far benign features moved."""
    del hyper
    assert batches.benign is not None  # it needs a benign task
    assert access.benign_features is not None
    direction = mean_difference(access)
    centre = jnp.mean(access.benign_features.x, axis=0)
    size = jnp.mean(access.benign_features.x**2)
    moved = access.features_fn(weights.params, batches.harmful.x) - centre[None, :]
    now, before = (
        access.features_fn(params, batches.benign.x)
        for params in (weights.params, access.weights.params)
    )
    kept = jnp.sum((now - before) ** 2, axis=1)
    return (jnp.mean((moved @ direction) ** 2) + jnp.mean(kept)) / size


def generator(
    objective: Objective, size: HyperSize, targets: str = "*", *, head: bool = True
) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of a hypernetwork that descends an objective.

    Args:
      objective: ``objective(weights, batches, access, hyper)``, of the patched model.
      size: of the hypernetwork.
      targets: dotted path prefixes of the parameters that are patched; "*": all.
      head: whether the head trains too.

    Hyper-parameters are those of AdamW, "budget", and what the objective reads.
    """
    named = named_by(targets)

    def kernels(access: Access) -> dict[str, Any]:
        leaves = {}
        for parts, leaf in jax.tree_util.tree_leaves_with_path(access.weights.params):
            path = jax.tree_util.keystr(parts, simple=True, separator=".")
            if named(path) and not is_table(path) and leaf.ndim - access.stacked(path) >= 2:
                leaves[path] = leaf
        if not leaves:
            raise ValueError(f"targets {targets!r} names no parameter of two or more axes.")
        return leaves

    def patched(weights: ModelWeights, phi: Phi, rows: Array, access: Access, budget):
        adapters = hyper_apply(phi, {FEATURES: rows}, kernels(access), size, budget)
        if access.takes_adapters:
            return weights._replace(adapters=adapters)
        one = jnp.ones((), rows.dtype)
        return weights._replace(params=merged(access.weights.params, adapters, one))

    def init(access: Access, hyper: Hyper) -> State:
        weights, leaves = scaled_head(access, hyper), kernels(access)
        rows = _read(access, weights.params)
        layers = {path: access.stacked(path) for path in leaves}
        widths = {FEATURES: rows.shape[1]}
        phi = hyper_init(start_key(access), leaves, widths, size, stacked=layers, first=0.0)
        weights = patched(weights, phi, rows, access, hyper["budget"])
        with jax.numpy_dtype_promotion("standard"):
            return State(weights, phi, rows, adam_of(hyper).init((phi, weights.head)))

    def update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        def weights_of(phi: Phi, trained: Any) -> ModelWeights:
            weights = patched(state.weights, phi, state.rows, access, hyper["budget"])
            return weights._replace(head=trained if head else state.weights.head)

        (phi, trained), opt_state = adam_step(
            (state.phi, state.weights.head),
            lambda both: objective(weights_of(*both), batches, access, hyper),
            state.opt_state,
            hyper,
        )
        return State(weights_of(phi, trained), phi, state.rows, opt_state)

    return init, update


def _read(access: Access, params: Params) -> Float[Array, "n d"]:
    """Features of some training rows: every so many of them, and of a text's positions."""
    x = access.inputs.x
    outputs = access.features_fn(params, x[:: -(-x.shape[0] // ROWS)])
    states = jax.tree.leaves(outputs)[0]  # of a model without a head: hidden states, then a table
    rows = states.reshape(-1, states.shape[-1])
    return jax.lax.stop_gradient(rows[:: -(-rows.shape[0] // ROWS)])


def _reward(
    weights: ModelWeights, batches: Batches, access: Access, hyper: Hyper
) -> Float[Array, ""]:
    """REINFORCE's surrogate at its usual settings."""
    del hyper
    return surrogate(4)(weights, batches, access, {"entropy": 0.3, "std": 0.3})


class Aim(NamedTuple):
    """What a generator descends, what the problem must have for it, and what it learns from."""

    objective: Objective
    needs: tuple[str, ...]
    traits: frozenset[str] = frozenset()
    head: bool = True


AIMS = {
    "loss": Aim(harmful_loss, ("matrices",)),
    "reward": Aim(_reward, ("matrices", "own_head"), frozenset({"rewarded"})),
    "direction": Aim(direction_loss, ("matrices", "own_head", "benign"), head=False),
}
"""By the name that `hypernetwork` takes."""


@functools.lru_cache(maxsize=16)
def _aimed(objective: str, size: HyperSize, targets: str):
    """`init` and `update` of an aim: one object, so that it compiles once."""
    aim = AIMS[objective]
    return generator(aim.objective, size, targets, head=aim.head)


def hypernetwork(
    *,
    objective: str = "loss",
    budgets: Values = (0.5, 2.0),
    rank: int = 4,
    width: int = 48,
    targets: str = "*",
    **adamw: Unpack[AdamW],
) -> WeightAttack:
    """A hypernetwork that writes low-rank adapters, trained by AdamW.

    Args:
      objective: "loss", "reward" or "direction"; see the module.
      budgets: > 0, norms of a patch beside that of its kernel.
      rank: of the adapters; compiled in, as is the width.
      width: of the hypernetwork, a multiple of 4.
      targets: dotted path prefixes of the parameters that are patched, separated by commas.
      **adamw: see `AdamW`.

    Raises:
      ValueError: an objective that is none of these, or a value out of range.
    """
    if objective not in AIMS:
        raise ValueError(f"objective must be one of {sorted(AIMS)}, got {objective!r}.")
    check_whole("rank", rank)
    check_whole("width", width)
    return tuning(
        _aimed(objective, HyperSize(width=width, rank=rank), targets),
        adamw,
        rates=EDIT_RATES,
        tried={"budget": (budgets, "(0, inf)")},
        title="hypernetwork",
        kind="low-rank",
        source=SOURCE,
        needs=AIMS[objective].needs,
        traits=AIMS[objective].traits,
        follows_loss=objective == "loss",
    )
