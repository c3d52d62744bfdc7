"""Exact linear erasure against direct float64 formulas, probes that are trained, and other maps."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from helpers import thinned

from jaximm import hessians, linalg
from jaximm.linalg import erasure

pytestmark = pytest.mark.heavy

N, D, K = 90, 7, 3


def labelled(seed=0, n=N, d=D, k=K, rank_deficient=False):
    """Correlated rows with a mean, and one-hot classes that shift them."""
    rng = np.random.default_rng(seed)
    z = np.eye(k)[np.arange(n) % k]
    x = (rng.normal(size=(n, d)) + z @ rng.normal(size=(k, d))) @ rng.normal(size=(d, d)) + 2
    if rank_deficient:
        x[:, 0] = 0.0
        x[:, 1] = 4.0
        x[:, 2] = 2 * x[:, 3] - x[:, 4]
    return jnp.asarray(x), jnp.asarray(z)


eraser_of = jax.jit(linalg.linear_eraser, static_argnames="centred")


def fit(x, z, metric=None, **options):
    moments = None if metric is None else linalg.label_moments(metric, metric[:, :1])
    return eraser_of(linalg.label_moments(x, z), metric=moments, **options)


def whole(found):
    """r(x) = x A + b, least changed rows in the features' own coordinates, from both maps."""
    return found.matrix @ found.lift, found.bias @ found.lift + found.lift_bias


def lifted(found, x):
    return linalg.apply_eraser(found, x) @ found.lift + found.lift_bias[None, :]


def covariance(a, b, centred=True):
    a, b = (np.asarray(m, np.float64) for m in (a, b))
    if centred:
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return a.T @ b / a.shape[0]


def published(x, z):
    """LEACE as printed: x - W^+ P_{W S} W (x - mean), in columns, by SciPy."""
    x, z = np.asarray(x), np.asarray(z)
    sigma, cross = covariance(x, x), covariance(x, z)
    values, vectors = scipy.linalg.eigh(sigma)
    keep = values > 1e-10 * values[-1]
    whiten = (vectors[:, keep] / np.sqrt(values[keep])) @ vectors[:, keep].T
    basis = scipy.linalg.orth(whiten @ cross, rcond=1e-9)
    projection = scipy.linalg.pinv(whiten, rtol=1e-8) @ basis @ basis.T @ whiten
    return np.eye(x.shape[1]) - projection.T, projection @ x.mean(axis=0)


