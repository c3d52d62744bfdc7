import fractions

import helpers
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from jaximm import linalg

pytestmark = pytest.mark.heavy

NONE, DAMPING, ROUNDING = range(3)
KAPPA = jax.jit(linalg.condition_number)
FEATURE_KAPPA = jax.jit(linalg.feature_condition_number)
BITS = {"float32": 20, "float64": 40}  # kappa up to 2**20 = 1e6 and 2**40 = 1e12


def planted(exponents, n, d, dtype):
    """A matrix with singular values proportional to 2**-exponents (None for 0), without any error.

    Hadamard bases have entries +-1, so every entry is a sum of signed powers of two that fits the
    significand: kappa is known exactly, for the matrix as stored.
    """
    values = np.array([0.0 if e is None else 2.0**-e for e in exponents])
    left, right = scipy.linalg.hadamard(n), scipy.linalg.hadamard(d)
    exact = (left[:, : len(values)] * values) @ right[: len(values)]
    rounded = exact.astype(dtype)
    assert np.array_equal(rounded.astype(np.float64), exact)
    return rounded


def spectra(k, bits):
    """Exponent lists of length k with the log2 of their kappa."""
    yield [0] * k, 0
    for top in [3, 7, bits // 2, bits]:
        yield [round(i * top / max(k - 1, 1)) for i in range(k)], top if k > 1 else 0
        yield [0] * (k // 2) + [top] * (k - k // 2), top if k > 1 else 0
        yield [0] * (k - 1) + [top], top if k > 1 else 0
        for zeros in [1, k // 2]:
            if 0 < zeros < k:
                kept = k - zeros
                exps = [round(i * top / max(kept - 1, 1)) for i in range(kept)] + [None] * zeros
                yield exps, top if kept > 1 else 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("n", "d"), helpers.thinned_rows([(8, 16), (16, 8), (1, 8), (8, 1), (8, 8)], keep=2)
)
@pytest.mark.parametrize("power", helpers.thinned([1, 2]))
def test_planted_spectra_are_bracketed_and_deficiency_is_flagged(n, d, dtype, power):
    k = min(n, d)
    cases = list(spectra(k, BITS[dtype]))
    stack = jnp.asarray(np.stack([planted(e, n, d, dtype) for e, _ in cases]))
    fun = linalg.condition_number if power == 1 else linalg.feature_condition_number
    found = jax.jit(jax.vmap(fun))(stack)
    assert found.log_kappa.dtype == dtype
    radius = linalg.rounding_radius((n, d), jnp.dtype(dtype))
    for i, (exponents, log2_kappa) in enumerate(cases):
        truth = power * log2_kappa * np.log(2.0)
        lower, upper = float(found.lower[i]), float(found.upper[i])
        assert lower <= truth <= upper, (exponents, lower, truth, upper)
        zeros = sum(e is None for e in exponents)
        if zeros:
            assert int(found.rank[i]) < k
        error = 2.0**log2_kappa * radius
        if error < 0.3:  # well inside the dtype: a number, not a shrug
            assert upper - lower <= power * 4 * (error + radius) + 1e-5 * (dtype == "float32")
            assert int(found.dominated_by[i]) == NONE
            assert int(found.rank[i]) == k - zeros
            assert abs(float(found.log_kappa[i]) - truth) <= upper - lower + 1e-12
        if np.isinf(upper):
            assert int(found.dominated_by[i]) == ROUNDING


@pytest.mark.parametrize("seed", helpers.thinned([0, 1]))
@pytest.mark.parametrize(("n", "d"), helpers.thinned_rows([(60, 25), (25, 60), (40, 40)]))
def test_random_bases_in_float32_bracket_the_float64_truth_of_the_stored_matrix(n, d, seed):
    key, k = jax.random.key(seed), min(n, d)
    stored, truths, ranks = [], [], []
    for exponent in [1, 3, 4, 5, 6, 9]:
        for zeros in [0, 4]:
            values = np.geomspace(1.0, 10.0**-exponent, k - zeros)
            x = helpers.matrix_with_spectrum(values, n, d, key).astype(jnp.float32)
            stored.append(x)
            sigma = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
            truths.append(np.log(sigma[0] / sigma[np.array([-1, k - zeros - 1])]))
            ranks.append(k - zeros)
    truths, ranks = np.array(truths), np.array(ranks)
    every, planted_part = truths.T

    @jax.jit
    def run(stack):
        stated = jax.vmap(lambda x: linalg.condition_number(x, rtol=3e-6))(stack)
        return jax.vmap(linalg.condition_number)(stack), stated

    found, stated = run(jnp.stack(stored))
    # Rounded to float32, planted zeros are small values, which count: no number can be given.
    assert np.all(np.asarray(found.lower) <= every)
    assert np.all(every <= np.asarray(found.upper))
    assert np.all(np.isinf(found.upper)[ranks < k])
    assert np.all(np.asarray(found.rank) <= ranks)
    # A tolerance says that they do not.
    exact = planted_part < np.log(1e4)
    assert np.all(np.asarray(stated.lower)[exact] <= planted_part[exact])
    assert np.all(planted_part[exact] <= np.asarray(stated.upper)[exact])
    assert np.all(np.asarray(stated.upper - stated.lower)[exact] < 0.6)
    assert np.all(np.asarray(stated.rank)[exact] == ranks[exact])


def test_beyond_the_dtype_is_unbounded_or_flagged():
    found = linalg.condition_number(jnp.diag(jnp.geomspace(1.0, 1e-10, 20, dtype=jnp.float32)))
    assert np.isinf(found.upper)
    assert int(found.dominated_by) == ROUNDING
    assert int(found.rank) < 20
    assert float(found.lower) <= np.log(1e10)


def test_zero_matrix_single_value_and_nan():
    zero = linalg.condition_number(jnp.zeros((4, 3)))
    assert (float(zero.lower), float(zero.upper), int(zero.rank)) == (0.0, np.inf, 0)
    assert int(zero.dominated_by) == ROUNDING
    assert np.isinf(zero.log_kappa)
    one = linalg.feature_condition_number(jnp.array([[3.0, 4.0]]))
    assert (float(one.log_kappa), float(one.lower), float(one.rank)) == (0.0, 0.0, 1)
    assert float(one.upper) < 1e-14
    damped = linalg.condition_number(jnp.zeros((3, 3)), damping=0.5)
    np.testing.assert_allclose([damped.log_kappa, damped.lower, damped.upper], 0, atol=1e-14)
    assert (int(damped.dominated_by), int(damped.rank)) == (DAMPING, 0)
    bad = linalg.condition_number(jnp.eye(3).at[0, 0].set(jnp.nan))
    assert np.isnan([bad.log_kappa, bad.lower, bad.upper]).all()


@pytest.mark.parametrize("damping", [1e-12, 1e-6, 1e-2, 10.0])
def test_damping_of_a_matrix_matches_exact_arithmetic(damping):
    spectrum = [1.0, 0.5, 2.0**-10, 0.0]
    s = jnp.asarray(planted([0, 1, 10, None], 4, 4, "float64"))
    # Hadamard left times Hadamard right: symmetric, with eigenvalues 4 * spectrum.
    found = linalg.condition_number(s, damping=jnp.asarray(damping))
    lam = fractions.Fraction(damping)
    truth = np.log(float((4 + lam) / lam))
    assert spectrum[0] == 1.0
    assert float(found.lower) <= truth <= float(found.upper)
    np.testing.assert_allclose(found.log_kappa, truth, atol=1e-2)
    assert int(found.rank) == 3
    assert int(found.dominated_by) == DAMPING


def test_damping_does_not_dominate_what_it_does_not_decide():
    s = jnp.diag(jnp.array([1.0, 0.1]))
    found = linalg.condition_number(s, damping=1e-3)
    np.testing.assert_allclose(found.log_kappa, np.log(1.001 / 0.101), rtol=1e-12)
    assert int(found.dominated_by) == NONE
    hidden = linalg.condition_number(jnp.diag(jnp.array([1.0, 0.0])), damping=1e-18)
    assert np.isinf(hidden.upper)
    assert int(hidden.dominated_by) == ROUNDING


@pytest.mark.parametrize(("n", "d"), [(30, 6), (6, 9)])
@pytest.mark.parametrize("damping", helpers.thinned([1e-10, 1e-3, 5.0]))
def test_damping_of_features_matches_the_augmented_factor(n, d, damping):
    x = helpers.matrix_with_spectrum(np.geomspace(4.0, 1e-3, min(n, d)), n, d, jax.random.key(0))
    found = linalg.feature_condition_number(x, damping=damping)
    sigma = np.linalg.svd(
        np.vstack([x / np.sqrt(n), np.sqrt(damping) * np.eye(d)]), compute_uv=False
    )
    truth = 2 * np.log(sigma[0] / sigma[-1])
    np.testing.assert_allclose(found.log_kappa, truth, rtol=1e-9)
    assert float(found.lower) <= truth + 1e-9
    assert truth - 1e-9 <= float(found.upper)
    smallest = 0.0 if n < d else 1e-6 / n
    assert int(found.dominated_by) == (DAMPING if smallest <= damping else NONE)
    if n < d:
        np.testing.assert_allclose(found.log_kappa, np.log((16 / n + damping) / damping), rtol=1e-9)


def test_stated_tolerance_defines_kappa():
    x = jnp.diag(jnp.array([1.0, 1e-2, 1e-5]))
    found = linalg.condition_number(x, rtol=1e-3)
    np.testing.assert_allclose([found.lower, found.upper], np.log(1e2), rtol=1e-12)
    assert (int(found.rank), int(found.dominated_by)) == (2, NONE)
    at_the_edge = linalg.condition_number(x, rtol=1e-5)
    assert np.isinf(at_the_edge.upper)


def test_gradient_of_log_kappa():
    x = helpers.matrix_with_spectrum(np.array([3.0, 2.0, 0.5]), 5, 3, jax.random.key(0))
    extremes = linalg.svd_extremes(x)
    slope = jax.jit(jax.grad(lambda x: linalg.condition_number(x).log_kappa))(x)
    expected = (
        np.outer(extremes.largest_left, extremes.largest_right) / 3.0
        - np.outer(extremes.smallest_left, extremes.smallest_right) / 0.5
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-9, atol=1e-12)
    twice = jax.jit(jax.grad(lambda x: linalg.feature_condition_number(x).log_kappa))(x)
    np.testing.assert_allclose(twice, 2 * expected, rtol=1e-9, atol=1e-12)
    specials = jnp.stack([jnp.eye(4), jnp.zeros((4, 4)), jnp.diag(jnp.array([1.0, 0, 0, 0]))])
    for fun in [linalg.condition_number, linalg.feature_condition_number]:
        for damping in [0.0, 0.1]:

            def log_kappa(m, fun=fun, damping=damping):
                return fun(m, damping=damping).log_kappa

            assert np.all(np.isfinite(jax.jit(jax.vmap(jax.grad(log_kappa)))(specials)))


@given(seed=st.integers(0, 1000), scale=st.floats(1e-100, 1e100))
def test_kappa_ignores_scale_and_rotation(seed, scale):
    key = jax.random.key(seed)
    x = jax.random.normal(key, (7, 4))
    left, right = helpers.orthogonal(7, key), helpers.orthogonal(4, jax.random.fold_in(key, 1))
    plain, turned = FEATURE_KAPPA(x), FEATURE_KAPPA(scale * left @ x @ right)
    # Both bracket the same truth, up to the rotation's own rounding.
    np.testing.assert_allclose(turned.log_kappa, plain.log_kappa, atol=1e-9)
    assert float(plain.lower) <= float(turned.log_kappa) + 1e-10
    assert float(turned.log_kappa) - 1e-10 <= float(plain.upper)


def operator(spectrum, key=0, **options):
    def run(values, key):
        if options.pop("inverse", False):
            options["inverse_matvec"] = lambda v: v / values
        return linalg.operator_condition_number(
            lambda v: values * v, values.shape[0], key, **options
        )

    return jax.jit(run)(jnp.asarray(spectrum), jax.random.key(key))


@pytest.mark.slow
def test_lanczos_reads_a_lower_bound_and_never_two_sides():
    truth = np.log(1e6)
    spectrum = np.geomspace(1e-6, 1, 784)
    plain = operator(spectrum, steps=100)
    promised = operator(spectrum, steps=100, positive_definite=True)
    for found in [plain, promised]:
        assert 0 < float(found.lower) < truth
        assert np.isinf(found.upper)
        assert int(found.rank) <= 100
    assert float(promised.lower) >= float(plain.lower)
    assert np.exp(float(promised.log_kappa)) < 2e5  # the reading, several times too small


def test_singular_operators_do_not_fake_a_lower_bound():
    # Between 0 and the smallest true eigenvalue there are Ritz values that belong to neither.
    spectrum = np.r_[0.0, np.linspace(0.5, 1.0, 119)]
    keys = jax.random.split(jax.random.key(0), 20)
    values = jnp.asarray(spectrum)

    def run(key):
        return linalg.operator_condition_number(lambda v: values * v, 120, key, steps=5)

    found = jax.jit(jax.vmap(run))(keys)
    assert np.all(np.asarray(found.lower) <= np.log(2.0) + 1e-12)
    assert np.all(np.isinf(found.upper))
    assert np.any(np.asarray(found.log_kappa) > np.log(2.0))  # the reading alone would lie


@pytest.mark.slow
def test_operator_bounds_where_something_supplies_them():
    spectrum = np.geomspace(1e-6, 1, 300)
    truth = np.log(1e6)
    inverse = operator(spectrum, steps=80, inverse=True)
    assert float(inverse.lower) <= truth <= float(inverse.upper)
    assert float(inverse.upper - inverse.lower) < 0.2

    @jax.jit
    def run(values, lam):
        return linalg.operator_condition_number(
            lambda v: values * v, 300, jax.random.key(0), steps=80, damping=lam
        )

    damped_truth = np.log((1 + 1e-3) / (1e-6 + 1e-3))
    damped = run(jnp.asarray(spectrum), 1e-3)
    assert float(damped.lower) <= damped_truth <= float(damped.upper)
    assert float(damped.upper - damped.lower) < 0.3
    assert int(damped.dominated_by) == DAMPING
    mild = run(jnp.linspace(0.5, 1, 300), 0.0)
    assert int(mild.dominated_by) == NONE
    assert float(mild.lower) <= np.log(2.0) <= float(mild.upper)
    assert float(mild.upper) < np.log(4.0)


@pytest.mark.slow
def test_operator_that_is_spanned_agrees_with_the_dense_bounds():
    s = helpers.psd_with_spectrum(np.r_[np.geomspace(1e-5, 1, 20), 0.0, 0.0], jax.random.key(1))

    @jax.jit
    def run(s, lam):
        return linalg.operator_condition_number(
            lambda v: s @ v, 22, jax.random.key(0), steps=50, damping=lam, rtol=1e-10
        )

    spanned, damped = run(s, 0.0), run(s, 0.01)
    dense = linalg.condition_number(s, rtol=1e-10)
    assert int(spanned.rank) == int(dense.rank) == 20
    for found in [spanned, dense]:
        assert float(found.lower) <= np.log(1e5) <= float(found.upper)
        assert float(found.upper - found.lower) < 1e-6
    np.testing.assert_allclose(damped.log_kappa, np.log(1.01 / 0.01), rtol=1e-9)
    zero = run(jnp.zeros((22, 22)), 0.0)
    assert (float(zero.lower), float(zero.upper), int(zero.rank)) == (0.0, np.inf, 0)


@pytest.mark.slow
def test_random_start_bound_holds_over_many_keys():
    values = jnp.r_[jnp.linspace(0.0, 0.9, 199), jnp.ones(1)] + 1e-3

    def reading(key):
        return linalg.operator_condition_number(
            lambda v: values * v,
            200,
            key,
            steps=12,
            damping=1e-3,
            failure_probability=0.5,
        )

    found = jax.jit(jax.vmap(reading))(jax.random.split(jax.random.key(0), 200))
    truth = np.log(1.002 / 0.002)
    assert np.all(np.asarray(found.lower) <= truth)
    assert np.mean(np.asarray(found.upper) >= truth) >= 0.5


def test_ratios_carry_their_intervals():
    def condition(value, slack):
        return linalg.Condition(
            *(jnp.asarray(v) for v in (value, value - slack, value + slack)),
            jnp.asarray(3),
            jnp.asarray(0.0),
            jnp.asarray(0),
        )

    found = linalg.relative_immunisation(
        harmful_after=condition(9.0, 0.1),
        harmful_before=condition(5.0, 0.2),
        primary_after=condition(3.0, 0.3),
        primary_before=condition(4.0, 0.4),
    )
    for ratio, value, slack in [
        (found.harmful, 4.0, 0.3),
        (found.primary, -1.0, 0.7),
        (found.rir, 5.0, 1.0),
    ]:
        np.testing.assert_allclose(ratio, [value, value - slack, value + slack], rtol=1e-12)
    unbounded = linalg.log_ratio(after=condition(9.0, np.inf), before=condition(5.0, 0.2))
    assert (float(unbounded.lower), float(unbounded.upper)) == (-np.inf, np.inf)


def exact_log_kappa(x):
    """log kappa of the stored numbers, zeros left out, from 60 digits; and the rank."""
    with mpmath.workdps(60):
        values = mpmath.svd_r(mpmath.matrix(np.asarray(x, np.float64).tolist()), compute_uv=False)
        kept = sorted(v for v in values if v > max(values) * mpmath.mpf(10) ** -50)
        return float(mpmath.log(kept[-1] / kept[0])), len(kept)


SPECTRA = ["graded", "clustered", "integers of deficient rank", "diagonal", "copied column"]


def drawn(kind, shape, rng, smallest):
    """One matrix of a kind, with condition numbers up to 10**smallest and beyond."""
    n, d = shape
    k = min(n, d)
    left = np.linalg.qr(rng.standard_normal((n, n)))[0][:, :k]
    right = np.linalg.qr(rng.standard_normal((d, d)))[0][:k]
    if kind == "graded":
        return (left * np.geomspace(1, 10.0 ** -rng.uniform(0, smallest), k)) @ right
    if kind == "clustered":
        return (left * rng.choice([1, 1 + 1e-7, 1e-5, 1e-12], k)) @ right
    if kind == "integers of deficient rank":
        rank = rng.integers(1, k + 1)
        return 1.0 * rng.integers(-3, 4, (n, rank)) @ rng.integers(-3, 4, (rank, d)) + 0.0
    if kind == "diagonal":
        x = np.eye(n, d)
        return x * (10.0 ** -rng.uniform(0, smallest, d) * rng.choice([0, 1, 1, 1], d))[None, :]
    x = rng.standard_normal((n, d))
    x[:, 0] = x[:, 1] * rng.choice([1, 2, 0.1, 1 + 1e-9])
    return x * 10.0 ** -rng.integers(0, 9, (n, 1))


def check_brackets(x, found, power=1):
    truth, rank = exact_log_kappa(x)
    lower, upper = float(found.lower), float(found.upper)
    assert lower <= power * truth <= upper, (lower, power * truth, upper)
    assert (int(found.dominated_by) == ROUNDING) == np.isinf(upper)
    if np.isfinite(upper):
        assert int(found.rank) == rank
        assert lower - 1e-12 <= float(found.log_kappa) <= upper + 1e-12


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(SPECTRA), exponent=st.integers(-60, 60))
def test_the_truth_of_the_stored_numbers_is_bracketed(dtype, seed, kind, exponent):
    smallest = 10 if dtype == "float32" else 22
    x = drawn(kind, (7, 4), np.random.default_rng(seed), smallest) * 2.0**exponent
    if x.any():
        check_brackets(x.astype(dtype), FEATURE_KAPPA(jnp.asarray(x.astype(dtype))), power=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(4, 7), (5, 5), (12, 8)])
