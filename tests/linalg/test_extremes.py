import functools

import helpers
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaximm import linalg
from jaximm.linalg import extremes
from jaximm.linalg.lanczos import lanczos_in_units

pytestmark = pytest.mark.heavy

PATHS = {
    "svd": linalg.svd_extremes,
    "gram": linalg.gram_extremes,
    "krylov": jax.jit(
        lambda x: extremes._rectangular_krylov(x, jax.random.key(5), steps=16, rtol=None)
    ),
}


@pytest.mark.parametrize(
    ("method", "shape"),
    helpers.thinned_rows(
        [
            *[("svd", (7, 9)), ("gram", (9, 7)), ("krylov", (5, 8)), ("gram", (7, 9))],
            *[("svd", (4, 1)), ("svd", (9, 7)), ("krylov", (8, 6)), ("gram", (1, 4))],
            *[("gram", (4, 1)), ("svd", (1, 4))],
        ],
        keep=3,
    ),
)
def test_rectangular_paths_match_numpy(method, shape):
    values = np.geomspace(3.0, 0.05, min(shape))
    x = helpers.matrix_with_spectrum(values, *shape, jax.random.key(0))
    found = PATHS[method](x)
    np.testing.assert_allclose(found.largest, values[0], rtol=1e-11)
    np.testing.assert_allclose(found.smallest, values[-1], rtol=1e-9)
    for value, left, right in [
        (found.largest, found.largest_left, found.largest_right),
        (found.smallest, found.smallest_left, found.smallest_right),
    ]:
        assert left.shape == (shape[0],)
        assert right.shape == (shape[1],)
        np.testing.assert_allclose(np.linalg.norm(left), 1, rtol=1e-9)
        np.testing.assert_allclose(x @ right, value * left, atol=1e-9)
        np.testing.assert_allclose(x.T @ left, value * right, atol=1e-9)
    assert int(found.rank) == min(shape)
    assert bool(found.converged)
    assert linalg.METHODS[int(found.method)] == method


@pytest.mark.parametrize("method", PATHS)
def test_rank_deficient_matrices_skip_the_zeros(method):
    x = helpers.matrix_with_spectrum(np.array([4.0, 2.0, 0.5]), 8, 6, jax.random.key(1))
    found = PATHS[method](x)
    assert int(found.rank) == 3
    np.testing.assert_allclose(found.smallest, 0.5, rtol=1e-9)
    assert float(found.tolerance) < 1e-5


SYMMETRIC_PATHS = {
    "eigh": linalg.eigh_extremes,
    "svd": linalg.svd_extremes,
    "krylov": lambda s: linalg.krylov_extremes(
        lambda v: s @ v, s.shape[0], jax.random.key(2), dtype=s.dtype
    ),
    "inverse_krylov": lambda s: linalg.inverse_krylov_extremes(s, jax.random.key(2)),
}


@functools.cache
def weighted_extremes(method):
    """Gradient of largest + 3 smallest with the extremes beside it, compiled once per method."""

    def weighted(s):
        found = SYMMETRIC_PATHS[method](s)
        return found.largest + 3 * found.smallest, found

    return jax.jit(jax.grad(weighted, has_aux=True))


@pytest.mark.parametrize("method", SYMMETRIC_PATHS)
def test_symmetric_paths_agree_in_value_and_gradient(method):
    values = np.geomspace(2.0, 0.01, 12)
    s = helpers.psd_with_spectrum(values, jax.random.key(3))
    slope, found = weighted_extremes(method)(s)
    np.testing.assert_allclose([found.largest, found.smallest], values[[0, -1]], rtol=1e-10)
    assert int(found.rank) == 12
    assert bool(found.converged)
    vectors = np.linalg.eigh(np.asarray(s))[1]
    expected = np.outer(vectors[:, -1], vectors[:, -1]) + 3 * np.outer(vectors[:, 0], vectors[:, 0])
    np.testing.assert_allclose(slope, expected, atol=1e-6)


