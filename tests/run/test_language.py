"""A language model from folder to folder: what is written, measured and refused."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import language_folder
import numpy as np
import pytest
from helpers import thinned
from language_folder import CONFIG
from rich.console import Console

from jaximm import report
from jaximm.assessment import Level
from jaximm.models import llama
from jaximm.records import assessment as assessment_record
from jaximm.report import page
from jaximm.run import language as run_language
from jaximm.run.assess_language import assess_language, read_record
from jaximm.run.language import LanguageExperiment, immunise_language
from jaximm.training.optimiser import OptimiserConfig

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model's folder, and three folders of texts."""
    root = tmp_path_factory.mktemp("language")
    language_folder.make(root)
    return root


def experiment(root, **fields):
    texts = {"primary": "keep", "harmful": "harm", "control": "other"}
    fields.setdefault(
        "text_fields",
        {role: {"path": str(root / name), "held_out": 0.25} for role, name in texts.items()},
    )
    names = dict.fromkeys(texts, "text:folder")
    settings = dict(length=16, batch_size=4, steps=6, measured_rows=24, train="last:1")
    return LanguageExperiment(**(dict(model=str(root / "model")) | names | settings | fields))


def row_of(record, **wanted):
    (found,) = [
        row for row in record["conditioning"] if all(row[k] == v for k, v in wanted.items())
    ]
    return found


@pytest.mark.slow
def test_a_gauge_moves_sites_and_no_logit(root, tmp_path):
    config = experiment(
        root,
        method="gauge@moves=neurons+values,spread=100",
        sites=("layers.1.down", "layers.0.output"),
    )
    record = immunise_language(config, tmp_path / "out", command="test")
    assert record == read_record(tmp_path / "out")
    assert record["precision"] == "float32 weights"
    assert record["change_of_logits"]["largest_change"] < 1e-3
    for role in ("primary", "harmful", "control"):
        before, after = (record["utility"][when][role] for when in ("before", "after"))
        assert before["nats"] == pytest.approx(after["nats"], abs=1e-4)
        assert before["perplexity"] == pytest.approx(np.exp(before["nats"]))
    for against in ("harmful", "control", "null"):
        same = row_of(record, site="features", split="held_out", against=against)
        assert same["log_rir"] == pytest.approx(0, abs=1e-3)
        moved = row_of(record, site="layers.1.down", split="train", against=against)
        assert abs(moved["log_ratio_primary"]) > 0.5
        assert moved["log_rir"] <= moved["log_rir_limit"] + 1e-6
        low, high = moved["primary"]["after"]["bracket"]
        assert low <= moved["primary"]["after"]["log_kappa"] <= high
    written = llama.load_folder(tmp_path / "out")
    assert written.config == CONFIG
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="not empty"):
        immunise_language(config, tmp_path / "out")


@pytest.mark.slow
def test_the_closed_form_at_the_heads_attains_each_heads_limit(root, tmp_path):
    config = experiment(root, method="gauge@kind=limit,t=1", measured_rows=1000)
    subject = run_language.load_subject(config)
    record = immunise_language(config, tmp_path / "out")
    assert record["change_of_logits"]["largest_change"] < 5e-3
    moved = llama.load_folder(tmp_path / "out")
    language = dataclasses.replace(
        subject.language, sites=tuple(f"layers.{i}.output" for i in range(CONFIG.layers))
    )
    logs, dampings = {}, {}
    for when, params in (("before", subject.loaded.params), ("after", moved.params)):
        for role in ("primary", "harmful"):
            texts = [subject.tasks[role].train]
            (stream,) = run_language._head_triangles(language, params, texts)
            triangle = np.asarray(stream.triangle) / np.sqrt(stream.count)[..., None, None]
            gram = np.swapaxes(triangle, -1, -2) @ triangle
            if when == "before":
                dampings[role] = config.damping * np.trace(gram, axis1=-2, axis2=-1) / 4
            values = moved_gauge(subject, config).values if when == "after" else np.eye(4)
            gram += dampings[role][..., None, None] * (np.swapaxes(values, -1, -2) @ values)
            sizes = np.linalg.eigvalsh(gram)
            logs[when, role] = np.log(sizes[..., -1] / sizes[..., 0])
    np.testing.assert_allclose(logs["after", "primary"], logs["before", "primary"], rtol=1e-3)
    assert np.all(logs["after", "harmful"] > logs["before", "harmful"] + 0.1)


def moved_gauge(subject, config):
    return run_language._gauge_of(config, subject)