def test_the_truth_of_many_stored_matrices_is_bracketed(dtype, shape):
    rng = np.random.default_rng(0)
    smallest = 10 if dtype == "float32" else 22
    cases = [drawn(SPECTRA[i % 5], shape, rng, smallest).astype(dtype) for i in range(300)]
    for x in cases:
        if x.any():
            check_brackets(x, KAPPA(jnp.asarray(x)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_zeros_and_small_values_are_told_apart(dtype):
    eps, tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
    for small in [0.0, tiny, 1e-20, 0.9 * eps, 2 * eps, 4 * eps, 8 * eps, 1e3 * eps, 0.25]:
        found = KAPPA(jnp.diag(jnp.array([1, 0.5, small], dtype)))
        truth = np.log(1 / float(np.array(small, dtype))) if small else np.log(2.0)
        assert float(found.lower) <= truth <= float(found.upper)
        resolved = small == 0 or small >= 8 * eps
        assert np.isfinite(found.upper) == resolved
        assert int(found.dominated_by) == (NONE if resolved else ROUNDING)
    assert int(KAPPA(jnp.diag(jnp.array([1, 0.5, 0], dtype))).rank) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", helpers.thinned(["float32", "float64"]))
def test_exact_zeros_of_a_tall_matrix_leave_both_bounds_finite(dtype):
    # LAPACK returns up to 4.6 eps for these zeros.
    x = planted([0, 1, 2, 2, 2, 3, None, None], 512, 8, dtype)
    for rows in (x, x.T):
        found = KAPPA(jnp.asarray(rows))
        assert float(found.lower) <= np.log(8) <= float(found.upper) < np.log(8) * 1.0001
        assert (int(found.rank), int(found.dominated_by)) == (6, NONE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", helpers.thinned(["float32", "float64"]))
def test_powers_of_two_change_no_bit_of_kappa(dtype):
    limits = np.finfo(dtype)
    x = np.random.default_rng(0).integers(1, 9, (9, 6)) * 2.0 ** -np.arange(6)
    shifts = np.array([0, limits.minexp + 6, limits.maxexp - 12, -40, 50])
    # lam is in units of feature^2, which leave the dtype before the features do.
    squares = np.clip(2 * shifts, limits.minexp + 2, limits.maxexp - 2)

    def shifted(array, exponents):
        return jnp.asarray(np.stack([np.ldexp(array, e) for e in exponents]).astype(dtype))

    @jax.jit
    @jax.vmap
    def run(features, gram, ridge, square):
        return (
            linalg.condition_number(features),
            linalg.feature_condition_number(features),
            linalg.condition_number(gram, damping=ridge),
        ), linalg.feature_condition_number(features, damping=square)

    exact, damped = run(
        shifted(x, shifts), shifted(x.T @ x, shifts), shifted(0.5, shifts), shifted(0.5, squares)
    )
    for found in exact:
        for field in (found.log_kappa, found.lower, found.upper):
            assert np.isfinite(field[0])
            np.testing.assert_array_equal(field, field[0])
        normal = found.tolerance[shifts > limits.minexp + 6]  # the other one is subnormal
        np.testing.assert_array_equal(
            normal, np.ldexp(normal[0], shifts[shifts > limits.minexp + 6])
        )
    for field in (damped.log_kappa, damped.lower, damped.upper):
        assert np.all(np.isfinite(field))
        np.testing.assert_array_equal(field[3:], field[0])
    np.testing.assert_array_equal(exact[0].rank, 6)


def test_a_damped_kappa_beyond_the_dtype_is_its_logarithm():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)) * 1e18, jnp.float32)
    found = FEATURE_KAPPA(x, damping=1e-20)
    largest = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)[0]
    truth = np.log(largest**2 / 3) - np.log(float(np.float32(1e-20)))
    assert float(found.lower) <= truth <= float(found.upper)
    assert int(found.dominated_by) == DAMPING
    np.testing.assert_allclose(found.log_kappa, truth, rtol=1e-6)


