"""A language model as the problem of methods: what trains, NPO, a distance, devices."""

import functools

import jax
import jax.numpy as jnp
import language
import numpy as np
import optax
import pytest
from helpers import thinned
from language import CONFIG

from jaximm import training
from jaximm.immunisers import make_config, make_immuniser
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.models.llama import Language
from jaximm.types import PairedBatch

pytestmark = pytest.mark.heavy

MODEL = Language(config=CONFIG, chunk=24)
PARAMS = language.params()
PRIMARY, HARMFUL = language.rows(8, seed=1), language.rows(8, seed=2)


def batch_fn(step, part=(0, 1)):
    """The same rows every step, of which each part takes its own."""
    del step
    index, count = part

    def own(leaf):
        return jax.lax.dynamic_slice_in_dim(leaf, index * (8 // count), 8 // count)

    return jax.tree.map(own, PairedBatch(PRIMARY, HARMFUL))


@functools.cache
def problem(accumulate=1):
    with jax.numpy_dtype_promotion("standard"):
        optimiser = optax.adamw(1e-2, weight_decay=0.1)
    return language_problem(MODEL, optimiser, accumulate=accumulate)


def fitted(weights, steps=8, accumulate=1, **options):
    method = make_immuniser("npo", make_config("npo", beta=1.0), problem(accumulate))
    return training.fit(method, weights, batch_fn, seed=0, steps=steps, log_every=4, **options)


def adapted():
    return llama.with_adapters(PARAMS, jax.random.key(0), rank=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["last", "lora"])
def test_npo_unlearns_and_moves_nothing_that_is_frozen(kind):
    weights = {"last": llama.last_layers(PARAMS, 1), "lora": adapted()}[kind]
    run = fitted(weights)
    first, last = run.trajectory[0], run.trajectory[-1]
    assert last["harmful_loss"] > first["harmful_loss"] + 0.05
    assert last["retain"] < first["retain"]
    for path, value in weights.frozen.items():  # no step, and no weight decay
        np.testing.assert_array_equal(run.params.frozen[path], value)
    moved = [
        np.any(new != old)
        for new, old in zip(
            jax.tree.leaves((run.params.trained, run.params.adapters)),
            jax.tree.leaves((weights.trained, weights.adapters)),
            strict=True,
        )
    ]
    assert all(moved)
    moments = jax.tree.leaves(run.state.opt_state)
    trained = jax.tree.leaves((weights.trained, weights.adapters))
    assert sum(leaf.size for leaf in moments) <= 2 * sum(leaf.size for leaf in trained) + 4


@pytest.mark.slow
def test_a_step_is_that_of_the_formula():
    (record,) = fitted(llama.every_parameter(PARAMS), steps=1).trajectory
    means = []
    for rows in (PRIMARY, HARMFUL):
        losses = np.asarray(jax.jit(MODEL.losses)(llama.every_parameter(PARAMS), rows))
        means.append(np.average(losses, weights=np.asarray(MODEL.weights(rows))))
    assert record["task_loss"] == pytest.approx(means[0], rel=1e-9)
    assert record["harmful_loss"] == pytest.approx(means[1], rel=1e-9)
    assert record["forget"] == pytest.approx(2 * np.log(2), rel=1e-9)  # theta is the reference


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jit", "pmap", "shard_map"])
def test_devices_and_micro_batches_give_one_devices_numbers(kind):
    one = fitted(adapted(), steps=2).params.adapters
    parallel = training.make_parallel(kind, jax.devices()[:4])
    many = fitted(adapted(), steps=2, accumulate=2, parallel=parallel).params.adapters
    for found, expected in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_the_distance_to_the_start_is_a_term():
    posed = problem()

    def objective(params, batches, reference, rng_key):
        del rng_key
        weights = posed.weights(batches.primary)
        harm = posed.losses(params, batches.harmful)
        kept = posed.divergences(params, reference, batches.primary)
        return {"harm": -jnp.minimum(harm, 6.0), "kept": Weighted(kept, weights)}, {}, reference

    method = from_objective("mine", posed, objective, init_memory=posed.reference_of)
    run = training.fit(
        method, llama.every_parameter(PARAMS), batch_fn, seed=0, steps=4, log_every=1
    )
    kept = [record["kept"] for record in run.trajectory]
    assert kept[0] == 0
    assert kept[-1] > 0.01
    expected = jax.jit(MODEL.divergences)(run.params, llama.every_parameter(PARAMS), PRIMARY)
    assert np.all(np.asarray(expected) > 0)


@pytest.mark.parametrize("name", thinned(["undo", "rmu", "mudman", "lox", "ilu"], keep=2))
def test_methods_of_unlearning_take_a_language_model(name):
    method = make_immuniser(name, make_config(name), problem())
    weights = llama.last_layers(PARAMS, 1)
    state = jax.eval_shape(method.init, weights, jax.random.key(0))
    after, _ = jax.eval_shape(method.update, state, batch_fn(0), jax.random.key(0))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.eval_shape(method.finish, after) == jax.eval_shape(lambda: weights)


def test_scaled_losses_are_those_of_scaled_logits():
    states, table = MODEL.outputs(llama.every_parameter(PARAMS), PRIMARY.x)
    logits = np.asarray(1.7 * states @ table.T)
    chosen = np.take_along_axis(logits, np.asarray(PRIMARY.y.tokens)[..., None], 2)[..., 0]
    rows = np.log(np.sum(np.exp(logits), axis=2)) - chosen
    mask = np.asarray(PRIMARY.y.mask)
    expected = np.sum(rows * mask, axis=1) / np.sum(mask, axis=1)
    found = problem().scaled_losses(llama.every_parameter(PARAMS), PRIMARY, jnp.asarray(1.7))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


COLLAPSE = ("ctrap", "booster", "repnoise", "seam", "vaccine")


@functools.cache
def collapsing(name):
    with jax.numpy_dtype_promotion("standard"):
        optimiser = optax.sgd(0.1)
    tapped = Language(config=CONFIG, chunk=24, sites=("layers.0.down", "layers.1.output"))
    return make_immuniser(name, make_config(name), language_problem(tapped, optimiser))


@pytest.mark.parametrize("name", thinned(COLLAPSE))
def test_a_step_of_theirs_lowers_what_they_minimise(name):
    one, weights, key = collapsing(name), adapted(), jax.random.key(0)
    state, update = one.init(weights, key), jax.jit(one.update)
    found = []
    for _ in range(4):
        state, info = update(state, PairedBatch(PRIMARY, HARMFUL), key)
        found.append(float(info.loss))
    assert found[-1] < found[0] - 1e-3
    for path, value in weights.frozen.items():
        np.testing.assert_array_equal(state.params.frozen[path], value)


def test_a_decoder_has_no_layers_to_draw():
    one = make_immuniser("t_vaccine", make_config("t_vaccine"), problem())
    with pytest.raises(ValueError, match="got Weights and not a dict by path; use vaccine"):
        one.init(adapted(), jax.random.key(0))
