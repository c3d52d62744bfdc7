"""One step of each immuniser, the closed-form limit, and what `import jaximm` adds to `import jax`.

python benchmarks/bench_steps.py [--quick] [--repeats R]
"""

from __future__ import annotations

from _timing import interleave, parse, print_header, print_table  # first: it sets the threads

# isort: split
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp

from jaximm import immunisers
from jaximm.immunisers.conditioning.limit import limit_theta
from jaximm.types import Batch, PairedBatch

BATCH = 64
STEPS = {
    'condition_gap, rows="batch"': ("condition_gap", {"rows": "batch"}),
    'condition_gap, rows="full"': ("condition_gap", {"rows": "full"}),
    "balanced_gap": ("balanced_gap", {}),
    "direct_kappa": ("direct_kappa", {}),
    "imma": ("imma", {}),
}


def tasks(d: int, dtype) -> PairedBatch:
    """Two regressions on 2 d Gaussian rows, the scale of the columns falling from 1 to 0.1."""

    def task(number: int) -> Batch:
        keys = jax.random.split(jax.random.key(number), 3)
        scale = jax.random.permutation(keys[0], jnp.geomspace(1.0, 0.1, d, dtype=dtype))
        x = jax.random.normal(keys[1], (2 * d, d), dtype) * scale[None, :]
        return Batch(x, jax.random.normal(keys[2], (2 * d,), dtype))

    return PairedBatch(task(0), task(1))


def stepper(name: str, fields: dict, problem: immunisers.Problem, batch: PairedBatch):
    """A function that makes one jitted update, each from where the last one ended."""
    immuniser = immunisers.make_immuniser(name, immunisers.make_config(name, **fields), problem)
    # Without donation the parts of the state that a step leaves alone would be copied each time.
    update = jax.jit(immuniser.update, donate_argnums=0)
    key = jax.random.key(0)
    params = immunisers.init_params(batch.primary.x.shape[1], None, dtype=batch.primary.x.dtype)
    state = jax.tree.map(jnp.copy, immuniser.init(params, key))

    def step():
        nonlocal state
        state, info = update(state, batch, key)
        return state, info

    return step


def bench_steps(d: int, repeats: int) -> None:
    """Every gradient method at one width, in float64."""
    arrays = tasks(d, jnp.float64)
    problem = immunisers.linear_problem(
        arrays,
        damping_primary=immunisers.relative_damping(arrays.primary.x, 1e-3),
        damping_harmful=immunisers.relative_damping(arrays.harmful.x, 1e-3),
    )
    batch = jax.tree.map(lambda rows: rows[:BATCH], arrays)
    contestants = {
        label: stepper(name, fields, problem, batch) for label, (name, fields) in STEPS.items()
    }
    title = f"one step, d = {d}, batch {BATCH}, float64, jit"
    print_table(title, interleave(contestants, repeats=repeats))


def bench_limit(d: int, repeats: int) -> None:
    """The closed form from two Gram matrices, with and without the rotation."""
    arrays = tasks(d, jnp.float64)
    grams = [task.x.T @ task.x / task.x.shape[0] for task in arrays]
    plain = jax.jit(lambda primary, harmful: limit_theta(primary, harmful, rotate=False))
    rotated = jax.jit(lambda primary, harmful: limit_theta(primary, harmful, rotate=True))
    rows = interleave(
        {"rotate": lambda: rotated(*grams), "no rotation": lambda: plain(*grams)},
        repeats=repeats,
    )
    print_table(f"limit, closed form, d = {d}, float64, jit", rows)


def bench_import(repeats: int) -> None:
    """Wall-clock time inside a fresh interpreter, so that its own start is left out."""
    code = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    # `import jaximm` alone loads nothing: what counts is what a researcher reaches first.
    primitives = "import jax; from jaximm import hessians, linalg, preconditioner, regularisers"
    statements = {"import jax": "import jax", "jax and the primitives": primitives}
    times: dict[str, list[float]] = {label: [] for label in statements}
    for number in range(repeats + 1):
        for label, statement in statements.items():
            done = subprocess.run(
                [sys.executable, "-c", code.format(statement)],
                capture_output=True,
                text=True,
                check=True,
            )
            if number:  # the first round fills the file cache
                times[label].append(float(done.stdout))
    before, after = times["import jax"], times["jax and the primitives"]
    excess = [b - a for a, b in zip(before, after, strict=True)]
    print("\nimport, fresh interpreters, median")
    for label, values in times.items():
        print(f"  {label:30} {statistics.median(values):7.3f} s")
    print(f"  {'jaximm over jax':30} {statistics.median(excess):7.3f} s")


def main() -> None:
    """All tables."""
    options = parse(__doc__)
    jax.config.update("jax_enable_x64", True)
    print_header()
    widths = (79,) if options.quick else (79, 784)
    for d in widths:
        bench_steps(d, options.repeats or (11 if d < 500 else 9))
    bench_limit(widths[-1], options.repeats or 5)
    bench_import(options.repeats or (3 if options.quick else 5))


if __name__ == "__main__":
    main()
