"""Whether the numbers of a checkpoint can be a model's: seen before anything is computed.

A compiled program may hide what is not finite: XLA's relu turns NaN into 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaximm.models.spec import Entry
from jaximm.models.weights.errors import WeightFileError

_SAMPLE = 4096
_SMALL, _LARGE = 1e-30, 1e30


def count_bad(source: Mapping[str, np.ndarray], entry: Entry, made: np.ndarray) -> list[str]:
    """What is wrong with the numbers of an entry, in words, a text a key; usually none.

    Args:
      source: arrays by key, as they came.
      entry: which of them make up `made`.
      made: what became of them, in the dtype of the model.
    """
    if np.isfinite(made).all():
        if not _is_variance(entry.path) or not (made < 0).any():
            return []
        return [
            f"{key} is a variance and has {int((source[key] < 0).sum())} of {source[key].size} "
            "values below 0"
            for key in entry.keys
        ]
    texts = []
    for key in entry.keys:
        part = source[key]
        with np.errstate(over="ignore", invalid="ignore"):
            cast = np.asarray(part).astype(made.dtype)
        kinds = {
            "NaN": int(np.isnan(part).sum()),
            "infinite": int(np.isinf(part).sum()),
            f"infinite as {made.dtype}": int((np.isinf(cast) & np.isfinite(part)).sum()),
        }
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        if counted:
            texts.append(f"{key} has {counted} of {part.size} values")
    return texts


def check_byte_order(arrays: Mapping[str, np.ndarray], name: str) -> None:
    """Refuses arrays whose numbers make sense only with their bytes the other way round.

    Weights lie between 1e-30 and 1e30, or are 0. Bytes in the wrong order spread them over all
    exponents: of float32 a fifth lies beyond. All arrays are judged together, by their first 4,096
    numbers: more than 1 % beyond those bounds, and none of them once the bytes are swapped.

    Raises:
      WeightFileError: naming the key with the largest share.
    """
    wild, total, worst = 0, 0, ("", 0.0, "")
    swapped_wild = 0
    for key, value in arrays.items():
        if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
            continue
        sample = np.array(value.flat[:_SAMPLE])
        beyond = _wild(sample)
        wild, total = wild + beyond, total + sample.size
        swapped_wild += _wild(_swapped(sample))
        if sample.size and beyond / sample.size > worst[1]:
            worst = (key, beyond / sample.size, f"{beyond} of {sample.size} values")
    if wild > 0.01 * total and swapped_wild == 0:
        raise WeightFileError(
            f"{name}: its numbers make sense only with their bytes in the other order: of "
            f"{worst[0]} {worst[2]} lie beyond {_SMALL:g} to {_LARGE:g}; save "
            "it on a little-endian machine, or swap them: array.byteswap()."
        )


def _is_variance(path: str) -> bool:
    return path.rpartition(".")[2] == "var"


def _wild(sample: np.ndarray) -> int:
    """How many numbers no weight has."""
    with np.errstate(invalid="ignore"):  # signalling NaNs, which swapped bytes may be
        size = np.abs(sample.astype(np.float64))
    return int((~np.isfinite(size) | (size > _LARGE) | ((size < _SMALL) & (size != 0))).sum())


def _swapped(sample: np.ndarray) -> np.ndarray:
    return sample.view(f"u{sample.itemsize}").byteswap().view(sample.dtype)