def test_kappas_close_to_one_keep_their_digits():
    x = jnp.diag(jnp.array([1 + 2.0**-40, 1.0])) * 2.0**-1000
    np.testing.assert_allclose(KAPPA(x).log_kappa, 2.0**-40, rtol=1e-3)
    assert not np.signbit(KAPPA(jnp.eye(2)).log_kappa)


@pytest.mark.slow
def test_numpy_float64_brackets_overlap_with_x64_on_and_off():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    graded = (basis * np.geomspace(1, 1e-4, 60)[None, :]) @ basis.T
    # Of rank one as given, of more as float32 holds it; and an entry that float32 has not.
    copied = np.outer(rng.standard_normal(5), [1, 2, 4, 8, 16]) / 3 * 2.0**-120
    for x, truth in [
        (graded, np.log(1e4)),
        (copied, 0.0),
        (np.diag([1.0, 0.1, 0.1, 0.1, 1e-60]), np.log(1e60)),
    ]:
        on = jax.jit(lambda x=x: linalg.condition_number(x))()
        with jax.enable_x64(False):
            off = jax.jit(lambda x=x: linalg.condition_number(x))()
        assert (on.log_kappa.dtype, off.log_kappa.dtype) == ("float64", "float32")
        for found in (on, off):
            assert float(found.lower) <= truth + 1e-10
            assert truth - 1e-10 <= float(found.upper)
        if x is graded:
            assert int(off.rank) == 60
            assert float(off.upper - off.lower) < 0.1


