"""`jaximm immunise` and `jaximm assess` of a language model's folder, through the command line."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import language_folder
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaximm import cli
from jaximm.models import llama
from jaximm.run.language import METHODS

pytestmark = pytest.mark.heavy

TEXTS = {"primary": "keep", "harmful": "harm", "control": "other"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model's folder, and three folders of texts."""
    root = tmp_path_factory.mktemp("cli_language")
    language_folder.make(root)
    return root


def flags(root, more=()):
    """Of texts that are folders, and of sizes that all tests share, where `more` has none."""
    sizes = {"--length": "16", "--measured-rows": "24", "--batch-size": "4", "--train": "last:1"}
    found = [word for flag, value in sizes.items() if flag not in more for word in (flag, value)]
    for role, name in TEXTS.items():
        if f"--{role}" not in more:
            found += [f"--{role}", "text:folder", "--set", f"{role}.path={root / name}"]
    return [*found, "--set", "primary.held_out=0.25", *more]


def immunise(root, out, *more, model="model"):
    return cli.main(["immunise", str(root / model), "--out", str(out), *flags(root, more)])


def refusal(capsys, code, words):
    assert code in (1, 2)
    said = capsys.readouterr()
    assert words in " ".join(said.err.split())
    assert said.err.count("\n") == 1
    return code


def logits(folder):
    found = llama.load_folder(folder)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 38, (2, 12)), jnp.int32)
    return np.asarray(llama.logits(found.params, tokens, found.config))


