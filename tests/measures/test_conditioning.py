"""Kappas on every footing against NumPy, and the ratios, bounds and limit built from them."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import thinned_rows
from hypothesis import strategies as st

from jaximm import measures
from jaximm.immunisers.problem import relative_damping, triangle
from jaximm.linalg import DOMINANCE
from jaximm.linalg.condition import feature_condition_number
from jaximm.measures import TaskRows
from jaximm.measures.conditioning import PSEUDO_INVERSE_RTOL, REFERENCE_DAMPING
from jaximm.records import result

pytestmark = pytest.mark.heavy

DAMPING = 1e-3
SHAPES = [(30, 6), (40, 9)]


def make_x(seed, n, d, spread=0.1):
    rng = np.random.default_rng([seed, n, d])
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return rng.normal(size=(n, d)) * np.geomspace(1.0, spread, d) @ basis


def make_theta(seed, d, spread=0.2):
    rng = np.random.default_rng([seed, d])
    left, right = (np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2))
    return left * np.geomspace(1.0, spread, d) @ right


def rows_of(x, relative=DAMPING):
    x = jnp.asarray(x)
    return TaskRows(x, relative_damping(x, relative))


def conditioning(primary, harmful, theta):
    """Of a table: before is the identity."""
    return measures.conditioning(
        measures.Tasks(measures.kappas(primary), measures.kappas(harmful)),
        measures.Tasks(measures.kappas(primary, theta), measures.kappas(harmful, theta)),
        limit=float(measures.log_rir_limit(primary, harmful)),
        dampings=(primary.damping, harmful.damping),
        dtype=str(theta.dtype),
    )


def lam_of(x, relative=DAMPING):
    n, d = x.shape
    return relative * np.trace(x.T @ x / n) / d


def log_kappa_damped(x, theta, lam):
    """Of theta^T (K + lam I) theta: the damping comes before theta."""
    n, d = x.shape
    factor = np.concatenate([x / np.sqrt(n), np.sqrt(lam) * np.eye(d)])
    values = np.linalg.svd(factor @ theta, compute_uv=False)
    return 2 * np.log(values[0] / values[-1])


def log_kappa_plain(x, theta):
    values = np.linalg.svd(x @ theta, compute_uv=False)
    kept = values[values > PSEUDO_INVERSE_RTOL * values[0]]
    return 2 * np.log(kept[0] / kept[-1]), len(kept)


def log_kappa_reference(x, theta):
    h = np.linalg.eigvalsh(theta.T @ (x.T @ x / len(x)) @ theta)
    return np.log((h[-1] + 1e-6) / (max(h[0], 0) + 1e-6))


def log_kappa_shipped(x, theta):
    """Damped by the same part of the features' own mean eigenvalue."""
    h = theta.T @ (x.T @ x / len(x)) @ theta
    part = lam_of(x) / np.mean(x**2)
    return np.log(np.linalg.cond(h + part * np.trace(h) / len(h) * np.eye(len(h))))


def log_rir_limit(x_p, x_h):
    d = x_p.shape[1]
    k_p, k_h = (x.T @ x / len(x) + lam_of(x) * np.eye(d) for x in (x_p, x_h))
    m = np.linalg.eigvals(np.linalg.solve(k_p, k_h)).real
    return np.log(m.max() / m.min() * np.linalg.cond(k_p) / np.linalg.cond(k_h))


