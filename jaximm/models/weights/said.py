"""What a file of `jaximm.models.export_backbone` says of its arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from jaximm.models.weights.errors import WeightFileError, shown
from jaximm.models.weights.readers import read_npz_metadata, read_safetensors_metadata
from jaximm.types import Fields


class Said(NamedTuple):
    """The layout, and fields of the model's configuration and of its preprocessing."""

    layout: str
    config: Fields
    preprocess: Fields


NOTHING = Said("", {}, {})
"""Of a file of others, or of another model."""


def read_said(path: str | Path, *, of: str) -> Said:
    """What a file says of a model, `NOTHING` where it is not its export.

    Raises:
      WeightFileError: (a ValueError) naming the file: malformed.
    """
    path = Path(path)
    readers = {".safetensors": read_safetensors_metadata, ".npz": read_npz_metadata}
    if path.suffix not in readers or not path.is_file():
        return NOTHING
    texts = readers[path.suffix](path)
    if "jaximm" not in texts or texts.get("model") != of:
        return NOTHING
    try:
        parts = [json.loads(texts[key]) for key in ("config", "preprocess")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("no object")
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightFileError(
            f"{shown(path.name)}: its metadata cannot be read ({type(error).__name__}); export the "
            "backbone again."
        ) from error
    config, preprocess = ({key: _frozen(entry) for key, entry in part.items()} for part in parts)
    return Said(texts.get("layout", ""), config, preprocess)


def _frozen(entry):
    """Lists, as JSON has them, as the tuples of configurations."""
    return tuple(map(_frozen, entry)) if isinstance(entry, list) else entry
