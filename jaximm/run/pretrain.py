"""``python -m jaximm.run.pretrain OUT``: a tiny Llama trained from scratch, a folder of the hub.

It is the test bed of whatever needs many seeds of a language model: 0.72 M parameters, trained in
minutes on two cores, with a tokenizer of its own made of its training documents.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float

from jaximm.data import text
from jaximm.models import llama
from jaximm.objectives import Tokens, Unembedded
from jaximm.training.loop import fit
from jaximm.training.optimiser import OptimiserConfig, make_optimiser
from jaximm.types import Immuniser

END = "<|end|>"
"""The token after a text."""

_MEASURED = 512  # rows of a text
_MEASURED_AT_ONCE = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A decoder, its texts and its training.

    Attributes:
      texts: names of `jaximm.data.text.TEXTS`, or folders of .txt and .jsonl files.
      vocabulary: tokens of the byte-level BPE that is made of the training documents.
      width: of the model.
      layers: of the model.
      heads: of queries; two share keys and values.
      hidden: of the gated MLP.
      length: of a row, and the context of the model.
      batch: rows a step.
      steps: of AdamW, with a warm-up and a cosine.
      learning_rate: at its peak.
      rows: of each text, at most.
      seed: of weights, documents' order and batches.
    """

    texts: tuple[str, ...] = ("text:speeches", "text:dialogue", "text:ham")
    vocabulary: int = 1024
    width: int = 128
    layers: int = 3
    heads: int = 4
    hidden: int = 384
    length: int = 64
    batch: int = 32
    steps: int = 1000
    learning_rate: float = 4e-3
    rows: int = 24_000
    seed: int = 0

    def __post_init__(self):
        sizes = {k: v for k, v in dataclasses.asdict(self).items() if type(v) is int}
        for name, size in sizes.items():
            if size < (0 if name == "seed" else 1):
                raise ValueError(f"{name} must be >= 1, got {size}.")
        if not self.texts:
            raise ValueError(f"texts is empty; give some of {sorted(text.TEXTS)}, or a folder.")
        if self.heads % 2 or self.width % (2 * self.heads):
            raise ValueError(
                f"heads must be even and width a multiple of 2 heads, got {self.heads} heads and "
                f"a width of {self.width}."
            )
        if self.vocabulary < 257:
            raise ValueError(
                f"vocabulary must be >= 257 (each byte, and the end), got {self.vocabulary}."
            )


class Quality(NamedTuple):
    """How well texts of no training document are predicted, on held-out rows.

    Attributes:
      text: name.
      tokens: that were predicted.
      nats: a token.
      bits: a character.
    """

    text: str
    tokens: int
    nats: float
    bits: float


class Pretrained(NamedTuple):
    """What `pretrain` wrote and how good it is; `seconds` of everything, of the steps."""

    path: Path
    parameters: int
    quality: tuple[Quality, ...]
    seconds: float
    step_seconds: float


class State(NamedTuple):
    """Of a training run."""

    params: Any
    optimiser: Any


class Info(NamedTuple):
    """Of a step."""

    task_loss: Float[Array, ""]  # nats a token of the batch, before the update