@pytest.mark.parametrize(("n", "d"), thinned_rows(SHAPES))
def test_kappas_agree_with_numpy(n, d):
    x, theta = make_x(0, n, d), make_theta(1, d)
    found = measures.kappas(rows_of(x), jnp.asarray(theta))
    lam = lam_of(x)
    np.testing.assert_allclose(found.damped.log_kappa, log_kappa_damped(x, theta, lam), rtol=1e-10)
    # Damping after theta is another number: the test would see the difference.
    after = np.linalg.cond(theta.T @ (x.T @ x / n) @ theta + lam * np.eye(d))
    assert abs(np.log(after) - float(found.damped.log_kappa)) > 1e-3
    plain, rank = log_kappa_plain(x, theta)
    np.testing.assert_allclose(found.pseudo_inverse.log_kappa, plain, rtol=1e-10)
    assert int(found.pseudo_inverse.rank) == int(found.damped.rank) == rank == d
    np.testing.assert_allclose(found.reference.log_kappa, log_kappa_reference(x, theta), rtol=1e-8)
    np.testing.assert_allclose(found.shipped.log_kappa, log_kappa_shipped(x, theta), rtol=1e-9)
    damped = theta.T @ (x.T @ x / n + lam * np.eye(d)) @ theta
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(damped)[::-1], rtol=1e-9)
    for condition in found[:4]:
        assert float(condition.lower) <= float(condition.log_kappa) <= float(condition.upper)
        assert float(condition.upper - condition.lower) < 1e-6
    assert DOMINANCE[int(found.damped.dominated_by)] == "none"


@pytest.mark.parametrize("case", ["rank", "wide"])
def test_rank_deficient_rows_are_flagged_as_damping(case):
    d = 6
    x = make_x(3, 30, d)
    if case == "rank":
        x[:, 2] = x[:, 5]  # one direction without data
        rank = d - 1
    else:
        x, rank = x[:4], 4
    theta = make_theta(2, d)
    found = measures.kappas(rows_of(x), jnp.asarray(theta))
    assert DOMINANCE[int(found.damped.dominated_by)] == "damping"
    assert int(found.damped.rank) == int(found.pseudo_inverse.rank) == rank
    lam = lam_of(x)
    np.testing.assert_allclose(found.damped.log_kappa, log_kappa_damped(x, theta, lam), rtol=1e-9)
    assert math.isfinite(float(found.damped.upper))
    plain, _ = log_kappa_plain(x, theta)
    np.testing.assert_allclose(found.pseudo_inverse.log_kappa, plain, rtol=1e-9)
    # On a singular H the reference footing measures the largest eigenvalue over 1e-6.
    largest = np.linalg.norm(x @ theta, 2) ** 2 / len(x)
    np.testing.assert_allclose(
        found.reference.log_kappa, np.log((largest + 1e-6) / 1e-6), rtol=1e-4
    )


def test_small_but_non_zero_directions_are_damping_too():
    x = make_x(4, 30, 6, spread=1e-3)  # smallest eigenvalue about 1e-6 of the largest: below lam
    found = measures.kappas(rows_of(x), jnp.eye(6))
    assert int(found.damped.rank) == 6
    assert DOMINANCE[int(found.damped.dominated_by)] == "damping"


def test_a_kappa_beyond_the_dtype_is_rounding():
    x = make_x(5, 30, 6)
    theta = make_theta(6, 6, spread=1e-17)
    found = measures.kappas(rows_of(x), jnp.asarray(theta))
    assert DOMINANCE[int(found.damped.dominated_by)] == "rounding"
    assert math.isinf(float(found.damped.upper))


