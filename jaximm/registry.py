"""`register`: methods, attackers, models and data from outside, by call or entry point.

What a file (`run_file`) or an entry point registered is remembered with its `Origin`, so that a run
can say where the code of its configuration came from, and a later process can run it again.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import hashlib
import importlib
import json
import numbers
import sys
import types
import typing
from collections.abc import Generator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, Union

Config = Any
"""A configuration: a frozen dataclass of its entry's own."""

Registry = dict[str, Any]
"""Name to entry, whose form is the family's own: see `register`."""

FAMILIES = {
    "immuniser": ("jaximm.immunisers", "REGISTRY"),
    "attack": ("jaximm.attacks", "REGISTRY"),
    "data": ("jaximm.data", "REGISTRY"),
    "model": ("jaximm.models", "REGISTRY"),
}
"""Family name to the module that holds its registry, and the registry's name there."""

GONE = {"weight_attack": "attack", "images": "data"}
"""Families that are part of another one now."""

_REMEDIES = {"images": '; its configuration says targets = "classes", a class variable'}

ENTRY_POINT_GROUP = "jaximm"
"""Entry points of this group, named ``family.name``, are registered by `load_entry_points`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where code came from: a Python file, or an entry point of an installed package.

    Attributes:
      file: absolute path, or "".
      sha256: of the file's bytes as they ran, in hexadecimal, or "".
      entry_point: ``family.name = module:attribute``, or "".
      package: name and version of what brought the entry point, or "".
    """

    file: str = ""
    sha256: str = ""
    entry_point: str = ""
    package: str = ""


_origins: dict[tuple[str, str], Origin] = {}  # of entries, by family and name
_running: list[Origin] = []  # whose code runs now, the innermost last
_ran: dict[str, Origin] = {}  # files that were run, by path


def register(family: str, name: str, entry: object) -> None:
    """Adds one entry to a family's registry, so that every suite, run and command finds it.

    Args:
      family: a key of `FAMILIES`: "immuniser", "attack" (of a probe on frozen features or of the
        weights), "data" (pairs of tasks) or "model" (backbones).
      name: a new name; letters, digits and underscores.
      entry: for an immuniser ``(ConfigClass, factory)``; for an attack a finished
        `jaximm.attacks.Attack` or `jaximm.attacks.WeightAttack`, or a factory of one, all of whose
        arguments have defaults; for data ``(ConfigClass, load)``; for a model a
        `jaximm.models.ModelSpec`, which `jaximm.models.whole` makes of any Flax module.

    Raises:
      ValueError: an unknown family, a name that is taken or no identifier, or an entry of the
        wrong form. A file that is run again (`run_file`) replaces what it registered itself.

    >>> import jaximm.attacks as attacks
    >>> register("attack", "my_ridge", attacks.make_attack("ridge", penalties=(0.5,)))
    >>> attacks.make_attack("my_ridge").kind
    'closed-form'
    >>> del attacks.REGISTRY["my_ridge"]
    """
    if family in GONE:
        raise ValueError(
            f"there is no family {family!r} any more; {GONE[family]!r} serves both kinds: "
            f"register({GONE[family]!r}, {name!r}, ...){_REMEDIES.get(family, '')}."
        )
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose from {sorted(FAMILIES)}.")
    if not name.isidentifier():
        raise ValueError(f"a name must be letters, digits and underscores, got {name!r}.")
    running, earlier = _running[-1] if _running else None, origin_of(family, name)
    is_rerun = running is not None and earlier is not None and running.file == earlier.file != ""
    if name in entries(family) and not is_rerun:
        raise ValueError(f"{family} {name!r} is registered already; choose another name.")
    registry, form = _place(family, entry)
    if registry is None:
        raise ValueError(
            f"{family} {name!r} must be registered as {form}, got {type(entry).__name__}."
        )
    for other in _registries(family):
        if other is not registry:  # a file that ran again may have made it of the other kind
            other.pop(name, None)
    registry[name] = entry
    if running is None:
        _origins.pop((family, name), None)
    else:
        _origins[family, name] = running


