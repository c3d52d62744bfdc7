"""Sums over rows that weigh: what Hessians of probes and Gram matrices are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaximm.linalg.arrays import (
    EMPTY,
    as_float,
    as_matrix,
    column_exponents,
    times_power_of_two,
)

CONVENTIONS = ("mean", "sum")
"""``"mean"``: H is an average over examples. ``"sum"``: n times that, damping included."""

Matvec = Callable[[Any], Any]
"""A linear map of one pytree (or one vector) to another of the same structure."""


def check_rows(features, convention: str) -> Array:
    """Features as a matrix; refuses what is none, and an unknown convention."""
    check_convention(convention)
    return as_matrix(features, name="features")


def check_convention(convention: str) -> None:
    """Refuses a name that is not in `CONVENTIONS`."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}.")


def divisor_of(convention: str, n: int) -> float:
    """What a sum over examples is divided by."""
    return float(n) if convention == "mean" else 1.0


def ridge_of(damping, convention: str, n: int, dtype) -> Array:
    """The multiple of the identity that ``damping`` stands for."""
    return jnp.asarray(damping, dtype) * (1.0 if convention == "mean" else float(n))


def in_one_dtype(*arrays: Array) -> tuple[Array, ...]:
    """The arrays in the widest of their dtypes."""
    dtype = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
    return tuple(array.astype(dtype) for array in arrays)


def as_vector(vector, length: int) -> Array:
    """What an operator is applied to."""
    if jnp.shape(vector) != (length,):
        raise ValueError(f"vector must have shape ({length},), got {jnp.shape(vector)}.")
    return as_float(vector, name="vector")


_BLOCK = 4096
"""Rows that are summed in one go. A float32 sum of 2^24 ones takes no further one, and BLAS adds up
one product after the other; block by block the rounding error is that of some thousand rows, and
only a block at a time is weighted."""


def _over_blocks(join: Callable[[Any, Any], Any], body: Callable[..., Any], *arrays: Array) -> Any:
    """``body(*arrays)`` of each block of rows, joined."""
    n, block = arrays[0].shape[0], max(_BLOCK, *(x.shape[-1] for x in arrays if x.ndim == 2))
    # A block is not shorter than wide: its sum is not larger than itself.
    whole = max(n - 1, 0) // block * block
    rest = body(*(x[whole:] for x in arrays))
    if whole == 0:
        return rest
    blocks = tuple(x[:whole].reshape(-1, block, *x.shape[1:]) for x in arrays)
    return lax.scan(lambda total, block: (join(total, body(*block)), None), rest, blocks)[0]


def sum_over_blocks(body: Callable[..., Any], *arrays: Array) -> Any:
    """The sum of ``body(*arrays)`` over blocks of rows. A derivative keeps the arrays alone: what
    is made of a row is made again."""
    return _over_blocks(jnp.add, jax.checkpoint(body), *arrays)


def matrix_product(left: Array, right: Array) -> Array:
    """left^T right, [n, a] and [n, b] to [a, b], of few rows."""
    return jnp.matmul(left.T, right, precision="highest")


def row_product(left: Array, right: Array) -> Array:
    """left^T right, [n, a] and [n, b] to [a, b]."""
    return sum_over_blocks(matrix_product, left, right)


_LEAST = -(2**28)
"""Exponent of what is zero beside any number."""


def no_empty(exponents: Array) -> Array:
    """0 for columns of zeros."""
    return jnp.where(exponents == EMPTY, 0, exponents)


def _halves(log_weights: Array) -> tuple[Array, Array]:
    """sqrt(weight) as a number between one and two, and a power of two: a weight may be no number
    of the dtype where weight times x^2 is one."""
    half = log_weights / 2
    whole = lax.stop_gradient(jnp.floor(half / math.log(2)))
    whole = jnp.where(jnp.isfinite(whole), jnp.maximum(whole, _LEAST), _LEAST)
    return jnp.exp(half - whole * math.log(2)), whole.astype(jnp.int32)


