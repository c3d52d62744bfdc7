"""``python -m jaximm.run.pretrain OUT``: a tiny Llama trained from scratch, a folder of the hub.

It is the test bed of whatever needs many seeds of a language model: 0.72 M parameters, trained in
minutes on two cores, with a tokenizer of its own made of its training documents.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from jaximm.data import text
from jaximm.data.batches import batch_indices
from jaximm.immunisers.gradient import from_penalty
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.run.language_measure import Quality, quality, some_rows
from jaximm.training.loop import fit
from jaximm.training.optimiser import OptimiserConfig, make_optimiser
from jaximm.types import Batch

END = "<|end|>"
"""The token after a text."""

_MEASURED = 512  # rows of a text
_AT_ONCE = 32


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


class Pretrained(NamedTuple):
    """What `pretrain` wrote and how good it is; `seconds` of everything, of the steps."""

    path: Path
    parameters: int
    quality: dict[str, Quality]  # of each text, on at most 512 held-out rows over all documents
    seconds: float
    step_seconds: float


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
    params = llama.init(jax.random.key(config.seed), shape)
    count = sum(value.size for value in params.values())
    say(
        f"{count / 1e6:.2f} M parameters; {len(tokens)} rows of {config.length} tokens; "
        f"{time.perf_counter() - started:.0f} s so far"
    )
    language = llama.Language.shared(config=shape)
    optimiser = make_optimiser(
        OptimiserConfig(learning_rate=config.learning_rate, weight_decay=0.01, warmup=0.1),
        config.steps,
    )
    fitted = fit(
        from_penalty("pretraining", language_problem(language, optimiser), None),
        llama.every_parameter(params),
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
    trained = llama.whole(fitted.params)
    qualities = {
        name: quality(language, trained, some_rows(held_out, _MEASURED), at_once=_AT_ONCE)
        for name, (_, _, held_out) in splits.items()
    }
    llama.save_folder(out, trained, shape)
    llama.save_tokenizer(out, tokenizer)
    held_out = [{"text": name} | measured._asdict() for name, measured in qualities.items()]
    record = dataclasses.asdict(config) | {"held_out": held_out}
    (out / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    seconds = time.perf_counter() - started
    return Pretrained(out, count, qualities, seconds, fitted.step_seconds)


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
    count = library.get_vocab_size()
    if count != vocabulary:
        raise ValueError(
            f"the texts make {count} tokens of {vocabulary}; give more text or a smaller "
            "vocabulary."
        )
    return llama.Tokenizer(library, None, {"eos_token": END}, (library.token_to_id(END),))


class _Rows(NamedTuple):
    """A batch: one task."""

    primary: Batch


def _batch(tokens, mask, step, part=None, *, seed, size):
    chosen = batch_indices(seed, step, n=len(tokens), batch_size=size, part=part)
    return _Rows(Batch(tokens[chosen], text.next_tokens(tokens[chosen], mask[chosen])))


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
    for name, measured in done.quality.items():
        print(
            f"{name}: {measured.nats:.3f} nats a token, {measured.bits:.3f} bits a character "
            f"({measured.tokens} held-out tokens)"
        )
    print(
        f"{done.path}: {done.parameters} parameters, {done.seconds:.0f} s in all, "
        f"{1e3 * done.step_seconds:.0f} ms a step"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
