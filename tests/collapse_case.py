"""A perceptron of one head and two sites, two tasks for it, and a method's step, in float64."""

import itertools

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaximm import immunisers
from jaximm.immunisers import ProbeParams, Problem
from jaximm.types import Batch, Head, PairedBatch

SIZES, ROWS, CLASSES = (20, 32, 16, 5), 40, 5
KEYS = jax.random.split(jax.random.PRNGKey(0), 6)
KEY = jax.random.key(3)


def hidden_and_features(backbone, x, offsets=None):
    offsets = {"first": 0.0, "features": 0.0} if offsets is None else offsets
    hidden = (
        jnp.tanh(x @ backbone["first.kernel"] + backbone["first.bias"][None]) + offsets["first"]
    )
    features = jnp.tanh(hidden @ backbone["second.kernel"] + backbone["second.bias"][None])
    return hidden, features + offsets["features"]


def features_fn(backbone, x):
    return hidden_and_features(backbone, x)[1]


def sites_fn(backbone, x):
    return dict(zip(("first", "features"), hidden_and_features(backbone, x), strict=True))


def cross_entropy(logits, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]


def perturbed_fn(backbone, x, offsets):
    return hidden_and_features(backbone, x, offsets)[1]


def perturbed_losses(params, batch, offsets):
    features = perturbed_fn(params.backbone, batch.x, offsets)
    return cross_entropy(features @ params.head.kernel + params.head.bias[None], batch.y)


def loss(params, rows):
    """Mean cross-entropy, written out."""
    return jnp.mean(perturbed_losses(params, rows, {"first": 0.0, "features": 0.0}))


def _start() -> ProbeParams:
    keys = jax.random.split(KEYS[0], 3)
    kernels = [
        jax.random.normal(key, shape) * shape[0] ** -0.5
        for key, shape in zip(keys, itertools.pairwise(SIZES), strict=True)
    ]
    biases = [jnp.zeros(size) for size in SIZES[1:]]
    backbone = {"first.kernel": kernels[0], "first.bias": biases[0]}
    backbone |= {"second.kernel": kernels[1], "second.bias": biases[1]}
    return ProbeParams(backbone, Head(kernels[2], biases[2]))


def _tasks() -> PairedBatch:
    def task(x_key, y_key):
        labels = jax.random.randint(y_key, (ROWS,), 0, CLASSES, jnp.int32)
        return Batch(jax.random.normal(x_key, (ROWS, SIZES[0])), labels)

    return PairedBatch(primary=task(KEYS[3], KEYS[4]), harmful=task(KEYS[1], KEYS[2]))


START, TASKS = _start(), _tasks()


def made(name, optimiser=None, problem_fields=None, **fields):
    problem = Problem(
        **{
            "features_fn": features_fn,
            "sites_fn": sites_fn,
            "perturbed_fn": perturbed_fn,
            "width": SIZES[-2],
            "classes": CLASSES,
            "harmful_classes": CLASSES,
            "label_smoothing": 0.0,
            "optimiser": optimiser or optax.sgd(1.0),
            **(problem_fields or {}),
        }
    )
    return immunisers.make_immuniser(name, immunisers.make_config(name, **fields), problem)


def slope(name, **fields):
    """The gradient that a method descends, as one vector, and what it logs."""
    one = made(name, **fields)
    state = one.init(START, KEY)
    after, info = jax.jit(one.update)(state, TASKS, KEY)
    return ravel_pytree(jax.tree.map(jnp.subtract, START, after.params))[0], info


def stated(objective):
    """Value and gradient of ``objective(params)``, as one vector."""
    value, gradient = jax.jit(jax.value_and_grad(objective))(START)
    return value, ravel_pytree(gradient)[0]
