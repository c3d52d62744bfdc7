"""Configurations: to JSON and back, labels, and refusals that name what is known."""

import dataclasses
import hashlib
import json
import sys

import pytest

from jaximm import attacks, data, immunisers, registry
from jaximm.immunisers.conditioning.limit import LimitConfig
from jaximm.registry import parse_label
from jaximm.run.cases import EXPERIMENTS, load_experiment
from jaximm.run.config import (
    Experiment,
    code_of,
    config_json,
    load_code,
    method_config,
    read_code,
    read_config,
)

CONFIG = Experiment(
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
    assert json.loads(text)["version"] == 2
    assert Experiment.from_json(json.loads(text)) == config


def test_version_1_is_read():
    """Two kinds of configuration, of tables and of images, are one now."""
    shared = {"methods": ["condition_gap@deep_harmful_weight=3"], "log_points": 7}
    weights = {"primary_weight": 0.5, "deep_primary_weight": 0.25}
    fields = shared | {"method_fields": {"condition_gap": weights}}
    table = Experiment.from_json({"name": "x", "data": "house_prices", "damping": 0.1, **fields})
    assert (table.model, table.train, table.init) == ("linear", "neck", "identity")
    assert (table.damping, table.log_points) == (0.1, 7)
    assert table.method_fields == {"condition_gap": {"primary_weight": 0.5}}
    network = Experiment.from_json(
        {
            "name": "x",
            "images": "cifar10_split",
            "image_fields": {"seed": 3},
            "backbone": "mlp",
            "backbone_fields": {"widths": [4]},
            "train": "*",
            **fields,
        }
    )
    assert (network.data, network.data_fields) == ("cifar10_split", {"seed": 3})
    assert (network.model, network.model_fields) == ("mlp", {"widths": [4]})
    assert network.methods == ("condition_gap@harmful_weight=3",)
    assert network.method("condition_gap").primary_weight == 0.25
    with pytest.raises(ValueError, match="version 3 is not known"):
        Experiment.from_json({"version": 3, "name": "x", "data": "house_prices"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "mlp"}, 'a table has the model "linear"'),
        ({"train": "layers.1"}, 'of which the "neck" trains'),
        ({"image_size": 32}, "image_size is for images, and 'house_prices' is a table"),
        ({"weights": "w.npz"}, "weights is for images"),
        ({"data": "cifar10_split"}, "unknown model ''"),
        ({"data": "cifar10_split", "model": "mlp"}, "train must name what trains"),
        ({"data": "cifar10_split", "model": "mlp", "train": "*", "init": "random"}, "init of a"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, words):
    assert words in refusal(**fields)


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
        Experiment.from_json({"name": "x", "data": "house_prices", **fields})
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("fields", "bad", "known"),
    [
        ({"colour": 1}, "'colour'", [f.name for f in dataclasses.fields(Experiment)]),
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
            Experiment.from_json(fields)


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
        ("lora@rank=64,alphas=8|1e2", ("lora", {"rank": 64, "alphas": (8, 100.0)})),
        ("lora@targets=query|value", ("lora", {"targets": ("query", "value")})),
    ],
)
def test_labels(label, parsed):
    assert parse_label(label) == parsed


@pytest.mark.parametrize(
    "label", ["limit@t", "limit@t=1,", "limit@,t=1", "limit@", "limit@t=", "limit@=1"]
)
def test_a_malformed_label_says_what_it_must_read(label):
    with pytest.raises(ValueError, match="must read name@key=value"):
        parse_label(label)


