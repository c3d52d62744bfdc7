import helpers
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg
from helpers import thinned
from hypothesis import given
from hypothesis import strategies as st

from jaximm import linalg

pytestmark = pytest.mark.heavy

D = 7


def factors(seed, kappa_primary=1e2, kappa_harmful=1e3):
    """Damped-like factors of two tasks; neither shares its axes with the other."""
    key = jax.random.key(seed)
    primary = helpers.matrix_with_spectrum(
        np.geomspace(1.0, kappa_primary**-0.5, D), 11, D, jax.random.fold_in(key, 0)
    )
    harmful = 30 * helpers.matrix_with_spectrum(
        np.geomspace(1.0, kappa_harmful**-0.5, D), 9, D, jax.random.fold_in(key, 1)
    )
    return primary, harmful


def log_kappa(factor):
    sigma = np.linalg.svd(np.asarray(factor), compute_uv=False)
    return 2 * np.log(sigma[0] / sigma[-1])


@pytest.mark.parametrize("seed", helpers.thinned([0, 1]))
def test_pencil_matches_scipy_and_diagonalises_both(seed):
    primary, harmful = factors(seed)
    gram_p, gram_h = primary.T @ primary, harmful.T @ harmful
    expected = scipy.linalg.eigh(gram_h, gram_p, eigvals_only=True)
    for found in [
        linalg.pencil_from_factors(primary, harmful),
        linalg.pencil(gram_p, gram_h),
    ]:
        v = found.vectors
        np.testing.assert_allclose(found.values, expected, rtol=1e-10)
        np.testing.assert_allclose(v.T @ gram_p @ v, np.eye(D), atol=1e-11)
        np.testing.assert_allclose(np.asarray(v.T @ gram_h @ v) / expected, np.eye(D), atol=1e-8)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kappa", [1e3, 1e8])
def test_limit_backbone_attains_the_limit_at_every_t(t, kappa):
    primary, harmful = factors(3, kappa_primary=kappa, kappa_harmful=kappa)
    found = linalg.pencil_from_factors(primary, harmful)
    log_p, log_h = log_kappa(primary), log_kappa(harmful)
    theta = linalg.limit_backbone(found, log_kappa_primary=jnp.asarray(log_p), t=t)
    log_m = float(linalg.log_pencil_condition(found))
    after_p, after_h = log_kappa(primary @ theta), log_kappa(harmful @ theta)
    tolerance = 1e2 * np.finfo(float).eps * np.exp(log_m / 2 + log_p / 2)
    np.testing.assert_allclose(after_p, t * log_p, atol=tolerance)
    np.testing.assert_allclose(after_h, log_m + t * log_p, atol=tolerance)
    limit = linalg.rir_limit(
        found, log_kappa_primary=jnp.asarray(log_p), log_kappa_harmful=jnp.asarray(log_h)
    )
    np.testing.assert_allclose(limit, (after_h - log_h) - (after_p - log_p), atol=2 * tolerance)


@given(seed=st.integers(0, 10_000), skew=st.floats(0.0, 3.0))
def test_no_backbone_beats_the_limit(seed, skew):
    primary, harmful = factors(seed % 5)
    log_m = float(linalg.log_pencil_condition(linalg.pencil_from_factors(primary, harmful)))
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((D, D)) * np.exp(skew * rng.standard_normal(D))
    gain = log_kappa(harmful @ theta) - log_kappa(primary @ theta)
    back = log_kappa(primary @ theta) - log_kappa(harmful @ theta)
    assert gain <= log_m + 1e-9
    assert back <= log_m + 1e-9  # kappa(M^-1) = kappa(M)


