r"""A usage key: hidden axes in secret coordinates, so that the model is of use with the key alone.

Around a non-linearity s, y = s(x W_in + b) W_out, with two independent Q, R from a secret seed,

    released W_in Q, b Q, R^T W_out,    Q and R orthogonal ("rotation"), or permutations

Two, since one would not do: s commutes with a permutation, and relu(z) = (z + |z|) / 2, of which
the linear half passes Q and Q^T unharmed. With R = Q, digits of ten classes behind one locked layer
of 24 units were still told at .36 on the mean of 40 wrong rotations and no key, up to .64; with
two, at chance (.09).

With the key the model is what it was (to rounding for a rotation, to the last bit for a
permutation): ``features_fn(unlock(locked, key), inputs)``. Without it its outputs are of no use.

What may be claimed: unusable without the key until re-trained. The key stops *use*; it does not
stop training. Whoever holds the locked weights tunes them as they are, and on small models learns
around a permutation in as many steps as any; whoever has some of the original's outputs, or another
copy of the weights, solves for the key; a permutation hides the order of units and nothing of them.
128 bits of seed say how long guessing takes, through a generator that is no cryptographic one. Such
locks are often described as a partition of the parameters that gradients cannot reach without a
key; whoever owns the weights owns their gradient.

Ours; the permutation after CoreGuard (Li et al. 2024, https://arxiv.org/abs/2410.13903), whose
first permutation is done in trusted hardware: there is none here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaximm.types import FeaturesFn

FLAVOURS = ("rotation", "permutation")


class HiddenAxis(NamedTuple):
    """A hidden axis by the paths of what meets there."""

    into: str  # a matrix [..., width]
    reads: str  # the matrix [width, ...] that is applied after the non-linearity
    bias: str | None = None  # [width], added before the non-linearity


class Key(NamedTuple):
    """What is kept back: an axis two matrices [width, width], or two orders [width]."""

    flavour: str
    secrets: tuple[tuple[np.ndarray, np.ndarray], ...]


def make_key(
    seed: int,
    params: Mapping[str, Array],
    axes: Sequence[HiddenAxis],
    flavour: Literal["rotation", "permutation"] = "rotation",
) -> Key:
    """The key of a secret seed; the same for the same seed, and nothing of it is in the parameters.

    Args:
      seed: in [0, 2^128): draw it with ``secrets.randbits(128)``.
      params: arrays by dotted path, for the widths.
      axes: the axes that are locked.
      flavour: "rotation" (QR of a Gaussian, float64) or "permutation".

    Raises:
      ValueError: a seed out of range, another flavour, no axes, or paths whose widths do not meet.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour must be one of {FLAVOURS}, got {flavour!r}.")
    if not 0 <= seed < 2**128:
        raise ValueError(f"seed must be in [0, 2^128), got {seed}.")
    if not axes:
        raise ValueError("a lock needs one hidden axis at least, got none.")
    draw, secrets = np.random.default_rng(seed), []
    for axis in axes:
        width = _width(params, axis)
        one = draw.permutation if flavour == "permutation" else functools.partial(_rotation, draw)
        secrets.append((one(width), one(width)))
    return Key(flavour, tuple(secrets))


def lock(params: Mapping[str, Array], key: Key, axes: Sequence[HiddenAxis]) -> dict[str, Array]:
    """The released parameters: the same paths and shapes.

    Raises:
      ValueError: a key of other axes.
    """
    return _turned(params, key, axes, inverse=False)


def unlock(locked: Mapping[str, Array], key: Key, axes: Sequence[HiddenAxis]) -> dict[str, Array]:
    """The parameters that were locked, with their key; with another one others of no use.

    Raises:
      ValueError: a key of other axes.
    """
    return _turned(locked, key, axes, inverse=True)


def authorised(features_fn: FeaturesFn, key: Key, axes: Sequence[HiddenAxis]) -> FeaturesFn:
    """What a key holder calls: ``(locked, inputs) -> features``; key and weights meet inside."""
    return lambda locked, inputs: features_fn(unlock(locked, key, axes), inputs)


def _turned(
    params: Mapping[str, Array], key: Key, axes: Sequence[HiddenAxis], *, inverse: bool
) -> dict[str, Array]:
    found = [before.shape[0] for before, _ in key.secrets]
    widths = [_width(params, axis) for axis in axes]
    if found != widths:
        raise ValueError(f"the key is of axes of widths {found}, the model's are {widths}.")
    turned = dict(params)
    times = _ordered if key.flavour == "permutation" else _rotated
    for axis, (before, behind) in zip(axes, key.secrets, strict=True):
        turned[axis.into] = times(turned[axis.into], before, inverse)
        turned[axis.reads] = times(turned[axis.reads].T, behind, inverse).T
        if axis.bias is not None:
            turned[axis.bias] = times(turned[axis.bias], before, inverse)
    return turned


def _rotation(draw: np.random.Generator, width: int) -> np.ndarray:
    """Orthogonal, of the uniform distribution."""
    q, r = np.linalg.qr(draw.standard_normal((width, width)))
    return q * np.sign(np.diag(r))


def _rotated(leaf: Array, q: np.ndarray, inverse: bool) -> Array:
    """The last axis times q or its transpose, in the leaf's own float."""
    times = jnp.asarray(q.T if inverse else q, leaf.dtype)
    return jnp.matmul(leaf, times, precision=lax.Precision.HIGHEST)


def _ordered(leaf: Array, order: np.ndarray, inverse: bool) -> Array:
    """The last axis in another order, or back."""
    return leaf[..., np.argsort(order) if inverse else order]


def _width(params: Mapping[str, Array], axis: HiddenAxis) -> int:
    missing = [path for path in axis if path is not None and path not in params]
    if missing:
        raise ValueError(f"no parameter {missing[0]!r}; choose from {sorted(params)}.")
    width = params[axis.into].shape[-1]
    shapes = {path: params[path].shape for path in axis if path is not None}
    meets = params[axis.reads].ndim == 2 and params[axis.reads].shape[0] == width
    if not meets or (axis.bias is not None and params[axis.bias].shape != (width,)):
        raise ValueError(
            "a hidden axis is the last of `into`, the first of a matrix `reads` and that of "
            f"`bias`, got shapes {shapes}."
        )
    return width
