"""Attackers who have some of the labelled harmful rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import assessment, attacks
from jaximm.assessment.runners import Subject
from jaximm.report import page
from jaximm.types import Batch
from tests import assessment_worker as worker

N, K = 30, 5


def _rows(n, seed):
    x = jax.random.normal(jax.random.key(seed), (n, 4), jnp.float32)
    return Batch(x, (x[:, 0] > 0).astype(jnp.int32))


def _problem(train):
    params = {"blocks.0.kernel": jnp.eye(4, 3, dtype=jnp.float32)}
    return attacks.FineTuneProblem(
        features_fn=_features, params=params, head=attacks.zero_head(3, 2, jnp.float32),
        train=train, selection=None, measured=jax.tree.map(lambda leaf: leaf[:20], train),
        held_out=_rows(12, 2), benign=attacks.Benign(
            head=attacks.zero_head(3, 2, jnp.float32), train=_rows(16, 3), held_out=_rows(8, 4)),
    )  # fmt: skip


def _features(params, x):
    return x @ params["blocks.0.kernel"]


def _poisoned(rows, kept):
    x = np.full_like(rows.x, np.nan)
    x[kept] = rows.x[kept]
    return rows._replace(x=x)


NAMES = [
    "fine_tune_adam",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("solved_head", "probe_then_fine_tune", "mixed_loss", "tapped_head")),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_its_own_rows_and_no_others(name):
    train = _rows(N, 1)
    attack = attacks.make_attack(f"{name}@harmful_rows={K}")
    kept = attack.rows_of(N)
    assert len(kept) == K
    options = {"steps": 6, "batch_size": 8, "record": 4}
    clean = attacks.run_fine_tune(attack, _problem(train), attack.grid[:1], **options)
    other = attacks.run_fine_tune(
        attack, _problem(_poisoned(train, kept)), attack.grid[:1], **options
    )
    assert np.isfinite(clean.train_loss).all()
    jax.tree.map(np.testing.assert_array_equal, clean._asdict(), other._asdict())
    whole = attacks.run_fine_tune(attacks.make_attack(name), _problem(train), attack.grid[:1],
                                  **options)  # fmt: skip
    assert not np.array_equal(whole.train_loss, clean.train_loss)


@pytest.mark.parametrize("rows", [N, pytest.param(10 * N, marks=pytest.mark.slow)])
def test_all_rows_are_those_of_an_attacker_without_a_budget(rows):
    problem, options = _problem(_rows(N, 1)), {"steps": 6, "batch_size": 8, "record": 4}
    found, plain = (
        attacks.run_fine_tune(attacks.make_attack(label), problem, **options)
        for label in (f"fine_tune_adam@harmful_rows={rows}", "fine_tune_adam")
    )
    jax.tree.map(np.testing.assert_array_equal, found._asdict(), plain._asdict())
    train = _rows(N, 1)
    probe = attacks.probe_problem(train.x, train.y, classes=2)
    found, plain = (
        attacks.run_attack(attacks.make_attack(label), probe, steps=5)
        for label in (f"gd@harmful_rows={rows}", "gd")
    )
    jax.tree.map(np.testing.assert_array_equal, found._asdict(), plain._asdict())


def test_a_probe_fits_its_rows():
    x, y = _rows(N, 1)
    attack = attacks.make_attack("ridge", harmful_rows=K, rows_seed=3)
    kept = attack.rows_of(N)
    found = attacks.run_attack(attack, attacks.probe_problem(x, y, classes=2), steps=1)
    few = attacks.probe_problem(x[kept], y[kept], classes=2)
    plain = attacks.run_attack(attacks.make_attack("ridge"), few, steps=1)
    np.testing.assert_array_equal(found.weights, plain.weights)
    moments = attacks.probe_problem(x[:6], y[:6], classes=2, n_rows=N)
    with pytest.raises(ValueError, match="5 of 30 rows cannot be told apart"):
        attacks.run_attack(attack, moments, steps=1)


def test_a_probe_of_an_assessment_takes_no_other_rows_through_the_model():
    bench, (model, *_) = worker.bench(), worker.models()
    attack = attacks.make_attack("ridge@harmful_rows=7")
    kept = attack.rows_of(80)
    train = _poisoned(bench.harmful.train, kept)
    bench = dataclasses.replace(bench, harmful=bench.harmful._replace(train=train))
    problem, flops = Subject(bench, model, "harmful").probe_of(attack)
    assert np.isfinite(problem.features).all()
    assert flops == pytest.approx(Subject(bench, model, "harmful").feature_flops * 7 / 80)


def test_refused_budgets():
    for label in ("ridge@harmful_rows=0", "lora@harmful_rows=2.5", "lora@harmful_rows=4|16"):
        with pytest.raises(ValueError, match=r"harmful_rows: expected whole numbers in \[1, inf\)"):
            attacks.make_attack(label)


def _assessed(*attackers):
    return assessment.assess(
        worker.bench(), worker.models()[:2], level=worker.LEVEL, attackers=attackers
    )


def _table(document, label):
    rows = (row for row in document["rows"] if row["attacker"] == label)
    keys = ("hyper_parameters", "quality", "utility", "by_seed", "step_flops", "setup_flops")
    return {(row["model"], row["task"]): [row[key] for key in keys] for row in rows}


@pytest.mark.slow
def test_attackers_of_several_budgets_in_one_assessment():
    names = ("ridge", "fine_tune_adam")
    few, most = ([f"{name}@harmful_rows={rows}" for name in names] for rows in (6, 10**6))
    plain, several = _assessed(*names), _assessed(*few, *most)
    for name, little, all_of_them in zip(names, few, most, strict=True):
        assert _table(several, all_of_them) == _table(plain, name)
        assert _table(several, little)["none", "harmful"] != _table(plain, name)["none", "harmful"]
        for task in ("benign:primary", "benign:other"):  # whose rows are no harmful ones
            key = "none", task
            assert _table(several, little).get(key) == _table(plain, name).get(key)
    assert several["models"][0]["threat"]["harmful_rows"] == 80


@pytest.mark.slow
def test_an_assessment_says_how_many_rows_attackers_had():
    found = _assessed("ridge@harmful_rows=6")
    assert found["models"][0]["threat"]["harmful_rows"] == 6
    assert found["data"]["tasks"]["harmful"]["n_train"] == 6
    assert found["data"]["tasks"]["unseen:third"]["n_train"] == 6
    assert found["data"]["tasks"]["benign:other"]["n_train"] == 80
    assert [entry["harmful_rows"] for entry in found["attackers"]] == [6]
    text = page.render_assessment(found)
    assert "6 labelled harmful rows" in text
    assert "has the features and 6 labelled rows of the harmful task" in text
