"""What rounding features, as bfloat16 arithmetic does, can do to log kappa: Weyl's bound holds."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import linalg, models
from tests import helpers

KEY = jax.random.key(0)


def log_kappa(x, damping=0.0):
    """log kappa of X^T X + damping I over all d directions, by NumPy in float64."""
    x = np.asarray(x, np.float64)
    sigma = np.linalg.svd(x, compute_uv=False)
    bottom = sigma[-1] if x.shape[0] >= x.shape[1] or damping == 0 else 0.0
    return np.log(sigma[0] ** 2 + damping) - np.log(bottom**2 + damping)


def norm(matrix) -> float:
    """The spectral norm."""
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def bound_of(x, error, damping=0.0):
    x = np.asarray(x, np.float64)
    sigma = np.linalg.svd(x, compute_uv=False)
    empty = damping > 0 and x.shape[0] < x.shape[1]
    return float(
        linalg.log_kappa_shift_bound(
            largest=sigma[0],
            smallest=None if empty else sigma[-1],
            error_norm=norm(error),
            damping=damping,
        )
    )


@hypothesis.given(
    seed=st.integers(0, 10_000),
    size=st.floats(1e-6, 0.3),
    damping=st.sampled_from([0.0, 1e-4, 1e-1]),
    shape=st.sampled_from([(9, 6), (5, 8)]),
)
def test_no_error_moves_log_kappa_by_more(seed, size, damping, shape):
    rng = np.random.default_rng(seed)
    n, d = shape
    left, right = (np.linalg.qr(rng.normal(size=(m, m)))[0] for m in shape)
    k = min(shape)
    x = (left[:, :k] * np.geomspace(1, 0.1, k)) @ right[:, :k].T
    error = rng.normal(size=(n, d))
    error *= size / np.linalg.norm(error, 2)
    shift = abs(log_kappa(x + error, damping) - log_kappa(x, damping))
    assert shift <= bound_of(x, error, damping) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_bound_is_attained(damping, sign):
    """By an error along the two extreme singular vectors, kappa rising or falling."""
    sigma, e = np.array([1.0, 0.5, 0.1]), 0.02
    x, error = np.diag(sigma), np.diag([sign * e, 0.0, -sign * e])
    shift = log_kappa(x + error, damping) - log_kappa(x, damping)
    assert np.sign(shift) == sign
    bounds = [bound_of(x, error, damping), abs(shift)]
    # One of the two signs attains it; the other stays below.
    assert bounds[1] <= bounds[0] * (1 + 1e-12)
    if sign == 1:
        np.testing.assert_allclose(*bounds, rtol=1e-10)
    if damping == 0 and sign == 1:
        closed = 2 * np.log((1 + e / sigma[0]) / (1 - e / sigma[-1]))
        np.testing.assert_allclose(bounds[0], closed, rtol=1e-10)


def test_where_kappa_can_fall_further_than_rise():
    """With damping above the smallest value it is the fall that is the larger."""
    x, error = np.diag([1.0, 1e-6]), np.diag([-0.1, 0.1])
    shift = log_kappa(x + error, 1e-4) - log_kappa(x, 1e-4)
    assert shift < 0
    np.testing.assert_allclose(bound_of(x, error, 1e-4), -shift, rtol=1e-10)


def test_an_error_as_large_as_the_smallest_value_leaves_nothing_to_say():
    options = {"largest": 1.0, "smallest": 0.1}
    assert np.isinf(linalg.log_kappa_shift_bound(**options, error_norm=0.1))
    assert np.isinf(linalg.log_kappa_shift_bound(largest=1.0, smallest=0.0, error_norm=0.0))
    assert np.isfinite(linalg.log_kappa_shift_bound(**options, error_norm=0.5, damping=1e-6))
    assert linalg.log_kappa_shift_bound(**options, error_norm=0.0) == 0
    with pytest.raises(ValueError, match="damping"):
        linalg.log_kappa_shift_bound(largest=1.0, smallest=None, error_norm=0.0)
    with pytest.raises(ValueError, match="damping"):
        linalg.log_kappa_shift_bound(**options, error_norm=0.0, damping=-1.0)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_rounding_to_bfloat16_stays_within_the_a_priori_bound(shape):
    n, d = shape
    x = helpers.matrix_with_spectrum(jnp.geomspace(1.0, 0.05, 12), n, d, KEY)
    rounded = x.astype(jnp.bfloat16).astype(x.dtype)
    error = np.asarray(rounded - x)
    # Rounding to 8 significant bits: |E|_2 <= |E|_F <= 2^-8 |X|_F, whatever X is.
    largest_error = float(2.0**-8 * np.linalg.norm(np.asarray(x)))
    assert norm(error) <= largest_error
    sigma = np.linalg.svd(np.asarray(x), compute_uv=False)
    assert np.isfinite(
        linalg.log_kappa_shift_bound(largest=1.0, smallest=sigma[-1], error_norm=largest_error)
    )
    for damping in (0.0, 1e-3):
        shift = abs(log_kappa(rounded, damping) - log_kappa(x, damping))
        assert 0 < shift <= bound_of(x, error, damping)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_network_in_bfloat16_stays_within_the_bound_of_its_own_error(damping):
    backbone = models.create("mlp", input_shape=(30,), widths=(24, 16), rng_key=KEY)
    inputs = jax.random.normal(jax.random.key(1), (48, 30), jnp.float32)
    exact, coarse = (
        jax.jit(cut.features_fn)(cut.params, inputs)
        for cut in (
            backbone.split_at("*"),
            backbone.split_at("*", compute_dtype=jnp.bfloat16),
        )
    )
    assert exact.dtype == coarse.dtype == jnp.float32
    error = np.asarray(coarse, np.float64) - np.asarray(exact, np.float64)
    assert norm(error) > 1e-4 * norm(exact)
    lam = damping * np.sum(np.asarray(exact, np.float64) ** 2) / exact.shape[1]
    shift = abs(log_kappa(coarse, lam) - log_kappa(exact, lam))
    assert 0 < shift <= bound_of(exact, error, lam) < 1