@pytest.mark.slow
def test_eigh_counts_negative_eigenvalues_by_size():
    s = helpers.psd_with_spectrum(np.array([1.0, -3.0, 0.5]), jax.random.key(0))
    found = linalg.eigh_extremes(s)
    np.testing.assert_allclose([found.largest, found.smallest], [3.0, 0.5], rtol=1e-12)
    np.testing.assert_allclose(s @ found.largest_right, 3 * found.largest_left, atol=1e-12)
    slope = jax.grad(lambda s: linalg.eigh_extremes(s).largest)(s)
    np.testing.assert_allclose(slope, -jnp.outer(found.largest_right, found.largest_right))


@pytest.mark.parametrize("method", ["svd", "gram"])
def test_gradients_pass_finite_differences(method):
    x = helpers.matrix_with_spectrum(np.array([3.0, 2.0, 1.0]), 3, 5, jax.random.key(4))
    for name in ["largest", "smallest"]:
        check_grads(
            lambda x, name=name: getattr(PATHS[method](x), name), (x,), 1, ["fwd", "rev"], rtol=1e-5
        )


@pytest.mark.parametrize("method", ["svd", "gram", "eigh"])
def test_ties_and_zero_have_finite_gradients(method):
    path = PATHS.get(method, linalg.eigh_extremes)
    for matrix, largest, rank in [(jnp.eye(5), 1.0, 5), (jnp.zeros((5, 5)), 0.0, 0)]:
        found = path(matrix)
        np.testing.assert_allclose([found.largest, found.smallest], largest, atol=1e-12)
        assert rank == 0 or int(found.rank) == rank
        assert int(found.rank) <= rank
        slope = jax.grad(lambda m: path(m).largest + path(m).smallest)(matrix)
        assert bool(jnp.all(jnp.isfinite(slope)))


def test_nan_comes_out_as_nan():
    bad = jnp.eye(4).at[1, 2].set(jnp.nan)
    for path in [linalg.svd_extremes, linalg.gram_extremes, linalg.eigh_extremes]:
        found = path(bad)
        assert np.isnan(found.largest)
        assert np.isnan(found.smallest)
        assert not bool(found.converged)


def test_indefinite_input_to_the_inverse_path_is_reported():
    _, found = weighted_extremes("inverse_krylov")(jnp.diag(jnp.linspace(-1.0, 1.0, 12)))
    assert np.isnan(found.smallest)
    assert int(found.rank) == 0
    assert not bool(found.converged)


def test_float32_svd_resolves_what_the_gram_side_cannot():
    x64 = helpers.matrix_with_spectrum(np.geomspace(1.0, 1e-4, 6), 60, 6, jax.random.key(0))
    x = x64.astype(jnp.float32)
    accurate, squared = linalg.svd_extremes(x), linalg.gram_extremes(x)
    assert accurate.largest.dtype == jnp.float32
    np.testing.assert_allclose(accurate.smallest, 1e-4, rtol=1e-2)
    assert int(accurate.rank) == 6
    assert int(squared.rank) < 6  # its tolerance says that it cannot see that far


@pytest.mark.slow
def test_jit_and_vmap_agree_with_plain():
    stack = jax.random.normal(jax.random.key(0), (3, 6, 4))
    keys = jax.random.split(jax.random.key(1), 3)

    def krylov(x, key):
        gram = x @ x.T
        return linalg.krylov_extremes(lambda v: gram @ v, 6, key, dtype=x.dtype)

    for path in [linalg.svd_extremes, linalg.gram_extremes]:
        batched = jax.jit(jax.vmap(path))(stack)
        for i in range(3):
            plain = path(stack[i])
            np.testing.assert_allclose(batched.largest[i], plain.largest, rtol=1e-12)
            np.testing.assert_allclose(batched.smallest[i], plain.smallest, rtol=1e-9)
            assert int(batched.rank[i]) == int(plain.rank) == 4
    iterated = jax.jit(jax.vmap(krylov))(stack, keys)
    expected = np.linalg.svd(np.asarray(stack), compute_uv=False) ** 2
    np.testing.assert_allclose(iterated.largest, expected[:, 0], rtol=1e-12)
    np.testing.assert_allclose(iterated.smallest, expected[:, -1], rtol=1e-9)
    assert np.asarray(iterated.rank).tolist() == [4, 4, 4]


