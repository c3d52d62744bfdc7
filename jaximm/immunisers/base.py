"""What every immuniser shares: the problem it is given, and the linear backbone's own arithmetic.

A method is built by ``factory(config, problem)``. `Problem` says what the backbone is; for a linear
one, `linear_problem` adds the whole-data factors ``R`` with ``R^T R = K + lam I``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaximm import collectives, linalg
from jaximm.linalg.arrays import exponent_of, times_power_of_two
from jaximm.types import Batch, FeaturesFn, PairedBatch, Params


def check_run(steps: int, batch_size: int | None, task_rate: float = 0.0) -> None:
    """The fields that every method's configuration has, at the door.

    Raises:
      ValueError: steps or batch_size below 1, or task_rate outside [0, 1].
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}.")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be >= 1, or None for all rows, got {batch_size}.")
    if not 0 <= task_rate <= 1:
        raise ValueError(f"task_rate must be in [0, 1], got {task_rate}.")


class ProbeParams(NamedTuple):
    """A backbone and the primary task's linear head.

    For a linear backbone ``backbone`` is theta [d_in, d] and features are ``x @ theta``.
    """

    backbone: Params
    head: Params


class Factors(NamedTuple):
    """Upper-triangular R of each task, [d_in, d_in], with R^T R = X^T X / n + lam I."""

    primary: Float[Array, "d_in d_in"]
    harmful: Float[Array, "d_in d_in"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """What a method works on: a linear backbone. For any other: `jaximm.immunisers.DeepProblem`.

    Attributes:
      features_fn: ``features_fn(backbone, inputs) -> [n, d]``; keep one function object for runs of
        one shape, since compilations are shared by its identity.
      factors: whole-data factors of a linear backbone; None for any other.
    """

    features_fn: FeaturesFn
    factors: Factors | None = None

    def whole_data(self, method: str) -> Factors:
        """The factors, or a ValueError that says what the method needs."""
        if self.factors is None:
            raise ValueError(
                f"{method} needs a linear backbone with whole-data factors, got a problem without "
                "factors; make it with jaximm.immunisers.linear_problem."
            )
        return self.factors


def linear_features(backbone: Float[Array, "d_in d"], inputs: Array) -> Array:
    """Features of the linear backbone: ``inputs @ theta``."""
    return inputs @ backbone


def linear_problem(arrays: PairedBatch, *, damping_primary, damping_harmful) -> Problem:
    """The problem of a linear backbone, with both tasks' whole-data factors.

    Args:
      arrays: all training rows of both tasks.
      damping_primary: lam_P, in units of the mean-convention Gram matrix, > 0 where K_P is
        singular.
      damping_harmful: lam_H.

    Raises:
      ValueError: arrays of other shapes, widths that differ, a damping that is negative or not
        finite, or primary rows of deficient rank without damping: no factor of a singular K_P can
        be divided by.
    """
    for task, batch in zip(arrays._fields, arrays, strict=True):
        message = {"custom_message": f"the {task} task needs inputs [n, d] and targets [n, ...]"}
        chex.assert_rank(batch.x, 2, **message, exception_type=ValueError)
        chex.assert_equal_shape_prefix(list(batch), 1, **message, exception_type=ValueError)
    widths = arrays.primary.x.shape[1], arrays.harmful.x.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"the two tasks must have inputs of one width, got {widths[0]} and {widths[1]}."
        )
    for name, damping in (("primary", damping_primary), ("harmful", damping_harmful)):
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping_{name} must be finite and >= 0, got {damping}.")
    factors = Factors(
        triangle(arrays.primary.x, damping_primary), triangle(arrays.harmful.x, damping_harmful)
    )
    if damping_primary == 0:
        values = np.linalg.svd(np.asarray(factors.primary), compute_uv=False)
        least = linalg.rank_rtol(arrays.primary.x.shape, factors.primary.dtype) * values[0]
        if not values[-1] > least:
            raise ValueError(
                f"the primary rows have rank {np.sum(values > least)} of {widths[0]}, so their "
                "undamped Gram matrix is singular; pass damping_primary > 0, or fewer columns."
            )
    return Problem(features_fn=linear_features, factors=factors)


@jax.jit
def triangle(inputs: Float[Array, "n d"], damping) -> Float[Array, "d d"]:
    """Upper-triangular R with R^T R = X^T X / n + lam I, by QR: the Gram matrix is not formed."""
    return jnp.linalg.qr(linalg.damped_factor(inputs, damping=damping), mode="r")


def relative_damping(inputs: Float[Array, "n d"], relative: float) -> Float[Array, ""]:
    """``relative * tr(X^T X / n) / d``: damping as a part of the mean eigenvalue of the task."""
    exponent = exponent_of(inputs)
    mean_square = jnp.mean(times_power_of_two(inputs, -exponent) ** 2)
    return times_power_of_two(relative * mean_square, 2 * exponent)