def test_budget_is_spent_exactly_and_beaten_by_no_other_backbone():
    primary, harmful = factors(0)
    found = linalg.pencil_from_factors(primary, harmful)
    log_p = log_kappa(primary)
    budget = 0.4 * log_p
    t = linalg.t_for_budget(log_kappa_primary_budget=budget, log_kappa_primary=log_p)
    theta = linalg.limit_backbone(found, log_kappa_primary=jnp.asarray(log_p), t=t)
    np.testing.assert_allclose(log_kappa(primary @ theta), budget, rtol=1e-9)
    best = log_kappa(harmful @ theta)
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = np.asarray(theta) @ (np.eye(D) + 0.2 * rng.standard_normal((D, D)))
        assert log_kappa(harmful @ other) - log_kappa(primary @ other) <= best - budget + 1e-9
    for asked, given_back in [(-1.0, 0.0), (2 * log_p, 1.0)]:
        clipped = linalg.t_for_budget(log_kappa_primary_budget=asked, log_kappa_primary=log_p)
        assert float(clipped) == given_back
    assert float(linalg.t_for_budget(log_kappa_primary_budget=1.0, log_kappa_primary=0.0)) == 0.0


@pytest.mark.slow
def test_a_harmful_direction_without_primary_energy_has_no_limit():
    primary = jnp.diag(jnp.array([2.0, 1.0, 0.0]))
    harmful = jnp.diag(jnp.array([1.0, 3.0, 5.0]))
    for found in [
        linalg.pencil_from_factors(primary, harmful),
        linalg.pencil(primary**2, harmful**2),
    ]:
        np.testing.assert_allclose(found.values, [0.25, 9.0, np.inf], rtol=1e-12)
        assert np.isinf(linalg.log_pencil_condition(found))
        v = np.asarray(found.vectors)
        np.testing.assert_allclose(np.diag(v.T @ np.diag([1.0, 9.0, 25.0]) @ v)[2], 1, rtol=1e-12)
    # Fewer primary rows than columns, without an exact zero anywhere.
    wide = jax.random.normal(jax.random.key(0), (2, 4))
    tall = jax.random.normal(jax.random.key(1), (9, 4))
    found = linalg.pencil_from_factors(wide, tall)
    assert np.isinf(found.values[2:]).all()
    assert np.isfinite(found.values[:2]).all()


def test_shared_inputs_leave_nothing_to_gain():
    primary, _ = factors(0)
    found = linalg.pencil_from_factors(primary, 3 * primary)
    np.testing.assert_allclose(found.values, 9.0, rtol=1e-10)
    limit = linalg.rir_limit(
        found, log_kappa_primary=jnp.asarray(2.0), log_kappa_harmful=jnp.asarray(2.0)
    )
    np.testing.assert_allclose(limit, 0.0, atol=1e-10)


def test_factors_keep_the_digits_that_gram_matrices_lose():
    x_p = helpers.matrix_with_spectrum(np.geomspace(1.0, 1e-6, 4), 9, 4, jax.random.key(0))
    x_h = helpers.matrix_with_spectrum(np.geomspace(1.0, 1e-1, 4), 8, 4, jax.random.key(1))
    # The same pencil, in coordinates where the primary factor is orthonormal.
    u, s, vt = np.linalg.svd(np.asarray(x_p), full_matrices=False)
    sigma = np.linalg.svd(np.asarray(x_h) @ vt.T / s, compute_uv=False)
    found = linalg.pencil_from_factors(x_p, x_h)
    del u
    np.testing.assert_allclose(found.values[-1], sigma[0] ** 2, rtol=1e-7)


@pytest.mark.slow
def test_float32_jit_and_vmap():
    pairs = [factors(seed, 1e1, 1e1) for seed in range(2)]
    primary = jnp.stack([p for p, _ in pairs]).astype(jnp.float32)
    harmful = jnp.stack([h for _, h in pairs]).astype(jnp.float32)
    batched = jax.jit(jax.vmap(linalg.pencil_from_factors))(primary, harmful)
    assert batched.values.dtype == batched.vectors.dtype == jnp.float32
    for i, (p, h) in enumerate(pairs):
        exact = linalg.pencil_from_factors(p, h)
        np.testing.assert_allclose(batched.values[i], exact.values, rtol=1e-4)


def graded(rng, n, least):
    """[n, 6] with singular values from 1 to `least`, on axes of its own."""
    left = np.linalg.qr(rng.standard_normal((n, 6)))[0]
    return (left * np.geomspace(1, least, 6)) @ np.linalg.qr(rng.standard_normal((6, 6)))[0]