@pytest.mark.parametrize(("n", "d"), [(30, 6), (4, 6)])
def test_rows_hang_together(n, d):
    x_p, x_h, theta = make_x(7, n, d), make_x(8, n, d), make_theta(9, d)
    primary, harmful = rows_of(x_p), rows_of(x_h)
    found = conditioning(primary, harmful, jnp.asarray(theta))
    assert set(found.rows) == set(measures.DEFINITIONS) == set(result.FOOTINGS)
    inputs = {"primary": x_p, "harmful": x_h}
    truth = {
        "damped": lambda x, w: log_kappa_damped(x, w, lam_of(x)),
        "shipped": log_kappa_shipped,
        "pseudo_inverse": lambda x, w: log_kappa_plain(x, w)[0],
        "reference": log_kappa_reference,
    }
    for footing, row in found.rows.items():
        logs = {}
        for task, x in inputs.items():
            for when, weights in (("before", np.eye(d)), ("after", theta)):
                logs[task, when] = row[task][when]["log_kappa"]
                # eigvalsh of a formed, singular H is good to 1e-10 beside 1e-6.
                tolerance = 1e-3 if footing == "reference" and n < d else 1e-8
                expected = truth[footing](x, weights)
                np.testing.assert_allclose(logs[task, when], expected, rtol=tolerance)
                assert row[task][when]["dtype"] == "float64"
            ratio = row[f"log_ratio_{task}"]
            assert math.isclose(ratio, logs[task, "after"] - logs[task, "before"], abs_tol=1e-12)
        expected = row["log_ratio_harmful"] - row["log_ratio_primary"]
        assert math.isclose(row["log_rir"], expected, abs_tol=1e-12)
        assert row["log_rir_lower"] <= row["log_rir"] <= row["log_rir_upper"]
        assert row["definition"] == measures.DEFINITIONS[footing]
    row = found.rows["damped"]
    np.testing.assert_allclose(row["log_rir_limit"], log_rir_limit(x_p, x_h), rtol=1e-9)
    assert math.isclose(row["log_fraction"], row["log_rir"] / row["log_rir_limit"])
    np.testing.assert_allclose(row["damping_primary"], lam_of(x_p))
    np.testing.assert_allclose(row["damping_harmful"], lam_of(x_h))
    assert found.rows["shipped"]["damping_primary"] is None  # one a side
    reference, plain = found.rows["reference"], found.rows["pseudo_inverse"]
    assert reference["damping_primary"] == reference["damping_harmful"] == REFERENCE_DAMPING
    assert plain["damping_primary"] == plain["damping_harmful"] == 0
    for other in (plain, reference):
        assert other["log_rir_limit"] is other["log_fraction"] is None
    for task, x in inputs.items():
        gram = x.T @ x / len(x) + lam_of(x) * np.eye(d)
        for when, weights in (("before", np.eye(d)), ("after", theta)):
            values = np.linalg.eigvalsh(weights.T @ gram @ weights)[::-1]
            np.testing.assert_allclose(found.spectra[task][when], values, rtol=1e-7)


def test_the_identity_leaves_every_ratio_at_one():
    d = 6
    primary, harmful = rows_of(make_x(10, 30, d)), rows_of(make_x(11, 30, d))
    found = conditioning(primary, harmful, jnp.eye(d))
    for row in found.rows.values():
        assert row["log_rir"] == row["log_ratio_harmful"] == row["log_ratio_primary"] == 0
        assert row["primary"]["before"] == row["primary"]["after"]
    assert found.spectra["harmful"]["before"] == found.spectra["harmful"]["after"]


def test_tasks_of_one_gram_matrix_have_no_limit_and_no_fraction():
    rows, theta = rows_of(make_x(12, 30, 6)), jnp.asarray(make_theta(13, 6))
    row = conditioning(rows, rows, theta).rows["damped"]
    assert abs(row["log_rir"]) < 1e-12
    assert abs(row["log_rir_limit"]) < 1e-9
    assert row["log_fraction"] is None
    assert abs(row["log_ratio_primary"]) > 0.1  # the tasks moved, together


@hypothesis.given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.01, 1.0),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_no_backbone_exceeds_the_limit(seed, spread, scale):
    d = 6
    primary, harmful = rows_of(make_x(seed, 30, d)), rows_of(make_x(seed + 1, 30, d))
    theta = scale * jnp.asarray(make_theta(seed, d, spread))
    row = conditioning(primary, harmful, theta).rows["damped"]
    assert row["log_rir"] <= row["log_rir_limit"] + 1e-8
    assert row["log_fraction"] <= 1 + 1e-8


def test_the_limit_is_that_of_the_pencil_and_is_attained():
    d = 6
    x_p, x_h = make_x(20, 30, d), make_x(21, 30, d)
    primary, harmful = rows_of(x_p), rows_of(x_h)
    limit = float(measures.log_rir_limit(primary, harmful))
    np.testing.assert_allclose(limit, log_rir_limit(x_p, x_h), rtol=1e-9)
    k_p, k_h = (x.T @ x / len(x) + lam_of(x) * np.eye(d) for x in (x_p, x_h))
    h, u = np.linalg.eigh(k_p)
    whiten = u / np.sqrt(h) @ u.T
    vectors = np.linalg.eigh(whiten @ k_h @ whiten)[1][:, ::-1]
    best = jnp.asarray(whiten @ vectors * np.geomspace(1.0, 0.1, d))
    row = conditioning(primary, harmful, best).rows["damped"]
    assert row["log_fraction"] > 1 - 1e-9


