"""Documents as rows of tokens, and which of those tokens are to be predicted.

Rows are made once, a function of the documents' order, and a batch is a function of (seed, step)
as everywhere here: `token_batch`. Texts are packed end to end; answers to prompts are not, since a
cut would part them from their prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from jaximm.data.batches import batch_indices
from jaximm.data.text.documents import Document, Parts
from jaximm.objectives import TokenRows

_AT_ONCE = 64  # documents that are encoded together: a few of 200 kB take 100 MB


class Encoder(Protocol):
    """What is asked of a tokenizer; `jaximm.models.llama.Tokenizer` is one."""

    @property
    def size(self) -> int:
        """Tokens that it knows."""
        ...

    @property
    def end(self) -> int | None:
        """The token after a text."""
        ...

    def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Tokens of each text, with those that the model expects around it unless not `special`."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the model answers."""
        ...


class TokenSplit(NamedTuple):
    """Rows of tokens of one part of a corpus.

    Attributes:
      tokens: padded on the right with 0.
      mask: tokens that are to be predicted from those before them in their row; never the first.
      document: place of the row's (first) document in its part: rows of one document are not
        independent.
      characters_per_token: of the part's texts, to turn nats a token into bits a character.
    """

    tokens: Int[np.ndarray, "n t"]
    mask: Bool[np.ndarray, "n t"]
    document: Int[np.ndarray, "n"]
    characters_per_token: float


