"""`register`: methods, attackers and data sets from outside the package, by call or entry point."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

FAMILIES = {
    "immuniser": "jaximm.immunisers",
    "attack": "jaximm.attacks",
    "data": "jaximm.data",
}
"""Family name to the module whose ``REGISTRY`` holds it."""

ENTRY_POINT_GROUP = "jaximm"
"""Entry points of this group, named ``family.name``, are registered by `load_entry_points`."""


def register(family: str, name: str, entry: Any) -> None:
    """Adds one entry to a family's registry, so that every suite, run and command finds it.

    Args:
      family: "immuniser", "attack" or "data".
      name: a new name; letters, digits and underscores.
      entry: for an immuniser ``(ConfigClass, factory)``; for an attack the same or a finished
        `jaximm.attacks.Attack`; for data ``(ConfigClass, load)``.

    Raises:
      ValueError: an unknown family, a name that is taken or no identifier, or an entry of the
        wrong form.

    >>> import jaximm.attacks as attacks
    >>> register("attack", "my_ridge", attacks.REGISTRY["ridge"])
    >>> attacks.make_attack("my_ridge").kind
    'closed-form'
    >>> del attacks.REGISTRY["my_ridge"]
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose from {sorted(FAMILIES)}.")
    registry = importlib.import_module(FAMILIES[family]).REGISTRY
    if not name.isidentifier():
        raise ValueError(f"a name must be letters, digits and underscores, got {name!r}.")
    if name in registry:
        raise ValueError(f"{family} {name!r} is registered already; choose another name.")
    is_pair = isinstance(entry, tuple) and len(entry) == 2 and callable(entry[1])
    if not is_pair and not (family == "attack" and hasattr(entry, "update")):
        raise ValueError(
            f"{family} {name!r} must be registered as (ConfigClass, factory)"
            f"{' or an Attack' if family == 'attack' else ''}, got {type(entry).__name__}."
        )
    registry[name] = entry


def load_entry_points() -> list[str]:
    """Registers every installed entry point of the group ``jaximm``; returns their names.

    Raises:
      ValueError: as `register`, or a name that is not ``family.name``.
    """
    names = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        family, _, name = point.name.partition(".")
        register(family, name, point.load())
        names.append(point.name)
    return names