def test_a_folder_comes_back_with_equal_logits_and_what_was_measured(
    root, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")  # narrower, and the table goes on below
    moved = ["--method", "gauge@spread=10,moves=neurons", "--site", "layers.1.down"]
    assert immunise(root, tmp_path / "out", *moved) == 0
    assert np.abs(logits(tmp_path / "out") - logits(root / "model")).max() < 1e-4
    record = json.loads((tmp_path / "out" / "jaximm.json").read_text())
    assert record["config"]["sites"] == ["layers.1.down"]
    assert record["command"].startswith(f"jaximm immunise {root / 'model'} --out")
    said = capsys.readouterr().out
    assert "(float32 weights)" in said
    assert "largest change of a logit" in said
    assert "At no site is RIR on held-out documents above that of both controls" in said or (
        "above that of both controls at layers.1.down" in said
    )
    rows = [line.split() for line in said.splitlines() if line.split()[1:2] == ["held-out"]]
    assert [row[0] for row in rows] == ["features", "layers.1.down"]
    assert all(row[-1] in ("yes", "no") for row in rows)
    for word in ("benign", "null", "perplexity", "primary (folder)", f"--base {root / 'model'}"):
        assert word in said


def test_a_dry_run_plans_a_step_and_writes_nothing(root, tmp_path, capsys):
    more = ["--dry-run", "--steps", "7", "--devices", "4"]
    assert immunise(root, tmp_path / "out", *more) == 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    loaded = llama.load_folder(root / "model")
    trained = llama.last_layers(loaded.params, 1).trained
    assert f"{sum(leaf.size for leaf in loaded.params.values()):,} numbers" in said
    assert f"{sum(leaf.size for leaf in trained.values()):,} numbers train" in said
    assert "steps: 7 of 4 rows of 16 tokens" in said
    assert "a device of 4" in said
    assert "harmful: text:folder, rows to train on" in said
    more = ["--dry-run", "--method", "gauge", "--batch-size", "4000"]  # which takes no step
    assert immunise(root, tmp_path / "out", *more) == 0
    assert "steps: none" in capsys.readouterr().out
    code = immunise(root, tmp_path / "out", "--dry-run", "--devices", "3")
    refusal(capsys, code, "do not divide by the 3 devices")


def test_headers_say_what_loading_gives(root):
    loaded, found = (fun(root / "model") for fun in (llama.load, llama.abstract))
    assert found[1:] == loaded[1:]
    assert {k: (v.shape, v.dtype) for k, v in found.params.items()} == {
        k: (v.shape, v.dtype) for k, v in loaded.params.items()
    }


@pytest.mark.slow
def test_devices_share_a_run_and_give_one_devices_numbers(root, tmp_path, capsys):
    for count in (1, 2):
        more = ["--steps", "5", "--devices", str(count), "--train", "all"]
        assert immunise(root, tmp_path / str(count), *more) == 0
    capsys.readouterr()
    one, two = (llama.load_folder(tmp_path / str(count)).params for count in (1, 2))
    for path, value in one.items():
        np.testing.assert_allclose(two[path], value, atol=1e-5, err_msg=path)
    assert not np.array_equal(logits(tmp_path / "1"), logits(root / "model"))


def other_architecture(folder):
    content = json.loads((folder / "config.json").read_text())
    content |= {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(content))


def fewer_tensors(folder):
    arrays = load_file(folder / "model.safetensors")
    del arrays["model.layers.1.mlp.up_proj.weight"]
    save_file(arrays, folder / "model.safetensors")


def more_tensors(folder):
    arrays = load_file(folder / "model.safetensors")
    save_file(arrays | {"score.weight": np.ones(3, "f")}, folder / "model.safetensors")


def torn(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_architecture, "bert"),
        (fewer_tensors, "lacks model.layers.1.mlp.up_proj.weight"),
        (more_tensors, "holds score.weight, for which the model has no place"),
        (torn, "model.safetensors cannot be read"),
        (no_tokenizer, "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("planned", [False, True])
def test_a_damaged_folder_is_refused(change, words, planned, root, tmp_path, capsys):
    shutil.copytree(root / "model", tmp_path / "model")
    change(tmp_path / "model")
    more = ["--dry-run"] * planned
    code = immunise(root, tmp_path / "out", *more, model=tmp_path / "model")
    assert refusal(capsys, code, words) == 1
    assert not (tmp_path / "out").exists()


def test_a_torn_gguf_file_and_places_without_a_model_are_refused(root, tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(9))
    code = immunise(root, tmp_path / "out", model=tmp_path / "model.gguf")
    refusal(capsys, code, "model.gguf cannot be read")
    refusal(capsys, immunise(root, tmp_path / "out", model="nowhere"), "neither a folder with")
    refusal(capsys, immunise(root, tmp_path / "out", model="keep"), "config.json")


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--harmful", "text:nothing"], 2, "unknown text 'text:nothing'"),
        (["--length", "64"], 1, "made for 32 positions; give length <= 32"),
        (["--batch-size", "4000"], 1, "give a smaller batch_size"),
        (["--train", "last:9"], 1, "k must be in 1..2"),
        (["--site", "layers.9.down"], 1, "no site 'layers.9.down'"),
        (["--method", "erase"], 2, "no method for language models"),
        (["--method", "gauge@spread"], 2, "must read name@key=value"),
        (["--steps", "none"], 2, "steps must be"),
        (["--set", "stepz=3"], 2, "unknown key 'stepz'"),
        (["--set", "harmful.counts=3"], 2, "unknown key 'harmful.counts'"),
        (["--set", "benign.length=3"], 2, "unknown key 'benign.length'"),
        (["--set", "optimiser.speed=3"], 2, "unknown key 'optimiser.speed'"),
        (["--keep", "-1"], 2, "keep must be finite and >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused(more, code, words, root, tmp_path, capsys):
    assert refusal(capsys, immunise(root, tmp_path / "out", *more), words) == code
    assert not (tmp_path / "out").exists()


def test_empty_texts_are_refused(root, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(" \n")
    more = ["--harmful", "text:folder", "--set", f"harmful.path={tmp_path}"]
    code = immunise(root, tmp_path / "out", *more)
    refusal(capsys, code, "a.txt: has no text; fill it or leave it out")


SHORT = {"tar": "inner_steps=2", "sophon": "inner_steps=2", "undo": "unlearn_steps=1",
         "mlac": "inner_steps=2,calibration=none", "antidote": "block=1"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("none", "gauge")])
def test_every_method_gives_a_folder_back(name, root, tmp_path):
    label = f"{name}@{SHORT[name]}" if name in SHORT else name
    assert immunise(root, tmp_path / "out", "--method", label, "--steps", "2") == 0
    assert np.abs(logits(tmp_path / "out") - logits(root / "model")).max() > 0


@pytest.mark.slow
def test_models_are_assessed_beside_their_base(root, tmp_path, capsys):
    assert immunise(root, tmp_path / "moved", "--method", "gauge@spread=10") == 0
    capsys.readouterr()
    attack = "fine_tune_adam@learning_rates=1e-2"
    words = ["assess", str(tmp_path / "moved"), "--attack", attack, "--suite", "quick"]
    assert cli.main([*words, "--out", str(tmp_path / "found"), "--no-cache"]) == 0
    found = json.loads((tmp_path / "found" / "assessment.json").read_text())
    assert {row["attacker"] for row in found["rows"]} == {attack}
    assert [model["label"] for model in found["models"]] == ["none", "moved"]
    assert found["protocol"]["extensions"] == 3
    said = capsys.readouterr().out
    assert "fine-tuning with Adam (learning rates 0.01)" in said
    assert (tmp_path / "found" / "assessment.html").exists()
    few = ["--out", str(tmp_path / "few"), "--harmful-rows"]
    assert cli.main([*words, *few, "2"]) == 0
    found = json.loads((tmp_path / "few" / "assessment.json").read_text())
    assert found["name"].endswith("-2-harmful-rows")
    assert {model["threat"]["harmful_rows"] for model in found["models"]} == {2}
    capsys.readouterr()
    refusal(capsys, cli.main([*words, *few, "1"]), "harmful rows must be 2 to")


def test_what_cannot_be_assessed_is_refused(root, tmp_path, capsys):
    model, base = str(root / "model"), ["--base", str(root / "model")]
    out = ["--out", str(tmp_path / "out")]
    refusal(capsys, cli.main(["assess", model, *out]), "give --base")
    refusal(capsys, cli.main(["assess", str(root / "keep"), *base, *out]), "config.json")
    code = cli.main(["assess", model, *base, *out, "--attack", "lora@rank=0"])
    assert refusal(capsys, code, "rank: expected whole numbers") == 2
    code = cli.main(["assess", model, *base, *out, "--set", "primary.speed=1"])
    assert refusal(capsys, code, "unknown key 'primary.speed'") == 2
    small = llama.load_folder(root / "model")
    cut = {"embedding.table", "unembedding.table"}
    params = {k: v[:40] if k in cut else v for k, v in small.params.items()}
    config = dataclasses.replace(small.config, vocabulary=40)
    llama.save_folder(tmp_path / "small", params, config)
    code = cli.main(["assess", str(tmp_path / "small"), *base, *out])
    refusal(capsys, code, "small has 40 tokens and its base 48")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["immunise", "smollm2", "--out", "x"], True),
        (["immunise", "--out", "MODEL", "house_prices"], False),
        (["immunise", "--dry-run", "--out=x", "MODEL"], True),
        (["immunise", "some.gguf"], True),
        (["immunise", "experiments/x/config.py"], False),
        (["immunise", "no/such/folder"], True),
        (["assess", "MODEL"], True),
        (["assess", "RUN"], False),
        (["assess", "RUN", "--base", "MODEL"], True),
        (["attack", "MODEL"], False),
        (["immunise", "--help"], False),
        (["assess"], False),
        ([], False),
    ],
)
def test_what_is_taken_for_a_language_model(words, expected, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root / "model")  # where one stands does not matter
    (tmp_path / "config.json").write_text('{"name": "x", "data": "house_prices"}')
    places = {"MODEL": str(root / "model"), "RUN": str(tmp_path)}
    assert cli.takes_model([places.get(word, word) for word in words]) == expected