@pytest.mark.slow
def test_krylov_stops_early_and_says_when_it_fell_short():
    calls = []

    def run(spectrum):
        def matvec(v):
            jax.debug.callback(lambda: calls.append(1))
            return spectrum * v

        return linalg.krylov_extremes(matvec, 400, jax.random.key(0), steps=100)

    run = jax.jit(run)
    short = run(jnp.geomspace(1.0, 1e-6, 400))
    assert not bool(short.converged)
    assert float(short.smallest) > 2e-6  # the over-estimate that it must not pass off as converged
    np.testing.assert_allclose(short.largest, 1.0, rtol=1e-12)

    jax.effects_barrier()
    assert len(calls) >= 100
    calls.clear()
    easy = run(jnp.where(jnp.arange(400) < 3, 5.0, 1.0))
    jax.effects_barrier()
    assert bool(easy.converged)
    np.testing.assert_allclose([easy.largest, easy.smallest], [5.0, 1.0], rtol=1e-12)
    # One matvec for the scale, one block of steps and the two Rayleigh quotients.
    assert len(calls) <= 1 + 8 + 2


def test_lanczos_survives_breakdown_and_spans_the_space():
    values = jnp.array([3.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0])
    s = helpers.psd_with_spectrum(values, jax.random.key(0))
    space = jax.jit(
        lambda s: linalg.lanczos(lambda v: s @ v, 7, jax.random.key(1), steps=20, dtype=s.dtype)
    )(s)
    assert int(space.size) == 7
    np.testing.assert_allclose(space.values, np.sort(values), atol=1e-13)
    np.testing.assert_allclose(space.basis @ space.basis.T, np.eye(7), atol=1e-13)


