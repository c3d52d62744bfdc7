"""Every method on a small linear problem and on a small network, and what runs them, for tests."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaximm import data, immunisers
from jaximm.immunisers import ProbeParams, Problem, init_head
from jaximm.training import fit, step_fn
from jaximm.types import Batch, Head, PairedBatch
from tests import helpers

D, CLASSES, HARMFUL, BATCH, ROWS, STEPS = 5, 3, 2, 16, 40, 20

# The limit's rotation picks among tied coordinates: equally good, not equal to the last digit.
FIELDS = {
    "limit": {"rotate": False},
    # What compiles soonest; the mix of attackers is in test_tar.py.
    "tar": {"inner_steps": 4, "inner_rates": (0.1,), "inner_optimiser": "sgd", "retain_first": 0.0},
    "mlac": {"inner_steps": 2, "inner_rate": 0.1},
    "sophon": {"inner_steps": 2, "inner_rates": (0.1,)},
    "antidote": {"block": 2, "width": 8, "rank": 2, "rows": 8},
    "rmu": {"retain_weight": 1.0},  # the published one is for activations of a language model
    "undo": {"unlearn_steps": 1, "steps": 4},  # both phases in a few steps
    "mudman": {"fork_every": 2},
    "pmp": {"search_steps": 2},  # the mask is found within few steps
}
LINEAR = {name: (name, FIELDS.get(name, {})) for name in helpers.METHODS_OF_NUMBERS} | {
    "condition_gap rows=batch": (
        "condition_gap",
        {"rows": "batch", "primary_weight": 0.05, "harmful_weight": 0.05},
    ),
}
DEEP = {name: (name, FIELDS.get(name, {})) for name in immunisers.REGISTRY} | {
    "condition_gap": ("condition_gap", {"primary_weight": 0.01, "harmful_weight": 0.2}),
}
CASES = [("deep", name) for name in DEEP] + [("linear", name) for name in LINEAR]


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def linear_arrays(dtype=jnp.float64, seed=0):
    def task(seed, scales):
        x = gaussian(seed, ROWS, D) * scales
        return Batch(jnp.asarray(x, dtype), jnp.asarray(x @ np.arange(1.0, D + 1), dtype))

    scales = np.geomspace(1, 0.2, D), np.geomspace(0.3, 2, D)
    return PairedBatch(task(2 * seed, scales[0]), task(2 * seed + 1, scales[1]))


def deep_arrays(dtype=jnp.float64, seed=1):
    def task(seed, classes):
        labels = np.random.default_rng(seed).integers(0, classes, ROWS)
        return Batch(jnp.asarray(gaussian(seed, ROWS, 6), dtype), jnp.asarray(labels, jnp.int32))

    return PairedBatch(task(2 * seed, CLASSES), task(2 * seed + 1, HARMFUL))


def features_fn(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def make(family, name, dtype=jnp.float64, arrays=None, **fields):
    """The immuniser, its start, and all rows."""
    if family == "linear":
        method, settings = LINEAR[name]
        arrays = linear_arrays(dtype) if arrays is None else arrays
        problem = immunisers.linear_problem(arrays, damping_primary=1e-2, damping_harmful=1e-2)
        start = immunisers.init_params(D, None, dtype=dtype)
    else:
        method, settings = DEEP[name]
        arrays = deep_arrays(dtype) if arrays is None else arrays
        problem = Problem(
            features_fn=features_fn,
            width=4,
            classes=CLASSES,
            harmful_classes=HARMFUL,
            harmful_head=Head(
                jnp.asarray(gaussian(7, 4, HARMFUL), dtype), jnp.zeros(HARMFUL, dtype)
            ),
            optimiser=optax.sgd(0.05, momentum=0.9),  # Adam would hide a gradient of a wrong scale
            **fields,
        )
        backbone = {
            "first": jnp.asarray(gaussian(4, 6, 7) / 2, dtype),
            "second": jnp.asarray(gaussian(5, 7, 4) / 2, dtype),
        }
        head = init_head(4, CLASSES, dtype)
        start = ProbeParams(
            backbone, head._replace(kernel=jnp.asarray(gaussian(6, 4, CLASSES), dtype))
        )
    config = immunisers.make_config(method, **settings)
    return immunisers.make_immuniser(method, config, problem), start, arrays


@functools.cache
def batches(family, dtype=jnp.float64):
    arrays = linear_arrays(dtype) if family == "linear" else deep_arrays(dtype)
    draw = jax.jit(functools.partial(data.paired_batch, batch_size=BATCH))
    return [draw(arrays, 3, jnp.int32(step)) for step in range(STEPS)]


@functools.cache
def on_one_device(family, name, dtype=jnp.float64, steps=STEPS):
    """The plain loop: nothing of the training package."""
    immuniser, start, _ = make(family, name, dtype)
    key = jax.random.key(9)
    state, update, infos = immuniser.init(start, key), jax.jit(immuniser.update), []
    for step, batch in enumerate(batches(family, dtype)[:steps]):
        state, info = update(state, batch, jax.random.fold_in(key, step))
        infos.append(info)
    return immuniser.finish(state), infos


def paired(arrays, seed, step, part=None):
    return data.paired_batch(arrays, seed, step, batch_size=BATCH, part=part)


def run(family, name, parallel, *, steps=STEPS, rows=paired, made=None, **kwargs):
    """`fit` on batches of all rows; `made`: what `make` gave, so that runs share a program."""
    immuniser, start, arrays = make(family, name) if made is None else made
    drawn = jax.tree_util.Partial(rows, arrays, jnp.uint32(3))
    settings = {"seed": 5, "log_every": 8, **kwargs}
    return fit(immuniser, start, drawn, steps=steps, parallel=parallel, **settings)


def check_same(values, expected, rtol):
    leaves = jax.tree.leaves(values), jax.tree.leaves(expected)
    for leaf, other in zip(*leaves, strict=True):
        leaf, other = np.asarray(leaf), np.asarray(other)
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=rtol * max(np.abs(other).max(), 1e-30))


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def collectives_of(text):
    """How often each collective is an operation of a compiled module (not: is mentioned)."""
    operation = re.compile(rf"^\s*(?:ROOT )?%?\S+ = .*? ({'|'.join(COLLECTIVES)})(?:-start)?\(")
    return Counter(match[1] for match in map(operation.match, text.splitlines()) if match)


def run_steps(family, name, parallel, dtype=jnp.float64, steps=STEPS):
    """Host-fed steps; also the collectives of one step."""
    immuniser, start, _ = make(family, name, dtype)
    key = jax.random.key(9)
    state = parallel.put(immuniser.init(start, key))
    placed = [parallel.put_rows(batch) for batch in batches(family, dtype)[:steps]]
    keys = [parallel.put(jax.random.fold_in(key, step)) for step in range(steps)]
    step_of = step_fn(immuniser, parallel)
    compiled = step_of.lower(state, placed[0], keys[0]).compile()
    infos = []
    for batch, step_key in zip(placed, keys, strict=True):
        # Simulated devices share few threads: steps that run ahead can starve each other.
        state, info = jax.block_until_ready(compiled(*step_of.args, state, batch, step_key))
        infos.append(parallel.one_copy(info))
    params = immuniser.finish(parallel.one_copy(state))
    return params, infos, collectives_of(compiled.as_text())
