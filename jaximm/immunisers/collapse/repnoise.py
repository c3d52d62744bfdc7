r"""RepNoise: activations of harmful rows are to be noise, and the head is to read nothing off them.

    L = f + noise_weight mean_l MMD(a_l(harmful), N(0, I)) - ascent_weight log(1 + mean_l h_l)

f is the primary loss, a_l the rows of site l (`Problem.activations`: name those after the layers in
question; the features are always one), h_l the harmful loss as the head reads it off layer l
(`Problem.lens_losses`). MMD is that of five Gaussian kernels, `noise_distance`. Positions that do
not count (`Problem.counted`) are left out.

The released code takes a whole text's activations as one row, masks positions at which a harmful
text and its harmless pair have the same token, and adds the loss of the outputs once more to the
mean over layers; here a row is a position. Its authors say that it needs a large search of
settings. Harmful rows are seen whole by every device.

Rosati et al. (2024), Representation noising, https://arxiv.org/abs/2405.14577.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaximm.immunisers.about import About
from jaximm.immunisers.collapse import common
from jaximm.immunisers.collapse.seam import lens_loss
from jaximm.immunisers.gradient import from_objective
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import Immuniser

KERNELS = 5
"""Gaussian kernels, each twice as wide as the one before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepnoiseConfig:
    """Makes activations of harmful rows Gaussian noise, and the harmful loss large.

    Attributes:
      noise_weight: beta, of the distance from noise.
      ascent_weight: alpha, of the logarithm of the harmful loss.
      steps: updates.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="RepNoise",
        source="Rosati et al. (2024), Representation noising, https://arxiv.org/abs/2405.14577",
        against="tuning on harmful rows alone, for some tens of steps",
        broken_by="a last layer that is scaled down or replaced first, or a hundred steps",
        traits=frozenset({"needs_harmful_head"}),
    )

    noise_weight: float = 1e-3
    ascent_weight: float = 1.0
    steps: int = 1200
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("noise_weight", "ascent_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}.")
        check_run(self.steps, self.batch_size)


def repnoise(config: RepnoiseConfig, problem: Problem) -> Immuniser:
    """Descends primary loss + noise_weight * distance from noise - ascent_weight * log harmful.

    Raises:
      ValueError: what `from_objective` refuses: targets that are numbers, no optimiser.
    """

    def objective(params, batches, memory, rng_key):
        harmful = batches["harmful"]
        sites, counted = problem.activations(params, harmful), problem.counted(harmful)
        distances = []
        for number, name in enumerate(sorted(sites)):
            rows, key = sites[name], jax.random.fold_in(rng_key, number)
            noise = jax.random.normal(key, rows.shape, rows.dtype)
            distances.append(noise_distance(rows, noise, counted))
        noise, harm = jnp.mean(jnp.stack(distances)), lens_loss(problem, params, harmful)
        loss = {
            "task_loss": common.aligned(problem, params, batches),
            "penalty": config.noise_weight * noise.astype(harm.dtype),
            "harm": -config.ascent_weight * jnp.log1p(harm),
        }
        return loss, {"noise": noise.astype(harm.dtype), "harmful_loss": harm}, memory

    method = from_objective("repnoise", problem, objective, whole=("harmful",))
    return common.with_copies(method)


def noise_distance(
    rows: Float[Array, "n d"], noise: Float[Array, "n d"], counted: Array | None = None
) -> Float[Array, ""]:
    """Squared maximum mean discrepancy of two samples of equal size, as a biased V-statistic.

    mean_ij [k(x_i, x_j) + k(z_i, z_j) - k(x_i, z_j) - k(z_i, x_j)] with
    k(a, b) = sum_{s = 0..4} exp(-|a - b|^2 / (2^s m / 4)), m the mean squared distance of different
    points of both samples, through which no gradient goes. 0 for equal samples; not negative.

    Args:
      rows: x.
      noise: z.
      counted: [n], which rows count in either sample; None: all.
    """
    n = rows.shape[0]
    both = jnp.concatenate([rows, noise])
    weights = jnp.ones(n, both.dtype) if counted is None else counted.astype(both.dtype)
    weights = jnp.concatenate([weights, weights])
    squares = jnp.sum(both**2, axis=1)
    products = jnp.matmul(both, both.T, precision="highest")
    distances = jnp.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)
    count = jnp.sum(weights)
    total = lax.stop_gradient(weights @ distances @ weights)
    width = total / jnp.maximum(count * (count - 1), 1) / 2 ** (KERNELS // 2)
    width = jnp.maximum(width, jnp.finfo(width.dtype).tiny)
    kernel = sum(jnp.exp(-distances / (2**s * width)) for s in range(KERNELS))
    signs = weights * jnp.concatenate([jnp.ones(n, both.dtype), -jnp.ones(n, both.dtype)])
    return signs @ kernel @ signs / jnp.maximum(count / 2, 1) ** 2