def in_two_units(matrix: Array, rows: Array, columns: Array) -> Array:
    """matrix_ij 2^(rows_i + columns_j)."""
    return times_power_of_two(matrix, rows[:, None] + columns[None, :])


Weigh = Callable[..., tuple[Any, ...]]
"""``weigh(block, *given)``: of a block of features [b, d], rows [b, p], the logarithms of their
weights [b] or None for ones, and what else `Curve` needs. It closes over no arrays."""

Curve = Callable[..., Array]
"""``curve(*others, change)``: of what else `Weigh` gave and a change of outputs [b, k], [b, k]."""


class Rows(NamedTuple):
    """Rows that a Hessian is a sum over, every column in a unit of its own: the largest entry is
    about one, so that squares and sums stay numbers, and no column is lost beside a larger one."""

    features: Float[Array, "n d"]
    weigh: Weigh
    given: tuple[Array | None, ...]
    units: Int[Array, "p"]  # exponents
    divisor: float


def rows_of(
    features: Array, weigh: Weigh, given: tuple[Array | None, ...], convention: str
) -> Rows:
    """Rows, in units that fit."""

    def largest(block):
        x, log_weights, *_ = weigh(block, *given)
        return column_exponents(x, 0 if log_weights is None else _halves(log_weights)[1])

    units = no_empty(_over_blocks(jnp.maximum, largest, lax.stop_gradient(features)))
    return Rows(features, weigh, given, units, divisor_of(convention, features.shape[0]))


def scaled_rows(
    weigh: Weigh, features: Float[Array, "b d"], units: Int[Array, "p"], *given: Array | None
) -> tuple[Array, ...]:
    """x_ij sqrt(weight_i) / 2^units_j [b, p], and the others of `weigh`."""
    x, log_weights, *others = weigh(features, *given)
    if log_weights is None:
        return times_power_of_two(x, -units[None, :]), *others
    roots, whole = _halves(log_weights)
    scaled = times_power_of_two(x, whole[:, None] - units[None, :]) * roots[:, None]
    return scaled, *others


def sum_over_rows(rows: Rows, body: Callable[..., Array]) -> Array:
    """The sum of ``body(scaled, *others)`` over blocks of rows."""
    return sum_over_blocks(
        lambda block: body(*scaled_rows(rows.weigh, block, rows.units, *rows.given)), rows.features
    )


def row_operator(rows: Rows, ridge: Array, outputs: int = 1, curve: Curve | None = None) -> Matvec:
    """v -> X^T curve(X v) / divisor + ridge v for v [p outputs]; without `curve`, X^T X v.

    Scaled rows are kept for all products. A derivative makes them again, block by block: its
    memory is that of the features.
    """
    source = (rows.features, rows.units, *rows.given)
    kept = lax.stop_gradient(scaled_rows(rows.weigh, *source))
    units = rows.units[:, None]

    def matvec(vector: Float[Array, "q"]) -> Float[Array, "q"]:
        vector = as_vector(vector, units.shape[0] * outputs)
        change = times_power_of_two(vector.reshape(-1, outputs), units)
        total = _sum_of_products(rows.weigh, curve, kept, source, change) / rows.divisor
        total = times_power_of_two(total, units).reshape(-1)
        total, vector, lam = in_one_dtype(total, vector, ridge)
        return total + lam * vector

    return matvec


def _product(curve: Curve | None, scaled: Array, *others: Array) -> Array:
    scaled, *rest, change = in_one_dtype(scaled, *others)
    image = jnp.matmul(scaled, change, precision="highest")
    return matrix_product(scaled, image if curve is None else curve(*rest, image))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sum_of_products(weigh, curve, kept, source, change):
    return sum_over_blocks(lambda *block: _product(curve, *block, change), *kept)


@_sum_of_products.defjvp
def _(weigh, curve, primals, tangents):
    def made_again(source, change):
        features, *others = source
        return sum_over_blocks(
            lambda block: _product(curve, *scaled_rows(weigh, block, *others), change), features
        )

    return jax.jvp(made_again, primals[1:], tangents[1:])
