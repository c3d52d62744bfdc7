"""What every immuniser shares: the problem it is given, and the linear backbone's own arithmetic.

A method is built by ``factory(config, problem)``. `Problem` says what the backbone is; for a linear
one, `linear_problem` adds the whole-data factors ``R`` with ``R^T R = K + lam I``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm import linalg
from jaximm.types import Batch, FeaturesFn, PairedBatch, Params


class ProbeParams(NamedTuple):
    """A backbone and the primary task's linear head.

    For a linear backbone ``backbone`` is theta [d_in, d] and features are ``x @ theta``.
    """

    backbone: Params
    head: Float[Array, "d"]


class Factors(NamedTuple):
    """Upper-triangular R of each task, [d_in, d_in], with R^T R = X^T X / n + lam I."""

    primary: Float[Array, "d_in d_in"]
    harmful: Float[Array, "d_in d_in"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """What a method works on.

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
                f"{method} needs a linear backbone with whole-data factors "
                "(jaximm.immunisers.linear_problem), got a problem without factors; "
                'give rows="batch" or use condition_gap.'
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
      ValueError: widths that differ.
    """
    widths = arrays.primary.x.shape[1], arrays.harmful.x.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"the two tasks must have inputs of one width, got {widths[0]} and {widths[1]}."
        )
    return Problem(
        features_fn=linear_features,
        factors=Factors(
            triangle(arrays.primary.x, damping_primary), triangle(arrays.harmful.x, damping_harmful)
        ),
    )


@jax.jit
def triangle(inputs: Float[Array, "n d"], damping) -> Float[Array, "d d"]:
    """Upper-triangular R with R^T R = X^T X / n + lam I, by QR: the Gram matrix is not formed."""
    return jnp.linalg.qr(linalg.damped_factor(inputs, damping=damping), mode="r")


def relative_damping(inputs: Float[Array, "n d"], relative: float) -> Float[Array, ""]:
    """``relative * tr(X^T X / n) / d``: damping as a part of the mean eigenvalue of the task."""
    n, d = inputs.shape
    return relative * jnp.sum(inputs**2) / (n * d)


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


class TaskStep(NamedTuple):
    """The parameters after one step on the primary task, and its loss before the step."""

    params: ProbeParams
    loss: Float[Array, ""]


def task_step(params: ProbeParams, batch: Batch, rate: float) -> TaskStep:
    r"""One gradient step on the primary loss of a linear backbone, with a stable step size.

    The step is ``rate / L``, L = max(mean |f|^2, |w|^2 mean |x|^2) bounding the curvature in the
    head and in theta, so ``0 < rate <= 1`` lowers each block's loss whatever the scale of theta.

    The task loss cannot hold an invertible linear backbone back: refitting the head to theta gives
    the raw inputs' optimum again. What it does is keep the head in step with theta.
    """
    theta, head = params
    features = batch.x @ theta
    error = features @ head - batch.y
    n = batch.x.shape[0]
    pull = batch.x.T @ error / n
    curvature = jnp.maximum(jnp.sum(features**2) / n, jnp.sum(head**2) * jnp.sum(batch.x**2) / n)
    step = rate / jnp.maximum(curvature, jnp.finfo(theta.dtype).tiny)
    stepped = ProbeParams(theta - step * jnp.outer(pull, head), head - step * (theta.T @ pull))
    return TaskStep(stepped, jnp.mean(error**2) / 2)


class Spectrum(NamedTuple):
    """Eigenvalues, ascending, and eigenvectors of H(theta) = (R theta)^T (R theta)."""

    values: Float[Array, "d"]
    vectors: Float[Array, "d d"]


def spectrum(factor: Float[Array, "d d"], theta: Float[Array, "d d"]) -> Spectrum:
    """The damped Hessian's eigen-decomposition, of one task under a linear backbone."""
    features = factor @ theta
    values, vectors = jnp.linalg.eigh(jnp.matmul(features.T, features, precision="highest"))
    # Round-off can push the smallest below zero once kappa nears 1 / eps.
    floor = jnp.finfo(values.dtype).eps * values[-1]
    return Spectrum(jnp.maximum(values, floor), vectors)


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
