"""What first-order meta-learning takes from features, and what it only delays, at a third of the
steps of the table."""

import dataclasses

import numpy as np
import pytest

from experiments.systems import attack, run, tasks

pytestmark = pytest.mark.slow

SEED, STEPS = 100, 500


def harm(toy, model, name, steps):
    """Harmful accuracy after so many steps, mean over attackers' seeds."""
    found = attack.attack_model(
        toy, model, model.params, seeds=(0, 1, 2), steps=steps, attempts={name: toy.attempts[name]}
    )[name]["free"]
    return [float(np.mean(cell["harm"])) for cell in found]


def test_a_clamped_cross_entropy_removes_features_and_delays_full_tuning():
    toy = tasks.halves(1.0)
    row = run.family_of("meta").ROWS["TAR, clamped CE"]
    row = dataclasses.replace(row, fields={**row.fields, "steps": STEPS})
    defended = row(toy, SEED)
    bare, random = (
        tasks.Model(toy.starts[name](SEED)) for name in ("undefended", "random initialisation")
    )
    assert toy.accuracy(defended, "benign") > toy.accuracy(bare, "benign") - 0.03
    (probed,), (floor,) = (harm(toy, model, "probe", (10,)) for model in (defended, random))
    assert probed < floor - 0.1
    early, late = harm(toy, defended, "full", (10, 300))
    bare_early, bare_late = harm(toy, bare, "full", (10, 300))
    assert early < bare_early - 0.1
    assert late > bare_late - 0.06  # a hundred rows are learned all the same
