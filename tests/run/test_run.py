"""A whole experiment on two small tasks: what it writes, resumes, refuses, attacks and selects."""

import dataclasses
import json
import os
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import attacks, checkpoint, data, immunisers, measures, run
from jaximm.checkpoint import CheckpointError
from jaximm.immunisers import THETA
from jaximm.immunisers.conditioning import row_space
from jaximm.records import assessment as assessment_record
from jaximm.records import files, result
from jaximm.run import assess as run_assess
from jaximm.run.assess import assess
from jaximm.run.config import Experiment, read_config
from jaximm.training.loop import read_metrics
from tests import helpers

pytestmark = pytest.mark.heavy

D, N_PRIMARY, N_HARMFUL, N_HELD_OUT = 6, 30, 28, 20
STEPS = 12
FIELDS = {
    name: {"steps": STEPS}
    for name in ("ill_only", "imma", "condition_gap", "balanced_gap", "direct_kappa")
}
ATTACKERS = ("gd", "conjugate_gradients", "ridge")
EXPERIMENT = run.EXPERIMENTS["house_price"]


def make_arrays(seed=0, *, identical=False, constant=False):
    """The arrays of an .npz file: two regressions, or two labels on the same inputs."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for task, n, spread in (("primary", N_PRIMARY, 0.3), ("harmful", N_HARMFUL, 0.1)):
        basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
        for suffix, count in (("", n), ("_held_out", N_HELD_OUT)):
            x = rng.normal(size=(count, D)) * np.geomspace(1.0, spread, D) @ basis
            if identical and task == "harmful":
                x = arrays[f"primary_x{suffix}"]
            y = x @ rng.normal(size=D) + 0.3 * rng.normal(size=len(x))
            arrays[f"{task}_x{suffix}"] = x
            arrays[f"{task}_y{suffix}"] = (
                np.full(len(x), float(task == "harmful")) if constant else y
            )
    return arrays


def make_config(folder, *, methods=("condition_gap",), kind="regression", fields=None, **arrays):
    path = folder / "tasks.npz"
    np.savez(path, **make_arrays(constant=kind == "constant", **arrays))
    return Experiment(
        name="tiny",
        data="arrays",
        data_fields={"path": str(path), "kind": kind},
        methods=methods,
        method_fields=FIELDS if fields is None else fields,
        attackers=ATTACKERS,
        checkpoint_every=3,
        log_points=4,
    )


def prepared_of(config):
    return run.prepare(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, not to be changed; `copy_of` makes one that may be."""
    folder = tmp_path_factory.mktemp("runs")
    config = make_config(folder, methods=("condition_gap", "limit@t=1"))
    told = []
    results = run.immunise(
        config,
        folder / "out",
        command="jaximm immunise tiny",
        progress=lambda label, done, total, record: told.append((label, done, total)),
    )
    return types.SimpleNamespace(config=config, out=folder / "out", results=results, told=told)


def copy_of(runs, tmp_path):
    return shutil.copytree(runs.out, tmp_path / "out")


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# What a run writes.


def test_a_run_directory_holds_everything(runs):
    assert sorted(path.name for path in runs.out.iterdir()) == ["condition_gap-s0", "limit@t=1-s0"]
    for folder, found in zip(sorted(runs.out.iterdir()), runs.results, strict=True):
        assert sorted(path.name for path in folder.iterdir()) == [
            ".lock",
            "backbone",
            "checkpoints",
            "config.json",
            "metrics.jsonl",
            "result.json",
        ]
        assert result.read(folder / "result.json") == found
        config = read_config(folder / "config.json")
        assert config == dataclasses.replace(runs.config, methods=(found["method"],))
        params, metadata = checkpoint.load_backbone(folder / "backbone")
        assert params["params"][THETA].shape == (D, D)
        assert params["head"]["kernel"].shape == (D,)
        assert (metadata["method"], metadata["model"]) == (found["method"], "linear")
        assert metadata["conditioning"] == found["conditioning"]["damped"]
        logged = read_metrics(folder / "metrics.jsonl")
        assert [row["step"] for row in logged] == [row["step"] for row in found["trajectory"]]


