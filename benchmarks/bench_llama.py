"""A training step of SmolLM2-135M's shape: seconds, seconds to compile, peak memory of the process.

Random float32 weights (the numbers do not matter to the time), AdamW, texts of 64 tokens, four a
step. Every row is a process of its own, so that its peak is its own:

    lora            adapters of rank 8 on every kernel of the layers
    lora, remat     activations of a layer computed again in the backward pass
    full, remat     all parameters
    full            the same, activations kept
    full, clipped   recomputed, with the gradient's norm clipped: a second copy of it is there
    lora, bfloat16  arithmetic of the layers and logits in half precision
    npo, lora       a method: two tasks, and the reference model beside

CPU seconds over the cores leave out what a busy machine adds to the wall clock, but not the memory
bandwidth that it takes away. Asked for on two cores: lora at most 1.5 s and 2.3 GiB, full at most
2 s and 3 GiB, 10 s to compile.

python benchmarks/bench_llama.py [--quick] [--repeats R] [--row NAME]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaximm.immunisers import make_config, make_immuniser
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.objectives import TokenRows
from jaximm.training.optimiser import OptimiserConfig, make_optimiser
from jaximm.types import Batch, PairedBatch

SMOLLM2 = llama.LlamaConfig(
    vocabulary=49_152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    hidden=1536,
    rope_theta=1e5,
    tied=True,
)
QUICK = dataclasses.replace(SMOLLM2, vocabulary=2048, width=64, layers=3, hidden=128)
ROWS, LENGTH = 4, 64


class Tasks(NamedTuple):
    """One task's rows."""

    primary: Batch


@dataclasses.dataclass(frozen=True)
class Row:
    """What one process measures."""

    adapted: bool
    remat: bool = False
    half: bool = False
    method: str | None = None
    clipped: bool = False


CASES = {
    "lora": Row(adapted=True),
    "lora, remat": Row(adapted=True, remat=True),
    "full, remat": Row(adapted=False, remat=True),
    "full": Row(adapted=False),
    "full, clipped": Row(adapted=False, remat=True, clipped=True),
    "lora, bfloat16": Row(adapted=True, half=True),
    "npo, lora": Row(adapted=True, method="npo"),
}


def texts(config: llama.LlamaConfig, seed: int) -> Batch:
    """Random tokens, all of which count."""
    drawn = np.random.default_rng(seed).integers(0, config.vocabulary, (ROWS, LENGTH + 1))
    tokens = jnp.asarray(drawn, jnp.int32)
    return Batch(tokens[:, :-1], TokenRows(tokens[:, 1:], jnp.ones((ROWS, LENGTH), bool)))


def measure(case: Row, config: llama.LlamaConfig, repeats: int) -> dict[str, float]:
    """Seconds a step (median), seconds to compile, MiB at the peak."""
    language = llama.Language(
        config=config, remat=case.remat, compute_dtype=jnp.bfloat16 if case.half else None
    )
    optimiser = OptimiserConfig(learning_rate=1e-4, clip_norm=1.0 if case.clipped else None)
    problem = language_problem(language, make_optimiser(optimiser, 100))

    def objective(params, batches, memory, rng_key):
        del rng_key
        weights = problem.weights(batches.primary)
        return {"task": Weighted(problem.losses(params, batches.primary), weights)}, {}, memory

    method = from_objective("task", problem, objective)
    batch: Any = Tasks(texts(config, 0))
    if case.method is not None:
        method = make_immuniser(case.method, make_config(case.method), problem)
        batch = PairedBatch(texts(config, 0), texts(config, 1))

    def start(key) -> llama.Weights:
        params = llama.init(key, config)
        if case.adapted:
            return llama.with_adapters(params, key, rank=8)
        return llama.every_parameter(params)

    weights = jax.block_until_ready(jax.jit(start)(jax.random.key(0)))
    state = method.init(weights, jax.random.key(1))
    # A reference is the start: with a donated state it needs numbers of its own.
    state = state._replace(memory=jax.tree.map(jnp.copy, state.memory))
    del weights
    key = jax.random.key(2)
    started, used = time.perf_counter(), time.process_time()
    step = jax.jit(method.update, donate_argnums=0).lower(state, batch, key).compile()
    compiled, compiled_cpu = time.perf_counter() - started, time.process_time() - used
    seconds, cpu = [], []
    for _ in range(repeats + 1):
        started, used = time.perf_counter(), time.process_time()
        state, info = jax.block_until_ready(step(state, batch, key))
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    assert all(np.isfinite(value) for value in info)  # pyrefly: ignore[unbound-name]
    return {
        "step_s": statistics.median(seconds[1:]),  # the first touches its memory
        "cpu_s": statistics.median(cpu[1:]),
        "compile_s": compiled,
        "compile_cpu_s": compiled_cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the table; with ``--row`` measures one row and prints it as JSON."""
    parser = argparse.ArgumentParser(description="A training step of SmolLM2-135M's shape.")
    parser.add_argument("--quick", action="store_true", help="a small model, in seconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--row", choices=CASES)
    options = parser.parse_args(argv)
    config = QUICK if options.quick else SMOLLM2
    if options.row is not None:
        print(json.dumps(measure(CASES[options.row], config, options.repeats)))
        return 0
    print(f"{ROWS} x {LENGTH} tokens, jax {jax.__version__}, load {os.getloadavg()[0]:.1f} before")
    titles = ("step s", "cpu s", "tokens/s", "compile s", "cpu s", "peak MiB")
    print(f"{'':16}" + "".join(f"{title:>11}" for title in titles))
    for name, case in CASES.items():
        command = [sys.executable, __file__, "--row", name, "--repeats", str(options.repeats)]
        command += ["--quick"] * options.quick
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        tokens = ROWS * LENGTH * (2 if case.method else 1) / found["step_s"]
        print(
            f"{name:16}{found['step_s']:11.2f}{found['cpu_s']:11.2f}{tokens:11.0f}"
            f"{found['compile_s']:11.1f}{found['compile_cpu_s']:11.1f}{found['peak_mib']:11.0f}",
            flush=True,
        )
    print(f"load {os.getloadavg()[0]:.1f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
