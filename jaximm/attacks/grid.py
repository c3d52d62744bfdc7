"""What both families of attackers share: cells of hyper-parameters, and what they say they are."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

KINDS = (
    "first-order",
    "momentum",
    "adaptive",
    "krylov",
    "quasi-newton",
    "closed-form",
    "preconditioned",
    "fine-tuning",
    "partial",
    "low-rank",
    "latent",
    "perturbed",
    "reinforcement",
    "mixed",
    "poisoning",
    "drift",
    "rescaling",
    "undo",
    "from scratch",
    "ablation",
    "compression",
    "merging",
    "statistics",
    "opened",
    "without gradients",
)
"""What an attacker does, in a word or two, for readers; what code asks for are its `TRAITS`."""

TRAITS: dict[str, str] = {
    "textbook": "the plain form of descent, with which others are compared",
    "plain_descent": "follows gradients with nothing that undoes conditioning, so it is slowed",
    "solves": "solves a linear system in place of steps",
    "preconditions": "rescales features, gradients or weights, so conditioning does not slow it",
    "warm_head": "starts from the head that the model has, at its scale",
    "new_head": "starts from a head of its own, or from one of another scale",
    "plain_user": "an ordinary way to use a released model: it learns benign tasks too",
    "opens": "takes the program apart: constants, whole numbers, dead units hide nothing from it",
    "undoes_defence": "takes a defence back first: it meets harmful tasks that no defence has seen",
    "from_scratch": "begins from weights of its own: what it reaches needs no model",
    "rewarded": "sees rewards of its answers in place of labels",
}
"""What flags, protocol and verdict ask of an attacker, and what each means."""

MAX_STEPS = 2**30
"""Largest step budget: step counts are int32, and bisection adds two of them."""


Hyper = Mapping[str, Any]
"""Hyper-parameters of one cell: names to scalars; inside init and update they are traced."""


Values = Sequence[float]
"""What is tried of one hyper-parameter."""


def grid(**tried: tuple[Values, str]) -> tuple[dict[str, float], ...]:
    """`grid_product` of values that are checked: a name to the values and their interval.

    Raises:
      ValueError: see `checked`.

    >>> grid(step=((0.1, 1.0), "(0, inf)"), memory=((10,), "whole [1, inf)"))
    ({'step': 0.1, 'memory': 10.0}, {'step': 1.0, 'memory': 10.0})
    """
    return grid_product(
        **{name: checked(name, values, interval) for name, (values, interval) in tried.items()}
    )


_INTERVAL = re.compile(r"(whole )?([\[(])(\S+), (\S+)([\])])")


def checked(name: str, values: Values, interval: str) -> tuple[float, ...]:
    """The values as a tuple, if there are some and each lies in the interval.

    Args:
      name: of the hyper-parameter, for the error.
      values: numbers; no bools, no NaN.
      interval: such as ``"[0, 1)"``, or ``"whole [1, inf)"`` for whole numbers.

    Raises:
      ValueError: otherwise.

    >>> checked("rank", (0,), "whole [1, inf)")
    Traceback (most recent call last):
    ...
    ValueError: rank: expected whole numbers in [1, inf), at least one, got (0,).
    """
    parts = _INTERVAL.fullmatch(interval)
    assert parts is not None
    whole, opening, low, high, closing = parts.groups()

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return False
        number = float(value)
        above = number >= float(low) if opening == "[" else number > float(low)
        below = number <= float(high) if closing == "]" else number < float(high)
        return above and below and (not whole or number.is_integer())

    if not isinstance(values, Sequence) or not values or not all(map(fits, values)):
        what = f"{whole or ''}numbers in {opening}{low}, {high}{closing}"
        raise ValueError(f"{name}: expected {what}, at least one, got {values!r}.")
    return tuple(values)


def check_whole(name: str, value: int, *, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number, and large enough."""
    checked(name, (value,), f"whole [{least}, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attacker:
    """What attackers of both families say of themselves.

    Attributes:
      kind: one of KINDS.
      title: its name in running text; the registry name in words if empty.
      source: the publication; the module of its code if empty.
      knows: what it has to know beyond what all attackers of its family do.
      traits: of TRAITS.
      grid: the default cells of hyper-parameters; one cell without any if empty.
      natural_bounds: (name, value) pairs at which a hyper-parameter ends by nature (penalty 0):
        choosing one is not an "edge of the grid".
      swept: hyper-parameters above 0 without an upper end, whose sweep may go on beyond the grid.
      harmful_rows: how many labelled rows of the harmful task it has to train on, >= 1; None, or
        more than there are: all. They are the first of a permutation, so that the rows of a smaller
        number are among those of a larger one. Rows that choose hyper-parameters are not counted.
      rows_seed: of that permutation, >= 0.
    """

    kind: str
    title: str = ""
    source: str = ""
    knows: str = ""
    traits: frozenset[str] = frozenset()
    grid: tuple[Hyper, ...] = ()
    natural_bounds: tuple[tuple[str, float], ...] = ()
    swept: tuple[str, ...] = ()
    harmful_rows: int | None = None
    rows_seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose from {list(KINDS)}.")
        unknown = sorted(set(self.traits) - set(TRAITS))
        if unknown:
            raise ValueError(f"unknown trait {unknown[0]!r}; choose from {list(TRAITS)}.")
        if self.harmful_rows is not None:
            check_whole("harmful_rows", self.harmful_rows)
        check_whole("rows_seed", self.rows_seed, least=0)
        object.__setattr__(self, "traits", frozenset(self.traits))

    @property
    def labelled_rows(self) -> str:
        """Which labelled rows it has, in words."""
        count = "" if self.harmful_rows is None else f"{self.harmful_rows:,} "
        return f"{count}labelled rows of the harmful task"

    def rows_of(self, n: int) -> np.ndarray | None:
        """Which of n rows it has, in their order; None: all of them.

        >>> few, fewer = (Attacker(kind="krylov", harmful_rows=k).rows_of(9) for k in (4, 2))
        >>> len(few), set(fewer) < set(few), Attacker(kind="krylov", harmful_rows=9).rows_of(9)
        (4, True, None)
        """
        if self.harmful_rows is None or self.harmful_rows >= n:
            return None
        order = np.random.default_rng(self.rows_seed).permutation(n)
        return np.sort(order[: self.harmful_rows])


def grid_product(**values: Sequence[float]) -> tuple[dict[str, float], ...]:
    """Every combination of the values of each hyper-parameter, the last name varying fastest.

    >>> grid_product(step=(0.1, 1.0), momentum=(0.9,))
    ({'step': 0.1, 'momentum': 0.9}, {'step': 1.0, 'momentum': 0.9})
    """
    cells: list[dict[str, float]] = [{}]
    for name, choices in values.items():
        cells = [{**cell, name: float(choice)} for cell in cells for choice in choices]
    return tuple(cells)


def recorded_steps(steps: int, *, points: int = 150) -> np.ndarray:
    """The steps at which curves are kept: 0, a log-spaced grid of at most `points`, the budget.

    The step at nine tenths of the budget is among them: "still falling" compares with it.

    >>> recorded_steps(10, points=4)
    array([ 0,  1,  2,  5,  9, 10], dtype=int32)
    """
    grid = np.round(np.geomspace(1, steps, points)).astype(np.int64)
    return np.unique(np.concatenate([[0, _late_step(steps), steps], grid])).astype(np.int32)


def _late_step(steps: int) -> int:
    """Nine tenths of the budget, and before its end."""
    return (9 * steps) // 10


def at_edge(attack: Attacker, cells: Sequence[Hyper], chosen: int) -> bool:
    """Whether a chosen hyper-parameter is the least or greatest tried, natural bounds apart."""
    for name, value in cells[chosen].items():
        tried = {cell[name] for cell in cells}
        if len(tried) == 1 or (name, value) in attack.natural_bounds:
            continue
        if value in (min(tried), max(tried)):
            return True
    return False


End = Literal["least", "greatest"]
"""Of what was tried of a hyper-parameter."""


def is_at(cells: Sequence[Hyper], chosen: int, name: str, end: End) -> bool:
    """Whether a chosen cell has the least, or the greatest, of several values."""
    tried = {cell[name] for cell in cells}
    return len(tried) > 1 and cells[chosen][name] == (min if end == "least" else max)(tried)


def beyond(cells: Sequence[Hyper], name: str, end: End) -> list[Hyper]:
    """Cells with which a sweep goes on beyond one end, by the factor of its last two values.

    Nothing where only one value was tried.

    >>> beyond(grid_product(rate=(0.01, 0.1), decay=(0.0,)), "rate", "greatest")
    [{'rate': 1.0, 'decay': 0.0}]
    """
    tried = sorted({cell[name] for cell in cells}, reverse=end == "greatest")
    if len(tried) < 2:
        return []
    value = tried[0] * (tried[0] / tried[1])
    return [{**cell, name: value} for cell in cells if cell[name] == tried[0]]
