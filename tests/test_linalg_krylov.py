from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaximm import linalg


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


@pytest.mark.parametrize("method", METHODS)
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
