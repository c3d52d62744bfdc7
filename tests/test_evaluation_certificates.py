"""Certificates: no attacker of the class gets below the Krylov floor; the limit as a row."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import attacks, evaluation, result

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
    rows = evaluation.krylov_rows(PROBLEMS)
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
    row = evaluation.limit_certificate(3.5)
    assert row["value"] == 3.5
    assert (row["name"], row["task"], row["backbone"]) == ("rir_limit", "harmful", "after")
    assert "damped" in row["threat_model"]
    assert row["target"] is None
