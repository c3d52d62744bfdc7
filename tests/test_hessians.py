"""Probe Hessians, operators over pytrees, and streaming Gram matrices on one and eight devices."""

import functools
import itertools
import re

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import thinned, thinned_rows
from jax.flatten_util import ravel_pytree

from jaximm import hessians as hs

pytestmark = pytest.mark.heavy

N, D, K = 7, 4, 3


def rows(seed=0, shape=(N, D), dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def dense_of(matvec, size):
    """The matrix of a matvec, a column at a time."""
    return jax.jit(jax.vmap(matvec, out_axes=1))(jnp.eye(size))


@pytest.mark.parametrize("convention", ["mean", "sum"])
def test_l2_hessian_is_that_of_the_loss(convention):
    x, y = rows(), rows(1, (N,))
    scale = 1 / N if convention == "mean" else 1.0

    def loss(w):
        return scale * (jnp.sum((x @ w - y) ** 2) / 2 + N * 0.3 / 2 * w @ w)

    expected = jax.jit(jax.hessian(loss))(jnp.ones(D))
    options = {"convention": convention, "damping": 0.3}
    np.testing.assert_allclose(hs.l2_probe_hessian(x, **options), expected, rtol=1e-12)
    operator = hs.l2_probe_operator(x, **options)
    np.testing.assert_allclose(dense_of(operator, D), expected, rtol=1e-12)


@pytest.mark.parametrize("intercept", thinned([0.7, None]))
@pytest.mark.parametrize("convention", thinned(["mean", "sum"]))
def test_logistic_hessian_is_that_of_the_loss(convention, intercept):
    x, w = rows(), rows(2, (D,))
    labels = jnp.where(rows(3, (N,)) > 0, 1.0, -1.0)
    scale = 1 / N if convention == "mean" else 1.0

    def loss(params):
        logits = x @ params[:D] + (params[D] if intercept is not None else 0.0)
        weight_decay = 0.2 / 2 * N * params @ params
        return scale * (jnp.sum(jax.nn.softplus(-labels * logits)) + weight_decay)

    point = w if intercept is None else jnp.append(w, intercept)
    expected = jax.jit(jax.hessian(loss))(point)
    options = {"convention": convention, "damping": 0.2}
    dense = jax.jit(lambda: hs.logistic_probe_hessian(x, w, intercept, **options))()
    np.testing.assert_allclose(dense, expected, rtol=1e-10)
    operator = hs.logistic_probe_operator(x, w, intercept, **options)
    np.testing.assert_allclose(dense_of(operator, point.shape[0]), expected, rtol=1e-10)


def test_logistic_curvature_keeps_its_digits_far_out():
    x = jnp.array([[60.0], [-60.0]])
    expected = 3600.0 * np.exp(-60.0)  # p (1 - p) = exp(-60) to 26 digits
    np.testing.assert_allclose(hs.logistic_probe_hessian(x, jnp.ones(1)), [[expected]], rtol=1e-12)


@pytest.mark.parametrize("with_intercept", thinned([True, False]))
@pytest.mark.parametrize("convention", thinned(["sum", "mean"]))
def test_softmax_hessian_is_that_of_the_loss(convention, with_intercept):
    x, w = rows(), rows(4, (D, K))
    b = rows(5, (K,)) if with_intercept else None
    labels = jnp.arange(N) % K
    scale = 1 / N if convention == "mean" else 1.0

    def loss(flat):
        params = flat.reshape(-1, K)
        logits = x @ params[:D] + (params[D:] if with_intercept else 0.0)
        nats = -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(N), labels])
        return scale * (nats + N * 0.1 / 2 * flat @ flat)

    point = w.reshape(-1) if b is None else jnp.concatenate([w, b[None, :]]).reshape(-1)
    expected = jax.jit(jax.hessian(loss))(point)
    options = {"convention": convention, "damping": 0.1}
    dense = jax.jit(lambda: hs.softmax_probe_hessian(x, w, b, **options))()
    np.testing.assert_allclose(dense, expected, rtol=1e-9, atol=1e-13)
    operator = hs.softmax_probe_operator(x, w, b, **options)
    np.testing.assert_allclose(dense_of(operator, point.shape[0]), expected, rtol=1e-9, atol=1e-13)


