"""Conditioning on top of meta-learned defences, erasure before them: is a pair better than both?

Each pair stands beside its halves. `limit` and `balanced_gap` go on with the defended model;
`erase` comes first, and the defence goes on with what it left.
"""

import dataclasses
import functools

from experiments.systems import run
from experiments.systems.rows import Lock, Row

TASK = "halves"
_META, _ALONE = run.family_of("meta").ROWS, run.family_of("conditioning").ROWS


def _kept(row: Row) -> Lock:
    """Each model is trained once, for itself and for what goes on with it."""
    return functools.cache(lambda toy, seed: row(toy, seed))


TAR, MLAC = _kept(_META["TAR, clamped CE"]), _kept(_META["MLAC"])


def _after(first: Lock, second: Row) -> Row:
    return dataclasses.replace(second, after=first)


ROWS = {
    "TAR": TAR,
    "MLAC": MLAC,
    "limit": _ALONE["limit"],
    "balanced_gap": _ALONE["balanced_gap"],
    "erase": _ALONE["erase"],
    "TAR, then limit": _after(TAR, _ALONE["limit"]),
    "TAR, then balanced_gap": _after(TAR, _ALONE["balanced_gap"]),
    "MLAC, then limit": _after(MLAC, _ALONE["limit"]),
    "MLAC, then balanced_gap": _after(MLAC, _ALONE["balanced_gap"]),
    "erase, then TAR": _after(_ALONE["erase"], _META["TAR, clamped CE"]),
    "erase, then MLAC": _after(_ALONE["erase"], _META["MLAC"]),
}
