"""From runs to assessments: linear and deep benches, and the command line around them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import assessment, cli, compilation, data, run
from jaximm.assessment import verdict
from jaximm.immunisers import THETA
from jaximm.records import assessment as assessment_record
from jaximm.run import assess as run_assess
from jaximm.run.cases import EXPERIMENTS

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    methods = ["--method", "none", "--method", "limit@t=1"]
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main(["immunise", "house_price", *methods, "--out", str(folder)]) == 0
    return folder


def test_a_linear_bench_is_that_of_the_runs(house):
    config = EXPERIMENTS["house_price"]
    bench, models = run_assess.bench_of(config, run.run_folders(house))
    assert [model.label for model in models] == ["none", "limit@t=1"]
    assert set(bench.tasks()) == {
        "harmful",
        "unseen:sale_price_outside",
        "benign:primary",
        "benign:lot_area_inside",
    }
    pair = data.load("house_prices")
    np.testing.assert_array_equal(bench.harmful.selection.x, pair.harmful.held_out.x[0::2])
    np.testing.assert_array_equal(bench.harmful.held_out.y, pair.harmful.held_out.y[1::2])
    # The utility is that of the result: the best ridge head on the model's own features.
    for model in models:
        found = next(one for one in run.load_results([house]) if one["method"] == model.method)
        features = bench.primary.held_out.x @ model.params[THETA]
        output = np.asarray(features @ model.benign_head.kernel)[:, 0]
        y = np.asarray(bench.primary.held_out.y)
        r2 = 1 - np.mean((y - output) ** 2) / np.var(y)
        assert r2 == pytest.approx(found["utility"]["after"]["held_out"], rel=1e-6)
    assert models[1].conditioning["log_fraction"] == pytest.approx(1.0, abs=1e-6)
    # The undefended model is there even if no run made it.
    (folder,) = [one for one in run.run_folders(house) if "limit" in one.name]
    _, added = run_assess.bench_of(config, [folder])
    assert [model.method for model in added] == ["none", "limit@t=1"]
    np.testing.assert_array_equal(added[0].params[THETA], np.eye(79))


def test_the_other_tasks_are_the_targets_of_the_other_zone():
    pair = data.load("house_prices")
    unseen, benign = pair.unseen["sale_price_outside"](), pair.benign["lot_area_inside"]()
    np.testing.assert_array_equal(unseen.train.x, pair.primary.train.x)
    np.testing.assert_array_equal(benign.held_out.x, pair.harmful.held_out.x)
    assert abs(np.corrcoef(unseen.train.y, pair.primary.train.y)[0, 1]) < 0.9
    digits = data.load("mnist_pairs", target="slant", pool=2, train_rows=300)
    assert list(digits.unseen) == ["digit_2"]
    assert list(digits.benign) == ["digit_3"]
    full = data.load("mnist_pairs", target="slant", train_rows=300)
    unseen, whole = digits.unseen["digit_2"](), full.unseen["digit_2"]()
    assert unseen.train.x.shape == (300, 196)
    squares = whole.train.x.reshape(300, 14, 2, 14, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(unseen.train.x, squares.reshape(300, 196))
    np.testing.assert_array_equal(unseen.train.y, whole.train.y)
    constant = data.load("mnist_pairs")
    assert not constant.unseen
    assert not constant.benign
    with pytest.raises(ValueError, match="pool must be one of"):
        data.make_config("mnist_pairs", pool=3)


def test_assess_compare_and_report_from_the_command_line(house, tmp_path, monkeypatch, capsys):
    level = assessment.Level(probes="quick", weight_steps=10, batch_size=32, record=4, trial=False)
    monkeypatch.setitem(assessment.LEVELS, "quick", level)
    out = tmp_path / "assessed"
    words = ["assess", str(house), "--out", str(out), "--level", "quick"]
    words += ["--attack", "ridge", "--attack", "gd"]
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main(words) == 0
    printed, said = capsys.readouterr()
    assert "limit@t=1" in printed
    assert said.splitlines()[-1].startswith("jaximm: programs were compiled ")
    folder = out / "house_price"
    found = assessment_record.read(folder / "assessment.json")
    assert [model["label"] for model in found["models"]] == ["none", "limit@t=1"]
    assert found["command"].startswith("jaximm assess")
    assert found["schema"] == assessment_record.SCHEMA_VERSION
    assert verdict.with_verdicts(found) == found  # what is shown was made with the document
    page = (folder / "assessment.html").read_text()
    assert len(page) < 2_000_000
    for name in ("assessment.md", "assessment.csv", "heat_map.json", "cards.json"):
        assert (folder / name).stat().st_size > 0
    assert set(json.loads((folder / "cards.json").read_text())) == {"none", "limit@t=1"}
    board = tmp_path / "board.md"
    assert cli.main(["compare", str(out), "--markdown", str(board)]) == 0
    assert "limit@t=1" in board.read_text()
    capsys.readouterr()
    for words, message in [
        ([str(out), str(house)], f"no assessment at {house}"),
        ([str(out), str(tmp_path / "nowhere")], "no assessment at "),
        ([str(out), "--rows", "5"], "--rows are for runs and checkpoints"),
        ([str(out), "--out", str(tmp_path / "page")], "goes to --markdown FILE"),
    ]:
        assert cli.main(["compare", *words]) == 2
        assert message in capsys.readouterr().err
    text = (folder / "assessment.md").read_text()
    for part in ("101, 102, 103", found["code"], jax.__version__, found["command"], "penalty"):
        assert part in text  # what reproduces it, and what was chosen
    (folder / "assessment.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "assessment.html").read_text() == page


@pytest.mark.slow
def test_constant_targets_have_nothing_to_attack(tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        words = ["immunise", "mnist_pair", "--method", "none", "--out", str(tmp_path / "runs")]
        assert cli.main(words) == 0
    with pytest.raises(ValueError, match="constant targets: there is nothing to attack"):
        run_assess.assess([tmp_path / "runs"], tmp_path / "out")


def test_binary_targets_are_labels():
    fields = {"target": "one_vs_rest", "train_rows": 20}
    prepared = run.prepare(dataclasses.replace(EXPERIMENTS["mnist_pair"], data_fields=fields))
    task = prepared.pair.primary
    rows = run_assess._splits(prepared, task)
    assert rows.classes == 2
    np.testing.assert_array_equal(rows.train.y, task.train.y > 0)
    head = run_assess.ridge_head(rows, jnp.eye(784))
    logits = rows.held_out.x @ head.kernel
    assert np.mean(np.argmax(np.asarray(logits), axis=1) == np.asarray(rows.held_out.y)) > 0.8


def test_an_unknown_attacker_is_a_usage_error(house, capsys):
    assert cli.main(["assess", str(house), "--attack", "luck"]) == 2
    assert "unknown attack 'luck'" in capsys.readouterr().err
    assert cli.main(["assess", str(house), "--load", "nowhere.py"]) == 2


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.slow
def test_an_assessment_for_each_number_of_harmful_rows(house, tmp_path):
    words = ["assess", str(house), "--level", "quick", "--attack", "ridge", "--out", str(tmp_path)]
    assert cli.main([*words, "--harmful-rows", "12", "--harmful-rows", "60"]) == 0
    worst = []
    for count in (12, 60):
        name = f"house_price-{count}-harmful-rows"
        document = assessment_record.read(tmp_path / name / "assessment.json")
        assert {model["threat"]["harmful_rows"] for model in document["models"]} == {count}
        (row,) = (
            row for row in document["rows"] if (row["model"], row["task"]) == ("none", "harmful")
        )
        worst.append(row["quality"]["mean"])
    assert worst[0] < worst[1]


def _stopped_by_ctrl_c(words):
    """What the command says when Ctrl-C comes while two workers import; nobody is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaximm.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 120
    while len(workers := _alive(children)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(workers) >= 2, process.communicate(timeout=60)
    time.sleep(1)  # somewhere in their imports
    workers = _alive(children)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < until, workers
        time.sleep(0.05)
    return err


def _alive(children):
    try:
        return children.read_text().split()
    except FileNotFoundError:  # the command has ended
        return []


def test_ctrl_c_in_the_suite_is_one_line_and_leaves_nobody(tmp_path):
    words = ["suite", "--level", "quick", "--attack", "ridge", "--out", str(tmp_path / "suite")]
    assert _stopped_by_ctrl_c(words) == "jaximm: stopped; the same command goes on.\n"


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_of_an_assessment(house, tmp_path):
    words = ["assess", str(house), "--level", "quick", "--workers", "2"]
    said = _stopped_by_ctrl_c([*words, "--out", str(tmp_path / "out")])
    assert said.splitlines()[-1] == "jaximm: stopped; the same command goes on."
    assert "Traceback" not in said


def test_programs_are_kept_where_the_user_keeps_caches(tmp_path):
    keep = compilation.keep_programs
    settings = {"XDG_CACHE_HOME": str(tmp_path)}
    assert keep(settings) == (tmp_path / "jaximm", "")
    assert settings["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jaximm")
    assert settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "XDG_CACHE_HOME": "/nowhere"}
    assert keep(own) == (tmp_path / "own", "")
    (tmp_path / "file").touch()  # no folder can be made there
    broken = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    folder, why = keep(broken)
    assert folder is None
    assert "Not a directory" in why
    assert "JAX_COMPILATION_CACHE_DIR" not in broken
    assert keep({"JAX_ENABLE_COMPILATION_CACHE": "false"})[0] is None


@pytest.mark.slow
def test_the_command_line_keeps_programs_by_default_and_says_so(house, tmp_path):
    """The second process reads what the first has compiled."""
    names = ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    settings = {key: value for key, value in os.environ.items() if key not in names}
    settings["XDG_CACHE_HOME"] = str(tmp_path)
    folder = tmp_path / "jaximm"

    def assess(*words):
        command = [sys.executable, "-m", "jaximm.cli", "assess", str(house), "--level", "quick"]
        command += ["--attack", "ridge", "--out", str(tmp_path / f"out{len(words)}"), *words]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
        return done.stderr.splitlines()[-1]

    said = assess("--no-cache", "--full-optimisation")
    assert said == "jaximm: programs were compiled with all optimisations; not kept: --no-cache."
    assert not folder.exists()
    said = assess()
    assert "with few optimisations (--full-optimisation: with all)" in said
    assert f"kept in {folder} (--no-cache: nowhere)" in said
    assert len(list(folder.iterdir())) > 5
