"""Sums over rows that weigh: what Hessians of probes and Gram matrices are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def _sum_over_blocks(body, *arrays: Array) -> Array:
    """The sum of ``body(None, arrays)[1]`` over blocks of rows; `body` as `lax.scan` wants it."""
    n, block = arrays[0].shape[0], max(_BLOCK, *(x.shape[-1] for x in arrays if x.ndim == 2))
    whole = n - n % block  # a block is not shorter than wide: its sum is not larger than itself
    rest = body(None, tuple(x[whole:] for x in arrays))[1]
    if whole == 0:
        return rest
    blocks = tuple(x[:whole].reshape(-1, block, *x.shape[1:]) for x in arrays)
    return jnp.sum(lax.scan(body, None, blocks)[1], axis=0) + rest


@jax.checkpoint
def _block_product(carry, block):
    left, right = block
    return carry, jnp.matmul(left.T, right, precision="highest")


@jax.checkpoint
def _weighted_block(carry, block):
    x, weights = block
    return carry, jnp.matmul(x.T, x * weights[:, None], precision="highest")


def row_product(left: Array, right: Array) -> Array:
    """left^T right, [n, a] and [n, b] to [a, b]."""
    return _sum_over_blocks(_block_product, left, right)


class Rows(NamedTuple):
    """X, its rows times the roots of their weights, every column in a unit of its own: squares and
    sums stay numbers, and no column is lost beside a larger one."""

    scaled: Float[Array, "n q"]  # X_ij sqrt(weight_i) / 2^exponents_j, the largest about one
    exponents: Int[Array, "q"]
    weights: Float[Array, "n"] | None  # more of them, of any sign, about one in size; None: ones
    divisor: float


def rows_of(features: Array, convention: str, log_weights: Array | None = None) -> Rows:
    """Features, weighted or not, in units that fit."""
    divisor = divisor_of(convention, features.shape[0])
    if log_weights is None:
        exponents = no_empty(column_exponents(features))
        return Rows(times_power_of_two(features, -exponents[None, :]), exponents, None, divisor)
    # A weight may be no number of the dtype where weight times x^2 is one: a power of two a row.
    half = log_weights / 2
    whole = lax.stop_gradient(jnp.floor(half / math.log(2)))
    whole = jnp.where(jnp.isfinite(whole), jnp.maximum(whole, _LEAST), _LEAST)
    roots = jnp.exp(half - whole * math.log(2))
    whole = whole.astype(jnp.int32)
    exponents = no_empty(column_exponents(features, whole))
    scaled = times_power_of_two(features, whole[:, None] - exponents[None, :]) * roots[:, None]
    return Rows(scaled, exponents, None, divisor)


_LEAST = -(2**28)
"""Exponent of what is zero beside any number."""


def no_empty(exponents: Array) -> Array:
    """0 for columns of zeros."""
    return jnp.where(exponents == EMPTY, 0, exponents)


def in_two_units(matrix: Array, rows: Array, columns: Array) -> Array:
    """matrix_ij 2^(rows_i + columns_j)."""
    return times_power_of_two(matrix, rows[:, None] + columns[None, :])


def gram_of(rows: Rows) -> Array:
    """X^T diag(weights) X / divisor."""
    x, weights = rows.scaled, rows.weights
    total = row_product(x, x) if weights is None else _sum_over_blocks(_weighted_block, x, weights)
    return in_two_units(total / rows.divisor, rows.exponents, rows.exponents)


def gram_operator(rows: Rows, ridge: Array) -> Matvec:
    """v -> X^T diag(weights) X v / divisor + ridge v."""
    p = rows.scaled.shape[1]

    def matvec(vector: Float[Array, "p"]) -> Float[Array, "p"]:
        x, v, lam = in_one_dtype(rows.scaled, as_vector(vector, p), ridge)
        image = jnp.matmul(x, times_power_of_two(v, rows.exponents), precision="highest")
        product = row_product(x, image[:, None])[:, 0] / rows.divisor
        return times_power_of_two(product, rows.exponents) + lam * v

    return matvec
