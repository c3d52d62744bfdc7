"""Documents of a corpus, each once, and their split: all of a document is in one part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """A text to be predicted, or an answer to a prompt.

    Attributes:
      text: what is predicted.
      prompt: what stands before it and is not predicted.
      group: documents of one group go into one part; "": the document is alone.
    """

    text: str
    prompt: str = ""
    group: str = ""


class Parts(NamedTuple):
    """Documents by what they are for: training, choices, and what is reported."""

    train: tuple[Document, ...]
    selection: tuple[Document, ...]
    held_out: tuple[Document, ...]


def distinct(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Each document once, in the order of their first occurrence.

    A copy in another part would be read off, not predicted: of the 2,026 conversations that one
    package holds 899 differ.

    >>> distinct([Document("a"), Document("b"), Document("a")])
    (Document(text='a', prompt='', group=''), Document(text='b', prompt='', group=''))
    """
    first: dict[tuple[str, str], Document] = {}
    for document in documents:
        first.setdefault((document.text, document.prompt), document)
    return tuple(first.values())


def split_documents(
    documents: Sequence[Document],
    *,
    selection: float = 0.1,
    held_out: float = 0.1,
    seed: int = 0,
    where: str = "text",
) -> Parts:
    """The distinct documents in an order drawn from `seed`, cut into three parts.

    Groups are drawn, not documents, and a part has one at least: ``round(share * groups)`` for
    selection and held-out, the others for training. Documents of a group follow one another as they
    did.

    Args:
      documents: what to split.
      selection: share of the groups, in (0, 1).
      held_out: likewise.
      seed: of the order.
      where: what to call the documents in a message.

    Raises:
      ValueError: no documents, or a blank one; shares out of range; fewer than three groups.
    """
    if not (0 < selection < 1 and 0 < held_out < 1 and selection + held_out < 1):
        raise ValueError(
            "selection and held_out must be in (0, 1) and leave something for training, got "
            f"{selection} and {held_out}."
        )
    if not documents:
        raise ValueError(f"{where}: no documents; give three at least.")
    for index, document in enumerate(documents):
        if not document.text.strip():
            raise ValueError(f"{where}: document {index} has no text; leave it out.")
    groups: dict[str, list[Document]] = {}
    for index, document in enumerate(distinct(documents)):
        groups.setdefault(document.group or f"\0{index}", []).append(document)
    n = len(groups)
    if n < 3:
        raise ValueError(
            f"{where}: {n} different documents cannot be split into training, selection and "
            "held-out ones; give three at least."
        )
    counts = [min(max(1, round(share * n)), (n - 1) // 2) for share in (held_out, selection)]
    ordered = [list(groups.values())[i] for i in np.random.default_rng(seed).permutation(n)]
    edges = (0, counts[0], sum(counts), n)
    parts = [
        tuple(document for group in ordered[start:stop] for document in group)
        for start, stop in itertools.pairwise(edges)
    ]
    return Parts(held_out=parts[0], selection=parts[1], train=parts[2])
