"""Matrices with a known spectrum and lists of methods, shared by the tests."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
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


def damage(files: Sequence[Path], seed: int) -> set[Path]:
    """Damages a file, or swaps two: the files that changed. Five seeds are five kinds of damage."""
    rng = np.random.default_rng(seed)
    file, other = (files[rng.integers(len(files))] for _ in range(2))
    content, theirs = file.read_bytes(), other.read_bytes()
    place, length = int(rng.integers(max(len(content), 1))), int(rng.integers(1, 40))
    flipped = bytearray(content)
    flipped[place : place + 1] = bytes(byte ^ 1 << rng.integers(8) for byte in flipped[place:][:1])
    kinds = [bytes(flipped), content[:place], content[:place] + content[place + length :], b""]
    after = {file: [*kinds, theirs][seed // 3 % 5]}
    if seed // 3 % 5 == len(kinds):
        after[other] = content
    changed = {path for path, new in after.items() if path.read_bytes() != new}
    for path, new in after.items():
        path.write_bytes(new)
    return changed
