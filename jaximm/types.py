"""Shape letters and the containers that every floor of jaximm shares.

Shape letters, fixed here and used in every public signature:

=========  ==================================================
``n``      examples (rows)
``d_in``   width of the raw inputs
``d``      width of the features, ``f_theta: [n, d_in] -> [n, d]``
``k``      classes, or number of singular values kept
``p``      parameters
``m``      Krylov steps
=========  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax.tree_util import Partial
from jaxtyping import Array, Float

Params = Any
"""A pytree of arrays."""

Tree = TypeVar("Tree")
"""A pytree, and what is of the same structure and kind."""

AnyBatch = Any
"""A batch as a method or an attacker sees it: a pytree of arrays, rows first."""

Json = dict[str, Any]
"""A JSON object. Its keys are those of a schema in `jaximm.records`, or of who makes it."""

Fields = Mapping[str, Any]
"""Fields of a configuration as a user gave them; the class that they are for checks them."""

FeaturesFn = Callable[[Params, jax.Array], jax.Array]
"""``features_fn(params, inputs [n, d_in]) -> features [n, d]``, a plain pure function."""


class Batch(NamedTuple):
    """Rows of one task: inputs ``x`` [n, d_in] and targets ``y`` [n], or a tree of rows."""

    x: jax.Array
    y: Any


class PairedBatch(NamedTuple):
    """One batch of each task. The two may have different numbers of rows."""

    primary: Batch
    harmful: Batch


class Head(NamedTuple):
    """A linear map after features: logits = f @ kernel + bias; k = 1 for a real target."""

    kernel: Float[Array, "d k"]
    bias: Float[Array, "k"]

    def outputs(self, features: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """What the head makes of features."""
        return features @ self.kernel + self.bias[None, :]


State = Any
"""A NamedTuple of arrays of the method's own."""

Info = Any
"""What an update says of itself: a NamedTuple of scalars."""


class Immuniser(NamedTuple):
    """A method, as three pure functions.

    ``init(params, rng_key) -> state``; ``update(state, batch, rng_key) -> (state, info)``;
    ``finish(state) -> params``. Gradient methods work in ``update``; closed-form methods accumulate
    statistics in ``update`` and solve in ``finish``. A batch is a `PairedBatch`, or another
    NamedTuple of batches by name where the method asks for more of them.
    """

    init: Callable[[Params, jax.Array], State]
    update: Callable[[State, AnyBatch, jax.Array], tuple[State, Info]]
    finish: Callable[[State], Params]


def as_argument(fun: Callable | None) -> Any:
    """A function as an argument of compiled ones: what a `Partial` holds is data, not a constant.

    Two plain functions are one to `jax.jit` if they are equal. None stays None.
    """
    return fun if fun is None or isinstance(fun, Partial) else Partial(fun)