def test_a_field_that_a_label_gives_twice_is_refused():
    with pytest.raises(ValueError, match="'limit@t=1,t=0' gives 't' twice"):
        parse_label("limit@t=1,t=0")


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
        "from jaximm.run.cases import EXPERIMENTS\n"
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
        ("x = 1\n", "must define CONFIG, an Experiment"),
        ("CONFIG = {'name': 'x'}\n", "must define CONFIG, an Experiment"),
        ("CONFIG = (\n", "cannot be run: SyntaxError"),
        ("import no_such_module_at_all\n", "cannot be run: ModuleNotFoundError"),
        (
            "from jaximm.run.config import *\nCONFIG = Experiment(name='x', data='y')\n",
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


# Where code came from.

OWN = """
import dataclasses
from jaximm import data, register
from jaximm.run import EXPERIMENTS
from beside import NAME

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine:
    "Mine."
    rate: "float" = 0.1

register("data", NAME, (Mine, data.REGISTRY["house_prices"][1]))
CONFIG = dataclasses.replace(EXPERIMENTS["house_price"], name="own", data=NAME, methods=("none",))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A configuration in a file that registers its data set, and the config.json of its run."""
    monkeypatch.setattr(data, "REGISTRY", dict(data.REGISTRY))
    (tmp_path / "beside.py").write_text("NAME = 'own_data'\n")
    file = tmp_path / "own.py"
    file.write_text(OWN)
    config = load_experiment(str(file))
    place = tmp_path / "run" / "config.json"
    place.parent.mkdir()
    place.write_text(json.dumps(config_json(config, code_of(config, str(file)))))
    yield file, place, config
    sys.modules.pop("beside")
    sys.path.remove(str(tmp_path))


def forget():
    data.REGISTRY.pop("own_data")


def test_a_run_says_where_its_code_came_from_and_loads_it(own):
    file, place, config = own
    (code,) = read_code(place)
    assert code.file == str(file)
    assert code.sha256 == hashlib.sha256(OWN.encode()).hexdigest()
    assert code.registers == ("data.own_data",)
    assert read_config(place) == config  # the fields are what they were
    forget()
    with pytest.raises(ValueError, match=r"unknown data set 'own_data'.*own.py.*load_code"):
        read_config(place)
    told = []
    load_code([place], tell=told.append)
    (line,) = told
    assert str(file) in line
    assert "code that runs" in line
    assert read_config(place) == config
    load_code([place], tell=told.append)  # there already: nothing is run
    assert len(told) == 1
    # What a configuration of its own defines stays known when it goes on from the config.json.
    assert code_of(config, str(place)) == [code]


@pytest.mark.parametrize("forgotten", [False, True])
def test_code_that_changed_or_went_away_is_refused_with_what_to_do(own, forgotten):
    file, place, _ = own
    if forgotten:
        forget()
    file.write_text(OWN + "\n")
    with pytest.raises(ValueError, match=r"own\.py, which has changed since .*--load FILE"):
        load_code([place])
    file.unlink()
    with pytest.raises(ValueError, match=r"own\.py, which cannot be read .*--load FILE"):
        load_code([place])


def test_code_of_the_callers_choice_comes_first(own):
    file, place, _ = own
    forget()
    other = file.with_name("other.py")
    other.write_text(OWN + "# mended\n")
    file.unlink()
    registry.run_file(other)  # --load
    told = []
    load_code([place], tell=told.append)
    assert told == []


def test_a_file_may_be_run_again_and_another_may_not_take_its_name(own):
    file, _, _ = own
    registry.run_file(file)
    other = file.with_name("other.py")
    other.write_text(OWN)
    with pytest.raises(ValueError, match=r"other\.py cannot be run: .*registered already"):
        registry.run_file(other)


def test_what_an_entry_point_brought_is_asked_for(own):
    _, place, _ = own
    forget()
    fields = json.loads(place.read_text())
    point = {"entry_point": "data.own_data = own:ENTRY", "package": "own 1.0"}
    fields["code"] = [{**point, "registers": ["data.own_data"]}]
    place.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"came from entry point .*install own 1\.0"):
        load_code([place])


def test_an_origin_under_an_earlier_family_is_read_under_todays(own):
    _, place, _ = own
    fields = json.loads(place.read_text())
    registers = [*fields["code"][0]["registers"], "images.own_data", "weight_attack.own"]
    fields["code"][0]["registers"] = registers
    place.write_text(json.dumps(fields))
    assert read_code(place)[0].registers[-2:] == ("data.own_data", "attack.own")


@pytest.mark.parametrize(
    "code",
    ["mine.py", [1], [{"path": "x"}], [{"file": 3}], [{"file": "x", "registers": [3]}],
     [{"file": "x", "registers": ["net"]}], [{"file": "x", "registers": 3}], {"file": "x"}],
)  # fmt: skip
def test_a_damaged_origin_is_named(own, code):
    _, place, _ = own
    place.write_text(json.dumps(json.loads(place.read_text()) | {"code": code}))
    for reader in (read_config, read_code, lambda path: load_code([path])):
        with pytest.raises(ValueError, match=r"config\.json: config key 'code' must be a list"):
            reader(place)


def test_a_file_that_only_defines_its_configuration_is_recorded_and_not_run_again(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text(
        "from jaximm.run.cases import EXPERIMENTS\nCONFIG = EXPERIMENTS['house_price']\n"
    )
    config = load_experiment(str(file))
    (code,) = code_of(config, str(file))
    assert (code.file, code.registers) == (str(file), ())
    place = tmp_path / "config.json"
    place.write_text(json.dumps(config_json(config, [code])))
    file.write_text("raise SystemExit('not to be run')\n")
    load_code([place])
    assert code_of(config, str(place)) == [code]
    with pytest.raises(ValueError, match=r"plain\.py cannot be run: SystemExit"):
        load_experiment(str(file))
    assert code_of(EXPERIMENTS["house_price"], "house_price") == []


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("limit@t=abc", "method label 'limit@t=abc': t must be float, got 'abc'"),
        ("limit@rotate=3", "method label 'limit@rotate=3': rotate must be bool, got 3"),
        ("condition_gap@steps=1.5", "steps must be"),
        ("imma@batch_size=many", "batch_size must be"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_words(label, words):
    message = refusal(methods=[label])
    assert words in message
    assert "supported between" not in message
    name, fields = parse_label(label)
    assert words.partition(": ")[2] in refusal(methods=[name], method_fields={name: fields})
