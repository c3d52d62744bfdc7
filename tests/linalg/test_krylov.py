from fractions import Fraction

import helpers
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaximm import linalg

pytestmark = pytest.mark.heavy


def exact_gaps(h, c, steps):
    """Relative loss gaps of exact conjugate gradients, in rational arithmetic."""
    h = [Fraction(v) for v in h]
    error = [Fraction(v) for v in c]
    first = sum(a * e * e for a, e in zip(h, error, strict=True))
    gaps, residual = [1.0], [-a * e for a, e in zip(h, error, strict=True)]
    direction = list(residual)
    for _ in range(steps):
        squared = sum(r * r for r in residual)
        if squared == 0:
            gaps.append(0.0)
            continue
        curved = [a * p for a, p in zip(h, direction, strict=True)]
        alpha = squared / sum(p * q for p, q in zip(direction, curved, strict=True))
        error = [e + alpha * p for e, p in zip(error, direction, strict=True)]
        residual = [r - alpha * q for r, q in zip(residual, curved, strict=True)]
        beta = sum(r * r for r in residual) / squared
        direction = [r + beta * p for r, p in zip(residual, direction, strict=True)]
        gaps.append(float(sum(a * e * e for a, e in zip(h, error, strict=True)) / first))
    return np.array(gaps)


def iterates(method, h, c, steps):
    """Relative loss gaps of a Krylov-span method on the quadratic with minimum 0."""
    w, before, momentum = c.copy(), c.copy(), np.zeros_like(c)
    top, bottom = h.max(), h.min()
    root = np.sqrt(bottom / top)
    rate = (1 - root) / (1 + root)
    residual = -h * w
    direction = residual.copy()
    gaps = [1.0]
    for t in range(steps):
        if method == "gradient_descent":
            w = w - h * w / top
        elif method == "best_step":
            w = w - 2 / (top + bottom) * h * w
        elif method == "line_search":
            g = h * w
            w = w - (g @ g) / (g @ (h * g) + 1e-300) * g
        elif method == "chebyshev_schedule":
            node = np.cos(np.pi * (2 * (t % steps) + 1) / (2 * steps))
            w = w - h * w / ((top + bottom) / 2 + (top - bottom) / 2 * node)
        elif method == "heavy_ball":
            momentum = rate**2 * momentum - 4 / (np.sqrt(top) + np.sqrt(bottom)) ** 2 * h * w
            w = w + momentum
        elif method == "nesterov":
            ahead = w + rate * (w - before)
            before, w = w, ahead - h * ahead / top
        else:
            squared = residual @ residual
            alpha = squared / (direction @ (h * direction) + 1e-300)
            w = w + alpha * direction
            residual = residual - alpha * h * direction
            direction = residual + (residual @ residual) / (squared + 1e-300) * direction
        gaps.append((h @ w**2) / (h @ c**2))
    return np.array(gaps)


METHODS = [
    "gradient_descent",
    "best_step",
    "line_search",
    "chebyshev_schedule",
    "heavy_ball",
    "nesterov",
    "conjugate_gradients",
]


