"""TAR against its formula written out, and the attackers that it draws."""

import functools

import chex
import jax
import jax.numpy as jnp
import language
import numpy as np
import optax
import pytest
from helpers import thinned

from jaximm.immunisers import make_config, make_immuniser
from jaximm.immunisers.language import language_problem
from jaximm.immunisers.meta import adversary, tar
from jaximm.models import llama
from jaximm.types import Head, PairedBatch
from tests.immunisers import meta_cases as cases

pytestmark = pytest.mark.heavy

PLAIN = {
    "inner_optimiser": "sgd",
    "inner_rates": (0.3,),
    "retain_first": 0.0,
    "fresh_head": False,
    "distance_weight": 0.0,
    "retain_weight": 0.7,
    "tamper_weight": 2.0,
}


def negative_entropy(params, head, batch):
    logs = jax.nn.log_softmax(cases.logits(params.backbone, head, batch.x))
    return jnp.mean(jnp.sum(jnp.exp(logs) * logs, axis=1))


def clamped(params, head, batch):
    backbone = params.backbone
    turned = Head(-head.kernel, -head.bias)
    smaller = jnp.minimum(cases.loss(backbone, head, batch), cases.loss(backbone, turned, batch))
    return -jnp.minimum(smaller, 1.5 * np.log(2))


def preferred(params, head, batch):
    """(log ratio of the first primary rows - that of harmful ones - 1 / (2 beta))^2."""

    def log_p(params, head, batch):
        logs = jax.nn.log_softmax(cases.logits(params.backbone, head, batch.x))
        return jnp.take_along_axis(logs, batch.y[:, None], axis=1)[: cases.HALF, 0]

    before, safe = cases.start(), cases.rows().primary
    gained = log_p(params, params.head, safe) - log_p(before, before.head, safe)
    lost = log_p(params, head, batch) - log_p(before, cases.HARMFUL_HEAD, batch)
    return jnp.mean((gained - lost - 1 / (2 * 0.4)) ** 2)


LOSSES = {"entropy": negative_entropy, "cross_entropy": clamped, "preference": preferred}


@pytest.mark.parametrize("name", thinned(sorted(LOSSES)))
def test_without_inner_steps_it_is_plain_unlearning(name):
    _, held_out = cases.halves()

    def objective(params):
        kept = cases.loss(params.backbone, params.head, cases.rows().primary)
        return 2 * LOSSES[name](params, cases.HARMFUL_HEAD, held_out) + 0.7 * kept

    one = cases.method("tar", tamper_loss=name, inner_steps=0, beta=0.4, **PLAIN)
    state, info = cases.stepped(one)
    value, slope = jax.jit(jax.value_and_grad(objective))(cases.start())
    expected = jax.tree.map(jnp.subtract, cases.start(), slope)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-10, atol=1e-12)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-12)
    assert int(state.memory.step) == 1


def test_an_update_sums_slopes_at_every_other_point_of_the_attack():
    steps, every, decay, rate = 4, 2, 0.3, 0.3
    attack, held_out = cases.halves()

    def expected(params):
        held, slope = (params.backbone, cases.HARMFUL_HEAD), None
        slope = jax.tree.map(jnp.zeros_like, params.backbone)
        for k in range(steps):
            if k % every == 0:
                at = jax.grad(
                    lambda b, h: negative_entropy(params._replace(backbone=b), h, held_out)
                )
                weight = np.exp(decay * (k - (steps - 1)))
                slope = jax.tree.map(lambda s, g, w=weight: s + 2 * w * g, slope, at(*held))
            moves = jax.grad(lambda both: cases.loss(both[0], both[1], attack))(held)
            held = jax.tree.map(lambda leaf, move: leaf - rate * move, held, moves)
        kept = jax.grad(lambda b: cases.loss(b, params.head, cases.rows().primary))
        return jax.tree.map(lambda s, g: s + 0.7 * g, slope, kept(params.backbone))

    fields = {"inner_steps": steps, "every": every, "decay": decay}
    state, info = cases.stepped(cases.method("tar", **fields, **PLAIN))
    slope = jax.jit(expected)(cases.start())
    moved = jax.tree.map(jnp.subtract, cases.start().backbone, slope)
    chex.assert_trees_all_close(state.params.backbone, moved, rtol=1e-10, atol=1e-12)
    assert info.inner_loss_end < info.inner_loss_start


