import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaximm import data
from jaximm.data.images import published
from jaximm.data.images.image_folder import decode_image
from jaximm.data.images.rows import read_source
from jaximm.data.raw import tfds as builders

# The published versions: tensorflow-datasets' own code for these names reads the files made here.
VERSIONS = {
    "imagenet2012": "5.1.0",
    "cars196": "2.1.0",
    "cifar10": "3.0.2",
    "fashion_mnist": "3.0.1",
}
SMALL = {"size": 8, "resize": 10}


def picture(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encoded(pixels, kind):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    stream.seek(0)
    return stream


def prepare(folder, name, splits, *, features, classes, file_format="array_record"):
    """A tiny data set with a published name and its features, written without TensorFlow.

    `splits` maps a split to its rows; images come as open JPEG or PNG files, which tensorflow-
    datasets stores as they are.
    """
    names = {"names": classes} if isinstance(classes, tuple) else {"num_classes": classes}

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSIONS[name])

        def _info(self):
            label = tfds.features.ClassLabel(**names)
            whole = {**features, "label": label}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(whole))

        def _split_generators(self, dl_manager):
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Tiny.name = name
    return builders.prepare(Tiny(data_dir=str(folder), file_format=file_format))


def make_imagenet(folder, *, classes=1000, shown=3, train=4, validation=2):
    def rows(split, count):
        return [
            {
                "image": encoded(picture((split, label, i), (12 + label, 20, 3)), "JPEG"),
                "label": label,
                "file_name": f"{split}{label}_{i}.JPEG",
            }
            for label in range(shown)
            for i in range(count)
        ]

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "file_name": tfds.features.Text(),
    }
    splits = {"train": rows(0, train), "validation": rows(1, validation)}
    return prepare(folder, "imagenet2012", splits, features=features, classes=classes)


def make_cars(folder, *, shown=3):
    def rows(split, count):
        return [
            {
                "image": encoded(picture((split, label, i), (14, 11 + i, 3)), "JPEG"),
                "label": label,
                "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
                "id": f"{i}.jpg",
            }
            for label in range(shown)
            for i in range(count)
        ]

    features = {
        "image": tfds.features.Image(),
        "bbox": tfds.features.BBoxFeature(),
        "id": tfds.features.Text(),
    }
    splits = {"train": rows(2, 5), "test": rows(3, 3)}
    return prepare(folder, "cars196", splits, features=features, classes=196)


def make_country211(folder, *, countries=("AD", "AE", "ZW"), count=5):
    for number, part in enumerate(("train", "valid", "test")):
        for place, code in enumerate(countries):
            (folder / part / code).mkdir(parents=True)
            for i in range(count):
                pixels = picture((number, place, i), (13, 16, 3))
                (folder / part / code / f"{i}.jpg").write_bytes(encoded(pixels, "JPEG").read())
    return folder


