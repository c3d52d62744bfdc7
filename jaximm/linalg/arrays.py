"""How an array enters the numerics: as a JAX array, in a dtype that computes, at a scale that fits.

Every public function of `linalg`, `hessians`, `regularisers` begins here, in this order:

1. **`as_float`** makes a JAX array *first*. What NumPy holds in float64 is float32 once JAX has it
   and x64 is off; a tolerance taken from the dtype before that would belong to another arithmetic.
2. float16 and bfloat16 become float32: no LAPACK routine exists for them, and a mean over 70,000
   ones overflows in float16. The result is float32, which says so.
3. **`exponent_of` and `times_power_of_two`** split off a power of two before anything is squared.
   Multiplying by a power of two is exact while no entry leaves the normal numbers, so a result is
   that of the unscaled matrix to the bit, whatever its scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

Function = TypeVar("Function", bound=Callable[..., Any])


def computing_dtype(dtype) -> jnp.dtype:
    """float32 for float16, bfloat16 and what is shorter, `dtype` itself otherwise.

    >>> computing_dtype(jnp.bfloat16).name, computing_dtype(jnp.float32).name
    ('float32', 'float32')
    """
    return jnp.dtype("float32") if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def as_float(array, *, name: str = "matrix") -> Array:
    """`array` as a JAX array of a float dtype that computes.

    Args:
      array: a NumPy or JAX array of a float dtype, in either byte order. NumPy float64 becomes
        float32 while x64 is off, long double what float64 becomes.
      name: what error messages call it.

    Returns:
      A JAX array; float16 and bfloat16 as float32.

    Raises:
      ValueError: if the dtype is not a float dtype.
    """
    dtype = getattr(array, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = type(array).__name__ if dtype is None else dtype
        raise ValueError(f"{name} must be an array of float dtype, got {kind}; convert it first.")
    converted = jnp.asarray(_native(array))
    return converted.astype(computing_dtype(converted.dtype))


def _native(array):
    """A NumPy array in this machine's byte order, long double as float64: JAX takes no other."""
    if not isinstance(array, np.ndarray):
        return array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.astype(np.float64) if array.dtype == np.longdouble else array


def as_matrix(matrix, *, name: str = "matrix") -> Float[Array, "n d"]:
    """`as_float` of a non-empty (n, d) array; ValueError for anything else."""
    if jnp.ndim(matrix) != 2 or 0 in jnp.shape(matrix):
        raise ValueError(
            f"{name} must be a non-empty (n, d) array, got shape {jnp.shape(matrix)}; "
            "use jax.vmap for a batch."
        )
    return as_float(matrix, name=name)


def as_square(matrix, *, name: str = "matrix") -> Float[Array, "d d"]:
    """`as_matrix` of a square array; ValueError for anything else."""
    converted = as_matrix(matrix, name=name)
    if converted.shape[0] != converted.shape[1]:
        raise ValueError(f"{name} must be square (d, d), got shape {converted.shape}.")
    return converted


def exponent_of(array: Float[Array, "..."]) -> Int[Array, ""]:
    """e with 2^e <= largest |entry| < 2^(e + 1); 0 for zeros and where an entry is not finite.

    A constant under differentiation: scaling by it is a choice of units.

    >>> int(exponent_of(jnp.array([3.0, -5.0]))), int(exponent_of(jnp.zeros(2)))
    (2, 0)
    """
    largest = jnp.max(jnp.abs(lax.stop_gradient(array)))
    ordinary = jnp.isfinite(largest) & (largest > 0)
    integer, mantissa_bits, bias = _layout(largest.dtype)
    bits = lax.bitcast_convert_type(largest, integer)  # the sign is zero
    return jnp.where(ordinary, (bits >> mantissa_bits) - bias, 0).astype(jnp.int32)


EMPTY = -(2**29)
"""Exponent of a column of zeros: below that of all others, also once some are added up."""


def check_kind(value: Any, kind: type, name: str, source: str) -> None:
    """Refuses what is no result of another function, before one of its fields is asked for.

    Args:
      value: what came.
      kind: the named tuple that is expected.
      name: what error messages call it.
      source: the functions that give one.

    Raises:
      ValueError: it is something else.
    """
    if not isinstance(value, kind):
        came = "an array" if hasattr(value, "dtype") else type(value).__name__
        raise ValueError(f"{name} must be a {kind.__name__}, as {source} gives, got {came}.")


