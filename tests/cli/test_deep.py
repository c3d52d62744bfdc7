"""Flags of deep experiments, and what `list` says of models and image pairs."""

import json
import re
import shlex

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from jaximm import cli, models, run
from jaximm.run import assess as run_assess
from jaximm.run.config import Experiment, code_of, config_json
from jaximm.run.prepare import load_backbone

CONFIG = """
from jaximm.run import Experiment
CONFIG = Experiment(
    name="tiny", data="cifar10_split", model="mlp", weights="random", train="layers.1",
    methods=("none", "condition_gap"), steps=7,
)
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return lambda *words: cli.experiment_of(
        cli.parse(["immunise", str(path), "--out", str(tmp_path / "runs"), *words])
    )


def test_every_part_of_a_deep_experiment_has_its_flag(experiment):
    config = experiment(
        *("--steps", "9", "--batch-size", "32", "--method", "imma", "--image-size", "32"),
        *("--set", "images.train_rows=50", "--set", "backbone.widths=[8, 4]"),
        *("--set", "optimiser.name=sgd", "--set", "optimiser.learning_rate=0.5"),
        *("--set", "imma.weight=0.7", "--set", 'sites=["layers.1"]'),
    )
    assert isinstance(config, Experiment)
    assert (config.steps, config.batch_size, config.image_size) == (9, 32, 32)
    assert config.methods == ("imma",)
    assert config.data_fields == {"train_rows": 50}
    assert config.model_fields == {"widths": (8, 4)}
    assert (config.optimiser.name, config.optimiser.learning_rate) == ("sgd", 0.5)
    assert config.method_fields["imma"] == {"weight": 0.7}
    assert config.sites == ("layers.1",)


def test_how_weights_are_read_has_its_flags(experiment):
    config = experiment(
        *("--weights", "w.pth", "--classifier", "false", "--prefix", "state_dict_ema."),
        *(
            "--layout",
            "own",
            "--set",
            "preprocess.channels=bgr",
            "--set",
            "preprocess.mean=[1,2,3]",
        ),
    )
    assert (config.weights, config.classifier) == ("w.pth", False)
    assert (config.prefix, config.layout) == ("state_dict_ema.", "own")
    assert config.preprocess == {"channels": "bgr", "mean": (1.0, 2.0, 3.0)}
    assert experiment("--set", 'preprocess={"size": 8}').preprocess == {"size": 8}
    again = Experiment.from_json(json.loads(json.dumps(config.to_json())))
    assert again.preprocess == {"channels": "bgr", "mean": [1.0, 2.0, 3.0]}
    assert again.prefix == config.prefix


def test_the_advice_of_a_refusal_works_as_printed(experiment, tmp_path):
    backbone = load_backbone(experiment())
    arrays = {f"net.module.{path}": np.array(value) for path, value in backbone.params.items()}
    arrays = {key: value for key, value in arrays.items() if "classifier" not in key}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    words = ["--weights", str(tmp_path / "w.safetensors")]
    with pytest.raises(ValueError, match="fits no layout") as error:
        load_backbone(experiment(*words))
    printed = re.findall(r"\(on the command line: (.*?)\)", str(error.value))
    assert printed == ["--prefix net.module.", "--classifier false"]
    for text in printed:
        words += shlex.split(text)
    words += ["--set", "preprocess.channels=bgr", "--image-size", "48"]
    found = load_backbone(experiment(*words))
    assert (found.preprocess.size, found.preprocess.channels) == (48, "bgr")
    for path, value in backbone.params.items():
        if "classifier" not in path:
            np.testing.assert_array_equal(found.params[path], value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "optimiser.rate=1"), "unknown key 'optimiser.rate'"),
        (("--set", "optimiser.name=lion"), "must be one of"),
        (("--set", "optimiser.learning_rate=-1"), "learning_rate must be"),
        (("--images", "nonesuch"), "unknown data set"),
        (("--backbone", "nonesuch"), "unknown model"),
        (("--damping", "0"), "damping must be > 0"),
        (("--set", "data.path=x"), "unknown key 'data.path'"),
        (("--set", "table.path=x"), "neither data nor model nor optimiser nor preprocess nor a"),
        (("--images", "mnist_fashion", "--data", "cifar10_split"), "data is given twice"),
        (("--parallel", "threads"), "must be one of"),
        (("--classifier", "no"), "classifier must be bool"),
        (("--set", "preprocess.sise=3"), "unknown key 'preprocess.sise'"),
        (("--set", 'preprocess={"sise": 3}'), "unknown field 'sise' of preprocess"),
        (("--set", "preprocess.size=3", "--image-size", "4"), "both give a size, 4 and 3"),
        (("--steps", "0"), "steps must be an integer >= 1"),
    ],
)
def test_what_does_not_fit_is_a_usage_error(experiment, words, message):
    with pytest.raises(cli.UsageError, match=re.escape(message)):
        experiment(*words)


def test_another_backbone_drops_the_fields_of_the_first(experiment):
    config = experiment("--backbone", "squeezenet1_1")
    assert config.model_fields == {}


def test_processes_are_described_whole_or_not_at_all(tmp_path, capsys):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    arguments = ["immunise", str(path), "--out", str(tmp_path / "runs"), "--processes", "2"]
    assert cli.main(arguments) == 2
    assert "coordinator" in capsys.readouterr().err
    whole = [*arguments, "--coordinator", "localhost:1", "--process-id", "0"]
    assert cli.main([*whole, "--peer-timeout", "0"]) == 2
    assert "heartbeat_timeout must be >= 1 second, got 0" in capsys.readouterr().err


def test_list_names_models_and_data_sets(capsys):
    assert cli.main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    models = {entry["name"]: entry for entry in found["models"]}
    assert {"efficientnet_lite0", "resnet18", "vit_b16", "squeezenet1_1"} <= set(models)
    assert all(entry["description"] and entry["source"] for entry in models.values())
    pairs = {entry["name"]: entry for entry in found["data sets"]}
    assert {"cifar10_fashion", "image_folder", "imagenet_cars"} <= set(pairs)
    assert all(entry["description"] for entry in pairs.values())


@pytest.mark.parametrize("words", [("--batch-size", "None"), ("--set", "batch_size=null")])
def test_none_is_a_value(experiment, words):
    assert experiment(*words).batch_size is None
    assert experiment().batch_size == 64
    assert experiment("--checkpoint-every", "None").checkpoint_every is None


REGISTERS = """
import jaximm
jaximm.register("model", "mine", jaximm.models.REGISTRY["mlp"])
"""


def test_what_comes_from_a_file_is_named_when_it_is_loaded(tmp_path, capsys, monkeypatch):
    """`attack`, `assess` and `compare` run the file of the user's network, and say so."""
    monkeypatch.setattr(models, "REGISTRY", dict(models.REGISTRY))
    file = tmp_path / "mine.py"
    file.write_text(REGISTERS + CONFIG.replace("mlp", "mine"))
    config = run.load_experiment(str(file))
    folder = tmp_path / "runs" / "none-s0"
    (folder / "backbone").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(config, code_of(config, str(file)))))
    reached = []

    def stop(*args, **options):
        reached.append(models.REGISTRY["mine"])
        raise ValueError("far enough")

    monkeypatch.setattr(run_assess, "assess", stop)
    monkeypatch.setattr("jaximm.data.load", stop)
    monkeypatch.setattr("jaximm.run.compare.is_checkpoint", lambda path: True)
    runs, checkpoint = str(tmp_path / "runs"), str(folder / "backbone")
    for number, argv in enumerate(
        (["attack", runs], ["assess", runs], ["compare", checkpoint, checkpoint]), 1
    ):
        models.REGISTRY.pop("mine")
        assert cli.main(argv) == 1
        told, failed = capsys.readouterr().err.splitlines()
        assert f"running {file}, which defines model 'mine'" in told
        assert "a .py configuration is code that runs" in told
        assert failed == "jaximm: far enough"
        assert len(reached) == number
    file.write_text(file.read_text() + "# other")
    other = tmp_path / "other.py"
    other.write_text(
        "import jaximm\njaximm.register('model', 'mine', jaximm.models.REGISTRY['mlp'])\n"
    )
    models.REGISTRY.pop("mine")
    assert cli.main(["attack", runs]) == 1
    assert "has changed since" in capsys.readouterr().err
    assert cli.main(["attack", runs, "--load", str(other)]) == 1
    assert capsys.readouterr().err == "jaximm: far enough\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "condition_gap: batch_size must be in [1, 18] for a task of 18 rows, got 64"),
        ({"batch_size": 10}, "condition_gap: a batch of 10 rows does not divide by 8 devices"),
        ({"batch_size": None, "accumulate": 5}, "36 rows of a step (both tasks) do not divide by"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_before_the_first_method(tmp_path, fields, message):
    for task in ("keep", "harm"):
        for name in ("a", "b"):
            folder = tmp_path / task / name
            folder.mkdir(parents=True)
            for shade in range(12):
                Image.new("RGB", (8, 8), (20 * shade, 0, 0)).save(folder / f"{shade}.png")
    images = {"primary_path": str(tmp_path / "keep"), "harmful_path": str(tmp_path / "harm")}
    config = Experiment(
        name="few", data="image_folder", data_fields={**images, "size": 8, "resize": 8},
        model="mlp", weights="random", train="layers.1", methods=("none", "condition_gap"),
        **fields,
    )  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        run.immunise(config, tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("result.json"))
