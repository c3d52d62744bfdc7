"""The helpers are the identity without an axis, and right and sparing over one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaximm import collectives

N = 4
X = jnp.arange(24.0).reshape(8, 3)
Y = jnp.arange(100.0, 108.0)
SMALL = jnp.arange(200.0, 204.0)  # one row a device


def mapped(fun, *, out=None, axis="data"):
    mesh = jax.make_mesh((N,), (axis,), (AxisType.Auto,), devices=jax.devices()[:N])
    return jax.jit(
        jax.shard_map(fun, mesh=mesh, in_specs=P(axis), out_specs=out or P(), check_vma=False)
    )


def test_without_an_axis_nothing_happens():
    assert not collectives.is_bound()
    assert collectives.device_count() == 1
    assert collectives.gather_rows(X, Y)[0] is X
    assert collectives.own_rows(X) is X
    tree = {"x": X}
    assert collectives.mean_over_devices(tree) is tree
    assert collectives.sum_over_devices(tree) is tree


def test_another_axis_is_no_axis():
    def fun(x):
        assert not collectives.is_bound()
        return collectives.sum_over_devices(x)

    np.testing.assert_array_equal(mapped(fun, out=P("other"), axis="other")(X), X)


def test_rows_come_in_the_order_of_devices_in_one_message():
    def fun(x, y, small):
        assert collectives.device_count() == N
        return collectives.gather_rows(x, y, small)

    function = mapped(fun)
    for found, expected in zip(function(X, Y, SMALL), (X, Y, SMALL), strict=True):
        np.testing.assert_array_equal(found, expected)
    text = function.lower(X, Y, SMALL).compile().as_text() or ""
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 1
    with pytest.raises(ValueError, match="arrays of one dtype"):
        mapped(fun)(X, Y.astype(jnp.float32), SMALL)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32, jnp.float64])
def test_own_rows_undo_the_gather(dtype):
    rows = X.astype(dtype)
    found = mapped(lambda x: collectives.own_rows(*collectives.gather_rows(x)), out=P("data"))(rows)
    np.testing.assert_array_equal(found, rows)
    assert found.dtype == dtype


def test_gathered_rows_pull_back_to_their_own_device():
    """The gradient of one function of all rows, in one's own rows, is that of one device."""
    weights = jnp.arange(1.0, 9.0)[:, None]

    def loss(x):
        return jnp.sum(weights * jnp.sin(x)) ** 2

    def fun(x):
        (rows,) = collectives.gather_rows(x)
        return collectives.own_rows(jax.grad(loss)(rows))

    np.testing.assert_allclose(mapped(fun, out=P("data"))(X), jax.grad(loss)(X), rtol=1e-12)


@pytest.mark.parametrize("name", ["sum_over_devices", "mean_over_devices"])
def test_sums_and_means_of_a_tree_in_one_message(name):
    def fun(x, y):
        return getattr(collectives, name)({"x": x, "rest": (y, jnp.sum(y))})

    function = mapped(fun)
    found = function(X, Y)
    scale = N if name == "mean_over_devices" else 1
    np.testing.assert_allclose(found["x"], X.reshape(N, 2, 3).sum(0) / scale)
    np.testing.assert_allclose(found["rest"][0], Y.reshape(N, 2).sum(0) / scale)
    np.testing.assert_allclose(found["rest"][1], Y.sum() / scale)
    text = function.lower(X, Y).compile().as_text() or ""
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1


def test_pmap_binds_the_axis_too():
    fun = jax.pmap(
        lambda x: (collectives.sum_over_devices(x), *collectives.gather_rows(x)), axis_name="data"
    )
    total, rows = fun(X.reshape(N, 2, 3))
    np.testing.assert_allclose(total[1], X.reshape(N, 2, 3).sum(0))
    np.testing.assert_array_equal(rows[2], X)


def test_trees_of_several_dtypes_are_gathered_and_summed():
    """One all-reduce a dtype; ints and booleans are gathered as they are."""

    def fun(x):
        device = jax.lax.axis_index("data")
        tree = {
            "x": x,
            "n": jnp.full((1,), device, jnp.int32),
            "even": jnp.full((1,), device % 2 == 0),
        }
        sums = collectives.sum_over_devices(
            {"n": tree["n"], "x": x[0], "f": x[0].astype(jnp.float32), "two": x[1]}
        )
        return collectives.gather_tree(tree), sums

    function = mapped(fun)
    gathered, sums = function(X)
    np.testing.assert_array_equal(gathered["x"], X)
    assert gathered["n"].tolist() == [0, 1, 2, 3]
    assert gathered["even"].tolist() == [True, False, True, False]
    assert sums["n"].tolist() == [6]
    np.testing.assert_array_equal(sums["x"], X[::2].sum(axis=0))
    np.testing.assert_array_equal(sums["two"], X[1::2].sum(axis=0))
    np.testing.assert_array_equal(sums["f"], X[::2].sum(axis=0).astype(jnp.float32))
    assert sums["f"].dtype == jnp.float32
    text = function.lower(X).compile().as_text() or ""
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 3
    assert collectives.gather_tree(X) is X
