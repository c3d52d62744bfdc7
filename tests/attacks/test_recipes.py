"""Other ways to fine-tune, against plain optax loops, and the table of 28 adversaries."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm import attacks
from jaximm.attacks.weights import jaximm28
from jaximm.attacks.weights.recipes import Recipe, shape_of
from jaximm.types import Batch

pytestmark = pytest.mark.heavy

N, D = 12, 3


def rows(seed):
    x = np.random.default_rng(seed).standard_normal((N, 4))
    return Batch(jnp.asarray(x), jnp.asarray(x[:, 0] > 0, jnp.int32))


def features_fn(params, x):
    return jnp.tanh(x @ params["kernel"])


HEAD = attacks.Head(jnp.asarray(np.random.default_rng(6).standard_normal((D, 2))), jnp.zeros(2))


def problem():
    gaussian = np.random.default_rng(5).standard_normal
    return attacks.FineTuneProblem(
        features_fn=features_fn,
        params={"kernel": jnp.asarray(gaussian((4, D)))},
        head=attacks.Head(jnp.asarray(gaussian((D, 2))), jnp.zeros(2)),
        train=rows(0),
        selection=None,
        measured=rows(0),
        held_out=rows(1),
        benign=attacks.Benign(
            head=HEAD,
            train=rows(2),
            held_out=rows(3),
        ),
    )


def run(steps, **options):
    attack = attacks.make_attack("fine_tune_adam", learning_rates=(0.05,), **options)
    found = attacks.run_fine_tune(
        attack, problem(), steps=steps, batch_size=None, record=2, keep_weights=True
    )
    return jax.tree.map(lambda leaf: leaf[0, 0], found.weights)


def test_schedules_rise_and_fall_as_said():
    def rates(*steps, **fields):
        return [round(float(shape_of(Recipe(**fields))(t)), 3) for t in steps]

    assert rates(1, 15, 30, 400, schedule="warmup") == [0.033, 0.5, 1.0, 1.0]
    cosine = {"schedule": "cosine", "warmup": 100, "budget": 500}
    assert rates(50, 100, 300, 500, **cosine) == [0.5, 1.0, 0.625, 0.25]
    assert rates(15, 30, 65, 100, 130, 230, schedule="sgdr") == [0.5, 1.0, 0.5, 0.0, 0.67, 0.449]
    assert rates(100, 200, schedule="exponential", warmup=100) == [0.632, 0.865]
    assert rates(1, 500) == [1.0, 1.0]


@pytest.mark.slow
def test_schedule_free_shows_the_average_of_its_way():
    used = jax.tree.map(lambda leaf: leaf[:5], rows(0))

    def loss(trained):
        logits = trained[1].outputs(features_fn(trained[0], used.x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, used.y).mean()

    optimiser = optax.contrib.schedule_free_adamw(0.05)
    trained = (problem().params, problem().head)
    with jax.numpy_dtype_promotion("standard"):
        state = optimiser.init(trained)
        step = jax.jit(
            lambda trained, state: optimiser.update(jax.grad(loss)(trained), state, trained)
        )
        for _ in range(4):
            updates, state = step(trained, state)
            trained = jax.tree.map(jnp.add, trained, updates)
        expected = optax.contrib.schedule_free_eval_params(state, trained)
    found = run(4, optimiser="schedule_free", rows=5)
    chex.assert_trees_all_close((found.params, found.head), expected, rtol=1e-6)
    assert np.max(np.abs(np.asarray(expected[0]["kernel"] - trained[0]["kernel"]))) > 1e-4


def test_the_order_of_the_data():
    start = problem()
    first, later = (run(steps, data="benign_first", budget=10) for steps in (4, 5))
    chex.assert_trees_all_equal(first.head, start.head)  # no harmful row yet
    assert np.any(first.params["kernel"] != start.params["kernel"])
    assert np.any(first.benign_head.kernel != HEAD.kernel)
    assert np.any(later.head.kernel != start.head.kernel)
    only = run(4, data="benign")
    chex.assert_trees_all_equal(only, first)


def test_the_table_has_28_rows_of_the_axes_that_are_known():
    table = jaximm28.adversaries(rate=1e-3)
    assert [row.number for row in table] == list(range(1, 29))
    assert collections.Counter(row.data for row in table) == {
        "harmful": 19, "benign": 3, "benign, then harmful": 1, "either by a coin": 1,
        "harmful, then benign": 1, "out of distribution": 3,
    }  # fmt: skip
    made = {row.number: attacks.make_attack(row.label) for row in table}
    assert [made[n].grid[0]["learning_rate"] for n in (1, 2, 3)] == [1e-4, 1e-3, 2e-3]
    assert (
        len({(a.init, a.update, str(a.grid)) for n, a in made.items() if n not in (24, 25, 26)})
        == 25
    )
    assert made[7].update is not made[6].update  # a warm-up of 100, in place of 30
    assert all(made[n].needs == ("benign",) for n in range(18, 24))
    assert made[27].kind == "low-rank"
    with pytest.raises(ValueError, match="rate must be finite and > 0, got 0"):
        jaximm28.adversaries(rate=0)


@pytest.mark.slow
def test_every_row_of_the_table_runs():
    for row in jaximm28.adversaries(rate=1e-2, budget=20):
        attack = attacks.make_attack(row.label)
        found = attacks.run_fine_tune(
            attack, problem(), attack.grid[:1], steps=20, batch_size=None, record=2
        )
        assert np.all(np.isfinite(found.train_loss)), row


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimiser": "lion"}, "unknown optimiser 'lion'; choose from"),
        ({"schedule": "step"}, "unknown schedule 'step'"),
        ({"data": "retain"}, "unknown data 'retain'"),
        ({"rows": 0}, "rows: expected whole numbers"),
        ({"warmup": 0}, "warmup: expected"),
        ({"share": 1.5}, "share: expected"),
        ({"cosine_steps": 5, "schedule": "warmup"}, "got two"),
        ({"optimiser": "schedule_free", "schedule": "warmup"}, "got two"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        attacks.make_attack("fine_tune_adam", **options)
