"""Configurations: to JSON and back, labels, and refusals that name what is known."""

import dataclasses
import json

import pytest

from jaximm import attacks, data, immunisers
from jaximm.config import (
    EXPERIMENTS,
    ExperimentConfig,
    load_experiment,
    method_config,
    parse_label,
    read_config,
)
from jaximm.immunisers.limit import LimitConfig

CONFIG = ExperimentConfig(
    name="own",
    data="arrays",
    data_fields={"path": "x.npz", "kind": "binary"},
    methods=("limit@t=1,damping=0.01", "condition_gap"),
    method_fields={"condition_gap": {"steps": 20, "rows": "batch", "batch_size": 8}},
    seeds=(0, 3),
    init="random",
    attackers=("gd", "ridge"),
    checkpoint_every=5,
)


@pytest.mark.parametrize("config", [*EXPERIMENTS.values(), CONFIG], ids=lambda config: config.name)
def test_json_and_back(config):
    text = json.dumps(config.to_json())
    assert ExperimentConfig.from_json(json.loads(text)) == config


def test_the_built_in_ones_are_under_their_names():
    assert {"house_price", "mnist_pair", "mnist_slant", "mnist_one_vs_rest"} <= set(EXPERIMENTS)
    for name, config in EXPERIMENTS.items():
        assert config.name == name
        assert config.description
        assert load_experiment(name) is config
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.name = "other"  # ty: ignore


def refusal(**fields) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        ExperimentConfig.from_json({"name": "x", "data": "house_prices", **fields})
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("fields", "bad", "known"),
    [
        ({"colour": 1}, "'colour'", [f.name for f in dataclasses.fields(ExperimentConfig)]),
        ({"data": "nothing"}, "'nothing'", data.REGISTRY),
        ({"data_fields": {"size": 3}}, "'size'", ["train_rows"]),
        ({"methods": ["magic"]}, "'magic'", immunisers.REGISTRY),
        ({"methods": ["limit@u=1"]}, "'u'", ["t", "damping", "shrinkage"]),
        (
            {"methods": ["limit"], "method_fields": {"limit": {"depth": 2}}},
            "'depth'",
            ["t", "damping"],
        ),
        ({"methods": []}, "at least one", immunisers.REGISTRY),
        ({"attackers": ["nobody"]}, "'nobody'", attacks.REGISTRY),
        ({"suite": "endless"}, "'endless'", attacks.SUITES),
        ({"init": "zero"}, "'zero'", ["identity", "random"]),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(fields, bad, known):
    message = refusal(**fields)
    assert bad in message
    assert all(name in message for name in known)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"damping": 0.0}, "damping must be > 0, got 0.0"),
        ({"damping": -1.0}, "damping must be > 0"),
        ({"damping": float("nan")}, "damping must be > 0, got nan"),
        ({"log_points": 0}, "log_points must be >= 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1, or None, got 0"),
        ({"seeds": []}, "seeds must name at least one"),
        ({"seeds": [0, -1]}, "seeds must be integers in [0, 2^31), got -1"),
        ({"seeds": [0.5]}, "got 0.5"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"methods": "limit"}, "config key 'methods' must be a list, got 'limit'"),
        ({"methods": ["none", "none"]}, "methods must differ"),
        ({"methods": ["limit@t=2"]}, "t must be in [0, 1], got 2"),
        ({"methods": ["limit@t=high"]}, "method label 'limit@t=high'"),
        ({"methods": ["limit@t"]}, "must read name@key=value"),
    ],
)
def test_values_out_of_range_are_refused(fields, words):
    assert words in refusal(**fields)


def test_missing_keys_are_named():
    for missing, fields in (("data", {"name": "x"}), ("name", {"data": "house_prices"})):
        with pytest.raises(ValueError, match=f"config key '{missing}' is missing"):
            ExperimentConfig.from_json(fields)


@pytest.mark.parametrize(
    ("label", "parsed"),
    [
        ("none", ("none", {})),
        ("limit@t=0.5", ("limit", {"t": 0.5})),
        (
            "condition_gap@rows=batch, batch_size=64,cap=1e-1",
            ("condition_gap", {"rows": "batch", "batch_size": 64, "cap": 0.1}),
        ),
        ("balanced_gap@both_ends=false", ("balanced_gap", {"both_ends": False})),
        ("imma@batch_size=null", ("imma", {"batch_size": None})),
    ],
)
def test_labels(label, parsed):
    assert parse_label(label) == parsed


@pytest.mark.parametrize("label", ["limit@t", "limit@t=1,", "limit@,t=1"])
def test_a_malformed_label_says_what_it_must_read(label):
    with pytest.raises(ValueError, match="must read name@key=value"):
        parse_label(label)


def test_a_labels_own_fields_come_before_the_experiments():
    fields = {"limit": {"t": 0.25, "damping": 0.1}, "none": {}}
    assert method_config("limit@t=1", fields) == LimitConfig(t=1, damping=0.1)
    assert method_config("limit", fields) == LimitConfig(t=0.25, damping=0.1)


# Files.


def test_from_a_json_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG.to_json()))
    assert load_experiment(str(path)) == CONFIG == read_config(path)


def test_from_a_python_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import dataclasses\n"
        "from jaximm.config import EXPERIMENTS\n"
        "CONFIG = dataclasses.replace(EXPERIMENTS['house_price'], methods=('none',))\n"
    )
    loaded = load_experiment(str(path))
    assert loaded == dataclasses.replace(EXPERIMENTS["house_price"], methods=("none",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read as a configuration"),
        ('{"name": "x", ', "cannot be read as a configuration"),
        ("[1, 2]", "must hold a JSON object, got list"),
        ('{"name": "x"}', "'data' is missing"),
        ('{"name": "x", "data": "house_prices", "seed": 1}', "unknown config key 'seed'"),
        ('{"name": "x", "data": "house_prices", "seeds": 3}', "config.json: "),
        ('{"name": "x", "data": "house_prices", "damping": "much"}', "config.json: "),
        ("\udcff", "cannot be read as a configuration"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r".") as caught:
        load_experiment(str(path))
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1\n", "must define CONFIG, an ExperimentConfig"),
        ("CONFIG = {'name': 'x'}\n", "must define CONFIG, an ExperimentConfig"),
        ("CONFIG = (\n", "cannot be run: SyntaxError"),
        ("import no_such_module_at_all\n", "cannot be run: ModuleNotFoundError"),
        (
            "from jaximm.config import *\nCONFIG = ExperimentConfig(name='x', data='y')\n",
            "cannot be run: ValueError: unknown data set 'y'",
        ),
    ],
)
def test_a_bad_python_file_is_named(tmp_path, content, words):
    path = tmp_path / "own.py"
    path.write_text(content)
    with pytest.raises(ValueError, match=r".") as caught:
        load_experiment(str(path))
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "nothing.json", "nothing.py", "."])
def test_neither_a_name_nor_a_file(name):
    with pytest.raises(ValueError, match="unknown experiment") as caught:
        load_experiment(name)
    assert all(known in str(caught.value) for known in EXPERIMENTS)
    assert "config.json" in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json cannot be read as a configuration"):
        read_config(tmp_path / "absent.json")
