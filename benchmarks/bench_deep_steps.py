"""Whole training steps on deep backbones: what the regulariser costs of them, and the methods.

Two parts, on random uint8 images, float32 backbones, the regularisers in float64:

    share   value and gradient of `condition_gap`'s regulariser on the features of 64 rows of each
            task, as a part of the whole step of EfficientNet-Lite0 (the product's target: 5 %);
            the whole network at 224 and at 128 pixels, and "blocks.15,head" on cached activations
    table   the step by batch, method and width d: SqueezeNet's "fire9" (512) and Lite0's
            "blocks.15,head" (1280) on cached activations, perceptrons of 384, 768, 4096

Steps are jitted directly, as a run on CPU does: inside a `lax.scan` XLA's CPU convolutions are many
times slower.

python benchmarks/bench_deep_steps.py [--quick] [--repeats R]
"""

from __future__ import annotations

from _timing import Timing, interleave, parse, print_header, print_table  # first: sets the threads

# isort: split
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaximm import immunisers, models
from jaximm.immunisers import ProbeParams
from jaximm.immunisers.conditioning import condition_gap
from jaximm.models import Backbone, Trainable
from jaximm.training.optimiser import OptimiserConfig, make_optimiser
from jaximm.types import Batch, PairedBatch

ROWS = 64  # of each task, where the regulariser's share is measured
CLASSES = 10
CALLS = 10  # of the regulariser a round: one alone is too short a time beside a step of seconds
OPTIMISER = OptimiserConfig(learning_rate=1e-5)  # of no matter for the time; nothing diverges

TASK_ONLY = "task alone (n rows, not 2 n)"
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    TASK_ONLY: ("condition_gap", {"primary_weight": 0.0, "harmful_weight": 0.0}),
    "condition_gap": ("condition_gap", {}),
    "balanced_gap": ("balanced_gap", {}),
    "direct_kappa": ("direct_kappa", {}),
    "imma": ("imma", {}),
}


def load(name: str, size: int | None = None, **fields: Any) -> Backbone:
    """A backbone with its published weights, or a random perceptron."""
    preprocess = models.REGISTRY[name].preprocess
    if size is not None:
        preprocess = dataclasses.replace(preprocess, size=size, resize=max(size, preprocess.resize))
    if name == "mlp":
        return models.create(name, rng_key=jax.random.key(0), **fields)
    return models.create(name, weights="pretrained", preprocess=preprocess, **fields)


def activations(trainable: Trainable, rows: int, *, size: int) -> PairedBatch:
    """Random images of both tasks, through what is frozen: 32 at a time, as one program."""
    backbone = trainable.backbone
    run = jax.jit(lambda pixels: trainable.prefix_fn(backbone.preprocess(pixels)))
    rng = np.random.default_rng(0)

    def task() -> Batch:
        pixels = rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
        labels = rng.integers(0, CLASSES, rows, dtype=np.int32)
        parts = [run(pixels[start : start + 32]) for start in range(0, rows, 32)]
        return Batch(jnp.concatenate(parts), jnp.asarray(labels))

    return PairedBatch(task(), task())


def stepper(label: str, trainable: Trainable, batch: PairedBatch) -> Callable[[], Any]:
    """A function that makes one update of a method, each from where the last one ended."""
    problem = immunisers.Problem(
        features_fn=trainable.features_fn,
        width=trainable.backbone.width,
        classes=CLASSES,
        harmful_classes=CLASSES,
        optimiser=make_optimiser(OPTIMISER, 1000),
    )
    name, fields = METHODS[label]
    immuniser = immunisers.make_immuniser(name, immunisers.make_config(name, **fields), problem)
    update = jax.jit(immuniser.update, donate_argnums=0)
    key = jax.random.key(0)
    assert problem.width is not None
    head = immunisers.init_head(problem.width, CLASSES)
    start = jax.tree.map(jnp.copy, ProbeParams(dict(trainable.params), head))
    state = immuniser.init(start, key)

    def step():
        nonlocal state
        state, info = update(state, batch, key)
        return state, info

    return step


