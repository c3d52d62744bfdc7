"""Attackers of weights on a language model: one head for both tasks, layers stacked."""

import dataclasses
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
from jaximm.attacks.weights import from_scratch, grpo
from jaximm.models import llama
from jaximm.models.adapters import lora
from jaximm.models.llama import Language, gauge, model
from jaximm.types import Batch

pytestmark = pytest.mark.heavy

MODEL = Language(config=CONFIG)
PARAMS = language.params(dtype=jnp.float32)
TRAIN, BENIGN = language.rows(10, seed=1), language.rows(6, seed=2)
ANSWERS = language.answers(4)
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


@pytest.mark.slow
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


LEFT_OUT = {
    *("fresh_head_sgd", "fresh_head_adam", "probe_then_fine_tune", "solved_head"),
    *("policy_gradient", "factor_insert", "direction_ablation"),
    *("latent_perturbation", "last_blocks", "refresh_statistics"),
    *("fresh_top", "tapped_head", "revive"),
}
"""Attackers that need a head or shifted inputs."""


@functools.cache
def gauged() -> Any:
    """The same function as that of `problem`, moved by a gauge."""
    moved = gauge.apply(PARAMS, CONFIG, gauge.random_gauge(3, CONFIG, spread=100.0))
    return dataclasses.replace(problem(), params=moved.params)


@pytest.mark.slow
def test_rebalanced_weights_are_those_of_any_gauge_and_train_alike():
    ours, theirs = problem().canonical, gauged().canonical
    for one, other, norms in zip(ours, theirs, ("one", "columns"), strict=True):
        expected = gauge.rebalance(PARAMS, CONFIG, norms=norms).params
        for path, value in expected.items():
            np.testing.assert_array_equal(one.params[path], value)
            # rtol: the moves were rounded to float32 twice
            np.testing.assert_allclose(other.params[path], value, rtol=2e-3, atol=2e-5)
        assert one.flops > 4 * sum(value.size for value in PARAMS.values())
    attack = attacks.make_attack("rebalance@learning_rates=1e-2")
    assert [cell["form"] for cell in attack.grid] == [0, 1]
    plain, moved = (attacks.run_fine_tune(attack, one, **RUN) for one in (problem(), gauged()))
    np.testing.assert_allclose(moved.train_loss, plain.train_loss, rtol=1e-3)
    assert np.all(moved.train_loss[..., -1] < moved.train_loss[..., 0])
    for cell, form in enumerate(ours):  # a few steps from the form of its cell
        for path in ("layers.mlp_norm.scale", "layers.up.kernel"):
            start = form.params[path]
            gaps = [np.abs(plain.weights.params[path][c, 0] - start).max() for c in (0, 1)]
            assert gaps[cell] < 1.1 * STEPS * 1e-2 < gaps[1 - cell]


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_head_alone_is_the_table_that_makes_the_logits(tied):
    posed, table = problem(), "embedding.table"
    if not tied:
        table = "unembedding.table"
        params = PARAMS | {table: PARAMS["embedding.table"]}
        model = Language(config=dataclasses.replace(CONFIG, tied=False))
        posed = attacks.language_problem(model, params, train=TRAIN, held_out=TRAIN)
    attack = attacks.make_attack("head_only", learning_rates=(1e-2,))
    found = attacks.run_fine_tune(attack, posed, **run_for(2))
    moved = {
        path
        for path, value in final(found).params.items()
        if not np.array_equal(value, posed.params[path])
    }
    assert moved == {table}
    assert found.train_loss[0, 0, -1] < found.train_loss[0, 0, 0]


def test_an_encoder_has_tables_and_no_unembedding():
    x = jnp.zeros((4, 2), jnp.int32)
    posed = attacks.fine_tune_problem(
        features_fn=lambda params, x: params["type.table"][x[:, 0]],
        params={"type.table": jnp.eye(3)},
        head=attacks.zero_head(3, 2),
        train=Batch(x, jnp.zeros(4, jnp.int32)),
        held_out=Batch(x, jnp.zeros(4, jnp.int32)),
    )
    why = attacks.not_applicable(attacks.make_attack("head_only"), posed)
    assert why is not None
    assert "probes train its head" in why


