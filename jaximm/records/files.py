"""Plain JSON, checked, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class ResultError(ValueError):
    """A result that cannot be written or read. The message is one line and names the file."""


MAYBE = {"type": ["number", "null"]}
TEXT = {"type": "string"}
NAME = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
STEPS = {"type": "integer", "minimum": -1}


def record(properties: dict, *, optional: Sequence[str] = (), closed: bool = False) -> dict:
    """Schema of an object whose properties are required unless named in `optional`."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": [key for key in properties if key not in optional],
    }
    return {**schema, "additionalProperties": False} if closed else schema


def plain(value: Any) -> Any:
    """`value` as plain JSON values: arrays become lists, NaN and +-inf become None.

    Takes dictionaries, sequences, NumPy and JAX scalars and arrays, paths, and what JSON knows.

    >>> plain({"a": (1, float("inf")), 2: "b"})
    {'a': [1, None], '2': 'b'}

    Raises:
      ResultError: for any other type, naming it.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX, scalars and arrays
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ResultError(f"a result holds plain data, got {type(value).__name__}: {_short(value)}.")


def check_schema(content: Mapping[str, Any], schema: Mapping[str, Any], version: str) -> None:
    """Checks plain JSON against a schema whose documents name their version.

    Raises:
      ResultError: another version, or one line with the place and what is wrong there.
    """
    if not isinstance(content, Mapping):
        raise ResultError(f"a result is a JSON object, got {type(content).__name__}.")
    found = content.get("schema")
    if found != version:
        what = "no schema version" if found is None else f"schema {_short(found)}"
        raise ResultError(
            f"{what}, this jaximm reads {version!r}; rerun the experiment, or use the "
            "jaximm that wrote it."
        )
    from jsonschema import Draft202012Validator  # 0.1 s: only those who need it pay for it
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        raise ResultError(f"{_place(error.absolute_path)}: {_one_line(error.message)}")


def write(
    path: str | os.PathLike[str],
    result: Mapping[str, Any],
    *,
    check: Callable[[Mapping[str, Any]], None],
) -> None:
    """Writes `result` to `path`, whole or not at all.

    The text goes to a new file in the same folder, is flushed to the disk, and then takes the place
    of `path` in one move: whoever reads `path` finds the old result or the new one, and a write
    that fails leaves the old one. Arrays become lists; NaN and +-inf become ``null``.

    Args:
      path: the file.
      result: what `check` accepts.
      check: raises ResultError for what is not to be written.

    Raises:
      ResultError: if the result does not fit the schema, or the file cannot be written.
    """
    path = Path(path)
    try:
        content = plain(result)
        check(content)
    except ResultError as error:
        raise ResultError(f"{path}: not written: {error}") from None
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n"
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # A path that is not UTF-8 holds surrogates, which become JSON's own escapes here.
        with open(draft, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResultError(
            f"{path}: not written: {reason}; a result that was there before is untouched."
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str], *, check: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Reads and checks the result in `path`; `check` as in `write`.

    Raises:
      ResultError: if there is no such file, it is damaged or half written, of another schema
        version, or does not fit the schema. One line: which file, and what is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ResultError(f"{path}: not UTF-8 text; the file is damaged.") from None
    if not text.strip():
        raise ResultError(f"{path}: the file is empty; it was cut short or never written.")
    try:
        result = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ResultError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
            "the file is damaged or half written."
        ) from None
    except (ResultError, RecursionError) as error:
        raise ResultError(f"{path}: {_one_line(str(error))}") from None
    try:
        check(result)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    return result


def _refuse(token: str) -> float:
    raise ResultError(f"{token} is not JSON; a result stores null there.")


def _finite(token: str) -> float:
    value = float(token)
    return value if math.isfinite(value) else _refuse(token)


def _place(path: Sequence[str | int]) -> str:
    """A JSON path as a reader writes it: attacks[3].curve.step."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".") or "top level"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    # jsonschema quotes the whole value; the end of its sentence says what is wrong.
    return text if len(text) <= limit else f"{text[:90]} ... {text[-(limit - 100) :]}"
