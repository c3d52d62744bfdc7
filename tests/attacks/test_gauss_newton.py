"""Steps that solve for the curvature: what they solve, refuse, reach and cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaximm import attacks
from jaximm.attacks.weights import flops, gauss_newton
from jaximm.types import Batch, Head
from tests.attacks import test_language
from tests.helpers import thinned

D = 12
KERNEL = "a.kernel"


def _features(params, x):
    return jnp.tanh(x @ params[KERNEL])


@functools.cache
def _problem(dtype="float32", d=D, classes=False):
    """The targets are in the directions of least variance: a thousandth of the largest."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1, 1e-3, d)
    turn, start = (np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2))
    directions = rng.normal(size=(200, d))
    y = np.sum(directions[:, -d // 3 :], axis=1)
    if classes:
        y = np.searchsorted((-1.0, 1.0), y)
    x = jnp.asarray(directions * sizes @ turn, dtype)
    y = jnp.asarray(y, jnp.int32 if classes else dtype)
    train, held_out = (Batch(x[rows], y[rows]) for rows in (slice(120), slice(120, None)))
    k = 3 if classes else 1
    return attacks.FineTuneProblem(
        features_fn=_features, params={KERNEL: jnp.asarray(start, dtype)},
        head=Head(jnp.asarray(rng.normal(size=(d, k)), dtype), jnp.zeros(k, dtype)),
        train=train, selection=None, measured=train, held_out=held_out,
    )  # fmt: skip


def _run(label, problem, **options):
    options = {"batch_size": None, "record": 8, "chunk": None, "loop": "device", **options}
    return attacks.run_fine_tune(attacks.make_attack(label), problem, **options)


@pytest.mark.parametrize("classes", thinned([True, False]))
def test_a_step_solves_with_the_matrix_that_is_never_formed(classes):
    problem = _problem("float64", 3, classes)
    flat, unravel = ravel_pytree((problem.params, problem.head))

    def outputs(flat):
        params, head = unravel(flat)
        return head.outputs(_features(params, problem.train.x))

    jacobian = np.asarray(jax.jacfwd(outputs)(flat))  # [n, k, p]
    values, y, n = outputs(flat), problem.train.y, len(problem.train.y)
    if classes:
        shares = np.asarray(jax.nn.softmax(values))
        slopes = shares - np.eye(3)[y]
        curvatures = np.einsum("nk,kl->nkl", shares, np.eye(3)) - np.einsum(
            "nk,nl->nkl", shares, shares
        )
    else:
        slopes, curvatures = np.asarray(values) - np.asarray(y)[:, None], np.ones((n, 1, 1))
    gradient = np.einsum("nk,nkp->p", slopes, jacobian) / n
    matrix = np.einsum("nkp,nkl,nlq->pq", jacobian, curvatures, jacobian) / n
    damping = 1e-2 * (gradient @ matrix @ gradient) / (gradient @ gradient)
    expected = flat - np.linalg.solve(matrix + damping * np.eye(flat.size), gradient)
    label = f"gauss_newton@iterations={2 * flat.size},dampings=0.01,learning_rates=1.0"
    found = _run(label, problem, steps=1, record=2, keep_weights=True).weights
    found, _ = ravel_pytree(jax.tree.map(lambda leaf: leaf[0, 0], (found.params, found.head)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_it_learns_in_a_few_steps_what_adam_cannot_at_the_same_price():
    problem, steps = _problem(), 80
    found = _run("gauss_newton@iterations=16", problem, steps=steps)
    label = "fine_tune_adam@learning_rates=1e-3|1e-2|1e-1"
    times = found.step_flops / _run(label, problem, steps=1, record=2).step_flops
    assert times > 16
    adam = _run(label, problem, steps=round(times * steps))
    best, usual = (np.nanmin(trace.train_loss[:, 0, -1]) for trace in (found, adam))
    assert best < usual / 10
    place = np.nanargmin(found.train_loss[:, 0, -1])
    assert found.held_out_quality[place, 0, -1] > 0.9 > 0.5 > adam.held_out_quality[:, 0, -1].max()
    # On all rows a step that raises the loss is not made.
    assert (np.diff(found.train_loss, axis=-1) <= 1e-6).all()


@pytest.mark.slow
def test_going_on_from_the_last_solution_is_worth_it(monkeypatch):
    found = _run("gauss_newton@iterations=16", _problem(), steps=80)
    monkeypatch.setattr(gauss_newton, "_KEPT", 0.0)
    jax.clear_caches()
    cold = _run("gauss_newton@iterations=16", _problem(), steps=80)
    jax.clear_caches()
    losses = [np.min(trace.train_loss[:, 0, -1]) for trace in (found, cold)]
    assert losses[0] < losses[1] / 3, losses


def test_a_step_into_what_is_no_number_is_not_made():
    def features_fn(params, x):
        return jnp.log(params[KERNEL])[None, :] * x  # of a number below 0, none

    problem = dataclasses.replace(
        _problem(d=3), features_fn=features_fn, params={KERNEL: jnp.full(3, 0.1, jnp.float32)}
    )
    found = _run("gauss_newton@iterations=3", problem, steps=25)
    assert np.isfinite(found.train_loss).all()
    assert (found.train_loss[:, 0, -1] < found.train_loss[:, 0, 0]).all()


def test_every_product_is_paid_for():
    problem, counted = _problem(), {}
    for iterations in (4, 8):
        attack = attacks.make_attack("gauss_newton", iterations=iterations)
        _, counted[iterations] = flops.count_flops(attack, problem, attack.grid[0], batch_size=64)
        priced = dataclasses.replace(problem, row_flops=100.0)
        _, step = flops.count_flops(attack, priced, attack.grid[0], batch_size=64)
        assert step == (3 + 1 + 3 + 6 * (iterations + 2)) * 64 * 100.0
    forward = 2.0 * 64 * (D * D + D)
    product = (counted[8] - counted[4]) / 4
    assert 2 * forward < product < 8 * forward
    assert counted[4] > 6 * product


@pytest.mark.slow
def test_a_language_model_learns_by_it():
    found = attacks.run_fine_tune(
        attacks.make_attack("gauss_newton@learning_rates=1.0,iterations=2"),
        test_language.problem(), **test_language.RUN,
    )  # fmt: skip
    assert found.train_loss[0, 0, -1] < found.train_loss[0, 0, 0]