def test_softmax_hessian_is_singular_along_a_shift_of_all_classes():
    hessian = hs.softmax_probe_hessian(rows(), rows(6, (D, K)))
    shift = jnp.broadcast_to(rows(7, (D, 1)), (D, K)).reshape(-1)
    np.testing.assert_allclose(hessian @ shift, 0, atol=1e-14)
    assert np.linalg.matrix_rank(np.asarray(hessian), hermitian=True) == D * (K - 1)


@pytest.mark.slow
def test_two_class_softmax_and_logistic_are_the_same_probe():
    x, w = rows(), rows(8, (D,))
    softmax = hs.softmax_probe_hessian(x, jnp.stack([w, jnp.zeros(D)], axis=1))
    first = softmax.reshape(D, 2, D, 2)[:, 0, :, 0]
    np.testing.assert_allclose(first, hs.logistic_probe_hessian(x, w), rtol=1e-10)


def network(params, inputs):
    return jnp.tanh(inputs @ params["hidden"]) @ params["out"]


PARAMS = {"hidden": rows(9, (D, 5)), "out": rows(10, (5, 2))}


def network_loss(params, inputs, targets):
    return jnp.mean((network(params, inputs) - targets) ** 2)


def test_dense_hessian_and_hvp_agree_over_a_pytree():
    x, y = rows(), rows(11, (N, 2))
    hessian = jax.jit(hs.dense_hessian(network_loss))(PARAMS, x, y)
    size = D * 5 + 5 * 2
    assert hessian.shape == (size, size)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-13)
    operator = hs.flatten_operator(hs.hvp(network_loss, PARAMS, x, y), PARAMS)
    assert operator.dim == size
    np.testing.assert_allclose(dense_of(operator.matvec, size), hessian, rtol=1e-9, atol=1e-12)
    # Against central differences of the gradient, along one direction.
    flat, unravel = ravel_pytree(PARAMS)
    direction = rows(12, (size,))

    def gradient(t):
        return ravel_pytree(jax.grad(network_loss)(unravel(flat + t * direction), x, y))[0]

    gradient = jax.jit(gradient)
    difference = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    np.testing.assert_allclose(hessian @ direction, difference, rtol=1e-6, atol=1e-8)


def test_hvp_keeps_the_structure_of_the_parameters():
    product = hs.hvp(network_loss, PARAMS, rows(), rows(11, (N, 2)))(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(product, PARAMS)


def test_gauss_newton_is_jacobian_hessian_jacobian():
    x, y = rows(), jnp.arange(N) % 2
    flat, unravel = ravel_pytree(PARAMS)

    def cross_entropy(outputs):
        return -jnp.mean(jax.nn.log_softmax(outputs)[jnp.arange(N), y])

    operator = hs.gauss_newton_operator(lambda p: network(p, x), cross_entropy, PARAMS)
    operator = hs.flatten_operator(operator, PARAMS)
    jacobian = jax.jit(jax.jacobian(lambda v: network(unravel(v), x).reshape(-1)))(flat)
    output_hessian = jax.jit(hs.dense_hessian(cross_entropy))(network(PARAMS, x))
    expected = jacobian.T @ output_hessian @ jacobian
    actual = dense_of(operator.matvec, operator.dim)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-13)
    assert np.linalg.eigvalsh(np.asarray(actual))[0] > -1e-13
    full = jax.jit(hs.dense_hessian(lambda p: cross_entropy(network(p, x))))(PARAMS)
    assert np.abs(full - actual).max() > 1e-3  # the network is not linear in its parameters


