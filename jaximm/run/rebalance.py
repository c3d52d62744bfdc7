"""A language model's folder in canonical weights: the same function, whatever gauge it came in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaximm.models import llama
from jaximm.models.llama import gauge

_PROBED = 32


class Rebalanced(NamedTuple):
    """What `rebalance` wrote.

    Attributes:
      path: the folder.
      precision: of the numbers that came in.
      change: of a logit at most, over random tokens.
      largest: logit there, in absolute value.
      spreads: largest over smallest factor of each move that was made, by its name; of head
        matrices, the largest condition number.
    """

    path: Path
    precision: str
    change: float
    largest: float
    spreads: dict[str, float]


def rebalance(source: Path, out: Path, *, norms: gauge.Norms = "one") -> Rebalanced:
    """Writes the canonical form (`jaximm.models.llama.gauge.rebalance`) of a model as a hub folder.

    Args:
      source: a folder of the Hugging Face hub, or a ``.gguf`` file, whose weights are dequantised.
      out: a new folder. Small files of a source folder (tokenizer, templates) go with it.
      norms: see there.

    Raises:
      ValueError: a source that cannot be read, with the file and the remedy; an `out` with weights.
    """
    source, out = Path(source), Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another --out.")
    loaded = llama.load(source)
    moved = gauge.rebalance(loaded.params, loaded.config, norms=norms)
    count = min(_PROBED, loaded.config.context)
    tokens = np.random.default_rng(0).integers(loaded.config.vocabulary, size=(1, count))
    before = _logits(loaded.params, jnp.asarray(tokens, jnp.int32), config=loaded.config)
    after = _logits(moved.params, jnp.asarray(tokens, jnp.int32), config=moved.config)
    like = source if source.is_dir() else None
    llama.save_folder(out, moved.params, moved.config, like=like)
    return Rebalanced(
        out,
        loaded.precision,
        float(jnp.max(jnp.abs(after - before))),
        float(jnp.max(jnp.abs(before))),
        gauge.spreads(moved.gauge),
    )


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, tokens, *, config):
    return llama.logits(params, tokens, config)
