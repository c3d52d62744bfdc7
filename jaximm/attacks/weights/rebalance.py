"""The weights go to a canonical form of the same function, then AdamW or SGD.

A defence that moves weights and leaves the function as it is (a gauge,
`jaximm.models.llama.gauge`) shifts the rates at which a model trains and nothing else. There is one
canonical member, or a few, of all weights that a gauge leads to; whoever goes there first meets the
weights of the undefended model in their canonical form, whatever was done. It takes the weights
alone, no rows and no gradient.

Which forms there are, the problem says (`FineTuneProblem.canonical_fn`); each is a cell of the
grid, since which of them trains better depends on the model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaximm.attacks.grid import Hyper, Values, checked
from jaximm.attacks.weights.descent import AdamW, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.fine_tune import fine_tune_sgd, sgd_of
from jaximm.attacks.weights.problem import Access, FineTuneProblem, ModelWeights, WeightAttack

SOURCE = (
    "Neyshabur, Salakhutdinov, Srebro (2015), Path-SGD, https://arxiv.org/abs/1506.02617; the "
    "forms: jaximm.models.llama.gauge.rebalance"
)


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights in the form of the cell."""

    def chosen(*forms: jax.Array) -> jax.Array:
        leaf = forms[0]
        for number, other in enumerate(forms[1:], 1):
            leaf = jnp.where(hyper["form"] == number, other, leaf)
        return leaf

    params = jax.tree.map(chosen, *access.canonical)
    weights = access.weights._replace(params=params)
    return scaled_head(access._replace(weights=weights), hyper)


def form_flops(problem: FineTuneProblem) -> tuple[float, float]:
    """Of the dearest form, once."""
    return max(form.flops for form in problem.canonical), 0.0


# Built once: the same function objects each time, so that jit finds the compiled run again.
_ADAM = descent(adam_of, _start)
_SGD = descent(sgd_of, _start)

_INTERVAL = "whole [0, 1]"
_BOUNDS = (("form", 0.0), ("form", 1.0))


def rebalance(*, forms: Values = (0, 1), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW from a canonical form of the weights.

    Args:
      forms: 0: scales of norms are 1; 1: what follows a norm has rows of one length, and the spread
        lies in the scale.
      **adamw: see `AdamW`.
    """
    return tuning(
        _ADAM,
        adamw,
        rates=(1e-5, 1e-4, 1e-3, 1e-2),
        tried={"form": (forms, _INTERVAL)},
        bounds=_BOUNDS,
        title="rebalanced, then Adam",
        **_SAID,
    )


def rebalance_sgd(*, forms: Values = (0, 1), **options: Values) -> WeightAttack:
    """SGD with momentum from a canonical form of the weights.

    Args:
      forms: see `rebalance`.
      **options: those of `fine_tune_sgd`.
    """
    plain, (init, update) = fine_tune_sgd(**options), _SGD
    return dataclasses.replace(
        plain,
        init=init,
        update=update,
        title="rebalanced, then SGD",
        grid=tuple(
            {**cell, "form": float(form)}
            for cell in plain.grid
            for form in checked("form", forms, _INTERVAL)
        ),
        natural_bounds=(*plain.natural_bounds, *_BOUNDS),
        **_SAID,
    )


_SAID: dict[str, Any] = {
    "kind": "undo",
    "source": SOURCE,
    "knows": "that weights of one function are many",
    "traits": frozenset({"preconditions", "undoes_defence"}),
    "needs": ("canonical",),
    "solve_flops": form_flops,
}
