"""Folders in the layout of the Hugging Face hub: a configuration beside weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaximm.models.weights.errors import Refusal, WeightFileError, reading, shown
from jaximm.models.weights.trees import some

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in such a folder, the preferred one first; sharded: ``NAME.index.json``."""

_INDEX = 64 << 20


class Found(NamedTuple):
    """What holds a folder's weights: one file, or an index of shards."""

    file: Path
    is_index: bool


def find_weights(path: Path) -> Found:
    """The weights in a folder as ``save_pretrained`` and timm's ``push_to_hf_hub`` write it.

    Raises:
      WeightFileError: it holds none of `WEIGHTS` and no index of one.
    """
    for name in WEIGHTS:
        for file, is_index in ((path / name, False), (path / f"{name}.index.json", True)):
            if file.is_file():
                return Found(file, is_index)
    with reading(path):
        listed = some(sorted(shown(entry.name) for entry in path.iterdir())) or "nothing"
    raise WeightFileError(
        f"the folder {shown(str(path), 300)} holds none of {', '.join(WEIGHTS)} and their "
        f"index.json, but {listed}; give a folder with config.json and model.safetensors, or one "
        "file."
    )


def read_shards(
    index: Path, read_file: Callable[[Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays of the shards that an index names, all of which must agree with it.

    Args:
      index: ``{"weight_map": {key: file name}}`` as JSON.
      read_file: arrays of one file.

    Raises:
      WeightFileError: malformed; a shard that is outside the folder, not there, or holds other
        keys than the index says.
    """
    with reading(index):
        places = _places(index)
    arrays: dict[str, np.ndarray] = {}
    for shard in dict.fromkeys(places.values()):
        part = read_file(index.parent / shard)
        with reading(index):
            wrong = sorted({key for key, place in places.items() if place == shard} ^ set(part))
            if wrong:
                raise Refusal(
                    f"it and the shard {shown(shard)} differ in {shown(wrong[0])}",
                    "fetch index and shards of one version",
                )
        arrays.update(part)
    return {key: arrays[key] for key in places}


def _places(index: Path) -> dict[str, str]:
    """Shard by key."""
    if index.stat().st_size > _INDEX:
        raise Refusal(f"it is longer than {_INDEX} bytes")
    content = json.loads(index.read_text(encoding="utf-8"))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise Refusal("it has no weight_map")
    for key, shard in places.items():
        # A name only: an index must not lead out of its folder.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise Refusal(f"the shard of {shown(key)} is no file name")
        if not (index.parent / shard).is_file():
            raise Refusal(f"the shard {shown(shard)} is not there", "fetch all shards")
    return places
