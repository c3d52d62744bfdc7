"""DLR-Lock: a block in another form, fitted; and the same fit the other way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm.immunisers.locks import dlr_lock

D, HIDDEN, RANK, ROWS = 6, 16, 2, 400
KEY = jax.random.key(0)


@functools.cache
def block():
    """A block, its inputs and what it makes of them."""
    params = dlr_lock.init_plain(KEY, d=D, hidden=HIDDEN, dtype=jnp.float64)
    x = jax.random.normal(jax.random.fold_in(KEY, 1), (ROWS, D))
    return params, x, dlr_lock.plain_block(params, x)


def test_the_deep_form_by_hand_and_its_size():
    params = dlr_lock.init_deep(KEY, d=D, r=RANK, layers=5, dtype=jnp.float64)
    x = block()[1][:4]
    expected = np.asarray(x)
    for down, up in zip(params.down, params.up, strict=True):
        expected = expected + np.maximum(expected @ np.asarray(down), 0) @ np.asarray(up)
    np.testing.assert_allclose(dlr_lock.deep_block(params, x), expected, rtol=1e-12, atol=1e-12)
    assert dlr_lock.layers_of_size(2 * D * HIDDEN, D, RANK) == HIDDEN // RANK
    assert dlr_lock.layers_of_size(1, D, RANK) == 1
    with pytest.raises(ValueError, match=r"the rank must be in \[1, 6\], got 7"):
        dlr_lock.layers_of_size(100, D, 7)


def relative_error(outputs, expected):
    centred = expected - expected.mean(axis=0)[None, :]
    return float(jnp.sum((outputs - expected) ** 2) / jnp.sum(centred**2))


@pytest.mark.heavy
def test_a_block_is_locked_by_a_fit_and_unlocked_by_the_same_fit():
    """The breaker: the locked block's outputs teach a plain one."""
    _, x, y = block()
    layers = dlr_lock.layers_of_size(2 * D * HIDDEN + HIDDEN, D, RANK)
    start = dlr_lock.init_deep(jax.random.fold_in(KEY, 2), d=D, r=RANK, layers=layers)
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start)
    settings = {"optimiser": optax.adam(1e-2), "steps": 1500, "batch_size": 64, "rng_key": KEY}
    locked = dlr_lock.fit_block(dlr_lock.deep_block, start, x, y, **settings)
    seen = dlr_lock.deep_block(locked.params, x)
    plain = dlr_lock.init_plain(jax.random.fold_in(KEY, 3), d=D, hidden=HIDDEN, dtype=jnp.float64)
    distilled = dlr_lock.fit_block(dlr_lock.plain_block, plain, x, seen, **settings)
    errors = {
        "locked": relative_error(seen, y),
        "distilled": relative_error(dlr_lock.plain_block(distilled.params, x), y),
        "of a mean": relative_error(jnp.broadcast_to(y.mean(axis=0), y.shape), y),
    }
    assert errors["of a mean"] == pytest.approx(1)
    assert errors["locked"] < 0.1
    assert errors["distilled"] < errors["locked"] + 0.1


def test_memory_of_a_gradient_grows_with_the_layers():
    """What the lock costs: activations that a backward pass keeps."""
    x = block()[1]

    def kept(layers):
        params = dlr_lock.init_deep(KEY, d=D, r=RANK, layers=layers, dtype=jnp.float64)
        _, pull = jax.vjp(lambda p: dlr_lock.deep_block(p, x), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(8) > 1.8 * kept(4)


def test_rows_must_match():
    params, x, y = block()
    with pytest.raises(ValueError, match="as many rows"):
        dlr_lock.fit_block(
            dlr_lock.plain_block,
            params,
            x,
            y[1:],
            optax.sgd(0.1),
            steps=1,
            batch_size=2,
            rng_key=KEY,
        )
