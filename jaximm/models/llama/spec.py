"""The shape of a Llama-family decoder: Llama 3.x, SmolLM2, Qwen2 and 2.5, Qwen3.

It is read from a ``config.json`` of the Hugging Face hub or from the metadata of a GGUF file, and
written back as the former. What this decoder does not do is refused here, by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from jaximm.models.weights.errors import Refusal, shown
from jaximm.models.weights.gguf import Gguf
from jaximm.types import Fields, Json

FAMILIES = ("llama", "qwen2", "qwen3")
"""Of these ``model_type`` names the decoder is one; Qwen2.5 calls itself qwen2, SmolLM2 llama."""

_OTHER = f"give a model of one of {', '.join(FAMILIES)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's longer context: low frequencies are divided, high ones kept, those between mixed.

    Attributes:
      factor: what low frequencies are divided by.
      low_frequency: wavelengths above ``original_context / low_frequency`` are divided.
      high_frequency: wavelengths below ``original_context / high_frequency`` are kept.
      original_context: positions that the model was first trained with.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_context: int

    def __post_init__(self):
        if self.factor < 1 or not 0 < self.low_frequency < self.high_frequency:
            raise ValueError(
                "need factor >= 1 and 0 < low_frequency < high_frequency, got "
                f"{self.factor}, {self.low_frequency} and {self.high_frequency}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A decoder's sizes and the choices in which its families differ.

    Attributes:
      vocabulary: v, tokens.
      width: d.
      layers: how many.
      heads: of queries.
      kv_heads: of keys and values; a divisor of `heads`.
      head_width: of one head; even.
      hidden: f, of the gated MLP.
      context: positions that the model was made for.
      rope_theta: base of the rotary frequencies, ``theta^(-2 i / head_width)``.
      rope_scaling: of those frequencies; None: none.
      rope_pairs: which numbers of a head turn together: "halves", i and i + head_width / 2, as on
        the hub; "interleaved", 2 i and 2 i + 1, as GGUF files of Llama have it.
      norm_eps: added to mean squares.
      tied: the embedding is the unembedding.
      qkv_bias: Qwen2's biases of queries, keys and values.
      qk_norm: Qwen3's norms of each head's queries and keys.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    context: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_pairs: Literal["halves", "interleaved"] = "halves"
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        sizes = ("vocabulary", "width", "layers", "heads", "kv_heads", "head_width", "hidden")
        for name in (*sizes, "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} kv_heads evenly.")
        if self.head_width % 2:
            raise ValueError(f"head_width must be even, got {self.head_width}: pairs turn.")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(
                f"rope_theta and norm_eps must be > 0, got {self.rope_theta}, {self.norm_eps}."
            )
        if self.rope_pairs not in ("halves", "interleaved"):
            raise ValueError(
                f"rope_pairs must be 'halves' or 'interleaved', got {self.rope_pairs!r}."
            )

    @property
    def family(self) -> str:
        """The ``model_type`` under which the hub knows this shape.

        Raises:
          ValueError: biases and norms at once, which no family has.
        """
        if self.qkv_bias and self.qk_norm:
            raise ValueError("no family has both qkv_bias and qk_norm; set one of them.")
        return "qwen2" if self.qkv_bias else "qwen3" if self.qk_norm else "llama"


def from_hugging_face(content: Fields) -> LlamaConfig:
    """The configuration of a ``config.json``.

    Rotary settings are read as transformers 4 writes them (``rope_theta``, ``rope_scaling``) and as
    transformers 5 does (``rope_parameters``).

    Raises:
      ValueError: another architecture; a key that is missing or of another kind; something that
        this decoder does not do (other activations, sliding windows, other biases or scalings).
    """
    family = content.get("model_type")
    if family not in FAMILIES:
        raise Refusal(f"model_type is {shown(repr(family))}", _OTHER)
    refused = {
        "hidden_act": content.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(content.get("mlp_bias")),
        "attention_bias": family != "qwen2" and bool(content.get("attention_bias")),
        "use_sliding_window": bool(content.get("use_sliding_window")),
        "partial_rotary_factor": content.get("partial_rotary_factor", 1) != 1,
    }
    for key, wrong in refused.items():
        if wrong:
            raise Refusal(f"{key} is {shown(repr(content[key]))}, which is not supported", _OTHER)
    heads, width = _size(content, "num_attention_heads"), _size(content, "hidden_size")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise Refusal(f"the rotary settings are {shown(repr(rope))}, no object")
    theta = _number(rope if "rope_theta" in rope else content, "rope_theta", 10_000.0)
    return LlamaConfig(
        vocabulary=_size(content, "vocab_size"),
        width=width,
        layers=_size(content, "num_hidden_layers"),
        heads=heads,
        kv_heads=_size(content, "num_key_value_heads", heads),
        head_width=_size(content, "head_dim", width // heads),
        hidden=_size(content, "intermediate_size"),
        context=_size(content, "max_position_embeddings", 2048),
        rope_theta=theta,
        rope_scaling=_scaling(rope),
        norm_eps=_number(content, "rms_norm_eps", 1e-6),
        tied=bool(content.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def to_hugging_face(config: LlamaConfig) -> Json:
    """``config.json`` of a configuration, as transformers 4 and 5 both read it."""
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    rope: Json | None = None
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {
        "architectures": [f"{names[config.family]}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.qkv_bias,
    }


def from_gguf(file: Gguf) -> LlamaConfig:
    """The configuration in a GGUF file's metadata; tied if there is no ``output.weight``.

    Llama's queries and keys are stored for interleaved pairs there, Qwen's for halves.

    Raises:
      ValueError: as `from_hugging_face`; scaled rotary frequencies, of which the file holds factors
        and not what they were made of.
    """
    family = file.metadata.get("general.architecture")
    if family not in FAMILIES:
        raise Refusal(f"general.architecture is {shown(repr(family))}", _OTHER)
    start = f"{family}."
    content = {k.removeprefix(start): v for k, v in file.metadata.items() if k.startswith(start)}
    scaled = content.get("rope.scaling.type", "none") != "none"
    if scaled or "rope_freqs.weight" in file.tensors:
        raise Refusal(
            "its rotary frequencies are scaled", "give the model's folder from the hub instead"
        )
    heads, width = _size(content, "attention.head_count"), _size(content, "embedding_length")
    embedding = file.tensors.get("token_embd.weight")
    return LlamaConfig(
        vocabulary=_size(content, "vocab_size", embedding.shape[0] if embedding else None),
        width=width,
        layers=_size(content, "block_count"),
        heads=heads,
        kv_heads=_size(content, "attention.head_count_kv", heads),
        head_width=_size(content, "attention.key_length", width // heads),
        hidden=_size(content, "feed_forward_length"),
        context=_size(content, "context_length"),
        rope_theta=_decimal(_number(content, "rope.freq_base", 10_000.0)),
        rope_pairs="interleaved" if family == "llama" else "halves",
        norm_eps=_decimal(_number(content, "attention.layer_norm_rms_epsilon", 1e-5)),
        tied="output.weight" not in file.tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _decimal(value: float) -> float:
    """The shortest decimal of a float32: 1e-5 for 9.99999975e-06."""
    return float(str(np.float32(value)))


def _scaling(rope: Fields) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise Refusal(f"the rotary scaling is {shown(repr(kind))}", "give one of 'llama3' or none")
    return RopeScaling(
        factor=_number(rope, "factor"),
        low_frequency=_number(rope, "low_freq_factor"),
        high_frequency=_number(rope, "high_freq_factor"),
        original_context=_size(rope, "original_max_position_embeddings"),
    )


def _size(content: Fields, key: str, default: int | None = None) -> int:
    """A whole number of 1 or more; null counts as missing, as on the hub."""
    value = content.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise Refusal(f"{key} is {shown(repr(value))}, expected a whole number >= 1")
    return value


def _number(content: Fields, key: str, default: float | None = None) -> float:
    value = content.get(key)
    value = default if value is None else value
    if type(value) is not int and type(value) is not float:
        raise Refusal(f"{key} is {shown(repr(value))}, expected a number")
    return float(value)
