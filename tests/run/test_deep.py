"""A deep experiment end to end, on a small perceptron and a user's own folders of images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaximm import assessment, checkpoint, models, run
from jaximm.records import result
from jaximm.run import assess as run_assess
from jaximm.run.activations import at_cut
from jaximm.run.config import Experiment, read_config, read_fields
from jaximm.run.prepare import batched, fit_head, halved, prepare
from jaximm.training.optimiser import OptimiserConfig

pytestmark = pytest.mark.heavy

METHODS = (
    "none",
    "condition_gap@primary_weight=0.001,harmful_weight=5",
    "limit@t=1,damping=1e-6,rotate=false",
    "erase",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tasks of three classes each: coloured noise around a class colour."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for task, base in (("primary", 60), ("harmful", 130)):
        for number, name in enumerate(("a", "b", "c")):
            folder = root / task / name
            folder.mkdir(parents=True)
            for index in range(40):
                pixels = rng.normal(base + 25 * number, 40, (8, 8, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def config(folders, **fields):
    return Experiment(
        **{
            "name": "tiny",
            "data": "image_folder",
            "data_fields": {
                "primary_path": str(folders / "primary"),
                "harmful_path": str(folders / "harmful"),
                "size": 8,
                "resize": 8,
                "held_out_fraction": 0.5,
            },
            "model": "mlp",
            "model_fields": {"input_shape": (8, 8, 3), "widths": (16, 6)},
            "weights": "random",
            "train": "layers.1",
            "methods": METHODS,
            "steps": 6,
            "batch_size": 16,
            "groups": 3,
            "group_rows": 20,
            "attackers": ("gd", "ridge"),
            "fine_tune_steps": 6,
            **fields,
        }
    )


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return out, {found["method"]: found for found in run.immunise(config(folders), out)}


def test_every_run_has_its_sections(finished):
    out, results = finished
    assert set(results) == set(METHODS)
    for method, found in results.items():
        folder = out / run.run_folder(method, 0)
        assert {path.name for path in folder.iterdir()} >= {"config.json", "backbone"}
        assert result.read(folder / "result.json") == found
        assert found["backbone"]["model"] == "mlp"
        same = found["backbone"]["hash_before"] == found["backbone"]["hash_after"]
        assert same == (method == "none")
        assert found["groups"]["held_out"]["rows"] == 20
        assert found["data"]["primary"]["d"] == 6


def test_no_method_changes_nothing(finished):
    found = finished[1]["none"]
    for rows in found["conditioning"].values():
        for row in rows.values():
            assert row["log_rir"] == 0
    assert found["utility"]["before"] == found["utility"]["after"]
    assert found["harmful_utility"]["before"] == found["harmful_utility"]["after"]


def test_the_limit_is_attained_and_keeps_the_head(finished):
    found = finished[1]["limit@t=1,damping=1e-6,rotate=false"]
    row = found["conditioning"]["damped"]["train"]
    assert row["log_fraction"] == pytest.approx(1, abs=0.05)
    assert abs(row["log_ratio_primary"]) < 0.05
    assert found["utility"]["before"] == pytest.approx(found["utility"]["after"])
    assert found["logits_change"] < 1e-4
    assert finished[1][METHODS[1]]["logits_change"] > 1e-3
    assert finished[1]["none"]["logits_change"] == 0


def test_erasure_leaves_the_constant_predictor(finished):
    found = finished[1]["erase"]
    assert found["harmful_utility"]["after"]["train"] <= 1 / 3 + 0.1
    assert found["harmful_utility"]["before"]["train"] > 0.7


def test_the_saved_backbone_gives_the_features_that_were_measured(finished, folders):
    out, results = finished
    method = METHODS[1]
    loaded = checkpoint.load_immunised(out / run.run_folder(method, 0) / "backbone")
    assert loaded.metadata["method"] == method
    prepared = prepare(config(folders))
    pixels = halved(prepared.pair)["held_out"].primary
    inputs = loaded.backbone.preprocess(jnp.asarray(pixels.x))
    features = loaded.backbone.features(loaded.backbone.params, inputs)
    logits = features @ loaded.head["kernel"] + loaded.head["bias"][None, :]
    hits = float(np.mean(np.argmax(np.asarray(logits), axis=1) == pixels.y))
    assert hits == pytest.approx(results[method]["utility"]["after"]["held_out"])


def test_a_finished_run_is_kept_and_another_config_refused(finished, folders):
    out, results = finished
    again = run.immunise(config(folders), out, resume=True)
    assert {found["method"]: found for found in again} == results
    with pytest.raises(ValueError, match="holds a finished run"):
        run.immunise(config(folders), out)
    with pytest.raises(ValueError, match="steps differ"):
        run.immunise(config(folders, steps=7), out, resume=True)


def test_a_config_comes_back_from_its_file(finished, folders):
    out, _ = finished
    path = out / run.run_folder("erase", 0) / "config.json"
    read = read_config(path)
    wanted = dataclasses.replace(config(folders), methods=("erase",))
    assert read.to_json() == wanted.to_json()
    assert isinstance(read.optimiser, OptimiserConfig)
    fields = read_fields(path)
    with pytest.raises(ValueError, match="unknown config key 'stepz'"):
        Experiment.from_json({**fields, "stepz": 1})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"methods": ("nonesuch",)}, "unknown method"),
        ({"data": "nonesuch"}, "unknown data set"),
        ({"weight_attackers": ("nonesuch",)}, "unknown attack"),
        ({"steps": 0}, "steps must be"),
        ({"parallel": "threads"}, "parallel"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_a_bad_experiment_is_refused_at_the_door(folders, fields, words):
    with pytest.raises(ValueError, match=words):
        config(folders, **fields)


def test_a_pattern_that_names_nothing_is_refused(folders):
    with pytest.raises(ValueError, match="names no parameter"):
        prepare(config(folders, train="layers.7"))


def test_steps_come_from_the_label_then_the_method_then_the_experiment(folders):
    one = config(folders, method_fields={"imma": {"steps": 9}})
    assert one.method("imma@steps=4").steps == 4
    assert one.method("imma").steps == 9
    assert one.method("condition_gap").steps == 6
    assert one.method("limit").steps == 1
    assert one.method("limit").batch_size is None


def test_a_head_is_fitted_to_features_of_any_scale():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    scale = np.geomspace(1e-2, 1e2, 5)
    features = (rng.normal(size=(300, 5)) + 3 * np.eye(5)[labels]) * scale + 7
    x, y = jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32)
    head = fit_head(x, y, 3)
    hits = np.argmax(np.asarray(x @ head.kernel + head.bias[None, :]), axis=1) == labels
    assert hits.mean() > 0.9
    assert head.kernel.dtype == jnp.float32


def test_activations_do_not_depend_on_how_rows_are_cut():
    backbone = models.create("mlp", rng_key=jax.random.key(0), input_shape=(4, 4, 3), widths=(8, 4))
    trainable = backbone.split_at("layers.1")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    (found,) = at_cut(trainable, [pixels])
    expected = trainable.prefix_fn(backbone.preprocess(jnp.asarray(pixels)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    features = batched(trainable.features_fn, trainable.params, found, rows=3)
    whole = backbone.features(backbone.params, backbone.preprocess(jnp.asarray(pixels)))
    np.testing.assert_allclose(features, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_deep_experiment_is_assessed(finished, tmp_path):
    level = assessment.Level(probes="quick", weight_steps=4, batch_size=16, record=3, trial=False)
    assert run_assess.attackers_of(config(finished[0])) == [
        *("gd", "ridge", "fine_tune_sgd", "fine_tune_adam")
    ]
    names = ("ridge", "merge_with_public", "refresh_statistics")
    (found,) = run_assess.assess([finished[0]], tmp_path, level=level, attackers=names)
    labels = [model["label"] for model in found["models"]]
    assert labels[0] == "none"
    assert set(labels) == set(METHODS)
    assert found["data"]["metric"] == "accuracy"
    assert 1 / 3 <= found["data"]["chance"] < 1 / 2  # the largest of three classes
    status = {
        row["attacker"]: row["status"]
        for row in found["rows"]
        if (row["model"], row["task"]) == ("none", "harmful")
    }
    assert status == {
        "ridge": "done",
        "merge_with_public": "done",
        "refresh_statistics": "not_applicable",  # a perceptron has no batch norm
    }
    for model in found["models"]:
        shipped = run.load_results([finished[0]])
        result_of = next(one for one in shipped if one["method"] == model["label"])
        utility = result_of["utility"]["after"]["held_out"]
        assert model["utility"]["mean"] == pytest.approx(utility, abs=1e-6)
