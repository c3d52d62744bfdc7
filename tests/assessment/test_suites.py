"""Suites with a name: what they hold fixed, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaximm import assessment, attacks
from jaximm.assessment import golden, suites
from jaximm.carriers import MissingCarrierError
from jaximm.run import CASES, load_experiment, prepare
from jaximm.run.assess import bench_of_tasks

NAMES = suites.names()


def test_each_has_its_cases_and_a_golden_problem():
    assert NAMES == ["linear-1.0", "vision-1.0"]
    for name in NAMES:
        assert suites.load(name).cases.keys() == CASES[name].keys()
        assert golden.problem(name)[0].harmful.classes == 3
        for case, experiment in CASES[name].items():
            assert load_experiment(f"{name}:{case}") is experiment
    with pytest.raises(ValueError, match=r"'sound-1\.0' is of no modality.*\['linear', 'vision'\]"):
        golden.problem("sound-1.0")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_cases_are_those_that_the_name_was_given_for(name):
    for config in CASES[name].values():
        try:
            prepared = prepare(config)
        except MissingCarrierError as error:
            pytest.skip(str(error))
        suites.check(suites.load(name), bench_of_tasks(prepared))


@pytest.mark.parametrize("name", NAMES)
def test_this_version_asks_of_attackers_what_the_suite_does(name):
    suite = suites.load(name)
    assert suites.differences(suite) == []
    assert suite.golden.keys() == suite.attackers.keys()
    assert suite.seeds >= 3


@pytest.mark.heavy
def test_some_attackers_reach_what_they_did_when_the_name_was_given():
    suite = suites.load("linear-1.0")
    labels = ["ridge", "gd"]  # one of weights takes all the time; the slow suite has them
    assert golden.differences(suite, labels) == []
    wrong = suite._replace(golden={**suite.golden, "gd": suite.golden["gd"] - 0.1})
    (told,) = golden.differences(wrong, ["gd"])
    assert told.startswith("gd: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_attacker_reaches_what_it_did_when_the_name_was_given(name):
    assert golden.differences(suites.load(name)) == []


@pytest.mark.slow
def test_figures_of_images_are_those_of_float32_too():
    """By the three whose figures differ most between float64 and float32, of all 46."""
    with jax.enable_x64(False):
        bench, _ = golden.problem("vision-1.0")
        assert bench.harmful.train.x.dtype == jnp.float32
        suite = suites.load("vision-1.0")
        assert golden.differences(suite, ["adam", "nesterov", "tapped_head"]) == []


def changed(suite, **fields):
    attacker = {**suite.attackers["adam"], **fields}
    return suite._replace(attackers={**suite.attackers, "adam": attacker})


def test_another_budget_grid_or_attacker_is_another_suite():
    suite = suites.load("linear-1.0")
    (steps,) = suites.differences(changed(suite, steps=7))
    assert steps.startswith("adam: 7 steps in linear-1.0, ")
    (grid,) = suites.differences(changed(suite, grid=[]))
    assert grid.startswith("adam: a grid of 0 cells in linear-1.0, of ")
    gone = suite._replace(attackers={**suite.attackers, "of_old": {"steps": 1, "grid": []}})
    assert "of_old" in suites.differences(gone)[0]
    bench, _ = golden.problem()
    with pytest.raises(ValueError, match=r"not those of linear-1\.0 \(adam: 7 steps"):
        suites.check(changed(suite, steps=7), bench)


def test_rows_of_a_suite_are_told_from_others():
    bench, _ = golden.problem()
    suite = suites.load("linear-1.0")
    with pytest.raises(ValueError, match=r"no case 'golden', it has \['house_price'"):
        suites.check(suite, bench)
    suite = suite._replace(cases={"golden": suites.fingerprint(bench)})
    suites.check(suite, bench)

    def other(**changes):
        train = bench.harmful.train._replace(**changes)
        harmful = bench.harmful._replace(train=train)
        return dataclasses.replace(bench, harmful=harmful)

    x, y = bench.harmful.train
    for bad in (other(x=x[::-1], y=y[::-1]), other(y=jnp.roll(y, 1)), other(x=x * 1.001),
                other(x=x[1:], y=y[1:])):  # fmt: skip
        with pytest.raises(ValueError, match="golden, harmful, train: rows are not those of"):
            suites.check(suite, bad)


def test_a_suite_brings_its_attackers():
    bench, model = golden.problem()
    with pytest.raises(ValueError, match="names its attackers"):
        assessment.assess(bench, [model], level="linear-1.0", attackers=["ridge"])
    with pytest.raises(ValueError, match=r"or a suite: \['linear-1\.0', 'vision-1\.0'\]"):
        assessment.assess(bench, [model], level="linear-9.9")
    with pytest.raises(ValueError, match=r"unknown suite 'linear-9.9'"):
        suites.load("linear-9.9")


def test_a_table_goes_with_any_case_at_a_rate():
    found = suites.table("jaximm-28@rate=0.01")
    assert found is not None
    level, labels = found
    assert (level.weight_steps, level.batch_size, len(set(labels))) == (500, 128, 25)
    assert attacks.make_attack(labels[1]).grid[0]["learning_rate"] == 0.01
    with pytest.raises(ValueError, match=r"say jaximm-28@rate=1e-3, got 'jaximm-28'"):
        suites.table("jaximm-28")
    with pytest.raises(ValueError, match="rate must be finite and > 0, got -1"):
        suites.table("jaximm-28@rate=-1")
    bench, model = golden.problem()
    with pytest.raises(ValueError, match="names its attackers"):
        assessment.assess(bench, [model], level="jaximm-28@rate=0.01", attackers=["ridge"])
