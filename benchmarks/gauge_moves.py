"""Gauge moves of SmolLM2-135M-Instruct: what they and their canonical forms do to its logits.

Prints the largest change of a logit, and how far two canonical forms of one function are apart.

python benchmarks/gauge_moves.py
"""

from __future__ import annotations

import functools
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaximm.carriers import carrier_file
from jaximm.models import llama
from jaximm.models.llama import gauge

TEXT = (
    "The Treaty of Paris, signed in 1783, ended the American Revolutionary War. "
    "It was signed by the representatives of the King."
)
DIAGONAL = ("attention_norm", "mlp_norm", "neurons", "pairs")


def main() -> None:
    path = carrier_file(llama.SMOLLM2_135M)
    params, config, precision = llama.load_gguf(path)
    tokens = jnp.asarray(llama.load_tokenizer(path).encode(TEXT))[None]
    logits = jax.jit(llama.logits, static_argnums=2)
    before = logits(params, tokens, config)
    print(f"{precision}\n{tokens.size} tokens, logits up to {float(jnp.max(jnp.abs(before))):.1f}")

    def show(name: str, moved: gauge.Moved) -> None:
        change = jnp.max(jnp.abs(logits(moved.params, tokens, moved.config) - before))
        print(f"{name:32}{float(change):10.1e}", flush=True)

    drawn = functools.partial(gauge.random_gauge, 0, config)
    for name, spread, moves in (
        ("norms, neurons, pairs", 1e2, DIAGONAL),
        ("norms, neurons, pairs", 1e6, DIAGONAL),
        ("final norm", 1e6, ("final_norm",)),
        ("value and output heads", 1e1, ("values",)),
        ("value and output heads", 1e3, ("values",)),
    ):
        moved = gauge.apply(params, config, drawn(spread=spread, moves=moves))
        show(f"{name}, {spread:g}", moved)
    for scale in (0.01, 100.0):
        moved = gauge.apply(params, config, gauge.Gauge(residual=np.asarray(scale)))
        show(f"residual stream x {scale:g}", moved)
    everything = gauge.apply(params, config, drawn(spread=1e3, moves=gauge.KEEP_TIES))
    show("all that keep ties, 1000", everything)
    for norms in ("one", "columns"):
        started = time.perf_counter()
        ours = gauge.rebalance(params, config, norms=norms)
        seconds = time.perf_counter() - started
        theirs = gauge.rebalance(everything.params, config, norms=norms)
        show(f"rebalanced, {norms}", ours)
        apart = max(
            float(jnp.max(jnp.abs(theirs.params[path] - value)) / jnp.max(jnp.abs(value)))
            for path, value in ours.params.items()
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"  apart from that of the moved: {apart:.1e}; {seconds:.1f} s, {peak:.0f} MiB")


if __name__ == "__main__":
    main()
