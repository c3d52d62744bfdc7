"""Private masks: what trains, what stays, who finds the mask, and that nobody needs it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm import immunisers
from jaximm.immunisers import ProbeParams, Problem
from jaximm.immunisers.language import language_problem
from jaximm.immunisers.locks import pmp
from jaximm.models import llama
from jaximm.types import Head, PairedBatch
from tests import language, lock_cases

CLASSES = 10
KEY = jax.random.key(0)  # unused: every update takes one


def method(optimiser=None, **fields):
    problem = Problem(
        features_fn=lock_cases.features_fn,
        width=lock_cases.WIDTHS[-1],
        classes=CLASSES,
        optimiser=optimiser or lock_cases.ADAM_STEP,
        label_smoothing=0.0,
    )
    return immunisers.make_immuniser("pmp", immunisers.make_config("pmp", **fields), problem)


def first():
    return ProbeParams(lock_cases.start(), Head(lock_cases.head(CLASSES), jnp.zeros(CLASSES)))


def run(steps, **fields):
    one, train = method(**fields), lock_cases.digits()[0]

    @jax.jit
    def steps_of(state):
        def step(state, _):
            return one.update(state, PairedBatch(train, train), KEY)[0], None

        return jax.lax.scan(step, state, None, length=steps)[0]

    return steps_of(one.init(first(), KEY))


def loss(params):
    train = lock_cases.digits()[0]
    logits = params.head.outputs(lock_cases.features_fn(params.backbone, train.x))
    return jnp.mean(-jax.nn.log_softmax(logits)[jnp.arange(train.y.size), train.y])


def test_the_mask_is_where_gradients_were_largest_and_the_search_is_taken_back():
    rate, density = 0.05, 0.2
    params, sums = first(), jax.tree.map(jnp.zeros_like, first())
    slope_fn = jax.jit(jax.grad(loss))
    for _ in range(2):
        slope = slope_fn(params)
        sums = jax.tree.map(lambda total, g: total + jnp.abs(g), sums, slope)
        params = jax.tree.map(lambda leaf, g: leaf - rate * g, params, slope)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sums)])
    least = np.sort(flat)[-round(density * flat.size)]
    state = run(2, optimiser=optax.sgd(rate), density=density, search_steps=2)
    expected = jax.tree.map(lambda score: score >= least, sums)
    chex.assert_trees_all_equal(state.opt_state.mask, expected)
    chex.assert_trees_all_equal(state.params, first())
    state = run(3, optimiser=optax.sgd(rate), density=density, search_steps=2)
    slope = pmp.masked_update(slope_fn(first()), expected)
    moved = jax.tree.map(lambda leaf, g: leaf - rate * g, first(), slope)
    chex.assert_trees_all_close(state.params, moved, rtol=0, atol=1e-13)


@functools.cache
def trained(radius=None):
    return run(160, density=0.3, search_steps=10, radius=radius)


def inside_and_outside(state):
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.opt_state.mask), strict=True)
    parts = [
        (np.asarray(leaf)[np.asarray(m)], np.asarray(leaf)[~np.asarray(m)]) for leaf, m in pairs
    ]
    return [np.concatenate(side) for side in zip(*parts, strict=True)]


def test_training_moves_the_mask_alone_and_learns():
    state = trained()
    for leaf, start, free in zip(
        *map(jax.tree.leaves, (state.params, first(), state.opt_state.mask)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(leaf)[~free], np.asarray(start)[~free])
    sizes = [part.size for part in inside_and_outside(state)]
    assert sizes[0] / sum(sizes) == pytest.approx(0.3, abs=1e-3)
    assert float(loss(state.params)) < 0.7 < float(loss(first()))


def test_with_a_radius_the_rest_is_brought_onto_a_ball():
    inside, outside = inside_and_outside(trained(radius=0.5))
    assert np.linalg.norm(outside) == pytest.approx(0.5, rel=1e-6)
    assert np.linalg.norm(inside) > 2


def test_the_mask_is_read_off_the_weights():
    """The breaker: by the known start, by size after a projection; by size alone where neither."""

    def sizes(state, start=None):
        start = jax.tree.map(jnp.zeros_like, state.params) if start is None else start
        return jax.tree.map(lambda leaf, s: jnp.abs(leaf - s), state.params, start)

    kept, shrunk = trained(), trained(radius=0.5)
    auc = {
        "start": pmp.recovery_auc(sizes(kept, first()), kept.opt_state.mask),
        "size": pmp.recovery_auc(sizes(kept), kept.opt_state.mask),
        "size, shrunk": pmp.recovery_auc(sizes(shrunk), shrunk.opt_state.mask),
    }
    assert auc["start"] > 0.99
    assert auc["size, shrunk"] > 0.9
    assert auc["size"] < auc["size, shrunk"]


@pytest.mark.heavy
def test_nobody_needs_the_mask():
    """The breakers: all entries, or those outside of the mask, are tuned as well as inside."""
    state = trained()
    backbone = state.params.backbone
    inside = jax.tree.map(lambda m: m.astype(float), state.opt_state.mask.backbone)
    outside = jax.tree.map(lambda m: 1 - m, inside)
    found = {
        "all": lock_cases.attacked(backbone),
        "inside": lock_cases.attacked(backbone, free=inside),
        "outside": lock_cases.attacked(backbone, free=outside),
    }
    assert min(found["all"], found["outside"]) > found["inside"] - 0.03, found


def test_on_a_language_model_the_state_keeps_its_form():
    """Traced alone: what runs is the optimiser, whatever the problem."""
    with jax.numpy_dtype_promotion("standard"):
        problem = language_problem(llama.Language(config=language.CONFIG, chunk=24), optax.sgd(0.1))
    one = immunisers.make_immuniser("pmp", immunisers.make_config("pmp"), problem)
    batches = PairedBatch(language.rows(seed=1), language.rows(seed=2))
    state = one.init(llama.every_parameter(language.params()), KEY)
    after, _ = jax.eval_shape(one.update, state, batches, KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_the_area_under_the_curve_by_hand():
    mask = {"a": jnp.array([True, False]), "b": jnp.array([True, False])}
    scores = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([1.0, 0.0])}
    assert pmp.recovery_auc(scores, mask) == (1 + 1 + 0.5 + 1) / 4
    assert pmp.recovery_auc(jax.tree.map(jnp.ones_like, scores), mask) == 0.5
    with pytest.raises(ValueError, match="4 entries inside and 0 outside"):
        pmp.recovery_auc(scores, jax.tree.map(lambda m: jnp.ones_like(m), mask))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.0}, "density"),
        ({"search_steps": 0}, "search_steps"),
        ({"radius": -1.0}, "radius"),
    ],
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        method(**fields)