def regulariser(trainable: Trainable, batch: PairedBatch) -> Callable[[], Any]:
    """`CALLS` evaluations of the penalty and its gradient in both tasks' features."""
    penalty = condition_gap.gap_penalty(condition_gap.ConditionGapConfig())
    assert penalty is not None
    dtype = jnp.zeros(()).dtype
    labels = [task.y for task in batch]

    @jax.jit
    def value_and_slopes(features):
        def value(features):
            tasks = [Batch(x.astype(dtype), y) for x, y in zip(features, labels, strict=True)]
            return penalty(PairedBatch(*tasks), None)[0]

        return jax.value_and_grad(value)(features)

    run = jax.jit(trainable.features_fn)
    features = [run(trainable.params, task.x) for task in batch]
    return lambda: [value_and_slopes(features) for _ in range(CALLS)]


def bench_share(pattern: str, size: int, *, parts: int, repeats: int) -> None:
    """The regulariser as a part of Lite0's whole step, which is `parts` times a smaller one."""
    trainable = load("efficientnet_lite0", size).split_at(pattern)
    batch = activations(trainable, ROWS, size=size)
    part = jax.tree.map(lambda leaf: leaf[: ROWS // parts], batch)
    alone = "regulariser alone"
    timings = interleave(
        {
            "whole step": stepper("condition_gap", trainable, part),
            TASK_ONLY: stepper(TASK_ONLY, trainable, part),
            alone: regulariser(trainable, batch),
        },
        repeats=repeats,
    )
    whole, task, found = timings
    # Ratios within a round stay as they are: the reference alone is scaled.
    whole, task = (_scaled(row, parts, ratios=1) for row in (whole, task))
    found = _scaled(found, 1 / CALLS, ratios=1 / (CALLS * parts))
    title = f"efficientnet_lite0, train={pattern!r}, {size} pixels, batch {ROWS}, jit"
    if parts > 1:
        title += f" (steps: {parts} x the time at batch {ROWS // parts})"
    print_table(title, [whole, task, found])
    wall, cpu = 100 * found.wall_ratio, 100 * found.cpu_ratio
    print(
        f"  the regulariser is {wall:.2f} % (wall), {cpu:.2f} % (cpu) of the whole step, "
        f"{100 * found.wall_ms / task.wall_ms:.2f} % (wall) of a step of the task alone"
    )


def _scaled(row: Timing, times: float, *, ratios: float) -> Timing:
    wall, cpu = times * row.wall_ms, times * row.cpu_ms
    return Timing(row.label, wall, cpu, ratios * row.wall_ratio, ratios * row.cpu_ratio)


def bench_methods(title: str, trainable: Trainable, *, batches, size: int, repeats: int) -> None:
    """Every method's step at several batch sizes."""
    arrays = activations(trainable, max(batches), size=size)
    for rows in batches:
        batch = jax.tree.map(lambda leaf: leaf[:rows], arrays)  # noqa: B023 (used at once)
        contestants = {label: stepper(label, trainable, batch) for label in METHODS}
        timings = interleave(contestants, repeats=repeats)
        width = trainable.backbone.width
        print_table(f"{title}, d = {width}, batch {rows}, jit", timings)


def main() -> None:
    """Both parts."""
    options = parse(__doc__)
    quick = options.quick
    jax.config.update("jax_enable_x64", True)
    print_header()
    # At 224 pixels the whole network's step at batch 64 would take 25 GiB, at 128 pixels 8.
    shares = (("blocks.15,head", 224, 1), ("*", 128, 1), ("*", 224, 4))
    for pattern, size, parts in shares[:1] if quick else shares:
        repeats = options.repeats or (3 if quick or pattern == "*" else 7)
        bench_share(pattern, size, parts=parts, repeats=repeats)

    batches = (32, 64) if quick else (32, 64, 128)
    repeats = options.repeats or (3 if quick else 5)
    for name, pattern in (
        ("squeezenet1_1", "fire9"),
        ("efficientnet_lite0", "blocks.15,head"),
    ):
        trainable = load(name).split_at(pattern)
        size = trainable.backbone.preprocess.size
        title = f"{name}, {pattern!r} on cached activations"
        bench_methods(title, trainable, batches=batches, size=size, repeats=repeats)
    for width in (384,) if quick else (384, 768, 4096):
        trainable = load("mlp", widths=(256, width)).split_at("*")
        bench_methods("mlp, '*'", trainable, batches=batches, size=32, repeats=repeats)


if __name__ == "__main__":
    main()
