"""A small perceptron that knows ten digits, and attackers who tune it, for tests of locks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaximm.data.tables import mnist
from jaximm.training.optimiser import optimiser_state
from jaximm.types import Batch

TRAIN, HELD, WIDTHS = 600, 400, (49, 24, 16)
HARMFUL = 2
RATES = (1e-3, 1e-2, 3e-2)


@functools.cache
def digits() -> tuple[Batch, Batch]:
    """Training and held-out rows of 7 x 7 pixels, ten classes."""
    read = mnist.read_5k()
    rows = np.random.default_rng(0).permutation(len(read.labels))[: TRAIN + HELD]
    pixels = np.asarray(read.images, float).reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)) / 255
    x = jnp.asarray(pixels[rows].reshape(TRAIN + HELD, -1))
    y = jnp.asarray(read.labels[rows], jnp.int32)
    return Batch(x[:TRAIN], y[:TRAIN]), Batch(x[TRAIN:], y[TRAIN:])


def harmful(rows: Batch) -> Batch:
    """Whether a digit is above 4."""
    return Batch(rows.x, rows.y // 5)


def features_fn(params, x):
    for layer in ("0", "1"):
        x = jax.nn.relu(x @ params[f"{layer}.kernel"] + params[f"{layer}.bias"][None, :])
    return x


def start(seed=0):
    """Random layers."""
    keys = jax.random.split(jax.random.key(seed), 2)
    sizes = (WIDTHS[:2], WIDTHS[1:])
    return {
        f"{i}.{name}": leaf
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True))
        for name, leaf in (
            ("kernel", jax.random.normal(key, size) * (2 / size[0]) ** 0.5),
            ("bias", jnp.zeros(size[1])),
        )
    }


def head(classes, seed=0):
    return jax.random.normal(jax.random.key(100 + seed), (WIDTHS[-1], classes)) * 0.1


def accuracy(logits, y):
    return jnp.mean((jnp.argmax(logits, axis=1).astype(y.dtype) == y).astype(jnp.float64))


ADAM_STEP = optax.adam(0.01)
ADAM = {None: optax.adam(1.0), 1.0: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))}
SGD = {None: optax.sgd(1.0), 1.0: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))}


@functools.partial(jax.jit, static_argnames=("features", "optimiser", "steps"))
def tuned(params, kernel, rows, held, rate, free, *, features, optimiser, steps):
    """Full-batch steps on layers and head; the parameters and the held-out accuracies.

    `free`: a tree of 1 and 0 that the layers' updates are multiplied by.
    """

    def loss_fn(both):
        logits = features(both[0], rows.x) @ both[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows.y).mean()

    def step(carry, _):
        both, opt_state = carry
        slope = jax.grad(loss_fn)(both)
        slope = (jax.tree.map(jnp.multiply, slope[0], free), slope[1])
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser.update(slope, opt_state, both)
        both = jax.tree.map(lambda leaf, change: leaf + rate * change, both, updates)
        return (both, opt_state), accuracy(features(both[0], held.x) @ both[1], held.y)

    both: Any = (params, kernel)
    (both, _), accuracies = jax.lax.scan(
        step, (both, optimiser_state(optimiser, both)), None, length=steps
    )
    return both, accuracies


@functools.cache
def taught():
    """Layers and a head of ten digits."""
    params = start()
    settings = {"features": features_fn, "optimiser": ADAM[None], "steps": 150}
    (params, kernel), _ = tuned(params, head(10), *digits(), 0.01, ones(params), **settings)
    return params, kernel


def ones(params) -> Any:
    return jax.tree.map(jnp.ones_like, params)


def attacked(
    params, *, features=features_fn, optimiser=ADAM[None], free=None, steps=60, rates=RATES
):
    """Best final held-out accuracy on the harmful task over rates, of layers and a fresh head."""
    train, held = (harmful(rows) for rows in digits())
    free = ones(params) if free is None else free
    return max(
        float(
            jnp.nan_to_num(
                tuned(
                    params,
                    head(HARMFUL),
                    train,
                    held,
                    rate,
                    free,
                    features=features,
                    optimiser=optimiser,
                    steps=steps,
                )[1][-1]
            )
        )
        for rate in rates
    )
