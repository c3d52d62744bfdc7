"""Layers whose inputs are kept: the rows of a site, whose second moments are a Kronecker factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaximm.models.flat import from_dotted
from jaximm.models.spec import StagedModule


class _Tap(nnx.Module):
    """A layer whose input is seen, in a module that lives for one trace only."""

    def __init__(
        self, layer: Callable[[jax.Array], jax.Array], see: Callable[[jax.Array], jax.Array]
    ):
        self.layer = layer
        self.see = see

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(self.see(x))


def tapped(
    module: StagedModule, site: str, offset: Float[Array, "rows d_in"] | None = None
) -> list[jax.Array]:
    """Replaces a layer by one that records its inputs into the list returned.

    An offset, of the form of `site_rows`, is added to them after that.
    """
    parent, name = _parent(module, site)
    inputs: list[jax.Array] = []

    def see(x):
        inputs.append(x)
        return x if offset is None else x + offset.reshape(x.shape).astype(x.dtype)

    if isinstance(name, int):
        parent[name] = _Tap(parent[name], see)
    else:
        setattr(parent, name, _Tap(getattr(parent, name), see))
    return inputs


def check_site(module: StagedModule, site: str) -> None:
    """Refuses a site whose input rows are no Kronecker factor.

    Raises:
      ValueError: no such layer, or one that is neither linear nor a plain 1 x 1 convolution.
    """
    try:
        parent, name = _parent(module, site)
        layer = parent[name] if isinstance(name, int) else getattr(parent, name)
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"there is no layer {site!r}: {error}.") from error
    linear = isinstance(layer, nnx.Linear)
    pointwise = (
        isinstance(layer, nnx.Conv)
        and all(side == 1 for side in jax.tree.leaves(layer.kernel_size))
        and layer.feature_group_count == 1
    )
    if not (linear or pointwise):
        raise ValueError(
            f"site {site!r} must be a linear or an ungrouped 1 x 1 convolution layer, whose input "
            f"rows are a Kronecker factor, got {type(layer).__name__}."
        )
    if linear:
        return
    # One number for all axes, one an axis, or two. With one kernel position a named padding is
    # none; strides would leave rows out, pads and dilations would add some.
    steps = jax.tree.leaves([layer.strides, layer.input_dilation])
    pads = [] if isinstance(layer.padding, str) else jax.tree.leaves(layer.padding)
    if any(step != 1 for step in steps) or any(pads):
        raise ValueError(
            f"site {site!r} must see each position of its input once, got strides {layer.strides}, "
            f"input dilation {layer.input_dilation} and padding {layer.padding!r}."
        )


def site_rows(record: list[jax.Array]) -> Float[Array, "rows d_in"]:
    """What a tapped layer saw, a row a position."""
    (x,) = record
    return x.reshape(-1, x.shape[-1])


def _parent(module: StagedModule, site: str) -> tuple[Any, str | int]:
    *front, last = from_dotted(site)
    parent: Any = module  # whatever the path leads through
    for part in front:
        parent = parent[part] if isinstance(part, int) else getattr(parent, part)
    return parent, last
