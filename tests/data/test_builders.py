import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaximm import data
from jaximm.data.raw import tfds as builders
from jaximm.data.tables import house_prices, mnist


class ToyDigits(tfds.core.GeneratorBasedBuilder):
    """A registered data set of 28 x 28 images that is not jaximm's own."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "test")}

    def _generate_examples(self, name):
        for index in range(20):
            image = np.full((28, 28, 1), index + 100 * (name == "test"), np.uint8)
            yield index, {"image": image, "label": index % 10}


class ToyNumbers(ToyDigits):
    """A data set without images."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"label": np.int64})
        )

    def _generate_examples(self, name):
        yield 0, {"label": 1}


def assert_same_pair(one, other):
    for task in ("primary", "harmful"):
        for split in ("train", "held_out"):
            pair = [getattr(getattr(each, task), split) for each in (one, other)]
            np.testing.assert_array_equal(pair[0].x, pair[1].x)
            np.testing.assert_array_equal(pair[0].y, pair[1].y)


def test_house_prices_through_the_builder(tmp_path, monkeypatch, capsys):
    for one, other in zip(
        builders.read_house_prices(tmp_path / "here"), house_prices.read_encoded(), strict=True
    ):
        assert one.x.dtype == one.y.dtype == np.float64
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.y, other.y)
    # Written rows are shuffled, so that the sort is put to the test.
    source = tfds.data_source("house_prices", split="harmful", data_dir=tmp_path / "here")
    written = [int(row["index"]) for row in source.__getitems__(range(len(source)))]
    assert sorted(written) == list(range(1151))
    assert written != sorted(written)
    monkeypatch.setenv("JAXIMM_DATA", str(tmp_path / "cache"))
    assert_same_pair(data.load("house_prices", source="tfds"), data.load("house_prices"))
    assert (tmp_path / "cache" / "tfds" / "house_prices").is_dir()
    assert capsys.readouterr().out == ""


def test_mnist_through_the_builder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXIMM_DATA", str(tmp_path))
    whole = mnist.read_5k()
    keep = np.arange(0, 5000, 25)  # 20 images a digit: writing all takes longer than it teaches
    few = whole._replace(images=whole.images[keep], labels=whole.labels[keep])
    monkeypatch.setattr(mnist, "read_5k", lambda: few)
    fields = {"target": "slant", "primary_digit": 5, "harmful_digit": 6, "train_rows": 15}
    direct = data.load("mnist_pairs", **fields)
    through = data.load("mnist_pairs", source="tfds", tfds_name="mnist_digits/5k", **fields)
    assert_same_pair(through, direct)
    assert "mnist_digits/5k: digit 5" in through.description
    source = tfds.data_source("mnist_digits/5k", split="train", data_dir=tmp_path / "tfds")
    assert len(source) == 200
    assert source[0]["image"].shape == (28, 28, 1)


def test_full_mnist_builder_has_both_parts(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 28, 28)).astype(np.uint8)
    labels = np.repeat(np.arange(10), 5)
    digits = mnist.Digits(images[:40], labels[:40], images[40:], labels[40:])
    monkeypatch.setattr(mnist, "read_full", lambda: digits)
    found = builders.read_digits("mnist_digits/full", tmp_path)
    for one, other in zip(found, digits, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_tfds_name_must_be_prepared_or_downloaded(tmp_path):
    fields = {"source": "tfds", "tfds_name": "toy_digits", "data_dir": str(tmp_path)}
    with pytest.raises(
        data.MissingCarrierError, match=r"toy_digits is not prepared.*download=True"
    ):
        data.load("mnist_pairs", **fields)
    pair = data.load("mnist_pairs", **fields, download=True, primary_digit=3)
    np.testing.assert_array_equal(np.sort(pair.primary.train.x[:, 0]), np.array([3, 13]) / 255)
    np.testing.assert_array_equal(
        np.sort(pair.primary.held_out.x[:, 0]), np.array([103, 113]) / 255
    )
    assert_same_pair(data.load("mnist_pairs", **fields, primary_digit=3), pair)  # now it is there


def test_names_that_cannot_serve(tmp_path, monkeypatch):
    with pytest.raises(data.MissingCarrierError, match="no_such_set is unknown to tensorflow-data"):
        builders.read_digits("no_such_set", tmp_path)
    with pytest.raises(ValueError, match=r"toy_numbers: expected features image and label"):
        builders.read_digits("toy_numbers", tmp_path, download=True)
    monkeypatch.setattr(mnist, "read_5k", lambda: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        builders.read_digits("mnist_digits/5k", tmp_path)

    def offline(self, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(ToyDigits, "download_and_prepare", offline)
    with pytest.raises(data.MissingCarrierError, match="this try failed: no route"):
        builders.read_digits("toy_digits", tmp_path / "other", download=True)


def test_importing_the_data_package_stays_light():
    code = (
        "import sys, jaximm.data\n"
        "heavy = {'tensorflow_datasets', 'pandas', 'scipy', 'mlxtend', 'matplotlib'}\n"
        "jaximm.data.load('house_prices'); jaximm.data.load('mnist_pairs')\n"
        "print(sorted((heavy - {'scipy'}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["dataset_info.json", "*-train.array_record*"])
def test_damaged_prepared_files_are_named(tmp_path, name):
    builders.read_digits("toy_digits", tmp_path, download=True)
    (path,) = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ValueError, match=rf"{tmp_path}.*: cannot be read as a prepared data set"):
        builders.read_digits("toy_digits", tmp_path)