@pytest.mark.parametrize("dtype", helpers.thinned(["bfloat16", "float16"]))
def test_half_precision_is_computed_in_float32(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 4))).astype(dtype)
    found, wide = FEATURE_KAPPA(x), FEATURE_KAPPA(x.astype(jnp.float32))
    assert found.log_kappa.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, found, wide)


@pytest.mark.slow
def test_operators_that_are_spanned_heed_what_is_known_of_them():
    values = jnp.array([1, 0.5, 1e-16])
    truth = np.log(1e16)
    promised = operator(values, steps=3, positive_definite=True)
    inverse = operator(values, steps=3, inverse=True)
    plain = operator(values, steps=3)
    for found in (promised, inverse, plain):
        assert float(found.lower) <= truth <= float(found.upper)
    assert float(promised.lower) > 33
    assert (np.isinf(promised.upper), int(promised.dominated_by)) == (True, ROUNDING)
    np.testing.assert_allclose([inverse.lower, inverse.upper], truth, rtol=1e-12)
    # Singular or not, nobody said.
    assert (np.isinf(plain.upper), int(plain.dominated_by)) == (True, ROUNDING)


@pytest.mark.slow
def test_the_scale_of_an_operator_plays_no_part():
    values = np.geomspace(1, 1e-3, 12).astype(np.float32)

    @jax.jit
    @jax.vmap
    def run(scale):
        return linalg.operator_condition_number(
            lambda v: (values * scale) * v, 12, jax.random.key(0), dtype=jnp.float32
        )

    found = run(jnp.asarray(2.0 ** np.array([0, -66, 60, -100, 90]), jnp.float32))
    for field in (found.log_kappa, found.lower, found.upper):
        np.testing.assert_array_equal(field, field[0])
    assert float(found.lower[0]) <= np.log(1e3) <= float(found.upper[0])


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", helpers.thinned([True, False]))
def test_inside_shard_map(check_vma):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    x = np.random.default_rng(0).integers(-3, 4, (14, 4)).astype(np.float64)
    x[7:, 3] = 0  # the second device has an exact zero to settle

    def per_device(rows):
        found, slope = jax.value_and_grad(
            lambda rows: linalg.feature_condition_number(rows).log_kappa
        )(rows)
        plain = linalg.feature_condition_number(rows)
        damped = linalg.condition_number(rows.T @ rows, damping=0.1)
        ratio = linalg.relative_immunisation(
            harmful_after=plain, harmful_before=damped, primary_after=damped, primary_before=plain
        )
        return jax.tree.map(lambda a: a[None], (plain, damped, ratio, found, slope))

    spec = PartitionSpec("data")
    plain, damped, ratio, found, slope = jax.jit(
        jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    )(jnp.asarray(x))
    for i, rows in enumerate((x[:7], x[7:])):
        alone = FEATURE_KAPPA(jnp.asarray(rows))
        for got, want in zip(plain, alone, strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-12)
        values = np.linalg.eigvalsh(rows.T @ rows)
        np.testing.assert_allclose(
            damped.log_kappa[i], np.log((values[-1] + 0.1) / (max(values[0], 0) + 0.1)), rtol=1e-9
        )
        np.testing.assert_allclose(
            ratio.rir.log_ratio[i], 2 * (plain.log_kappa - damped.log_kappa)[i], rtol=1e-9
        )
        # kappa has no scale, so the slope is orthogonal to the rows.
        np.testing.assert_allclose(np.sum(slope[i] * rows), 0, atol=1e-12)
        assert np.any(slope[i] != 0)
    np.testing.assert_allclose(found, plain.log_kappa, rtol=1e-12)
    assert plain.rank.tolist() == [4, 3]
    assert np.all(np.isfinite(plain.upper))


