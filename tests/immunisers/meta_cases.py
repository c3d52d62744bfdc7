"""A small network with a harmful head of two classes, for tests of meta-learned methods."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaximm import immunisers
from jaximm.immunisers import ProbeParams, Problem
from jaximm.types import Batch, Head, PairedBatch

KEY = jax.random.key(3)
HALF = 4  # rows of an attack, and held-out rows


def _gaussian(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def features_fn(backbone, x):
    return jnp.tanh(x @ backbone["kernel"])


def rows():
    primary, harmful = _gaussian(0, 6, 4), _gaussian(1, 2 * HALF, 4)
    return PairedBatch(
        Batch(primary, jnp.array([0, 1, 2, 0, 1, 2])),
        Batch(harmful, (harmful[:, 0] > 0).astype(jnp.int32)),
    )


def start():
    return ProbeParams({"kernel": _gaussian(2, 4, 3) / 2}, Head(_gaussian(3, 3, 3), jnp.zeros(3)))


HARMFUL_HEAD = Head(_gaussian(4, 3, 2), jnp.zeros(2))


def problem(**fields):
    return Problem(
        **{
            "features_fn": features_fn,
            "width": 3,
            "classes": 3,
            "harmful_classes": 2,
            "harmful_head": HARMFUL_HEAD,
            "label_smoothing": 0.0,
            "optimiser": optax.sgd(1.0),
            **fields,
        }
    )


def method_on(posed, name, **config):
    return immunisers.make_immuniser(name, immunisers.make_config(name, **config), posed)


def method(name, **config):
    return method_on(problem(), name, **config)


def stepped(one, state=None, batch=None):
    """One update: the state after it, and what it says."""
    state = one.init(start(), KEY) if state is None else state
    return jax.jit(one.update)(state, rows() if batch is None else batch, KEY)


def logits(backbone, head, x):
    return head.outputs(features_fn(backbone, x))


def loss(backbone, head, batch):
    """Mean cross-entropy."""
    logs = jax.nn.log_softmax(logits(backbone, head, batch.x))
    return -jnp.mean(jnp.take_along_axis(logs, batch.y[:, None], axis=1))


def halves():
    """Rows of the attack, and held-out ones."""
    return (jax.tree.map(lambda leaf, part=part: leaf[part], rows().harmful)
            for part in (slice(HALF), slice(HALF, None)))  # fmt: skip
