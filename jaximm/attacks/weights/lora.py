r"""LoRA: low-rank adapters on the weights.

    W = W_0 + (alpha / rank) A B,    A [in, rank] ~ N(0, 1 / in),  B [rank, out] = 0  at the start.

Every parameter of two or more axes that `targets` names has its adapter (`jaximm.models.adapters`).
Vectors are frozen, the head trains fully, and AdamW moves A, B and the head. A problem whose model
takes adapters beside its weights gets them so; elsewhere they are merged after every step, and the
weights that are measured are the merged ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import optax

from jaximm.attacks.grid import MAX_STEPS, Hyper, Values, check_whole
from jaximm.attacks.weights.descent import AdamW, adam_of, scaled_head, tuning
from jaximm.attacks.weights.paths import paths_of
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack
from jaximm.models.adapters.lora import Adapters, merged, named_by, scaled, start
from jaximm.types import Head

SOURCE = (
    "Hu et al. (2021), LoRA: Low-rank adaptation of large language models, "
    "https://arxiv.org/abs/2106.09685"
)


class State(NamedTuple):
    """Adapted weights, adapters by path, and AdamW's state of adapters and head."""

    weights: ModelWeights
    factors: Adapters
    opt_state: Any


def start_key(access: Access) -> jax.Array:
    """A key of the seed that no step draws."""
    return jax.random.fold_in(jax.random.key(access.seed), MAX_STEPS)


@functools.lru_cache(maxsize=16)
def _lora(rank: int, targets: str) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of a rank and a choice of parameters."""
    named = named_by(targets)

    def adapted(weights: ModelWeights, factors: Adapters, access: Access, scale) -> ModelWeights:
        if access.takes_adapters:
            return weights._replace(adapters=scaled(factors, scale))
        return weights._replace(params=merged(access.weights.params, factors, scale))

    def init(access: Access, hyper: Hyper) -> State:
        weights = scaled_head(access, hyper)

        def chosen(path: str, leaf: Any) -> bool:
            if access.takes_adapters and not path.endswith(".kernel"):
                return False  # tables are looked up, not multiplied with
            return named(path) and leaf.ndim - access.stacked(path) >= 2

        key = start_key(access)
        factors = start(weights.params, chosen, rank, key, stacked=access.stacked)
        if not factors:
            raise ValueError(
                f"targets {targets!r} names no parameter of two or more axes; parameters are "
                f"{paths_of(weights.params)}."
            )
        if access.takes_adapters:
            weights = adapted(weights, factors, access, hyper["alpha"] / rank)
        with jax.numpy_dtype_promotion("standard"):
            return State(weights, factors, adam_of(hyper).init((factors, weights.head)))

    def update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        def weights_of(factors: Adapters, head: Head) -> ModelWeights:
            weights = adapted(state.weights, factors, access, hyper["alpha"] / rank)
            return weights._replace(head=head)

        def objective(trained):
            return access.loss_fn(weights_of(*trained), batches.harmful)

        trained, opt_state = adam_step(
            (state.factors, state.weights.head), objective, state.opt_state, hyper
        )
        return State(weights_of(*trained), trained[0], opt_state)

    return init, update


def adam_step(
    trained: Any, objective: Callable[[Any], jax.Array], opt_state: Any, hyper: Hyper
) -> tuple[Any, Any]:
    """One step of AdamW on whatever tree is trained: that tree, and the optimiser's state."""
    slopes = jax.grad(objective)(trained)
    # Adam divides by 1 - b^count, a float to the power of an integer: not strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = adam_of(hyper).update(slopes, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state


def lora(
    *, rank: int = 4, alphas: Values = (8.0,), targets: str = "*", **adamw: Unpack[AdamW]
) -> WeightAttack:
    """Low-rank adapters, trained by AdamW.

    Args:
      rank: of every adapter, >= 1; compiled in.
      alphas: > 0; the adapter counts alpha / rank times. Twice the rank is the usual choice.
      targets: dotted path prefixes of the parameters that have an adapter, by whole components,
        separated by commas: "blocks.11.attention,neck"; "*" is all of them.
      **adamw: see `AdamW`.
    """
    check_whole("rank", rank)
    return tuning(
        _lora(rank, targets),
        adamw,
        tried={"alpha": (alphas, "(0, inf)")},
        title="LoRA",
        kind="low-rank",
        source=SOURCE,
        traits=frozenset({"plain_user"}),
        needs=("matrices",),
    )