FIELDS = {
    "classes": 3,
    "primary_train_per_class": 3,
    "primary_held_out_per_class": 1,
    "harmful_train_per_class": 4,
    "harmful_held_out_per_class": 2,
    **SMALL,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    make_imagenet(folder)
    make_cars(folder)
    return folder


def expected_image(seed, shape):
    return decode_image(encoded(picture(seed, shape), "JPEG").read(), **SMALL)


def test_imagenet_and_cars_by_their_published_names(prepared):
    pair = data.load("imagenet_cars", data_dir=str(prepared), **FIELDS)
    assert pair.primary.name == "imagenet2012"
    assert pair.primary.classes == ("n01440764", "n01443537", "n01484850")
    assert pair.harmful.classes[0] == "AM General Hummer SUV 2000"
    for task, train, held_out in ((pair.primary, 3, 1), (pair.harmful, 4, 2)):
        np.testing.assert_array_equal(np.bincount(task.train.y), np.full(3, train))
        np.testing.assert_array_equal(np.bincount(task.held_out.y), np.full(3, held_out))
        assert task.train.x.shape[1:] == (8, 8, 3)
    for split, where, count in ((pair.primary.train, 0, 4), (pair.primary.held_out, 1, 2)):
        for image, label in zip(*split, strict=True):
            shape = (12 + int(label), 20, 3)
            candidates = [expected_image((where, int(label), i), shape) for i in range(count)]
            assert any((image == candidate).all() for candidate in candidates)
    assert "cars196 (harmful, 3 classes, 12 training rows) at 8 px" in pair.description
    again = data.load("imagenet_cars", data_dir=str(prepared), **FIELDS)
    np.testing.assert_array_equal(again.harmful.train.x, pair.harmful.train.x)
    other = data.load("imagenet_cars", data_dir=str(prepared), **FIELDS, seed=1)
    assert (other.harmful.train.y != pair.harmful.train.y).any()


def test_imagenet_and_country211(prepared, tmp_path):
    path = make_country211(tmp_path / "country211")
    fields = {"data_dir": str(prepared), "country211_path": str(path), **FIELDS}
    pair = data.load("imagenet_country211", **fields)
    assert pair.harmful.classes == ("AD", "AE", "ZW")
    for split, part, count in ((pair.harmful.train, 0, 4), (pair.harmful.held_out, 2, 2)):
        np.testing.assert_array_equal(np.bincount(split.y), np.full(3, count))
        for image, label in zip(*split, strict=True):
            candidates = [expected_image((part, int(label), i), (13, 16, 3)) for i in range(5)]
            assert any((image == candidate).all() for candidate in candidates)
    valid = data.load("imagenet_country211", **fields, held_out_part="valid")
    assert (valid.harmful.held_out.x != pair.harmful.held_out.x).any()
    with pytest.raises(ValueError, match=r"country211 train: asked for 6 rows of each class, but"):
        data.load("imagenet_country211", **{**fields, "harmful_train_per_class": 6})


def test_all_rows_can_be_streamed(prepared):
    sources = published.tfds_sources("cars196", data_dir=prepared, **SMALL)
    assert len(sources.classes) == 196
    assert len(sources.train) == 15
    assert len(sources.held_out) == 9
    split = read_source(sources.train)
    np.testing.assert_array_equal(np.bincount(split.y), np.full(3, 5))
    assert [sources.train.label(row) for row in range(15)] == split.y.tolist()
    pinned = published.tfds_sources("cars196:2.1.0", data_dir=prepared, **SMALL)
    np.testing.assert_array_equal(read_source(pinned.train).x, split.x)


def test_a_broken_record_is_named(tmp_path):
    row = {"image": io.BytesIO(b"\xff\xd8\xff broken"), "label": 0, "file_name": "x"}
    features = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    splits = {"train": [row], "validation": []}
    splits["validation"] = [{**row, "image": io.BytesIO(b"\xff\xd8\xff broken")}]
    prepare(tmp_path, "imagenet2012", splits, features=features, classes=1000)
    sources = published.tfds_sources("imagenet2012", data_dir=tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"imagenet2012 train, record 0: (not a JPEG|cannot be)"):
        sources.train[0]


def test_only_the_rows_asked_for_are_decoded(prepared, monkeypatch):
    decoded = []

    def count(content, **fields):
        decoded.append(fields["name"])
        return decode_image(content, **fields)

    monkeypatch.setattr(published, "decode_image", count)
    data.load("imagenet_cars", data_dir=str(prepared), **FIELDS)
    assert len(decoded) == len(set(decoded)) == 3 * (3 + 1 + 4 + 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_per_class_stops_when_every_class_is_full(seed):
    labels = np.random.default_rng(7).permutation(np.repeat(np.arange(5), 2000))
    asked = []

    def label_of(row):
        asked.append(row)
        return int(labels[row])

    chosen = published.rows_per_class(
        label_of, len(labels), classes=4, per_class=6, seed=seed, where="t"
    )
    np.testing.assert_array_equal(np.bincount(labels[chosen]), np.full(4, 6))
    assert len(asked) < 200  # of 10,000
    with pytest.raises(
        ValueError, match=r"t: asked for 2001 rows of each class, but class . has 2"
    ):
        published.rows_per_class(
            label_of, len(labels), classes=5, per_class=2001, seed=seed, where="t"
        )


def test_what_is_not_prepared_says_what_to_do(tmp_path):
    with pytest.raises(data.MissingCarrierError) as caught:
        data.load("imagenet_cars", data_dir=str(tmp_path))
    message = str(caught.value)
    assert "imagenet2012 is not prepared" in message
    assert f"ILSVRC2012_img_val.tar into {tmp_path}/downloads/manual" in message
    assert f"tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path}" in message
    assert "jaximm[tfds-tensorflow]" in message
    with pytest.raises(data.MissingCarrierError, match=r"cars196 is not prepared.*image_folder"):
        published.tfds_sources("cars196", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"unknown published set 'cars'; choose from \['cars196'"):
        published.tfds_sources("cars", data_dir=tmp_path)
    with pytest.raises(data.MissingCarrierError, match=r"cifar10 is not prepared.*with a network"):
        data.load("cifar10_split", source="tfds", data_dir=str(tmp_path))
    with pytest.raises(data.MissingCarrierError, match="no_such_set is unknown to tensorflow-data"):
        published.read_small("no_such_set", data_dir=tmp_path)


def test_files_that_cannot_be_read_row_by_row_are_refused(tmp_path):
    path = make_imagenet(tmp_path).data_path / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(data.MissingCarrierError, match=r"prepared as tfrecord.*prepare it again"):
        published.tfds_sources("imagenet2012", data_dir=tmp_path)


def test_country211_folders_that_cannot_serve(tmp_path):
    path = make_country211(tmp_path / "c", count=1)
    (path / "test" / "XX").mkdir()
    (path / "test" / "XX" / "0.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="country 'XX' is in one of train and test only"):
        published.country211_sources(path)
    assert len(published.country211_sources(path, held_out_part="valid").held_out) == 3
    with pytest.raises(ValueError, match=r"nowhere/train: no such folder; country211_path must"):
        published.country211_sources(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="give country211_path=FOLDER"):
        data.load("imagenet_country211")


def test_cifar10_and_fashion_mnist_through_tensorflow_datasets(tmp_path):
    def rows(part, n, shape):
        return [
            {"image": encoded(picture((part, i), shape), "PNG"), "label": i % 10} for i in range(n)
        ]

    for name, side, channels in (("cifar10", 32, 3), ("fashion_mnist", 28, 1)):
        shape = (side, side, channels) if channels == 3 else (side, side)
        features = {"image": tfds.features.Image(shape=(side, side, channels))}
        splits = {"train": rows(side, 20, shape), "test": rows(side + 100, 10, shape)}
        prepare(tmp_path, name, splits, features=features, classes=10)
    fields = {"source": "tfds", "data_dir": str(tmp_path), "held_out_rows": 10}
    pair = data.load("cifar10_fashion", train_rows=20, **fields)
    assert "source tfds" in pair.description
    for task, side in ((pair.primary, 32), (pair.harmful, 28)):
        np.testing.assert_array_equal(np.bincount(task.train.y), np.full(10, 2))
        found = {image.tobytes() for image in task.train.x}
        expected = (
            picture((side, i), (side, side, 3) if side == 32 else (side, side)) for i in range(20)
        )
        three = (a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in expected)
        assert found == {image.tobytes() for image in three}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 300}, "need 1 <= size <= resize"),
        ({"primary_train_per_class": 0}, "primary_train_per_class must be at least 1"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_bad_fields(fields, message):
    for name in ("imagenet_cars", "imagenet_country211"):
        with pytest.raises(ValueError, match=message):
            data.make_config(name, **fields)
    with pytest.raises(ValueError, match="held_out_part must be 'test' or 'valid', got 'val'"):
        data.make_config("imagenet_country211", held_out_part="val")
