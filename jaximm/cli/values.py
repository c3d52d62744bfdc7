"""Fields of an experiment and of its parts from the text of flags and of --set KEY=VALUE."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Union

import tyro

from jaximm.cli.common import Common
from jaximm.cli.errors import UsageError

if TYPE_CHECKING:
    from jaximm.registry import Hint
    from jaximm.run.config import Experiment
    from jaximm.types import Fields, Json


def assignments_of(texts: Sequence[str]) -> dict[str, str]:
    """What each --set assigns to its key, under today's name."""
    from jaximm.run.config import RENAMED

    assignments: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        owner, *field = key.strip().split(".", 1)
        key = ".".join([RENAMED.get(owner, owner), *field])
        if not equals or not key:
            raise UsageError(f"--set takes KEY=VALUE, got {text!r}.")
        if key in assignments:
            raise UsageError(f"--set {key} is given twice; give it once.")
        assignments[key] = value
    return assignments


def changes_of(config: Experiment, assignments: Mapping[str, str]) -> Json:
    """Values of experiment fields from assignments to them, to their parts and to METHOD.FIELD."""
    from jaximm import immunisers, registry

    hints = registry.field_types(type(config))
    changes: Json = {}
    for key, text in assignments.items():
        if "." not in key:
            if key not in hints:
                raise UsageError(
                    f"unknown experiment key {key!r}; choose from {list(hints)}, or METHOD.FIELD "
                    "and the like (see --set)."
                )
            changes[key] = _value(key, text, hints[key])
    parts = _parts(config, changes)
    methods = {
        method: dict(fields)
        for method, fields in changes.get("method_fields", config.method_fields).items()
    }
    for key, text in assignments.items():
        owner, dot, field = key.partition(".")
        if not dot:
            continue
        if owner in parts:
            parts[owner].fields[field] = field_value(key, field, text, parts[owner].config_class)
        elif owner in immunisers.REGISTRY:
            class_ = immunisers.REGISTRY[owner][0]
            fields = methods.setdefault(owner, {})
            fields[field] = field_value(key, field, text, class_)
        else:
            raise UsageError(
                f"unknown key {key!r}: {owner!r} is neither {' nor '.join(parts)} nor a method; "
                f"methods: {sorted(immunisers.REGISTRY)}."
            )
    for method, fields in methods.items():  # those that this call does not run, too
        try:
            immunisers.make_config(method, **fields)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{method}: {str(error).removeprefix(f'{method}: ')}") from error
    changes["method_fields"] = methods
    for part in parts.values():
        try:
            changes[part.key] = part.fields if part.as_mapping else part.config_class(**part.fields)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{part.key}: {error}") from error
    return changes


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of an experiment whose fields can be set one by one."""

    key: str  # the experiment's field that holds it
    config_class: type
    fields: Json
    as_mapping: bool = True


def _parts(config: Experiment, changes: Fields) -> dict[str, _Part]:
    """The parts of an experiment, after the fields in `changes`, by the name that --set uses."""
    from jaximm import data, models

    def part(owner: str, key: str, registry: Mapping, what: str) -> _Part:
        name = changes.get(owner, getattr(config, owner))
        if name not in registry:
            raise UsageError(f"unknown {what} {name!r}; choose from {sorted(registry)}.")
        # The fields of another entry's config mean nothing to this one.
        kept = getattr(config, key) if name == getattr(config, owner) else {}
        entry = registry[name][0]
        class_ = entry if isinstance(entry, type) else type(entry)
        return _Part(key, class_, dict(changes.get(key, kept)))

    optimiser = dataclasses.asdict(config.optimiser)
    preprocess = dict(changes.get("preprocess", config.preprocess))
    return {
        "data": part("data", "data_fields", data.REGISTRY, "data set"),
        "model": part("model", "model_fields", models.REGISTRY, "model"),
        "optimiser": _Part("optimiser", type(config.optimiser), optimiser, as_mapping=False),
        "preprocess": _Part("preprocess", models.Preprocess, preprocess),
    }


def field_value(key: str, field: str, text: str, class_: type) -> object:
    """`text` as a value of the field of `class_`; `key` is what an error calls it.

    Raises:
      UsageError: no such field, or a value that it does not take.
    """
    from jaximm import registry

    hints = registry.field_types(class_)
    if field not in hints:
        raise UsageError(f"unknown key {key!r}; choose from {list(hints)}.")
    return _value(key, text, hints[field])


def _value(key: str, text: str, hint: Hint) -> object:
    """`text` as JSON (None is null), else as it is, if that fits `hint`."""
    from jaximm import registry

    try:
        candidates = [json.loads("null" if text == "None" else text), text]
    except json.JSONDecodeError:
        candidates = [text]
    for candidate in candidates:
        fitting = registry.fit(candidate, hint)
        if fitting is not registry.NO_FIT:
            return fitting
    raise UsageError(f"{key} must be {registry.type_name(hint)}, got {text!r}.")


def scalar_fields(class_: type) -> dict[str, Hint]:
    """The fields of a configuration that hold one value, with their types."""
    from jaximm import registry

    def is_scalar(hint: Hint) -> bool:
        if typing.get_origin(hint) in (Union, types.UnionType):
            return all(map(is_scalar, typing.get_args(hint)))
        scalars = (int, float, str, bool, type(None))
        return typing.get_origin(hint) is Literal or hint in scalars

    hints = registry.field_types(class_)
    return {key: hint for key, hint in hints.items() if is_scalar(hint)}


NOT_GIVEN = "\0"
"""Of a flag that is not there: no text that a command line can hold, so that None is a value."""


def with_flags(
    base: type,
    class_: type,
    *,
    renamed: Mapping[str, str] = types.MappingProxyType({}),
    default: str = "",
) -> type:
    """`base` with a flag for each scalar field of a configuration that it has no field for.

    Args:
      base: arguments of a command.
      class_: the configuration; what its docstring says of a field is the flag's help.
      renamed: earlier names of fields, which are flags too.
      default: what the help says of a flag that is not given; "": the field's own default.
    """
    from jaximm import registry

    hints, about = scalar_fields(class_), attribute_texts(class_.__doc__ or "")
    hints = {key: hint for key, hint in hints.items() if key not in base.__dataclass_fields__}
    for old, new in renamed.items():
        if new in hints:
            hints[old], about[old] = hints[new], f"earlier name of --{new}."
    usual = {field.name: field.default for field in dataclasses.fields(class_)}
    flags = []
    for key, hint in hints.items():
        names = registry.type_name(hint).removesuffix(" or null").upper()
        if typing.get_origin(hint) is Literal:
            names = "|".join(map(str, typing.get_args(hint)))
        # Text to tyro: the value is read by the same rules as that of --set.
        flag = tyro.conf.arg(
            metavar={"STR": "TEXT"}.get(names, names),
            help=about.get(key, ""),
            help_behavior_hint=default or f"(default: {usual[key]})",
        )
        flags.append((key, Annotated[str, flag], dataclasses.field(default=NOT_GIVEN)))
    made = dataclasses.make_dataclass(
        base.__name__, flags, bases=(base,), frozen=True, kw_only=True
    )
    made.__doc__ = base.__doc__
    return made


def given(args: Common, keys: Iterable[str]) -> dict[str, str]:
    """Texts of the flags of `with_flags` that are there."""
    texts = {key: getattr(args, key, NOT_GIVEN) for key in keys}
    return {key: text for key, text in texts.items() if text != NOT_GIVEN}


def attribute_texts(docstring: str) -> dict[str, str]:
    """The texts of an ``Attributes:`` section by name."""
    section = docstring.partition("Attributes:\n")[2]
    items = re.findall(r"^ +(\w+): (.*(?:\n(?! +\w+: ).*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}