def check_function(value: Any, name: str) -> None:
    """Refuses what cannot be called, before anything is built of it.

    Raises:
      ValueError: it is no function.
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function, got {type(value).__name__}.")


def check_key(rng_key: Any) -> None:
    """Refuses what is no key of random numbers, an integer seed say.

    Raises:
      ValueError: it is no array.
    """
    if not isinstance(rng_key, jax.Array | np.ndarray):
        raise ValueError(
            f"rng_key must be a key, as `jax.random.key(0)` gives, got {type(rng_key).__name__}."
        )


def column_exponents(
    matrix: Float[Array, "n d"], shift: Int[Array, "n"] | int = 0
) -> Int[Array, "d"]:
    """`exponent_of` every column, row i of it times 2^shift_i; `EMPTY` for a column of zeros.

    >>> column_exponents(jnp.array([[4.0, 0.0], [3.0, 0.0]])).tolist() == [2, EMPTY]
    True
    """
    matrix = lax.stop_gradient(matrix)
    each = jax.vmap(jax.vmap(exponent_of))(matrix) + jnp.reshape(
        jnp.asarray(shift, jnp.int32), (-1, 1)
    )
    return jnp.max(jnp.where(matrix != 0, each, EMPTY), axis=0)


def _layout(dtype) -> tuple[jnp.dtype, int, int]:
    """The integer of the width of a float dtype, the bits of its fraction, its exponent's bias."""
    info = jnp.finfo(dtype)
    return jnp.dtype(f"int{info.bits}"), info.nmant, info.maxexp - 1


def _power_of_two(exponent: Int[Array, ""], dtype) -> Float[Array, ""]:
    """2^exponent from its bits (`jnp.ldexp` takes some thirty operations), clipped to normals."""
    integer, mantissa_bits, bias = _layout(dtype)
    stored = jnp.clip(exponent.astype(integer) + bias, 1, 2 * bias)
    return lax.bitcast_convert_type(stored << mantissa_bits, jnp.dtype(dtype))


def times_power_of_two(array: Float[Array, "..."], exponent: Int[Array, ""]) -> Float[Array, "..."]:
    """array * 2^exponent, exact while the result is a normal number; linear in `array`.

    In up to four factors: 2^exponent itself may leave the dtype where the result does not.

    >>> float(times_power_of_two(jnp.float32(2.0) ** 100, jnp.int32(-200))) == 2.0**-100
    True
    """
    # Multiples of a quarter are normal in every dtype as long as |exponent| is below four times the
    # largest one; sizes only grow or only shrink, so nothing is lost on the way.
    quarter = exponent >> 2  # rounded downwards
    small = _power_of_two(quarter, array.dtype)
    return array * small * small * small * _power_of_two(exponent - 3 * quarter, array.dtype)


def one_program(function: Function) -> Function:
    """A public function of arrays, compiled as one program where it is called with plain arrays.

    Without it every operation is dispatched by itself and every loop and branch is traced anew: a
    condition number of 40 x 6 takes 0.7 s a call, and 1 ms with it (`benchmarks/bench_eager.py`).
    Inside `jax.jit`, `jax.vmap` or `jax.grad` it is `function` itself.

    Arrays are arguments of the program. Python numbers and names are part of it, so the door still
    sees their values; another number is another compilation, unless it comes as an array. What
    JAX does not take goes to `function`, whose door names it.
    """

    @functools.wraps(function)
    def called(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        leaves = [_native(leaf) for leaf in leaves]
        is_array = tuple(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
        arrays = [leaf for leaf, one in zip(leaves, is_array, strict=True) if one]
        if not all(map(_is_plain, arrays)):
            return function(*args, **kwargs)
        others = [leaf for leaf, one in zip(leaves, is_array, strict=True) if not one]
        fixed = tuple((type(leaf), leaf) for leaf in others)  # 1, 1.0 and True are equal keys
        try:
            hash(fixed)
        except TypeError:
            return function(*args, **kwargs)
        return _program(function, structure, is_array, fixed)(arrays)

    return called  # pyrefly: ignore[bad-return]


def _is_plain(array) -> bool:
    """Whether a compiled program takes it as it is."""
    if isinstance(array, jax.Array):
        return not isinstance(array, Tracer)
    return array.dtype.kind in "biufc" or jnp.issubdtype(array.dtype, jnp.floating)


@functools.lru_cache(maxsize=1024)
def _program(function, structure, is_array, fixed):
    """The compiled function of the arrays alone."""

    def program(arrays):
        numbers, values = iter(fixed), iter(arrays)
        leaves = [next(values) if one else next(numbers)[1] for one in is_array]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return function(*args, **kwargs)

    program.__name__ = function.__name__
    return jax.jit(program)
