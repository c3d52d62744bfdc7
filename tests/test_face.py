"""One call from Python: every kind of model goes the command line's way and comes back."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import random_backbone
from flax import linen, nnx
from helpers import thinned

import jaximm
from jaximm import cli, immunisers, models, run
from jaximm.assessment import Level, cells, outcomes
from jaximm.data.images.labelled_arrays import pair_of_arrays
from jaximm.models.own import own_model
from jaximm.run.assess import assess, bench_of
from jaximm.run.config import read_config
from jaximm.run.export import export
from jaximm.run.prepare import encoded
from jaximm.types import Batch

LEVEL = Level(probes="quick", weight_steps=4, trial=False, report_seeds=(101, 102), record=4)
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(60, 6))
X_HARMFUL = DRAW.normal(size=(60, 6)) * [3.0, 1.0, 1.0, 0.2, 1.0, 0.5]
PRIMARY, HARMFUL = (X, X[:, 0] + X[:, 1]), (X_HARMFUL, X_HARMFUL[:, 1])
LABELS, LABELS_HARMFUL = (np.arange(60) * 7 % 3, np.arange(60) * 11 % 4)
KERNELS = DRAW.normal(size=(6, 5)).astype(np.float32), DRAW.normal(size=(5, 4)).astype(np.float32)
BIASES = DRAW.normal(size=5).astype(np.float32), DRAW.normal(size=4).astype(np.float32)


@pytest.fixture(scope="module")
def done():
    return jaximm.immunise(PRIMARY, harmful=HARMFUL, method="limit", t=1.0, name="table")


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        for layer, kernel, bias in zip((self.first, self.last), KERNELS, BIASES, strict=True):
            layer.kernel, layer.bias = nnx.Param(jnp.asarray(kernel)), nnx.Param(jnp.asarray(bias))

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.first(x))))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="last")(jnp.tanh(linen.Dense(5, name="first")(x)))


def function(params, x):
    (first, last), biases = params["kernels"], params["biases"]
    return jnp.tanh(x @ first + biases[0][None, :]) @ last + biases[1][None, :]


def of_nnx():
    return Net(), lambda module, x: _evaluated(module)(x)


def _evaluated(module):
    module.eval()
    return module


def of_linen():
    layers = {
        name: {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        for name, kernel, bias in zip(("first", "last"), KERNELS, BIASES, strict=True)
    }
    return (LinenNet(), {"params": layers}), lambda variables, x: LinenNet().apply(variables, x)


def of_function():
    return (function, {"kernels": list(KERNELS), "biases": list(BIASES)}), function


def of_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(6, 4, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    net = eqx.tree_at(
        lambda one: [part for layer in one.layers for part in (layer.weight, layer.bias)],
        net,
        [jnp.asarray(p) for k, b in zip(KERNELS, BIASES, strict=True) for p in (k.T, b)],
    )
    return net, lambda module, x: jax.vmap(module)(x)


KINDS = [of_nnx, of_linen, of_function, of_equinox]


# ---------------------------------------------------------------- arrays


def test_arrays_come_back_as_the_map_that_attains_the_limit(done):
    row = done.document["conditioning"]["damped"]["train"]
    assert row["log_rir"] == pytest.approx(row["log_rir_limit"], rel=1e-9)
    assert row["log_rir"] > 0.5
    assert done.model.dtype == np.float64
    assert done.document["dtype"] == "float64"
    np.testing.assert_allclose(done.features(X), X @ done.model, rtol=1e-12, atol=1e-12)
    assert "linear map, float64; log RIR" in repr(done)


def test_double_precision_is_on_inside_alone(done):
    with jax.enable_x64(False):
        again = jaximm.immunise(PRIMARY, harmful=HARMFUL, method="limit", t=1.0)
        assert not jax.config.jax_enable_x64
    np.testing.assert_array_equal(again.model, done.model)


def test_a_saved_run_is_the_command_lines(done, tmp_path, capsys):
    folder = done.save(tmp_path / "run")
    config = read_config(folder / "config.json")
    prepared = run.prepare(config)  # from the files alone
    again = run.run_method(prepared, "limit")
    np.testing.assert_array_equal(again.params.backbone["neck.kernel"], done.model)
    (content,) = run.load_results([folder])
    assert content["conditioning"] == done.document["conditioning"]
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()
    with pytest.raises(ValueError, match="finished run"):
        done.save(folder)
    capsys.readouterr()


def test_tables_and_pages(done, tmp_path, monkeypatch):
    frame = done.table()
    assert list(frame["split"].unique()) == ["train", "held_out"]
    assert done.to_html(tmp_path / "page" / "mine.html").read_text().startswith("<!")
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    rows = done.table()
    assert rows[0]["log_rir"] == pytest.approx(frame["log_rir"][0], rel=1e-15)
    assert rows[0]["split"] == "train"


@pytest.mark.heavy
def test_attack_is_the_assessment_of_the_saved_run(done, tmp_path):
    held = jaximm.attack(done, attackers="ridge", level=LEVEL)
    folder = done.save(tmp_path / "run")
    (other,) = assess([folder], tmp_path / "out", attackers=["ridge"], level=LEVEL)
    assert held.document["rows"] == other["rows"]
    assert held.document["models"] == other["models"]
    assert [model["label"] for model in held.document["models"]] == ["none", "limit"]
    assert set(held.table()["attacker"]) == {"ridge"}
    held.save(tmp_path / "held")
    assert (tmp_path / "held" / "assessment.html").exists()
    assert cli.main(["compare", str(tmp_path / "held")]) == 0
    with pytest.raises(ValueError, match="already"):
        held.save(tmp_path / "held")


def _says_all(value):
    raise AssertionError(f"{type(value)} has no description: another process finds no cell")


@pytest.mark.heavy
def test_cells_are_found_again_by_other_processes(done, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "_itself", _says_all)
    folder = done.save(tmp_path / "run")
    identities = [_identities(read_config(folder / "config.json"), folder) for _ in range(2)]
    assert identities[0] == identities[1]


def _identities(config, folder):
    bench, subjects = bench_of(config, [folder])
    return [outcomes.model_identity(bench, subject) for subject in subjects]


@pytest.mark.heavy
def test_any_two_maps_are_assessed():
    theta = np.diag([1.0, 0.5, 2.0, 1.0, 1.0, 1.0])
    held = jaximm.attack(
        (np.eye(6), theta), attackers="ridge", level=LEVEL, primary=PRIMARY, harmful=HARMFUL
    )
    assert [model["label"] for model in held.document["models"]] == ["none", "after"]


@pytest.mark.slow
def test_classes_on_rows():
    names = np.array(["ant", "bee", "cat", "dog"])
    done = jaximm.immunise(
        (X, names[LABELS]), harmful=(X_HARMFUL, names[LABELS_HARMFUL]), method="limit@t=1"
    )
    assert done.document["data"]["harmful"] | {"classes": 4} == done.document["data"]["harmful"]
    assert done.prepared.pair.primary.classes == ("ant", "bee", "cat")
    assert done.document["utility"]["metric"] == "accuracy"
    assert done.model.dtype == np.float64
    np.testing.assert_allclose(done.features(X), X @ done.model + _bias(done), rtol=1e-9, atol=1e-9)


def _bias(done):
    return np.asarray(done.outcome.params.backbone.get("neck.bias", np.zeros(6)))


# ---------------------------------------------------------------- models


@pytest.mark.heavy
@pytest.mark.slow
def test_every_kind_of_model_is_immunised_alike_and_comes_back_as_it_came():
    found = {}
    for make in KINDS:
        try:
            model, call = make()
        except pytest.skip.Exception:
            continue
        done = jaximm.immunise(
            (X, LABELS), harmful=(X_HARMFUL, LABELS_HARMFUL), model=model, steps=3, batch_size=None
        )
        x = jnp.asarray(X, jnp.float32)
        np.testing.assert_allclose(call(done.model, x), done.features(X), rtol=1e-5, atol=1e-5)
        before = call(model[1] if isinstance(model, tuple) else model, x)
        assert np.abs(np.asarray(before) - done.features(X)).max() > 1e-4  # something moved
        found[done.case.own.kind] = done.features(X)
    assert {"Flax NNX module", "Flax Linen module", "function with parameters"} <= set(found)
    for features in found.values():
        np.testing.assert_allclose(features, found["Flax NNX module"], rtol=1e-4, atol=1e-5)


FIELDS = {  # what is as long as a run by default
    "undo": {"unlearn_steps": 1},
    "tar": {"inner_steps": 2},
    "mlac": {"inner_steps": 2},
    "sophon": {"inner_steps": 2},
    "antidote": {"block": 1},
}
EVERY = ["rmu", "npo", *(name for name in immunisers.REGISTRY if name not in ("rmu", "npo"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make"), [(name, KINDS[place % 4]) for place, name in enumerate(EVERY)]
)
def test_every_method_takes_a_model_of_the_users_and_gives_it_back(name, make):
    model, call = make()
    done = jaximm.immunise(
        (X, LABELS),
        harmful=(X_HARMFUL, LABELS_HARMFUL),
        model=model,
        method=name,
        steps=2,
        log_points=1,
        **FIELDS.get(name, {}),
    )
    x = jnp.asarray(X, jnp.float32)
    if "closed_form" not in immunisers.about(name).traits:  # those add a neck
        np.testing.assert_allclose(call(done.model, x), done.features(X), rtol=1e-4, atol=1e-4)
    assert np.all(np.isfinite(done.features(X)))


@pytest.mark.heavy
@pytest.mark.parametrize("make", thinned([of_nnx, of_function, of_equinox], keep=2))
def test_numbers_as_targets_put_a_neck_after_a_network(make):
    model, call = make()
    done = jaximm.immunise(PRIMARY, harmful=HARMFUL, model=model, method="limit@t=1")
    row = done.document["conditioning"]["damped"]["train"]
    assert row["log_rir"] == pytest.approx(row["log_rir_limit"], rel=1e-6)
    x = jnp.asarray(X, jnp.float32)
    if make is of_function:
        features = call(done.model["net"], x) @ done.model["neck"]["kernel"]
    else:
        features = call(done.model, x)
    np.testing.assert_allclose(features, done.features(X), rtol=1e-3, atol=1e-4)


def test_a_users_module_stays_as_it_was():
    module = Net()
    module.train()
    own = own_model(module)
    backbone = own.backbone(jnp.zeros((3, 6), jnp.float32))
    given = own.returned(backbone)
    assert type(given) is Net
    assert not module.drop.deterministic  # ours was a copy
    assert not given.drop.deterministic
    np.testing.assert_array_equal(given.last.kernel[...], KERNELS[1])


def test_images_go_through_the_preprocessing_that_is_given():
    scale = models.Preprocess(size=2, resize=2, mean=(10.0, 20.0, 30.0), std=(2.0, 2.0, 2.0))
    pixels = DRAW.integers(0, 256, size=(3, 2, 2, 3), dtype=np.uint8)
    kernel = DRAW.normal(size=(12, 4)).astype(np.float32)
    own = own_model((lambda kernel, x: x.reshape(x.shape[0], 12) @ kernel, kernel), scale)
    trainable = own.backbone(pixels).split_at("*")
    (rows,) = encoded(trainable, [Batch(pixels, np.zeros(3))])
    expected = ((pixels - np.array([10.0, 20.0, 30.0])) / 2).reshape(3, 12) @ kernel
    features = trainable.features_fn(trainable.params, rows.x)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-4)


def test_names_of_leaves_follow_the_tree():
    own = own_model((function, {"kernels": list(KERNELS), "biases": list(BIASES), "count": 3}))
    backbone = own.backbone(jnp.zeros((3, 6), jnp.float32))
    assert sorted(backbone.params) == [
        "net.biases_0",
        "net.biases_1",
        "net.kernels_0",
        "net.kernels_1",
    ]
    assert own.returned(backbone)["count"] == 3


@pytest.mark.heavy
def test_a_network_before_and_after_is_assessed_and_what_is_frozen_must_agree():
    (fun, params), _ = of_function()
    other = {**params, "biases": [params["biases"][0], params["biases"][1] + 1]}
    tasks = {"primary": (X, LABELS), "harmful": (X_HARMFUL, LABELS_HARMFUL)}
    both = (fun, params), (fun, other)
    held = jaximm.attack(both, attackers="ridge", level=LEVEL, **tasks)
    hashes = {model["label"]: model["hash"] for model in held.document["models"]}
    assert len(set(hashes.values())) == 2
    with pytest.raises(ValueError, match=r"'net.biases_1' differs .* freezes it"):
        jaximm.attack(both, attackers="ridge", level=LEVEL, train="net.kernels_0", **tasks)
    with pytest.raises(ValueError, match="one structure"):
        jaximm.attack(
            ((fun, params), (fun, params | {"more": KERNELS[0]})), attackers="ridge", **tasks
        )


# ---------------------------------------------------------------- files for others


@pytest.mark.slow
@pytest.mark.heavy
def test_a_vit_is_exported_in_the_layout_that_timm_loads(tmp_path):
    """Closed form after a small ViT on images, by way of a run directory, back bit by bit."""
    spec = models.REGISTRY["vit_s16"]
    shape = {"patch": 4, "grid": 2, "width": 8, "depth": 1, "heads": 2, "hidden": 8, "classes": 5}
    config = dataclasses.replace(spec.config, **shape)
    backbone = dataclasses.replace(
        random_backbone(spec, config, name="vit_s16"),
        width=8,
        preprocess=models.Preprocess(size=8, resize=8, interpolation="bilinear"),
    )
    pixels = DRAW.integers(0, 256, size=(2, 60, 8, 8, 3), dtype=np.uint8)
    names = np.array(["ant", "bee", "cat"])
    done = jaximm.immunise(
        (pixels[0], names[LABELS]),
        harmful=(pixels[1], LABELS_HARMFUL),
        model=backbone,
        method="limit@t=1",
    )
    assert done.model.params["neck.kernel"].shape == (8, 8)
    written = export(done.save(tmp_path / "run"), "timm", out=tmp_path / "w.safetensors")
    texts = written.metadata
    assert json.loads(texts["classes"]) == ["ant", "bee", "cat"]
    assert json.loads(texts["preprocess"])["interpolation"] == "bilinear"
    assert json.loads(texts["method_config"])["t"] == 1
    assert texts["neck"].startswith("separate: after the features x, x @ neck.weight.T")
    arrays = models.read_weights(written.path)
    expected = [key for entry in spec.layouts["timm"](config).entries for key in entry.keys]
    own = {"neck.weight", "neck.bias", "head.weight", "head.bias"}
    assert set(arrays) - own == set(expected) - own
    np.testing.assert_array_equal(arrays["head.weight"], done.outcome.params.head.kernel.T)
    again = models.create("vit_s16", weights=written.path)  # head and neck, by what it says
    assert again.config == dataclasses.replace(config, classes=3)
    assert again.preprocess == backbone.preprocess
    kernel = done.outcome.params.head.kernel
    expected = dict(done.model.params) | {"classifier.kernel": kernel}
    for path in set(expected) - {"classifier.bias"}:
        np.testing.assert_array_equal(again.params[path], expected[path])
    told = json.loads(texts["timm"])
    assert (told["architecture"], told["num_classes"]) == ("", 3)  # no size of timm's
    assert told["pretrained_cfg"]["interpolation"] == "bilinear"
    with pytest.raises(ValueError, match=r"no layout 'torchvision'; choose from \['timm', 'npz'\]"):
        export(tmp_path / "run", "torchvision")
    ours = models.read_weights(export(tmp_path / "run", "npz").path)
    np.testing.assert_array_equal(ours["neck.kernel"], done.model.params["neck.kernel"])


def test_a_map_is_exported_as_npz_with_what_it_is(done, tmp_path, capsys):
    folder = done.save(tmp_path / "run")
    written = export(folder, "npz")
    arrays = models.read_weights(written.path)
    np.testing.assert_array_equal(arrays["neck.kernel"], done.model)
    np.testing.assert_array_equal(arrays["head.kernel"], done.outcome.params.head)
    assert written.metadata["method"] == "limit"
    assert written.metadata["classes"] == "[]"
    assert written.metadata["neck"].startswith("separate")
    command = ["export", str(folder), "--layout", "npz"]
    assert cli.main(command) == 1
    assert "--replace" in capsys.readouterr().err
    assert cli.main([*command, "--replace"]) == 0
    assert "export:" in capsys.readouterr().out
    assert cli.main(["export", str(folder), "--layout", "timm"]) == 1
    assert "linear has no layout 'timm'; choose from ['npz']" in capsys.readouterr().err


# ---------------------------------------------------------------- the door


def one_number_a_row(params, x):
    return (x @ params)[:, 0]


X_NAN = np.where(np.arange(360).reshape(60, 6) == 7, np.nan, X)
Y_HARMFUL = HARMFUL[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"primary": X}, r"primary must be \(x, y\)"),
        ({"primary": (X_NAN, PRIMARY[1])}, "primary_x: row 1, column 1 is nan"),
        ({"primary": (X[:50], PRIMARY[1])}, "50 rows but y has 60"),
        ({"harmful": (X[:, :5], Y_HARMFUL)}, "6 features but the harmful task has 5"),
        ({"method": "limits"}, "unknown method 'limits'; choose from"),
        ({"method": "limit", "tt": 1}, "unknown field 'tt'; limit has"),
        ({"kind": "label"}, "unknown kind 'label'"),
        ({"primary": (X, LABELS)}, "kind='classes' if they are labels"),
        ({"primary": (X, np.array(["a", "b"] * 30))}, "classes in both"),
        ({"train": "net"}, "train='neck', got 'net'"),
        ({"model": Net}, "got the class Net"),
        ({"model": 3}, "got int"),
        ({"model": nnx.Dict(a=nnx.Param(np.ones(2)))}, "Dict cannot be called"),
        ({"model": (LinenNet(), {})}, "comes with its variables"),
        ({"model": (function, {"count": 3})}, "nothing can train"),
        ({"model": (one_number_a_row, KERNELS[0])}, r"must give features \[n, d\].*got \[2\]"),
        ({"model": Net(), "primary": (X.astype(np.uint8), LABELS)}, "need preprocess="),
        ({"model": Net(), "primary": (X, LABELS)}, "classes in both"),
        (
            {"model": Net(), "primary": (np.sort(LABELS)[:, None] * X, np.sort(LABELS)),
             "harmful": (X, LABELS)},
            "sorted by label",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_at_the_door(arguments, words):
    given = {"primary": PRIMARY, "harmful": HARMFUL, "method": "limit"} | arguments
    with pytest.raises(ValueError, match=words):
        jaximm.immunise(given.pop("primary"), **given)


@pytest.mark.parametrize(
    ("models_given", "words"),
    [
        (3, r"two models \(before, after\), got int"),
        ((np.eye(6), np.eye(5)), "rows have 6 features"),
    ],
)
def test_assess_refuses_what_is_no_pair(models_given, words):
    with pytest.raises(ValueError, match=words):
        jaximm.assess(models_given, primary=PRIMARY, harmful=HARMFUL)
    with pytest.raises(ValueError, match="primary="):
        jaximm.assess(models_given)


def test_attack_names_its_attackers(done):
    with pytest.raises(ValueError, match="at least one"):
        jaximm.attack(done, attackers=[])
    with pytest.raises(ValueError, match="unknown attack 'nobody'"):
        jaximm.attack(done, attackers="nobody")
    with pytest.raises(ValueError, match="leave primary out"):
        jaximm.attack(done, attackers="ridge", primary=PRIMARY)
    with pytest.raises(ValueError, match="leave train out"):
        jaximm.attack(done, attackers="ridge", train="neck")


def test_a_network_from_python_is_not_made_from_its_name(tmp_path):
    config = run.Experiment(name="x", data="labelled_arrays", model="python:Net", train="*")
    with pytest.raises(ValueError, match=r"handed over in Python.*--load FILE"):
        run.prepare(config, pair=done_pair())


def done_pair():
    x = X.astype(np.float32)
    return pair_of_arrays(primary_x=x, primary_y=LABELS, harmful_x=x, harmful_y=LABELS)


@pytest.mark.heavy
def test_a_saved_network_is_there_again_once_it_is_registered(tmp_path, monkeypatch):
    done = jaximm.immunise(
        (X, LABELS), harmful=(X_HARMFUL, LABELS_HARMFUL), model=Net(), steps=3, batch_size=None
    )
    folder = done.save(tmp_path / "run")
    config = read_config(folder / "config.json")
    assert config.model == "python:Net"
    arrays = models.read_weights(export(folder, "npz").path)  # needs no code
    moved = done.outcome.params.backbone["net.first.kernel"]
    np.testing.assert_array_equal(arrays["net.first.kernel"], moved)
    monkeypatch.setattr(models, "REGISTRY", dict(models.REGISTRY))
    models.REGISTRY["Net"] = models.whole(lambda rngs: Net(), width=4)
    prepared = run.prepare(config)
    for path, value in done.prepared.backbone.params.items():
        np.testing.assert_array_equal(prepared.backbone.params[path], value)
    for ours, theirs in zip(prepared.held_out, done.prepared.held_out, strict=True):
        np.testing.assert_array_equal(ours.x, theirs.x)
        np.testing.assert_array_equal(ours.y, theirs.y)
    bench, subjects = bench_of(config, [folder])
    assert [subject.label for subject in subjects] == ["none", "condition_gap"]
    np.testing.assert_array_equal(subjects[1].params["net.first.kernel"], moved)
    assert bench.harmful.classes == 4
    monkeypatch.setattr(cells, "_itself", _says_all)
    assert _identities(config, folder) == _identities(config, folder)