def parse_label(label: str) -> tuple[str, dict[str, Any]]:
    """Name and fields of a label of a method or an attacker.

    >>> parse_label("limit@t=1,damping=0.01")
    ('limit', {'t': 1, 'damping': 0.01})
    >>> parse_label("lora@rank=64,learning_rates=1e-4|1e-3")
    ('lora', {'rank': 64, 'learning_rates': (0.0001, 0.001)})

    Raises:
      ValueError: not ``name`` or ``name@key=value,...``, with JSON values or several of them with
        bars between.
    """
    name, at, tail = label.partition("@")
    fields: dict[str, Any] = {}
    for part in tail.split(",") if at else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ValueError(f"label {label!r} must read name@key=value,key=value.")
        if key.strip() in fields:
            raise ValueError(f"label {label!r} gives {key.strip()!r} twice; give it once.")
        values = [_json_or_text(text) for text in value.split("|")]
        fields[key.strip()] = tuple(values) if len(values) > 1 else values[0]
    return name, fields


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def origin_of(family: str, name: str) -> Origin | None:
    """Where a registered entry came from; None: from jaximm, from a plain call, or not there."""
    return _origins.get((family, name)) if name in entries(family) else None


def run_file(path: Path) -> tuple[dict[str, Any], Origin]:
    """Runs a Python file; what it defines, and its origin.

    What it registers is remembered as its own. It may import what lies in its own folder, which
    stays at the end of ``sys.path``; the file stays a module of the process (``sys.modules``), so
    that its classes are found by those who look for their module.

    Raises:
      ValueError: the file cannot be read or ends in an error; names the file.
    """
    path = Path(path).absolute()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    origin = Origin(file=str(path), sha256=hashlib.sha256(content).hexdigest())
    module = types.ModuleType(f"{path.stem}_{origin.sha256[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        with _registering(origin):
            exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    _ran[origin.file] = origin
    return module.__dict__, origin


def last_run(path: Path) -> Origin | None:
    """The file at `path` as `run_file` last ran it; None: it did not."""
    return _ran.get(str(Path(path).absolute()))


def files_run() -> tuple[Origin, ...]:
    """The files that `run_file` has run in this process, each as it last was."""
    return tuple(_ran.values())


@contextlib.contextmanager
def _registering(origin: Origin) -> Generator[None]:
    """What is registered inside comes from `origin`."""
    _running.append(origin)
    try:
        yield
    finally:
        _running.pop()


def make_config(
    registry: Mapping[str, tuple[type, Any]], what: str, name: str, fields: Mapping[str, Any]
) -> Config:
    """The configuration of a registry's entry with the given fields, others at their defaults.

    Args:
      registry: name to ``(ConfigClass, ...)``.
      what: what its entries are, for the error.
      name: of the entry.
      fields: of its config.

    Raises:
      ValueError: unknown name or field, with the known ones; a value of the wrong type, or one that
        the class refuses.
    """
    if name not in registry:
        raise ValueError(f"unknown {what} {name!r}; choose from {sorted(registry)}.")
    config_class = registry[name][0]
    hints = field_types(config_class)
    unknown = sorted(set(fields) - set(hints))
    if unknown:
        raise ValueError(f"{name}: unknown config key {unknown[0]!r}; choose from {list(hints)}.")
    fitting = {key: fit(value, hints[key]) for key, value in fields.items()}
    wrong = [key for key, value in fitting.items() if value is NO_FIT]
    # JSON has lists only; all else stays as it was given.
    tuples = {key: value for key, value in fitting.items() if isinstance(value, tuple)}
    try:
        config = config_class(**{**fields, **tuples})
    except TypeError:
        if not wrong:
            raise
    else:
        if not wrong:
            return config
    key = wrong[0]  # a class's own refusal, a ValueError, comes before this one
    raise ValueError(f"{name}: {key} must be {type_name(hints[key])}, got {fields[key]!r}.")


def field_types(config_class: type) -> dict[str, Hint]:
    """Field names and types of a config class; Any where a type cannot be found."""
    names = [field.name for field in dataclasses.fields(config_class)]
    try:
        hints = typing.get_type_hints(config_class)
    except (NameError, TypeError):  # a user's class whose annotations exist for a type checker only
        hints = {}
    return {name: hints.get(name, Any) for name in names}


Hint = Any
"""What an annotation says at run time: a class, or a form of `typing`."""

NO_FIT = object()
"""What `fit` says of a value that is not of the type."""


def fit(value: Any, hint: Hint) -> Any:
    """`value` as the type `hint`, or `NO_FIT`; a single value serves as a tuple of one.

    >>> fit(3, float), fit([1, 2], tuple[int, ...]), fit("a", int | None) is NO_FIT
    (3.0, (1, 2), True)
    """
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        narrow_first = sorted(members, key=lambda member: member is float)  # 3 is an int
        fits = (fit(value, member) for member in narrow_first)
        return next((fitting for fitting in fits if fitting is not NO_FIT), NO_FIT)
    if origin is Literal:
        return value if any(value == m and type(value) is type(m) for m in members) else NO_FIT
    if origin is tuple:
        if value is None:
            return NO_FIT
        items = value if isinstance(value, list | tuple) else [value]
        repeated = len(members) == 2 and members[1] is Ellipsis
        kinds = [members[0]] * len(items) if repeated else list(members)
        if len(kinds) != len(items):
            return NO_FIT
        fitting = tuple(fit(item, kind) for item, kind in zip(items, kinds, strict=True))
        return NO_FIT if any(item is NO_FIT for item in fitting) else fitting
    if hint is None or hint is type(None):
        return None if value is None else NO_FIT
    if hint is float:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return float(value) if is_number else NO_FIT
    if hint is int:
        is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return int(value) if is_number else NO_FIT
    if hint in (str, bool):
        return value if isinstance(value, hint) else NO_FIT
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return value if isinstance(value, collections.abc.Mapping) else NO_FIT
    return value


def type_name(hint: Hint) -> str:
    """A type in words, as a refusal names it."""
    if typing.get_origin(hint) is Literal:
        return f"one of {[choice for choice in typing.get_args(hint) if choice != '']}"
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(hint)))
    return hint.__name__ if type(hint) is type else str(hint)


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
        if family not in FAMILIES or entries(family).get(name) is not entry:
            with _registering(_origin_of_point(point)):
                register(family, name, entry)
        names.append(point.name)
    return names


