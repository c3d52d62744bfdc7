"""The linear backbone: rows are the features, and the neck after them is all that trains.

A table's backbone theta [d, d] is thus an ordinary model: nothing is frozen but the identity, and
``neck.kernel`` is theta.
"""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.spec import Layout, ModelSpec, Preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Rows as they are: a linear backbone is its neck.

    Attributes:
      input_shape: of one example; inputs [n, ...] of as many numbers are flattened.
    """

    input_shape: tuple[int, ...] = (79,)

    def __post_init__(self):
        if not self.input_shape or min(self.input_shape) < 1:
            raise ValueError(
                f"input_shape must be one or more sizes of at least 1, got {self.input_shape}."
            )


class Rows(nnx.Module):
    """One stage, "rows", without parameters."""

    stage_names = ("rows",)

    def __init__(self, config: LinearConfig):
        self.width = math.prod(config.input_shape)

    def run_stage(self, name: str, x: jax.Array) -> Float[Array, "n d"]:
        """The rows [n, d].

        Raises:
          ValueError: an unknown stage; inputs of another size.
        """
        if name not in self.stage_names:
            raise ValueError(f"unknown stage {name!r}; choose from {list(self.stage_names)}.")
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.width:
            raise ValueError(
                f"expected inputs [n, ...] of {self.width} numbers each, got {list(x.shape)}; set "
                "input_shape."
            )
        return x.reshape(x.shape[0], self.width)

    def classify(self, hidden: jax.Array, features: jax.Array) -> jax.Array:
        """There is no classifier.

        Raises:
          ValueError: always.
        """
        raise ValueError("a linear backbone has no classifier of its own; fit a head to it.")


LINEAR = ModelSpec(
    config=LinearConfig(),
    build=lambda config, rngs: Rows(config),
    width=79,
    preprocess=Preprocess(),
    layouts={"own": lambda config: Layout(())},
    source="a linear map of a table's rows; Zheng et al. (2025), https://arxiv.org/abs/2505.23760",
)
