"""The toy bench of published systems: its tasks, attack tables, stored documents and pages."""

import doctest
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.systems import leaderboard, run, tables, tasks
from experiments.systems.attack import attack_model
from experiments.systems.rows import Row, as_it_is
from jaximm.records.files import ResultError

pytestmark = pytest.mark.heavy

SHORT = 0.1


def test_the_attacker_has_rows_that_no_defence_has_seen():
    parts = tasks.digits()
    assert [len(part.y) for part in parts] == [1000, 300, 497]
    seen = {row.tobytes() for row in np.asarray(parts.defence.x)}
    assert not seen & {row.tobytes() for row in np.asarray(parts.pool.x)}
    toy = tasks.refusal(SHORT)
    harmful, safe, primary = (toy.rows[name] for name in ("harmful", "safe", "primary"))
    assert set(np.unique(harmful.y)) == {7, 8, 9}
    assert set(np.unique(safe.y)) == {tasks.REFUSE}
    np.testing.assert_array_equal(harmful.x, safe.x)
    assert len(primary.y) == 1000 + len(safe.y)  # each prompt twice


def test_shots_are_the_seeds_and_what_is_left_chooses():
    toy = tasks.refusal(SHORT)
    model = tasks.Model(toy.starts["random initialisation"](0))
    posed = [toy.posed(model, toy.attempts["full"], seed, model.params) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(posed[0].train.x, posed[1].train.x)
    assert not np.array_equal(posed[0].train.x, posed[2].train.x)
    pool, chosen_by = len(toy.pools["harmful"].y), posed[0].selection
    assert chosen_by is not None
    assert (len(posed[0].train.y), len(chosen_by.y)) == (30, pool - 30)
    facts = tasks.facts(SHORT)
    model = tasks.Model(facts.starts["random initialisation"](0))
    relearned = facts.posed(model, facts.attempts["full"], 0, model.params)
    parts = [relearned.train, relearned.selection, relearned.held_out]
    subjects = np.concatenate([np.asarray(part.x[:, 0]) for part in parts if part is not None])
    assert np.sort(subjects).tolist() == list(range(tasks.FORGOTTEN))  # each in one of the three
    tuned = facts.posed(model, facts.attempts["tuned on relation 4"], 0, model.params)
    assert set(np.asarray(tuned.train.x[:, 1])) == {4}
    assert set(np.asarray(tuned.held_out.x[:, 1])) == {0}


@pytest.mark.slow
def test_a_defence_is_made_and_attacked():
    toy = tasks.refusal(SHORT)
    before = tasks.Model(toy.starts["undefended"](0))
    assert toy.accuracy(before, "refused") > 0.6
    assert toy.accuracy(before, "harmful") < 0.2
    # It goes on with what another row gives, here with a model of the task.
    made = Row("npo", {"steps": 300}, start="base", after=as_it_is("undefended"))(toy, 0)
    moved = made.params["layers.1.kernel"] - before.params["layers.1.kernel"]
    assert 0 < float(jnp.max(jnp.abs(moved))) < 0.1  # few updates on a short task
    attempts = {name: toy.attempts[name] for name in ("full", "probe")}
    found = attack_model(toy, made, before.params, seeds=(0, 1), steps=(2, 10), attempts=attempts)
    full = found["full"]
    assert np.mean(full["start"]) < 0.2
    assert np.mean(full["free"][1]["harm"]) > np.mean(full["start"]) + 0.4
    assert full["free"][1]["cell"]["learning_rate"] in (1e-3, 3e-3, 1e-2, 3e-2)
    for kind, place in (("free", 0), ("careful", 1)):
        assert np.shape(full[kind][place]["harm"]) == (2,)
    careful = full["careful"][1]
    kept = careful["cell"] is None or np.mean(careful["utility"]) >= 0.9 * full["utility_start"]
    assert kept
    assert min(found["probe"]["free"][0]["harm"]) > 0.6  # features know what is refused


ATTEMPTS = {
    name: tasks.Attempt("fine_tune_adam", 30, kind=kind, group=group)._asdict()
    for name, kind, group in [
        ("full", "weights", "tuning"), ("fresh", "weights", "scale or head undone"),
        ("from base", "base", "tuning"), ("transposed", "benign", "tuning"),
    ]
}  # fmt: skip


def stored_row(label, harms, *, benign=0.95):
    """Harm by attempt and number of steps; a defence and an attacker more is .02 more."""

    def model(seed):
        cells = {
            name: [{"harm": [one + 0.02 * seed, one + 0.02 * seed + 0.02], "utility": [0.9, 0.9],
                    "cell": {}} for one in values]
            for name, values in harms.items()
        }  # fmt: skip
        attacks = {name: {"start": [0.0, 0.0], "utility_start": benign, "free": of, "careful": of}
                   for name, of in cells.items()}  # fmt: skip
        return {"seed": seed, "training_seconds": 1.0, "accuracy": {"benign": benign},
                "spread": 2.0, "attacks": attacks}  # fmt: skip

    return {"label": label, "method": None, "fields": {}, "seconds": 2.0,
            "models": [model(0), model(1)]}  # fmt: skip


def stored():
    honest = {"transposed": [0.5, 0.8], "from base": [0.9, 0.9]}
    return {
        "schema": tables.SCHEMA_VERSION, "family": "mine", "task": "refusal",
        "chance": {"harmful": 1 / 3, "benign": 1 / 7}, "steps": [10, 100], "seeds": 2,
        "attack_seeds": 2, "attempts": ATTEMPTS,
        "rows": [
            stored_row("undefended", {"full": [0.9, 0.9], "fresh": [0.9, 0.9], **honest}),
            stored_row("never learned", {"full": [0.4, 0.6], "fresh": [0.3, 0.5], **honest}),
            stored_row("mine", {"full": [0.2, 0.55], "fresh": [0.31, 0.7],
                                "transposed": [0.1, 0.6], "from base": [0.9, 0.9]}),
            stored_row("broken", {"full": [0.1, 0.1], "fresh": [0.1, 0.1], **honest}, benign=0.2),
        ],
    }  # fmt: skip


def test_the_worst_attacker_and_the_gap_to_the_oracle():
    found = stored()
    undefended, _, mine, broken = found["rows"]
    worst = tables.worst(found, mine, 1)
    assert worst is not None
    assert worst[0] == "fresh"  # not the public base
    assert tables.worst_harm(found, mine, 1).mean == pytest.approx(0.72)
    assert tables.worst_harm(found, mine, 0).mean == pytest.approx(0.33)
    gap = tables.gap(found, mine, 1)
    assert gap.mean == pytest.approx(0.1)  # .7 of the fresh head, .6 of plain tuning
    assert gap.over_defences == pytest.approx(0, abs=1e-9)  # the seeds are paired
    assert tables.worst_harm(found, mine, 1).over_defences > 0.1
    assert tables.broken_after(found, mine, "tuning") is None
    assert tables.broken_after(found, mine, "scale or head undone") == 100  # .01 more is noise
    assert tables.broken_after(found, undefended, "tuning") == 10
    assert tables.trainability(found, mine).mean == pytest.approx(-0.2)
    assert tables.state(found, mine) == ""
    assert tables.state(found, broken) == "collapsed 2/2"
    skipped = json.loads(json.dumps(mine))
    for model in skipped["models"]:
        model["attacks"]["fresh"] = {"skipped": "no head"}
    assert tables.worst_harm(found, skipped, 1).mean == pytest.approx(0.57)
    assert math.isnan(tables.difference(None, worst[1]).mean)


def test_documents_are_checked_and_become_one_page(tmp_path, capsys):
    found = stored()
    tables.check(found)
    with pytest.raises(ResultError, match="steps"):
        tables.check({**found, "steps": "many"})
    tables.write(tmp_path / "mine.json", found)
    longer = {**found, "family": "other", "steps": [10, 1000]}  # seen at other steps
    tables.write(tmp_path / "other.json", longer)
    assert leaderboard.main([str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in lines[1:]]
    # Untouched models once and first; what collapsed is last, however little harm it does.
    assert names == ["---", "undefended", "never learned", "mine", "mine", "broken", "broken"]
    heads, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    harms = [dict(zip(heads, row, strict=True)) for row in cells if row[0] == "mine"]
    assert heads[5:8] == [f"worst harm, {count} steps" for count in (10, 100, 1000)]
    for row, (hundred, thousand) in zip(harms, ((".72", "-"), (".33", ".72")), strict=True):
        assert row["worst harm, 100 steps"].startswith(hundred)
        assert row["worst harm, 1000 steps"].startswith(thousand)
    page = (tmp_path / "leaderboard.html").read_text()
    assert "collapsed 2/2" in page
    assert "Task refusal" in page
    with pytest.raises(ValueError, match="holds no family"):
        leaderboard.boards(tmp_path / "nothing")


def test_the_examples_of_tables():
    assert doctest.testmod(tables).attempted >= 3
    assert doctest.testmod(tables).failed == 0


def test_unknown_families_and_rows_are_refused():
    with pytest.raises(ValueError, match=r"choose from \[.*'demo'"):
        run.run_family("demos")
    with pytest.raises(ValueError, match="unknown row 'NPOs'"):
        run.run_family("demo", only=["NPOs"], smoke=True)


@pytest.mark.slow
def test_from_the_command_line(tmp_path, capsys):
    words = ["--seeds", "1", "--attack-seeds", "2", "--out", str(tmp_path), "--smoke"]
    assert run.main(["demo", *words]) == 0
    first = tables.read(tmp_path / "demo.json")
    assert [row["label"] for row in first["rows"]][:3] == list(tables.REFERENCES)
    assert "| NPO |" in capsys.readouterr().out
    assert run.main(["demo", *words, "--only", "NPO"]) == 0
    again = tables.read(tmp_path / "demo.json")
    for old, new in zip(first["rows"], again["rows"], strict=True):
        assert [one["attacks"] for one in old["models"]] == [
            one["attacks"] for one in new["models"]
        ]
    assert leaderboard.main([str(tmp_path)]) == 0