@pytest.mark.parametrize(("steps", "every"), [(64, 4), (8, 1)])
def test_the_weights_sum_to_a_geometric_series(steps, every):
    config = make_config("tar", inner_steps=steps, every=every)
    k = jnp.arange(0, steps, every)
    total = float(jnp.sum(tar.step_weight(config, k, jnp.float64)))
    ratio = np.exp(-0.0625 * every)
    first = np.exp(-0.0625 * (every - 1))  # of the last point, every - 1 steps before K - 1
    assert total == pytest.approx(first * (1 - ratio ** (steps // every)) / (1 - ratio), rel=1e-12)


@pytest.mark.slow
def test_an_attacker_may_train_on_the_primary_task_first():
    one = cases.method(
        "tar", inner_steps=6, retain_first=1.0, inner_rates=(1e-9,), every=3, inner_rows=3
    )
    given = cases.rows()._asdict() | {
        "attack": cases.rows().harmful,
        "held_out": next(cases.halves()),
    }
    row = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 6, axis=0), given["primary"])
    _, info = cases.stepped(one, batch=given | {"retain": row})  # draws are all of one row
    params = cases.start()
    expected = float(cases.loss(params.backbone, params.head, jax.tree.map(lambda x: x[:1], row)))
    assert float(info.inner_loss_start) == pytest.approx(expected, rel=1e-6)
    assert abs(float(info.inner_loss_end) - expected) > 1e-3  # harmful rows by then
    del given["held_out"]
    with pytest.raises(ValueError, match="batches hold 'attack' alone"):
        jax.eval_shape(one.update, one.init(params, cases.KEY), given, cases.KEY)


def test_the_switch_is_a_beta_draw():
    keys = jax.random.split(cases.KEY, 4000)
    drawn = np.asarray(jax.vmap(lambda key: tar.switch_step(key, 64))(keys))
    expected = np.floor(64 * np.random.default_rng(0).beta(6, 3, size=100_000))
    assert drawn.mean() == pytest.approx(expected.mean(), abs=0.6)
    assert drawn.std() == pytest.approx(expected.std(), rel=0.06)


def test_distances_are_norms_of_rows_and_have_a_slope_where_nothing_moved():
    one, before = cases.problem(), cases.start()
    after = before._replace(backbone={"kernel": 1.1 * before.backbone["kernel"]})
    batch = cases.rows().primary
    gap = cases.features_fn(after.backbone, batch.x) - cases.features_fn(before.backbone, batch.x)
    norms = np.linalg.norm(np.asarray(gap), axis=1)
    for squared, expected in ((False, norms), (True, norms**2)):
        found = adversary.distances(one, after, before, batch, squared=squared)
        np.testing.assert_allclose(found.values, expected, rtol=1e-12)
        slope = jax.grad(
            lambda params, squared=squared: jnp.sum(
                adversary.distances(one, params, before, batch, squared=squared).values
            )
        )(before)
        chex.assert_trees_all_close(slope, jax.tree.map(jnp.zeros_like, slope))


@pytest.mark.slow
def test_a_run_may_begin_with_random_mapping():
    one = cases.method("tar", inner_steps=0, mapping_steps=1, **PLAIN)
    mapped = adversary.random_mapping(
        cases.problem(), cases.start(), cases.rows().harmful, jax.random.key(0)
    )
    turned = cases.start()._replace(backbone={"kernel": -cases.start().backbone["kernel"]})
    again = adversary.random_mapping(
        cases.problem(), turned, cases.rows().harmful, jax.random.key(0)
    )
    assert 0 < float(mapped) < 1
    assert float(again) == pytest.approx(float(mapped), rel=1e-9)  # |cos|
    state, info = cases.stepped(one)
    assert float(info.tamper) == pytest.approx(2 * float(mapped), rel=1e-9)
    _, info = cases.stepped(one, state)
    assert float(info.tamper) < 0  # an entropy by now


@functools.cache
def posed():
    model = llama.Language(config=language.CONFIG, chunk=24)
    return language_problem(model, optax.sgd(0.1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sophon", {"inner_steps": 2, "suppression": "uniform"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("tar", {"inner_steps": 4}),
                ("tar", {"inner_steps": 4, "tamper_loss": "preference", "mapping_steps": 1}),
                ("mlac", {"inner_steps": 2, "calibration": "none"}),
            )
        ),
    ],
)
def test_language_models_are_attacked_in_what_trains(name, fields):
    weights = llama.last_layers(language.params(), 1)
    one = make_immuniser(name, make_config(name, **fields), posed())
    batch = PairedBatch(language.rows(4, seed=1), language.rows(4, seed=2))
    state = one.init(weights, cases.KEY)
    after, info = jax.eval_shape(one.update, state, batch, cases.KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert {leaf.shape for leaf in info} == {()}
    target = adversary.taken_over(posed(), weights, cases.KEY)
    assert target.start.params.frozen == {}
    chex.assert_trees_all_equal(target.harmful(target.start), weights)


@pytest.mark.slow
def test_a_language_model_that_guesses_has_the_loss_of_the_vocabulary():
    weights = llama.last_layers(language.params(), 1)
    target = adversary.taken_over(posed(), weights, cases.KEY)
    found = float(target.guessing(language.rows(4, seed=1)))
    assert found == pytest.approx(np.log(language.CONFIG.vocabulary), rel=1e-6)


def test_entropy_needs_predictions():
    model = llama.Language(config=language.CONFIG)
    fields = {"losses_fn": model.losses, "features_fn": model.features, "optimiser": optax.sgd(1.0)}
    with pytest.raises(ValueError, match="entropies_fn"):
        make_immuniser("tar", make_config("tar"), type(posed())(**fields))
    one = cases.method("tar", **PLAIN)
    single = cases.rows()._replace(harmful=jax.tree.map(lambda x: x[:1], cases.rows().harmful))
    state = one.init(cases.start(), cases.KEY)
    with pytest.raises(ValueError, match="two harmful rows"):
        jax.eval_shape(one.update, state, single, cases.KEY)