@pytest.mark.slow
def test_lanczos_residuals_are_the_residuals():
    s = helpers.psd_with_spectrum(np.linspace(1.0, 2.0, 30), jax.random.key(0))
    space = jax.jit(
        lambda s: linalg.lanczos(lambda v: s @ v, 30, jax.random.key(1), steps=10, dtype=s.dtype)
    )(s)
    vectors = space.ritz_vectors(jnp.arange(10))
    actual = np.linalg.norm(vectors @ s - space.values[:, None] * vectors, axis=1)
    np.testing.assert_allclose(space.residuals, actual, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_krylov_of_the_identity_and_a_single_dimension():
    def smallest(scale):
        found = linalg.krylov_extremes(lambda v: scale * v, 30, jax.random.key(0))
        return found.smallest, found

    slope, found = jax.jit(jax.grad(smallest, has_aux=True))(1.0)
    np.testing.assert_allclose([found.largest, found.smallest, slope], 1.0)
    assert bool(found.converged)
    one = jax.jit(lambda: linalg.krylov_extremes(lambda v: 2 * v, 1, jax.random.key(0)))()
    np.testing.assert_allclose([one.largest, one.smallest], 2.0)
    assert int(one.rank) == 1


def test_singular_extremes_takes_the_reported_path(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (40, 6))
    s = x.T @ x
    monkeypatch.setattr(extremes, "EXACT_SIDE", 8)
    big = helpers.matrix_with_spectrum(np.linspace(1, 2, 9), 12, 9, jax.random.key(1))
    symmetric_big = helpers.psd_with_spectrum(np.linspace(1, 2, 9), jax.random.key(2))
    key = jax.random.key(3)
    for matrix, options in [
        (x, {}),
        (x, {"accurate": False}),
        (s, {"symmetric": True}),
        (big, {}),
        (symmetric_big, {"symmetric": True}),
    ]:
        path = functools.partial(linalg.singular_extremes, rng_key=key, steps=9, **options)
        found = jax.jit(path)(matrix)
        name = linalg.choose_method(matrix.shape, **options)
        assert linalg.METHODS[int(found.method)] == name
        expected = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        np.testing.assert_allclose([found.largest, found.smallest], expected[[0, -1]], rtol=1e-7)
    with pytest.raises(ValueError, match="rng_key"):
        linalg.singular_extremes(big)


def test_bad_input_is_refused_at_the_door():
    for call, message in [
        (lambda: linalg.svd_extremes(jnp.ones((2, 3, 4))), "vmap"),
        (lambda: linalg.svd_extremes(jnp.ones((0, 3))), "non-empty"),
        (lambda: linalg.svd_extremes(jnp.ones((2, 3), jnp.int32)), "float"),
        (lambda: linalg.eigh_extremes(jnp.ones((2, 3))), "square"),
        (lambda: linalg.choose_method((2, 3), symmetric=True), "square"),
        (lambda: linalg.choose_method((2,)), r"\(n, d\)"),
        (lambda: linalg.krylov_extremes(lambda v: v, 0, jax.random.key(0)), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_stated_tolerance_decides_the_rank():
    x = jnp.diag(jnp.array([1.0, 1e-2, 1e-5]))
    for path in [linalg.svd_extremes, linalg.gram_extremes, linalg.eigh_extremes]:
        found = functools.partial(path, rtol=1e-3)(x)
        assert int(found.rank) == 2
        np.testing.assert_allclose([found.smallest, found.tolerance], [1e-2, 1e-3], rtol=1e-9)


TALL = jax.ShapeDtypeStruct((75_000, 100), jnp.float32)


@pytest.mark.slow
def test_a_tall_matrix_needs_no_square_of_its_rows():
    """On the path that `tests/test_memory.py` does not reach."""
    path = functools.partial(
        extremes._rectangular_krylov, rng_key=jax.random.key(0), steps=8, rtol=None
    )
    memory = jax.jit(path).lower(TALL).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4 * 75_000 * 100 * 4


def scaled_by(found, exponent):
    """Values of `Extremes` over 2^exponent; the rest as it is."""
    names = ("largest", "smallest", "tolerance")
    return found._replace(**{n: np.ldexp(getattr(found, n), -exponent) for n in names})


@pytest.mark.parametrize("method", SYMMETRIC_PATHS)
@given(exponent=st.integers(-900, 1010))
def test_powers_of_two_scale_the_values_and_nothing_else(method, exponent):
    s = helpers.psd_with_spectrum(np.geomspace(1.0, 1e-2, 12), jax.random.key(3))
    slope, found = weighted_extremes(method)(s)
    slope_of_scaled, scaled = weighted_extremes(method)(s * 2.0**exponent)
    for one, other in zip(found, scaled_by(scaled, exponent), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(slope, slope_of_scaled)


@pytest.mark.parametrize("exponent", [-100, -66, 60, 110])
def test_the_gram_side_squares_nothing_out_of_range(exponent):
    x = jnp.diag(jnp.array([4.0, 2.0, 0.5], jnp.float32)) * jnp.float32(2.0) ** exponent
    found = scaled_by(linalg.gram_extremes(x), exponent)
    np.testing.assert_allclose([found.largest, found.smallest], [4.0, 0.5], rtol=1e-6)
    assert found.converged


def exact_sizes(matrix):
    """|eigenvalues| of a symmetric matrix as stored, ascending, to 50 digits."""
    with mpmath.workdps(50):
        values = mpmath.eigsy(mpmath.matrix(np.asarray(matrix).tolist()), eigvals_only=True)
        return np.sort([abs(float(value)) for value in values])


def hilbert(d):
    index = np.arange(d)
    return 1.0 / (index[:, None] + index[None, :] + 1)


def hard_matrices(count):
    """[12, 12] symmetric matrices on which a smallest value is easily wrong."""
    rng = np.random.default_rng(0)
    yield "hilbert", hilbert(12)
    for index in range(count):
        decades = float(rng.integers(4, 17))
        last = 10.0**-decades
        spectrum = [
            np.geomspace(1, last, 12),
            np.r_[1 + 1e-9 * np.arange(6), last * (1 + 1e-9 * np.arange(6))],
            np.r_[np.ones(11), last],
            np.r_[np.ones(6), np.zeros(4), last, last],
            np.linspace(-1, 1, 12),
            np.r_[1, np.full(9, 1e-2), 1e-8, last],
        ][index % 6]
        basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
        product = (basis * spectrum) @ basis.T
        yield f"{index % 6} to {last:g}", (product + product.T) / 2
        rank = 1 + index % 11
        whole = rng.integers(-3, 4, size=(12, rank)).astype(float)
        yield f"integers of rank {rank}", whole @ whole.T


@pytest.mark.parametrize("count", [9, pytest.param(100, marks=pytest.mark.slow)])
def test_converged_is_never_true_of_a_wrong_value(count):
    trusted = dict.fromkeys(SYMMETRIC_PATHS, 0)
    for name, matrix in hard_matrices(count):
        truth = exact_sizes(matrix)
        for method in SYMMETRIC_PATHS:
            _, found = weighted_extremes(method)(jnp.asarray(matrix))
            if not found.converged:
                continue
            kept = truth[truth > float(found.tolerance)]
            trusted[method] += 1
            # A Krylov space sees a repeated value once: a lower bound.
            counts = (1, len(kept)) if method == "krylov" else (len(kept),) * 2
            assert counts[0] <= int(found.rank) <= counts[1], (name, method)
            # Inside of a cluster an iteration is as good as its residual, sqrt(eps).
            rtol = 2e-8 if "krylov" in method else 1e-12
            np.testing.assert_allclose(found.largest, truth[-1], rtol=rtol, err_msg=name)
            np.testing.assert_allclose(found.smallest, kept[0], rtol=0.06, err_msg=name)
    assert all(trusted.values())  # and not by trusting none


def test_a_smallest_value_below_rounding_is_not_converged():
    _, found = weighted_extremes("inverse_krylov")(jnp.asarray(hilbert(12)))
    assert float(found.smallest) < float(found.tolerance)
    assert not found.converged
    assert int(found.rank) == 0
    for path in (linalg.svd_extremes, linalg.eigh_extremes):
        assert not path(jnp.asarray(hilbert(12)), rtol=0.0).converged


@pytest.mark.slow
def test_a_value_at_the_tolerance_is_not_converged():
    x = jnp.diag(jnp.array([1.0, 0.25, 0.125]))
    for path in (linalg.svd_extremes, linalg.gram_extremes, linalg.eigh_extremes):
        assert not path(x, rtol=0.25).converged
        assert path(x, rtol=0.2).converged


@pytest.mark.slow
@pytest.mark.parametrize("dtype", helpers.thinned([jnp.bfloat16, jnp.float16]))
def test_half_precision_is_computed_in_float32(dtype):
    x = jnp.diag(jnp.array([4.0, 2.0, 0.5])).astype(dtype)
    for path in (linalg.svd_extremes, linalg.gram_extremes, linalg.eigh_extremes):
        found = path(x)
        assert found.largest.dtype == jnp.float32
        np.testing.assert_allclose([found.largest, found.smallest], [4.0, 0.5], rtol=1e-6)
        assert float(found.tolerance) < 0.1
    assert jax.grad(lambda x: linalg.svd_extremes(x).largest)(x).dtype == dtype
    assert extremes.vector_dtype(dtype) == jnp.float32


@pytest.mark.slow
def test_numpy_float64_is_float32_while_x64_is_off():
    x = np.diag([4.0, 2.0, 1e-9])
    with jax.enable_x64(False):
        for path in (linalg.svd_extremes, linalg.eigh_extremes):
            found = path(x)
            assert found.largest.dtype == jnp.float32
            assert int(found.rank) == 2
            np.testing.assert_allclose(found.tolerance, 4 * 3 * 2.0**-23, rtol=1e-6)
    assert int(linalg.svd_extremes(x).rank) == 3


@pytest.mark.slow
def test_an_operator_of_another_dtype_is_cast_and_one_of_another_shape_refused():
    scales = jnp.array([1.0, 2.0, 3.0], jnp.float32)

    def run(matvec, dtype=jnp.float64):
        return linalg.lanczos(matvec, 3, jax.random.key(0), steps=3, dtype=dtype)

    space = run(lambda v: scales * v.astype(jnp.float32))
    assert space.values.dtype == jnp.float64
    np.testing.assert_allclose(space.values, scales, rtol=1e-6)
    with pytest.raises(ValueError, match="matvec must return"):
        run(lambda v: v[:2])
    with pytest.raises(ValueError, match="float dtype"):
        run(lambda v: v, jnp.int32)
    with pytest.raises(ValueError, match="at least 1"):
        linalg.dominant_vector(lambda v: v, 3, jax.random.key(0), 0, None, jnp.float64)


def test_a_link_is_cut_at_rounding_alone():
    """At a million features in float32, dim * eps is 0.12: no link of that size is rounding."""
    assert extremes.matvec_noise(10**6, jnp.dtype("float32")) < 2e-4


def test_an_operator_that_is_not_symmetric_is_not_converged():
    matrix = jnp.triu(jnp.ones((12, 12))) + 12 * jnp.eye(12)
    _, found = weighted_extremes("krylov")(matrix)
    assert not found.converged


@pytest.mark.parametrize("exponent", [-900, 0, 900])
def test_the_shift_bound_at_any_scale(exponent):
    """Against 50 digits, where squares leave the dtype or an error is below its rounding."""
    scale = 2.0**exponent
    for s_1, s_k, e in [(3.0, 0.5, 0.1), (3.0, 0.5, 1e-18), (1.0, 1e-9, 0.9999e-9)]:
        with mpmath.workdps(50):
            top, bottom, error = (mpmath.mpf(v) for v in (s_1, s_k, e))
            truth = float(2 * mpmath.log((1 + error / top) / (1 - error / bottom)))
        found = linalg.log_kappa_shift_bound(
            largest=s_1 * scale, smallest=s_k * scale, error_norm=e * scale
        )
        assert truth <= float(found) <= truth * (1 + 1e-10)


def test_a_krylov_value_near_the_tolerance_is_right_or_not_converged():
    # Float32 against float64 eigenvalues of the same matrices; two values from 2 eps upwards.
    d, eps, rng = 16, 2.0**-23, np.random.default_rng(0)
    turned = np.linalg.qr(rng.standard_normal((400, d, d)))[0]
    values = np.exp(rng.uniform(-3, 0, (400, d)))
    values[:, 0] = 1
    values[:, 1] = eps * np.exp(rng.uniform(np.log(2), np.log(200), 400))
    values[::2, 2] = eps * np.exp(rng.uniform(np.log(2), np.log(2000), 200))
    many = np.einsum("nij,nj,nkj->nik", turned, values, turned).astype(np.float32)
    many = (many + many.transpose(0, 2, 1)) / 2
    truth = np.abs(np.linalg.eigvalsh(many.astype(float)))

    def found(matrix, key):
        return linalg.krylov_extremes(
            lambda v: jnp.matmul(matrix, v, precision="highest"), d, key, steps=d, dtype=jnp.float32
        )

    came = jax.jit(jax.vmap(found))(jnp.asarray(many), jax.random.split(jax.random.key(1), 400))
    above = np.where(truth > np.asarray(came.tolerance, float)[:, None], truth, np.inf)
    right = np.abs(np.asarray(came.smallest, float) / above.min(axis=1) - 1) < 0.06
    assert not (np.asarray(came.converged) & ~right).any()
    assert np.mean(came.converged) > 0.5  # and not by trusting none


def test_an_eigenvalue_that_was_missed_had_no_more_of_the_start_than_is_said():
    # Diagonal operators: an eigenvector's part of the start is one of its entries.
    d, count = 12, 200
    spectra = np.random.default_rng(0).uniform(0.2, 1, (count, d))

    def run(values, key):
        run = lanczos_in_units(
            lambda v: (values * v, jnp.ones((), bool)), d, key, steps=7, dtype=jnp.float64
        )
        return run.ritz, run.exponent, run.space.basis[0]

    keys = jax.random.split(jax.random.key(0), count)
    ritz, exponents, starts = jax.jit(jax.vmap(run))(jnp.asarray(spectra), keys)
    units = spectra * np.exp2(-np.asarray(exponents, float))[:, None]
    known = np.asarray(ritz.values)
    beyond = (units > known.max(1, keepdims=True)) | (units < known.min(1, keepdims=True))
    assert beyond.sum() > count  # one of either end, as a rule
    log_p = np.log(np.abs(units[:, :, None] - known[:, None])).sum(2)
    log_most = np.asarray(ritz.log_unseen)[:, None] - log_p  # of |part| sqrt(2 d / pi)
    log_part = np.log(np.abs(starts) * np.sqrt(2 * d / np.pi))
    assert (log_part <= log_most + 1e-6)[beyond].all()
    assert np.median((log_most - log_part)[beyond]) < 3  # and not by saying nothing


@pytest.mark.slow
@pytest.mark.parametrize("residual_rtol", [0.1, None])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_space_that_is_not_spanned_is_never_converged_on_a_wrong_value(dtype, residual_rtol):
    # A residual that its caller allows to be large tells little of what lies beyond.
    d, count, rng = 16, 4000, np.random.default_rng(0)
    turned = np.linalg.qr(rng.standard_normal((count, d, d)))[0]
    values = np.exp(rng.uniform(-1, 0, (count, d)))
    values[:, 1] = np.exp(rng.uniform(-5, -1, count))
    values[::2, 2:] = values[::2, 2:3]  # of few values: closes early
    many = np.einsum("nij,nj,nkj->nik", turned, values, turned).astype(dtype)
    many = (many + many.transpose(0, 2, 1)) / 2

    def found(matrix, key):
        return linalg.krylov_extremes(
            lambda v: jnp.matmul(matrix, v, precision="highest"),
            d,
            key,
            steps=15,
            residual_rtol=residual_rtol,
            dtype=dtype,
        )

    keys = jax.random.split(jax.random.key(2), count)
    came = jax.jit(jax.vmap(found))(jnp.asarray(many), keys)
    ends = np.stack([came.smallest, came.largest]).astype(float)
    off = ends / np.linalg.eigvalsh(many.astype(float))[:, [0, -1]].T - 1
    assert not (np.asarray(came.converged) & (np.abs(off) > 1 / 32).any(0)).any()
    assert np.mean(came.converged) > 0.4


@pytest.mark.slow
def test_a_tolerance_below_rounding_leaves_what_came_out_as_zero_in_doubt():
    # 1e-10 of the largest in float32: some of these come out as an exact zero, which is left out.
    values = jnp.array([1.0, 1.0, 1.0, 1e-10], jnp.float32)

    def found(key):
        return linalg.krylov_extremes(
            lambda v: values * v, 4, key, steps=4, rtol=0.0, dtype=jnp.float32
        )

    many = jax.jit(jax.vmap(found))(jax.random.split(jax.random.key(5), 64))
    wrong = many.smallest > 2e-10
    assert wrong.any()
    assert not (wrong & many.converged).any()
