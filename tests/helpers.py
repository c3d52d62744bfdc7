"""Matrices with a known spectrum, shared by the tests."""

import jax
import jax.numpy as jnp
import pytest


def thinned(values, keep=1):
    """Test parameters of one kind: the first `keep` run in the gate, all in the slow suite."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        if place >= keep
        else value
        for place, value in enumerate(values)
    ]


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