def init_params(d_in: int, key: jax.Array | None, *, dtype=None) -> ProbeParams:
    """A linear backbone to start from: the identity, or with a key entries of N(0, 1 / d_in)."""
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    if key is None:
        backbone = jnp.eye(d_in, dtype=dtype)
    else:
        backbone = jax.random.normal(key, (d_in, d_in), dtype) / d_in**0.5
    return ProbeParams(backbone, jnp.zeros(d_in, dtype))


def probe_loss(features_fn: FeaturesFn) -> Callable[[ProbeParams, Batch], Float[Array, ""]]:
    """``loss(params, batch)`` = mean of (f w - y)^2 / 2, the l2 probe of the primary task."""

    def loss(params: ProbeParams, batch: Batch) -> Float[Array, ""]:
        error = features_fn(params.backbone, batch.x) @ params.head - batch.y
        return jnp.mean(error**2) / 2

    return loss


def global_batch(batch: PairedBatch) -> PairedBatch:
    """The rows of every device, where they are spread over devices: one all-gather.

    Linear methods then do the same small arithmetic on every device.
    """
    rows = collectives.gather_rows(*batch.primary, *batch.harmful)
    return PairedBatch(Batch(*rows[:2]), Batch(*rows[2:]))


class TaskStep(NamedTuple):
    """The parameters after one step on the primary task, and its loss before the step."""

    params: ProbeParams
    loss: Float[Array, ""]


def task_step(params: ProbeParams, batch: Batch, rate: float) -> TaskStep:
    r"""A gradient step on the primary loss in the head, then one in theta, of stable sizes.

    The size is ``rate / L``, L = max(mean |f|^2, |w|^2 mean |x|^2) bounding the curvature in the
    head w and in theta, so each of the two steps lowers the loss for ``0 < rate <= 1``, whatever
    the scale of theta and w. (One step of both at once would not: the loss has a product of the
    two, and far from a fit at small theta and w it can throw both.)

    The task loss cannot hold an invertible linear backbone back: refitting the head to theta gives
    the raw inputs' optimum again. What it does is keep the head in step with theta.
    """
    theta, head = params
    n = batch.x.shape[0]
    features = batch.x @ theta
    head_curvature = jnp.sum(features**2) / n
    mean_square = jnp.sum(batch.x**2) / n

    def size(head):
        curvature = jnp.maximum(head_curvature, jnp.sum(head**2) * mean_square)
        return rate / jnp.maximum(curvature, jnp.finfo(theta.dtype).tiny)

    error = features @ head - batch.y
    moved = head - size(head) * (features.T @ error / n)
    pull = batch.x.T @ (features @ moved - batch.y) / n
    stepped = ProbeParams(theta - size(moved) * jnp.outer(pull, moved), moved)
    return TaskStep(stepped, jnp.mean(error**2) / 2)


class Spectrum(NamedTuple):
    """Eigenvalues, ascending, and eigenvectors of H(theta) = (R theta)^T (R theta)."""

    values: Float[Array, "d"]
    vectors: Float[Array, "d d"]


def spectrum(factor: Float[Array, "d d"], theta: Float[Array, "d d"]) -> Spectrum:
    """The damped Hessian's eigen-decomposition, of one task under a linear backbone."""
    features = factor @ theta
    exponent = exponent_of(features)
    features = times_power_of_two(features, -exponent)  # squares stay within the dtype
    values, vectors = jnp.linalg.eigh(jnp.matmul(features.T, features, precision="highest"))
    # Round-off can push the smallest below zero once kappa nears 1 / eps.
    floor = jnp.finfo(values.dtype).eps * values[-1]
    return Spectrum(times_power_of_two(jnp.maximum(values, floor), 2 * exponent), vectors)


def capped(rates: Float[Array, "d"], cap: float) -> Float[Array, "d"]:
    """Relative rates scaled down, all together, so that the largest moves at most `cap`."""
    largest = jnp.max(jnp.abs(rates))
    return rates * jnp.minimum(1, cap / jnp.maximum(largest, jnp.finfo(rates.dtype).tiny))


def multiplied(
    theta: Float[Array, "d_in d"], found: Spectrum, rates: Float[Array, "d"]
) -> Float[Array, "d_in d"]:
    """``theta V diag(rates) V^T``: what the preconditioned step theta (I - 2 eta G) takes off.

    With whole-data factors K^{-1} dR/dtheta = 2 theta G exactly, and G shares H's eigenvectors, so
    the inverse is never applied: eigenvalue i of H becomes h_i (1 - rates_i)^2.
    """
    return ((theta @ found.vectors) * rates[None, :]) @ found.vectors.T
