"""What a method says of itself, for lists, tables and verdicts."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

TRAITS = {
    "control": "leaves the model as it is",
    "closed_form": "solves in one pass over the rows and trains no parameter",
    "needs_harmful_head": "works on the loss of classes, read off by a head fitted to theta_0",
    "needs_classes": "works on losses of classes or tokens, without a harmful head",
    "keeps_logits": "the primary logits stay what they were, but for rounding",
}
"""What code asks of a method, and what each means."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """A method's words about itself, as the class variable ``about`` of its configuration.

    Attributes:
      title: at most 36 characters, for tables; empty: the registered name.
      source: citation with a link; empty: the module.
      against: whom it is meant to stop, after the words "made against".
      broken_by: what breaks it whatever its settings, after the words "not against".
      traits: of TRAITS.
    """

    title: str = ""
    source: str = ""
    against: str = ""
    broken_by: str = ""
    traits: frozenset[str] = frozenset()

    def __post_init__(self):
        unknown = sorted(set(self.traits) - set(TRAITS))
        if unknown:
            raise ValueError(f"unknown trait {unknown[0]!r}; choose from {list(TRAITS)}.")
        object.__setattr__(self, "traits", frozenset(self.traits))

    @property
    def threat_model(self) -> str:
        """Both halves as one phrase, or "" where nothing is said."""
        halves = {"made against": self.against, "not against": self.broken_by}
        return "; ".join(f"{word} {text}" for word, text in halves.items() if text)


class MethodConfig(Protocol):
    """What the configuration of every method has, whatever else: it is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Updates; 1 of a closed form."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Rows of each task a step; None: all there are."""
        ...


GRADIENT_STEPS = "a linear head that is fitted by gradient steps on the frozen features"
"""Whom every method that acts on condition numbers is meant to stop."""

WHITENING = "one that whitens them or solves for the head, nor against training the weights"
"""What breaks every one of them."""
