"""No cache keeps arrays: after a run and its assessment as many are there as before."""

import gc

import jax
import jax.numpy as jnp
import language as tokens
import numpy as np
import optax
import pytest

from jaximm import attacks, immunisers, run, training
from jaximm.assessment import Level
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.run.assess import assess
from jaximm.run.assess_language import assess_language
from jaximm.run.config import Experiment
from jaximm.run.language import LanguageExperiment, immunise_language
from jaximm.types import PairedBatch

pytestmark = pytest.mark.heavy

LEVEL = Level(
    probes="quick", weight_steps=2, batch_size=4, report_seeds=(7, 8), record=2, trial=False
)
ATTACKERS = ("fine_tune_adam", "ridge")
METHODS = ("condition_gap", "npo")
LETTERS = "\nabcdefghijklmnopqrstuvwxyz .0123456789"
DECODER = llama.LlamaConfig(
    vocabulary=48, width=8, layers=2, heads=4, kv_heads=2, head_width=4, hidden=12, context=32
)

DECODER_FN = llama.Language(config=tokens.CONFIG)


def arrays(seed, y):
    """Two tasks of two parts each: inputs [n, 6] and the targets that `y` makes of them."""
    rng, made = np.random.default_rng(seed), {}
    for task in ("primary", "harmful"):
        for part in ("", "_held_out"):
            x = rng.normal(size=(24, 6)).astype(np.float32)
            made |= {f"{task}_x{part}": x, f"{task}_y{part}": y(x, rng)}
    return made


def linear(folder, seed):
    np.savez(folder / "rows.npz", **arrays(seed, lambda x, rng: x @ rng.normal(size=6)))
    rows = {"path": str(folder / "rows.npz"), "kind": "regression"}
    methods = ("condition_gap", "limit@t=1", "erase")
    finish(Experiment(name="lines", data="arrays", data_fields=rows, methods=methods), folder)


def deep(folder, seed):
    """A perceptron whose first layer trains: the second is frozen after the cut."""
    labels = arrays(seed, lambda x, rng: rng.permutation(len(x)) % 3)
    np.savez(folder / "rows.npz", **labels)
    config = Experiment(
        name="layers",
        data="labelled_arrays",
        data_fields={"path": str(folder / "rows.npz")},
        model="mlp",
        model_fields={"input_shape": (6,), "widths": (5, 4)},
        weights="random",
        train="layers.0",
        methods=METHODS,
        steps=2,
        batch_size=8,
        seeds=(seed,),
        groups=1,
        group_rows=8,
    )
    finish(config, folder)


def finish(config, folder):
    results = run.immunise(config, folder / "runs")
    assert len(results) == len(config.methods)
    (document,) = assess([folder / "runs"], folder / "out", level=LEVEL, attackers=ATTACKERS)
    done(document, len(config.methods) + 1)


def language(folder, seed):
    tokenizers = pytest.importorskip("tokenizers")
    rng = np.random.default_rng(seed)
    params = llama.init(jax.random.key(seed), DECODER)
    llama.save_folder(folder / "base", params, DECODER)
    words = {letter: place for place, letter in enumerate(LETTERS)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="."))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("[\\s\\S]"), "isolated"
    )
    library.save(str(folder / "base" / "tokenizer.json"))
    texts = {}
    for role, letters in {"primary": "abcdef", "harmful": "stuvwx"}.items():
        texts[role] = {"path": str(folder / role), "held_out": 0.25}
        (folder / role).mkdir()
        for number in range(8):
            text = " ".join(rng.choice(list(letters), 12))
            (folder / role / f"{number}.txt").write_text(text)
    for method in METHODS:
        config = LanguageExperiment(
            model=str(folder / "base"),
            method=method,
            primary="text:folder",
            harmful="text:folder",
            control="",
            text_fields=texts,
            train="last:1",
            steps=2,
            batch_size=4,
            length=8,
            measured_rows=4,
        )
        immunise_language(config, folder / method)
    document = assess_language(
        [folder / "npo"], None, folder / "out", level=LEVEL, attackers=("fine_tune_sgd",)
    )
    done(document, 2)


def decoder(folder, seed):
    """The same in memory: a method with a reference model, and an attacker of all weights."""
    del folder
    params = tokens.params(seed, jnp.float32)
    weights, rows = llama.last_layers(params, 1), tokens.rows(8, seed)
    problem = language_problem(DECODER_FN, optax.sgd(0.1), reference=weights)
    method = immunisers.make_immuniser("npo", immunisers.make_config("npo"), problem)
    draw = jax.tree_util.Partial(lambda pair, step: pair, PairedBatch(rows, rows))
    fitted = training.fit(method, weights, draw, steps=1, log_every=1, seed=0)
    attacked = attacks.language_problem(
        DECODER_FN, llama.whole(fitted.params), train=rows, held_out=rows
    )
    attack = attacks.make_attack("fine_tune_sgd")
    trace = attacks.run_fine_tune(
        attack, attacked, attack.grid[:1], steps=1, batch_size=None, record=2
    )
    assert np.isfinite(trace.held_out_loss).all()


def done(document, models):
    assert len(document["models"]) == models
    assert {row["status"] for row in document["rows"]} <= {"done", "not_applicable"}


def alive():
    gc.collect()
    return len(jax.live_arrays())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [linear, deep, decoder, pytest.param(language, marks=pytest.mark.slow)]
)
def test_no_cache_keeps_arrays_of_a_run_and_its_assessment(kind, tmp_path):
    counts = []
    for seed in (0, 1):  # constants of programs come with the first, numbers differ in the second
        folder = tmp_path / str(seed)
        folder.mkdir()
        kind(folder, seed)
        counts.append(alive())
    assert counts[0] == counts[1]
