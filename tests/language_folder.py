"""A folder with a tiny random decoder, its tokenizer of letters, and three folders of texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.models import llama

tokenizers = pytest.importorskip("tokenizers")

LETTERS = "\nabcdefghijklmnopqrstuvwxyz .0123456789"
CONFIG = llama.LlamaConfig(
    vocabulary=48, width=8, layers=2, heads=4, kv_heads=2, head_width=4, hidden=12, context=32
)


def write_texts(folder, seed, letters, count=12):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        words = rng.choice([letters[:3], letters[3:6], letters[1:5]], 24)
        (folder / f"{number:02}.txt").write_text(" ".join(words))


def make(root):
    """Writes model, keep, harm and other below `root`."""
    rng = np.random.default_rng(0)
    params = llama.init(jax.random.key(0), CONFIG, dtype=jnp.float32)
    params = {k: v * (1 + 0.1 * rng.normal(size=v.shape)).astype("f") for k, v in params.items()}
    llama.save_folder(root / "model", params, CONFIG)
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=".")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("[\\s\\S]"), "isolated"
    )
    library.save(str(root / "model" / "tokenizer.json"))
    for seed, (name, letters) in enumerate(
        {"keep": "abcdef", "harm": "stuvwxyz", "other": "ghijkl"}.items()
    ):
        write_texts(root / name, seed, letters)