def pretrain(
    out: str | Path,
    config: PretrainConfig | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> Pretrained:
    """Trains a tokenizer and a decoder on texts and writes both as the Hugging Face hub has them.

    Args:
      out: a folder without weights; `jaximm.models.llama.load_folder` reads it.
      config: by default `PretrainConfig()`.
      progress: called with lines.

    Raises:
      ValueError: texts that are not there, a folder that holds a model, tokenizers not installed.
      FloatingPointError: training diverged; take a smaller rate.
    """
    config = PretrainConfig() if config is None else config
    say = progress or (lambda line: None)
    out, started = Path(out), time.perf_counter()
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder.")
    parts = {name: _parts(name, config.seed) for name in config.texts}
    tokenizer = byte_level_bpe(
        [document.text for part in parts.values() for document in part.train], config.vocabulary
    )
    rows = text.RowsConfig(length=config.length, rows=config.rows, seed=config.seed)
    splits = {
        name: text.token_splits(part, tokenizer, rows, vocabulary=config.vocabulary, where=name)
        for name, part in parts.items()
    }
    tokens, mask = (
        jnp.concatenate([jnp.asarray(train[part]) for train, _, _ in splits.values()])
        for part in (0, 1)
    )
    shape = llama.LlamaConfig(
        vocabulary=config.vocabulary,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.heads // 2,
        head_width=config.width // config.heads,
        hidden=config.hidden,
        context=config.length,
        tied=True,
    )
    params = jax.jit(llama.init, static_argnums=1)(jax.random.key(config.seed), shape)
    count = sum(value.size for value in params.values())
    say(
        f"{count / 1e6:.2f} M parameters; {len(tokens)} rows of {config.length} tokens; "
        f"{time.perf_counter() - started:.0f} s so far"
    )
    result = fit(
        _trainer(shape, config),
        params,
        jax.tree_util.Partial(
            functools.partial(_batch, seed=config.seed, size=config.batch), tokens, mask
        ),
        seed=config.seed,
        steps=config.steps,
        log_every=min(100, config.steps),
        progress=lambda step, record: say(
            f"step {step}: {record['task_loss_mean']:.3f} nats a token, "
            f"{time.perf_counter() - started:.0f} s"
        ),
    )
    quality = tuple(
        measure(name, result.params, shape, held_out) for name, (_, _, held_out) in splits.items()
    )
    llama.save_folder(out, result.params, shape)
    tokenizer.library.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}) + "\n")
    record = dataclasses.asdict(config) | {"held_out": [one._asdict() for one in quality]}
    (out / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    seconds = time.perf_counter() - started
    return Pretrained(out, count, quality, seconds, result.seconds / config.steps)


def byte_level_bpe(texts: Sequence[str], vocabulary: int) -> llama.Tokenizer:
    """A tokenizer of `vocabulary` tokens made of texts: byte-level BPE, every digit a token.

    Raises:
      ValueError: tokenizers is not installed; too little text for so many tokens.
    """
    try:
        tk: Any = importlib.import_module("tokenizers")  # optional
    except ImportError as error:
        raise ValueError("a tokenizer needs tokenizers: pip install jaximm[text].") from error
    library = tk.Tokenizer(tk.models.BPE())
    library.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [
            tk.pre_tokenizers.Digits(individual_digits=True),
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    library.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    found = library.get_vocab_size()
    if found != vocabulary:
        raise ValueError(
            f"the texts make {found} tokens of {vocabulary}; give more text or a smaller "
            "vocabulary."
        )
    return llama.Tokenizer(library, None, {"eos_token": END}, (library.token_to_id(END),))


def measure(name: str, params: Any, shape: llama.LlamaConfig, split: text.TokenSplit) -> Quality:
    """Nats a token and bits a character, over at most 512 rows that are spread over all documents.

    bits = nats / log 2 / characters a token; the first token of a row is not predicted.
    """
    n = len(split.tokens)
    chosen = np.unique(np.linspace(0, n - 1, min(n, _MEASURED)).astype(int))
    total, counted = 0.0, 0
    for start in range(0, len(chosen), _MEASURED_AT_ONCE):
        # Of one shape, so that one program serves: what is missing counts nothing.
        places = np.resize(chosen[start : start + _MEASURED_AT_ONCE], _MEASURED_AT_ONCE)
        there = np.arange(_MEASURED_AT_ONCE) < len(chosen) - start
        tokens, mask = split.tokens[places], split.mask[places] & there[:, None]
        loss, weight = _total(params, jnp.asarray(tokens), jnp.asarray(mask), shape)
        total, counted = total + float(loss), counted + int(weight)
    nats = total / counted
    return Quality(name, counted, nats, nats / math.log(2) / split.characters_per_token)


@functools.partial(jax.jit, static_argnames="shape")
def _total(params, tokens, mask, shape):
    losses, weights = _losses(
        params, text.TokenBatch(tokens, text.next_tokens(tokens, mask)), shape
    )
    return jnp.sum(losses * weights), jnp.sum(weights)


def _losses(params, batch, shape):
    """Of each row, and how much it counts."""
    states = llama.hidden(params, batch.x, shape)
    objective = Tokens()
    losses = objective.losses(Unembedded(states, llama.unembedding(params)), batch.y)
    return losses, objective.weights(batch.y).astype(losses.dtype)


def _trainer(shape: llama.LlamaConfig, config: PretrainConfig) -> Immuniser:
    """Next-token training in the form that `fit` runs."""
    optimiser = make_optimiser(
        OptimiserConfig(learning_rate=config.learning_rate, weight_decay=0.01, warmup=0.1),
        config.steps,
    )

    def init(params, rng_key):
        del rng_key
        with jax.numpy_dtype_promotion("standard"):
            return State(params, optimiser.init(params))

    def update(state, batch, rng_key):
        del rng_key

        def mean_loss(params):
            losses, weights = _losses(params, batch, shape)
            return jnp.sum(losses * weights) / jnp.sum(weights)

        loss, slopes = jax.value_and_grad(mean_loss)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            changes, moments = optimiser.update(slopes, state.optimiser, state.params)
            params = optax.apply_updates(state.params, changes)
        return State(params, moments), Info(loss)

    return Immuniser(init, update, lambda state: state.params)


def _batch(tokens, mask, step, *, seed, size):
    return text.token_batch(text.TokenSplit(tokens, mask, tokens[:, 0], 1.0), seed, step, size)


def _parts(name: str, seed: int) -> text.Parts:
    if name in text.TEXTS or not Path(name).exists():
        return text.text_parts(name, seed=seed)
    return text.text_parts("text:folder", path=name, seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command(PretrainConfig):
    __doc__ = PretrainConfig.__doc__

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT", help="a new folder")]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, writes and prints; 0 done, 1 with a line where something is missing or wrong."""
    try:
        command = tyro.cli(_Command, args=argv, prog="python -m jaximm.run.pretrain")
        fields = {k: v for k, v in vars(command).items() if k != "out"}
        done = pretrain(
            command.out,
            PretrainConfig(**fields),
            progress=functools.partial(print, file=sys.stderr, flush=True),
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for one in done.quality:
        print(
            f"{one.text}: {one.nats:.3f} nats a token, {one.bits:.3f} bits a character "
            f"({one.tokens} held-out tokens)"
        )
    print(
        f"{done.path}: {done.parameters} parameters, {done.seconds:.0f} s in all, "
        f"{1e3 * done.step_seconds:.0f} ms a step"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
