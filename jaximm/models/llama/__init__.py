"""Llama-family decoders: their shape, forward pass, generation, files and tokenizers."""

from jaximm.models.llama.generate import Generated, generate_greedy, generate_sampled
from jaximm.models.llama.layout import (
    SMOLLM2_135M,
    Loaded,
    load,
    load_folder,
    load_gguf,
    save_folder,
    with_pairs,
)
from jaximm.models.llama.model import hidden, init, logits, shapes, unembed, unembedding
from jaximm.models.llama.spec import LlamaConfig, RopeScaling, from_hugging_face, to_hugging_face
from jaximm.models.llama.tokenizer import Tokenizer, folder_tokenizer, gguf_tokenizer

__all__ = [
    "SMOLLM2_135M",
    "Generated",
    "LlamaConfig",
    "Loaded",
    "RopeScaling",
    "Tokenizer",
    "folder_tokenizer",
    "from_hugging_face",
    "generate_greedy",
    "generate_sampled",
    "gguf_tokenizer",
    "hidden",
    "init",
    "load",
    "load_folder",
    "load_gguf",
    "logits",
    "save_folder",
    "shapes",
    "to_hugging_face",
    "unembed",
    "unembedding",
    "with_pairs",
]
