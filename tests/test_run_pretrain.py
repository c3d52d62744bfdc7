"""A decoder from scratch: twenty steps on a few made-up documents, written and read back."""

import json
import math

import jax
import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="pip install jaximm[text]")

from jaximm.data import text
from jaximm.models import llama
from jaximm.run import pretrain
from jaximm.run.pretrain import PretrainConfig

TINY = {
    "vocabulary": 280,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "hidden": 24,
    "length": 16,
    "batch": 8,
    "steps": 20,
    "learning_rate": 2e-2,
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Sentences of few words, so that twenty steps teach something."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    words = ["lemon", "river", "stone", "green", "window", "seven"]
    for index in range(12):
        chosen = rng.choice(words, size=60)
        (folder / f"{index}.txt").write_text(" ".join(chosen) + f" number {index} ends.")
    return folder


@pytest.fixture(scope="module")
def done(documents, tmp_path_factory):
    """What the command printed, and the folder."""
    out = tmp_path_factory.mktemp("model") / "tiny"
    flags = [f for k, v in TINY.items() for f in (f"--{k.replace('_', '-')}", str(v))]
    assert pretrain.main([str(out), "--texts", str(documents), *flags]) == 0
    return out


@pytest.mark.heavy
def test_a_command_writes_a_folder_of_the_hub_that_has_learned(done, documents):
    params, config, _ = llama.load_folder(done)
    assert (config.vocabulary, config.context, config.tied) == (280, 16, True)
    tokenizer = llama.folder_tokenizer(done)
    assert (tokenizer.size, tokenizer.end) == (280, 0)
    assert tokenizer.decode(tokenizer.encode("seven 12 grüße")) == "seven 12 grüße"
    assert len(tokenizer.encode("1783")) == 4  # every digit a token
    record = json.loads((done / "pretraining.json").read_text())
    assert record["steps"] == 20
    found = record["held_out"][0]
    assert found["nats"] < math.log(280) - 1
    # Again, from the folder alone, a row at a time.
    task = text.load_text("text:folder", tokenizer, path=str(documents), length=16)
    total, characters = 0.0, task.held_out.characters_per_token
    score = jax.jit(llama.logits, static_argnums=2)
    for tokens, mask in zip(task.held_out.tokens, task.held_out.mask, strict=True):
        logits = np.asarray(score(params, tokens[None], config)[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= sum(log_p[t - 1, tokens[t]] for t in np.flatnonzero(mask))
    assert found["tokens"] == task.held_out.mask.sum()
    assert found["nats"] == pytest.approx(total / found["tokens"], rel=1e-5)
    assert found["bits"] == pytest.approx(found["nats"] / math.log(2) / characters, rel=1e-9)


def test_what_cannot_be_trained_is_said_in_a_line(done, documents, capsys, tmp_path):
    assert pretrain.main([str(done), "--texts", str(documents)]) == 1
    assert "tiny is not empty; give another folder" in capsys.readouterr().err
    assert pretrain.main([str(tmp_path / "x"), "--texts", "text:poems"]) == 1
    assert "unknown text 'text:poems'; choose from" in capsys.readouterr().err
    assert pretrain.main([str(tmp_path / "x"), "--texts", str(documents)]) == 1
    assert "tokens of 1024; give more text or a smaller vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    for match, fields in {
        r"steps must be >= 1, got 0": {"steps": 0},
        r"texts is empty; give some of \['text:dialogue'": {"texts": ()},
        r"heads must be even and width a multiple of 2 heads, got 3": {"heads": 3},
        r"vocabulary must be >= 257": {"vocabulary": 256},
    }.items():
        with pytest.raises(ValueError, match=match):
            PretrainConfig(**fields)
