"""What a weight file is refused with, and how far it is trusted before."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any

UNPACKED_FLOOR = 64 << 20
UNPACKED_TIMES = 20
"""A file may unpack to 64 MiB and 20 times its size: weights hardly shrink by compression."""


class WeightFileError(ValueError):
    """Weights that are not taken: names the file, the key where one is at fault, and the remedy."""


class Refusal(ValueError):
    """A reason and a remedy, before the file has a name; `reading` makes a `WeightFileError`."""

    def __init__(self, reason: str, remedy: str = "fetch or save it again"):
        super().__init__(reason)
        self.remedy = remedy


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
    """Turns whatever a file's content raises inside into one error that names the file."""
    try:
        yield
    except WeightFileError:
        raise
    # Hostile or torn bytes make zipfile, NumPy, protobuf and safetensors raise nearly anything.
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error)
        reason = shown(text or type(error).__name__, 300).rstrip(".")
        remedy = error.remedy if isinstance(error, Refusal) else Refusal("").remedy
        # Every folder of the hub has a config.json: which one is it?
        name = f"{path.parent.name}/{path.name}" if path.suffix == ".json" else path.name
        name = shown(name.removeprefix("/"))
        raise WeightFileError(f"{name} cannot be read: {reason}; {remedy}.") from error


def shown(text: str, limit: int = 120) -> str:
    """A text out of a file as it may stand in a message: short, on one line, printable."""
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return safe + ("..." if len(text) > limit else "")


def advice(field: str, value: Any) -> str:
    """What to pass, from Python and on the command line.

    >>> advice("classifier", False)
    'pass classifier=False (on the command line: --classifier false)'
    """
    text = value if isinstance(value, str) else json.dumps(value)
    return f"pass {field}={value!r} (on the command line: --{field} {shlex.quote(text)})"


def unpacked_bound(size: int) -> int:
    """Bytes that a file of `size` bytes may unpack to."""
    return UNPACKED_FLOOR + UNPACKED_TIMES * size
