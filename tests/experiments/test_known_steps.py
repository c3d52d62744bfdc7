"""Step counts that are known: against NumPy's own where it is exact, and in order elsewhere."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from jaximm import attacks, linalg

pytestmark = pytest.mark.heavy

FOLDER = Path(__file__).parents[2] / "experiments" / "known_steps"


def load_script():
    spec = importlib.util.spec_from_file_location("known_steps_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
KNOWN = [("geometric", kappa) for kappa in script.KAPPAS] + [("log-uniform", 1e4)]


@functools.cache
def known(spectrum, kappa, seed=0):
    return script.make_known(spectrum, kappa, seed)


SCALES = (0.5, 0.9, 0.97, 1.0)


@functools.cache
def descent(spectrum, kappa):
    """Runs of descent with the steps of SCALES, in units of 2 / (h_max + h_min)."""
    return attacks.run_attack(
        attacks.make_attack("gd_best_step"),
        known(spectrum, kappa).problem,
        [{"step_scale": scale} for scale in SCALES],
        steps=10**8,
    )


@functools.cache
def count(attacker, spectrum, kappa):
    return script.count(attacker, known(spectrum, kappa).problem)


def spectral(problem):
    """Eigenvalues and error coefficients in NumPy's long double."""
    return (
        np.asarray(problem.eigenvalues).astype(np.longdouble),
        np.asarray(problem.error_coefficients).astype(np.longdouble),
    )