def test_the_result_says_what_was_run(runs):
    found, closed = runs.results
    assert found["command"] == "jaximm immunise tiny"
    assert found["experiment"] == "tiny"
    assert found["dtype"] == "float64"
    assert found["device"]["count"] == jax.device_count()
    assert found["versions"]["jax"] == jax.__version__
    assert found["config"]["method_config"]["steps"] == STEPS
    assert closed["config"]["method_config"]["t"] == 1
    assert not closed["config"]["chosen_on_held_out"]
    section = found["data"]
    assert not section["inputs_shared"]
    for task, n in (("primary", N_PRIMARY), ("harmful", N_HARMFUL)):
        sizes = [section[task][key] for key in ("n_train", "n_selection", "n_held_out", "d")]
        assert sizes == [n, N_HELD_OUT // 2, N_HELD_OUT // 2, D]
    assert found["schema"] == "jaximm.result/3"
    assert [row["step"] for row in found["trajectory"]] == [3, 6, 9, 12]
    timing = found["timing"]
    assert timing["steps"] == STEPS
    assert timing["total_s"] == timing["immunise_s"] + timing["measure_s"]
    assert ("condition_gap s0", 3, STEPS) in runs.told
    assert runs.told[-1] == ("limit@t=1 s0", 1, 1)


def test_the_numbers_are_those_of_the_saved_backbone(runs):
    arrays = make_arrays()
    for found in runs.results:
        folder = runs.out / run.run_folder(found["method"], 0)
        theta = checkpoint.load_backbone(folder / "backbone")[0]["params"][THETA]
        row = found["conditioning"]["damped"]["train"]
        logs = {}
        for task in ("primary", "harmful"):
            x = arrays[f"{task}_x"]
            gram = x.T @ x / len(x)
            gram += 1e-3 * np.trace(gram) / D * np.eye(D)
            logs[task] = np.log(np.linalg.cond(theta.T @ gram @ theta) / np.linalg.cond(gram))
            np.testing.assert_allclose(row[f"log_ratio_{task}"], logs[task], rtol=1e-7, atol=1e-10)
            last = found["trajectory"][-1]
            np.testing.assert_allclose(last[f"log_ratio_{task}"], logs[task], rtol=1e-7, atol=1e-10)
        # The scale is that of the inputs: tr H_P = tr K_P.
        x = arrays["primary_x"]
        np.testing.assert_allclose(np.linalg.norm(x @ theta), np.linalg.norm(x), rtol=1e-12)
    assert runs.results[1]["conditioning"]["damped"]["train"]["log_fraction"] > 0.999


def test_the_scaled_head_predicts_as_the_unscaled_one(runs):
    params = immunisers.linear_params(3.0 * jnp.eye(D), jnp.arange(1.0, D + 1))
    x = jnp.asarray(make_arrays()["primary_x"])
    scaled = row_space.at_primary_scale(params, x)
    np.testing.assert_allclose(scaled.backbone[THETA], np.eye(D), rtol=1e-12)
    np.testing.assert_allclose(
        x @ scaled.backbone[THETA] @ scaled.head,
        x @ params.backbone[THETA] @ params.head,
        rtol=1e-12,
    )


def test_held_out_rows_are_halved_and_never_shared():
    pair = data.task_pair_from_arrays(**make_arrays())
    prepared = run.prepare(EXPERIMENT, pair=pair)
    for number, task in enumerate(("primary", "harmful")):
        whole = getattr(pair, task).held_out
        np.testing.assert_array_equal(getattr(prepared.selection, task).x, whole.x[::2])
        np.testing.assert_array_equal(getattr(prepared.held_out, task).y, whole.y[1::2])
        x = getattr(pair, task).train.x
        np.testing.assert_allclose(
            prepared.rows["train"][number].damping, 1e-3 * np.sum(x**2) / x.size, rtol=1e-12
        )


def test_prepare_refuses_what_it_cannot_halve_or_fit():
    arrays = make_arrays()
    one = arrays | {
        "harmful_x_held_out": arrays["harmful_x_held_out"][:1],
        "harmful_y_held_out": arrays["harmful_y_held_out"][:1],
    }
    with pytest.raises(ValueError, match=r"harmful task needs at least 2 held-out rows .* got 1"):
        run.prepare(EXPERIMENT, pair=data.task_pair_from_arrays(**one))
    many = {
        k: np.stack([v, -v], axis=1) if k.startswith("primary_y") else v for k, v in arrays.items()
    }
    with pytest.raises(ValueError, match=r"primary task must have one target a row, .* \(20, 2\)"):
        run.prepare(EXPERIMENT, pair=data.task_pair_from_arrays(**many))


# Resuming.


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop", helpers.thinned([9, 3]))
def test_a_killed_run_resumes_to_the_same_bits(runs, tmp_path, stop):
    config, out = dataclasses.replace(runs.config, methods=("condition_gap",)), tmp_path / "out"

    def kill(label, done, total, record):
        if done == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        run.immunise(config, out, progress=kill)
    folder = out / "condition_gap-s0"
    assert not (folder / "result.json").exists()
    with pytest.raises(ValueError, match=r"condition_gap-s0 is an unfinished run .*--resume"):
        run.load_results([out])
    with pytest.raises(ValueError, match=r"holds an unfinished run; give --resume"):
        run.immunise(config, out)
    if stop == 9:  # a damaged checkpoint is refused, and is left for its owner to look at
        sound = shutil.copytree(folder / "checkpoints" / "9", tmp_path / "sound")
        newest = [path for path in (folder / "checkpoints" / "9").rglob("*") if path.is_file()]
        largest = max(newest, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=r"step 9 in .*condition_gap-s0"):
            run.immunise(config, out, resume=True)
        shutil.copytree(sound, folder / "checkpoints" / "9", dirs_exist_ok=True)
    steps = []
    (found,) = run.immunise(
        config, out, resume=True, progress=lambda label, done, *_: steps.append(done)
    )
    assert steps == list(range(stop + 3, STEPS + 1, 3))
    whole = runs.results[0]
    assert found["trajectory"] == whole["trajectory"]
    assert found["conditioning"] == whole["conditioning"]
    theirs, ours = (
        checkpoint.load_backbone(place / "condition_gap-s0" / "backbone")[0]
        for place in (runs.out, out)
    )
    theirs, ours = jax.tree.leaves(theirs), jax.tree.leaves(ours)
    for one, other in zip(theirs, ours, strict=True):
        assert one.tobytes() == other.tobytes()
    assert read_metrics(folder / "metrics.jsonl") == read_metrics(
        runs.out / "condition_gap-s0" / "metrics.jsonl"
    )


def test_finished_runs_are_kept_and_missing_ones_are_run(runs, tmp_path):
    out = copy_of(runs, tmp_path)
    before = files_of(out)
    told = []
    config = dataclasses.replace(runs.config, methods=("condition_gap", "none", "limit@t=1"))
    results = run.immunise(config, out, resume=True, progress=lambda label, *_: told.append(label))
    assert [found["method"] for found in results] == list(config.methods)
    assert results[0] == runs.results[0]
    assert results[2] == runs.results[1]
    assert set(told) == {"none s0"}
    after = files_of(out)
    assert {key: after[key] for key in before} == before
    assert abs(results[1]["conditioning"]["damped"]["train"]["log_rir"]) < 1e-12


def test_what_is_there_is_not_run_over(runs, tmp_path):
    out = copy_of(runs, tmp_path)
    before = files_of(out)
    with pytest.raises(ValueError, match=r"holds a finished run; give --resume .*--out"):
        run.immunise(runs.config, out)
    for changed, keys in (
        ({"damping": 1e-2}, "damping"),
        ({"init": "random", "log_points": 2}, "init, log_points"),
        ({"method_fields": {"condition_gap": {"steps": 5}}}, "method_fields"),
    ):
        other = dataclasses.replace(runs.config, **changed)
        with pytest.raises(ValueError, match=rf"another configuration \({keys} differ\)"):
            run.immunise(other, out, resume=True)
    assert files_of(out) == before
    stranger = tmp_path / "else" / "limit@t=1-s0"
    stranger.mkdir(parents=True)
    (stranger / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config\.json"):
        run.immunise(runs.config, stranger.parent, resume=True)
    # The refusal comes before the first method is run.
    assert sorted(path.name for path in stranger.parent.iterdir()) == ["limit@t=1-s0"]


def test_a_second_call_gives_the_same_numbers(runs, tmp_path):
    (found,) = run.immunise(
        dataclasses.replace(runs.config, methods=("condition_gap",), checkpoint_every=None),
        tmp_path,
    )
    assert found["trajectory"] == runs.results[0]["trajectory"]
    assert found["spectra"] == runs.results[0]["spectra"]


def test_a_kill_before_anything_was_written_leaves_nothing_in_the_way(runs, tmp_path):
    folder = tmp_path / "limit@t=1-s0"
    folder.mkdir()
    (folder / "config.json.tmp").write_text('{"name": "ti')
    config = dataclasses.replace(runs.config, methods=("limit@t=1",))
    (found,) = run.immunise(config, tmp_path)
    assert found["conditioning"] == runs.results[1]["conditioning"]


# Damage.


def test_load_results_reads_runs_and_directories_of_runs(runs):
    assert run.load_results([runs.out]) == runs.results
    second = runs.out / "limit@t=1-s0"
    assert run.load_results([second, runs.out]) == [runs.results[1], *runs.results]


def test_a_truncated_result_is_named(runs, tmp_path):
    out = copy_of(runs, tmp_path)
    file = out / "limit@t=1-s0" / "result.json"
    os.truncate(file, file.stat().st_size // 2)
    for call in (
        lambda: run.load_results([out]),
        lambda: assess([out], tmp_path / "assessed"),
        lambda: run.immunise(runs.config, out, resume=True),
    ):
        with pytest.raises(files.ResultError, match=r"result.json: .*damaged or half written"):
            call()
    # assess() looks at all of them before it works on the first.
    assert not (tmp_path / "assessed").exists()


def test_places_without_runs(tmp_path):
    with pytest.raises(ValueError, match=r"holds no runs \(no config.json at or below it\)"):
        run.load_results([tmp_path])
    with pytest.raises(ValueError, match="absent is not a directory; give a run directory"):
        run.load_results([tmp_path / "absent"])
    with pytest.raises(ValueError, match="holds no runs"):
        assess([tmp_path], tmp_path / "assessed")


def test_a_damaged_backbone_is_refused(runs, tmp_path):
    out = copy_of(runs, tmp_path)
    backbone = out / "limit@t=1-s0" / "backbone"
    largest = max((p for p in backbone.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"limit@t=1-s0/backbone"):
        assess([out / "limit@t=1-s0"], tmp_path / "assessed", attackers=("ridge",))
    assert result.read(out / "limit@t=1-s0" / "result.json") == runs.results[1]


def full_disk(monkeypatch):
    """The disk is full whenever a result is flushed to it."""

    def fsync(_):
        raise OSError(28, "No space left on device")

    names = ("replace", "PathLike", "fspath")
    fake = types.SimpleNamespace(fsync=fsync, **{name: getattr(os, name) for name in names})
    monkeypatch.setattr(files, "os", fake)


def test_a_full_disk_costs_no_earlier_result(runs, tmp_path, monkeypatch):
    out = copy_of(runs, tmp_path)
    before = files_of(out)
    config = dataclasses.replace(runs.config, methods=(*runs.config.methods, "none"))
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(files.ResultError, match=r"none-s0/config.json: not written: No space"):
            run.immunise(config, out, resume=True)
    after = files_of(out)
    assert {key: after[key] for key in before} == before
    assert not [name for name in after if name.endswith(".tmp")]
    results = run.immunise(config, out, resume=True)  # with space again it goes on
    assert [found["method"] for found in results] == list(config.methods)


# Attacks.


@pytest.fixture(scope="module")
def assessed(runs, tmp_path_factory):
    """The assessment by the experiment's own attackers and budgets."""
    folder = tmp_path_factory.mktemp("assessed")
    told, before = [], files_of(runs.out)
    (found,) = assess(
        [runs.out],
        folder,
        level=None,
        as_configured=True,
        progress=lambda label, done, total, more: told.append((label, done, total)),
    )
    assert files_of(runs.out) == before  # runs are read, and that is all
    return types.SimpleNamespace(folder=folder, found=found, told=told)


def test_an_assessment_as_configured_has_the_experiments_attackers_and_budgets(runs, assessed):
    found, level = assessed.found, run_assess.level_of(runs.config)
    assert assessment_record.read(assessed.folder / "tiny" / "assessment.json") == found
    assert [one["name"] for one in found["attackers"]] == list(ATTACKERS)
    assert found["protocol"]["probe_steps"] == attacks.suite_steps("quick", ATTACKERS)
    assert (level.probes, level.weight_steps) == (runs.config.suite, runs.config.fine_tune_steps)
    other = dataclasses.replace(runs.config, suite="full", fine_tune_steps=7, batch_size=5)
    level = run_assess.level_of(other)
    assert (level.probes, level.weight_steps, level.batch_size) == ("full", 7, 5)
    assert run_assess.attackers_of(dataclasses.replace(other, attackers=None)) == [
        *attacks.REGISTRY
    ]
    places = {(row["attacker"], row["model"], row["task"]) for row in found["rows"]}
    labels = ("none", *runs.config.methods)
    harmful = {(name, label, "harmful") for name in ATTACKERS for label in labels}
    # Plain gradient descent alone, of these three, learns the primary task too.
    assert places == harmful | {("gd", label, "benign:primary") for label in labels}
    assert len(found["rows"]) == len(places)
    assert assessed.told[-1] == ("assess tiny", len(places), len(places))


def test_the_fit_of_a_row_is_that_of_the_training_rows(runs, assessed):
    """By NumPy: gradient descent with step 1 / h_max from w = 0, counted."""
    arrays = make_arrays()
    for label in ("none", *runs.config.methods):
        theta = np.eye(D)
        if label != "none":
            folder = runs.out / run.run_folder(label, 0)
            theta = np.asarray(checkpoint.load_backbone(folder / "backbone")[0]["params"][THETA])
        for task, name in (("harmful", "harmful"), ("benign:primary", "primary")):
            (row,) = [
                row
                for row in assessed.found["rows"]
                if (row["attacker"], row["model"], row["task"]) == ("gd", label, task)
            ]
            x, y = arrays[f"{name}_x"] @ theta, arrays[f"{name}_y"]
            h, vectors = np.linalg.eigh(x.T @ x / len(x))
            c = vectors.T @ np.linalg.lstsq(x, y, rcond=None)[0]

            def excess(steps, h=h, c=c):
                return np.sum(h * (1 - h / h[-1]) ** (2 * steps) * c**2) / np.sum(h * c**2)

            for target, steps in row["fit"]["steps_to_loss_gap"].items():
                if steps > 0:
                    assert excess(steps) <= float(target) * (1 + 1e-9)
                    assert excess(steps - 1) > float(target)
                else:
                    assert excess(row["steps"]) > float(target)
    steps = {
        row["model"]: row["fit"]["steps_to_loss_gap"]["1e-2"]
        for row in assessed.found["rows"]
        if (row["attacker"], row["task"]) == ("gd", "harmful")
    }
    assert steps["limit@t=1"] > 2 * steps["none"] > 0


def test_certificates_are_made_once_and_hold_for_the_fits(assessed):
    rows = assessed.found["certificates"]
    floors = {
        (row["model"], row["task"], row["target"].split()[-1]): row["value"]
        for row in rows
        if row["name"] == "krylov_floor"
    }
    labels = [model["label"] for model in assessed.found["models"]]
    tasks = ("harmful", "benign:primary")
    assert set(floors) == {
        (label, task, target) for label in labels for task in tasks for target in result.TARGETS
    }
    met = 0
    for row in assessed.found["rows"]:
        if row["attacker"] in ("gd", "conjugate_gradients"):
            for target, steps in row["fit"]["steps_to_loss_gap"].items():
                floor = floors[row["model"], row["task"], target]
                assert steps == -1 or steps >= floor
                met += steps == floor
    assert met > 0
    limits = {row["model"]: row["value"] for row in rows if row["name"] == "rir_limit"}
    assert limits.keys() == {"condition_gap", "limit@t=1"}  # of runs, which measured it


def test_unknown_attackers_and_levels_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="unknown attack 'nobody'; choose from"):
        assess([runs.out], tmp_path, attackers=("nobody",))
    with pytest.raises(ValueError, match="unknown level 'endless'; choose from"):
        assess([runs.out], tmp_path, level="endless")


def test_constant_targets_have_a_flag_and_nothing_to_attack(tmp_path):
    config = make_config(tmp_path, methods=("limit@t=0",), kind="constant")
    (found,) = run.immunise(config, tmp_path / "out")
    assert found["utility"] is found["harmful_utility"] is None
    assert "constant_targets" in [flag["code"] for flag in found["flags"]]
    assert found["conditioning"]["damped"]["train"]["log_fraction"] > 0.999
    with pytest.raises(ValueError, match="constant targets: there is nothing to attack"):
        assess([tmp_path / "out"], tmp_path / "assessed")


# Two labels on the same inputs: no linear backbone can do anything.


@pytest.mark.slow
def test_identical_inputs_give_a_ratio_of_one_for_every_method(tmp_path):
    methods = ("condition_gap", "balanced_gap", "direct_kappa", "limit@t=0", "limit@t=1")
    config = make_config(tmp_path, methods=methods, identical=True)
    results = run.immunise(config, tmp_path / "out")
    moved = []
    for found in results:
        assert found["data"]["inputs_shared"]
        assert found["flags"][0]["code"] == "inputs_shared"
        for footing in ("damped", "pseudo_inverse", "reference"):
            for split in ("train", "held_out"):
                row = found["conditioning"][footing][split]
                # Same rows, same backbone: not even rounding differs.
                assert abs(row["log_rir"]) < 1e-9, (found["method"], footing, split)
        row = found["conditioning"]["damped"]["train"]
        assert abs(row["log_rir_limit"]) < 1e-9
        assert row["log_fraction"] is None
        moved.append(abs(row["log_ratio_primary"]))
    assert max(moved) > 1  # the backbones are not all the identity


# The choice of the limit's settings.


def test_select_limit_picks_on_held_out_rows(tmp_path):
    prepared = prepared_of(make_config(tmp_path))
    grids = {"dampings": (1e-3, 1e-1, 1.0), "ts": (0.0, 1.0), "shrinkages": (0.0,)}
    chosen, cells = run.select_limit(prepared, **grids)
    assert len(cells) == 6
    arrays = make_arrays()
    rows = measures.Rows(
        prepared.train.primary, prepared.selection.primary, prepared.held_out.primary
    )
    raw = float(measures.best_head_quality(rows, jnp.eye(D), metric="r2").held_out)
    best = None
    for cell in cells:
        label = f"limit@t={cell.config.t},damping={cell.config.damping},shrinkage=0.0"
        theta = np.asarray(run.run_method(prepared, label).params.backbone[THETA])
        logs = {}
        for task in ("primary", "harmful"):
            x = arrays[f"{task}_x_held_out"]
            train = arrays[f"{task}_x"]
            gram = x.T @ x / len(x) + 1e-3 * np.sum(train**2) / train.size * np.eye(D)
            logs[task] = np.log(np.linalg.cond(theta.T @ gram @ theta) / np.linalg.cond(gram))
        np.testing.assert_allclose(cell.log_rir, logs["harmful"] - logs["primary"], rtol=1e-6)
        np.testing.assert_allclose(cell.log_ratio_primary, logs["primary"], rtol=1e-6, atol=1e-9)
        quality = measures.best_head_quality(rows, jnp.asarray(theta), metric="r2").held_out
        np.testing.assert_allclose(cell.quality, quality, rtol=1e-6)
        keeps = float(quality) >= raw - 0.02
        if keeps and (best is None or cell.log_rir > best.log_rir):
            best = cell
    assert best is not None
    assert chosen == best.config


def test_a_plain_limit_is_chosen_and_says_so(tmp_path):
    config = make_config(tmp_path, methods=("limit",))
    prepared = prepared_of(config)
    assert run.is_selected(prepared, "limit")
    assert run.is_selected(prepared, "limit@rotate=false")
    assert not run.is_selected(prepared, "limit@t=1")
    assert not run.is_selected(prepared, "none")
    fields = {"limit": {"damping": 0.1}}
    prepared = dataclasses.replace(prepared, config=make_config(tmp_path, fields=fields))
    assert not run.is_selected(prepared, "limit")
    (found,) = run.immunise(config, tmp_path / "out")
    chosen, _ = run.select_limit(prepared_of(config))
    assert found["config"]["method_config"] == files.plain(dataclasses.asdict(chosen))
    assert found["config"]["chosen_on_held_out"]
    assert "chosen_on_held_out" in [flag["code"] for flag in found["flags"]]


def test_a_constant_primary_task_is_chosen_by_log_rir_alone(tmp_path):
    prepared = prepared_of(make_config(tmp_path, kind="constant"))
    chosen, cells = run.select_limit(
        prepared, dampings=(1e-3, 1.0), ts=(0.0, 1.0), shrinkages=(0.0,)
    )
    assert {cell.quality for cell in cells} == {0.0}
    assert chosen == max(cells, key=lambda cell: cell.log_rir).config


# Starts and dtypes.


def test_a_random_start_depends_on_the_seed_and_only_on_it(tmp_path):
    prepared = prepared_of(dataclasses.replace(make_config(tmp_path), init="random"))
    first, again = (run.run_method(prepared, "none", seed=1) for _ in range(2))
    other = run.run_method(prepared, "none", seed=2)
    np.testing.assert_array_equal(first.params.backbone[THETA], again.params.backbone[THETA])
    assert (
        np.max(np.abs(np.asarray(first.params.backbone[THETA] - other.params.backbone[THETA])))
        > 0.1
    )
    assert abs(first.trajectory[-1]["log_ratio_primary"]) > 0.1  # the start is no identity


@pytest.mark.slow
def test_float32_runs_and_says_so(runs, tmp_path):
    config = make_config(tmp_path, methods=("condition_gap", "limit@t=1"))
    with jax.enable_x64(False):
        results = run.immunise(config, tmp_path / "out")
        (narrow_found,) = assess([tmp_path / "out"], tmp_path / "narrow", attackers=("ridge",))
    # What was made in one dtype can be attacked in the other.
    made = tmp_path / "out" / "limit@t=1-s0"
    (wide_found,) = assess([made], tmp_path / "wide", attackers=("ridge",))
    for found in results:
        assert found["dtype"] == "float32"
        for row in found["conditioning"]["damped"].values():
            kappas = [
                row[task][when] for task in ("primary", "harmful") for when in ("before", "after")
            ]
            assert {kappa["dtype"] for kappa in kappas} == {"float32"}
    narrow, truth = (
        found["conditioning"]["damped"]["train"] for found in (results[1], runs.results[1])
    )
    np.testing.assert_allclose(narrow["log_rir"], truth["log_rir"], rtol=1e-3)
    np.testing.assert_allclose(narrow["log_rir_limit"], truth["log_rir_limit"], rtol=1e-3)
    qualities = [
        row["quality"]["mean"]
        for found in (narrow_found, wide_found)
        for row in found["rows"]
        if (row["model"], row["task"]) == ("limit@t=1", "harmful")
    ]
    assert qualities[0] == pytest.approx(qualities[1], rel=1e-3)
    assert json.loads((tmp_path / "out" / "limit@t=1-s0" / "config.json").read_text())


def test_the_demo_is_the_house_price_experiment(tmp_path, monkeypatch):
    """Which methods it compares, without running them."""
    seen = {}

    def immunise(config, out, **kwargs):
        seen["config"], seen["kwargs"] = config, kwargs
        return []

    def assessed(paths, out, **kwargs):
        seen["assessed"] = kwargs
        return [(paths, out)]

    monkeypatch.setattr("jaximm.run.cases.immunise", immunise)
    monkeypatch.setattr("jaximm.run.cases.assess", assessed)
    assert run.demo(tmp_path, command="c") == ([tmp_path], tmp_path / "assessment")
    assert (seen["assessed"]["level"], seen["assessed"]["command"]) == ("quick", "c")
    assert seen["config"].methods == run.DEMO_METHODS
    assert seen["config"].name == "house_price"
    assert seen["kwargs"]["command"] == "c"
    assert set(helpers.METHODS_OF_NUMBERS) <= {
        label.partition("@")[0] for label in run.DEMO_METHODS
    }


# Random damage.


def read_all(out):
    """What later commands read of runs."""
    backbones = [checkpoint.load_backbone(folder / "backbone") for folder in sorted(out.iterdir())]
    return run.load_results([out]), [metadata for _, metadata in backbones]


@pytest.mark.parametrize("seed", helpers.thinned(range(375), keep=15))
def test_no_damage_to_a_run_is_silent(runs, tmp_path, seed):
    out = copy_of(runs, tmp_path)
    kinds = [
        sorted(out.glob("*/config.json")),
        sorted(out.glob("*/result.json")),
        sorted(file for file in out.glob("*/backbone/**/*") if file.is_file()),
    ]
    assert all(kinds)
    whole = read_all(out)
    changed = helpers.damage(kinds[seed % 3], seed)
    refusal = None
    try:
        found = read_all(out)
    except (ValueError, CheckpointError) as error:
        refusal = str(error)
    if refusal is None:  # the same content in another layout is no damage
        assert found == whole
    else:  # what is wrong, and where
        assert any(str(out / file.relative_to(out).parts[0]) in refusal for file in changed)
        assert "\n" not in refusal


@pytest.mark.parametrize("name", ["config.json", "result.json", "backbone"])
def test_what_is_gone_is_missed(runs, tmp_path, name):
    out = copy_of(runs, tmp_path)
    lost = out / "limit@t=1-s0" / name
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises((ValueError, CheckpointError), match=re.escape(str(lost.parent))):
        read_all(out)


def test_a_damaged_cell_is_named_and_made_again_to_the_same_end(runs, assessed, tmp_path):
    folder = shutil.copytree(assessed.folder, tmp_path / "assessed")
    document = folder / "tiny" / "assessment.json"
    before, cells = document.read_bytes(), sorted((folder / "tiny" / "cells").glob("*.json"))
    cells[0].write_bytes(cells[0].read_bytes()[:-30])
    with pytest.warns(files.FileWarning, match=re.escape(str(cells[0]))):
        assess([runs.out], folder, level=None, as_configured=True)
    assert document.read_bytes() == before
    assert cells[0].with_name(f"{cells[0].stem}.damaged-1.json").exists()