def test_gauss_newton_of_a_linear_probe_is_its_hessian():
    x, w = rows(), rows(13, (D, K))
    labels = jnp.arange(N) % K

    def cross_entropy(logits):
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(N), labels])

    operator = hs.flatten_operator(hs.gauss_newton_operator(lambda p: x @ p, cross_entropy, w), w)
    expected = hs.softmax_probe_hessian(x, w)
    np.testing.assert_allclose(dense_of(operator.matvec, D * K), expected, rtol=1e-9, atol=1e-13)


def stream(x, y, splits, **options):
    state = hs.gram_init(x.shape[1], target_shape=None if y is None else y.shape[1:], **options)
    for start, stop in zip([0, *splits], [*splits, x.shape[0]], strict=True):
        batch_targets = None if y is None else y[start:stop]
        state = hs.gram_update(state, x[start:stop], batch_targets)
    return state


@pytest.mark.parametrize("target_shape", [(), (2,)])
def test_streamed_moments_are_those_of_all_rows(target_shape):
    x, y = rows(14, (11, D)), rows(15, (11, *target_shape))
    moments = hs.gram_finalise(stream(x, y, [3, 3, 8]), damping=0.5)
    np_x, np_y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(moments.gram, np_x.T @ np_x / 11 + 0.5 * np.eye(D), rtol=1e-12)
    np.testing.assert_allclose(moments.gram, hs.l2_probe_hessian(x, damping=0.5), rtol=1e-12)
    np.testing.assert_allclose(moments.cross, np_x.T @ np_y / 11, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(moments.target_square, np.mean(np_y**2, axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.feature_mean, np_x.mean(axis=0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(moments.target_mean, np_y.mean(axis=0), rtol=1e-12, atol=1e-14)
    assert moments.count == 11
    sums = hs.gram_finalise(stream(x, y, [5]), convention="sum", damping=0.5)
    np.testing.assert_allclose(sums.gram, np_x.T @ np_x + 11 * 0.5 * np.eye(D), rtol=1e-12)
    np.testing.assert_allclose(sums.cross, np_x.T @ np_y, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(sums.feature_mean, moments.feature_mean, rtol=1e-12)


@hypothesis.given(splits=st.lists(st.integers(0, 11), max_size=3).map(sorted))
def test_any_split_and_any_merge_gives_the_same_sums(splits):
    x = rows(16, (11, D))
    whole = stream(x, None, [])
    chex.assert_trees_all_close(stream(x, None, splits), whole, rtol=1e-11, atol=1e-13)
    cut = splits[0] if splits else 4
    merged = hs.gram_merge(stream(x[:cut], None, []), stream(x[cut:], None, []))
    chex.assert_trees_all_close(merged, whole, rtol=1e-11, atol=1e-13)


def test_the_state_decides_the_dtype():
    x = rows(17, (40, D), jnp.float32)
    in_double = np.asarray(x, np.float64)
    wide = stream(x, None, [13], dtype=jnp.float64).gram
    narrow = stream(x, None, [13], dtype=jnp.float32).gram
    assert (wide.dtype, narrow.dtype) == (jnp.float64, jnp.float32)
    # float32 rows multiplied in float64 lose nothing.
    np.testing.assert_allclose(wide, in_double.T @ in_double, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(narrow, in_double.T @ in_double, rtol=1e-5, atol=1e-5)
    assert stream(x.astype(jnp.float64), None, [], dtype=jnp.float32).gram.dtype == jnp.float32


def test_no_rows_give_nan_moments():
    moments = hs.gram_finalise(hs.gram_init(3))
    assert np.all(np.isnan(moments.gram))
    assert moments.count == 0


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def all_reduces(compiled) -> int:
    return len(re.findall(r"= .* all-reduce(?:-start)?\(", compiled.as_text()))


@pytest.mark.parametrize("target_shape", [None, (2,)])
def test_eight_devices_give_the_sums_of_one_with_a_single_all_reduce(target_shape):
    x = rows(18, (24, D))
    y = None if target_shape is None else rows(19, (24, *target_shape))

    def per_device(*batch):
        state = hs.gram_init(D, target_shape=target_shape)
        return hs.psum_gram(hs.gram_update(state, *batch), "data")

    batch = (x,) if y is None else (x, y)
    expected = stream(x, y, [])
    data = jax.sharding.PartitionSpec("data")
    none = jax.sharding.PartitionSpec()
    sharded = jax.jit(jax.shard_map(per_device, mesh=mesh(), in_specs=data, out_specs=none))
    compiled = sharded.lower(*batch).compile()
    assert all_reduces(compiled) == 1
    chex.assert_trees_all_close(compiled(*batch), expected, rtol=1e-12, atol=1e-13)

    mapped = jax.pmap(per_device, axis_name="data")
    split = jax.tree.map(lambda leaf: leaf.reshape(8, 3, *leaf.shape[1:]), batch)
    assert all_reduces(mapped.lower(*split).compile()) == 1
    on_each = mapped(*split)
    for device in (0, 7):
        first = jax.tree.map(lambda leaf, device=device: np.asarray(leaf)[device], on_each)
        chex.assert_trees_all_close(first, expected, rtol=1e-12, atol=1e-13)


def test_a_state_carried_over_batches_is_reduced_once_at_the_end():
    x = rows(20, (2, 16, D))

    def per_device(batches):
        start = jax.tree.map(
            lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), hs.gram_init(D)
        )
        state, _ = jax.lax.scan(lambda s, b: (hs.gram_update(s, b), None), start, batches)
        return hs.psum_gram(state, "data")

    total = jax.jit(
        jax.shard_map(
            per_device,
            mesh=mesh(),
            in_specs=jax.sharding.PartitionSpec(None, "data"),
            out_specs=jax.sharding.PartitionSpec(),
        )
    )(x)
    chex.assert_trees_all_close(total, stream(x.reshape(32, D), None, []), rtol=1e-12)


def test_the_count_is_exact_where_float32_is_not():
    state = hs.gram_init(2, dtype=jnp.float32)._replace(count=jnp.asarray(100_000_001, jnp.int32))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state)
    total = jax.pmap(lambda s: hs.psum_gram(s, "data"), axis_name="data")(stacked)
    np.testing.assert_array_equal(np.asarray(total.count), 800_000_008)


F32, F64 = jnp.float32, jnp.float64
LINE = jax.sharding.PartitionSpec("data")


@pytest.mark.parametrize("power", [-55, 60])
def test_gram_matrices_scale_to_the_bit_in_float32(power):
    x = rows(21, (8, D), F32)
    big = x * 2.0**power
    fn = jax.jit(functools.partial(hs.l2_probe_hessian, convention="sum"))
    np.testing.assert_array_equal(fn(big), np.ldexp(np.asarray(fn(x)), 2 * power))
    v = rows(22, (D,), F32)
    product = jax.jit(lambda x: hs.l2_probe_operator(x)(v))
    np.testing.assert_array_equal(product(big), np.ldexp(np.asarray(product(x)), 2 * power))
    line = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    dual = jax.jit(lambda x: hs.dual_gram(x, line, columns="data"))
    np.testing.assert_array_equal(dual(big), np.ldexp(np.asarray(dual(x)), 2 * power))
    gram = jax.jit(lambda x: hs.column_sharded_gram(x, line, axis="data"))
    np.testing.assert_array_equal(gram(big), np.ldexp(np.asarray(gram(x)), 2 * power))


def test_a_mean_fits_where_its_sum_does_not():
    x = jnp.full((1000, 1), 2.0**62, F32)  # the sum of squares, 1000 * 2^124, is no float32
    assert hs.l2_probe_hessian(x)[0, 0] == 2.0**124
    small = jnp.full((1000, 1), 2.0**-65, F32)  # a square is none, the sum of a thousand is
    assert hs.l2_probe_hessian(small, convention="sum")[0, 0] == 1000 * 2.0**-130


@pytest.mark.slow
def test_rows_beyond_what_a_float32_can_count():
    n = 2**24 + 2**20  # adding ones in float32 ends at 2^24
    ones = jnp.ones((n, 2), F32)
    np.testing.assert_array_equal(jax.jit(hs.l2_probe_hessian)(ones), 1)
    state = jax.jit(hs.gram_update)(hs.gram_init(2, target_shape=(), dtype=F32), ones, ones[:, 0])
    moments = hs.gram_finalise(hs.gram_merge(state, state))
    assert moments.count == 2 * n
    for part in (moments.gram, moments.cross, moments.feature_mean, moments.target_square):
        np.testing.assert_array_equal(part, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", thinned([jnp.bfloat16, jnp.float16]))
def test_half_precision_is_computed_in_float32(dtype):
    ones = jnp.ones((70_000, 1), dtype)
    mean = hs.l2_probe_hessian(ones)
    state = hs.gram_update(hs.gram_init(1, dtype=dtype), ones)
    assert (mean.dtype, state.gram.dtype) == (F32, F32)
    assert mean[0, 0] == hs.gram_finalise(state).gram[0, 0] == 1
    assert hs.l2_probe_operator(ones)(jnp.ones(1, dtype))[0] == 1
    x, w = rows(23).astype(dtype), rows(24, (D, K)).astype(dtype)
    full = x.astype(F32), w.astype(F32)
    np.testing.assert_array_equal(hs.softmax_probe_hessian(x, w), hs.softmax_probe_hessian(*full))
    logistic = hs.logistic_probe_hessian(x, w[:, 0], w[0, 0])
    expected = hs.logistic_probe_hessian(full[0], full[1][:, 0], full[1][0, 0])
    np.testing.assert_array_equal(logistic, expected)
    assert jax.grad(lambda x: hs.l2_probe_hessian(x).sum())(x).dtype == dtype

    def loss(params, inputs):
        return jnp.mean((inputs @ params) ** 2)

    assert hs.dense_hessian(loss)(w[:, 0], x).dtype == F32
    operator = hs.flatten_operator(hs.hvp(loss, w[:, 0], x), w[:, 0])
    np.testing.assert_allclose(
        operator.matvec(full[1][:, 1]), 2 * full[0].T @ full[0] @ full[1][:, 1] / N, rtol=1e-5
    )


@pytest.mark.slow
def test_numpy_and_mixed_dtypes():
    x = np.asarray(rows(25, dtype=F32))
    w = np.asarray(rows(26, (D, K)))  # double: the wider dtype is computed in
    assert hs.softmax_probe_hessian(x, w).dtype == F64
    assert hs.l2_probe_operator(x)(w[:, 0]).dtype == F64
    with jax.enable_x64(False):
        double = x.astype(np.float64)
        narrow = hs.l2_probe_hessian(double)
        assert narrow.dtype == F32
        np.testing.assert_array_equal(narrow, hs.l2_probe_hessian(x))
        assert hs.softmax_probe_hessian(double, w).dtype == F32
        assert hs.gram_init(2, dtype=np.float64).gram.dtype == F32


def exact_softmax_hessian(x, w):
    """The formula in 400 digits: 1 - p is not to lose e^-800."""
    with mpmath.workdps(400):
        n, d, k = *x.shape, w.shape[1]
        total = mpmath.zeros(d * k, d * k)
        for row in x:
            logits = [
                mpmath.fsum(mpmath.mpf(float(a)) * float(b) for a, b in zip(row, c, strict=True))
                for c in w.T
            ]
            top = max(logits)
            weights = [mpmath.e ** (z - top) for z in logits]
            p = [weight / mpmath.fsum(weights) for weight in weights]
            for i, j, c, e in itertools.product(range(d), range(d), range(k), range(k)):
                total[i * k + c, j * k + e] += (
                    mpmath.mpf(float(row[i])) * float(row[j]) * p[c] * ((c == e) - p[e]) / n
                )
        return np.array(total.tolist(), dtype=np.float64)


@pytest.mark.parametrize(("dtype", "far"), thinned_rows([(F32, 100), (F64, 800), (F64, 60)]))
def test_softmax_and_logistic_keep_their_digits_far_out(dtype, far):
    x = jnp.asarray(np.array([[1.0, 0.5], [1.5, -0.25], [1.25, 0.75]]) * 2.0**20, dtype)
    w = jnp.asarray(np.array([[1.0, 0.0, -0.5], [0.0, 0.25, 0.0]]) * far * 2.0**-20, dtype)
    expected = exact_softmax_hessian(np.asarray(x), np.asarray(w))
    largest = np.abs(expected).max()
    assert largest > float(jnp.finfo(dtype).tiny)
    tolerance = 10 * far * float(jnp.finfo(dtype).eps) * largest
    dense = hs.softmax_probe_hessian(x, w)
    np.testing.assert_allclose(np.asarray(dense, np.float64), expected, rtol=0, atol=tolerance)
    applied = np.stack([hs.softmax_probe_operator(x, w)(e) for e in np.eye(6, dtype=dtype)], 1)
    np.testing.assert_allclose(applied.astype(np.float64), expected, rtol=0, atol=tolerance)
    v = w[:, 0] - w[:, 1]
    two = exact_softmax_hessian(np.asarray(x), np.asarray(jnp.stack([v, 0 * v], 1)))[::2, ::2]
    largest = np.abs(two).max()
    tolerance = 10 * far * float(jnp.finfo(dtype).eps) * largest
    logistic = hs.logistic_probe_hessian(x, v)
    np.testing.assert_allclose(np.asarray(logistic, np.float64), two, rtol=0, atol=tolerance)
    applied = np.stack([hs.logistic_probe_operator(x, v)(e) for e in np.eye(2, dtype=dtype)], 1)
    np.testing.assert_allclose(applied.astype(np.float64), two, rtol=0, atol=tolerance)


def test_logits_beyond_the_dtype_and_a_single_class():
    x = jnp.array([[1.0, 1.0], [1.0, 2.0]], F32) * 1e30
    w = jnp.array([1e10, -1e10], F32)  # the first logit is zero, the second below every float32
    np.testing.assert_allclose(
        hs.logistic_probe_hessian(x * 1e-15, w * 1e20)[0, 0], 1e30 / 8, rtol=1e-6
    )
    classes = jnp.stack([w * 1e20, 0 * w], axis=1)
    softmax = hs.softmax_probe_hessian(x * 1e-15, classes)
    np.testing.assert_allclose(softmax[:2, :2], 1e30 / 8 * np.array([[1, -1], [-1, 1]]), rtol=1e-6)
    np.testing.assert_array_equal(hs.softmax_probe_hessian(x, w[:, None]), 0)
    total = jax.jit(jax.grad(lambda w, x: hs.softmax_probe_hessian(x, w).sum()))
    gradient = total(jnp.zeros((D, 1)), rows())
    np.testing.assert_array_equal(gradient, 0)


def test_a_gradient_through_the_softmax_hessian():
    x, w = rows(27), rows(28, (D, K))
    first = jax.jit(jax.grad(lambda x, w: jnp.sum(hs.softmax_probe_hessian(x, w) ** 2), (0, 1)))

    def plain(x, w):
        p = jax.nn.softmax(x @ w, axis=1)
        block = p[:, :, None] * (jnp.eye(K)[None] - p[:, None, :])
        return jnp.sum((jnp.einsum("ni,nce,nj->icje", x, block, x) / N) ** 2)

    chex.assert_trees_all_close(first(x, w), jax.jit(jax.grad(plain, (0, 1)))(x, w), rtol=1e-9)


@pytest.mark.parametrize("block", thinned([5, 4096]))
def test_derivatives_of_an_operator_are_those_of_the_matrix(block, monkeypatch):
    monkeypatch.setattr("jaximm.hessians.rows._BLOCK", block)
    at = rows(6), rows(7, (D, K)), rows(8, (K,)), rows(9, ((D + 1) * K,))

    def of_operator(x, w, b, v):
        return jnp.sum(hs.softmax_probe_operator(x, w, b, damping=0.1)(v) ** 2)

    def of_matrix(x, w, b, v):
        return jnp.sum((hs.softmax_probe_hessian(x, w, b, damping=0.1) @ v) ** 2)

    def derivatives(loss):
        first = jax.grad(loss, (0, 1, 2, 3))
        return jax.jit(lambda *at: jax.jvp(first, at, at))(*at)

    of_both = derivatives(of_operator), derivatives(of_matrix)
    chex.assert_trees_all_close(*of_both, rtol=1e-9, atol=1e-12)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), at)
    each = jax.jit(jax.vmap(jax.grad(of_operator, (0, 1, 2, 3))))(*two)
    first = jax.tree.map(lambda leaf: leaf[0], each)
    chex.assert_trees_all_close(first, of_both[1][0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", thinned([True, False]))
def test_everything_that_may_stand_inside_shard_map(check_vma):
    x, w, v = rows(29, (24, D)), rows(30, (D, K)), rows(31, (D * K,))

    def per_device(x):
        state = hs.psum_gram(hs.gram_update(hs.gram_init(D), x), "data")
        logistic = hs.logistic_probe_operator(x, w[:, 0], w[0, 0])(v[: D + 1])
        softmax = hs.softmax_probe_operator(x, w)(v)
        parts = (hs.l2_probe_hessian(x), hs.l2_probe_operator(x)(v[:D]), logistic, softmax)
        parts += (hs.logistic_probe_hessian(x, w[:, 0]), hs.softmax_probe_hessian(x, w))
        parts += (jax.grad(lambda x: jnp.sum(hs.softmax_probe_hessian(x, w) ** 2))(x),)
        parts += (jax.grad(lambda x: jnp.sum(hs.softmax_probe_operator(x, w)(v) ** 2))(x),)
        return state.gram, state.count, tuple(part[None] for part in parts)

    none = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        per_device, mesh=mesh(), in_specs=LINE, out_specs=(none, none, LINE), check_vma=check_vma
    )
    gram, count, parts = jax.jit(mapped)(x)
    np.testing.assert_allclose(gram, x.T @ x, rtol=1e-12)
    assert count == 24
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    alone = jax.jit(
        jax.shard_map(per_device, mesh=one, in_specs=LINE, out_specs=(none, none, LINE))
    )
    for device in (0, 6):
        expected = alone(x[3 * device : 3 * device + 3])[2]
        got = jax.tree.map(lambda leaf, device=device: np.asarray(leaf)[[device]], parts)
        chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-13)


def test_sums_far_from_the_origin_keep_the_digits_of_their_dtype():
    x = rows(32, (40, D), F32) + 2.0**40
    exact = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    whole = stream(x, None, [], dtype=F32)
    np.testing.assert_allclose(whole.gram, exact, rtol=1e-6)
    parts = [stream(x[i : i + 10], None, [], dtype=F32) for i in (0, 10, 20, 30)]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        merged = functools.reduce(hs.gram_merge, [parts[i] for i in order])
        chex.assert_trees_all_close(merged, whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hs.l2_probe_hessian(jnp.ones(3)), "non-empty"),
        (lambda: hs.l2_probe_hessian(jnp.ones((2, 3), int)), "float dtype"),
        (lambda: hs.l2_probe_hessian(jnp.ones((2, 3)), convention="total"), "convention"),
        (lambda: hs.l2_probe_operator(jnp.ones((0, 3))), "non-empty"),
        (lambda: hs.logistic_probe_hessian(jnp.ones((2, 3)), jnp.ones(2)), "weights"),
        (lambda: hs.softmax_probe_hessian(jnp.ones((2, 3)), jnp.ones((2, 3))), r"\[3, k\]"),
        (
            lambda: hs.softmax_probe_operator(jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.ones(3)),
            "intercept",
        ),
        (lambda: hs.gram_init(0), "width"),
        (lambda: hs.gram_init(2, dtype=jnp.int32), "dtype"),
        (lambda: hs.gram_update(hs.gram_init(2), jnp.ones((3, 4))), r"\[n, 2\]"),
        (lambda: hs.gram_update(hs.gram_init(2), jnp.ones((3, 2)), jnp.ones(3)), "keeps none"),
        (
            lambda: hs.gram_update(hs.gram_init(2, target_shape=()), jnp.ones((3, 2))),
            "needs them",
        ),
        (
            lambda: hs.gram_update(
                hs.gram_init(2, target_shape=()), jnp.ones((3, 2)), jnp.ones((3, 1))
            ),
            "targets must have shape",
        ),
        (lambda: hs.gram_merge(hs.gram_init(2), hs.gram_init(3)), "fit together"),
        (lambda: hs.gram_finalise(hs.gram_init(2), convention="total"), "convention"),
    ],
)
def test_senseless_input_is_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", thinned([np.float32, np.float64]))
def test_no_feature_or_row_is_lost_beside_a_larger_one(dtype):
    far = 60 if dtype == np.float32 else 500
    x = np.array([[2.0**far, 0], [0, 2.0**-far], [0, 0]], dtype)
    expected = np.diag([2.0 ** (2 * far), 2.0 ** (-2 * far)]) / 3
    operator = hs.l2_probe_operator(x)
    np.testing.assert_allclose(hs.l2_probe_hessian(x), expected, rtol=1e-6)
    np.testing.assert_allclose(
        np.stack([operator(v) for v in np.eye(2, dtype=dtype)]), expected, rtol=1e-6
    )

    # A row whose p (1 - p) is no number of the dtype, where p (1 - p) x^2 is.
    far, logit = (100, 130) if dtype == np.float32 else (700, 900)
    x = np.array([[1, 0], [0, 2.0**far]], dtype)
    w = np.array([0, logit * 2.0**-far], dtype)
    expected = np.diag([0.125, (np.exp(-logit / 2) * 2.0**far) ** 2 / 2])
    eye = np.eye(2, dtype=dtype)
    operator = hs.logistic_probe_operator(x, w)
    rtol = 1e-4 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(hs.logistic_probe_hessian(x, w), expected, rtol=rtol)
    np.testing.assert_allclose(np.stack([operator(v) for v in eye]), expected, rtol=rtol)
    two = np.stack([w, 0 * w], axis=1)
    pair = np.array([[1, -1], [-1, 1]])
    softmax = hs.softmax_probe_hessian(x, two)
    np.testing.assert_allclose(softmax, np.kron(expected, pair), rtol=rtol)
    operator = hs.softmax_probe_operator(x, two)
    np.testing.assert_allclose(
        np.stack([operator(v) for v in np.eye(4, dtype=dtype)]), softmax, rtol=rtol
    )


def test_a_logit_is_the_sum_of_its_own_terms():
    # 2^-100 2^100 + 2^100 2^-100: neither factor may be lost beside the other feature's.
    x = np.array([[2.0**-100, 2.0**100]], np.float32)
    w = np.array([2.0**100, 2.0**-100], np.float32)
    p = 1 / (1 + np.exp(-2.0))
    found = hs.logistic_probe_hessian(x, w, np.float32(0))
    np.testing.assert_allclose(found[2, 2], p * (1 - p), rtol=1e-6)