def descent_steps(h, c, step_size, target, weights):
    """Least t with sum weights c^2 (1 - eta h)^{2 t} <= target sum weights c^2, by bisection."""
    factors = np.abs(1 - step_size * h)
    assert np.all(factors <= 1)  # so that the sum falls with t
    energy = weights * c**2

    def small(t):
        return np.sum(energy * factors ** np.longdouble(2 * t)) <= target * np.sum(energy)

    low, high = 0, 1  # small(high) in the end, not small(low)
    while not small(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if small(middle) else (middle, high)
    return high


def exact_conjugate_gradients(h, c, steps):
    """Squared parameter error and excess loss, relative, after each step in exact arithmetic.

    Conjugate directions in long double, each made conjugate to all before it, twice.
    """
    error, directions, products = c.copy(), [], []
    errors, gaps = [np.sum(error**2)], [np.sum(h * error**2)]
    for _ in range(steps):
        gradient = h * error
        direction = gradient.copy()
        for _ in range(2):
            for old, product in zip(directions, products, strict=True):
                direction = direction - (direction @ product) * old
        length = np.sqrt(np.sum(h * direction**2))
        direction = direction / length
        directions.append(direction)
        products.append(h * direction)
        error = error - (gradient @ direction) * direction
        errors.append(np.sum(error**2))
        gaps.append(np.sum(h * error**2))
    return np.array(errors) / errors[0], np.array(gaps) / gaps[0]


def first(values, target):
    return int(np.flatnonzero(values <= target)[0])


@pytest.mark.parametrize(("spectrum", "kappa"), KNOWN)
def test_the_spectrum_is_the_one_asked_for(spectrum, kappa):
    made = known(spectrum, kappa)
    assert made.problem.features.shape == (1000, 200)
    np.testing.assert_allclose(made.problem.eigenvalues, made.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(made.problem.optimum, made.optimum, rtol=1e-8, atol=1e-9)
    assert made.eigenvalues[0] / made.eigenvalues[-1] == pytest.approx(kappa)


@pytest.mark.parametrize(("spectrum", "kappa"), KNOWN)
def test_descent_takes_exactly_the_steps_that_numpy_counts(spectrum, kappa):
    problem = known(spectrum, kappa).problem
    h, c = spectral(problem)
    trace = descent(spectrum, kappa)
    for cell, scale in enumerate(SCALES):
        step_size = np.longdouble(scale) * 2 / (h[0] + h[-1])
        for index, target in enumerate(attacks.TARGETS):
            found = int(trace.steps_to_parameter_error[cell, 0, index])
            assert found == descent_steps(h, c, step_size, target**2, np.ones_like(h))
            found = int(trace.steps_to_loss_gap[cell, 0, index])
            assert found == descent_steps(h, c, step_size, target, h)


@pytest.mark.parametrize("kappa", script.KAPPAS)
def test_descent_from_the_spectrum_asked_for_alone(kappa):
    """The same count without the library's SVD: eigenvalues and axes as the problem was made."""
    made = known("geometric", kappa)
    h = made.eigenvalues.astype(np.longdouble)
    # The random axes, drawn again.
    rng = np.random.default_rng(0)
    rng.normal(size=(script.N, script.D))
    right = np.linalg.qr(rng.normal(size=(script.D, script.D)))[0]
    c = (right.T @ made.optimum).astype(np.longdouble)
    expected = descent_steps(h, c, 2 / (h[0] + h[-1]), 1e-4, np.ones_like(h))
    cell = SCALES.index(1.0)
    found = int(descent("geometric", kappa).steps_to_parameter_error[cell, 0, script.GOAL])
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=0)
    if kappa < 1e6:
        assert found == expected


@pytest.mark.parametrize(("spectrum", "kappa"), KNOWN)
def test_conjugate_gradients_take_exactly_the_steps_of_the_certificate(spectrum, kappa):
    problem = known(spectrum, kappa).problem
    h, c = spectral(problem)
    _, gaps = exact_conjugate_gradients(h, c, 40)
    trace = attacks.run_attack(attacks.make_attack("conjugate_gradients"), problem, steps=4_000)
    for index, target in enumerate(attacks.TARGETS):
        floor = linalg.krylov_certificate(h, c, relative_gap=target, max_steps=64).steps
        assert floor == first(gaps, target)
        found = int(trace.steps_to_loss_gap[0, 0, index])
        if kappa == 1e6 and target == 1e-3:  # after 30 steps rounding may cost one more
            assert floor <= found <= floor + 1
        else:
            assert found == floor


@pytest.mark.parametrize("kappa", script.KAPPAS)
def test_parameter_error_of_conjugate_gradients_and_what_rounding_adds(kappa):
    h, c = spectral(known("geometric", kappa).problem)
    errors, _ = exact_conjugate_gradients(h, c, script.D)
    assert errors[-1] < 1e-16  # d steps solve it in exact arithmetic
    exact, found = first(errors, 1e-4), count("conjugate_gradients", "geometric", kappa).error
    assert exact <= script.D
    if kappa == 1e2:
        assert found == exact
    else:  # directions lose their conjugacy in float64: steps are lost, more so for larger kappa
        assert exact < found < 8 * exact


@pytest.mark.parametrize(("spectrum", "kappa"), KNOWN)
def test_whitening_and_the_closed_form_take_one_step(spectrum, kappa):
    problem = known(spectrum, kappa).problem
    for attacker in ("whitened_gd", "ridge"):
        assert count(attacker, spectrum, kappa) == (1, 1)
        trace = attacks.run_attack(
            attacks.make_attack(attacker),
            problem,
            script.cells(attacker),
            steps=script.STEPS[attacker],
        )
        assert float(trace.final_relative_parameter_error[0, 0]) < 1e-8


@pytest.mark.parametrize(("spectrum", "kappa"), KNOWN)
def test_of_the_order_of_the_figures_quoted(spectrum, kappa):
    descent, conjugate = script.QUOTED[kappa]
    found = count("gd_best_step", spectrum, kappa).error
    if kappa == 1e6:
        assert found > descent  # quoted as "more than"
    else:
        assert 0.5 < found / descent < 2
    assert 0.5 < count("conjugate_gradients", spectrum, kappa).error / conjugate < 2


def test_descent_needs_kappa_and_conjugate_gradients_its_root():
    steps = {
        name: [count(name, "geometric", kappa).error for kappa in script.KAPPAS]
        for name in ("gd_best_step", "conjugate_gradients")
    }
    for low, high in zip(steps["gd_best_step"], steps["gd_best_step"][1:], strict=False):
        assert 70 < high / low < 130  # kappa: 100
    for low, high in zip(
        steps["conjugate_gradients"], steps["conjugate_gradients"][1:], strict=False
    ):
        assert 4 < high / low < 10  # root of kappa: 10
    # The excess loss sees little of it: small eigenvalues carry little loss.
    losses = [count("gd_best_step", "geometric", kappa).loss for kappa in script.KAPPAS]
    assert losses[-1] < 5 * losses[0]


def test_the_readme_has_the_table_that_the_script_prints():
    recorded = (FOLDER / "README.md").read_text().splitlines()
    printed = script.table(["geometric"], [0]).splitlines()
    assert printed[:2] == [line for line in recorded if line in printed[:2]]
    for line in printed[2:]:
        same = [row for row in recorded if row.startswith("|".join(line.split("|")[:4]))]
        assert len(same) == 1
        for new, old in zip(line.split("|")[4:-1], same[0].split("|")[4:-1], strict=True):
            new, old = new.strip().replace(",", ""), old.strip().replace(",", "")
            if new.isdigit():  # conjugate gradients' last steps are rounding, and may differ
                np.testing.assert_allclose(int(new), int(old), rtol=0.02)
            else:
                assert new == old
