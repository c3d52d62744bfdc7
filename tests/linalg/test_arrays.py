import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaximm import hessians, linalg, regularisers
from jaximm.linalg.arrays import as_float, as_square


@pytest.mark.parametrize("dtype", [">f4", ">f8"])
def test_both_byte_orders_give_the_same_bits(dtype):
    stored = np.random.default_rng(0).normal(size=(8, 8)).astype(dtype)
    native = stored.astype(stored.dtype.newbyteorder("="))
    for function in (
        lambda x: linalg.feature_condition_number(x).log_kappa,
        lambda x: linalg.singular_extremes(x).smallest,
        hessians.l2_probe_hessian,
        regularisers.well_conditioning,
    ):
        np.testing.assert_array_equal(function(stored), function(native))


@pytest.mark.parametrize("came", [np.ones((2, 2), int), [[1.0]], None, np.ones((2, 2), complex)])
def test_what_is_no_float_array_is_named(came):
    with pytest.raises(ValueError, match="hessian must be an array of float dtype, got"):
        as_float(came, name="hessian")


def test_a_square_says_what_shape_came():
    with pytest.raises(ValueError, match=r"gram must be square \(d, d\), got shape \(2, 3\)"):
        as_square(jnp.ones((2, 3)), name="gram")


def _traces(call):
    """How often JAX traces or compiles while `call` runs."""
    found = []

    def listen(event, duration, **_):
        found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(call())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return sum("trace" in event or "compile" in event for event in found)


@pytest.mark.parametrize("x64", [True, False])
def test_a_second_call_with_plain_arrays_traces_nothing(x64):
    x = np.random.default_rng(0).normal(size=(8, 8))
    calls = (
        lambda: linalg.condition_number(x),
        lambda: linalg.feature_condition_number(x),
        lambda: linalg.singular_extremes(x),
        lambda: hessians.l2_probe_hessian(x, damping=0.1),
        lambda: regularisers.ill_conditioning_of_features(x),
    )
    with jax.enable_x64(x64):
        for call in calls:
            jax.block_until_ready(call())
            assert _traces(call) == 0
        assert _traces(lambda: linalg.feature_condition_number(x, rtol=0.01)) > 0


@pytest.mark.parametrize("wrong", ["much", -1.0, float("nan"), np.float64(-1.0)])
def test_a_damping_that_is_none_is_refused_whatever_it_is(wrong):
    with pytest.raises((ValueError, TypeError)):
        linalg.feature_condition_number(np.ones((3, 2)), damping=wrong)


@pytest.mark.parametrize("dtype", [np.longdouble, ml_dtypes.float8_e4m3fn])
def test_floats_that_jax_cannot_compute_in_are_taken(dtype):
    stored = np.array([[2.0, 0.5], [0.25, 1.0]]).astype(dtype)
    plain = stored.astype(np.float64 if dtype == np.longdouble else np.float32)
    for function in (hessians.l2_probe_hessian, regularisers.well_conditioning):
        found = function(stored)
        np.testing.assert_array_equal(found, function(plain))
        assert found.dtype == plain.dtype


X = np.eye(3)
KEY = jax.random.key(0)
OF_RESULTS = {
    "log_pencil_condition": lambda x: linalg.log_pencil_condition(x),
    "rir_limit": lambda x: linalg.rir_limit(x, log_kappa_primary=0.0, log_kappa_harmful=0.0),
    "limit_backbone": lambda x: linalg.limit_backbone(x, log_kappa_primary=0.0, t=0.5),
    "linear_eraser": lambda x: linalg.linear_eraser(x),
    "apply_eraser": lambda x: linalg.apply_eraser(x, X),
    "erasure_cost": lambda x: linalg.erasure_cost(x, linalg.label_moments(X, X[:, :1])),
    "merge_moments": lambda x: linalg.merge_moments(x, x),
    "log_ratio": lambda x: linalg.log_ratio(after=x, before=x),
    "gram_update": lambda x: hessians.gram_update(x, X),
    "gram_merge": lambda x: hessians.gram_merge(x, x),
    "gram_finalise": lambda x: hessians.gram_finalise(x),
    "psum_gram": lambda x: hessians.psum_gram(x, "rows"),
}
OF_FUNCTIONS = {
    "krylov_extremes": lambda f: linalg.krylov_extremes(f, 3, KEY),
    "damped_operator_extremes": lambda f: linalg.damped_operator_extremes(f, 3, KEY, damping=0.1),
    "operator_condition_number": lambda f: linalg.operator_condition_number(f, 3, KEY),
    "dominant_vector": lambda f: linalg.dominant_vector(
        f, 3, KEY, steps=3, residual_rtol=0.1, dtype=np.float64
    ),
    "conjugate_gradient_inverse": lambda f: linalg.conjugate_gradient_inverse(f),
    "dense_hessian": lambda f: hessians.dense_hessian(f),
    "hvp": lambda f: hessians.hvp(f, X),
    "gauss_newton_operator": lambda f: hessians.gauss_newton_operator(f, f, X),
    "flatten_operator": lambda f: hessians.flatten_operator(f, X),
}


@pytest.mark.parametrize("name", OF_RESULTS)
def test_what_takes_another_functions_result_refuses_an_array(name):
    with pytest.raises(ValueError, match=r"must be a \w+, as .* gives, got (an array|ndarray)"):
        OF_RESULTS[name](X)


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_what_takes_a_function_refuses_a_matrix(name):
    with pytest.raises(ValueError, match="must be a function, got ndarray"):
        OF_FUNCTIONS[name](X)


OF_KEYS = {
    "krylov_extremes": lambda key: linalg.krylov_extremes(lambda v: v, 3, key),
    "inverse_krylov_extremes": lambda key: linalg.inverse_krylov_extremes(X, key),
    "damped_operator_extremes": lambda key: linalg.damped_operator_extremes(
        lambda v: v, 3, key, damping=0.1
    ),
    "operator_condition_number": lambda key: linalg.operator_condition_number(lambda v: v, 3, key),
}


@pytest.mark.parametrize("name", OF_KEYS)
def test_what_draws_refuses_a_seed(name):
    with pytest.raises(ValueError, match=r"rng_key must be a key, as .* gives, got int"):
        OF_KEYS[name](0)


def test_what_is_spread_over_a_mesh_refuses_another_thing():
    with pytest.raises(ValueError, match=r"mesh must be a jax\.sharding\.Mesh, got int"):
        hessians.sharded_l2_probe_operator(X, 8, rows="data")
