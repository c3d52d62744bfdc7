"""Certificates: no attacker of the class gets below the Krylov floor."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import attacks, linalg
from jaximm.measures import certificates
from jaximm.records import result

pytestmark = pytest.mark.heavy

D = 6
SPAN = ("gd", "gd_best_step", "gd_line_search", "heavy_ball", "nesterov", "conjugate_gradients")


def make_problem(seed, spread):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    x = rng.normal(size=(30, D)) * np.geomspace(1.0, spread, D) @ basis
    y = x @ rng.normal(size=D) + rng.normal(size=30)
    return attacks.probe_problem(jnp.asarray(x), jnp.asarray(y))


PROBLEMS = {
    ("primary", "before"): make_problem(0, 0.3),
    ("harmful", "before"): make_problem(1, 0.1),
    ("harmful", "after"): make_problem(2, 0.03),
}


def floors_of(problem):
    return certificates.floors(
        np.asarray(problem.eigenvalues), np.asarray(problem.error_coefficients)
    )


def fits_of(problems, names, *, steps):
    """Steps of each attacker's fastest cell, by attacker and problem."""
    return {
        (name, key): attacks.fit_of(attack, attacks.run_attack(attack, problem, steps=steps))[
            "steps_to_loss_gap"
        ]
        for name, attack in attacks.suite_attacks("quick", names).items()
        for key, problem in problems.items()
    }


@pytest.fixture(scope="module")
def floors():
    return {key: floors_of(problem) for key, problem in PROBLEMS.items()}


def test_one_floor_a_target(floors):
    for found in floors.values():
        assert list(found) == list(result.TARGETS)
        values = list(found.values())
        assert values == sorted(values)
        assert all(type(value) is int and 1 <= value <= D for value in values)
    # Some problem needs more than one step, or the floor would say nothing.
    assert max(value for found in floors.values() for value in found.values()) >= 3


@pytest.mark.slow
def test_no_attacker_in_the_span_of_gradients_is_below_the_floor(floors):
    met = 0
    for (name, key), fit in fits_of(PROBLEMS, SPAN, steps=3000).items():
        for target, steps in fit.items():
            floor = floors[key][target]
            assert steps == -1 or steps >= floor, (name, target)
            met += steps == floor
            if name == "conjugate_gradients":
                assert steps == floor
    assert met > 0  # conjugate gradients is the best of the class: the floor is not idle


def make_several(seed, spread, labels=False):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    x = rng.normal(size=(30, D)) * np.geomspace(1.0, spread, D) @ basis
    y = x @ rng.normal(size=(D, 3)) + rng.normal(size=(30, 3))
    if labels:
        return attacks.probe_problem(x, np.argmax(y, axis=1), classes=3)
    return attacks.probe_problem(x, y)


SEVERAL = {
    ("primary", "before"): make_several(3, 0.3, labels=True),
    ("harmful", "before"): make_several(4, 0.1),
    ("harmful", "after"): make_several(5, 0.03, labels=True),
}


def test_with_several_targets_no_attacker_of_the_class_is_below_the_floor():
    certified = {key: floors_of(problem) for key, problem in SEVERAL.items()}
    assert max(value for found in certified.values() for value in found.values()) >= 3
    names = ("gd", "gd_line_search", "heavy_ball", "conjugate_gradients", "lbfgs")
    for (name, key), fit in fits_of(SEVERAL, names, steps=3000).items():
        for target, steps in fit.items():
            floor = certified[key][target]
            assert steps == -1 or steps >= floor, (name, target)
            if name == "conjugate_gradients":  # one method on all weights: the best
                assert steps == floor


def test_the_floor_of_several_targets_is_that_of_one_polynomial():
    problem = SEVERAL["harmful", "before"]
    h, c = np.asarray(problem.eigenvalues), np.asarray(problem.error_coefficients)
    # min over p(0) = 1 of sum_ij h_i p(h_i)^2 c_ij^2, as a least-squares problem in p.
    for target in result.TARGETS:
        steps = certificates.floors(h, c)[target]
        gaps = []
        for t in (steps - 1, steps):
            weight = np.sqrt(h[:, None] * c**2).ravel()
            powers = np.repeat((h / h[0])[:, None] ** np.arange(1, t + 1), 3, axis=0)
            residual = weight.copy()
            if t:
                design = weight[:, None] * powers
                residual -= design @ np.linalg.lstsq(design, weight, rcond=None)[0]
            gaps.append(residual @ residual / (weight @ weight))
        assert gaps[0] > float(target) >= gaps[1]
    # One polynomial a target does at least as well: another class of attacker, and said so.
    joint = linalg.krylov_certificate(h, np.linalg.norm(c, axis=1), relative_gap=0.0).relative_gap
    loss = np.sum(h[:, None] * c**2, axis=0)
    alone = sum(
        part / loss.sum() * linalg.krylov_certificate(h, column, relative_gap=0.0).relative_gap[2]
        for part, column in zip(loss, c.T, strict=True)
    )
    assert alone < joint[2]


def test_the_floors_are_those_of_one_call_a_target():
    rng = np.random.default_rng(0)
    h = np.geomspace(1e6, 1.0, 120)
    c = rng.normal(size=120) / np.sqrt(h)  # every direction carries as much loss
    found = certificates.floors(h, c)
    expected = {
        target: linalg.krylov_certificate(h, c, relative_gap=float(target)).steps
        for target in result.TARGETS
    }
    assert found == expected
    assert found["1e-3"] > 32  # beyond the first look


def test_an_attacker_outside_the_span_may_be_below(floors):
    fits = fits_of(PROBLEMS, ("ridge",), steps=1)
    assert all(fit["1e-3"] < floors[key]["1e-3"] for (_, key), fit in fits.items())
    assert "not a preconditioner" in certificates.THREAT_MODEL
