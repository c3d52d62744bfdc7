"""A regulariser of [n, d] features on the n x n side, against the d x d eigendecomposition.

Value and gradient in the features, as an immuniser's step needs them, at the widths of the deep
backbones (SqueezeNet 512, ViT-B 768, EfficientNet-Lite0 1280) and at 4096.

python benchmarks/bench_sides.py [--quick] [--repeats R]
"""

from __future__ import annotations

from _timing import interleave, parse, print_header, print_table  # first: it sets the threads

# isort: split
import jax
import jax.numpy as jnp

from jaximm import regularisers as reg

DAMPING = 1e-3


def formed(features: jax.Array, damping: float) -> jax.Array:
    """The [d, d] Hessian."""
    n, d = features.shape
    gram = jnp.matmul(features.T, features, precision="highest") / n
    return gram + damping * jnp.eye(d, dtype=features.dtype)


def ill_by_square(features: jax.Array) -> jax.Array:
    """R_ill, pseudo-inverse footing, by way of the [d, d] Hessian; its rank is n at most."""
    return reg.ill_conditioning(formed(features, 0.0), rank=min(features.shape))


def ill_by_rows(features: jax.Array) -> jax.Array:
    """The same on the n x n side."""
    return reg.ill_conditioning_of_features(features, rank=min(features.shape))


def well_by_square(features: jax.Array) -> jax.Array:
    """R_well, damped footing, by way of the [d, d] Hessian."""
    return reg.well_conditioning(formed(features, DAMPING))


def well_by_rows(features: jax.Array) -> jax.Array:
    """The same on the n x n side."""
    return reg.well_conditioning_of_features(features, damping=DAMPING)


PAIRS = {
    "R_ill, pseudo-inverse": (ill_by_rows, ill_by_square),
    "R_well, damping 1e-3": (well_by_rows, well_by_square),
}


def bench(name: str, n: int, d: int, dtype, repeats: int) -> None:
    """One regulariser at one shape."""
    features = jax.random.normal(jax.random.key(1), (n, d), dtype)
    small, square = (jax.jit(jax.value_and_grad(fn)) for fn in PAIRS[name])
    rows = interleave(
        {"n x n side": lambda: small(features), "d x d side": lambda: square(features)},
        repeats=repeats,
    )
    print_table(f"{name}: value and gradient, n = {n}, d = {d}, {features.dtype}, jit", rows)
    (value, slope), (other, other_slope) = small(features), square(features)
    off = jnp.linalg.norm(slope - other_slope) / jnp.linalg.norm(slope)
    print(
        f"  they differ by {float(abs(other / value - 1)):.1e} in value, {float(off):.1e} in slope"
    )


def main() -> None:
    arguments = parse(__doc__)
    jax.config.update("jax_enable_x64", True)
    print_header()
    for d in (512, 768) if arguments.quick else (512, 768, 1280, 4096):
        # A [4096, 4096] eigendecomposition takes ten seconds or more, in float32 half of that.
        repeats = 3 if arguments.quick else 7 if d <= 768 else 3 if d <= 1280 else 1
        dtype = jnp.float64 if d < 4096 else jnp.float32
        for n in (64, 100) if d < 4096 else (64,):
            for name in PAIRS if d < 4096 else list(PAIRS)[:1]:
                bench(name, n, d, dtype, arguments.repeats or repeats)


if __name__ == "__main__":
    main()
