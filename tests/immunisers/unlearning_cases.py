"""A small network with two heads and rows for it, and one step of plain descent, for formulas."""

import functools

import jax
import jax.numpy as jnp
import optax

from jaximm import immunisers
from jaximm.immunisers import ProbeParams, Problem, init_head
from jaximm.types import Batch, Head, PairedBatch
from tests.immuniser_cases import CLASSES, HARMFUL, features_fn, gaussian

KEY = jax.random.key(3)
N = 8
HARMFUL_HEAD = Head(jnp.asarray(gaussian(7, 4, HARMFUL)), jnp.zeros(HARMFUL))


def params(scale=1.0) -> ProbeParams:
    backbone = {
        "first": scale * jnp.asarray(gaussian(4, 6, 7) / 2),
        "second": jnp.asarray(gaussian(5, 7, 4) / 2),
    }
    head = init_head(4, CLASSES, jnp.float64)
    return ProbeParams(backbone, head._replace(kernel=jnp.asarray(gaussian(6, 4, CLASSES))))


def rows(seed, classes) -> Batch:
    labels = jnp.asarray(abs(gaussian(seed + 50, N) * 10).astype(int) % classes, jnp.int32)
    return Batch(jnp.asarray(gaussian(seed, N, 6)), labels)


PAIR = PairedBatch(rows(1, CLASSES), rows(2, HARMFUL))


def problem(**fields) -> Problem:
    return Problem(
        **{
            "features_fn": features_fn,
            "width": 4,
            "classes": CLASSES,
            "harmful_classes": HARMFUL,
            "harmful_head": HARMFUL_HEAD,
            "optimiser": optax.sgd(1.0),
            "label_smoothing": 0.0,
            **fields,
        }
    )


def method(name, posed=None, **fields):
    posed = problem() if posed is None else posed
    return immunisers.make_immuniser(name, immunisers.make_config(name, **fields), posed)


def logits(theta: ProbeParams, batch: Batch, head=None):
    head = theta.head if head is None else head
    return features_fn(theta.backbone, batch.x) @ head.kernel + head.bias[None, :]


def losses(theta: ProbeParams, batch: Batch, head=None):
    return -jax.nn.log_softmax(logits(theta, batch, head))[jnp.arange(N), batch.y]


def stepped(one, theta, batch, start=None):
    """After one update from theta; the reference is where the run started."""
    state = one.init(params() if start is None else start, KEY)._replace(params=theta)
    return jax.jit(one.update)(state, batch, KEY)


def descended(objective, theta):
    """Value, and theta less the gradient."""
    value, slope = jax.jit(jax.value_and_grad(objective))(theta)
    return value, jax.tree.map(jnp.subtract, theta, slope)


@functools.cache
def moved() -> ProbeParams:
    return params(1.2)
