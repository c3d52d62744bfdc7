"""Gram matrices and target moments of rows that come in batches, on one device or many."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaximm.hessians.rows import check_convention, row_product
from jaximm.linalg.arrays import as_float, check_kind, computing_dtype, one_program


class GramState(NamedTuple):
    """Sums over the rows seen so far; the target fields are None where no targets are kept.

    Natural sums, so that states can be added up: they are inf where the sum does not fit the dtype,
    also where the mean would.
    """

    gram: Float[Array, "d d"]  # sum of x x^T
    feature_sum: Float[Array, "d"]
    count: Int[Array, ""]  # rows; int32, so fewer than 2^31 of them
    cross: Float[Array, "d ..."] | None  # sum of x y^T
    target_square: Float[Array, "..."] | None  # sum of y^2, per output
    target_sum: Float[Array, "..."] | None


class GramMoments(NamedTuple):
    """`GramState` over the number of rows (mean convention) or as it is (sum convention)."""

    gram: Float[Array, "d d"]
    cross: Float[Array, "d ..."] | None
    target_square: Float[Array, "..."] | None
    feature_mean: Float[Array, "d"]  # a mean in both conventions
    target_mean: Float[Array, "..."] | None  # likewise
    count: Int[Array, ""]


def gram_init(
    width: int, *, target_shape: tuple[int, ...] | None = None, dtype: DTypeLike | None = None
) -> GramState:
    """An empty `GramState`.

    Args:
      width: d, the number of features.
      target_shape: shape of one target: ``()`` for y [n], ``(k,)`` for y [n, k], None (default)
        to keep no target moments.
      dtype: of the sums, float32 for a half one; the default is JAX's default float. Every update
        rounds the running sums, so prefer few large updates, and float64 where the machine has it.

    Raises:
      ValueError: ``width`` not positive, or not a float dtype.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    dtype = jax.dtypes.canonicalize_dtype(float if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a float dtype, got {dtype}.")
    dtype = computing_dtype(dtype)
    targets = target_shape is not None
    return GramState(
        gram=jnp.zeros((width, width), dtype),
        feature_sum=jnp.zeros(width, dtype),
        count=jnp.zeros((), jnp.int32),
        cross=jnp.zeros((width, *target_shape), dtype) if targets else None,
        target_square=jnp.zeros(target_shape, dtype) if targets else None,
        target_sum=jnp.zeros(target_shape, dtype) if targets else None,
    )


@one_program
def gram_update(
    state: GramState,
    features: Float[Array, "n d"],
    targets: Float[Array, "n ..."] | None = None,
) -> GramState:
    """Add rows to the sums. Rows are cast to the dtype of the state before they are multiplied.

    Args:
      state: from `gram_init`; its dtype decides the precision.
      features: X [n, d]; n = 0 changes nothing.
      targets: y [n] or [n, k], if and only if the state keeps target moments.

    Raises:
      ValueError: `state` is no `GramState`; another width, targets missing or not asked for, or
        another number of rows.
    """
    check_kind(state, GramState, "state", "`gram_init`")
    dtype = state.gram.dtype
    if jnp.ndim(features) != 2 or jnp.shape(features)[1] != state.gram.shape[0]:
        raise ValueError(
            f"features must have shape [n, {state.gram.shape[0]}], got {jnp.shape(features)}."
        )
    if (targets is None) != (state.cross is None):
        raise ValueError(
            "targets must be given exactly when gram_init was given a target_shape; "
            f"the state {'keeps none' if state.cross is None else 'needs them'}."
        )
    n = jnp.shape(features)[0]
    features = as_float(features, name="features").astype(dtype)
    ones = jnp.ones((n, 1), dtype)
    state = state._replace(
        gram=state.gram + row_product(features, features),
        feature_sum=state.feature_sum + row_product(features, ones)[:, 0],
        count=state.count + n,
    )
    if targets is None or state.cross is None:
        return state
    targets = jnp.asarray(targets)
    if targets.shape != (n, *state.cross.shape[1:]):
        raise ValueError(
            f"targets must have shape {(n, *state.cross.shape[1:])}, got {targets.shape}."
        )
    targets = targets.astype(dtype)  # class numbers too: they are exact
    flat = targets.reshape(n, math.prod(targets.shape[1:]))
    shape = targets.shape[1:]
    assert state.target_square is not None  # gram_init sets all three or none
    assert state.target_sum is not None
    return state._replace(
        cross=state.cross + row_product(features, flat).reshape(-1, *shape),
        target_square=state.target_square + row_product(flat**2, ones)[:, 0].reshape(shape),
        target_sum=state.target_sum + row_product(flat, ones)[:, 0].reshape(shape),
    )


@one_program
def gram_merge(first: GramState, second: GramState) -> GramState:
    """The sums over the rows of both, which must keep the same things in the same dtype.

    Raises:
      ValueError: one is no `GramState`; different widths, target shapes or dtypes.
    """
    check_kind(first, GramState, "first", "`gram_init`")
    check_kind(second, GramState, "second", "`gram_init`")
    shapes = [
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] for state in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the two states do not fit together: {shapes[0]} and {shapes[1]}.")
    return jax.tree.map(jnp.add, first, second)


# Rows are counted in float digits of base 2^12 on the wire: exact in float32 for 2^12 devices.
_DIGIT_BITS = 12


def psum_gram(state: GramState, axis_name: str) -> GramState:
    """The sums over the rows of all devices, with exactly one ``lax.psum``.

    For use inside ``jax.shard_map`` or ``jax.pmap``, after each device has updated a state of its
    own with its own rows; do it once at the end, not after each batch, or rows are counted twice.
    The state travels as one vector, the count as three digits that float32 holds exactly.

    Args:
      state: this device's sums.
      axis_name: the mesh or pmap axis.

    Returns:
      The total, the same on every device.

    Raises:
      ValueError: `state` is no `GramState`.
    """
    check_kind(state, GramState, "state", "`gram_init`")
    mask = (1 << _DIGIT_BITS) - 1
    digits = jnp.stack([(state.count >> (_DIGIT_BITS * i)) & mask for i in range(3)])
    sums = state._replace(count=None)  # pyrefly: ignore[bad-argument-type]
    flat, unravel = ravel_pytree(sums)
    total = lax.psum(jnp.concatenate([flat, digits.astype(flat.dtype)]), axis_name)
    digits = total[-3:].astype(state.count.dtype)
    count = digits[0] + (digits[1] << _DIGIT_BITS) + (digits[2] << (2 * _DIGIT_BITS))
    return unravel(total[:-3])._replace(count=count)


@one_program
def gram_finalise(
    state: GramState,
    *,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> GramMoments:
    r"""Moments of the rows seen: ``gram`` is then the l2-probe Hessian, as `l2_probe_hessian`.

    Args:
      state: the sums.
      convention: ``"mean"`` or ``"sum"``, for ``gram``, ``cross`` and ``target_square``.
      damping: added to the diagonal of ``gram``, in units of the mean convention.

    Returns:
      `GramMoments`; NaN in what is divided by the count where no row has been seen.

    Raises:
      ValueError: `state` is no `GramState`; an unknown convention.
    """
    check_kind(state, GramState, "state", "`gram_init`")
    check_convention(convention)
    dtype = state.gram.dtype
    count = state.count.astype(dtype)
    mean = convention == "mean"
    ridge = jnp.asarray(damping, dtype) * (1 if mean else count)

    def moment(total):
        return total / count if mean and total is not None else total

    return GramMoments(
        gram=moment(state.gram) + ridge * jnp.eye(state.gram.shape[0], dtype=dtype),
        cross=moment(state.cross),
        target_square=moment(state.target_square),
        feature_mean=state.feature_sum / count,
        target_mean=None if state.target_sum is None else state.target_sum / count,
        count=state.count,
    )