def exact_log_condition(primary, harmful):
    """log kappa(M) of the given numbers, in 50 digits."""
    with mpmath.workdps(50):
        k_p, k_h = (
            (lambda a: a.T * a)(mpmath.matrix(np.asarray(part, float).tolist()))
            for part in (primary, harmful)
        )
        inverse = mpmath.inverse(mpmath.cholesky(k_p))
        values = mpmath.eigsy(inverse * k_h * inverse.T, eigvals_only=True)
        return float(mpmath.log(max(values) / min(values)))


of_factors = jax.jit(linalg.pencil_from_factors)


@pytest.mark.parametrize(
    ("dtype", "least", "above"),
    [(np.float64, 1e-9, 1e-4), (np.float64, 1e-6, 1e-7), (np.float32, 1e-4, 0.3)],
)
@pytest.mark.parametrize("trials", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_the_limit_is_never_understated(dtype, least, above, trials):
    rng = np.random.default_rng(trials)
    for trial in range(trials):
        ends = ((least, least), (1.0, least), (least, 1.0))[trial % 3]
        primary, harmful = (graded(rng, 9, end).astype(dtype) for end in ends)
        truth = exact_log_condition(primary, harmful)
        found = of_factors(jnp.asarray(primary), jnp.asarray(harmful))
        assert truth <= linalg.log_pencil_condition(found) <= truth + above
        point = np.log(found.values[-1]) - np.log(found.values[0])
        assert abs(point - truth) < above / 10


def test_several_sines_below_the_root_of_eps():
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0]
    found = of_factors(jnp.eye(6), jnp.asarray(np.geomspace(1, 1e-9, 6)[:, None] * turn))
    np.testing.assert_allclose(linalg.log_pencil_condition(found), 2 * np.log(1e9), atol=1e-5)
    np.testing.assert_allclose(found.values, np.geomspace(1e-18, 1, 6), rtol=1e-5)


@pytest.mark.parametrize("dtype", thinned([np.float64, np.float32]))
@pytest.mark.parametrize("kind", ["through five", "one-hot and an intercept", "few rows"])
def test_directions_of_neither_task_are_left_out(dtype, kind):
    rng = np.random.default_rng(0)
    if kind == "through five":
        common = rng.standard_normal((5, 6))
        primary, harmful = (rng.standard_normal((30, 5)) @ common for _ in range(2))
    elif kind == "few rows":
        primary, harmful = rng.standard_normal((2, 6)), rng.standard_normal((3, 6))
    else:
        primary, harmful = (
            np.c_[np.eye(3)[rng.integers(0, 3, 30)], np.ones(30), rng.standard_normal((30, 2))]
            for _ in range(2)
        )
    found = of_factors(jnp.asarray(primary, dtype), jnp.asarray(harmful, dtype))
    assert found.rank == 5
    assert np.isnan(found.values[5])
    assert not np.asarray(found.vectors)[:, 5].any()
    theta = linalg.limit_backbone(found, log_kappa_primary=jnp.asarray(1.0, dtype), t=0.5)
    assert np.isfinite(theta).all()
    assert np.linalg.matrix_rank(theta) == 5
    if kind == "few rows":  # of five directions three have harmful energy only, two primary only
        assert np.isinf(linalg.log_pencil_condition(found))
        return
    axes = np.linalg.svd(np.concatenate([primary, harmful]))[2][:5].T
    expected = exact_log_condition(primary @ axes, harmful @ axes)
    tolerance = 1e-12 if dtype == np.float64 else 1e-4
    np.testing.assert_allclose(linalg.log_pencil_condition(found), expected, atol=tolerance)
    grams = (jnp.asarray((part.T @ part).astype(dtype)) for part in (primary, harmful))
    singular = linalg.pencil(*grams)
    assert singular.rank == 0
    assert np.isnan(linalg.log_pencil_condition(singular))


