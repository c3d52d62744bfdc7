"""What an accelerator takes for the steps, decompositions and collectives of the library.

Four parts, of random weights and random data, which do not matter to the time:

    llama        a 1B Llama (Llama 3.2's shape) in bfloat16 arithmetic, 8 x 1,024 tokens: LoRA and
                 full steps, and `condition_gap` on its last two layers beside the same step without
                 regularisers
    vision       EfficientNet-Lite0 and ViT-B/16, every parameter, 64 images of each task in
                 float32: `condition_gap` beside the task alone
    linalg       singular values of 2 d x d and the symmetric eigenproblem of d x d in float32, by
                 every algorithm that the device has, and the library's kappa and regulariser
    collectives  a linear step on one device under jit, pmap and shard_map

Ten minutes at most on a card of the H200 class; ``--quick`` takes small shapes, on a CPU too.

python benchmarks/accelerator.py [--quick] [--only PART ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaximm import immunisers, linalg, models, regularisers
from jaximm.immunisers import ProbeParams, make_config, make_immuniser
from jaximm.immunisers.gradient import from_penalty
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.objectives import TokenRows
from jaximm.training.optimiser import OptimiserConfig, make_optimiser
from jaximm.training.parallel import make_parallel, step_fn
from jaximm.types import Batch, PairedBatch

LLAMA_1B = llama.LlamaConfig(
    vocabulary=128_256, width=2048, layers=16, heads=32, kv_heads=8, head_width=64, hidden=8192,
    rope_theta=5e5, tied=True,
)  # fmt: skip
LLAMA_QUICK = dataclasses.replace(
    LLAMA_1B, vocabulary=512, width=64, layers=3, heads=4, kv_heads=2, head_width=16, hidden=128
)
WITHOUT = {"primary_weight": 0.0, "harmful_weight": 0.0}
"""Fields of `condition_gap` that leave the task alone."""


class Rows(NamedTuple):
    """One task's batch."""

    primary: Batch


def seconds(run: Callable[[], Any], *, repeats: int) -> float:
    """The median of some calls after two, each to its end."""
    for _ in range(2):
        jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def stepping(immuniser: Any, start: Callable[[], Any], batch: Any) -> Callable[[], Any]:
    """A function that makes an update, each from where the last one ended."""
    update = jax.jit(immuniser.update, donate_argnums=0)
    key = jax.random.key(1)
    state = immuniser.init(start(), key)
    # What a method remembers is its start, which a donated state would take away.
    state = state._replace(memory=jax.tree.map(jnp.copy, state.memory))

    def step():
        nonlocal state
        state, info = update(state, batch, key)
        return info

    return step


def bench_llama(quick: bool) -> None:
    """Tokens a second, and the regularisers' share of a step."""
    config, rows, length = (LLAMA_QUICK, 2, 32) if quick else (LLAMA_1B, 8, 1024)
    repeats = 3 if quick else 10
    language = llama.Language(config=config, compute_dtype=jnp.bfloat16, remat=True)
    with jax.numpy_dtype_promotion("standard"):
        optimiser = make_optimiser(OptimiserConfig(learning_rate=1e-5), 1000)
    problem = language_problem(language, optimiser)

    def texts(seed: int) -> Batch:
        drawn = np.random.default_rng(seed).integers(0, config.vocabulary, (rows, length + 1))
        tokens = jnp.asarray(drawn, jnp.int32)
        return Batch(tokens[:, :-1], TokenRows(tokens[:, 1:], jnp.ones((rows, length), bool)))

    def started(make: Callable[..., Any], dtype: Any = jnp.float32) -> Callable[[], Any]:
        return jax.jit(lambda: make(llama.init(jax.random.key(0), config, dtype=dtype)))

    lora = functools.partial(llama.with_adapters, rng_key=jax.random.key(2), rank=16)
    task = from_penalty("task", problem, None)
    one, pair = Rows(texts(0)), PairedBatch(texts(0), texts(1))
    last = started(functools.partial(llama.last_layers, k=2))
    gap = {
        name: make_immuniser("condition_gap", make_config("condition_gap", **fields), problem)
        for name, fields in (("task", WITHOUT), ("condition_gap", {}))
    }
    cases: Mapping[str, tuple[Any, Callable[[], Any], Any]] = {
        "LoRA r16, frozen bfloat16": (task, started(lora, jnp.bfloat16), one),
        "full, float32 parameters": (task, started(llama.every_parameter), one),
        "last 2 layers, no regulariser": (gap["task"], last, pair),
        "last 2 layers, condition_gap": (gap["condition_gap"], last, pair),
    }
    print(f"\nllama, {rows} x {length} tokens of a task, {config.layers} layers of {config.width}")
    times = {}
    for name, (immuniser, start, batch) in cases.items():
        times[name] = seconds(stepping(immuniser, start, batch), repeats=repeats)
        tokens = len(batch) * rows * length / times[name]
        print(f"  {name:32}{1e3 * times[name]:10.1f} ms{tokens:12.0f} tokens/s", flush=True)
        jax.clear_caches()  # and the arrays of the case before
    with_gap, without = (
        times["last 2 layers, condition_gap"],
        times["last 2 layers, no regulariser"],
    )
    print(f"  the regularisers are {100 * (1 - without / with_gap):.1f} % of the step")


