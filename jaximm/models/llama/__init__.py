"""Llama-family decoders: their shape, forward pass, generation, files and tokenizers."""

from jaximm.models.llama.generate import Generated, generate_greedy, generate_sampled
from jaximm.models.llama.language import (
    Language,
    Weights,
    every_parameter,
    last_layers,
    named_parameters,
    whole,
    with_adapters,
)
from jaximm.models.llama.layout import (
    SMOLLM2_135M,
    Loaded,
    abstract,
    load,
    load_folder,
    load_gguf,
    save_folder,
    with_pairs,
)
from jaximm.models.llama.model import (
    hidden,
    init,
    logits,
    shapes,
    stacked_axes,
    unembed,
    unembedding,
)
from jaximm.models.llama.spec import LlamaConfig, RopeScaling, from_hugging_face, to_hugging_face
from jaximm.models.llama.tokenizer import (
    Tokenizer,
    folder_tokenizer,
    gguf_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

__all__ = [
    "SMOLLM2_135M",
    "Generated",
    "Language",
    "LlamaConfig",
    "Loaded",
    "RopeScaling",
    "Tokenizer",
    "Weights",
    "abstract",
    "every_parameter",
    "folder_tokenizer",
    "from_hugging_face",
    "generate_greedy",
    "generate_sampled",
    "gguf_tokenizer",
    "hidden",
    "init",
    "last_layers",
    "load",
    "load_folder",
    "load_gguf",
    "load_tokenizer",
    "logits",
    "named_parameters",
    "save_folder",
    "save_tokenizer",
    "shapes",
    "stacked_axes",
    "to_hugging_face",
    "unembed",
    "unembedding",
    "whole",
    "with_adapters",
    "with_pairs",
]