def _origin_of_point(point: EntryPoint) -> Origin:
    dist = getattr(point, "dist", None)
    package = "" if dist is None else f"{dist.name} {dist.version}"
    return Origin(entry_point=f"{point.name} = {point.value}", package=package)


def _place(family: str, entry: object) -> tuple[Registry | None, str]:
    """The registry that an entry belongs in, None if its form is wrong; and the right form."""
    registries, module = _registries(family), importlib.import_module(FAMILIES[family][0])
    if family == "model":
        return registries[0] if isinstance(entry, module.ModelSpec) else None, "a ModelSpec"
    if family == "attack":
        attack = entry
        if callable(entry) and not isinstance(entry, type):
            with contextlib.suppress(TypeError):  # no factory, or one that needs arguments
                attack = entry()
        kinds = (module.Attack, module.WeightAttack)
        place = next(
            (r for r, k in zip(registries, kinds, strict=True) if isinstance(attack, k)), None
        )
        return place, "a finished Attack or WeightAttack, or a factory that needs no arguments"
    is_pair = (
        isinstance(entry, tuple)
        and len(entry) == 2
        and isinstance(entry[0], type)
        and dataclasses.is_dataclass(entry[0])
        and callable(entry[1])
    )
    form = "(ConfigClass, factory), a dataclass and a function"
    return registries[0] if is_pair else None, form


def _registries(family: str) -> list[Registry]:
    """Those of a family: attackers have one for probes and one for weights."""
    module = importlib.import_module(FAMILIES[family][0])
    names = [FAMILIES[family][1], *(["WEIGHT_REGISTRY"] if family == "attack" else [])]
    return [getattr(module, name) for name in names]


def entries(family: str) -> Mapping[str, Any]:
    """What is registered in a family: name to entry."""
    return collections.ChainMap(*_registries(family))
