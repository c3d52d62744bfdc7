"""Certificates: no attacker of the class gets below the Krylov floor; the limit as a row."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import attacks, linalg, measures
from jaximm.measures import certificates
from jaximm.records import result

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


@pytest.fixture(scope="module")
def floors():
    rows = measures.krylov_rows(PROBLEMS)
    return {(row["task"], row["backbone"], row["target"].split()[-1]): row for row in rows}


def test_one_row_a_problem_and_target(floors):
    assert set(floors) == {(*key, target) for key in PROBLEMS for target in result.TARGETS}
    for row in floors.values():
        assert row["name"] == "krylov_floor"
        assert row["unit"] == "steps"
        assert type(row["value"]) is int
        assert 1 <= row["value"] <= D
    for key in PROBLEMS:
        values = [floors[(*key, target)]["value"] for target in result.TARGETS]
        assert values == sorted(values)
    # Some problem needs more than one step, or the floor would say nothing.
    assert max(row["value"] for row in floors.values()) >= 3


def test_no_attacker_in_the_span_of_gradients_is_below_the_floor(floors):
    rows = attacks.run_suite(PROBLEMS, attacks.suite_attacks("quick", SPAN), steps=3000)
    assert {row["attacker"] for row in rows} == set(SPAN)
    met = 0
    for row in rows:
        for target in result.TARGETS:
            steps = row["steps_to_loss_gap"][target]
            floor = floors[row["task"], row["backbone"], target]["value"]
            assert steps == -1 or steps >= floor, (row["attacker"], target)
            met += steps == floor
    assert met > 0  # conjugate gradients is the best of the class: the floor is not idle
    exact = [row for row in rows if row["attacker"] == "conjugate_gradients"]
    for row in exact:
        for target in result.TARGETS:
            floor = floors[row["task"], row["backbone"], target]["value"]
            assert row["steps_to_loss_gap"][target] == floor


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
    certified = measures.krylov_rows(SEVERAL)
    assert all("all targets together" in row["threat_model"] for row in certified)
    floors = {
        (row["task"], row["backbone"], row["target"].split()[-1]): row["value"] for row in certified
    }
    assert max(floors.values()) >= 3
    names = ("gd", "gd_line_search", "heavy_ball", "conjugate_gradients", "lbfgs")
    rows = attacks.run_suite(SEVERAL, attacks.suite_attacks("quick", names), steps=3000)
    assert {row["attacker"] for row in rows} == set(names)
    for row in rows:
        for target in result.TARGETS:
            steps, floor = (
                row["steps_to_loss_gap"][target],
                floors[row["task"], row["backbone"], target],
            )
            assert steps == -1 or steps >= floor, (row["attacker"], target)
            if row["attacker"] == "conjugate_gradients":  # one method on all weights: the best
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
    rows = attacks.run_suite(PROBLEMS, attacks.suite_attacks("quick", ("ridge",)), steps=1)
    below = [
        row["steps_to_loss_gap"]["1e-3"] < floors[row["task"], row["backbone"], "1e-3"]["value"]
        for row in rows
    ]
    assert all(below)
    text = next(iter(floors.values()))["threat_model"]
    assert "not a preconditioner" in text


def test_the_limit_as_a_certificate():
    row = measures.limit_certificate(3.5)
    assert row["value"] == 3.5
    assert (row["name"], row["task"], row["backbone"]) == ("rir_limit", "harmful", "after")
    assert "damped" in row["threat_model"]
    assert row["target"] is None