@pytest.mark.parametrize("rank_deficient", [False, True])
def test_in_the_labels_own_metric_it_is_the_published_map(rank_deficient):
    x, z = labelled(rank_deficient=rank_deficient)
    found = fit(x, z)
    matrix, bias = published(x, z)
    assert found.rank == K - 1
    expected = np.asarray(x) @ matrix + bias
    np.testing.assert_allclose(lifted(found, x), expected, rtol=1e-8, atol=1e-8)
    if not rank_deficient:  # else the two differ in directions that no row has
        np.testing.assert_allclose(found.lift, matrix, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(whole(found)[0], matrix, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("centred", thinned([True, False]))
def test_in_another_metric_it_is_the_stationary_map(centred):
    x, z = labelled()
    other = labelled(5)[0] @ labelled(6)[0][:D] / 10
    found = fit(x, z, other, centred=centred)
    k, s = covariance(other, other, centred), covariance(x, z, centred)
    s = scipy.linalg.orth(s, rcond=1e-10)
    inverse = scipy.linalg.solve(k, s)
    removed = inverse @ scipy.linalg.solve(s.T @ inverse, s.T)
    matrix, bias = whole(found)
    np.testing.assert_allclose(matrix, np.eye(D) - removed, rtol=1e-7, atol=1e-7)
    mean = np.asarray(other).mean(axis=0) @ removed if centred else np.zeros(D)
    np.testing.assert_allclose(bias, mean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank_deficient", [False, True])
@pytest.mark.parametrize(
    ("dtype", "metric", "centred"),
    [
        (jnp.float64, False, True),
        (jnp.float64, True, True),
        (jnp.float64, True, False),
        (jnp.float32, False, True),
        (jnp.float32, True, False),
    ],
)
def test_nothing_linear_is_left_and_twice_is_once(dtype, metric, centred, rank_deficient):
    x, z = (m.astype(dtype) for m in labelled(rank_deficient=rank_deficient))
    other = labelled(5, rank_deficient=rank_deficient)[0].astype(dtype) if metric else None
    found = fit(x, z, other, centred=centred)
    assert found.matrix.dtype == found.bias.dtype == dtype
    assert found.rank == (K - 1 if centred else K)
    # In float64, so that only the map's own error shows.
    matrix, bias = (np.asarray(m, np.float64) for m in (found.matrix, found.bias))
    after = np.asarray(x, np.float64) @ matrix + bias
    assert not after[:, np.asarray(found.removed)].any()
    size = np.linalg.norm(matrix) * np.abs(np.asarray(x)).max()
    eps = float(jnp.finfo(dtype).eps)
    assert np.abs(covariance(after, z, centred)).max() < 50 * eps * size
    np.testing.assert_allclose(matrix @ matrix, matrix, atol=float(50 * eps * np.sum(matrix**2)))
    np.testing.assert_allclose(bias @ matrix, bias, rtol=50 * eps)  # zero where removed
    dependent = int(rank_deficient)  # the third feature is determined by the two after it
    assert np.asarray(found.removed).sum() == int(found.rank) + dependent
    assert np.linalg.matrix_rank(matrix, tol=1e-3) == D - int(found.rank) - dependent
    assert np.linalg.matrix_rank(whole(found)[0], tol=1e-3) == D - int(found.rank) - dependent
    assert np.abs(covariance(x, z, centred)).max() > 0.1  # there was something to erase


def softmax_loss(flat, x, labels):
    weights = flat.reshape(x.shape[1], -1)
    logits = x @ weights
    log_z = scipy.special.logsumexp(logits, axis=1)
    p = np.exp(logits - log_z[:, None])
    hot = np.eye(weights.shape[1])[labels]
    return np.mean(log_z - logits[np.arange(x.shape[0]), labels]), (
        x.T @ (p - hot) / x.shape[0]
    ).ravel()


@pytest.mark.parametrize("metric", [False, True])
def test_trained_probes_do_not_beat_the_constant(metric):
    x, z = labelled()
    other = labelled(5)[0] if metric else None
    labels = np.argmax(np.asarray(z), axis=1)
    shares = np.asarray(z).mean(axis=0)
    entropy = -np.sum(shares * np.log(shares))

    def best(rows):
        rows = np.concatenate([np.asarray(rows), np.ones((N, 1))], axis=1)
        start = np.zeros((D + 1) * K)
        found = scipy.optimize.minimize(
            softmax_loss, start, (rows, labels), jac=True, method="L-BFGS-B", options={"gtol": 1e-9}
        )
        constant = np.concatenate([np.zeros((D, K)), np.log(shares)[None, :]]).ravel()
        return found.fun, np.abs(softmax_loss(constant, rows, labels)[1]).max()

    before, slope_before = best(x)
    assert before < 0.8 * entropy
    assert slope_before > 1e-2
    after, slope = best(linalg.apply_eraser(fit(x, z, other), x))
    assert slope < 1e-12
    np.testing.assert_allclose(after, entropy, rtol=1e-8)

    # Least squares with an intercept, on the centred rows, at several ridges.
    rows = np.asarray(linalg.apply_eraser(fit(x, z, other), x))
    rows, targets = rows - rows.mean(axis=0), np.asarray(z) - shares
    for ridge in (0.0, 1e-6, 1.0):
        gram = rows.T @ rows / N + ridge * np.eye(D)
        weights = np.linalg.lstsq(gram, rows.T @ targets / N, rcond=1e-10)[0]
        error = np.mean((rows @ weights - targets) ** 2)
        np.testing.assert_allclose(error, np.mean(targets**2), rtol=1e-8)


def test_without_centring_a_probe_without_intercept_does_not_beat_zero():
    x, _ = labelled()
    y = x @ jnp.arange(1.0, D + 1) + 3
    found = fit(x, y[:, None], centred=False)
    assert found.rank == 1
    assert not np.any(found.bias)
    rows = np.asarray(x @ found.matrix)
    weights = np.linalg.lstsq(rows, np.asarray(y), rcond=1e-10)[0]
    left = np.mean((rows @ weights - np.asarray(y)) ** 2)
    np.testing.assert_allclose(left, np.mean(np.asarray(y) ** 2), rtol=1e-8)
    raw = np.asarray(x)
    fitted = raw @ np.linalg.lstsq(raw, np.asarray(y))[0]
    assert np.mean((fitted - np.asarray(y)) ** 2) < 0.01 * left


@hypothesis.given(seed=st.integers(0, 10_000), size=st.floats(1e-3, 10.0))
def test_every_other_feasible_map_is_farther(seed, size):
    x, z = labelled()
    other = labelled(5)[0]
    for metric in (None, other):
        found = fit(x, z, metric)
        rows = np.asarray(x if metric is None else metric)
        # Another A with A^T S = 0, and any b: add columns orthogonal to S.
        rng = np.random.default_rng(seed)
        s = scipy.linalg.orth(covariance(x, z), rcond=1e-10)
        change = size * rng.normal(size=(D, D))
        change = change - s @ (s.T @ change)
        mine, own_bias = (np.asarray(part) for part in whole(found))
        matrix, bias = mine + change, own_bias + rng.normal(size=D) * size
        rival = np.asarray(x) @ matrix
        assert np.abs(covariance(rival, z)).max() < 1e-10 * (1 + size)
        for weight in (np.eye(D), np.diag(rng.uniform(0.1, 10, D))):  # in every norm of the change
            best = rows @ mine + own_bias - rows
            worse = rows @ matrix + bias - rows
            assert np.sum((best @ weight) ** 2) < np.sum((worse @ weight) ** 2)


@hypothesis.given(seed=st.integers(0, 10_000))
def test_it_follows_any_change_of_coordinates(seed):
    x, z = labelled()
    other = labelled(5)[0]
    rng = np.random.default_rng(seed)
    turn = scipy.linalg.qr(rng.normal(size=(D, D)))[0] * np.geomspace(10, 0.1, D)
    turn = jnp.asarray(turn)
    for metric in (None, other):
        found = fit(x, z, metric)
        moved = fit(x @ turn, z, None if metric is None else metric @ turn)
        # r(x) G = r'(x G): G^{-1} A G in the new coordinates.
        np.testing.assert_allclose(
            moved.lift, jnp.linalg.solve(turn, found.lift @ turn), rtol=1e-6, atol=1e-6
        )
        np.testing.assert_allclose(whole(moved)[1], whole(found)[1] @ turn, rtol=1e-6, atol=1e-6)


@hypothesis.given(
    shift=st.floats(-5, 5),
    scale=st.floats(0.01, 100),
    unit=st.floats(1e-6, 1e6),
    seed=st.integers(0, 9),
)
def test_label_units_and_shifts_and_feature_units_do_not_matter(shift, scale, unit, seed):
    x, z = labelled(seed)
    found = fit(x, z)
    relabelled = fit(
        x, scale * (z @ jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0, 1]])) + shift
    )
    assert relabelled.rank == found.rank
    np.testing.assert_allclose(relabelled.matrix, found.matrix, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(relabelled.lift, found.lift, rtol=1e-5, atol=1e-6)
    units = jnp.ones(D).at[2].set(unit)
    other = fit(x * units[None, :], z)
    for one, two in ((other.matrix, found.matrix), (other.lift, found.lift)):
        expected = two * units[None, :] / units[:, None]
        np.testing.assert_allclose(one, expected, rtol=1e-6, atol=1e-9 * max(unit, 1 / unit))


@pytest.mark.slow
def test_where_the_metric_has_no_data_erasing_is_free():
    x, _ = labelled()
    other = labelled(5)[0].at[:, 0].set(0.0)  # the metric's task never uses feature 0
    y = x[:, :1]
    found = fit(x, y, other)
    moments = linalg.label_moments(other, other[:, :1])
    assert found.rank == 1
    assert linalg.erasure_cost(found, moments) < 1e-12
    assert np.abs(covariance(linalg.apply_eraser(found, x), y)).max() < 1e-10


@pytest.mark.slow
def test_damping_costs_optimality_but_not_erasure():
    x, z = labelled()
    moments = linalg.label_moments(x, z)
    costs = []
    for damping in (0.0, 1e-2, 1.0, 1e6):
        found = fit(x, z, damping=damping)
        after = linalg.apply_eraser(found, x)
        assert np.abs(covariance(after, z)).max() < 1e-10
        costs.append(float(linalg.erasure_cost(found, moments)))
    assert costs == sorted(costs)
    assert costs[-1] > costs[0] * 1.01
    # With all weight on the damping: the orthogonal projection in rms units.
    rms = np.sqrt(np.mean(np.asarray(x) ** 2, axis=0))
    basis = scipy.linalg.orth(covariance(x, z) / rms[:, None], rcond=1e-10)
    expected = np.eye(D) - (basis @ basis.T) / rms[:, None] * rms[None, :]
    np.testing.assert_allclose(found.lift, expected, atol=1e-5)


def test_cost_is_the_mean_square_of_the_change():
    x, z = labelled()
    found = fit(x, z)
    change = np.asarray(lifted(found, x) - x)
    expected = np.mean(np.sum(change**2, axis=1)) / np.var(np.asarray(x), axis=0).sum()
    np.testing.assert_allclose(
        linalg.erasure_cost(found, linalg.label_moments(x, z)), expected, rtol=1e-10
    )


def test_a_stream_gives_what_all_rows_at_once_give():
    x, z = labelled()
    state = hessians.gram_init(D, target_shape=(K,))
    for start, stop in ((0, 13), (13, 40), (40, N)):
        state = hessians.gram_update(state, x[start:stop], z[start:stop])
    streamed = eraser_of(hessians.gram_finalise(state))
    whole = fit(x, z)
    np.testing.assert_allclose(streamed.matrix, whole.matrix, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(streamed.bias, whole.bias, rtol=1e-9, atol=1e-9)
    # A single label [n] is the same as [n, 1].
    state = hessians.gram_update(hessians.gram_init(D, target_shape=()), x, z[:, 0])
    one = eraser_of(hessians.gram_finalise(state))
    np.testing.assert_allclose(one.matrix, fit(x, z[:, :1]).matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_labels_without_a_trace_leave_the_identity_and_an_erased_one_stays_erased():
    x, z = labelled()
    constant = fit(x, jnp.ones((N, 1)))
    assert constant.rank == 0
    np.testing.assert_array_equal(constant.matrix, np.eye(D))
    np.testing.assert_array_equal(constant.lift, np.eye(D))
    np.testing.assert_array_equal(constant.bias, np.zeros(D))
    np.testing.assert_array_equal(constant.lift_bias, np.zeros(D))
    assert fit(x, jnp.zeros((N, 2))).rank == 0
    again = fit(linalg.apply_eraser(fit(x, z), x), z)
    assert again.rank == 0


ROWS, FITTED, WIDTH = 400, 300, 12


def hidden_case(kind):
    """float64 rows and a label that half of their variance tells, in an awkward form."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, WIDTH))
    z = x[:, :1] + x[:, 1:2] + rng.normal(size=(ROWS, 1))
    turned = scipy.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] * np.geomspace(1, 1e-5, WIDTH)
    near = x.copy()
    near[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    hot = np.eye(5)[np.argmax(x[:, :5], axis=1)]
    return {
        "plain": (x, z),
        "half": (x, z),
        "far": (x + 1e3, z),
        "very far": (x + 1e6, z),
        "tiny label": (x, z * 1e-30),
        "large label": (x, z * 1e30),
        "far label": (x, z + 1e4),
        "tiny": (x * 1e-30, z),
        "large": (x * 1e30, z),
        "many units": (x * np.geomspace(1e12, 1e-12, WIDTH), z),
        "correlated": (x @ turned.T, z),
        "nearly double": (near, z),
        "double": (np.repeat(x[:, : WIDTH // 2], 2, axis=1), z),
        "one-hot and a constant": (np.c_[hot, np.ones(ROWS), x[:, 1:7]], z),
        "intercept's complement": (np.c_[x[:, :11], 1 - x[:, :11].sum(1)] + 100, z),
    }[kind]


def held_out_r2(x, z):
    """Of float64 least squares, with and without an intercept, on rows that were not fitted."""
    best = -np.inf
    for rows in (
        x,
        np.c_[x, np.ones(ROWS)],
        (x - x[:FITTED].mean(0)) / (x[:FITTED].std(0) + 1e-99),
    ):
        weights = np.linalg.lstsq(rows[:FITTED], z[:FITTED] - z[:FITTED].mean(0), rcond=1e-14)[0]
        error = rows[FITTED:] @ weights - (z[FITTED:] - z[:FITTED].mean(0))
        best = max(best, 1 - np.sum(error**2) / np.sum((z[FITTED:] - z[:FITTED].mean(0)) ** 2))
    return best


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "half",
        "far",
        "very far",
        "tiny label",
        "large label",
        "far label",
        "tiny",
        "large",
        "many units",
        "correlated",
        "nearly double",
        "double",
        "one-hot and a constant",
        "intercept's complement",
    ],
)
def test_float64_least_squares_finds_nothing_in_float32_rows(kind):
    x, z = hidden_case(kind)
    dtype = jnp.bfloat16 if kind == "half" else jnp.float32
    rows, labels = jnp.asarray(x, dtype), jnp.asarray(z, dtype)
    assert held_out_r2(np.asarray(rows, float), np.asarray(labels, float)) > 0.3
    found = fit(rows[:FITTED], labels[:FITTED])
    assert found.rank == 1
    erased = linalg.apply_eraser(found, rows)
    assert erased.dtype == jnp.float32
    assert not np.asarray(erased)[:, np.asarray(found.removed)].any()
    assert held_out_r2(np.asarray(erased, float), np.asarray(labels, float)) < 0.05
    if kind == "plain":  # why x A itself, which is the same in exact arithmetic, is not emitted
        single = np.asarray(linalg.apply_eraser(found._replace(matrix=found.lift), rows), float)
        assert held_out_r2(single, z) > 0.1  # of about .6; it hangs on rounding


def test_several_labels_leave_nothing_in_float32_rows_and_lifting_them_brings_nothing_back():
    x, _ = hidden_case("plain")
    rng = np.random.default_rng(1)
    z = x[:, :4] @ rng.normal(size=(4, 3)) + 0.3 * rng.normal(size=(ROWS, 3))
    rows, labels = jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32)
    found = fit(rows[:FITTED], labels[:FITTED])
    assert held_out_r2(np.asarray(linalg.apply_eraser(found, rows), float), z) < 0.05
    # y holds nothing, so no function of y that is linear up to rounding does.
    assert held_out_r2(np.asarray(lifted(found, rows), float), z) < 0.05


@pytest.mark.slow
def test_merged_moments_are_those_of_all_rows_wherever_zero_is():
    x, z = labelled()
    for shift, scale in ((0.0, 1.0), (1e3, 1.0), (0.0, 2.0**40), (1e3, 2.0**-40)):
        rows, labels = (jnp.asarray((part + shift) * scale, jnp.float32) for part in (x, z))
        merged = erasure.empty_moments(D, K, jnp.float32)
        for start, stop in ((0, 13), (13, 40), (40, N)):
            merged = linalg.merge_moments(
                merged, linalg.label_moments(rows[start:stop], labels[start:stop])
            )
        exact, exact_labels = np.asarray(rows, float), np.asarray(labels, float)
        assert merged.count == N
        units = 2.0 ** np.asarray(merged.exponents), 2.0 ** np.asarray(merged.label_exponents)
        expected = covariance(exact, exact_labels) / units[0][:, None] / units[1][None, :]
        size = exact.std(0)[:, None] * exact_labels.std(0)[None, :]
        size = size / units[0][:, None] / units[1][None, :]
        assert np.abs((np.asarray(merged.cross_covariance) - expected) / size).max() < 1e-5
        np.testing.assert_allclose(merged.feature_mean, exact.mean(0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", thinned([True, False]))
def test_inside_shard_map(check_vma):
    x, z = labelled(n=96)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def one(x, z):
        found = linalg.linear_eraser(linalg.label_moments(x, z))
        return linalg.apply_eraser(found, x)

    mapped = jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    )
    np.testing.assert_allclose(mapped(x, z)[:12], one(x[:12], z[:12]), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_as_many_labels_as_features_leave_nothing():
    x, _ = labelled(d=3)
    found = fit(x, jnp.concatenate([x, x[:, :1] + x[:, 1:2]], axis=1))
    assert found.rank == 3
    np.testing.assert_array_equal(linalg.apply_eraser(found, x), np.zeros((N, 3)))
    np.testing.assert_allclose(found.lift, 0, atol=1e-12)
    np.testing.assert_allclose(whole(found)[1], np.asarray(x).mean(axis=0), rtol=1e-10)


@pytest.mark.slow
def test_fewer_rows_than_features():
    x, z = labelled(n=12, d=20)
    found = fit(x, z)
    assert found.rank == K - 1
    assert np.abs(covariance(linalg.apply_eraser(found, x), z)).max() < 1e-11
    # Rows that no fitted row has a part in, in rms units, are left alone.
    square = np.mean(np.asarray(x) ** 2, axis=0)
    centred = np.asarray(x - x.mean(axis=0)[None, :])
    outside = scipy.linalg.null_space(centred, rcond=1e-10) * square[:, None]
    np.testing.assert_allclose(outside.T @ np.asarray(found.lift), outside.T, atol=1e-8)


def test_not_a_number_gives_not_a_number():
    x, z = labelled()
    found = fit(x.at[0, 0].set(jnp.nan), z)
    assert np.all(np.isnan(found.matrix))
    assert np.all(np.isnan(found.lift))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, z: linalg.label_moments(x, z[1:]), "rows"),
        (lambda x, z: linalg.label_moments(x, z.astype(jnp.float32)), "dtype"),
        (lambda x, z: fit(x, z, x[:, 1:]), "width"),
        (
            lambda x, z: linalg.linear_eraser(linalg.label_moments(x, z), damping=-1.0),
            "damping",
        ),
        (
            lambda x, z: linalg.linear_eraser(
                hessians.gram_finalise(hessians.gram_update(hessians.gram_init(D), x))
            ),
            "cross is None",
        ),
    ],
)
def test_senseless_input_is_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        call(*labelled())
