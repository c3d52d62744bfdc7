"""What bfloat16 arithmetic does to log kappa of real features, beside its bound.

The backbone's stages after the cut run in float32 and in bfloat16 (`split_at(compute_dtype=...)`),
on one batch of CIFAR-10 images at 224 x 224; features come back in float32. log kappa is that of
the l2-probe Hessian on two footings: the n x n side with all singular values above a stated
tolerance, and damped by a thousandth of the mean eigenvalue. Columns, in nats:

    log kappa   of the float32 features, by a float64 SVD
    f32 Gram    how far an eigendecomposition of the float32 Gram matrix (highest precision) is off
    bf16        how far the bfloat16 features are off, by float64 SVD
    both        how far the float32 Gram matrix of the bfloat16 features is off
    bound       on `bf16`, from |E|_2 (`jaximm.linalg.log_kappa_shift_bound`)

python benchmarks/bench_precision.py [--quick]
"""

from __future__ import annotations

from typing import NamedTuple

from _timing import parse, print_header  # first: it sets the threads

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

from jaximm import data, linalg, models

RTOL = 1e-4  # of singular values of X; their squares are what the Gram matrix sees
RELATIVE_DAMPING = 1e-3
CUTS = {
    "squeezenet1_1": ("fire9", "fire6,fire7,fire8,fire9", "*"),
    "efficientnet_lite0": ("head", "blocks.15,head", "*"),
}


class Reading(NamedTuple):
    """log kappa on one footing, and the singular values it rests on."""

    log_kappa: float
    rank: int
    largest: float
    smallest: float


def by_svd(features: np.ndarray, damping: float) -> Reading:
    """In float64, from singular values. `damping` in units of X^T X; 0 is the tolerance footing."""
    sigma = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    rank = int(np.sum(sigma > RTOL * sigma[0]))
    bottom = sigma[rank - 1] if damping == 0 else 0.0  # n < d: empty directions
    value = float(np.log(sigma[0] ** 2 + damping) - np.log(bottom**2 + damping))
    return Reading(value, rank, float(sigma[0]), float(sigma[rank - 1]))


@jax.jit
def dual_values(features: jax.Array) -> jax.Array:
    """Eigenvalues of X X^T in float32, products at highest precision; ascending."""
    return jnp.linalg.eigvalsh(jnp.matmul(features, features.T, precision="highest"))


def by_gram(features: np.ndarray, damping: float, rank: int) -> float:
    """By the float32 Gram matrix on the n x n side, with as many values as the SVD kept."""
    values = np.asarray(dual_values(jnp.asarray(features, jnp.float32)), np.float64)
    if damping:
        return float(np.log(values[-1] + damping) - np.log(damping))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.log(values[-1]) - np.log(values[-rank]))


def batch(rows: int) -> jax.Array:
    """Images of CIFAR-10's vehicles, both train and held-out classes balanced."""
    pair = data.load("cifar10_split", train_rows=max(rows, 100), held_out_rows=100)
    return jnp.asarray(pair.primary.train.x[:rows])


def features_of(backbone: models.Backbone, pattern: str, dtype, pixels: jax.Array) -> np.ndarray:
    """Features with the stages after the cut in `dtype`."""
    cut = backbone.split_at(pattern, compute_dtype=dtype)
    activations = jax.jit(cut.prefix_fn)(backbone.preprocess(pixels))
    return np.asarray(jax.jit(cut.features_fn)(cut.params, activations))


def bench(name: str, backbone: models.Backbone, pattern: str, pixels: jax.Array) -> None:
    """One backbone cut at one place."""
    exact = features_of(backbone, pattern, None, pixels)
    coarse = features_of(backbone, pattern, jnp.bfloat16, pixels)
    n, d = exact.shape
    error = float(np.linalg.norm(coarse.astype(np.float64) - exact.astype(np.float64), 2))
    damping = RELATIVE_DAMPING * float(np.sum(exact.astype(np.float64) ** 2)) / d
    first = by_svd(exact, 0.0)
    print(
        f"\n{name}, bfloat16 in {pattern!r}, n = {n}, d = {d}: |E| / sigma_1 = "
        f"{error / first.largest:.1e}, |E| / sigma_{first.rank} = {error / first.smallest:.1e}"
    )
    header = ("log kappa", "f32 Gram", "bf16", "both", "bound")
    print(f"  {'':18}" + "".join(f"{label:>11}" for label in header) + "   ranks")
    for footing, lam in (("n x n, rtol 1e-4", 0.0), ("damped 1e-3", damping)):
        before, after = by_svd(exact, lam), by_svd(coarse, lam)
        bound = linalg.log_kappa_shift_bound(
            largest=before.largest,
            smallest=None if lam else before.smallest,
            error_norm=error,
            damping=lam,
        )
        shift = abs(after.log_kappa - before.log_kappa)
        same = bool(lam) or before.rank == after.rank
        numbers = (
            before.log_kappa,
            abs(by_gram(exact, lam, before.rank) - before.log_kappa),
            shift,
            abs(by_gram(coarse, lam, after.rank) - before.log_kappa),
            float(bound) if same else float("inf"),
        )
        print(
            f"  {footing:18}"
            + "".join(f"{number:11.2e}" for number in numbers)
            + f"   {before.rank}, {after.rank}"
            + ("" if shift <= numbers[-1] else "   BOUND BROKEN"),
            flush=True,
        )


def main() -> None:
    arguments = parse(__doc__)
    jax.config.update("jax_enable_x64", True)
    print_header()
    for name, cuts in CUTS.items():
        backbone = models.create(name, weights="pretrained")
        for rows in (64,) if arguments.quick else (64, 100):
            pixels = batch(rows)
            for pattern in cuts[:1] if arguments.quick else cuts:
                bench(name, backbone, pattern, pixels)


if __name__ == "__main__":
    main()