@pytest.mark.parametrize("method", thinned(["condition_gap", "npo@beta=1.0"]))
def test_trained_methods_write_what_they_trained(method, root, tmp_path):
    optimiser = OptimiserConfig(learning_rate=0.02)
    config = experiment(root, method=method, optimiser=optimiser, steps=30)
    record = immunise_language(config, tmp_path / "out")
    assert [row["step"] for row in record["trajectory"]][-1] == 30
    first, last = record["trajectory"][0], record["trajectory"][-1]
    if method.startswith("npo"):
        assert last["forget"] < first["forget"]
    else:
        found = row_of(record, site="features", split="train", against="harmful")
        assert found["log_rir"] > 0.3
        assert first["divergence"] == pytest.approx(0, abs=1e-6)
    before, after = llama.load_folder(root / "model"), llama.load_folder(tmp_path / "out")
    same = {k for k, v in before.params.items() if np.array_equal(v, after.params[k])}
    assert {"embedding.table", "unembedding.table"} <= same
    assert not np.array_equal(
        before.params["layers.up.kernel"][1], after.params["layers.up.kernel"][1]
    )
    np.testing.assert_array_equal(
        before.params["layers.up.kernel"][0], after.params["layers.up.kernel"][0]
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "erase"}, "no method for language models"),
        ({"method": "gauge@kind=flat"}, "kind must be one of"),
        ({"method": "gauge@moves=heads"}, "unknown move 'heads'"),
        ({"method": "gauge@width=3"}, "unknown key 'width'"),
        ({"length": 64}, "made for 32 positions"),
        ({"batch_size": 4000}, "smaller batch_size"),
        ({"sites": ("layers.2.down",)}, "no site"),
        ({"primary": "text:none"}, "unknown text"),
        ({"text_fields": {"benign": {}}}, "by role"),
        ({"model": "nowhere"}, "nowhere"),
        ({"train": "last:3"}, "k must be in 1..2"),
        ({"train": "last:x"}, "last:K or lora:R"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(fields, words, root, tmp_path):
    with pytest.raises(ValueError, match=words):
        immunise_language(experiment(root, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def assessed(root, tmp_path_factory):
    """The base and a model whose logits are all zero, by one attacker."""
    out = tmp_path_factory.mktemp("assessed")
    base = llama.load_folder(root / "model")
    empty = base.params | {"norm.scale": jnp.zeros_like(base.params["norm.scale"])}
    llama.save_folder(root / "empty", empty, base.config)
    texts = dataclasses.asdict(experiment(root))
    keys = ("primary", "harmful", "control", "text_fields", "length", "measured_rows")
    level = Level(
        probes="quick", weight_steps=40, batch_size=8, report_seeds=(7, 8), record=6, trial=False
    )
    return assess_language(
        [root / "empty"],
        root / "model",
        out,
        texts={key: texts[key] for key in keys},
        level=level,
        attackers=["fine_tune_adam", "ridge"],
    )


def test_language_models_are_assessed_in_the_same_document(assessed):
    assert assessed["data"]["d"] == CONFIG.width
    assert assessed["data"]["metric"] == "accuracy"
    assert [model["label"] for model in assessed["models"]] == ["none", "empty"]
    rows = {(row["model"], row["task"], row["attacker"]): row for row in assessed["rows"]}
    assert rows["none", "harmful", "ridge"]["status"] == "not_applicable"
    learnt = rows["none", "harmful", "fine_tune_adam"]
    assert learnt["status"] == "done", learnt["reason"]
    assert learnt["quality"]["mean"] > assessed["data"]["chance"]
    assert learnt["curve"]["quality"][-1] > learnt["curve"]["quality"][0]
    assert len(learnt["curve"]["utility"]) == len(learnt["curve"]["step"])
    assert set(assessed["data"]["tasks"]) >= {"harmful", "benign:primary", "benign:folder"}
    assert rows["empty", "harmful", "fine_tune_adam"]["status"] == "done"


def test_coherence_stands_beside_harm_and_utility_at_every_step(assessed):
    assessment_record.validate(assessed)
    limits = assessed["data"]["limits"]
    assert limits["distinct"]["most"] is None
    assert limits["base_nats"]["least"] is None
    assert 0 < limits["base_nats"]["most"] < 2 * np.log(CONFIG.vocabulary)
    rows = {(row["model"], row["task"], row["attacker"]): row for row in assessed["rows"]}
    learnt = rows["none", "harmful", "fine_tune_adam"]
    for name, ends in limits.items():
        curve = learnt["curve"][name]
        assert len(curve) == len(learnt["curve"]["step"])
        at = learnt["curve"]["step"].index(learnt["stop"])
        assert learnt["coherence"][name] == pytest.approx(curve[at])
        assert name not in rows["none", "benign:primary", "fine_tune_adam"]["curve"]
        if name == "distinct":  # at step 0 the base is within its own limits
            assert curve[0] == pytest.approx(2 * ends["least"])
    assert learnt["state"] in ("broken", "compliant but useless")
    assert rows["none", "benign:primary", "fine_tune_adam"]["state"] is None
    # The model without logits says one word, whatever it is asked.
    dull = rows["empty", "harmful", "fine_tune_adam"]["curve"]["distinct"][0]
    assert dull == pytest.approx(1 / 6)  # of 8 tokens, which have 6 runs


def test_perplexity_is_told_document_by_document(assessed, root):
    none, empty = (model["documents"] for model in assessed["models"])
    subject = run_language.load_subject(experiment(root))
    held_out = subject.tasks["primary"].held_out
    assert [one["document"] for one in none] == sorted(set(held_out.document.tolist()))
    loaded = llama.load_folder(root / "model")
    for one in none:
        rows = held_out.document == one["document"]
        logs = jax.nn.log_softmax(llama.logits(loaded.params, held_out.tokens[rows], CONFIG))
        own = -np.take_along_axis(
            np.asarray(logs)[:, :-1], held_out.tokens[rows][:, 1:, None], axis=-1
        )[..., 0]
        counted = held_out.mask[rows][:, 1:]
        assert one["tokens"] == counted.sum()
        assert one["nats"] == pytest.approx(own[counted].mean(), rel=1e-4)
    assert all(one["nats"] == pytest.approx(np.log(48), rel=1e-4) for one in empty)


def test_pages_and_terminals_show_each_judge_in_its_own_column(assessed):
    parts = report.terminal_assessment(assessed, width=200)
    console = Console(width=200, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    text = console.export_text()
    assert "What attacks leave, where they stop" in text
    for heading in ("distinct", "nats", "state"):
        assert heading in text
    markdown = report.assessment_markdown(assessed)
    assert "empty: harm, utility and coherence by attack step" in markdown
    assert "Perplexity by held-out document of the primary text" in markdown
    html = page.render_assessment(assessed)
    assert 'id="coherence"' in html
    header, *lines = report.curves_csv(assessed).splitlines()
    assert {"quality", "utility", "distinct", "base_nats"} <= set(header.split(","))
    assert len(lines) > 4
