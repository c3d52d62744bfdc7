"""Tiny Llama-family folders as the hub has them, and their logits in NumPy from the formulas.

The arrays are made and multiplied under the hub's own names and in its order [out, in], so that
nothing of `jaximm.models.llama` is used to check it.
"""

import json
import math

import ml_dtypes
import numpy as np
import safetensors.numpy

LLAMA = {
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
PLAIN = {k: v for k, v in LLAMA.items() if k != "rope_scaling"}
QWEN2 = PLAIN | {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1}
QWEN3 = PLAIN | {"model_type": "qwen3", "head_dim": 4, "tie_word_embeddings": True}
CONFIGS = {"llama3": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


def shapes(content):
    d, f, h = content["hidden_size"], content["intermediate_size"], content["head_dim"]
    q, k = content["num_attention_heads"] * h, content["num_key_value_heads"] * h
    layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (k, d),
        "self_attn.v_proj.weight": (k, d),
        "self_attn.o_proj.weight": (d, q),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    if content["model_type"] == "qwen2":
        layer |= {f"self_attn.{n}_proj.bias": (s,) for n, s in zip("qkv", (q, k, k), strict=True)}
    if content["model_type"] == "qwen3":
        layer |= {f"self_attn.{n}_norm.weight": (h,) for n in "qk"}
    found = {"model.embed_tokens.weight": (content["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(content["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not content["tie_word_embeddings"]:
        found["lm_head.weight"] = (content["vocab_size"], d)
    return found


def arrays_of(content, *, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * (0.5 if len(shape) > 1 else 0.3) + ("norm" in name)).astype(
            dtype
        )
        for name, shape in shapes(content).items()
    }


def write_folder(folder, content, arrays, *, shards=1):
    """A folder as ``save_pretrained`` writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    if shards == 1:
        safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = {key: value for i, (key, value) in enumerate(arrays.items()) if i % shards == shard}
        safetensors.numpy.save_file(held, folder / name, {"format": "pt"})
        places |= dict.fromkeys(held, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def frequencies(content):
    """Of the rotary pairs, by the three cases of Llama 3's published code."""
    h, theta = content["head_dim"], content["rope_theta"]
    found = [theta ** (-2 * i / h) for i in range(h // 2)]
    scaling = content.get("rope_scaling")
    if scaling is None:
        return found
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for frequency in found:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


def logits(content, arrays, tokens):
    """[t, v] of tokens [t], in float64, a head and a position at a time."""
    w = {name: value.astype(np.float64) for name, value in arrays.items()}
    h, heads = content["head_dim"], content["num_attention_heads"]
    shared = heads // content["num_key_value_heads"]
    rates = np.array(frequencies(content))

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + content["rms_norm_eps"]) * scale

    def turned(x):  # [t, h]: the pair (i, i + h / 2) as a complex number
        z = (x[:, : h // 2] + 1j * x[:, h // 2 :]) * np.exp(1j * np.outer(np.arange(len(x)), rates))
        return np.concatenate([z.real, z.imag], axis=1)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(content["num_hidden_layers"]):
        start = f"model.layers.{layer}."

        def linear(name, inputs, start=start):
            out = inputs @ w[f"{start}{name}.weight"].T
            return out + w.get(f"{start}{name}.bias", 0.0)

        inputs, parts = norm(x, w[f"{start}input_layernorm.weight"]), []
        for head in range(heads):
            sides = {}
            for side, place in (("q", head), ("k", head // shared), ("v", head // shared)):
                out = linear(f"self_attn.{side}_proj", inputs)[:, h * place : h * (place + 1)]
                scale = w.get(f"{start}self_attn.{side}_norm.weight")
                out = out if scale is None else norm(out, scale)
                sides[side] = out if side == "v" else turned(out)
            scores = sides["q"] @ sides["k"].T / math.sqrt(h)
            rows = []
            for t in range(len(tokens)):
                shares = np.exp(scores[t, : t + 1] - scores[t, : t + 1].max())
                rows.append(shares / shares.sum() @ sides["v"][: t + 1])
            parts.append(np.stack(rows))
        x = x + linear("self_attn.o_proj", np.concatenate(parts, axis=1))
        inputs = norm(x, w[f"{start}post_attention_layernorm.weight"])
        gate = linear("mlp.gate_proj", inputs)
        gated = gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", inputs)
        x = x + linear("mlp.down_proj", gated)
    table = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ table.T


BFLOAT16 = ml_dtypes.bfloat16