@pytest.mark.parametrize("power", helpers.thinned([-100, 100, -40, 40], keep=2))
def test_powers_of_two_change_only_the_units(power):
    rng = np.random.default_rng(1)
    primary, harmful = (jnp.asarray(rng.standard_normal((9, 6)), jnp.float32) for _ in range(2))
    factor = jnp.float32(2.0) ** power
    expected, found = of_factors(primary, harmful), of_factors(primary * factor, harmful * factor)
    assert linalg.log_pencil_condition(found) == linalg.log_pencil_condition(expected)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.vectors, expected.vectors / factor)
    # Each task in a unit of its own: the values overflow, their ratio does not.
    apart = of_factors(primary / factor, harmful * factor)
    assert linalg.log_pencil_condition(apart) == linalg.log_pencil_condition(expected)
    np.testing.assert_array_equal(apart.vectors, expected.vectors * factor)
    gram = primary.T @ primary, harmful.T @ harmful
    scaled = linalg.pencil(*(part * factor for part in gram))
    assert scaled.log_condition == linalg.pencil(*gram).log_condition


@pytest.mark.slow
@pytest.mark.parametrize("dtype", helpers.thinned([jnp.bfloat16, jnp.float16]))
def test_half_precision_is_computed_in_float32(dtype):
    primary, harmful = (part.astype(dtype) for part in factors(0))
    found = linalg.pencil_from_factors(primary, harmful)
    assert found.values.dtype == jnp.float32
    wide = linalg.pencil_from_factors(*(part.astype(jnp.float64) for part in (primary, harmful)))
    np.testing.assert_allclose(found.values, wide.values, rtol=1e-4)
    turn = linalg.constant_diagonal_rotation(jnp.diag(jnp.arange(1.0, 5.0)).astype(dtype))
    assert turn.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", helpers.thinned([True, False]))
def test_inside_shard_map(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    primary, harmful = (jnp.tile(part, (8, 1)) for part in factors(0))

    def one(primary, harmful):
        found = linalg.pencil_from_factors(primary, harmful)
        gram = primary.T @ primary
        turn = linalg.constant_diagonal_rotation(gram)
        diagonal = jnp.diagonal(turn.T @ gram @ turn)
        return jnp.concatenate([found.values, linalg.pencil(gram, 2 * gram).values, diagonal])

    mapped = jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    )
    expected = one(*factors(0))
    np.testing.assert_allclose(mapped(primary, harmful), np.tile(expected, 8), rtol=1e-9)


@pytest.mark.slow
def test_gradient_of_the_limit():
    primary, harmful = factors(0)

    def limit(primary):
        return linalg.log_pencil_condition(linalg.pencil_from_factors(primary, harmful))

    step = jax.random.normal(jax.random.key(1), primary.shape)
    slope = jnp.sum(jax.grad(limit)(primary) * step)
    change = (limit(primary + 1e-6 * step) - limit(primary - 1e-6 * step)) / 2e-6
    np.testing.assert_allclose(slope, change, rtol=1e-6)


def test_damped_factor_is_the_factor_of_the_damped_gram_matrix():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    factor = linalg.damped_factor(x, damping=jnp.asarray(0.3))
    assert factor.shape == (8, 3)
    np.testing.assert_allclose(factor.T @ factor, x.T @ x / 5 + 0.3 * np.eye(3), rtol=1e-12)


@pytest.mark.parametrize("kind", ["diagonal", "full", "constant", "negative", "single", "tiny"])
def test_constant_diagonal_rotation(kind):
    matrix = {
        "diagonal": jnp.diag(jnp.geomspace(1.0, 1e6, 12)),
        "full": helpers.psd_with_spectrum(np.geomspace(1.0, 1e3, 9), jax.random.key(0)),
        "constant": 3 * jnp.eye(5),
        "negative": jnp.diag(jnp.array([-1.0, 4.0, -7.0, 0.0])),
        "single": jnp.array([[2.0]]),
        "tiny": jnp.diag(jnp.array([1.0, 1.0, 1.0, 1.0 + 1e-15])),
    }[kind]
    d = matrix.shape[0]
    q = np.asarray(linalg.constant_diagonal_rotation(matrix))
    np.testing.assert_allclose(q.T @ q, np.eye(d), atol=1e-13)
    turned = q.T @ np.asarray(matrix) @ q
    size = np.max(np.abs(matrix))
    np.testing.assert_allclose(np.diag(turned), np.trace(matrix) / d, atol=1e-13 * size)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(turned), np.linalg.eigvalsh(matrix), atol=1e-13 * size * d
    )


