r"""How far a model is from stationary under an honest user's fine-tuning: three readings.

With l the loss of an environment (a benign data set that an honest user may fine-tune on),

logit_scale       g = d/dw l(w z)|_{w=1} = E[sum_v p_v z_v - z_y],  z the logits    (IRMv1)
parameter_scale   g = d/dw l(w theta)|_{w=1} = <theta, grad l>
gradient_norm     g = grad l, and g g is |grad l|^2

and the penalty is g g. Of rows that are a sample, g(a) g(b) of two independent batches is an
unbiased estimate of it; g(a)^2 adds the variance of g, and may not be negative.

Arjovsky et al. (2019), Invariant risk minimization, https://arxiv.org/abs/1907.02893 (IRMv1).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.immunisers.problem import Problem
from jaximm.types import AnyBatch, Params

Reading = Literal["logit_scale", "parameter_scale", "gradient_norm"]
READINGS = ("logit_scale", "parameter_scale", "gradient_norm")


def penalty(
    reading: Reading, problem: Problem, params: Params, first: AnyBatch, second: AnyBatch
) -> Float[Array, ""]:
    """g(first) g(second); with one batch twice, the square."""
    slopes = [slope(reading, problem, params, batch) for batch in (first, second)]
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), *slopes)
    return jax.tree.reduce(jnp.add, products)


def slope(reading: Reading, problem: Problem, params: Params, batch: AnyBatch) -> Params:
    """g: a scalar, or a tree like the parameters. Differentiable again."""
    weights = problem.weights(batch)

    def mean(losses):
        counts = weights.astype(losses.dtype)
        total = jnp.sum(counts)
        return jnp.sum(counts * losses) / jnp.where(total > 0, total, 1)

    if reading == "logit_scale":
        one = jnp.ones((), jax.tree.leaves(params)[0].dtype)
        return jax.jvp(lambda w: mean(problem.scaled_losses(params, batch, w)), (one,), (one,))[1]
    if reading == "parameter_scale":
        return jax.jvp(lambda theta: mean(problem.losses(theta, batch)), (params,), (params,))[1]
    return jax.grad(lambda theta: mean(problem.losses(theta, batch)))(params)


def halves(batch: AnyBatch) -> tuple[AnyBatch, AnyBatch]:
    """The first and the second half of some rows.

    Raises:
      ValueError: fewer than two rows.
    """
    n = jax.tree.leaves(batch)[0].shape[0]
    if n < 2:
        raise ValueError(
            f"two independent batches need two rows at least, got {n}; choose a larger batch size "
            "or two_batches=False."
        )
    return tuple(
        jax.tree.map(lambda leaf, part=part: leaf[part], batch)
        for part in (slice(n // 2), slice(n // 2, None))
    )
