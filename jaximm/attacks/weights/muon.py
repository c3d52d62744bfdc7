"""Muon: the momentum of every matrix, orthogonalised, is the direction; AdamW for the rest.

    M <- beta M + (1 - beta) G,      W <- W - rate * 0.2 sqrt(max(in, out)) * U V^T,   M ~ U S V^T,

by ten Newton-Schulz iterations (optax.contrib.muon, Nesterov momentum of 0.95). Every parameter
of two or more axes is the matrix [all axes but the last, out], each layer's alone where layers are
stacked. Vectors, tables that are looked up, and the head go by AdamW with Nesterov momentum at the
same rate, which compares with that of Adam: 0.2 sqrt(max(in, out)) gives a step the root mean
square that Adam's has.

Orthogonalised, a direction does not care how badly scaled a gradient is from the left or the right,
which is a defence's hope where it makes the features ill-conditioned. An iteration lifts a small
singular value by at most 3.44: ten of them by 2e5, the usual five by 500, with which a direction at
a ratio of 1e-4 stayed at 0.02 of the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Unpack

import jax
import optax
import optax.contrib

from jaximm.attacks.grid import Hyper, check_whole
from jaximm.attacks.weights.descent import (
    AdamW,
    State,
    by_path,
    descent,
    harmful_loss,
    scaled_head,
    tuning,
)
from jaximm.attacks.weights.paths import is_table
from jaximm.attacks.weights.problem import Access, ModelWeights, WeightAttack

SOURCE = (
    "Jordan et al. (2024), Muon: An optimizer for hidden layers in neural networks, "
    "https://kellerjordan.github.io/posts/muon/; Liu et al. (2025), Muon is scalable for LLM "
    "training, https://arxiv.org/abs/2502.16982"
)

_ROOT_MEAN_SQUARE = 0.2  # of Adam's steps, as Liu et al. measured it


def _dimensions(stacked: Callable[[str], int], weights: ModelWeights) -> ModelWeights:
    """Which axes of a parameter are inputs and outputs; None: AdamW."""

    def axes(parts, leaf):
        path = jax.tree_util.keystr(parts, simple=True, separator=".")
        layers, last = stacked(path), leaf.ndim - 1
        if last - layers < 1 or is_table(path):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(layers, last)), (last,))

    none = jax.tree.map(lambda _: None, weights)
    return none._replace(params=jax.tree_util.tree_map_with_path(axes, weights.params))


def _muon(iterations: int, hyper: Hyper, access: Access) -> optax.GradientTransformation:
    return optax.contrib.muon(
        hyper["learning_rate"],
        ns_steps=iterations,
        weight_decay=hyper["weight_decay"],
        adam_weight_decay=hyper["weight_decay"],
        consistent_rms=_ROOT_MEAN_SQUARE,
        muon_weight_dimension_numbers=functools.partial(_dimensions, access.stacked),
    )


# Built once: the same function objects each time, so that jit finds the compiled run again.
@functools.lru_cache(maxsize=16)
def _functions(iterations: int) -> tuple[Callable[..., State], Callable[..., State]]:
    optimiser_of = functools.partial(_muon, iterations)
    return descent(optimiser_of, scaled_head, harmful_loss, by_path(lambda _: True))


def muon(*, iterations: int = 10, **adamw: Unpack[AdamW]) -> WeightAttack:
    """Muon on matrices, AdamW on vectors and the head.

    Args:
      iterations: of Newton and Schulz, >= 1; compiled in.
      **adamw: see `AdamW`.
    """
    check_whole("iterations", iterations)
    return tuning(
        _functions(iterations),
        adamw,
        title="Muon",
        kind="preconditioned",
        source=SOURCE,
        traits=frozenset({"preconditions"}),
    )
