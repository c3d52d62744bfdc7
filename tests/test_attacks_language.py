"""Attackers of weights on a language model: one head for both tasks, layers stacked."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import language
import numpy as np
import optax
import optax.contrib
import pytest
from language import CONFIG

from jaximm import attacks, objectives
from jaximm.models import llama
from jaximm.models.adapters import lora
from jaximm.models.llama import Language, model

pytestmark = pytest.mark.heavy

MODEL = Language(config=CONFIG)
PARAMS = language.params(dtype=jnp.float32)
TRAIN, BENIGN = language.rows(10, seed=1), language.rows(6, seed=2)
STEPS = 4
RUN: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": None,
    "record": 2,
    "loop": "device",
    "keep_weights": True,
}


def run_for(steps) -> dict[str, Any]:
    return RUN | {"steps": steps}


@functools.cache
def problem() -> Any:
    return attacks.language_problem(
        MODEL,
        PARAMS,
        train=TRAIN,
        held_out=language.rows(4, seed=3),
        benign_train=BENIGN,
        benign_held_out=language.rows(5, seed=4),
        public=language.params(1, jnp.float32),
    )


@functools.cache
def trace(name, **options):
    attack = attacks.make_attack(name, **dict(options))
    return attacks.run_fine_tune(attack, problem(), attack.grid[:1], **RUN)


def final(found):
    return jax.tree.map(lambda leaf: leaf[0, 0], found.weights)


def mean_loss(params, batch):
    tokens = objectives.Tokens()
    losses = tokens.losses(MODEL.outputs_of_params(params, batch.x), batch.y)
    return tokens.mean(losses, batch.y)


@functools.cache
def by_hand(optimiser):
    """So many steps on all rows, without anything of the attackers."""
    batch = problem().train

    @jax.jit
    def step(params, state):
        slopes = jax.grad(mean_loss)(params, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        params, state = PARAMS, optimiser.init(PARAMS)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def close(found, expected):
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=2e-3, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_adam_is_that_of_the_whole_model():
    found = final(trace("fine_tune_adam", learning_rates=(1e-2,)))
    assert found.head == ()
    close(found.params, by_hand(optax.adamw(1e-2, weight_decay=0.0)))


@pytest.mark.slow
def test_sgd_is_that_of_the_whole_model():
    found = final(trace("fine_tune_sgd", learning_rates=(0.1,)))
    close(
        found.params,
        by_hand(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))),
    )


@pytest.mark.slow
def test_a_rate_with_warm_up_and_cosine():
    found = final(trace("fine_tune_adam", learning_rates=(1e-2,), cosine_steps=40))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 4, 41)
    close(found.params, by_hand(optax.adamw(lambda count: shape(count + 1), weight_decay=0.0)))


@pytest.mark.slow
def test_muon_orthogonalises_each_layer_and_leaves_tables_to_adam():
    found = final(trace("muon", learning_rates=(1e-2,)))

    def dimensions(params):
        return {
            path: optax.contrib.MuonDimensionNumbers((1,), (2,))
            if path.endswith(".kernel")
            else None
            for path in params
        }

    optimiser = optax.contrib.muon(
        1e-2, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions
    )
    close(found.params, by_hand(optimiser))


def test_lora_leaves_the_weights_and_its_adapters_go_through_the_scan():
    found = final(trace("lora", learning_rates=(1e-2,), targets="layers"))
    for path, value in PARAMS.items():
        np.testing.assert_array_equal(found.params[path], value)
    assert set(found.adapters) == {f"layers.{name}.kernel" for name in model.LINEAR}
    traced = trace("lora", learning_rates=(1e-2,), targets="layers")
    assert traced.train_loss[0, 0, -1] < traced.train_loss[0, 0, 0]
    # What is measured is the model that `merged` exports.
    merged = lora.merged(found.params, found.adapters)
    loss = jax.jit(mean_loss)(merged, problem().held_out)
    assert traced.held_out_loss[0, 0, -1] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_curves_are_means_over_tokens_and_prices_count_every_layer():
    found = trace("fine_tune_adam", learning_rates=(1e-2,))
    for name, batch in (("held_out_loss", problem().held_out), ("train_loss", problem().measured)):
        loss = jax.jit(mean_loss)(PARAMS, batch)
        assert getattr(found, name)[0, 0, 0] == pytest.approx(float(loss), rel=1e-5)
    scores = jax.jit(MODEL.scores)(llama.every_parameter(PARAMS), problem().benign.held_out)
    tokens = np.asarray(problem().benign.held_out.y.mask).sum(1)
    utility = np.sum(np.asarray(scores) * tokens) / tokens.sum()
    assert found.utility[0, 0, 0] == pytest.approx(utility, rel=1e-5)
    assert float(attacks.guessing_loss(problem())) == pytest.approx(np.log(64), rel=1e-6)
    rows, size = problem().train.x.shape[0], sum(leaf.size for leaf in PARAMS.values())
    assert found.step_flops >= 6 * size * rows * language.T


APPLICABLE = [
    name
    for name in attacks.WEIGHT_REGISTRY
    if attacks.not_applicable(attacks.make_attack(name), problem()) is None
]


def test_who_needs_a_head_or_shifted_inputs_is_told():
    left = set(attacks.WEIGHT_REGISTRY) - set(APPLICABLE)
    assert left == {
        *("fresh_head_sgd", "fresh_head_adam", "probe_then_fine_tune", "solved_head"),
        *("policy_gradient", "factor_insert", "direction_ablation"),
        *("latent_perturbation", "last_blocks", "refresh_statistics"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICABLE)
def test_everybody_else_runs_and_lowers_the_loss(name):
    attack = attacks.make_attack(name)
    grid = [cell | {"learning_rate": 1e-2} for cell in attack.grid[:1]]
    found = attacks.run_fine_tune(attack, problem(), grid, **run_for(12))
    assert found.finite.all()
    assert found.train_loss[0, 0, -1] < found.train_loss[0, 0].max() or name == "benign_drift"


@pytest.mark.slow
def test_edits_of_matrices_are_of_each_layer_alone():
    attack = attacks.make_attack("quantise_then_tune", bits=(3,), learning_rates=(1e-12,))
    found = final(attacks.run_fine_tune(attack, problem(), **run_for(1)))
    kernel = np.asarray(PARAMS["layers.up.kernel"])
    for layer in range(2):
        top = np.abs(kernel[layer]).max(0)
        expected = np.round(kernel[layer] / top * 3) * top / 3
        np.testing.assert_allclose(found.params["layers.up.kernel"][layer], expected, atol=1e-5)
    np.testing.assert_allclose(
        found.params["layers.mlp_norm.scale"], PARAMS["layers.mlp_norm.scale"], rtol=1e-5
    )


@pytest.mark.slow
def test_rescaling_the_head_scales_the_logits():
    attack = attacks.make_attack("fine_tune_adam", learning_rates=(1e-12,), head_scales=(0.25,))
    found = final(attacks.run_fine_tune(attack, problem(), **run_for(1)))
    states = MODEL.outputs_of_params(found.params, TRAIN.x).states
    expected = 0.25 * MODEL.outputs_of_params(PARAMS, TRAIN.x).states
    np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="give both benign_train and benign_held_out"):
        attacks.language_problem(MODEL, PARAMS, train=TRAIN, held_out=TRAIN, benign_train=BENIGN)
    short = TRAIN._replace(x=TRAIN.x[:5])
    with pytest.raises(ValueError, match="as many rows"):
        attacks.language_problem(MODEL, PARAMS, train=TRAIN, held_out=short)
