r"""LoRA: low-rank adapters on the weights, merged into them after every step.

    W = W_0 + (alpha / rank) A B,    A [in, rank] ~ N(0, 1 / in),  B [rank, out] = 0  at the start.

Every parameter of two or more axes that `targets` names has its adapter; a convolution kernel is
the matrix [all axes but the last, out]. Vectors are frozen, the head trains fully, and AdamW moves
A, B and the head. The weights that are measured are the merged ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaximm.attacks.grid import MAX_STEPS, Hyper, Values, check_whole
from jaximm.attacks.weights.descent import AdamW, adam_of, scaled_head, tuning
from jaximm.attacks.weights.paths import paths_of
from jaximm.attacks.weights.problem import Access, Batches, ModelWeights, WeightAttack
from jaximm.types import Head

SOURCE = (
    "Hu et al. (2021), LoRA: Low-rank adaptation of large language models, "
    "https://arxiv.org/abs/2106.09685"
)


class Factors(NamedTuple):
    """An adapter of one parameter: A and B."""

    a: Float[Array, "in rank"]
    b: Float[Array, "rank out"]


class State(NamedTuple):
    """Merged weights, adapters by path, and AdamW's state of adapters and head."""

    weights: ModelWeights
    factors: dict[str, Factors]
    opt_state: Any


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[in, out] of a parameter: all axes but the last, and the last; a vector is one column.

    >>> matrix_shape((3, 3, 8, 16)), matrix_shape((8, 16)), matrix_shape((5,)), matrix_shape(())
    ((72, 16), (8, 16), (5, 1), (1, 1))
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def merged(params: Any, factors: Mapping[str, Factors], scale: Any) -> Any:
    """Parameters plus `scale` A B, for each path that has an adapter."""

    def merge(path, leaf):
        found = factors.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if found is None:
            return leaf
        return leaf + scale * jnp.matmul(found.a, found.b).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(merge, params)


def start_key(access: Access) -> jax.Array:
    """A key of the seed that no step draws."""
    return jax.random.fold_in(jax.random.key(access.seed), MAX_STEPS)


def starting_factors(
    params: Any, chosen: Callable[[str, Any], bool], rank: int, rng_key: jax.Array
) -> dict[str, Factors]:
    """Adapters of the chosen parameters, A ~ N(0, 1 / in) and B = 0.

    Args:
      params: the parameters.
      chosen: ``chosen(path, leaf)``.
      rank: columns of A.
      rng_key: parameter i, in the order of the tree, draws from this folded with i.
    """
    factors = {}
    for i, (path, leaf) in enumerate(zip(paths_of(params), jax.tree.leaves(params), strict=True)):
        if not chosen(path, leaf):
            continue
        rows, columns = matrix_shape(leaf.shape)
        draw = jax.random.normal(jax.random.fold_in(rng_key, i), (rows, rank), leaf.dtype)
        factors[path] = Factors(draw / math.sqrt(rows), jnp.zeros((rank, columns), leaf.dtype))
    return factors


def _patterns(targets: str) -> list[str]:
    return [part.strip() for part in targets.split(",") if part.strip()]


@functools.lru_cache(maxsize=16)
def _lora(rank: int, targets: str) -> tuple[Callable[..., State], Callable[..., State]]:
    """`init` and `update` of a rank and a choice of parameters."""
    patterns = _patterns(targets)

    def chosen(path: str, leaf: Any) -> bool:
        named = any(part in ("*", path) or path.startswith(part + ".") for part in patterns)
        return named and leaf.ndim >= 2

    def init(access: Access, hyper: Hyper) -> State:
        weights = scaled_head(access, hyper)
        factors = starting_factors(weights.params, chosen, rank, start_key(access))
        if not factors:
            raise ValueError(
                f"targets {targets!r} names no parameter of two or more axes; parameters are "
                f"{paths_of(weights.params)}."
            )
        with jax.numpy_dtype_promotion("standard"):
            return State(weights, factors, adam_of(hyper).init((factors, weights.head)))

    def update(state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
        def weights_of(factors: dict[str, Factors], head: Head) -> ModelWeights:
            params = merged(access.weights.params, factors, hyper["alpha"] / rank)
            return state.weights._replace(params=params, head=head)

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
    if not _patterns(targets):
        raise ValueError(
            f'targets must be "*" or dotted prefixes separated by commas, got {targets!r}.'
        )
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
