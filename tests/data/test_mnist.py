import gzip

import numpy as np
import pytest
import scipy.stats

from jaximm import data
from jaximm.data.files import read_idx
from jaximm.data.tables import mnist
from jaximm.data.tables.mnist import Digits, MnistPairConfig


@pytest.fixture(scope="module")
def digits():
    return mnist.read_5k()


def small_digits(*, test):
    """Random images, digits in turn: 6 a digit, and 4 test images a digit if asked."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (60, 28, 28)).astype(np.uint8)
    labels = np.tile(np.arange(10), 6)
    m = 40 if test else 0
    test_images = rng.integers(0, 256, (m, 28, 28)).astype(np.uint8)
    return Digits(images, labels, test_images, np.tile(np.arange(10), 4)[:m])


def write_idx(path, values):
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(head + values.tobytes())


def test_the_carrier_holds_500_images_of_each_digit(digits):
    assert digits.images.shape == (5000, 28, 28)
    assert digits.images.dtype == np.uint8
    assert digits.images.max() == 255
    np.testing.assert_array_equal(np.bincount(digits.labels), np.full(10, 500))
    assert len(digits.test_images) == len(digits.test_labels) == 0


def test_constant_pair_is_each_digits_images_with_one_label(digits):
    config = MnistPairConfig(primary_digit=3, harmful_digit=8)
    pair = mnist.digit_pair(digits, config)
    for digit, task in ((3, pair.primary), (8, pair.harmful)):
        rows = np.flatnonzero(digits.labels == digit)
        flat = digits.images[rows].reshape(500, 784) / 255
        np.testing.assert_array_equal(task.train.x, flat[:400])
        np.testing.assert_array_equal(task.held_out.x, flat[400:])
        assert (task.train.y == 1).all()
        assert (task.held_out.y == 1).all()
        assert task.kind == "constant"
    assert not data.inputs_shared(pair).shared
    again = data.load("mnist_pairs", config)
    np.testing.assert_array_equal(again.harmful.held_out.x, pair.harmful.held_out.x)


@pytest.mark.parametrize("target", ["ink", "slant"])
def test_regression_targets_are_functions_of_the_images(digits, target):
    config = MnistPairConfig(primary_digit=1, harmful_digit=7, target=target)
    raw = mnist.digit_pair(digits, MnistPairConfig(**vars(config) | {"standardise_target": False}))
    pair = mnist.digit_pair(digits, config)
    for one, other in ((pair.primary, raw.primary), (pair.harmful, raw.harmful)):
        assert one.kind == "regression"
        y, y_raw = one.train.y, other.train.y
        mean = 0 if target == "ink" else y_raw.mean()
        scale = np.sqrt(np.mean(y_raw**2)) if target == "ink" else y_raw.std()
        np.testing.assert_allclose(y, (y_raw - mean) / scale, atol=1e-12)
        np.testing.assert_allclose(one.held_out.y, (other.held_out.y - mean) / scale, atol=1e-12)
    if target == "ink":
        x, y = raw.primary.held_out
        np.testing.assert_allclose(y, x @ np.full(784, 1 / 784), rtol=1e-12)
        x, y = pair.primary.train  # still linear in the pixels: no residual without an intercept
        assert np.abs(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).max() < 1e-10


def test_slant_is_the_weighted_regression_of_column_on_row(digits):
    x = digits.images[::517].reshape(-1, 784) / 255
    row, column = np.divmod(np.arange(784), 28)
    # linregress has no weights: repeat each pixel's position by its grey level instead.
    expected = [
        scipy.stats.linregress(np.repeat(row, level), np.repeat(column, level)).slope
        for level in np.rint(x * 255).astype(int)
    ]
    np.testing.assert_allclose(mnist.slant(x), expected, rtol=1e-9)
    sheared = np.zeros((3, 28, 28))
    for r in range(5, 21):
        sheared[0, r, r] = 0.5
        sheared[1, r, 12:16] = 1.0
    sheared[2, 4, :] = 1.0  # one row of ink: no spread of rows to regress on
    np.testing.assert_allclose(mnist.slant(sheared.reshape(3, 784)), [1, 0, 0], atol=1e-12)
    np.testing.assert_array_equal(mnist.slant(np.zeros((2, 784))), [0, 0])


def test_one_vs_rest_shares_the_inputs_and_says_so():
    config = MnistPairConfig(
        primary_digit=2, harmful_digit=5, target="one_vs_rest", train_rows=4, held_out_rows=1
    )
    digits = small_digits(test=False)
    pair = mnist.digit_pair(digits, config)
    np.testing.assert_array_equal(pair.primary.train.x, pair.harmful.train.x)
    np.testing.assert_array_equal(pair.primary.train.y, np.where(digits.labels[:40] == 2, 1, -1))
    np.testing.assert_array_equal(pair.harmful.train.y, np.where(digits.labels[:40] == 5, 1, -1))
    assert pair.primary.held_out.x.shape == (10, 784)
    assert pair.primary.kind == "binary"
    assert data.inputs_shared(pair).shared


def test_a_test_part_is_the_held_out_part():
    digits = small_digits(test=True)
    pair = mnist.digit_pair(digits, MnistPairConfig())
    test = digits.test_images[digits.test_labels == 1].reshape(-1, 784) / 255
    np.testing.assert_array_equal(pair.harmful.held_out.x, test)
    assert len(pair.harmful.train.x) == 6
    fewer = mnist.digit_pair(digits, MnistPairConfig(train_rows=2, held_out_rows=3))
    np.testing.assert_array_equal(fewer.harmful.train.x, pair.harmful.train.x[:2])
    np.testing.assert_array_equal(fewer.harmful.held_out.x, test[:3])


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match=r"digit 0: asked for 400 training.* there are 6"):
        mnist.digit_pair(small_digits(test=False), MnistPairConfig())
    with pytest.raises(ValueError, match="0 to hold out"):
        mnist.digit_pair(small_digits(test=False), MnistPairConfig(train_rows=6))
    with pytest.raises(ValueError, match="5 held-out rows"):
        mnist.digit_pair(small_digits(test=True), MnistPairConfig(held_out_rows=5))


def test_all_ordered_pairs():
    pairs = mnist.paired_digits()
    assert len(set(pairs)) == len(pairs) == 90
    assert all(a != b and {a, b} <= set(range(10)) for a, b in pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"primary_digit": 10}, "primary_digit must be 0 to 9, got 10"),
        ({"primary_digit": 1}, "both 1: the tasks would be the same"),
        ({"source": "6k"}, "source must be one of"),
        ({"target": "label"}, "target must be one of .*'slant'"),
        ({"train_rows": 0}, "train_rows must be at least 1"),
        ({"held_out_rows": -1}, "held_out_rows must be at least 1"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MnistPairConfig(**fields)


def test_full_set_is_read_from_idx_files(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXIMM_DATA", str(tmp_path))
    with pytest.raises(data.MissingCarrierError, match=r"train-images.*missing.*make data"):
        data.load("mnist_pairs", source="full")
    digits = small_digits(test=True)
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte", digits.images)
    write_idx(folder / "train-labels-idx1-ubyte", digits.labels.astype(np.uint8))
    write_idx(folder / "t10k-images-idx3-ubyte", digits.test_images)
    write_idx(folder / "t10k-labels-idx1-ubyte", digits.test_labels.astype(np.uint8))
    pair = data.load("mnist_pairs", source="full", primary_digit=4, harmful_digit=9)
    expected = mnist.digit_pair(digits, MnistPairConfig(primary_digit=4, harmful_digit=9))
    np.testing.assert_array_equal(pair.primary.train.x, expected.primary.train.x)
    np.testing.assert_array_equal(pair.harmful.held_out.x, expected.harmful.held_out.x)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01abcd", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "cut short"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x03ab", "2 bytes of data, expected 3"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x03abcd", "4 bytes of data, expected 3"),
        (b"\x00\x00\x08\x00a", "not an IDX file"),
        (b"\x00\x00\x08\x02" + b"\xff" * 8 + b"a", "1 bytes of data, expected 184467440"),
        (b"\x00\x00\x08\xff" + bytes(1020), "not an IDX file"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x03ab", mtime=0), "the data ends too early"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x03abcd", mtime=0), "more than the 3 bytes"),
        (
            gzip.compress(b"\x00\x00\x08\x01\xff\xff\xff\xffab", mtime=0),
            "would unpack to 4294967295",
        ),
        (
            gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x03abc", mtime=0)[:-6],
            "cannot be read as an IDX",
        ),
        (b"\x1f\x8bno", "cannot be read as an IDX"),
    ],
)
def test_damaged_idx_files(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_gzipped_idx_files_are_read(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "plain", values)
    (tmp_path / "packed").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    for name in ("plain", "packed"):
        np.testing.assert_array_equal(read_idx(tmp_path / name), values)
    with pytest.raises(ValueError, match=r"gone: cannot be read as an IDX file \(No such file"):
        read_idx(tmp_path / "gone")


def test_idx_files_that_are_no_digits(tmp_path):
    digits = small_digits(test=True)
    for name, values in zip(mnist._IDX_SHA256, digits, strict=True):
        write_idx(tmp_path / name, values.astype(np.uint8))
    assert len(mnist.read_full(tmp_path).labels) == 60
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", digits.test_labels[:-1].astype(np.uint8))
    with pytest.raises(ValueError, match=r"t10k-images.*as many digits.*\(39,\)"):
        mnist.read_full(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", digits.images[:, :27])
    with pytest.raises(ValueError, match=r"train-images.*expected images of 28 x 28.*\(60, 27, 28"):
        mnist.read_full(tmp_path)


@pytest.mark.parametrize("text", ["", "1,2\n", "a\n", "256," * 784 + "1\n", "0," * 784 + "10\n"])
def test_a_table_of_digits_that_is_none(tmp_path, text):
    path = tmp_path / "digits.csv.gz"
    for content in (text.encode(), gzip.compress(text.encode())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"digits.csv.gz: cannot be read"):
            mnist.read_5k(path)


def test_an_idx_file_of_endless_empty_axes_is_named(tmp_path):
    (tmp_path / "axes").write_bytes(b"\0\0\x08\x20" + 124 * b"\xff" + 4 * b"\0")
    with pytest.raises(ValueError, match="axes: cannot be read as an IDX file"):
        read_idx(tmp_path / "axes")
