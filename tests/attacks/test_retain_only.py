"""An attacker who tunes on the primary task alone."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import attacks
from jaximm.attacks.weights import retain_only, solved_head
from jaximm.attacks.weights.problem import ModelWeights
from jaximm.types import Batch, Head

D_IN, D, N = 8, 6, 200
KERNEL = "a.kernel"


def _features(params, x):
    return x @ params[KERNEL]


@functools.cache
def _problem(seed=0):
    """Both tasks live in the same two directions, of which the defence left a hundredth."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(D_IN, D_IN)))[0]
    kernel = turn[:, :D] * np.where(np.arange(D) < 2, 1e-2, 1.0)

    def rows(n, task, seed):
        x = np.random.default_rng(seed).normal(size=(n, D_IN))
        first, second = (x @ turn[:, :2]).T
        y = first + second / 2 > 0 if task == harmful else (first > 0) + 2 * (second > 0)
        return Batch(jnp.asarray(x), jnp.asarray(y, jnp.int32))

    harmful, primary = "a mix of the two", "the sign of each"
    return attacks.FineTuneProblem(
        features_fn=_features, params={KERNEL: jnp.asarray(kernel)},
        head=attacks.zero_head(D, 2, jnp.float64), train=rows(N, harmful, seed + 1),
        selection=None, measured=rows(40, harmful, 9), held_out=rows(400, harmful, 2),
        benign=attacks.Benign(head=attacks.zero_head(D, 4, jnp.float64),
                              train=rows(N, primary, 3), held_out=rows(200, primary, 4)),
    )  # fmt: skip


def _run(problem, label="retain_only@learning_rates=0.01,penalties=0.01", steps=200):
    return attacks.run_fine_tune(
        attacks.make_attack(label), problem, steps=steps, batch_size=64, record=4,
        keep_weights=True, loop="device",
    )  # fmt: skip


def test_what_was_hidden_comes_back_and_no_harmful_row_trains_it():
    problem = _problem()
    found = _run(problem)
    assert found.held_out_quality[0, 0, 0] < 0.7
    assert found.held_out_quality[0, 0, -1] > 0.85
    # Other harmful rows: the same backbone, another head.
    other = _run(_problem(seed=50))
    jax.tree.map(np.testing.assert_array_equal, found.weights.params, other.weights.params)
    assert not np.array_equal(found.weights.head.kernel, other.weights.head.kernel)
    few = _run(problem, "retain_only@learning_rates=0.01,penalties=0.01,harmful_rows=4")
    jax.tree.map(np.testing.assert_array_equal, found.weights.params, few.weights.params)
    assert few.held_out_quality[0, 0, -1] < found.held_out_quality[0, 0, -1]


def test_a_head_that_came_with_the_model_stays():
    head = Head(jnp.ones((D, 2)).at[0].set(jnp.array([-1.0, 1.0])), jnp.zeros(2))
    found = _run(dataclasses.replace(_problem(), head=head), steps=5)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours[0, 0], theirs),
        found.weights.head, head,
    )  # fmt: skip
    moved = np.abs(found.weights.params[KERNEL][0, 0] - _problem().params[KERNEL])
    assert moved.max() > 1e-3


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("k", [4, 20])
def test_the_head_of_few_rows_is_the_ridge_head(real, k):
    rng = np.random.default_rng(k)
    x = jnp.asarray(rng.normal(size=(k, D)) * np.geomspace(1, 1e-2, D) + 3)
    y = jnp.asarray(rng.normal(size=k) if real else rng.integers(0, 3, k))
    classes, penalty = 1 if real else 3, jnp.asarray(1e-2)
    found, expected = (
        fit(Batch(x, y), classes, penalty)
        for fit in (retain_only.head_of_few, solved_head.ridge_head)
    )
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8),
        found, expected,
    )  # fmt: skip
    alike = retain_only.head_of_few(Batch(jnp.ones((k, D)), y), classes, penalty)
    np.testing.assert_array_equal(alike.kernel, 0)


def test_with_many_rows_no_square_of_them_is_made():
    n = 5000
    rng = np.random.default_rng(0)
    rows = Batch(jnp.asarray(rng.normal(size=(n, D_IN))), jnp.asarray(rng.integers(0, 2, n)))
    attack = attacks.make_attack(f"retain_only@harmful_rows={n}")
    assert attack.solve_flops is not None
    problem = dataclasses.replace(_problem(), train=rows)
    assert attack.solve_flops(problem) == (9 * D**3,) * 2
    weights = ModelWeights(problem.params, problem.head, problem.benign.head)
    access = SimpleNamespace(inputs=rows, features_fn=problem.features_fn, weights=weights)
    fitted = jax.jit(lambda w: retain_only._fitted(access, w, {"penalty": jnp.asarray(0.1)}))
    planned = fitted.lower(weights).compile().memory_analysis().temp_size_in_bytes
    assert planned < 8 * rows.x.nbytes < 8 * n * n


def test_it_says_how_many_rows_it_has():
    said = attacks.describe("retain_only")
    assert said["harmful_rows"] == 16
    assert said["threat_model"] == (
        "has the weights, 16 labelled rows of the harmful task and rows of the primary task"
    )
    assert attacks.describe("retain_only@harmful_rows=64")["harmful_rows"] == 64
