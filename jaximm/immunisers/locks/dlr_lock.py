r"""DLR-Lock: a block of the model becomes a deep residual network of low rank of about its size.

A block f: R^d -> R^d with p parameters is replaced by J residual layers of rank r,

    x_{j+1} = x_j + s(x_j A_j) B_j,    A_j [d, r], B_j [r, d],    j = 1 .. J,    2 d r J ~ p

fitted to f's outputs on cached activations x: min mean |g(x) - f(x)|^2. The function is nearly the
same at the same forward cost; what a gradient needs of memory grows with J, and a deep narrow net
is harder to train on.

What may be claimed: tuning the released form costs more memory, and steps. Nothing is secret.
Whoever has the released form distils it back into a plain block by the owner's own fit
(`fit_block` with `plain_block`), or tunes the parts that were not replaced.

Sakamoto, Ablin, Danieli, Cuturi (2026), https://arxiv.org/abs/2605.10777. J, r, losses and tables
are in no source that we could read: the formula is our reading of the abstract.
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
from jaximm.types import Params

BlockFn = Callable[[Params, Float[Array, "n d"]], Float[Array, "n d"]]
"""``block(params, activations) -> activations``."""


class DeepLowRank(NamedTuple):
    """All layers' factors, stacked."""

    down: Float[Array, "layers d r"]
    up: Float[Array, "layers r d"]


class Plain(NamedTuple):
    """relu(x in + bias) out: what a block was before, and what a distiller uses."""

    inner: Float[Array, "d hidden"]
    bias: Float[Array, "hidden"]
    outer: Float[Array, "hidden d"]


def layers_of_size(parameters: int, d: int, r: int) -> int:
    """J of about as many parameters as the block has, at least 1.

    Raises:
      ValueError: a rank outside [1, d].
    """
    if not 1 <= r <= d:
        raise ValueError(f"the rank must be in [1, {d}], got {r}.")
    return max(1, round(parameters / (2 * d * r)))


def init_deep(rng_key: Array, *, d: int, r: int, layers: int, dtype=jnp.float32) -> DeepLowRank:
    """Each layer starts near the identity: B of 1 / sqrt(layers) the usual size."""
    down, up = jax.random.split(rng_key)
    return DeepLowRank(
        jax.random.normal(down, (layers, d, r), dtype) / d**0.5,
        jax.random.normal(up, (layers, r, d), dtype) / (r * layers) ** 0.5,
    )


def deep_block(params: DeepLowRank, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The replacement, s = relu."""

    def layer(x, factors):
        return x + jax.nn.relu(x @ factors.down) @ factors.up, None

    return lax.scan(layer, x, params)[0]


def init_plain(rng_key: Array, *, d: int, hidden: int, dtype=jnp.float32) -> Plain:
    """Gaussian weights of the usual size and no bias."""
    inner, outer = jax.random.split(rng_key)
    return Plain(
        jax.random.normal(inner, (d, hidden), dtype) * (2 / d) ** 0.5,
        jnp.zeros(hidden, dtype),
        jax.random.normal(outer, (hidden, d), dtype) / hidden**0.5,
    )


def plain_block(params: Plain, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """A perceptron of one hidden layer."""
    return jax.nn.relu(x @ params.inner + params.bias[None, :]) @ params.outer


class Fit(NamedTuple):
    """The fitted parameters, and the loss before each step over the outputs' variance."""

    params: Params
    errors: Float[Array, "steps"]


def fit_block(
    block: BlockFn,
    params: Params,
    inputs: Float[Array, "n d"],
    outputs: Float[Array, "n d"],
    optimiser: optax.GradientTransformation,
    *,
    steps: int,
    batch_size: int,
    rng_key: Array,
) -> Fit:
    """Fits a block to cached activations of another one: the owner's lock, and the distiller's key.

    min_p mean_i |block(p, x_i) - y_i|^2 over the mean of |y_i - mean y|^2, on batches that are
    drawn with replacement. The batch of a step is a function of the key and the step's number.

    Raises:
      ValueError: inputs and outputs of unequal rows.
    """
    if inputs.shape[0] != outputs.shape[0]:
        raise ValueError(
            f"inputs and outputs must have as many rows, got {inputs.shape} and {outputs.shape}."
        )
    scale = jnp.mean(jnp.sum((outputs - jnp.mean(outputs, axis=0)[None, :]) ** 2, axis=1))

    def loss_fn(params, x, y):
        return jnp.mean(jnp.sum((block(params, x) - y) ** 2, axis=1)) / scale

    def step(carry, number):
        params, opt_state = carry
        key = jax.random.fold_in(rng_key, number)
        rows = jax.random.randint(key, (batch_size,), 0, inputs.shape[0])
        loss, slope = jax.value_and_grad(loss_fn)(params, inputs[rows], outputs[rows])
        return tuple(optimiser_step(optimiser, slope, opt_state, params)), loss

    start = (params, optimiser_state(optimiser, params))
    (params, _), errors = lax.scan(step, start, jnp.arange(steps))
    return Fit(params, errors)