def test_what_a_run_logs_is_the_truth_of_the_factors():
    d = 6
    x_p, x_h, theta = make_x(30, 30, d), make_x(31, 4, d), make_theta(32, d)
    factors = [triangle(rows.x, rows.damping) for rows in (rows_of(x_p), rows_of(x_h))]
    logged = measures.log_kappas(*factors, jnp.asarray(theta))
    for task, x in (("primary", x_p), ("harmful", x_h)):
        hessian = theta.T @ (x.T @ x / len(x) + lam_of(x) * np.eye(d)) @ theta
        np.testing.assert_allclose(
            logged[f"log_kappa_{task}"], log_kappa_damped(x, theta, lam_of(x)), rtol=1e-10
        )
        assert int(logged[f"rank_{task}"]) == d  # damped, so of full rank
        np.testing.assert_allclose(logged[f"scale_{task}"], np.trace(hessian) / d, rtol=1e-10)
    flat = theta.copy()
    flat[:, -1] = flat[:, 0]
    assert int(measures.log_kappas(*factors, jnp.asarray(flat))["rank_primary"]) == d - 1


@pytest.mark.slow
def test_float32_says_so_and_uses_its_own_tolerance():
    x, theta = make_x(40, 30, 6), make_theta(41, 6)
    wide = conditioning(rows_of(x), rows_of(make_x(42, 30, 6)), jnp.asarray(theta))
    with jax.enable_x64(False):
        narrow = conditioning(
            rows_of(x.astype(np.float32)),
            rows_of(make_x(42, 30, 6).astype(np.float32)),
            jnp.asarray(theta, jnp.float32),
        )
    row, expected = narrow.rows["damped"], wide.rows["damped"]
    for task in ("primary", "harmful"):
        for when in ("before", "after"):
            assert row[task][when]["dtype"] == "float32"
            truth = expected[task][when]["log_kappa"]
            assert row[task][when]["lower"] <= truth <= row[task][when]["upper"]
    np.testing.assert_allclose(row["log_rir"], expected["log_rir"], atol=1e-4)
    kappa = narrow.rows["pseudo_inverse"]["primary"]["after"]
    largest = np.linalg.norm(x @ theta, 2)
    np.testing.assert_allclose(kappa["tolerance"], 64 * 2.0**-23 * largest, rtol=1e-4)


def test_the_triangle_is_as_accurate_as_the_tall_factor():
    """kappa(theta) of 1e8 after QR of the damped rows: the same as from the rows themselves."""
    x, theta = make_x(50, 30, 6), make_theta(51, 6, spread=1e-4)
    found = measures.kappas(rows_of(x), jnp.asarray(theta)).damped
    tall = np.concatenate([x / np.sqrt(30), np.sqrt(lam_of(x)) * np.eye(6)])
    direct = feature_condition_number(jnp.asarray(tall @ theta), rtol=0.0)
    np.testing.assert_allclose(found.log_kappa, direct.log_kappa, rtol=1e-9)


def test_features_that_are_literally_zero_are_no_features():
    x, theta = make_x(0, 40, 9), make_theta(0, 9)
    kept = [0, 1, 3, 4, 5, 6, 8]
    zeroed = np.zeros_like(theta)
    zeroed[:, kept] = theta[:, kept]
    bias = jnp.zeros(9).at[0].set(2.0)
    rows = rows_of(x)
    found = measures.kappas(rows, *measures.without_zeros(jnp.asarray(zeroed), bias))
    expected = measures.kappas(rows, jnp.asarray(theta[:, kept]), bias[jnp.asarray(kept)])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert DOMINANCE[int(found.damped.dominated_by)] != "rounding"
    assert np.isfinite(found.damped.upper)