def bench_vision(quick: bool) -> None:
    """Whole networks, with and without the regularisers."""
    rows, repeats = (4, 3) if quick else (64, 10)
    cases: dict[str, tuple[dict[str, Any], int]] = {"efficientnet_lite0": ({}, 224)}
    cases["vit_b16"] = ({}, 224)
    if quick:
        cases = {"mlp": ({"widths": (192, 32)}, 8)}
    for name, (fields, size) in cases.items():
        backbone = models.create(name, rng_key=jax.random.key(0), **fields)
        trainable = backbone.split_at("*")
        rng = np.random.default_rng(0)

        def task(rng=rng, backbone=backbone, trainable=trainable, size=size) -> Batch:
            pixels = rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
            inputs = jax.jit(lambda x: trainable.prefix_fn(backbone.preprocess(x)))(pixels)
            return Batch(inputs, jnp.asarray(rng.integers(0, 10, rows, dtype=np.int32)))

        batch = PairedBatch(task(), task())
        problem = immunisers.Problem(
            features_fn=trainable.features_fn,
            width=backbone.width,
            classes=10,
            harmful_classes=10,
            optimiser=make_optimiser(OptimiserConfig(learning_rate=1e-5), 1000),
        )

        def start(trainable=trainable, backbone=backbone) -> ProbeParams:
            head = immunisers.init_head(backbone.width, 10)
            return jax.tree.map(jnp.copy, ProbeParams(dict(trainable.params), head))

        print(f"\n{name}, {rows} images of {size} pixels of each task, float32")
        times = {}
        for label, given in (("task alone", WITHOUT), ("condition_gap", {})):
            immuniser = make_immuniser(
                "condition_gap", make_config("condition_gap", **given), problem
            )
            times[label] = seconds(stepping(immuniser, start, batch), repeats=repeats)
            print(f"  {label:32}{1e3 * times[label]:10.1f} ms", flush=True)
        share = 1 - times["task alone"] / times["condition_gap"]
        print(f"  the regularisers and the second task are {100 * share:.1f} % of the step")


def bench_linalg(quick: bool) -> None:
    """Decompositions by width and algorithm."""
    algorithms = jax.lax.linalg.SvdAlgorithm
    print("\nlinalg, float32, ms")
    for d in (64,) if quick else (768, 1024, 2048, 4096):
        x = jax.random.normal(jax.random.key(0), (2 * d, d), jnp.float32)
        symmetric = x.T @ x / (2 * d)
        runs: dict[str, Callable[[], Any]] = {}
        for algorithm in (algorithms.DEFAULT, algorithms.QR, algorithms.JACOBI, algorithms.POLAR):
            run = jax.jit(
                functools.partial(
                    jax.lax.linalg.svd,
                    compute_uv=False,
                    full_matrices=False,
                    algorithm=algorithm,
                )
            )
            runs[f"svd {algorithm.name.lower()}"] = functools.partial(run, x)
        runs["eigh"] = functools.partial(jax.jit(jnp.linalg.eigh), symmetric)
        runs["feature_condition_number"] = functools.partial(
            jax.jit(linalg.feature_condition_number), x
        )
        runs["ill_conditioning and gradient"] = functools.partial(
            jax.jit(jax.value_and_grad(regularisers.ill_conditioning_of_features)), x
        )
        for name, run in runs.items():
            try:
                found = f"{1e3 * seconds(run, repeats=3):12.2f}"
            except Exception as error:  # an algorithm that the device does not have
                found = f"{type(error).__name__}: " + " ".join(str(error).split())[:60]
            print(f"  d = {d:5}  {name:32}{found}", flush=True)


def bench_collectives(quick: bool) -> None:
    """The same step under every way to run on devices, on the first device."""
    d, rows = (32, 64) if quick else (784, 1024)
    draws = jax.random.normal(jax.random.key(0), (2, rows, d), jnp.float32)
    arrays = PairedBatch(*(Batch(x, x[:, 0]) for x in draws))
    problem = immunisers.linear_problem(
        arrays,
        damping_primary=immunisers.relative_damping(arrays.primary.x, 1e-3),
        damping_harmful=immunisers.relative_damping(arrays.harmful.x, 1e-3),
    )
    immuniser = make_immuniser("condition_gap", make_config("condition_gap"), problem)
    print(f"\na linear step of condition_gap on one device, d = {d}, {rows} rows of each task")
    for kind in ("jit", "pmap", "shard_map"):
        parallel = make_parallel(kind, jax.devices()[:1])
        step = step_fn(immuniser, parallel)
        start = immunisers.init_params(d, None, dtype=jnp.float32)
        state = parallel.put(immuniser.init(start, jax.random.key(0)))
        batch, key = parallel.put_rows(arrays), parallel.put(jax.random.key(1))

        def run(step=step, batch=batch, key=key, held=[state]):  # noqa: B006
            held[0], info = step(held[0], batch, key)
            return info

        print(f"  {kind:32}{1e3 * seconds(run, repeats=10):10.2f} ms", flush=True)


PARTS = {
    "llama": bench_llama,
    "vision": bench_vision,
    "linalg": bench_linalg,
    "collectives": bench_collectives,
}


def main(argv: list[str] | None = None) -> int:
    """Prints the parts that are asked for."""
    parser = argparse.ArgumentParser(description="Steps, decompositions and collectives.")
    parser.add_argument("--quick", action="store_true", help="small shapes, in seconds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}, {device.device_kind}")
    started = time.perf_counter()
    for name in options.only:
        PARTS[name](options.quick)
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
