"""The inverse covariance on the right side of the gradient, by Cholesky and by Woodbury."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import matrix_with_spectrum, psd_with_spectrum, thinned

from jaximm import preconditioner as pre
from jaximm import regularisers as reg

pytestmark = pytest.mark.heavy

D_IN, D = 6, 4


def covariance(seed=0, kappa=50.0):
    return psd_with_spectrum(np.geomspace(3.0, 3.0 / kappa, D_IN), jax.random.key(seed))


def gradient(seed=1, shape=(D_IN, D)):
    return jax.random.normal(jax.random.key(seed), shape)


def applied(transform, updates):
    return jax.jit(transform.update)(updates, transform.init(updates))[0]


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_left_and_right_are_the_inverse_on_that_side(damping):
    k, g = covariance(), gradient()
    inverse = np.linalg.inv(np.asarray(k) + damping * np.eye(D_IN))
    left = applied(pre.inverse_covariance(k, damping=damping), g)
    np.testing.assert_allclose(left, inverse @ g, rtol=1e-10, atol=1e-12)
    right = applied(pre.inverse_covariance(k, damping=damping, side="right"), g.T)
    np.testing.assert_allclose(right, np.asarray(g).T @ inverse, rtol=1e-10, atol=1e-12)


def test_the_wrong_side_is_an_error_and_a_square_one_differs():
    k = covariance()
    for side, updates in (("left", gradient().T), ("right", gradient())):
        transform = pre.inverse_covariance(k, side=side)
        state = transform.init(updates)
        with pytest.raises(ValueError, match="takes side="):
            transform.update(updates, state)
    square = gradient(shape=(D_IN, D_IN))
    left = applied(pre.inverse_covariance(k), square)
    right = applied(pre.inverse_covariance(k, side="right"), square)
    assert np.abs(left - right).max() > 0.1


@pytest.mark.parametrize("kind", ["well", "ill"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_step_is_exactly_theta_times_one_minus_two_eta_g(kind, side):
    k, theta, eta = covariance(), gradient(2), 0.05
    regulariser = {"well": reg.well_conditioning, "ill": reg.ill_conditioning}[kind]
    hessian = theta.T @ k @ theta
    expected = theta @ (np.eye(D) - 2 * eta * jax.grad(regulariser)(hessian))

    def of_theta(t):
        return regulariser(t.T @ k @ t)

    def of_weights(w):  # w = theta^T
        return regulariser(w @ k @ w.T)

    params, fun = (theta, of_theta) if side == "left" else (theta.T, of_weights)
    optimiser = optax.chain(pre.inverse_covariance(k, side=side), optax.scale(-eta))
    updates, _ = optimiser.update(jax.jit(jax.grad(fun))(params), optimiser.init(params))
    moved = optax.apply_updates(params, updates)
    moved = moved if side == "left" else moved.T
    np.testing.assert_allclose(moved, expected, rtol=1e-9, atol=1e-10)
    plain = theta - eta * jax.grad(of_theta)(theta)
    difference = np.abs(plain - expected).max()
    assert difference > 0.1 * np.abs(expected - theta).max()


@pytest.mark.parametrize(("n", "damping"), [(3, 0.2), (3, 1e-4), (9, 0.0), (9, 0.2), (D_IN, 0.1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_give_the_inverse_of_their_covariance(n, damping, side):
    x = matrix_with_spectrum(np.linspace(2.0, 1.0, min(n, D_IN)), n, D_IN, jax.random.key(3))
    inverse = np.linalg.inv(np.asarray(x.T @ x) / n + damping * np.eye(D_IN))
    g = gradient()
    updates, expected = (g, inverse @ g) if side == "left" else (g.T, g.T @ inverse)
    transform = pre.inverse_covariance_of_rows(x, damping=damping, side=side)
    actual = applied(transform, updates)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11 * scale)
    state = transform.init(updates)
    assert state.factor.shape == ((n, n) if n < D_IN else (D_IN, D_IN))
    assert state.positive_definite


def test_float32_gradients_keep_their_dtype_with_a_float64_covariance():
    g = gradient().astype(jnp.float32)
    result = applied(pre.inverse_covariance(covariance()), g)
    assert result.dtype == jnp.float32
    expected = np.linalg.solve(np.asarray(covariance()), np.asarray(g, np.float64))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    narrow = applied(pre.inverse_covariance(covariance().astype(jnp.float32)), g)
    np.testing.assert_allclose(narrow, expected, rtol=1e-3, atol=1e-3)


def test_every_leaf_of_a_tree_and_the_state_is_constant():
    k = covariance()
    tree = {"a": gradient(4), "b": gradient(5, (D_IN, 2))}
    transform = pre.inverse_covariance(k)
    state = transform.init(tree)
    updates, after = transform.update(tree, state)
    for name, leaf in tree.items():
        np.testing.assert_allclose(updates[name], np.linalg.solve(k, leaf), rtol=1e-9, atol=1e-11)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    np.testing.assert_array_equal(after.factor, state.factor)


def test_one_factorisation_and_none_in_update():
    transform = pre.inverse_covariance(covariance())
    state = transform.init(gradient())
    in_init = str(jax.make_jaxpr(transform.init)(gradient()))
    in_update = str(jax.make_jaxpr(transform.update)(gradient(), state))
    assert in_init.count("cholesky") >= 1
    assert "cholesky" not in in_update


def test_what_is_not_positive_definite_is_reported():
    indefinite = psd_with_spectrum(np.array([2.0, 1.0, 0.5, 0.4, 0.3, -0.2]), jax.random.key(6))
    state = pre.factor_covariance(indefinite)
    assert not state.positive_definite
    assert np.all(np.isnan(pre.apply_inverse(state, gradient())))
    assert pre.factor_covariance(indefinite, damping=0.3).positive_definite
    almost = jnp.array([[1.0, 1.0], [1.0, 1.0 + np.finfo(np.float64).eps]])
    state = pre.factor_covariance(almost)  # a factor exists; its last pivot is rounding
    assert np.all(np.isfinite(state.factor))
    assert not state.positive_definite
    for seed in range(2):  # singular: rounding decides whether a factor exists
        x = jax.random.normal(jax.random.key(seed), (3, D_IN))
        assert not pre.factor_covariance(x.T @ x).positive_definite
    assert not pre.factor_covariance(covariance().at[0, 0].set(np.nan)).positive_definite
    assert pre.factor_covariance(covariance(kappa=1e12)).positive_definite


F32 = jnp.float32


@pytest.mark.parametrize("power", [-100, -40, 122])
def test_the_inverse_scales_to_the_bit_over_the_normal_numbers(power):
    k, g = covariance().astype(F32), gradient().astype(F32)
    factor = jax.jit(pre.factor_covariance)
    plain = factor(k, damping=F32(0.5))
    scaled = factor(k * 2.0**power, damping=F32(0.5 * 2.0**power))
    assert plain.positive_definite
    assert scaled.positive_definite
    np.testing.assert_array_equal(scaled.factor, np.ldexp(np.asarray(plain.factor), power // 2))
    unit = 2.0 ** max(power, 0)  # so that the result is a number
    expected = np.asarray(pre.apply_inverse(plain, g), np.float64) * 2.0**-power * unit
    np.testing.assert_array_equal(pre.apply_inverse(scaled, g * unit), expected.astype(F32))


@pytest.mark.parametrize("n", [3, 9])
def test_rows_whose_covariance_is_no_float32(n):
    x, g = jax.random.normal(jax.random.key(7), (n, D_IN)), gradient()
    damping = 0.1 if n < D_IN else 0.0
    state = pre.factor_rows((x * 1e25).astype(F32), damping=damping)
    assert state.positive_definite or n < D_IN
    actual = pre.apply_inverse(state, (g * 1e20).astype(F32))
    if n < D_IN:  # 1e50 in the rows' space, the damping outside: the projection, over the damping
        projection = np.eye(D_IN) - np.linalg.pinv(np.asarray(x)) @ np.asarray(x)
        expected = projection @ np.asarray(g) * 1e20 / damping
    else:
        expected = np.linalg.solve(np.asarray(x.T @ x) / n, np.asarray(g)) * 1e-30
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_half_gradients_keep_their_dtype_and_half_rows_compute_in_float32():
    x = jax.random.normal(jax.random.key(8), (9, D_IN)).astype(jnp.bfloat16)
    state = pre.factor_rows(x)
    assert state.factor.dtype == F32
    g = gradient().astype(jnp.float16)
    result = pre.apply_inverse(state, g)
    assert result.dtype == jnp.float16
    exact = np.asarray(x, np.float64)
    expected = np.linalg.solve(exact.T @ exact / 9, np.asarray(g, np.float64))
    np.testing.assert_allclose(result, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", thinned([True, False]))
def test_inside_shard_map(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    x, g = jax.random.normal(jax.random.key(9), (8, 3, D_IN)), gradient()

    def own(rows):
        return pre.apply_inverse(pre.factor_rows(rows[0], damping=0.2), g)[None]

    mapped = jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    expected = [own(rows[None])[0] for rows in x[:2]]
    np.testing.assert_allclose(jax.jit(mapped)(x)[:2], np.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pre.inverse_covariance(jnp.ones((2, 3))), "square"),
        (lambda: pre.factor_covariance(jnp.ones((2, 3))), "square"),
        (lambda: pre.inverse_covariance(jnp.ones(3)), "non-empty"),
        (lambda: pre.inverse_covariance(jnp.ones((2, 2), int)), "float dtype"),
        (lambda: pre.inverse_covariance(jnp.eye(2), damping=-1.0), "damping"),
        (lambda: pre.inverse_covariance(jnp.eye(2), damping=np.inf), "damping"),
        (lambda: pre.inverse_covariance(jnp.eye(2), side="top"), "side"),
        (lambda: pre.inverse_covariance_of_rows(jnp.ones((2, 3))), "singular"),
        (lambda: pre.inverse_covariance_of_rows(jnp.ones((2, 3)), damping=-1.0), "damping"),
        (lambda: pre.factor_rows(jnp.ones((2, 3)), damping=0.0), "singular"),
        (lambda: pre.factor_rows(jnp.ones((0, 3))), "non-empty"),
        (
            lambda: pre.apply_inverse(pre.factor_covariance(jnp.eye(2)), jnp.eye(2), side="up"),
            "side",
        ),
        (lambda: pre.apply_inverse(pre.factor_covariance(jnp.eye(2)), jnp.ones(2)), "shape"),
    ],
)
def test_senseless_input_is_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        call()
