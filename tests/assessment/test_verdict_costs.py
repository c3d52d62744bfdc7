"""What an attacker is charged, and how long it is tried, through the whole protocol."""

import dataclasses

import assessment_worker as worker
import numpy as np
import pytest

from jaximm import assessment
from jaximm.assessment import workers

ROWS = 400  # held out
QUICK = {18: 0.98}
"""Quality from a step on: a cell that is there at 18, and one that ends higher at 63."""
SLOW = {18: 0.6, 63: 1.0}


@pytest.fixture
def made_up(monkeypatch):
    """An attacker of two cells; `curves` by model label, and what was asked of it."""
    asked, curves = [], {}

    def run(subject, attack, *, cells, seeds, split, stops, steps, **_):
        model, shape = subject.model.label, (len(cells), len(seeds))
        at = np.unique([0, *(s for s in (6, 18, 40, 63, 200, 400, 630) if s <= steps), steps])
        asked.append((model, split, len(cells), steps))

        def quality(cell):
            shown = curves[model][int(cell == attack.grid[-1])]
            reached = [max((q for s, q in shown.items() if s <= step), default=0.5) for step in at]
            return np.asarray(reached)

        found = np.stack([np.tile(quality(cell), (len(seeds), 1)) for cell in cells])
        rows = (np.arange(subject.rows.held_out.x.shape[0]) + 0.5) / subject.rows.held_out.x.shape[
            0
        ]
        return {
            "step": at, "setup_flops": 0.0, "step_flops": 1.0, "quality": found, "utility": None,
            "scores": {str(stop): (rows < found[..., stop, None]).astype(float) for stop in stops},
            "utility_scores": {}, "loss": {"start": 1.0, "end": 0.1, "guessing": 1.0},
            "gradient": {"start": 1.0, "end": 0.1, "backbone": 0.1},
            "diverged": np.zeros(shape, bool), "still_falling": np.zeros(shape, bool),
        }  # fmt: skip

    monkeypatch.setattr(workers, "_weights_run", run)
    return asked, curves


ATTACKER = "fine_tune_sgd@learning_rates=1e-3|1e-2"
LEVEL = dataclasses.replace(worker.LEVEL, weight_steps=64, patience=10.0)


def assess(**fields):
    given = worker.bench()
    harmful = given.harmful._replace(held_out=worker.rows(ROWS, 3, 0))
    bench = dataclasses.replace(given, harmful=harmful, benign={}, unseen={})
    none, defended, _ = worker.models()
    level = dataclasses.replace(LEVEL, **fields)
    found = assessment.assess(bench, [none, defended], level=level, attackers=(ATTACKER,))
    rows = {row["model"]: row for row in found["rows"] if row["task"] == "harmful"}
    return found, rows


def test_the_cell_that_gets_there_first_is_charged_not_the_one_that_ends_highest(made_up):
    """63 steps were once quoted where 18 do it."""
    _, curves = made_up
    curves |= {"none": (QUICK, SLOW), "scaled": (QUICK, SLOW)}
    found, rows = assess()
    for row in rows.values():
        assert row["quality"]["mean"] == 1.0
        assert row["hyper_parameters"]["learning_rate"] == 1e-2  # it ends highest
        assert row["flops_to_break"] == 18.0
        assert [cost["flops"] for cost in row["costs"]] == [18.0] * 4
    model = found["models"][1]
    assert model["break_unbounded"]["ratio"] == 1.0


def test_what_is_not_broken_is_tried_for_ten_times_the_undefended_steps(made_up):
    asked, curves = made_up
    curves |= {"none": (QUICK, SLOW), "scaled": ({}, {630: 1.0})}
    _, rows = assess()
    assert rows["none"]["steps"] == 64  # broken: no longer
    assert rows["scaled"]["steps"] == 180  # and not ten times those of another cell
    assert rows["scaled"]["spent"] == pytest.approx(10.0)
    assert rows["scaled"]["flops_to_break"] is None
    assert {steps for model, *_, steps in asked if model == "none"} == {64}
    _, rows = assess(patience=1.0)
    assert (rows["scaled"]["steps"], rows["scaled"]["spent"]) == (64, pytest.approx(64 / 18))


def test_a_late_break_is_found_by_patience(made_up):
    _, curves = made_up
    curves |= {"none": (QUICK, SLOW), "scaled": ({}, {150: 1.0})}
    _, rows = assess()
    assert rows["scaled"]["flops_to_break"] == 180.0  # the recorded point after 150
    _, rows = assess(patience=1.0)
    assert rows["scaled"]["flops_to_break"] is None
