r"""Gauss-Newton: each step solves for the curvature of the loss in place of following its slope.

On a mini-batch, with g the gradient of its loss at w and z(w) the outputs,

    (G + lambda I) d = -g   by `iterations` steps of conjugate gradients,      w <- w + rate * d,
                            from 0.95 times the d of the step before,
    G = J^T H J,   J = dz/dw,   H = the Hessian of the loss in the outputs,

the generalised Gauss-Newton matrix of all weights together (Schraudolph 2002), which for
cross-entropy of classes or tokens is Fisher's. It is never formed: G is the Hessian at w of
v -> D(z(v) || z(w)), half the squared distance of real outputs or the divergence of two softmaxes
(`jaximm.objectives`), so that a product is one call of a linearised gradient.

Levenberg and Marquardt's damping: lambda = mu * g^T G g / g^T g, and with the decrease of the loss
over that of the quadratic model,

    rho = (L(w + rate d) - L(w)) / (rate g^T d + rate^2 d^T G d / 2),

mu falls threefold where rho > 3/4 and rises fourfold where rho < 1/4; a step that does not lower
its own loss, or whose loss is not finite, is not made (and mu rises).

Where K-FAC (Martens and Grosse 2015) inverts a Kronecker factor of each layer, an approximation of
this matrix that leaves out what layers have in common, small models allow to solve for the matrix
itself; and no layer has to be of a kind that has factors. Badly scaled features cost conjugate
gradients iterations, not descent steps; and since a solution is gone on with in
the next step, a few of them do.

A step is dear: a gradient, the loss once more, a linearised gradient, and two products and one an
iteration, of up to twice the work of a gradient each. All of it is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaximm import objectives
from jaximm.attacks.grid import Hyper, Values, check_whole, grid
from jaximm.attacks.weights.descent import scaled_head
from jaximm.attacks.weights.problem import (
    Access,
    Batches,
    ModelWeights,
    WeightAttack,
    outputs_of,
)

SOURCE = (
    "Martens (2010), Deep learning via Hessian-free optimization, "
    "https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf; Schraudolph (2002), Fast "
    "curvature matrix-vector products for second-order gradient descent, "
    "https://doi.org/10.1162/08997660260028683; Martens and Grosse (2015), "
    "https://arxiv.org/abs/1503.05671 (K-FAC)"
)

_FALL, _RISE = 1 / 3, 4.0
_LEAST, _MOST = 1e-12, 1e12  # of mu
_KEPT = 0.95  # of a direction, as Martens has it


class State(NamedTuple):
    """The weights, mu, and the direction of the step before."""

    weights: ModelWeights
    damping: Float[Array, ""]
    direction: Float[Array, "p"]


class Solved(NamedTuple):
    """An approximate solution of (G + damping I) d = -g."""

    direction: Float[Array, "p"]
    slope: Float[Array, ""]  # g^T d
    curvature: Float[Array, ""]  # d^T G d
    damping: Float[Array, ""]


def solve(
    product: Callable[[Float[Array, "p"]], Float[Array, "p"]],
    gradient: Float[Array, "p"],
    relative_damping: Float[Array, ""],
    start: Float[Array, "p"],
    *,
    iterations: int,
) -> Solved:
    """Conjugate gradients on a positive semi-definite G, damped.

    Args:
      product: G times a vector; called `iterations` times and twice.
      gradient: g; of zeros, there is no damping.
      relative_damping: mu; the damping is mu g^T G g / g^T g.
      start: the direction to begin from.
      iterations: at least 1, unrolled: the compiler counts them all, and convolutions run slowly
        inside a compiled loop on a CPU.

    >>> G = jnp.diag(jnp.array([4.0, 1.0]))
    >>> solved = solve(
    ...     lambda v: G @ v, jnp.ones(2), jnp.zeros(()), jnp.zeros(2), iterations=2)
    >>> solved.direction.round(5).tolist()
    [-0.25, -1.0]
    """
    damping = relative_damping * _over(gradient @ product(gradient), gradient @ gradient)
    direction, residual = start, -gradient - product(start) - damping * start
    along, square = residual, residual @ residual
    for _ in range(iterations):
        curved = product(along) + damping * along
        # What is solved already, or flat, is left as it is.
        size = _over(square, along @ curved)
        direction, residual = direction + size * along, residual - size * curved
        before, square = square, residual @ residual
        along = residual + _over(square, before) * along
    # (G + damping I) d = -g - residual.
    curvature = direction @ (-gradient - residual - damping * direction)
    return Solved(direction, gradient @ direction, curvature, damping)


def _over(one: jax.Array, other: jax.Array) -> jax.Array:
    """Their quotient; 0 unless the other is above 0."""
    return jnp.where(other > 0, one / jnp.where(other > 0, other, 1), 0)


def _flat(weights: ModelWeights) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """What trains, as one vector; and back."""
    with jax.numpy_dtype_promotion("standard"):  # parameters may have several dtypes
        return ravel_pytree((weights.params, weights.head))


def _init(access: Access, hyper: Hyper) -> State:
    weights = scaled_head(access, hyper)
    flat, _ = _flat(weights)
    return State(weights, hyper["damping"], jnp.zeros_like(flat, hyper["damping"].dtype))


def _update(iterations: int, state: State, batches: Batches, access: Access, hyper: Hyper) -> State:
    weights, batch, dtype = state.weights, batches.harmful, state.damping.dtype
    flat, unravel = _flat(weights)
    stored, flat = flat.dtype, flat.astype(dtype)
    objective = objectives.of_targets(batch.y)

    def moved(flat: jax.Array) -> ModelWeights:
        params, head = unravel(flat.astype(stored))
        return weights._replace(params=params, head=head)

    def outputs(flat: jax.Array) -> Any:
        return outputs_of(access.features_fn, moved(flat), batch.x)

    def loss(flat: jax.Array) -> jax.Array:
        return access.loss_fn(moved(flat), batch).astype(dtype)

    here = jax.lax.stop_gradient(outputs(flat))

    def distance(flat: jax.Array) -> jax.Array:
        far = objective.divergences(outputs(flat), here, batch.y)
        return objective.mean(far, batch.y).astype(dtype)

    value, gradient = jax.value_and_grad(loss)(flat)
    _, product = jax.linearize(jax.grad(distance), flat)
    solution = solve(
        product, gradient, state.damping, _KEPT * state.direction, iterations=iterations
    )
    rate = hyper["learning_rate"]
    there = flat + rate * solution.direction
    trial = loss(there)
    expected = rate * solution.slope + rate**2 * solution.curvature / 2
    lower = jnp.isfinite(trial) & (trial < value)
    ratio = jnp.where(lower, _over(value - trial, -expected), 0)
    factor = jnp.where(ratio > 3 / 4, _FALL, jnp.where(ratio < 1 / 4, _RISE, 1.0)).astype(dtype)
    damping = jnp.clip(state.damping * factor, _LEAST, _MOST)
    return State(moved(jnp.where(lower, there, flat)), damping, solution.direction)


# Built once: the same function objects each time, so that jit finds the compiled run again.
@functools.lru_cache(maxsize=16)
def _step(iterations: int) -> Callable[..., State]:
    return functools.partial(_update, iterations)


def gauss_newton(
    *,
    learning_rates: Values = (0.1, 0.3, 1.0),
    dampings: Values = (1e-4,),
    head_scales: Values = (1.0,),
    iterations: int = 8,
) -> WeightAttack:
    """Steps that solve for the curvature, with adapted damping, by conjugate gradients.

    Args:
      learning_rates: part of a solved step that is made, in (0, 1]; below 1 steps of several
        mini-batches average.
      dampings: mu at the start, > 0, relative to the curvature along the gradient.
      head_scales: factors on the head before the first step; 0 re-initialises it.
      iterations: of conjugate gradients a step, >= 1; compiled in.
    """
    check_whole("iterations", iterations)
    return WeightAttack(
        init=_init,
        update=_step(iterations),
        update_reads=("learning_rate",),
        grid=grid(
            learning_rate=(learning_rates, "(0, 1]"),
            damping=(dampings, "(0, inf)"),
            head_scale=(head_scales, "[0, inf)"),
        ),
        natural_bounds=(("learning_rate", 1.0), ("head_scale", 0.0), ("head_scale", 1.0)),
        title="Gauss-Newton",
        kind="preconditioned",
        source=SOURCE,
        traits=frozenset({"preconditions"}),
        # Beyond a training step: the loss once more, a gradient that is linearised, and of each
        # product the tangents of forward and backward pass.
        step_passes=4.0 + 6.0 * (iterations + 2),
    )
