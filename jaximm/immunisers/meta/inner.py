"""Some steps of an optimiser inside of an update: the attacker that a method trains against.

With theta the parameters at the start, theta^(k) those after k steps and g an outer function,

order 1   d g(theta^(K)) / d theta is taken to be g'(theta^(K)): first-order MAML. No step is
          differentiated, nor what the loss has beside theta; memory is that of one step,
          whatever K.
order 2   it is differentiated through every step. Steps are checkpointed: memory is K times the
          parameters and the optimiser's state.

Finn, Abbeel, Levine (2017), Model-agnostic meta-learning, https://arxiv.org/abs/1703.03400; Nichol,
Achiam, Schulman (2018), On first-order meta-learning algorithms, https://arxiv.org/abs/1803.02999.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaximm.training.optimiser import optimiser_state, optimiser_step
from jaximm.types import AnyBatch, Params


class Inner(NamedTuple):
    """theta^(K), the loss before each step, and the sum of what was observed (0 without)."""

    params: Params
    losses: Float[Array, "steps"]
    observed: Float[Array, ""]


def inner_steps(
    loss_fn: Callable[[Params, AnyBatch], Float[Array, ""]],
    params: Params,
    batches: AnyBatch,
    optimiser: optax.GradientTransformation,
    *,
    order: int,
    steps: int | None = None,
    observe: Callable[[Params, Array], Float[Array, ""]] | None = None,
    every: int = 1,
) -> Inner:
    """K steps on ``loss_fn(theta, batch)`` from theta, with a fresh state of the optimiser.

    >>> import jax, jax.numpy as jnp, optax
    >>> def after(theta, order):  # one step of theta - 0.25 * 2 theta, then its square
    ...     loss, sgd = lambda theta, _: theta**2, optax.sgd(0.25)
    ...     return inner_steps(loss, theta, None, sgd, order=order, steps=1).params ** 2
    >>> [float(jax.grad(after)(jnp.asarray(2.0), order)) for order in (1, 2)]  # theta, theta / 2
    [2.0, 1.0]

    Args:
      loss_fn: a scalar of all rows of the attack. Where rows are spread over devices, give the
        batch whole (`jaximm.immunisers.gradient.from_objective(whole=...)`), or the devices part.
      params: theta, a pytree of floating arrays.
      batches: a pytree of arrays with the steps first (`in_steps` makes it of rows); None: the same
        for every step, and `loss_fn` gets None.
      optimiser: any of optax. Adam is differentiated at order 2 only with ``eps_root > 0``: the
        root of a second moment of zero has no slope.
      order: 1 or 2.
      steps: K, where there are no batches to count.
      observe: ``observe(theta^(k), k)`` for k = 0 .. K - 1, summed. At order 1 its gradient is the
        sum of the gradients at theta^(k), and reaches theta alone.
      every: only k = 0, every, 2 every, .. are observed; the others cost nothing.

    Raises:
      ValueError: another order, every below 1, or neither batches nor steps.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    if batches is None and steps is None:
        raise ValueError("without batches, say how many steps there are.")
    if every < 1:
        raise ValueError(f"every must be >= 1, got {every}.")
    start = lax.stop_gradient(params) if order == 1 else params
    watched = observe or (lambda theta, k: jnp.zeros(()))
    sloped = order == 1 and observe is not None

    def seen(theta, number):
        """What is observed, and its slope where steps are not differentiated."""
        if sloped:
            return jax.value_and_grad(watched)(theta, number)
        return watched(theta, number), None

    def unseen(theta, number):
        del number
        return jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, theta) if sloped else None

    def step(carry, number_and_batch):
        theta, opt_state, total, slopes = carry
        number, batch = number_and_batch
        loss, gradient = jax.value_and_grad(loss_fn)(theta, batch)
        if every == 1:
            value, slope = seen(theta, number)
        else:
            value, slope = lax.cond(number % every == 0, seen, unseen, theta, number)
        if sloped:
            slopes = jax.tree.map(jnp.add, slopes, slope)
        moved, opt_state = optimiser_step(optimiser, gradient, opt_state, theta)
        return (moved, opt_state, total + value.astype(total.dtype), slopes), loss

    count = steps if batches is None else jax.tree.leaves(batches)[0].shape[0]
    numbers = jnp.arange(count, dtype=jnp.int32)
    slopes = jax.tree.map(jnp.zeros_like, start)
    dtype = jax.eval_shape(watched, start, numbers[0]).dtype
    carry = (start, optimiser_state(optimiser, start), jnp.zeros((), dtype), slopes)
    if order == 2:
        (theta, _, total, _), losses = lax.scan(jax.checkpoint(step), carry, (numbers, batches))
        return Inner(theta, losses, total)
    ran = lax.scan(step, carry, (numbers, batches))
    (theta, _, total, slopes), losses = lax.stop_gradient(ran)
    moves = jax.tree.map(lambda leaf: leaf - lax.stop_gradient(leaf), params)  # zeros, of slope 1
    pulled = jax.tree.map(lambda slope, move: jnp.sum(slope * move), slopes, moves)
    total += sum(leaf.astype(dtype) for leaf in jax.tree.leaves(pulled))
    return Inner(jax.tree.map(jnp.add, theta, moves), losses, total)


def in_steps(batch: AnyBatch, steps: int) -> AnyBatch:
    """Rows [n, ...] as [steps, n / steps, ...], in their order.

    Raises:
      ValueError: rows that the steps do not divide.
    """
    n = jax.tree.leaves(batch)[0].shape[0]
    if n % steps:
        raise ValueError(f"{n} rows do not divide by {steps} steps; choose another batch size.")
    return jax.tree.map(lambda leaf: leaf.reshape(steps, -1, *leaf.shape[1:]), batch)
