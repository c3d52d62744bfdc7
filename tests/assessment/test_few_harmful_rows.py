"""How many labelled harmful rows attackers have: the axis that an attacker pays for in labels."""

import dataclasses

import assessment_worker as worker
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import assessment
from jaximm.assessment import golden, suites
from jaximm.types import Batch


def rows_of(bench):
    return {tuple(row) for row in np.asarray(bench.harmful.train.x).tolist()}


def test_fewer_rows_are_among_the_more_and_the_rest_stays():
    bench, _ = golden.problem()
    few, more = (assessment.of_few_harmful_rows(bench, count) for count in (7, 20))
    assert few.harmful.train.x.shape == (7, 6)
    assert rows_of(few) < rows_of(more) < rows_of(bench)
    assert few.name == "golden-7-harmful-rows"
    assert few.harmful.selection is bench.harmful.selection
    assert few.primary is bench.primary
    # Each class comes about equally often, with the label that it had.
    assert sorted(np.bincount(np.asarray(few.harmful.train.y)).tolist()) == [2, 2, 3]
    x, y = map(np.asarray, bench.harmful.train)
    labels = {tuple(row): label for row, label in zip(x.tolist(), y, strict=True)}
    for row, label in zip(*map(np.asarray, more.harmful.train), strict=True):
        assert labels[tuple(row.tolist())] == label


@pytest.mark.parametrize("count", [2, 96, 1000])
def test_what_cannot_be_is_refused(count):
    bench, _ = golden.problem()
    with pytest.raises(ValueError, match=f"must be 3 to 95 of the 96 that golden has.*got {count}"):
        assessment.of_few_harmful_rows(bench, count)


def test_a_suite_fixes_its_rows():
    bench, _ = golden.problem()
    suite = suites.load("linear-1.0")._replace(cases={"golden": suites.fingerprint(bench)})
    with pytest.raises(ValueError, match="no case 'golden-9-harmful-rows'"):
        suites.check(suite, assessment.of_few_harmful_rows(bench, 9))


@pytest.mark.slow
def test_nobody_reads_the_other_rows_and_the_document_says_how_many_there_were():
    bench = worker.bench()
    few = assessment.of_few_harmful_rows(bench, 12)
    x, y = map(np.asarray, bench.harmful.train)
    others = np.array([tuple(row) not in rows_of(few) for row in x.tolist()])
    assert others.sum() == 68
    spoilt = Batch(jnp.where(others[:, None], 1e6, x), jnp.asarray(y))
    other = dataclasses.replace(bench, harmful=bench.harmful._replace(train=spoilt))

    def found(bench):
        return assessment.assess(
            bench,
            worker.models()[:1],
            level=dataclasses.replace(worker.LEVEL, report_seeds=(101, 102)),
            attackers=["ridge", "fine_tune_adam"],
        )

    document = found(few)
    assert document["models"][0]["threat"]["harmful_rows"] == 12
    assert document["rows"] == found(assessment.of_few_harmful_rows(other, 12))["rows"]