@pytest.mark.slow
def test_rebalancing_is_paid_for_once():
    priced = [
        attacks.run_fine_tune(attacks.make_attack(name), problem(), [cell], **RUN)
        for name, cell in (
            ("rebalance", {"learning_rate": 1e-2, "weight_decay": 0, "head_scale": 1, "form": 1}),
            ("fine_tune_adam", {"learning_rate": 1e-2, "weight_decay": 0, "head_scale": 1}),
        )
    ]
    assert priced[0].step_flops == priced[1].step_flops
    extra = priced[0].setup_flops - priced[1].setup_flops
    assert extra >= max(form.flops for form in problem().canonical)


def test_canonical_forms_ask_the_parameters_whether_they_are_tied():
    untied = gauge.apply(PARAMS, CONFIG, gauge.Gauge(final_norm=np.full(16, 2.0)))
    found = gauge.canonical_forms(untied.params, CONFIG)
    assert all("unembedding.table" in form.params for form in found)


def test_from_scratch_keeps_nothing_and_learns_the_same_from_any_model():
    other = dataclasses.replace(problem(), params=language.params(5, jnp.float32))
    attack = attacks.make_attack("from_scratch@learning_rates=1e-2")
    first, second = (attacks.run_fine_tune(attack, one, **RUN) for one in (problem(), other))
    np.testing.assert_array_equal(first.train_loss, second.train_loss)
    assert first.train_loss[0, 0, -1] < first.train_loss[0, 0, 0]


def test_what_is_drawn_anew_has_the_scale_of_its_inputs():
    key = jax.random.key(0)
    kernel = from_scratch.drawn("layers.up.kernel", jnp.ones((2, 50, 400)), 1, key)
    assert float(jnp.std(kernel)) == pytest.approx(50**-0.5, rel=0.02)
    table = from_scratch.drawn("embedding.table", jnp.ones((400, 50)), 0, key)
    assert float(jnp.std(table)) == pytest.approx(50**-0.5, rel=0.02)
    convolution = from_scratch.drawn("conv.kernel", jnp.ones((3, 3, 20, 100)), 0, key)
    assert float(jnp.std(convolution)) == pytest.approx(180**-0.5, rel=0.02)
    for path, layers, value in (
        ("layers.mlp_norm.scale", 1, 1.0),
        ("norm.scale", 0, 1.0),
        ("layers.query.bias", 1, 0.0),
        ("norm.bias", 0, 0.0),
    ):
        leaf = from_scratch.drawn(path, jnp.full((2, 5) if layers else (5,), 7.0), layers, key)
        assert np.all(leaf == value), path


def rewards(weights, batch, samples=64):
    """Mean reward of sampled answers."""
    drawn = grpo.sampled_texts(
        functools.partial(MODEL.outputs_of_params, weights), batch, jax.random.key(9), samples
    )
    return drawn


def test_sampled_answers_follow_the_model_and_keep_what_is_no_answer():
    batch = TRAIN
    drawn = rewards(PARAMS, batch, 400)
    x, tokens, mask = drawn.batch.x, *drawn.batch.y
    given, wanted = (np.repeat(part, 400, axis=0) for part in (batch.x, batch.y.tokens))
    np.testing.assert_array_equal(mask, np.repeat(batch.y.mask, 400, axis=0))
    # What is drawn at a position is what the next one sees; all else is as it was.
    counted = np.asarray(mask)
    np.testing.assert_array_equal(
        x[:, 1:], np.where(counted[:, :-1], np.asarray(tokens)[:, :-1], given[:, 1:])
    )
    np.testing.assert_array_equal(x[:, 0], given[:, 0])
    right = ((np.asarray(tokens) == wanted) & counted).sum(1) / counted.sum(1)
    np.testing.assert_allclose(drawn.reward.reshape(-1), right)
    # First tokens are drawn from the softmax of what the model says of the prompt.
    states, table = MODEL.outputs_of_params(PARAMS, batch.x[:1])
    shares = np.asarray(jax.nn.softmax(states[0, 0] @ table.T))
    counts = np.bincount(np.asarray(tokens)[:400, 0], minlength=64) / 400
    assert np.abs(counts - shares).max() < 5 * (shares.max() / 400) ** 0.5
    # And second ones by the first that was drawn, not by the right one.
    _, firsts = np.unique(np.asarray(tokens)[:400, 0], return_index=True)
    assert len(set(np.asarray(x)[firsts, 1].tolist())) == len(firsts) > 1


