"""The arithmetic of a linear map of fixed rows: H(theta) = theta^T (K + lam I) theta, exactly."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.immunisers.problem import NUMBERS, THETA, LinearTask, ProbeParams
from jaximm.linalg.arrays import exponent_of, times_power_of_two
from jaximm.types import Batch


class TaskStep(NamedTuple):
    """The parameters after one step on the primary task, and its loss before the step."""

    params: ProbeParams
    loss: Float[Array, ""]


def task_step(
    params: ProbeParams, batch: Batch, rate: float, task: LinearTask = NUMBERS
) -> TaskStep:
    r"""A gradient step on the primary loss in the head, then one in theta, of stable sizes.

    The size is ``rate / L``, L = c max(mean |f|^2, |W|^2 mean |x|^2) bounding the curvature in the
    head W and in theta (c = 1 for squared errors; 1 / 2 for a softmax, whose bias adds 1 to |f|^2),
    so each of the two steps lowers the loss for ``0 < rate <= 1``, whatever the scale of theta and
    W. (One step of both at once would not: the loss has a product of the two, and far from a fit at
    small theta and W it can throw both.)

    The task loss cannot hold an invertible theta back: refitting the head to theta gives the raw
    rows' optimum again. What it does is keep the head in step with theta.
    """
    theta, head = params.backbone[THETA], params.head
    n = batch.x.shape[0]
    features = batch.x @ theta
    head_curvature = jnp.sum(features**2) / n + (0 if task.classes is None else 1)
    mean_square = jnp.sum(batch.x**2) / n

    def size(head):
        weights = jnp.sum(task.kernel(head) ** 2)
        curvature = task.objective.curvature * jnp.maximum(head_curvature, weights * mean_square)
        return rate / jnp.maximum(curvature, jnp.finfo(theta.dtype).tiny)

    outputs = task.outputs(features, head)
    error, step = task.objective.residuals(outputs, batch.y) / n, size(head)
    # The size last: it is huge where nothing is to be moved.
    moved = task.stepped(head, step * (features.T @ error), step * jnp.sum(error, axis=0))
    error = task.objective.residuals(task.outputs(features, moved), batch.y)
    pull = (batch.x.T @ error / n) @ task.kernel(moved).T
    stepped = ProbeParams({**params.backbone, THETA: theta - size(moved) * pull}, moved)
    return TaskStep(stepped, task.loss(outputs, batch.y))


def replaced(params: ProbeParams, theta: Float[Array, "d_in d"]) -> ProbeParams:
    """The parameters with another theta."""
    return params._replace(backbone={**params.backbone, THETA: theta})


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
    theta: Float[Array, "d_in d"], hessian: Spectrum, rates: Float[Array, "d"]
) -> Float[Array, "d_in d"]:
    """``theta V diag(rates) V^T``: what the preconditioned step theta (I - 2 eta G) takes off.

    With whole-data factors K^{-1} dR/dtheta = 2 theta G exactly, and G shares H's eigenvectors, so
    the inverse is never applied: eigenvalue i of H becomes h_i (1 - rates_i)^2.
    """
    return ((theta @ hessian.vectors) * rates[None, :]) @ hessian.vectors.T
