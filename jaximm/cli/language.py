"""What commands on language models share: which words are models, and the fields of texts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from jaximm.cli.errors import UsageError
from jaximm.cli.values import field_value

if TYPE_CHECKING:
    from jaximm.types import Fields, Json

ROLES = ("primary", "harmful", "control")
"""Of texts."""

SMOLLM2 = "smollm2"
"""`jaximm.run.language.SMOLLM2`, known before anything is imported."""


def is_model(word: str) -> bool:
    """Whether a word of the command line is a language model: a folder of the hub, GGUF, a name.

    A run's folder has a config.json too, which says nothing of a model's type.
    """
    path = Path(word)
    if word == SMOLLM2 or path.suffix == ".gguf":
        return True
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return any(path.glob("*.safetensors")) if path.is_dir() else False
    return isinstance(content, dict) and ("model_type" in content or "architectures" in content)


def is_place(word: str) -> bool:
    """Whether a word is a path rather than a name or a configuration."""
    path = Path(word)
    is_file = path.suffix in (".json", ".py")
    return path.is_dir() or (os.sep in word and not is_file)


def first_word(argv: Sequence[str], *classes: type) -> str:
    """The first argument that is no flag and no flag's value; "" where there is none.

    Args:
      argv: without the name of the command.
      classes: of its arguments, which say what flags take no value.
    """
    hints = [hint for class_ in classes for hint in get_type_hints(class_).items()]
    switches = {f"--{key.replace('_', '-')}" for key, hint in hints if hint is bool}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            return word
        if "=" not in word and word.replace("_", "-") not in switches and word != "-h":
            next(words, None)
    return ""


def text_fields(
    assignments: Mapping[str, str], names: Mapping[str, str], earlier: Mapping[str, Fields]
) -> dict[str, Json]:
    """Fields of texts by role, from assignments to ROLE.FIELD.

    Args:
      assignments: ``{"harmful.count": "8"}``; others are not looked at.
      names: of the texts, by role.
      earlier: fields that stay where they are not replaced, by role.

    Raises:
      UsageError: an unknown text or field, or a value that it does not take.
    """
    from jaximm.data.text import TEXTS

    for name in filter(None, names.values()):
        if name not in TEXTS:
            raise UsageError(f"unknown text {name!r}; choose from {sorted(TEXTS)}.")
    by_role = {role: dict(fields) for role, fields in earlier.items()}
    for key, text in assignments.items():
        role, dot, field = key.partition(".")
        if not dot or role not in ROLES:
            continue
        if not names[role]:
            raise UsageError(f"--set {key}: there is no {role} text; name one by --{role}.")
        fields = by_role.setdefault(role, {})
        fields[field] = field_value(key, field, text, TEXTS[names[role]].config)
    return by_role


def refuse_unknown(keys: Iterable[str], known: Sequence[str]) -> None:
    """Refuses keys of --set that nothing has.

    Raises:
      UsageError: with those that there are.
    """
    for key in keys:
        owner, dot, _ = key.partition(".")
        if (owner not in ROLES) if dot else (key not in known):
            raise UsageError(
                f"unknown key {key!r}; choose from {list(known)}, or primary.FIELD, harmful.FIELD, "
                "control.FIELD of a text."
            )


def field_names(class_: type) -> list[str]:
    """Names of the fields of a dataclass."""
    return [field.name for field in dataclasses.fields(class_)]