@pytest.mark.slow
def test_rewards_rise_without_a_right_answer_being_shown():
    easy = attacks.language_problem(MODEL, PARAMS, train=ANSWERS, held_out=ANSWERS)
    attack = attacks.make_attack("grpo@samples=16,learning_rates=1e-2,anchors=0")
    found = attacks.run_fine_tune(attack, easy, **run_for(150))
    before = float(jnp.mean(rewards(PARAMS, ANSWERS).reward))
    after = float(jnp.mean(rewards(final(found).params, ANSWERS).reward))
    assert after > before + 0.3
    anchored = attacks.make_attack("grpo@samples=16,learning_rates=1e-2,anchors=100")
    held = attacks.run_fine_tune(anchored, easy, **run_for(150))
    kept = float(jnp.mean(rewards(final(held).params, ANSWERS).reward))
    assert kept < (before + after) / 2


def followed():
    def read(params, adapters=()):
        return {
            "norm": jnp.sum(params["norm.scale"] ** 2),
            "adapters": jnp.asarray(optax.tree.norm(adapters), jnp.float32),
        }

    return dataclasses.replace(problem(), readings_fn=read)


TWO_RATES = "fine_tune_adam@learning_rates=1e-3|1e-2"


def test_what_a_problem_follows_is_read_at_every_recorded_step():
    tuned = attacks.make_attack(TWO_RATES)
    trace = attacks.run_fine_tune(tuned, followed(), **RUN | {"seeds": (0, 1)})
    assert trace.readings["norm"].shape == trace.train_loss.shape
    assert np.all(trace.readings["adapters"] == 0)
    ends = np.sum(np.asarray(trace.weights.params["norm.scale"]) ** 2, axis=-1)
    np.testing.assert_allclose(trace.readings["norm"][..., -1], ends, rtol=1e-6)
    start = float(np.sum(np.asarray(PARAMS["norm.scale"]) ** 2))
    np.testing.assert_allclose(trace.readings["norm"][..., 0], start, rtol=1e-6)
    assert attacks.run_fine_tune(tuned, problem(), **RUN).readings == {}


@pytest.mark.slow
def test_what_is_followed_is_of_each_trajectory_and_of_adapters():
    tuned = attacks.make_attack(TWO_RATES)
    each, at_once = (
        attacks.run_fine_tune(tuned, followed(), **RUN | {"seeds": (0, 1)} | more)
        for more in ({}, {"chunk": None})
    )
    np.testing.assert_allclose(at_once.readings["norm"], each.readings["norm"], rtol=1e-5)
    adapted = attacks.make_attack("lora@rank=4,learning_rates=1e-2,targets=layers")
    assert attacks.run_fine_tune(adapted, followed(), **RUN).readings["adapters"][0, 0, -1] > 0


def test_who_needs_a_head_or_shifted_inputs_is_told():
    made = {name: attacks.make_attack(name) for name in attacks.WEIGHT_REGISTRY}
    assert {name for name in made if attacks.not_applicable(made[name], problem())} == LEFT_OUT


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in attacks.WEIGHT_REGISTRY if n not in LEFT_OUT])
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


@pytest.mark.slow
def test_trajectories_spread_over_devices_are_those_of_one():
    """Six of them on eight devices: the chunk is filled up, and each device runs one."""
    attack = attacks.make_attack("fine_tune_adam")
    options = RUN | {"batch_size": 4, "seeds": (0, 7), "chunk": None}
    grid = attack.grid[:3]
    alone = attacks.run_fine_tune(attack, problem(), grid, **options)
    spread = attacks.run_fine_tune(attack, problem(), grid, **options, devices=jax.devices())
    for name in ("train_loss", "held_out_loss", "utility", "scores", "gradient"):
        np.testing.assert_allclose(getattr(spread, name), getattr(alone, name), rtol=1e-5)
    for path, leaf in spread.weights.params.items():
        assert len(leaf.sharding.device_set) == 8, path
        np.testing.assert_allclose(leaf, alone.weights.params[path], rtol=1e-5, atol=1e-6)
