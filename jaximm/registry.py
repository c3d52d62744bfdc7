"""`register`: methods, attackers, models and data from outside, by call or entry point."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

FAMILIES = {
    "immuniser": ("jaximm.immunisers", "REGISTRY"),
    "attack": ("jaximm.attacks", "REGISTRY"),
    "weight_attack": ("jaximm.attacks", "WEIGHT_REGISTRY"),
    "data": ("jaximm.data", "REGISTRY"),
    "images": ("jaximm.data.images", "IMAGE_REGISTRY"),
    "model": ("jaximm.models", "REGISTRY"),
}
"""Family name to the module that holds its registry, and the registry's name there."""

_FINISHED = {"attack": "Attack", "weight_attack": "WeightAttack", "model": "ModelSpec"}
"""Class, in the family's module, of entries that need no config class."""

ENTRY_POINT_GROUP = "jaximm"
"""Entry points of this group, named ``family.name``, are registered by `load_entry_points`."""


def register(family: str, name: str, entry: Any) -> None:
    """Adds one entry to a family's registry, so that every suite, run and command finds it.

    Args:
      family: a key of `FAMILIES`: "immuniser", "attack" (of a probe on frozen features),
        "weight_attack" (of the weights), "data" (feature matrices), "images" (pairs of image
        tasks) or "model" (backbones).
      name: a new name; letters, digits and underscores.
      entry: for an immuniser ``(ConfigClass, factory)``; for an attack the same or a finished
        `jaximm.attacks.Attack` or `jaximm.attacks.WeightAttack`; for data and images
        ``(ConfigClass, load)``; for a model a `jaximm.models.ModelSpec`, which
        `jaximm.models.whole` makes of any Flax module.

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
    registry = _registry(family)
    if not name.isidentifier():
        raise ValueError(f"a name must be letters, digits and underscores, got {name!r}.")
    if name in registry:
        raise ValueError(f"{family} {name!r} is registered already; choose another name.")
    is_pair = (
        isinstance(entry, tuple)
        and len(entry) == 2
        and isinstance(entry[0], type)
        and dataclasses.is_dataclass(entry[0])
        and callable(entry[1])
    )
    finished = _FINISHED.get(family)
    if finished is not None and isinstance(entry, getattr(_module(family), finished)):
        pass
    elif family == "model" or not is_pair:
        forms = [] if family == "model" else ["(ConfigClass, factory), a dataclass and a function"]
        forms += [] if finished is None else [f"a finished {finished}"]
        raise ValueError(
            f"{family} {name!r} must be registered as {', or '.join(forms)}, got "
            f"{type(entry).__name__}."
        )
    registry[name] = entry


def make_config(
    registry: Mapping[str, tuple[type, Any]], what: str, name: str, fields: Mapping[str, Any]
) -> Any:
    """The configuration of a registry's entry with the given fields, others at their defaults.

    Args:
      registry: name to ``(ConfigClass, ...)``.
      what: what its entries are, for the error.
      name: of the entry.
      fields: of its config.

    Raises:
      ValueError: unknown name or field, with the known ones; or a value that the class refuses.
    """
    if name not in registry:
        raise ValueError(f"unknown {what} {name!r}; choose from {sorted(registry)}.")
    config_class = registry[name][0]
    known = [field.name for field in dataclasses.fields(config_class)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{name}: unknown config key {unknown[0]!r}; choose from {known}.")
    return config_class(**fields)


def load_entry_points() -> list[str]:
    """Registers every installed entry point of the group ``jaximm``; returns their names.

    Calling it again changes nothing: an entry that is there already is left alone.

    Raises:
      ValueError: as `register`; a name that is not ``family.name``; or an entry point that cannot
        be imported.
    """
    names = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        family, _, name = point.name.partition(".")
        try:
            entry = point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"entry point {point.name!r} = {point.value!r} cannot be loaded: {error}."
            ) from error
        if family not in FAMILIES or _registry(family).get(name) is not entry:
            register(family, name, entry)
        names.append(point.name)
    return names


def _module(family: str) -> Any:
    return importlib.import_module(FAMILIES[family][0])


def _registry(family: str) -> dict[str, Any]:
    return getattr(_module(family), FAMILIES[family][1])
