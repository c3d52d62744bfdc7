"""A plain call of a public function against the same operations dispatched one by one, and jitted.

python benchmarks/bench_eager.py [--quick] [--repeats R]
"""

from __future__ import annotations

from _timing import interleave, parse, print_header, print_table  # first: it sets the threads

# isort: split
from typing import Any

import jax
import jax.numpy as jnp

from jaximm import hessians, linalg, regularisers

ROWS, WIDTH, CLASSES = 40, 6, 3


def main() -> None:
    arguments = parse(__doc__)
    jax.config.update("jax_enable_x64", True)
    print_header()
    features = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))
    weights = jax.random.normal(jax.random.key(1), (WIDTH, CLASSES))
    gram = features.T @ features / ROWS
    calls: dict[str, tuple[Any, tuple[jax.Array, ...]]] = {
        "softmax_probe_hessian": (hessians.softmax_probe_hessian, (features, weights)),
        "ill_conditioning": (regularisers.ill_conditioning, (gram,)),
        "condition_number": (linalg.condition_number, (gram,)),
        "feature_condition_number": (linalg.feature_condition_number, (features,)),
        "singular_extremes": (linalg.singular_extremes, (features,)),
        "pencil": (linalg.pencil, (gram, gram + jnp.eye(WIDTH))),
    }
    for name, (function, arrays) in calls.items():
        jitted, plain = jax.jit(function), function.__wrapped__
        rows = interleave(
            {
                "inside jax.jit": lambda run=jitted, arrays=arrays: run(*arrays),
                "as it is": lambda run=function, arrays=arrays: run(*arrays),
                "one by one": lambda run=plain, arrays=arrays: run(*arrays),
            },
            repeats=arguments.repeats or (3 if arguments.quick else 9),
        )
        print_table(f"{name}, {ROWS} x {WIDTH}, float64", rows)


if __name__ == "__main__":
    main()
