"""A decoder as a language model: what trains, losses, activations, distance to a reference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest
from language import CONFIG

from jaximm.models import llama
from jaximm.models.adapters import lora
from jaximm.models.llama import Language, model
from jaximm.objectives import TokenRows

pytestmark = pytest.mark.heavy

PARAMS: dict[str, Any] = language.params()
ROWS: Any = language.rows()
OTHER = language.params(1)
MODEL = Language(config=CONFIG, chunk=24)


@functools.partial(jax.jit, static_argnums=0)
def losses(language_model, weights, batch=ROWS):
    return language_model.losses(weights, batch)


@functools.partial(jax.jit, static_argnums=0)
def slopes(language_model, weights):
    return jax.grad(lambda w: jnp.sum(language_model.losses(w, ROWS)))(weights)


@pytest.fixture(scope="module")
def log_probabilities():
    return jax.nn.log_softmax(jax.jit(lambda p: llama.logits(p, ROWS.x, CONFIG))(PARAMS))


def kinds():
    adapted = llama.with_adapters(PARAMS, jax.random.key(0), rank=2)
    moved = {path: one._replace(b=one.b + 0.1) for path, one in adapted.adapters.items()}
    return {
        "all": llama.every_parameter(PARAMS),
        "named": llama.named_parameters(PARAMS, "layers.down,norm"),
        "last": llama.last_layers(PARAMS, 1),
        "lora": adapted._replace(adapters=moved),
    }


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("all", marks=pytest.mark.slow),
        pytest.param("named", marks=pytest.mark.slow),
        pytest.param("last", marks=pytest.mark.slow),
        "lora",
    ],
)
def test_whatever_trains_it_is_one_model_and_its_slopes_are_those_of_the_whole(kind):
    weights = kinds()[kind]
    plain = llama.every_parameter(llama.whole(weights))
    np.testing.assert_allclose(losses(MODEL, weights), losses(MODEL, plain), rtol=1e-10)
    found, full = slopes(MODEL, weights), slopes(MODEL, plain).trained
    assert all(not np.any(leaf) for leaf in found.frozen.values())
    for path, slope in found.trained.items():
        last = full[path][-slope.shape[0] :] if kind == "last" else full[path]
        np.testing.assert_allclose(slope, last, rtol=1e-8, atol=1e-10)
    for path, factors in found.adapters.items():
        expected = full[path] @ jnp.swapaxes(weights.adapters[path].b, 1, 2)
        np.testing.assert_allclose(factors.a, expected, rtol=1e-8, atol=1e-10)


def test_losses_and_scores_are_those_of_whole_logits(log_probabilities):
    weights, (tokens, mask) = llama.every_parameter(PARAMS), ROWS.y
    wanted = np.take_along_axis(np.asarray(log_probabilities), np.asarray(tokens)[..., None], 2)
    counted = np.asarray(mask).astype(float)
    expected = -(wanted[..., 0] * counted).sum(1) / counted.sum(1)
    np.testing.assert_allclose(losses(MODEL, weights), expected, rtol=1e-12)
    right = (np.asarray(log_probabilities).argmax(-1) == np.asarray(tokens)) * counted
    scores = jax.jit(MODEL.scores)(weights, ROWS)
    np.testing.assert_allclose(scores, right.sum(1) / counted.sum(1))
    np.testing.assert_array_equal(MODEL.weights(ROWS), counted.sum(1))
    np.testing.assert_allclose(  # what does not count is not looked at
        losses(MODEL, weights, ROWS._replace(y=TokenRows(jnp.where(mask, tokens, -9), mask))),
        expected,
        rtol=1e-12,
    )


@pytest.mark.slow
def test_the_distance_to_a_reference_is_the_formula_with_its_gradient(log_probabilities):
    ours, theirs = llama.every_parameter(OTHER), llama.every_parameter(PARAMS)
    counted = np.asarray(ROWS.y.mask).astype(float)

    def direct(params):
        log_q = jax.nn.log_softmax(llama.logits(params, ROWS.x, CONFIG))
        gap = jnp.sum(jnp.exp(log_probabilities) * (log_probabilities - log_q), -1)
        return jnp.sum(gap * counted, 1) / counted.sum(1)

    found = jax.jit(MODEL.divergences)(ours, theirs, ROWS)
    np.testing.assert_allclose(found, jax.jit(direct)(OTHER), rtol=1e-9)
    assert not np.any(jax.jit(MODEL.divergences)(theirs, theirs, ROWS))

    def total(ours, theirs):
        return jnp.sum(MODEL.divergences(ours, theirs, ROWS))

    slope, none = jax.jit(jax.grad(total, argnums=(0, 1)))(ours, theirs)
    expected = jax.jit(jax.grad(lambda params: jnp.sum(direct(params))))(OTHER)
    for path, value in expected.items():
        np.testing.assert_allclose(slope.trained[path], value, rtol=1e-7, atol=1e-9)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(none))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("all", marks=pytest.mark.slow),
        "last",
        pytest.param("lora", marks=pytest.mark.slow),
    ],
)
def test_activations_are_the_inputs_of_the_linear_maps(kind):
    sites = ("layers.1.down", "layers.0.down", "layers.1.query", "layers.0.output")
    tapped, weights = Language(config=CONFIG, sites=sites), kinds()[kind]
    found = jax.jit(tapped.activations)(weights, ROWS.x)
    params = llama.whole(weights)
    rows = ROWS.x.shape[0] * (language.T - 1)
    assert {site: one.shape for site, one in found.items()} == {
        "features": (rows, 16),
        "layers.1.down": (rows, 24),
        "layers.0.down": (rows, 24),
        "layers.1.query": (rows, 16),
        "layers.0.output": (rows, 16),
    }
    # A change of one layer's kernel moves what follows by the input times that change.
    layer = {path: value[1] for path, value in model.layers_of(params).items()}
    before = jax.jit(lambda p: states_before(p, 1))(params)
    normed = model.rms_norm(before, layer["attention_norm.scale"], eps=CONFIG.norm_eps)
    np.testing.assert_allclose(
        found["layers.1.query"], normed[:, 1:].reshape(rows, 16), rtol=1e-9, atol=1e-10
    )
    after = jax.jit(lambda p: llama.hidden(p, ROWS.x, CONFIG))(params)
    np.testing.assert_allclose(found["features"], after[:, 1:].reshape(rows, 16), rtol=1e-9)
    moved = {**params, "layers.down.kernel": params["layers.down.kernel"].at[1].add(1e-4)}
    change = jax.jit(lambda p: states_before(p, 2))(moved)
    change -= jax.jit(lambda p: states_before(p, 2))(params)
    expected = 1e-4 * found["layers.1.down"].sum(1)
    np.testing.assert_allclose(change[:, 1:].reshape(rows, 16)[:, 3], expected, rtol=1e-6)


def states_before(params, layers):
    """The residual stream after so many layers."""
    stack = {path: value[:layers] for path, value in model.layers_of(params).items()}
    x = model.embed(params, ROWS.x)
    return model.advance(x, stack, CONFIG)[0]


def test_half_precision_keeps_float32_losses_near_those_of_float32():
    params = language.params(dtype=jnp.float32)
    weights = llama.every_parameter(params)
    plain = Language(config=CONFIG)
    half = dataclasses.replace(plain, compute_dtype=jnp.bfloat16, remat=True)
    found = losses(half, weights)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, losses(plain, weights), rtol=0.03)
    assert not np.array_equal(found, losses(plain, weights))


@pytest.mark.slow
def test_recomputing_changes_no_slope():
    weights = llama.with_adapters(PARAMS, jax.random.key(0), rank=2)
    again = slopes(dataclasses.replace(MODEL, remat=True), weights)
    for found, expected in zip(
        jax.tree.leaves(again), jax.tree.leaves(slopes(MODEL, weights)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_models_of_equal_attributes_share_their_programs():
    """Read from files twice, the configuration is another object of the same numbers."""
    of_first, of_second = (
        Language.shared(config=dataclasses.replace(CONFIG), chunk=24).losses for _ in range(2)
    )
    assert of_first == of_second != MODEL.losses  # what jit tells functions apart by
    assert Language.shared(config=CONFIG, chunk=12).losses != of_first


def test_the_scale_of_adapters_is_that_of_the_merged_ones():
    weights = kinds()["lora"]
    scaled = dataclasses.replace(MODEL, scale=0.5)
    merged = llama.every_parameter(llama.whole(weights, scale=0.5))
    np.testing.assert_allclose(losses(scaled, weights), losses(MODEL, merged), rtol=1e-10)
    # An attacker's adapters come scaled.
    beside = lora.scaled(weights.adapters, 0.5)
    outputs = jax.jit(scaled.outputs_of_params)(weights.frozen, ROWS.x, beside)
    expected = jax.jit(scaled.outputs)(weights, ROWS.x)
    np.testing.assert_allclose(outputs.states, expected.states, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Language(config=CONFIG, sites=("layers.2.down",)), "there is no site"),
        (lambda: Language(config=CONFIG, sites=("layers.0.norm",)), "there is no site"),
        (lambda: llama.last_layers(PARAMS, 3), r"k must be in 1..2"),
        (lambda: llama.named_parameters(PARAMS, "blocks"), "names no parameter"),
        (
            lambda: MODEL.losses(llama.every_parameter({**PARAMS, "extra": jnp.ones(1)}), ROWS),
            "differ in 'extra'",
        ),
        (
            lambda: MODEL.losses(
                llama.last_layers(PARAMS, 1)._replace(adapters=kinds()["lora"].adapters), ROWS
            ),
            "cut in two take no adapters",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def by_layer(see):
    """States after the final norm of `ROWS`, one layer after the other in Python."""
    x = model.embed(PARAMS, ROWS.x)
    positions = jnp.arange(x.shape[1])[None]
    turned = model.angles(positions, CONFIG, x.dtype)
    visible = positions[:, :, None] >= positions[:, None, :]
    for layer in range(CONFIG.layers):
        weights = {path: value[layer] for path, value in model.layers_of(PARAMS).items()}
        x, _ = model.block(
            x,
            weights,
            CONFIG,
            turned,
            lambda query, key, value: (model.attention(query, key, value, visible), None),
            see=functools.partial(see, layer),
        )
    return model.final_norm(PARAMS, x, CONFIG)


def mean_losses(states):
    found = jax.nn.log_softmax(states @ PARAMS["embedding.table"].T)
    taken = -jnp.take_along_axis(found, ROWS.y.tokens[..., None], axis=2)[..., 0]
    mask = ROWS.y.mask.astype(taken.dtype)
    return jnp.sum(mask * taken, axis=1) / jnp.sum(mask, axis=1)


@pytest.mark.parametrize("kind", ["last", pytest.param("all", marks=pytest.mark.slow)])
def test_what_the_table_reads_off_each_layer(kind):
    entered = {}

    def see(layer, name, inputs):
        entered.setdefault((layer, name), inputs)
        return inputs

    states = by_layer(see)
    streams = [entered[layer, model.STREAM] for layer in range(CONFIG.layers)]
    read = [model.final_norm(PARAMS, stream, CONFIG) for stream in streams]
    expected = jnp.stack([mean_losses(each) for each in (*read, states)])
    found = jax.jit(MODEL.lens_losses)(kinds()[kind], ROWS)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(found[-1], losses(MODEL, kinds()[kind]), rtol=1e-12)


@pytest.mark.parametrize("kind", ["last", pytest.param("all", marks=pytest.mark.slow)])
def test_offsets_are_added_at_the_sites(kind):
    sites = ("layers.1.gate", "layers.0.down", "layers.1.down")
    tapped = dataclasses.replace(MODEL, sites=sites)
    n, t = ROWS.x.shape
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(tapped.activations, kinds()[kind], ROWS.x)
    offsets = {site: jnp.asarray(rng.normal(size=one.shape)) / 3 for site, one in shapes.items()}

    def whole(site):
        rows = offsets[site].reshape(n, t - 1, -1)
        return jnp.concatenate([jnp.zeros_like(rows[:, :1]), rows], axis=1)

    def see(layer, name, inputs):
        site = f"layers.{layer}.{name}"
        return inputs + whole(site) if site in sites else inputs

    expected = mean_losses(by_layer(see) + whole("features"))
    found = jax.jit(tapped.perturbed_losses)(kinds()[kind], ROWS, offsets)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    moved = np.abs(found - losses(MODEL, kinds()[kind])) > 1e-3
    np.testing.assert_array_equal(moved, np.sum(ROWS.y.mask, axis=1) > 1)
