"""Plain JSON, checked, sealed, written whole or not at all.

Every document that is read back carries an envelope, one key of its own:

    "envelope": {"of": what the file is, "sha256": of `of` and all other content}

so that a number that changed on the disk, a cut, or a file in another's place is found before it is
used. The digest is of the content as JSON with sorted keys, so that layout does not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class ResultError(ValueError):
    """A result that cannot be written or read. The message is one line and names the file."""


class FileWarning(UserWarning):
    """A file that was there is now under another name: damaged, or not to be lost."""


ENVELOPE = "envelope"
"""Key of a document under which its digest and its address stand."""


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
    label = content.get("schema")
    if label != version:
        what = "no schema version" if label is None else f"schema {_short(label)}"
        raise ResultError(
            f"{what}, this jaximm reads {version!r}; rerun the experiment, or use the "
            "jaximm that wrote it."
        )
    from jsonschema import Draft202012Validator  # 0.1 s: only those who need it pay for it
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        raise ResultError(f"{_place(error.absolute_path)}: {_one_line(error.message)}")


def sealed(content: Mapping[str, Any], *, of: str) -> dict[str, Any]:
    """`content`, which is plain JSON, with its envelope.

    >>> sealed({"a": 1}, of="x")["envelope"]["sha256"][:8]
    '8f936086'
    """
    body = {key: value for key, value in content.items() if key != ENVELOPE}
    return {**body, ENVELOPE: {"of": of, "sha256": _digest(body, of)}}


def opened(content: Mapping[str, Any], *, of: str | None = None) -> dict[str, Any]:
    """`content` without its envelope, which was checked.

    Args:
      content: of a file, with an envelope.
      of: what the file is to be; None: what it says.

    Raises:
      ResultError: without an envelope, of another content, or of another file.
    """
    body = dict(content)
    envelope = body.pop(ENVELOPE, None)
    if not isinstance(envelope, Mapping) or envelope.keys() != {"of", "sha256"}:
        raise ResultError(
            f"no {ENVELOPE} with the digest of its content, as every file that jaximm writes has: "
            "the file is damaged, or of an earlier jaximm."
        )
    if envelope["sha256"] != _digest(body, envelope["of"]):
        raise ResultError("its content is not what was written (its SHA-256 differs): damaged.")
    if of is not None and envelope["of"] != of:
        raise ResultError(f"it is the file of {envelope['of']!r}, not of {of!r}.")
    return body


def _digest(body: Mapping[str, Any], of: Any) -> str:
    text = json.dumps([of, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write(
    path: str | os.PathLike[str],
    result: Mapping[str, Any],
    *,
    check: Callable[[Mapping[str, Any]], None],
    of: str,
) -> None:
    """Writes `result` with an envelope to `path`, whole or not at all; see `write_text`.

    Arrays become lists; NaN and +-inf become ``null``.

    Args:
      path: the file.
      result: what `check` accepts.
      check: raises ResultError for what is not to be written.
      of: what the file is.

    Raises:
      ResultError: if the result does not fit the schema, or the file cannot be written.
    """
    path = Path(path)
    try:
        content = plain(result)
        check(content)
    except ResultError as error:
        raise ResultError(f"{path}: not written: {error}") from None
    content = sealed(content, of=of)
    write_text(path, json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, also where the machine stops.

    The text goes to a new file in the same folder, is flushed to the disk, and then takes the place
    of `path` in one move, which is flushed as well: whoever reads `path` finds the old text or the
    new one, and a write that fails leaves the old one. Drafts that a killed process left are
    removed (`sweep`).

    Raises:
      ResultError: no room, no right, or no folder.
    """
    draft = draft_of(path)
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
            f"{path}: not written: {reason}; what was there before is untouched."
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    _flush_folder(path.parent)


def draft_of(path: Path) -> Path:
    """A name beside a file for what is to take its place; `sweep` knows it."""
    return path.with_name(f".{path.name}.{_HOST}-{uuid.uuid4().hex}.tmp")


_HOST = "".join(letter for letter in socket.gethostname()[:24] if letter.isalnum())
"""In the names of drafts: process numbers of two machines on one shared folder may agree."""

STALE_SECONDS = 24 * 3600.0
"""Age after which a draft is nobody's."""


def sweep(folder: Path) -> list[Path]:
    """Removes drafts that no process will finish: older than a day. Returns what it removed."""
    removed = []
    for draft in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process was first
            if time.time() - draft.stat().st_mtime > STALE_SECONDS:
                draft.unlink()
                removed.append(draft)
    return removed


def aside(path: Path, word: str) -> Path:
    """A free name beside a file that gives way: ``cell.damaged-1.json``."""
    number = 1
    while (name := path.with_name(f"{path.stem}.{word}-{number}{path.suffix}")).exists():
        number += 1
    return name


def _flush_folder(folder: Path) -> None:
    """Puts a move on the disk, where the system can."""
    with contextlib.suppress(OSError):  # not every file system flushes folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(
    path: str | os.PathLike[str],
    *,
    check: Callable[[Mapping[str, Any]], None],
    of: str | None = None,
    unsealed: Sequence[str] = (),
) -> dict[str, Any]:
    """Reads, opens and checks the result in `path`; `check` as in `write`.

    Args:
      path: the file.
      check: as in `write`.
      of: what the file is to be; None: what it says.
      unsealed: schema versions of before there were envelopes.

    Raises:
      ResultError: if there is no such file, it is damaged or half written, of another schema
        version, or does not fit the schema. One line: which file, and what is wrong.
    """
    path = Path(path)
    try:
        result = parse(path)
        if not isinstance(result, Mapping) or ENVELOPE not in result:
            check(result)  # says what it is, where it is something else
            if result.get("schema") in unsealed:
                return dict(result)
        result = opened(result, of=of)
        check(result)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    return result


def parse(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      ResultError: what is wrong with it, in one line without its name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ResultError("not UTF-8 text; the file is damaged.") from None
    if not text.strip():
        raise ResultError("the file is empty; it was cut short or never written.")
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ResultError(
            f"not JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
            "the file is damaged or half written."
        ) from None
    except (ResultError, RecursionError, ValueError) as error:
        raise ResultError(_one_line(str(error))) from None


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
