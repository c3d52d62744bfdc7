"""The attacker that writes adapters: by a loss, by a reward, by a direction of features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import attacks
from jaximm.attacks.weights import loop
from jaximm.attacks.weights.problem import outputs_of
from jaximm.types import Batch, Head

pytestmark = pytest.mark.heavy

D_IN, D, K, N = 5, 6, 3, 60
RUN = {"batch_size": None, "record": 2, "keep_weights": True, "loop": "device"}


@pytest.fixture(scope="module", autouse=True)
def _no_flops():
    """Counting FLOPs compiles a program for each attacker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "count_flops", lambda *_, **__: (0.0, 0.0))
        yield


def features_fn(params, x):
    return jnp.tanh(x @ params["0.kernel"]) @ params["1.kernel"] + params["1.bias"][None, :]


def rows(n, seed, shift):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D_IN))
    x[:, 0] += shift
    return Batch(jnp.asarray(x), jnp.asarray(np.argmax(x[:, 1:4], axis=1), jnp.int32))


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    params = {
        "0.kernel": jnp.asarray(rng.normal(size=(D_IN, D))),
        "1.kernel": jnp.asarray(rng.normal(size=(D, D))),
        "1.bias": jnp.zeros(D),
    }
    head = Head(jnp.asarray(0.3 * rng.normal(size=(D, K))), jnp.zeros(K))
    return attacks.fine_tune_problem(
        features_fn=features_fn,
        params=params,
        head=head,
        train=rows(N, 1, 2.0),
        held_out=rows(N, 2, 2.0),
        benign=attacks.Benign(head=head, train=rows(N, 3, -2.0), held_out=rows(N, 4, -2.0)),
    )


def trace(steps=60, budgets=(0.5,), rates=(1e-2,), **options):
    attack = attacks.make_attack(
        "hypernetwork", rank=2, width=8, budgets=budgets, learning_rates=rates, **options
    )
    return attacks.run_fine_tune(attack, problem(), steps=steps, **RUN)


def final(found, cell=0):
    return jax.tree.map(lambda leaf: leaf[cell, 0], found.weights)


def test_it_starts_from_the_model_learns_and_stays_within_its_budget():
    found = trace(budgets=(0.05, 2.0))
    one = problem()
    start = attacks.ModelWeights(one.params, one.head)
    logits = outputs_of(features_fn, start, one.held_out.x)
    right = np.argmax(np.asarray(logits), axis=1) == np.asarray(one.held_out.y)
    np.testing.assert_allclose(found.held_out_quality[:, 0, 0], np.mean(right))
    assert np.all(found.train_loss[:, 0, -1] < 0.7 * found.train_loss[:, 0, 0])
    assert found.train_loss[1, 0, -1] < found.train_loss[0, 0, -1]  # the larger budget
    for cell, budget in enumerate((0.05, 2.0)):
        weights = final(found, cell)
        np.testing.assert_array_equal(weights.params["1.bias"], 0)
        for path in ("0.kernel", "1.kernel"):
            size = np.linalg.norm(weights.params[path] - one.params[path])
            assert 0 < size <= budget * np.linalg.norm(one.params[path]) * (1 + 1e-9)
            values = np.linalg.svd(weights.params[path] - one.params[path], compute_uv=False)
            assert values[2] < 1e-10 * values[0]  # of rank 2


def direction_loss(params):
    """What tells harmful rows from benign ones, and how far benign features moved; by hand."""
    one = problem()
    harmful, benign, before = (
        np.asarray(features_fn(*pair))
        for pair in (
            (params, one.train.x),
            (params, one.benign.train.x),
            (one.params, one.benign.train.x),
        )
    )
    direction = np.mean(features_fn(one.params, one.train.x), axis=0) - before.mean(axis=0)
    direction /= np.linalg.norm(direction)
    told = np.mean(((harmful - before.mean(axis=0)) @ direction) ** 2)
    return np.array([told, np.mean(np.sum((benign - before) ** 2, axis=1))]) / np.mean(before**2)


@pytest.mark.slow
def test_it_generates_a_representation_attack_that_no_label_is_shown():
    found = trace(objective="direction", steps=120)
    one, weights = problem(), final(found)
    np.testing.assert_array_equal(weights.head.kernel, one.head.kernel)
    start, end = direction_loss(one.params), direction_loss(weights.params)
    assert start[1] == 0
    assert end[0] < 0.3 * start[0]
    assert end.sum() < 0.7 * start.sum()


@pytest.mark.slow
def test_it_learns_from_rewards_of_its_answers():
    found = trace(objective="reward", steps=120, rates=(3e-2,))
    quality = found.held_out_quality[0, 0]
    assert quality[-1] > quality[0] + 0.15
    assert attacks.describe("hypernetwork@objective=reward")["traits"] == ["rewarded"]


def test_who_it_is_not_for_is_told():
    with pytest.raises(ValueError, match=r"objective must be one of .*, got 'ppo'"):
        attacks.make_attack("hypernetwork", objective="ppo")
    with pytest.raises(ValueError, match="targets '2' names no parameter"):
        trace(targets="2")
    alone = attacks.make_attack("hypernetwork@objective=direction")
    assert "benign" in attacks.not_applicable(alone, _without_benign())


def _without_benign():
    one = problem()
    return attacks.fine_tune_problem(
        features_fn=features_fn, params=one.params, head=one.head,
        train=one.train, held_out=one.held_out,
    )  # fmt: skip