class TextTask(NamedTuple):
    """One task on text; no document is in two of its splits."""

    name: str
    train: TokenSplit
    selection: TokenSplit
    held_out: TokenSplit
    description: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How documents become rows.

    Attributes:
      length: t, tokens of a row.
      layout: "packed": texts end to end with the tokenizer's end between them, cut every `length`
        tokens. "documents": a text begins a row, and what is too long goes on in the next; rows
        hold one document each, as a measure by document needs it. Answers to prompts always lie so.
      counted: of an answer, "all" its tokens with the end, or "digits" alone.
      chat: prompts go through the model's chat template.
      too_long: answers that do not fit into a row with their prompt, which may not be cut: "refuse"
        or "leave_out".
      rows: at most so many rows of each part; None: all.
      selection: share of documents on which choices are made.
      held_out: share of documents for what is reported.
      seed: of the documents' order.
    """

    length: int = 64
    layout: Literal["packed", "documents"] = "packed"
    counted: Literal["all", "digits"] = "all"
    chat: bool = False
    too_long: Literal["refuse", "leave_out"] = "refuse"
    rows: int | None = None
    selection: float = 0.1
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(f"length must be >= 2, got {self.length}: a token is predicted.")
        if self.layout not in ("packed", "documents"):
            raise ValueError(f"layout must be 'packed' or 'documents', got {self.layout!r}.")
        if self.counted not in ("all", "digits"):
            raise ValueError(f"counted must be 'all' or 'digits', got {self.counted!r}.")
        if self.too_long not in ("refuse", "leave_out"):
            raise ValueError(f"too_long must be 'refuse' or 'leave_out', got {self.too_long!r}.")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be >= 1 or None, got {self.rows}.")


def token_splits(
    parts: Parts,
    tokenizer: Encoder,
    config: RowsConfig,
    *,
    vocabulary: int | None = None,
    context: int | None = None,
    where: str = "text",
) -> tuple[TokenSplit, TokenSplit, TokenSplit]:
    """Rows of the training, selection and held-out documents.

    Args:
      parts: documents.
      tokenizer: of the model.
      config: how documents become rows.
      vocabulary: rows of the model's embedding, to check the tokenizer against; None: not checked.
      context: positions that the model was made for; None: not checked.
      where: what to call the documents in a message.

    Raises:
      ValueError: see `token_rows` and `check_tokenizer`; rows longer than the context.
    """
    if context is not None and config.length > context:
        raise ValueError(
            f"length is {config.length}, but the model was made for {context} positions; give "
            f"length <= {context}."
        )
    if vocabulary is not None:
        check_tokenizer(tokenizer, vocabulary)
    train, selection, held_out = (
        token_rows(documents, tokenizer, config, where=f"{where}, {name.replace('_', '-')}")
        for name, documents in parts._asdict().items()
    )
    return train, selection, held_out


def check_tokenizer(tokenizer: Encoder, vocabulary: int) -> None:
    """Refuses a tokenizer with tokens for which the model has no row; models may have spare rows.

    Raises:
      ValueError: as said.
    """
    if tokenizer.size > vocabulary:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, the model's embedding {vocabulary} rows; "
            "give the tokenizer that came with the model."
        )


def token_rows(
    documents: Sequence[Document], tokenizer: Encoder, config: RowsConfig, *, where: str = "text"
) -> TokenSplit:
    """Rows of the documents in their order; the last one is filled up with padding.

    Args:
      documents: texts, or answers with prompts; not both.
      tokenizer: of the model.
      config: see there.
      where: what to call the documents in a message.

    Raises:
      ValueError: no documents; texts among answers; an answer that does not fit into a row with its
        prompt; `chat` or "digits" for texts; no token that counts.
    """
    if not documents:
        raise ValueError(f"{where}: no documents; give one at least.")
    with_prompt = [bool(document.prompt) for document in documents]
    if any(with_prompt) != all(with_prompt):
        raise ValueError(f"{where}: some documents have a prompt and some have none; part them.")
    if not with_prompt[0] and (config.chat or config.counted != "all"):
        raise ValueError(f"{where}: the texts are no answers; leave out chat and counted.")
    laid = _answers if with_prompt[0] else _texts
    split = laid(documents, tokenizer, config, where)
    if not split.mask.any():
        raise ValueError(
            f"{where}: no token of {len(split.mask)} rows is to be predicted; give longer texts"
            + (", or counted='all'." if config.counted == "digits" else ".")
        )
    return split


def next_tokens(tokens: Int[Array, "n t"], mask: Bool[Array, "n t"]) -> TokenRows:
    """Targets of `tokens` as inputs: at each position the token after it, if that counts.

    >>> import jax.numpy as jnp
    >>> rows = next_tokens(jnp.array([[5, 6, 7]]), jnp.array([[False, False, True]]))
    >>> rows.tokens.tolist(), rows.mask.tolist()
    ([[6, 7, 5]], [[False, True, False]])
    """
    last = jnp.arange(tokens.shape[1], dtype=jnp.int32) == tokens.shape[1] - 1
    return TokenRows(jnp.roll(tokens, -1, axis=1), jnp.roll(mask, -1, axis=1) & ~last[None, :])


class TokenBatch(NamedTuple):
    """Tokens that go into a model, and those that are to come."""

    x: Int[Array, "batch t"]
    y: TokenRows


def token_batch(
    split: TokenSplit,
    seed: int | Integer[Array, ""],
    step: int | Integer[Array, ""],
    batch_size: int | None,
) -> TokenBatch:
    """Rows of batch `step`, as `jaximm.data.batch_indices` draws them; jit-able.

    Raises:
      ValueError: more rows asked for than there are.
    """
    rows = batch_indices(seed, step, n=len(split.tokens), batch_size=batch_size)
    tokens, mask = jnp.asarray(split.tokens)[rows], jnp.asarray(split.mask)[rows]
    return TokenBatch(tokens, next_tokens(tokens, mask))


def _texts(
    documents: Sequence[Document], tokenizer: Encoder, config: RowsConfig, where: str
) -> TokenSplit:
    """Texts end to end, or each in rows of its own."""
    del where
    t, most = config.length, config.rows
    parts: list[np.ndarray] = []  # of rows: tokens, whether they count, whose they are
    held = np.zeros((3, 0), np.int32)  # what does not fill a row yet
    characters = tokens = rows = 0
    for start in range(0, len(documents), _AT_ONCE):
        if most is not None and rows >= most:
            break
        chunk = documents[start : start + _AT_ONCE]
        pieces = [held]
        for index, ids in enumerate(_encoded([one.text for one in chunk], tokenizer), start):
            piece = np.stack([ids, np.ones_like(ids), np.full_like(ids, index)])
            pieces.append(_filled(piece, t) if config.layout == "documents" else piece)
            tokens += len(ids)
        characters += sum(len(one.text) for one in chunk)
        flat = np.concatenate(pieces, axis=1)
        if start + _AT_ONCE >= len(documents):
            flat = _filled(flat, t)
        whole = flat.shape[1] // t * t
        parts.append(flat[:, :whole].reshape(3, -1, t))
        held, rows = flat[:, whole:], rows + whole // t
    ids, counts, owners = np.concatenate(parts, axis=1)[:, :most]
    return TokenSplit(ids, _after_first(counts > 0), owners[:, 0], characters / tokens)


def _answers(
    documents: Sequence[Document], tokenizer: Encoder, config: RowsConfig, where: str
) -> TokenSplit:
    """A prompt with its answer a row."""
    if config.chat:
        asked = [tokenizer.chat([{"role": "user", "content": one.prompt}]) for one in documents]
    else:
        asked = tokenizer.encode_all([one.prompt for one in documents])
    # Apart from the prompt, so that no token belongs to both. A template ends where an answer
    # begins; a plain prompt does not, so that the space before a word belongs to the answer.
    space = "" if config.chat else " "
    answers = _encoded([space + one.text.strip() for one in documents], tokenizer, special=False)
    sizes = np.array([len(p) + len(a) for p, a in zip(asked, answers, strict=True)])
    if sizes.max() > config.length and config.too_long == "refuse":
        longest = int(np.argmax(sizes))
        raise ValueError(
            f"{where}: document {longest} has {sizes[longest]} tokens with its prompt and may not "
            f"be cut; give length >= {sizes[longest]}, not {config.length}, or "
            "too_long='leave_out'."
        )
    kept = np.flatnonzero(sizes <= config.length)[: config.rows].tolist()
    if not kept:
        raise ValueError(
            f"{where}: no document fits into {config.length} tokens; give length >= {sizes.min()}."
        )
    tokens = np.zeros((len(kept), config.length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, place in enumerate(kept):
        prompt, answer = asked[place], answers[place]
        tokens[row, : sizes[place]] = [*prompt, *answer]
        mask[row, len(prompt) : sizes[place]] = [
            config.counted == "all" or _is_digits(tokenizer, token) for token in answer.tolist()
        ]
    characters = sum(len(documents[place].text) for place in kept)
    ratio = characters / sum(len(answers[place]) for place in kept)
    return TokenSplit(tokens, _after_first(mask), np.array(kept, np.int32), ratio)


def _encoded(
    texts: Sequence[str], tokenizer: Encoder, *, special: bool = True
) -> list[Int[np.ndarray, "t"]]:
    """Tokens of texts, each with the token that ends a text."""
    end = [] if tokenizer.end is None else [tokenizer.end]
    encoded = tokenizer.encode_all(texts, special=special)
    return [np.array(ids + end, np.int32) for ids in encoded]


def _filled(part: Int[np.ndarray, "3 m"], length: int) -> Int[np.ndarray, "3 n"]:
    """Up to whole rows, with padding that does not count."""
    return np.pad(part, ((0, 0), (0, -part.shape[1] % length)))


def _after_first(mask: Bool[np.ndarray, "n t"]) -> Bool[np.ndarray, "n t"]:
    """Without the first token of a row, which is not predicted from anything."""
    return mask & (np.arange(mask.shape[1]) > 0)


def _is_digits(tokenizer: Encoder, token: int) -> bool:
    return tokenizer.decode([token]).strip().isdigit()
