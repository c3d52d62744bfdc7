"""A tiny decoder, and rows of tokens for it."""

import jax
import jax.numpy as jnp
import numpy as np

from jaximm.models.llama import LlamaConfig, init
from jaximm.objectives import TokenRows
from jaximm.types import Batch

T = 7
CONFIG = LlamaConfig(
    vocabulary=64, width=16, layers=2, heads=4, kv_heads=2, head_width=4, hidden=24, tied=True
)


def params(seed=0, dtype=jnp.float64):
    """Random parameters whose norms are not all ones."""
    found = init(jax.random.key(seed), CONFIG, dtype=dtype)
    rng = np.random.default_rng(seed)
    return {
        path: value * jnp.asarray(1 + 0.1 * rng.normal(size=value.shape), dtype)
        for path, value in found.items()
    }


def rows(n=4, seed=0):
    """Texts of a pattern that can be learned, of which unequal numbers of tokens count."""
    rng = np.random.default_rng(seed)
    texts = (rng.integers(0, 64, (n, 1)) + 3 * np.arange(T + 1)) % 64
    mask = np.arange(T) < np.resize([T, 3, 1, 5], n)[:, None]
    x, y = (jnp.asarray(part, jnp.int32) for part in (texts[:, :-1], texts[:, 1:]))
    return Batch(x, TokenRows(y, jnp.asarray(mask)))


def answers(n):
    """Prompts of one token, and two tokens to answer, one of eight each."""
    asked = 8 + jnp.arange(n, dtype=jnp.int32)
    texts = jnp.stack([asked, asked % 8, (asked + 3) % 8], axis=1)
    mask = jnp.array([True, True])[None].repeat(n, axis=0)
    return Batch(texts[:, :-1], TokenRows(texts[:, 1:], mask))
