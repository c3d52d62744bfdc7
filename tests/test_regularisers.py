"""Values, derivatives and laws of the two regularisers, and the steps that move kappa."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import matrix_with_spectrum, psd_with_spectrum, thinned, thinned_rows
from jax.test_util import check_grads

from jaximm import regularisers as reg

pytestmark = pytest.mark.heavy

F32, F64 = jnp.float32, jnp.float64
# Under jit throughout, which is faster; one test below compares with plain calls.
MATRIX = {
    kind: jax.jit(fn, static_argnames=("rtol", "rank"))
    for kind, fn in (("well", reg.well_conditioning), ("ill", reg.ill_conditioning))
}
FEATURES = {
    kind: jax.jit(fn, static_argnames=("convention", "rtol", "rank"))
    for kind, fn in (
        ("well", reg.well_conditioning_of_features),
        ("ill", reg.ill_conditioning_of_features),
    )
}
GRADIENT = {kind: jax.jit(jax.grad(fn)) for kind, fn in MATRIX.items()}
BOUND = {"well": jax.jit(reg.well_step_bound), "ill": jax.jit(reg.ill_step_bound)}
VALUES = np.array([3.0, 2.2, 1.0, 0.4, 0.1])


def reference(values, kind, k=None):
    """The formula, from singular values in NumPy."""
    values = np.sort(np.abs(np.asarray(values, np.float64)))[::-1][:k]
    if kind == "well":
        return values[0] ** 2 / 2 - np.mean(values**2) / 2
    return 1 / (np.mean(values**2) / 2 - values[-1] ** 2 / 2)


def by_autodiff(hessian, kind):
    """The same formula, differentiated through eigvalsh."""
    values = jnp.linalg.eigvalsh(hessian)
    mean = jnp.mean(values**2)
    if kind == "well":
        return (values[-1] ** 2 - mean) / 2
    return 2 / (mean - values[0] ** 2)


spectra = st.lists(st.floats(-2.0, 2.0), min_size=5, max_size=5).map(
    lambda exponents: 10.0 ** np.sort(np.array(exponents))[::-1]
)
seeds = st.integers(0, 2**16)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", ["well", "ill"])
def test_value_and_derivative_are_the_formula(kind, dtype):
    matrix = psd_with_spectrum(jnp.asarray(VALUES, dtype), jax.random.key(0))
    value, gradient = jax.jit(jax.value_and_grad(MATRIX[kind]))(matrix)
    exact = np.asarray(matrix, np.float64)
    exact = (exact + exact.T) / 2
    values, vectors = np.linalg.eigh(exact)
    position = -1 if kind == "well" else 0
    v = vectors[:, position]
    expected = values[position] * np.outer(v, v) - exact / 5
    expected *= 1 if kind == "well" else reference(values, kind) ** 2
    rtol = 200 * float(jnp.finfo(dtype).eps)
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(value, reference(VALUES, kind), rtol=rtol)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["well", "ill"])
def test_derivative_agrees_with_autodiff_and_central_differences(kind):
    matrix = psd_with_spectrum(VALUES, jax.random.key(1))
    expected = jax.grad(by_autodiff)(matrix, kind)
    np.testing.assert_allclose(jax.grad(MATRIX[kind])(matrix), expected, rtol=1e-9, atol=1e-11)
    check_grads(MATRIX[kind], (matrix,), order=1, modes=["fwd", "rev"], rtol=1e-5)


@pytest.mark.parametrize("shape", thinned([(4, 7), (9, 5), (5, 5)]))
@pytest.mark.parametrize("kind", ["well", "ill"])
def test_features_agree_with_the_formed_matrix(kind, shape):
    n, d = shape
    x = matrix_with_spectrum(np.array([2.0, 1.4, 0.9, 0.5]), n, d, jax.random.key(2))
    x = x + 0.1 * jax.random.normal(jax.random.key(3), shape)

    def through_matrix(features):
        # The non-zero spectrum, from whichever Gram matrix has no zeros in it.
        gram = features @ features.T if n < d else features.T @ features
        return by_autodiff(gram / n, kind)

    value, gradient = jax.jit(jax.value_and_grad(FEATURES[kind]))(x)
    expected, expected_gradient = jax.jit(jax.value_and_grad(through_matrix))(x)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(MATRIX[kind](x.T @ x / n), value, rtol=1e-10)
    check_grads(FEATURES[kind], (x,), order=1, modes=["fwd", "rev"], rtol=1e-5)


@pytest.mark.parametrize("shape", thinned([(4, 7), (9, 5)]))
@pytest.mark.parametrize("kind", ["well", "ill"])
def test_damping_and_convention_are_those_of_the_damped_hessian(kind, shape):
    n, d = shape
    x = jax.random.normal(jax.random.key(4), shape)

    def formed(features, lam):
        return MATRIX[kind](features.T @ features / n + lam * jnp.eye(d))

    def direct(features, lam):
        return FEATURES[kind](features, damping=lam)

    lam = jnp.asarray(0.3)
    value, gradients = jax.jit(jax.value_and_grad(direct, (0, 1)))(x, lam)
    expected, expected_gradients = jax.jit(jax.value_and_grad(formed, (0, 1)))(x, lam)
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)
    in_sums = FEATURES[kind](x, damping=0.3, convention="sum")
    np.testing.assert_allclose(in_sums, MATRIX[kind](x.T @ x + n * 0.3 * jnp.eye(d)), rtol=1e-11)


@pytest.mark.slow
def test_rank_restricts_a_damped_small_batch_to_its_row_space():
    n, d, lam = 3, 6, 0.5
    x = jax.random.normal(jax.random.key(5), (n, d))
    kept = np.linalg.eigvalsh(np.asarray(x @ x.T) / n) + lam
    for kind in ("well", "ill"):
        value = functools.partial(FEATURES[kind], damping=lam, rank=n)
        np.testing.assert_allclose(value(x), reference(kept, kind), rtol=1e-11)
        formed = MATRIX[kind](x.T @ x / n + lam * jnp.eye(d), rank=n)
        np.testing.assert_allclose(value(x), formed, rtol=1e-11)
        check_grads(value, (x,), order=1, modes=["rev"], rtol=1e-5)
        # One more than the row space: the damping itself is the smallest value kept.
        wider = FEATURES[kind](x, damping=lam, rank=n + 1)
        np.testing.assert_allclose(wider, reference([*kept, lam], kind), rtol=1e-11)


@pytest.mark.parametrize("kind", thinned(["well", "ill"]))
def test_a_cut_drops_what_is_below_it_from_value_and_derivative(kind):
    matrix = psd_with_spectrum(VALUES, jax.random.key(6))
    for cut, k in (({"rank": 3}, 3), ({"rtol": 0.2}, 3), ({"rtol": 0.1}, 4)):
        value = functools.partial(MATRIX[kind], **cut)
        np.testing.assert_allclose(value(matrix), reference(VALUES, kind, k), rtol=1e-12)
        check_grads(value, (matrix,), order=1, modes=["rev"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["well", "ill"])
def test_a_singular_matrix_counts_only_its_rank(kind):
    values = np.array([3.0, 2.0, 1.0, 0.0, 0.0])
    matrix = psd_with_spectrum(values, jax.random.key(7))
    np.testing.assert_allclose(MATRIX[kind](matrix), reference(values, kind, 3), rtol=1e-12)
    rows = jnp.tile(matrix[:3], (2, 1))  # six rows, rank three, in five columns
    sigma = np.linalg.svd(rows, compute_uv=False)[:3] ** 2 / 6
    np.testing.assert_allclose(FEATURES[kind](rows), reference(sigma, kind), rtol=1e-10)


def test_an_indefinite_matrix_is_measured_by_its_singular_values():
    values = np.array([2.0, 1.0, -0.5, -3.0])
    matrix = psd_with_spectrum(values, jax.random.key(8))
    for kind, regulariser in MATRIX.items():
        np.testing.assert_allclose(regulariser(matrix), reference(values, kind), rtol=1e-11)
        check_grads(regulariser, (matrix,), order=1, modes=["rev"], rtol=1e-5)


def test_repeated_extremes_have_a_finite_derivative_within_the_subdifferential():
    values = np.array([3.0, 3.0, 2.0, 1.0, 1.0])
    matrix = psd_with_spectrum(values, jax.random.key(9))
    for kind, extreme, sign in (("well", 3.0, 1), ("ill", 1.0, 1)):
        gradient = np.asarray(jax.grad(MATRIX[kind])(matrix))
        scale = reference(values, kind) ** 2 if kind == "ill" else 1.0
        # What is left after the smooth part is extreme * v v^T with v in the tied eigenspace.
        rest = gradient / scale + np.asarray(matrix) / 5
        np.testing.assert_allclose(rest, rest.T, atol=1e-12)
        np.testing.assert_allclose(np.linalg.eigvalsh(sign * rest)[-1], extreme, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.eigvalsh(rest)[:-1], 0, atol=1e-9)
        np.testing.assert_allclose(matrix @ rest, extreme * rest, atol=1e-9)


@pytest.mark.parametrize("dtype", thinned([F32, F64]))
def test_at_kappa_one_well_is_zero_and_ill_has_its_pole(dtype):
    exact = 2.5 * jnp.eye(4, dtype=dtype)
    rotated = psd_with_spectrum(jnp.full(4, 2.5, dtype), jax.random.key(10))
    zero = jnp.zeros((3, 3), dtype)
    scalar = jnp.full((1, 1), 2.0, dtype)
    rank_one = jnp.ones((4, 4), dtype)
    value_and_grad = {kind: jax.jit(jax.value_and_grad(fn)) for kind, fn in MATRIX.items()}
    for matrix in (exact, rotated, zero, scalar, rank_one):
        well, well_gradient = value_and_grad["well"](matrix)
        ill, ill_gradient = value_and_grad["ill"](matrix)
        np.testing.assert_allclose(well, 0, atol=20 * jnp.finfo(dtype).eps * 6.25)
        assert ill == np.inf
        assert np.all(np.isfinite(well_gradient))
        np.testing.assert_array_equal(ill_gradient, 0)


def test_one_row_has_kappa_one():
    row = jnp.array([[1.0, -2.0, 0.5]])
    np.testing.assert_allclose(FEATURES["well"](row), 0, atol=1e-14)
    assert FEATURES["ill"](row) == np.inf
    np.testing.assert_array_equal(jax.grad(FEATURES["ill"])(row), 0)
    # Damped, the two values are |x|^2 + lam, once, and lam, twice.
    damped = reference([5.25 + 1.0, 1.0, 1.0], "ill")
    np.testing.assert_allclose(FEATURES["ill"](row, damping=1.0), damped, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("bad", thinned([np.nan, np.inf]))
def test_nan_goes_in_and_comes_out(bad):
    matrix = jnp.eye(3).at[0, 0].set(bad)
    rows = jnp.ones((2, 3)).at[0, 0].set(bad)
    for kind in ("well", "ill"):
        for fn, argument in ((MATRIX[kind], matrix), (FEATURES[kind], rows)):
            value, gradient = jax.jit(jax.value_and_grad(fn))(argument)
            assert np.isnan(value)
            assert np.all(np.isnan(gradient))
    assert np.isnan(BOUND["well"](matrix))
    assert np.isnan(BOUND["ill"](matrix))


def test_small_float32_matrices_do_not_overflow_the_derivative():
    # R_ill ~ 1e24 here, and its square is no float32; the derivative, 1e36, is one.
    values = 1e-12 * np.array([3.0, 2.0, 1.0])
    gradient = GRADIENT["ill"](jnp.diag(jnp.asarray(values, F32)))
    expected = (values * [0, 0, 1] - values / 3) * reference(values, "ill") ** 2
    np.testing.assert_allclose(np.diag(gradient), expected, rtol=1e-5)


@hypothesis.given(values=spectra, scale=st.floats(0.1, 10.0), seed=seeds)
def test_scaling_laws_and_rotation_invariance(values, scale, seed):
    if values[0] / values[-1] < 1.001:
        return
    matrix = jnp.diag(jnp.asarray(values))
    rotated = psd_with_spectrum(values, jax.random.key(seed))
    for kind, power in (("well", 2), ("ill", -2)):
        value = MATRIX[kind](matrix)
        np.testing.assert_allclose(MATRIX[kind](scale * matrix), scale**power * value, rtol=1e-9)
        np.testing.assert_allclose(MATRIX[kind](rotated), value, rtol=1e-8)


@hypothesis.given(values=spectra)
def test_bounds_on_log_kappa(values):
    if values[0] / values[-1] < 1.001:
        return
    matrix, k = jnp.diag(jnp.asarray(values)), values.shape[0]
    log_kappa = np.log(values[0] / values[-1])
    well, ill = MATRIX["well"](matrix), MATRIX["ill"](matrix)
    assert log_kappa <= k / values[-1] ** 2 * well * (1 + 1e-9)
    assert 1 / log_kappa <= values[0] ** 2 * ill * (1 + 1e-9)
    assert well >= 0
    assert ill > 0


def test_the_bounds_need_their_factors_and_ill_does_not_vanish_with_kappa():
    # kappa -> infinity, and R_ill -> 4.
    for e in (1e-2, 1e-4, 1e-6):
        value = reg.ill_conditioning(jnp.diag(jnp.array([1.0, e])))
        np.testing.assert_allclose(value, 4 / (1 - e**2), rtol=1e-12)
    # Without k / s_k^2: log kappa = 4.6, R_well = 0.25.
    assert reg.well_conditioning(jnp.diag(jnp.array([1.0, 0.01]))) < np.log(100.0)
    # Without s_1^2: 1 / log kappa = 0.43, R_ill = 0.0004.
    assert reg.ill_conditioning(jnp.diag(jnp.array([100.0, 10.0]))) < 1 / np.log(10.0)


def log_kappa_of(matrix):
    values = np.linalg.eigvalsh(np.asarray(matrix))
    return np.log(values[-1] / values[0])


def step(theta, covariance, regulariser, size):
    """One step in theta along K^{-1} times the gradient of R(theta^T K theta)."""
    gradient = jax.jit(jax.grad(lambda t: regulariser(t.T @ covariance @ t)))(theta)
    return theta - size * jnp.linalg.solve(covariance, gradient)


separated = spectra.filter(lambda v: v[0] / v[1] > 1.01 and v[-2] / v[-1] > 1.01)


@hypothesis.given(values=separated, fraction=st.sampled_from([0.05, 0.5, 0.99, 1.0]), seed=seeds)
def test_kappa_falls_up_to_the_well_bound(values, fraction, seed):
    hessian = psd_with_spectrum(values, jax.random.key(seed))
    eta = fraction * BOUND["well"](hessian)
    gradient = GRADIENT["well"](hessian)
    factor = np.eye(5) - 2 * eta * gradient
    after = factor @ hessian @ factor
    assert log_kappa_of(after) < log_kappa_of(hessian)
    if fraction == 1.0:  # where the largest meets the second
        top = np.linalg.eigvalsh(np.asarray(after))[-2:]
        np.testing.assert_allclose(top[0], top[1], rtol=1e-7)


@hypothesis.given(values=separated, fraction=st.sampled_from([0.05, 0.5, 0.99]), seed=seeds)
def test_kappa_rises_below_the_ill_bound(values, fraction, seed):
    hessian = psd_with_spectrum(values, jax.random.key(seed))
    eta = fraction * BOUND["ill"](hessian)
    gradient = np.asarray(GRADIENT["ill"](hessian))
    # Eigenvalue by eigenvalue: kappa after the step may pass 1/eps of a formed matrix.
    h, basis = np.linalg.eigh(np.asarray(hessian))
    g = np.diag(basis.T @ gradient @ basis)
    after = h * (1 - 2 * eta * g) ** 2
    assert np.argmin(after) == 0
    assert after.max() / after.min() > h[-1] / h[0]


def test_at_the_ill_bound_the_smallest_value_becomes_zero():
    hessian = psd_with_spectrum(VALUES, jax.random.key(11))
    gradient = GRADIENT["ill"](hessian)
    factor = np.eye(5) - 2 * BOUND["ill"](hessian) * gradient
    np.testing.assert_allclose(np.linalg.eigvalsh(factor @ hessian @ factor)[0], 0, atol=1e-13)


@pytest.mark.parametrize("seed", thinned([0, 1, 2]))
def test_steps_in_theta_with_the_inverse_covariance_move_kappa_the_stated_way(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    covariance = psd_with_spectrum(np.geomspace(5.0, 0.05, 6), keys[0])
    theta = jax.random.normal(keys[1], (6, 4))  # d_in != d
    hessian = theta.T @ covariance @ theta
    for kind, sign in (("well", -1), ("ill", 1)):
        bound = BOUND[kind](hessian)
        moved = step(theta, covariance, MATRIX[kind], 0.9 * bound)
        change = log_kappa_of(moved.T @ covariance @ moved) - log_kappa_of(hessian)
        assert sign * change > 0
        gradient = GRADIENT[kind](hessian)
        exact = theta @ (np.eye(4) - 2 * 0.9 * bound * gradient)
        np.testing.assert_allclose(moved, exact, rtol=1e-8, atol=1e-9)


def published_well_step(values):
    """Theorem 4.3 (1): min{1 / ((1 - 1/d) s_1), (sqrt(s_1 s_2) - s_2) / (2 s_2^2 / d)}."""
    d, s1, s2 = len(values), values[0], values[1]
    return min(1 / ((1 - 1 / d) * s1), (np.sqrt(s1 * s2) - s2) / (2 / d * s2**2))


def published_ill_step(values):
    """Theorem 4.3 (2): D^2 / (1 - 2 s_k / k), as printed."""
    k, smallest = len(values), values[-1]
    return (np.mean(values**2) / 2 - smallest**2 / 2) ** 2 / (1 - 2 * smallest / k)


def kappa_after(values, gradient, eta):
    """kappa after a step; on the diagonal the steps of theta^T K theta are exactly this."""
    after = values * (1 - 2 * eta * gradient) ** 2
    with np.errstate(divide="ignore"):
        return after.max() / after.min()


@pytest.mark.slow
def test_the_published_steps_break_the_statements_and_the_bounds_here_do_not():
    broken = {"well": 0, "ill": 0}
    # One of each kind by hand: s_1 -> 0 midway, and s_k thrown over to the top. Then random ones.
    cases = [np.array([4.0, 0.9]), np.array([1.5] * 19 + [1.05])]
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=(24, 6))
        cases.append(np.linalg.svd(x, compute_uv=False) ** 2 / 24)
    by_hand = {}
    for case, values in enumerate(cases):
        kappa = values[0] / values[-1]
        matrix = jnp.diag(jnp.asarray(values))
        printed = {"well": published_well_step(values), "ill": published_ill_step(values)}
        for kind in ("well", "ill"):
            gradient = np.diag(np.asarray(GRADIENT[kind](matrix)))
            bound = float(BOUND[kind](matrix))
            sign = -1 if kind == "well" else 1
            for fraction in (0.25, 0.5, 0.75, 0.999):
                printed_kappa = kappa_after(values, gradient, fraction * printed[kind])
                broken[kind] += sign * (printed_kappa - kappa) <= 0
                by_hand[case, kind, fraction] = printed_kappa
                if bound > 0:  # it is zero where the largest is tied, as in the second case
                    assert sign * (kappa_after(values, gradient, fraction * bound) - kappa) > 0
    assert broken["well"] >= 20  # about half of the random matrices break it
    assert broken["ill"] >= 1
    assert by_hand[0, "well", 0.5] > 1e6
    assert by_hand[1, "ill", 0.999] < 1.5 / 1.05


def test_the_printed_ill_step_depends_on_units():
    values = np.array([4.0, 3.0, 2.0])
    assert published_ill_step(values) < 0  # s_k > k / 2
    assert published_ill_step(0.01 * values) > 0
    scaled = BOUND["ill"](jnp.diag(jnp.asarray(0.01 * values)))
    plain = BOUND["ill"](jnp.diag(jnp.asarray(values)))
    np.testing.assert_allclose(scaled, 0.01**3 * plain, rtol=1e-10)


def test_step_bounds_at_the_edges():
    tied = jnp.diag(jnp.array([2.0, 2.0, 1.0]))
    assert reg.well_step_bound(tied) == 0
    for flat in (jnp.diag(jnp.array([2.0, 0.0, 0.0])), jnp.zeros((3, 3)), jnp.ones((1, 1))):
        assert reg.well_step_bound(flat) == np.inf
        assert reg.ill_step_bound(flat) == 0
    assert reg.ill_step_bound(3 * jnp.eye(3)) == 0
    # rank: the bounds of the kept part alone.
    part = jnp.diag(jnp.array([3.0, 1.0]))
    whole = jnp.diag(jnp.array([3.0, 1.0, 1e-3]))
    for bound in (reg.well_step_bound, reg.ill_step_bound):
        np.testing.assert_allclose(bound(whole, rank=2), bound(part), rtol=1e-12)
        np.testing.assert_allclose(bound(whole, rtol=1e-2), bound(part), rtol=1e-12)


@pytest.mark.parametrize("check_vma", thinned([True, False]))
def test_jit_vmap_and_shard_map_agree_with_plain_calls(check_vma):
    x = jax.random.normal(jax.random.key(12), (8, 3, 5))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    for kind, fn in (
        ("well", reg.well_conditioning_of_features),
        ("ill", reg.ill_conditioning_of_features),
    ):
        plain = jax.value_and_grad(fn)(x[0])
        jitted = jax.jit(jax.value_and_grad(FEATURES[kind]))
        chex.assert_trees_all_close(jitted(x[0]), plain, rtol=1e-10, atol=1e-12)
        each = [jitted(batch) for batch in x]
        expected = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        batched = jax.vmap(jax.value_and_grad(fn))
        sharded = jax.shard_map(
            batched, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
        )
        chex.assert_trees_all_close(jax.jit(batched)(x), expected, rtol=1e-10, atol=1e-12)
        chex.assert_trees_all_close(jax.jit(sharded)(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", thinned([True, False]))
def test_step_bounds_and_matrices_inside_shard_map(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    shared = psd_with_spectrum(VALUES, jax.random.key(13))  # the same on every device
    each = jnp.stack([scale * shared for scale in range(1, 9)])

    def functions(own):
        h = own[0] + shared
        return tuple(f(h)[None] for f in (*MATRIX.values(), *BOUND.values(), *GRADIENT.values()))

    mapped = jax.shard_map(functions, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    results = jax.jit(mapped)(each)
    for device in (0, 5):
        expected = functions(each[device : device + 1])
        got = jax.tree.map(lambda leaf, device=device: np.asarray(leaf)[[device]], results)
        chex.assert_trees_all_close(got, expected, rtol=1e-10)


def powers_within(array, dtype) -> list[int]:
    """Exponents, the outermost included, that leave every entry a normal number."""
    info = np.finfo(dtype)
    size = np.log2(np.abs(array[array != 0]))
    low, high = int(np.ceil(info.minexp - size.min())), int(np.floor(info.maxexp - 1 - size.max()))
    return sorted({low, low // 2, low // 3, -1, 1, high // 3, high // 2, high})


def same_where_normal(actual, expected, dtype):
    """Equal to the bit where `expected` is a normal number; infinite where it is above them all."""
    info = np.finfo(dtype)
    actual, size = np.asarray(actual), np.abs(expected)
    normal = (size >= float(info.tiny)) & (size <= float(info.max))
    np.testing.assert_array_equal(actual[normal], expected[normal].astype(dtype))
    assert np.all(np.isinf(actual[size > float(info.max)]))
    assert np.all(np.abs(actual[size < float(info.tiny)]) <= info.tiny)


DEGREE = {"well": 2, "ill": -2, "well step": -1, "ill step": 3}


@pytest.mark.parametrize("dtype", thinned([np.float32, np.float64]))
@pytest.mark.parametrize("kind", list(DEGREE))
def test_the_scaling_law_holds_to_the_bit_over_all_normal_numbers(kind, dtype):
    matrix = np.asarray(psd_with_spectrum(VALUES, jax.random.key(14)), dtype)
    matrix = (matrix + matrix.T) / 2
    function = BOUND[kind.split()[0]] if "step" in kind else MATRIX[kind]
    both = jax.jit(jax.value_and_grad(function))
    value, gradient = (np.asarray(part, np.longdouble) for part in both(jnp.asarray(matrix)))
    for power in powers_within(matrix, dtype):
        scaled_value, scaled_gradient = both(jnp.asarray(np.ldexp(matrix, power)))
        same_where_normal(scaled_value, np.ldexp(value, DEGREE[kind] * power), dtype)
        expected = np.ldexp(gradient, (DEGREE[kind] - 1) * power)
        same_where_normal(scaled_gradient, expected, dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"), thinned_rows([((4, 7), np.float32), ((9, 5), np.float64)])
)
@pytest.mark.parametrize("kind", ["well", "ill"])
def test_the_scaling_law_of_damped_features_holds_to_the_bit(kind, shape, dtype):
    x = np.asarray(jax.random.normal(jax.random.key(15), shape), dtype)
    fn = functools.partial(FEATURES[kind], convention="sum")
    both = jax.jit(jax.value_and_grad(lambda x, lam: fn(x, damping=lam), (0, 1)))
    lam = dtype(0.25)
    value, gradients = both(jnp.asarray(x), jnp.asarray(lam))
    value, *gradients = (np.asarray(part, np.longdouble) for part in (value, *gradients))
    for power in [p for p in powers_within(x, dtype) if abs(2 * p) < np.finfo(dtype).maxexp - 4]:
        scaled = jnp.asarray(np.ldexp(x, power)), jnp.asarray(np.ldexp(lam, 2 * power))
        scaled_value, scaled_gradients = both(*scaled)
        degree = 2 * DEGREE[kind]
        same_where_normal(scaled_value, np.ldexp(value, degree * power), dtype)
        for part, expected, unit in zip(scaled_gradients, gradients, (1, 2), strict=True):
            same_where_normal(part, np.ldexp(expected, (degree - unit) * power), dtype)


@pytest.mark.slow
def test_second_derivatives_scale_too():
    matrix = psd_with_spectrum(VALUES, jax.random.key(16)).astype(F32)
    for kind in ("well", "ill"):
        # The plain formula through eigvalsh, which ties alone would spoil.
        exact = jax.jit(jax.hessian(functools.partial(by_autodiff, kind=kind)))
        expected = exact(matrix.astype(F64))
        for second in (jax.jit(jax.jacrev(jax.grad(MATRIX[kind]))),):
            plain = second(matrix)
            np.testing.assert_allclose(plain, expected, atol=1e-4 * np.abs(expected).max())
            for power in (-100, -25, 20, 100) if kind == "well" else (-25, 20):
                scaled = np.ldexp(
                    np.asarray(second(matrix * 2.0**power)), -power * (DEGREE[kind] - 2)
                )
                np.testing.assert_allclose(scaled, plain, atol=1e-5 * np.abs(plain).max())


def test_results_outside_the_dtype_say_so():
    huge = jnp.diag(jnp.array([4.0, 2.0, 1.0], F32)) * 1e10
    np.testing.assert_allclose(BOUND["ill"](huge), 6.75e30, rtol=1e-6)
    x = jax.random.normal(jax.random.key(17), (7, 4))
    for scale in (1e10, 1e9):  # 1e-40 and 1e-36: below the normal numbers, and just within
        value, gradient = jax.value_and_grad(FEATURES["ill"])((x * scale).astype(F32))
        expected = float(FEATURES["ill"](x)) * scale**-4.0
        np.testing.assert_allclose(np.float64(value), expected, rtol=1e-5, atol=2.0**-149)
        assert np.all(gradient == 0)  # 1e-50
    for scale, well, ill in ((1e18, np.inf, 0), (1e-18, 0, np.inf)):
        for damping in (0.0, 1e-30, 1.0):
            rows = (x * scale).astype(F32)
            if scale < 1 and damping:
                continue  # kappa is one within rounding
            assert FEATURES["well"](rows, damping=damping) == well
            assert FEATURES["ill"](rows, damping=damping) == ill
    # 1e-50 is no float32, its derivative 1e-25 is.
    tiny = jnp.diag(jnp.array([3.0, 2.0, 1.0], F32)) * 2.0**-83
    assert MATRIX["well"](tiny) == 0
    np.testing.assert_array_equal(
        GRADIENT["well"](tiny), GRADIENT["well"](tiny * 2.0**83) * 2.0**-83
    )


@pytest.mark.slow
def test_half_precision_is_computed_in_float32():
    for kind, dtype in (("well", jnp.float16), ("ill", jnp.bfloat16)):
        x = jax.random.normal(jax.random.key(18), (9, 5)).astype(dtype)
        hessian = jnp.diag(jnp.array([4.0, 2.0, 1.0], dtype))
        value, gradient = jax.jit(jax.value_and_grad(FEATURES[kind]))(x)
        assert (value.dtype, gradient.dtype) == (F32, dtype)
        assert value == FEATURES[kind](x.astype(F32))
        assert BOUND[kind](hessian).dtype == F32
        np.testing.assert_allclose(MATRIX[kind](hessian), reference([4, 2, 1], kind), rtol=1e-6)


def test_numpy_doubles_are_float32_where_x64_is_off():
    x = np.random.default_rng(0).standard_normal((9, 5))
    with jax.enable_x64(False):
        for kind in ("well", "ill"):
            assert FEATURES[kind](x) == FEATURES[kind](jnp.asarray(x, F32))
            assert MATRIX[kind](x.T @ x) == MATRIX[kind](jnp.asarray(x.T @ x, F32))
            assert BOUND[kind](x.T @ x) == BOUND[kind](jnp.asarray(x.T @ x, F32))
        tall = np.tile(x, (10_000, 1))  # n^2 is no int32
        np.testing.assert_allclose(
            FEATURES["well"](tall, convention="sum"), FEATURES["well"](x) * 9e4**2, rtol=1e-3
        )


def largest_array(jaxpr) -> int:
    """The largest square axis pair in a jaxpr, sub-jaxprs included."""
    found = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            found = max(found, min(shape[-2:]) if len(shape) >= 2 else 0)
        for inner in jex.core.jaxprs_in_params(equation.params):
            found = max(found, largest_array(inner))
    return found


def test_nothing_of_size_d_by_d_is_formed_for_few_rows():
    n, d = 3, 50
    for fn in FEATURES.values():
        gradient = jax.value_and_grad(functools.partial(fn, damping=0.1))
        for shape in ((n, d), (d, n)):
            jaxpr = jax.make_jaxpr(gradient)(jnp.ones(shape)).jaxpr
            assert 0 < largest_array(jaxpr) <= n


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reg.well_conditioning(jnp.ones((2, 3))), "square"),
        (lambda: reg.ill_conditioning(jnp.ones((0, 0))), "non-empty"),
        (lambda: reg.ill_conditioning(jnp.ones((2, 2), jnp.int32)), "float dtype"),
        (lambda: reg.well_step_bound(jnp.ones(4)), "non-empty"),
        (lambda: reg.ill_step_bound(jnp.ones((3, 2))), "square"),
        (lambda: reg.well_conditioning(jnp.eye(2), rtol=0.1, rank=1), "not both"),
        (lambda: reg.well_conditioning(jnp.eye(2), rtol=1.0), "rtol"),
        (lambda: reg.well_conditioning(jnp.eye(2), rank=3), "between 1 and 2"),
        (lambda: reg.well_conditioning_of_features(jnp.ones(3)), "non-empty"),
        (lambda: reg.well_conditioning_of_features(jnp.ones((0, 3))), "non-empty"),
        (lambda: reg.ill_conditioning_of_features(jnp.eye(2), damping=-1.0), "damping"),
        (lambda: reg.ill_conditioning_of_features(jnp.eye(2), damping=np.nan), "damping"),
        (lambda: reg.ill_conditioning_of_features(jnp.eye(2), convention="total"), "convention"),
    ],
)
def test_senseless_input_is_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        call()