@given(st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6))
def test_constant_diagonal_rotation_of_any_spectrum(values):
    q = np.asarray(jax.jit(linalg.constant_diagonal_rotation)(jnp.diag(jnp.asarray(values))))
    np.testing.assert_allclose(
        np.diag(q.T @ np.diag(values) @ q),
        np.mean(values),
        atol=1e-12 * (1 + np.max(np.abs(values))),
    )


def test_bad_input_is_refused_at_the_door():
    found = linalg.pencil(jnp.eye(2), jnp.eye(2))
    for call, message in [
        (lambda: linalg.pencil(jnp.eye(2), jnp.eye(3)), "one shape"),
        (lambda: linalg.pencil(jnp.ones((2, 3)), jnp.eye(3)), "square"),
        (lambda: linalg.pencil_from_factors(jnp.ones((2, 3)), jnp.ones((2, 4))), "same width"),
        (lambda: linalg.damped_factor(jnp.ones((2, 3)), damping=-1.0), ">= 0"),
        (
            lambda: linalg.limit_backbone(found, log_kappa_primary=jnp.asarray(1.0), t=1.5),
            r"\[0, 1\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_feature_is_lost_beside_a_larger_one(dtype):
    # Of one size relative to each other in every column: M, so the limit, is that of size one.
    far = 70 if dtype == np.float32 else 600
    rng = np.random.default_rng(4)
    primary, harmful = (rng.standard_normal((6, 6)).astype(dtype) for _ in range(2))
    scale = 2.0 ** np.array([far, 0, -far, 3, -far, far])
    for of, square in ((linalg.pencil_from_factors, False), (linalg.pencil, True)):
        if square:
            primary, harmful = primary.T @ primary, harmful.T @ harmful
            scale = 2.0 ** (np.sign(np.log2(scale)) * (far // 3))
        units = np.outer(scale, scale) if square else scale
        plain = of(primary, harmful)
        graded = of((primary * units).astype(dtype), (harmful * units).astype(dtype))
        assert int(graded.rank) == 6
        np.testing.assert_allclose(graded.log_condition, plain.log_condition, rtol=1e-4)
        np.testing.assert_allclose(
            np.asarray(graded.vectors) * scale[:, None], plain.vectors, rtol=1e-2, atol=1e-2
        )


def test_the_limit_is_not_understated_where_rows_and_columns_are_graded():
    # float32; M's condition in 250 digits is 67.746: read as 56.6 with too small an allowance.
    primary = np.array(
        [
            [-6.59430156e04, -1.27896240e08, -1.00763321e00, 1.81545639e01],
            [-4.27064337e-02, -1.87481247e02, -7.61648323e-07, 1.69311238e-06],
            [3.07101980e-02, -3.78885437e02, 8.36428853e-07, 1.48482959e-05],
            [-1.12125903e-01, 1.45834824e02, 1.45605441e-06, 1.13535657e-06],
            [-1.25968065e-02, -6.04377258e02, 2.27795522e-06, -2.51770211e-06],
            [-1.32367862e-02, 3.12796600e02, -4.47472621e-06, -5.63144283e-07],
        ],
        np.float32,
    )
    harmful = np.array(
        [
            [3.5193214e-08, 4.6821922e04, 4.4979256e-09, 1.9866193e-03],
            [1.6615274e-08, 6.6450523e04, 5.7233502e-09, -1.4498511e-03],
            [-4.5969180e-08, 1.3635178e05, -2.0413868e-09, -6.6591347e-05],
            [-7.8587135e-08, -2.2561848e04, -9.7925010e-09, -5.9567916e-04],
            [3.2943408e-08, -5.4524887e04, -4.5863637e-09, 1.3058260e-03],
            [2.7990579e-08, 3.3770672e04, 7.4041595e-09, -5.3897087e-04],
        ],
        np.float32,
    )
    assert float(linalg.pencil_from_factors(primary, harmful).log_condition) >= 67.74598