@given(
    seed=st.integers(0, 10_000),
    exponent=st.floats(0.0, 8.0),
    d=st.integers(1, 8),
    cluster=st.booleans(),
)
def test_never_above_exact_conjugate_gradients(seed, exponent, d, cluster):
    rng = np.random.default_rng(seed)
    h = 10.0 ** -(exponent * rng.random(d))
    if cluster:  # repeated and nearly repeated eigenvalues
        h[: d // 2] = h[0]
        h[d // 2 :] = h[-1] * (1 + 1e-13 * np.arange(d - d // 2))
    c = rng.standard_normal(d) * 10.0 ** rng.uniform(-3, 3, d)
    truth = exact_gaps(h, c, d)
    found = linalg.krylov_certificate(h, c, relative_gap=1e-6)
    computed = found.relative_gap
    assert np.all(computed <= truth[: len(computed)] * (1 + 1e-15))
    # And not idle: where the truth is above the noise, the floor is close to it.
    visible = truth[: len(computed)] > 1e-12
    assert np.all(computed[visible] >= 0.999 * truth[: len(computed)][visible])
    for gap in [0.5, 1e-2, 1e-6, 0.0]:
        steps = linalg.krylov_certificate(h, c, relative_gap=gap).steps
        assert 0 <= steps <= int(np.flatnonzero(truth <= gap)[0])


@pytest.mark.parametrize("method", helpers.thinned(METHODS, keep=3))
@given(seed=st.integers(0, 10_000), exponent=st.floats(0.0, 4.0), d=st.integers(2, 40))
def test_no_krylov_method_beats_the_floor(method, seed, exponent, d):
    rng = np.random.default_rng(seed)
    h = 10.0 ** -(exponent * rng.random(d))
    c = rng.standard_normal(d)
    gaps = iterates(method, h, c, 60)
    floor = linalg.krylov_certificate(h, c, relative_gap=0.0).relative_gap
    shared = min(len(gaps), len(floor))
    # 1e-14: where a method's own loss is rounding noise of its iterates.
    assert np.all(gaps[:shared] >= floor[:shared] - 1e-14)
    for target in [1e-1, 1e-3, 1e-6]:
        reached = np.flatnonzero(gaps <= target)
        if reached.size:
            steps = linalg.krylov_certificate(h, c, relative_gap=target).steps
            assert 0 <= steps <= reached[0]


@pytest.mark.parametrize(("kappa", "order"), [(1e2, 24), (1e4, 161), (1e6, 1079)])
def test_log_uniform_spectra_at_d_200(kappa, order):
    rng = np.random.default_rng(0)
    h = np.exp(rng.uniform(-np.log(kappa), 0, 200))
    c = rng.standard_normal(200)
    found = linalg.krylov_certificate(h, c, relative_gap=1e-6)
    gaps = iterates("conjugate_gradients", h, c, 6 * order)
    practical = int(np.flatnonzero(gaps <= 1e-6)[0])
    assert found.steps <= practical <= 200 * 6
    assert found.steps >= 0.3 * min(order, 200)  # the same order of magnitude, capped by d
    assert found.steps <= 200


def test_counts_distinct_eigenvalues_and_ignores_empty_directions():
    h = np.array([1.0, 1.0, 2.0, 5.0, 0.0])
    c = np.array([1.0, -2.0, 1.0, 0.0, 3.0])
    found = linalg.krylov_certificate(h, c, relative_gap=0.0)
    assert found.steps == 2
    assert len(found.relative_gap) == 3
    one = linalg.krylov_certificate(np.ones(4), np.ones(4), relative_gap=1e-9)
    assert one.steps == 1


def test_first_step_is_the_closed_form():
    h, c = np.array([1.0, 3.0]), np.array([2.0, 1.0])
    energy = h * c**2
    # min over a of sum energy (1 - a h)^2
    best = energy.sum() - (energy @ h) ** 2 / (energy @ h**2)
    found = linalg.krylov_certificate(h, c, relative_gap=0.1, max_steps=1)
    np.testing.assert_allclose(found.relative_gap[1], best / energy.sum(), rtol=1e-8)


def test_cap_and_trivial_targets():
    h = np.geomspace(1e-4, 1, 50)
    capped = linalg.krylov_certificate(h, np.ones(50), relative_gap=1e-12, max_steps=3)
    assert capped.steps == -1
    assert capped.relative_gap.shape == (4,)
    assert np.all(np.diff(capped.relative_gap) < 0)
    assert linalg.krylov_certificate(h, np.ones(50), relative_gap=1.0).steps == 0
    assert linalg.krylov_certificate(h, np.zeros(50), relative_gap=0.0).steps == 0


def test_bad_input_is_refused_at_the_door():
    ones = np.ones(3)
    for h, c, options, message in [
        (ones, np.ones(2), {"relative_gap": 0.1}, "one length"),
        (np.array([1.0, -0.5, 1.0]), ones, {"relative_gap": 0.1}, ">= 0"),
        (np.array([1.0, np.nan, 1.0]), ones, {"relative_gap": 0.1}, "finite"),
        (ones, ones, {"relative_gap": -1.0}, "relative_gap"),
        (ones, ones, {"relative_gap": 0.1, "max_steps": -1}, "max_steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            linalg.krylov_certificate(h, c, **options)


CLUSTERED = np.r_[1 + 1e-7 * np.linspace(-1, 1, 12), 1e-9 * (1 + 1e-7 * np.linspace(-1, 1, 12))]


def precise_gaps(h, c, steps):
    """Relative loss gaps of conjugate gradients in 400 digits, as mpmath numbers."""
    with mpmath.workdps(400):
        h, error = ([mpmath.mpf(float(v)) for v in values] for values in (h, c))
        first = mpmath.fsum(a * e * e for a, e in zip(h, error, strict=True))
        gaps, residual = [mpmath.mpf(1)], [-a * e for a, e in zip(h, error, strict=True)]
        direction, squared = list(residual), mpmath.fsum(r * r for r in residual)
        for _ in range(steps):
            curved = [a * p for a, p in zip(h, direction, strict=True)]
            alpha = squared / mpmath.fdot(direction, curved)
            error = [e + alpha * p for e, p in zip(error, direction, strict=True)]
            residual = [r - alpha * q for r, q in zip(residual, curved, strict=True)]
            before, squared = squared, mpmath.fsum(r * r for r in residual)
            direction = [r + squared / before * p for r, p in zip(residual, direction, strict=True)]
            gaps.append(mpmath.fsum(a * e * e for a, e in zip(h, error, strict=True)) / first)
        return gaps


def spectra(rng, d):
    """Clusters of every width, tiny gaps, and plain ones."""
    width = 10.0 ** -rng.uniform(3, 15)
    centre = 10.0 ** -rng.uniform(0, 12)
    yield np.r_[1 + width * rng.random(d // 2), centre * (1 + width * rng.random(d - d // 2))]
    yield np.r_[1 + width * rng.random(d // 2), centre + width * rng.random(d - d // 2)]
    yield np.repeat(10.0 ** -rng.uniform(0, 10, d // 4), 4) * (1 + width * rng.random(4 * (d // 4)))
    yield 10.0 ** -rng.uniform(0, 14, d)
    yield 1 + 2.0**-52 * np.arange(d)


def check_floor(h, c, d):
    """Below the truth at every step, and no idle bound where float64 can show it."""
    found = linalg.krylov_certificate(h, c, relative_gap=0.0)
    floor, truth = found.relative_gap, precise_gaps(h, c, d - 1)
    for t in range(1, min(len(floor), d)):
        assert float(floor[t]) < truth[t]
        if truth[t] > 1e-280:
            assert float(floor[t]) > truth[t] * (1 - 1e-9)
            steps = linalg.krylov_certificate(h, c, relative_gap=float(truth[t])).steps
            assert steps <= t
    assert found.slack < 1e-9


def test_clusters_are_no_reason_for_a_step_too_many():
    c = 1 / CLUSTERED
    check_floor(CLUSTERED, c, 24)
    truth = precise_gaps(CLUSTERED, c, 12)
    for t in (6, 10, 12):  # targets just reached by exact conjugate gradients
        target = float(truth[t] * (1 + mpmath.mpf(10) ** -15))
        assert linalg.krylov_certificate(CLUSTERED, c, relative_gap=target).steps <= t


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 60), marks=pytest.mark.slow)])
def test_never_above_conjugate_gradients_in_400_digits(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        d = int(rng.integers(8, 20))
        for h in spectra(rng, d):
            distinct = len(np.unique(h))
            error = rng.standard_normal(h.size) * 10.0 ** rng.uniform(-4, 4, h.size)
            for c in (error, 1 / h):
                check_floor(h, c, distinct)


def test_integers_and_other_dtypes():
    c = np.array([1, 2, 1])
    truth = linalg.krylov_certificate([1.0, 2.0, 4.0], c.astype(float), relative_gap=0.0)
    for dtype in (np.int64, np.uint8, np.float16, np.float32, np.longdouble):
        h = np.array([1, 2, 4], dtype)
        found = linalg.krylov_certificate(h, c, relative_gap=0.0)
        np.testing.assert_array_equal(found.relative_gap, truth.relative_gap)
    half = jnp.array([1, 2, 4], jnp.bfloat16)
    assert linalg.krylov_certificate(half, c, relative_gap=0.0).steps == 3
    for h in (np.array([1, 2j, 4]), np.array(["a", "b", "c"]), np.array([True, False, True])):
        with pytest.raises(ValueError, match="real numbers"):
            linalg.krylov_certificate(h, c, relative_gap=0.0)


@given(exponent=st.integers(-900, 900), other=st.integers(-900, 900))
def test_scales_of_spectrum_and_error_do_not_matter(exponent, other):
    h, c = np.geomspace(1e-3, 1, 6), np.arange(1.0, 7)
    plain = linalg.krylov_certificate(h, c, relative_gap=0.0)
    scaled = linalg.krylov_certificate(h * 2.0**exponent, c * 2.0**other, relative_gap=0.0)
    np.testing.assert_allclose(scaled.relative_gap, plain.relative_gap, rtol=1e-12)
    assert scaled.steps == plain.steps
