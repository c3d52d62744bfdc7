"""The card of a submission: who defends, with what, and what they tried against it themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jaximm.records import files
from jaximm.records.files import COUNT, NAME, TEXT, check_schema, record

SCHEMA_VERSION = "jaximm.submission/1"

CARD = "card.json"
"""The file of a bundle that makes it one."""

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": SCHEMA_VERSION,
    **record(
        {
            "schema": {"const": SCHEMA_VERSION},
            "name": NAME,
            "suite": NAME,
            "method": NAME,
            "threat_model": NAME,
            "data": record({"harmful_rows": COUNT, "description": NAME}, closed=True),
            "compute": NAME,
            "seeds": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "uniqueItems": True,
                "minItems": 1,
            },
            "adaptive_attack": record({"attacker": NAME, "result": NAME}, closed=True),
            "authors": TEXT,
            "address": TEXT,
        },
        optional=("authors", "address"),
        closed=True,
    ),
}
"""JSON Schema of a card.

``data`` says how many harmful rows the defence was made with; ``adaptive_attack`` the attacker that
the defenders made or chose against their own defence, as a label or in words, and what it reached.
"""


def validate(card: Mapping[str, Any]) -> None:
    """Checks a card against `SCHEMA`.

    Raises:
      ResultError: one line with the place and what is wrong there.
    """
    check_schema(card, SCHEMA, SCHEMA_VERSION)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a card, which by hand has no envelope; see `jaximm.records.files.read`."""
    return files.read(path, check=validate, of="card", unsealed=(SCHEMA_VERSION,))


def write(path: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
    """Writes a card, whole or not at all; see `jaximm.records.files.write`."""
    files.write(path, card, check=validate, of="card")
