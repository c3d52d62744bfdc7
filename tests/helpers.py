"""Matrices with a known spectrum and lists of methods, shared by the tests."""

import jax
import jax.numpy as jnp
import pytest

from jaximm.immunisers import REGISTRY, about


def thinned(values, keep=1):
    """Values of one parameter: the first `keep` run in the gate, the others in the slow suite."""
    return [
        pytest.param(value, marks=pytest.mark.slow) if place >= keep else value
        for place, value in enumerate(values)
    ]


def thinned_rows(rows, keep=1):
    """`thinned` of several parameters at once: a tuple each."""
    return [
        pytest.param(*row, marks=pytest.mark.slow) if place >= keep else row
        for place, row in enumerate(rows)
    ]


METHODS_OF_NUMBERS = sorted(
    name
    for name in REGISTRY
    if about(name).traits.isdisjoint({"needs_harmful_head", "needs_classes"})
)
"""Methods that also take targets that are numbers."""


def orthogonal(size: int, key: jax.Array, dtype=jnp.float64) -> jax.Array:
    """A random orthogonal [size, size] matrix."""
    return jnp.linalg.qr(jax.random.normal(key, (size, size), dtype))[0]


def psd_with_spectrum(values, key: jax.Array) -> jax.Array:
    """A symmetric matrix with the given eigenvalues and a random eigenbasis."""
    values = jnp.asarray(values)
    basis = orthogonal(values.shape[0], key, values.dtype)
    return (basis * values[None, :]) @ basis.T


def matrix_with_spectrum(values, n: int, d: int, key: jax.Array) -> jax.Array:
    """An [n, d] matrix with the given singular values (at most min(n, d) of them)."""
    values = jnp.asarray(values)
    left = orthogonal(n, jax.random.fold_in(key, 0), values.dtype)[:, : values.shape[0]]
    right = orthogonal(d, jax.random.fold_in(key, 1), values.dtype)[:, : values.shape[0]]
    return (left * values[None, :]) @ right.T
