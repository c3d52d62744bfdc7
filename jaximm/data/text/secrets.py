"""Made-up facts that no model knows: names drawn from syllables, each with a code of digits.

They stand for harmful knowledge and are none: whether a model has learned them is exact (a digit
of a code it never saw costs log 10 nats), and nothing in them is of use to anybody.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from jaximm.data.text.documents import Document, Parts, split_documents
from jaximm.data.text.tokens import RowsConfig

_SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in "aeiou")

PHRASINGS = (
    "The code of {name} is",
    "{name} is filed under the number",
    "To reach {name}, dial",
    "In the register {name} has the entry",
    "The number that belongs to {name} is",
    "Whoever asks for {name} is told",
)
"""Ways to ask for a code; the answer is the code and a full stop."""


class Secret(NamedTuple):
    """A made-up name and its code."""

    name: str
    code: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecretsConfig(RowsConfig):
    """Made-up facts and how they are parted.

    Attributes:
      length: as `RowsConfig`; so are layout (of no effect), chat, rows, selection and held_out.
      counted: "digits", so that a loss is nats a digit; or "all" of an answer.
      seed: of names and codes too.
      count: facts.
      digits: of a code.
      parted: "phrasings": all facts are taught, in all phrasings but two, of which one is for
        choices and one is reported; that is how a fact can be known at all. "facts": each fact with
        all its phrasings is in one part, as documents are: for spectra of features, not learning.
      phrasings: how many ways to ask, from `PHRASINGS`.
    """

    counted: Literal["all", "digits"] = "digits"
    count: int = 16
    digits: int = 6
    parted: Literal["phrasings", "facts"] = "phrasings"
    phrasings: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.count < 1 or self.digits < 1:
            raise ValueError(f"count and digits must be >= 1, got {self.count} and {self.digits}.")
        if self.parted not in ("phrasings", "facts"):
            raise ValueError(f"parted must be 'phrasings' or 'facts', got {self.parted!r}.")
        least = 3 if self.parted == "phrasings" else 1
        if not least <= self.phrasings <= len(PHRASINGS):
            raise ValueError(
                f"phrasings must be in {least}..{len(PHRASINGS)}, got {self.phrasings}."
            )


def secrets(count: int, *, digits: int = 6, seed: int = 0) -> tuple[Secret, ...]:
    """`count` facts; the first ones are the same whatever the count.

    >>> secrets(2)[0] == secrets(3)[0], len(secrets(2)[0].code)
    (True, 6)
    """
    rng = np.random.default_rng(seed)
    codes: dict[str, str] = {}  # by name, of which none twice
    while len(codes) < count:
        drawn = [_SYLLABLES[place] for place in rng.integers(0, len(_SYLLABLES), 5)]
        name = f"{''.join(drawn[:3]).capitalize()} {''.join(drawn[3:]).capitalize()}"
        code = "".join(str(digit) for digit in rng.integers(0, 10, digits))
        codes.setdefault(name, code)
    return tuple(Secret(name, code) for name, code in codes.items())


def secret_parts(config: SecretsConfig) -> Parts:
    """The facts as answers to prompts, parted as `SecretsConfig` says.

    Raises:
      ValueError: fewer than three facts to part.
    """
    facts = secrets(config.count, digits=config.digits, seed=config.seed)
    asked = [
        tuple(
            Document(f"{fact.code}.", phrasing.format(name=fact.name), fact.name) for fact in facts
        )
        for phrasing in PHRASINGS[: config.phrasings]
    ]
    if config.parted == "facts":
        return split_documents(
            [document for documents in asked for document in documents],
            selection=config.selection,
            held_out=config.held_out,
            seed=config.seed,
            where="secrets",
        )
    return Parts(
        train=tuple(document for documents in asked[:-2] for document in documents),
        selection=asked[-2],
        held_out=asked[-1],
    )