def test_ratios_round_their_bounds_outwards():
    def condition(value):
        return linalg.Condition(*([jnp.asarray(value)] * 3), jnp.asarray(1), jnp.asarray(0.0), 0)

    a, b = 9.87654321e3, 1.23456789e-3
    found = linalg.log_ratio(after=condition(a), before=condition(b))
    exact = fractions.Fraction(a) - fractions.Fraction(b)
    assert fractions.Fraction(float(found.lower)) < exact < fractions.Fraction(float(found.upper))


def test_bad_input_is_refused_at_the_door():
    key = jax.random.key(0)
    for call, message in [
        (lambda: linalg.condition_number(jnp.ones((2, 3)), damping=1.0), "square"),
        (lambda: linalg.condition_number(jnp.eye(2), damping=-1.0), ">= 0"),
        (lambda: linalg.feature_condition_number(jnp.ones(3)), r"\(n, d\)"),
        (lambda: linalg.condition_number(jnp.eye(2), damping=np.inf), "finite"),
        (lambda: linalg.condition_number(jnp.eye(2), damping=jnp.ones(2)), "scalar"),
        (lambda: linalg.condition_number(jnp.eye(2), rtol=-1e-3), "rtol must be finite"),
        (lambda: linalg.condition_number(np.eye(2, dtype=int)), "float dtype"),
        (lambda: linalg.operator_condition_number(lambda v: v, 0, key), "at least 1"),
        (
            lambda: linalg.operator_condition_number(lambda v: v, 3, key, failure_probability=0.0),
            "failure_probability",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("tiny", [1e-46, 1e-200])
def test_what_x64_off_loses_counts_however_small_it_is(tiny):
    given = np.diag([1.0, tiny])  # the square of 1e-200 is zero in float64
    with jax.enable_x64(False):
        for of, power in ((linalg.condition_number, 1), (linalg.feature_condition_number, 2)):
            found = of(given)
            assert found.lower <= -power * np.log(tiny) <= found.upper
