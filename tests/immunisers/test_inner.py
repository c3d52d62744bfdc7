"""Steps inside of an update, against the same steps written out."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned

from jaximm.immunisers.meta.inner import in_steps, inner_steps

pytestmark = pytest.mark.heavy

STEPS, ROWS, D = 3, 4, 2
OPTIMISERS = {
    "momentum": optax.sgd(0.2, momentum=0.5),
    "adam": optax.adam(0.1, eps_root=1e-8),
}


def data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(STEPS * ROWS, D)), rng.normal(size=STEPS * ROWS)
    return in_steps((jnp.asarray(x), jnp.asarray(y)), STEPS)


def loss_fn(theta, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ theta["in"]) @ theta["out"] - y) ** 2)


def start():
    rng = np.random.default_rng(1)
    return {"in": jnp.asarray(rng.normal(size=(D, 3))), "out": jnp.asarray(rng.normal(size=3))}


def outer(theta):
    return jnp.sum(theta["in"] ** 3) + jnp.sum(jnp.sin(theta["out"]))


def weighted(theta, k):
    return jnp.exp(0.5 * k.astype(jnp.float64)) * outer(theta)


def written_out(theta, optimiser):
    """theta^(0) .. theta^(K), and the losses before each step."""
    path, losses, state = [theta], [], optimiser.init(theta)
    for number in range(STEPS):
        batch = jax.tree.map(lambda leaf, number=number: leaf[number], data())
        loss, slope = jax.value_and_grad(loss_fn)(theta, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(slope, state, theta)
        theta = optax.apply_updates(theta, updates)
        path.append(theta)
        losses.append(loss)
    return path, jnp.stack(losses)


def total(theta, optimiser):
    """What is differentiated: of the last parameters and of those on the way."""
    path, losses = written_out(theta, optimiser)
    on_the_way = sum(weighted(one, jnp.asarray(k)) for k, one in enumerate(path[:-1]))
    return outer(path[-1]) + on_the_way, (path, losses)


@functools.partial(jax.jit, static_argnames=("name", "order"))
def slopes(theta, name, order):
    def of(theta):
        inner = inner_steps(loss_fn, theta, data(), OPTIMISERS[name], order=order, observe=weighted)
        return outer(inner.params) + inner.observed, inner

    return jax.value_and_grad(of, has_aux=True)(theta)


@pytest.mark.parametrize("name", thinned(sorted(OPTIMISERS)))
def test_both_orders_against_the_steps_written_out(name):
    written = jax.jit(functools.partial(total, optimiser=OPTIMISERS[name]))
    value, (path, losses) = written(start())
    expected = {
        1: jax.tree.map(  # the slopes at each point, as if it were the start
            lambda *leaves: sum(leaves),
            jax.grad(outer)(path[-1]),
            *(jax.grad(weighted)(one, jnp.asarray(k)) for k, one in enumerate(path[:-1])),
        ),
        2: jax.jit(jax.grad(lambda theta: total(theta, OPTIMISERS[name])[0]))(start()),
    }
    for order in (1, 2):
        (found, inner), slope = slopes(start(), name, order)
        chex.assert_trees_all_close(inner.params, path[-1], rtol=1e-12)
        np.testing.assert_allclose(inner.losses, losses, rtol=1e-12)
        assert float(found) == pytest.approx(float(value), rel=1e-12)
        chex.assert_trees_all_close(slope, expected[order], rtol=1e-8, atol=1e-10)
    first, second = (np.asarray(expected[order]["in"]) for order in (1, 2))
    assert np.max(np.abs(first - second)) > 0.1


@pytest.mark.parametrize("order", thinned([2, 1]))
def test_only_every_so_many_points_are_observed(order):
    sgd = OPTIMISERS["momentum"]

    def found(theta):
        options = {"order": order, "observe": weighted, "every": 2}
        return inner_steps(loss_fn, theta, data(), sgd, **options).observed

    def expected(theta):
        path, _ = written_out(theta, sgd)
        if order == 1:  # each point is a start
            moves = jax.tree.map(lambda leaf: leaf - jax.lax.stop_gradient(leaf), theta)
            path = [jax.tree.map(lambda at, move: jax.lax.stop_gradient(at) + move, one, moves)
                    for one in path]  # fmt: skip
        return sum(weighted(path[k], jnp.asarray(k)) for k in (0, 2))

    (value, slope), (total_value, total_slope) = (
        jax.jit(jax.value_and_grad(fun))(start()) for fun in (found, expected)
    )
    assert float(value) == pytest.approx(float(total_value), rel=1e-12)
    chex.assert_trees_all_close(slope, total_slope, rtol=1e-8, atol=1e-10)


def test_order_two_is_the_slope_of_finite_differences():
    _, slope = slopes(start(), "momentum", 2)
    along = {"in": jnp.ones((D, 3)), "out": jnp.arange(3.0)}

    def at(step):
        moved = jax.tree.map(lambda leaf, way: leaf + step * way, start(), along)
        return float(slopes(moved, "momentum", 2)[0][0])

    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    found = sum(jnp.sum(slope[key] * along[key]) for key in along)
    assert float(found) == pytest.approx(expected, rel=1e-7)


def test_memory_of_order_one_does_not_grow_with_the_steps():
    def planned(steps):
        def of(theta):
            batches = jax.tree.map(lambda leaf: leaf[:1], data())
            batch = jax.tree.map(lambda leaf: leaf[0], batches)
            inner = inner_steps(
                lambda theta, _: loss_fn(theta, batch),
                *(theta, None, OPTIMISERS["adam"]),
                **{"order": 1, "steps": steps, "observe": weighted},
            )
            return outer(inner.params) + inner.observed

        compiled = jax.jit(jax.grad(of)).lower(start()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = planned(50), planned(500)
    assert many - few <= 8 * 450 * 2  # the recorded losses alone


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: in_steps((jnp.ones((7, 2)),), 3), "7 rows do not divide by 3 steps"),
        (
            lambda: inner_steps(loss_fn, start(), data(), optax.sgd(1.0), order=3),
            "order must be 1 or 2, got 3",
        ),
        (
            lambda: inner_steps(loss_fn, start(), None, optax.sgd(1.0), order=1),
            "say how many steps",
        ),
        (
            lambda: inner_steps(loss_fn, start(), data(), optax.sgd(1.0), order=1, every=0),
            "every must be >= 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
