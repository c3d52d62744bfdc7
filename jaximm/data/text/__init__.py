"""Texts as tasks of tokens: corpora from packages, made-up secrets, a user's own folder.

``load_text("text:secrets", tokenizer, count=8)``. `TEXTS` maps a name to how its documents are
parted; the tokenizer is the model's, so that it is an argument and not part of a configuration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jaximm import registry
from jaximm.data.text.corpora import CORPORA
from jaximm.data.text.documents import Document, Parts, distinct, split_documents
from jaximm.data.text.folder import FolderConfig, folder_parts, read_folder
from jaximm.data.text.secrets import PHRASINGS, Secret, SecretsConfig, secret_parts, secrets
from jaximm.data.text.tokens import (
    Encoder,
    RowsConfig,
    TextTask,
    TokenBatch,
    TokenSplit,
    check_tokenizer,
    next_tokens,
    token_batch,
    token_rows,
    token_splits,
)
from jaximm.types import Fields

__all__ = [
    "CORPORA",
    "PHRASINGS",
    "TEXTS",
    "Document",
    "Encoder",
    "FolderConfig",
    "Parts",
    "RowsConfig",
    "Secret",
    "SecretsConfig",
    "TextSource",
    "TextTask",
    "TokenBatch",
    "TokenSplit",
    "check_tokenizer",
    "distinct",
    "load_text",
    "next_tokens",
    "read_folder",
    "secret_parts",
    "secrets",
    "split_documents",
    "text_parts",
    "token_batch",
    "token_rows",
    "token_splits",
]


class TextSource(NamedTuple):
    """How the documents of a name are parted: ``parts(config) -> Parts``, `config` its class."""

    config: type[RowsConfig]
    parts: Callable[[Any], Parts]
    description: str
    source: str


def _corpus_parts(config: RowsConfig, *, corpus: str) -> Parts:
    return split_documents(
        CORPORA[corpus].read(),
        selection=config.selection,
        held_out=config.held_out,
        seed=config.seed,
        where=corpus,
    )


TEXTS = {
    **{
        f"text:{name}": TextSource(
            RowsConfig,
            functools.partial(_corpus_parts, corpus=name),
            corpus.description,
            corpus.source,
        )
        for name, corpus in CORPORA.items()
    },
    "text:folder": TextSource(FolderConfig, folder_parts, "texts of the user", "the user"),
    "text:secrets": TextSource(
        SecretsConfig, secret_parts, "codes of made-up names", "drawn from the seed"
    ),
}
"""Name to `TextSource`."""


def text_parts(name: str, config: RowsConfig | None = None, **fields: Any) -> Parts:
    """The documents of `name` for training, choices and reports, as text.

    Args:
      name: of `TEXTS`.
      config: of that name's class; by default of `fields` and defaults.
      fields: of the configuration, in place of `config`.

    Raises:
      ValueError: an unknown name or field, another configuration, or what the documents refuse.
      MissingCarrierError: (a ValueError) the data is not there; says what brings it.
    """
    source, config = _source(name, config, fields)
    return source.parts(config)


def load_text(
    name: str,
    tokenizer: Encoder,
    config: RowsConfig | None = None,
    *,
    vocabulary: int | None = None,
    context: int | None = None,
    **fields: Any,
) -> TextTask:
    """The task `name` in the tokens of a model.

    Args:
      name: of `TEXTS`.
      tokenizer: of the model.
      config: as `text_parts`.
      vocabulary: rows of the model's embedding; None: the tokenizer is not checked against it.
      context: positions that the model was made for; None: not checked.
      fields: as `text_parts`.

    Raises:
      ValueError: as `text_parts` and `token_splits`; all before anything is computed.
    """
    source, config = _source(name, config, fields)
    splits = token_splits(
        source.parts(config),
        tokenizer,
        config,
        vocabulary=vocabulary,
        context=context,
        where=name,
    )
    return TextTask(name, *splits, source.description, source.source)


def _source(name: str, config: RowsConfig | None, fields: Fields) -> tuple[TextSource, RowsConfig]:
    if config is not None and fields:
        raise ValueError("give either config or single fields, not both.")
    if name not in TEXTS:
        raise ValueError(f"unknown text {name!r}; choose from {sorted(TEXTS)}.")
    source = TEXTS[name]
    if config is None:
        entries = {key: (text.config, text.parts) for key, text in TEXTS.items()}
        config = registry.make_config(entries, "text", name, fields)
        assert isinstance(config, source.config)
    if type(config) is not source.config:
        raise ValueError(
            f"{name}: expected a {source.config.__name__}, got a {type(config).__name__}."
        )
    return source, config
