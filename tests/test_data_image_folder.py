import io

import numpy as np
import pytest
from PIL import Image

from jaximm.data import image_folder, images
from jaximm.data.image_folder import ImageFolderConfig, decode_image

SMALL = {"size": 4, "resize": 6}


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        stream, kind, **options
    )
    return stream.getvalue()


def write(path, seed, shape=(8, 9, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    path.write_bytes(encode(pixels))


def make_folder(folder, *, classes=("ant", "bee"), count=8, seed=0):
    for number, name in enumerate(classes):
        for index in range(count):
            write(folder / name / f"{index}.png", (seed, number, index))
    return folder


@pytest.fixture
def folders(tmp_path):
    return {
        "primary_path": str(make_folder(tmp_path / "one")),
        "harmful_path": str(make_folder(tmp_path / "two", classes=("x", "y", "z"), seed=1)),
    }


def cubic(x):
    """Keys' kernel with a = -1/2, Pillow's BICUBIC."""
    x = np.abs(x)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def resampling(old, new):
    """[new, old] weights: the kernel widened by the reduction, normalised at the border."""
    scale = max(old / new, 1.0)
    centre = (np.arange(new) + 0.5) * old / new
    weights = cubic((np.arange(old)[None, :] + 0.5 - centre[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 41), (32, 32), (9, 7)])
def test_decoding_is_an_antialiased_bicubic_resize_and_a_centre_crop(height, width):
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 200, (height, width, 3)).astype(np.uint8)
    size, resize = 16, 20
    found = decode_image(encode(pixels), size=size, resize=resize)
    assert found.dtype == np.uint8
    assert found.shape == (size, size, 3)
    short = min(height, width)
    rows, columns = resize * height // short, resize * width // short
    wide = np.einsum(
        "rh,hwc,kw->rkc", resampling(height, rows), pixels * 1.0, resampling(width, columns)
    )
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    expected = wide[top : top + size, left : left + size]
    # Pillow rounds to whole grey levels after each of the two passes.
    np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=1.01)
    assert np.abs(found - expected).mean() < 0.5


def test_an_image_of_the_right_size_is_only_cropped():
    pixels = np.random.default_rng(1).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(encode(pixels), size=4, resize=6), pixels[1:5, 2:6])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    upright = np.random.default_rng(2).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    # How a camera stores an upright picture for each value of the tag (the inverse of the view).
    store = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(np.ascontiguousarray(store[orientation](upright)), exif=exif)
    np.testing.assert_array_equal(decode_image(content, size=6, resize=6), upright)


def test_every_mode_becomes_rgb():
    rng = np.random.default_rng(3)
    grey = rng.integers(0, 256, (6, 6)).astype(np.uint8)
    colour = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    three = np.repeat(grey[..., None], 3, axis=2)
    decode = lambda content: decode_image(content, size=6, resize=6)  # noqa: E731
    np.testing.assert_array_equal(decode(encode(grey)), three)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(grey > 100))), 255 * (three > 100))
    alpha = rng.integers(0, 256, (6, 6, 1)).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode(np.concatenate([colour, alpha], 2))), colour)
    np.testing.assert_array_equal(decode(encode(np.dstack([grey, alpha[..., 0]]))), three)
    wide = grey.astype(np.uint16) * 256 + 17  # 16 bits: convert() alone would give 255 everywhere
    np.testing.assert_array_equal(decode(encode(wide)), three)
    palette = Image.fromarray(colour).quantize(8)
    np.testing.assert_array_equal(decode(encode(palette)), np.asarray(palette.convert("RGB")))
    with_hole = encode(palette, transparency=bytes([0, 255, 128]))
    np.testing.assert_array_equal(decode(with_hole), np.asarray(palette.convert("RGB")))
    flat = Image.new("CMYK", (6, 6), (255, 0, 0, 0))  # cyan ink only
    found = decode(encode(flat, "JPEG", quality=95))
    np.testing.assert_allclose(found, np.broadcast_to([0, 255, 255], (6, 6, 3)), atol=6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_broken_files_are_refused_with_their_name(kind):
    pixels = np.random.default_rng(4).integers(0, 256, (30, 30, 3)).astype(np.uint8)
    content = encode(pixels, kind)
    decode_image(content, size=8, resize=8)
    for length in np.linspace(0, 0.9 * len(content), 25).astype(int):
        with pytest.raises(
            ValueError, match=r"^a/b\.jpg: (not a JPEG|cannot be decoded)"
        ) as caught:
            decode_image(content[:length], size=8, resize=8, name="a/b.jpg")
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)
    for other in (b"<html>404</html>", encode(pixels, "BMP"), encode(pixels, "GIF")):
        with pytest.raises(ValueError, match=r"b\.jpg: not a JPEG or PNG image"):
            decode_image(other, size=8, resize=8, name="a/b.jpg")


def test_what_would_fill_the_memory_is_refused(monkeypatch):
    strip = encode(np.zeros((1, 500, 3), np.uint8))
    with pytest.raises(ValueError, match=r"strip: 500 x 1 pixels is too long"):
        decode_image(strip, size=8, resize=8, name="strip")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb: cannot be decoded .*exceeds limit"):
        decode_image(encode(np.zeros((20, 20, 3), np.uint8)), size=8, resize=8, name="bomb")


def test_a_fraction_of_each_class_is_held_out_by_name(folders, tmp_path):
    pair = images.load_images("image_folder", **folders, **SMALL)
    assert pair.primary.classes == ("ant", "bee")
    assert pair.harmful.classes == ("x", "y", "z")
    assert pair.primary.train.images.shape == (12, 4, 4, 3)
    np.testing.assert_array_equal(np.bincount(pair.harmful.train.labels), [6, 6, 6])
    np.testing.assert_array_equal(np.bincount(pair.harmful.held_out.labels), [2, 2, 2])
    assert "two (harmful, 3 classes, 18 training rows) at 4 px" in pair.description
    config = ImageFolderConfig(**SMALL)
    task = image_folder.folder_task(folders["primary_path"], config)
    assert not set(task.train.files) & set(task.held_out.files)
    for path, label in zip(task.train.files, task.train.labels, strict=True):
        assert path.parent.name == task.classes[label]
    for row, (image, label) in enumerate(zip(*pair.primary.train, strict=True)):
        np.testing.assert_array_equal(image, task.train[row][0])
        assert task.train[row][1] == task.train.label(row) == label
    # Not the first or last by name, which in many folders come from one day or one camera.
    many = make_folder(tmp_path / "many", count=20)
    held = image_folder.folder_task(many, config).held_out.files
    held_ants = sorted(path.stem for path in held if path.parent.name == "ant")
    by_name = sorted(map(str, range(20)))
    assert len(held_ants) == 5
    assert held_ants not in (by_name[:5], by_name[-5:])
    # Elsewhere and with other pixels, the names alone decide.
    moved = make_folder(tmp_path / "moved", seed=5)
    again = image_folder.folder_task(moved, config)
    assert {path.name for path in again.held_out.files if path.parent.name == "ant"} == {
        path.name for path in task.held_out.files if path.parent.name == "ant"
    }
    # A file more moves at most one other across the border.
    write(moved / "ant" / "new.png", 99)
    names = lambda found: {path.name for path in found.held_out.files if path.parent.name == "ant"}  # noqa: E731
    assert len(names(again) - names(image_folder.folder_task(moved, config))) <= 1


def test_folders_split_by_hand_are_honoured(tmp_path):
    for part, count in (("train", 5), ("val", 2)):
        make_folder(tmp_path / "one" / part, count=count, seed=count)
    write(tmp_path / "one" / "train" / ".cache" / "a.png", 0)  # hidden: passed over
    write(tmp_path / "one" / "train" / "ant" / "deep" / "a.png", 0)
    (tmp_path / "one" / "train" / "ant" / ".DS_Store").write_bytes(b"x")
    task = image_folder.folder_task(tmp_path / "one", ImageFolderConfig(**SMALL))
    assert len(task.train) == 11
    assert len(task.held_out) == 4
    assert task.classes == ("ant", "bee")
    make_folder(tmp_path / "one" / "val", classes=("wasp",), count=1)
    with pytest.raises(ValueError, match=r"val: class 'wasp' is not in .*train"):
        image_folder.folder_task(tmp_path / "one", ImageFolderConfig())


def test_train_may_be_the_name_of_a_class(tmp_path):
    make_folder(tmp_path / "v", classes=("car", "train"), count=4)
    task = image_folder.folder_task(tmp_path / "v", ImageFolderConfig(**SMALL))
    assert task.classes == ("car", "train")


def test_rows_are_limited_and_balanced(folders):
    fields = {**folders, **SMALL, "train_rows": 6, "held_out_rows": 3, "seed": 4}
    folders["primary_path"] = folders["harmful_path"]
    pair = images.load_images("image_folder", **{**fields, **folders})
    np.testing.assert_array_equal(np.bincount(pair.harmful.train.labels), [2, 2, 2])
    np.testing.assert_array_equal(np.bincount(pair.harmful.held_out.labels), [1, 1, 1])
    assert images.images_shared(pair).shared  # one folder given twice is said
    with pytest.raises(ValueError, match=r"two train: asked for 20 rows, 7 of class 0, which has"):
        images.load_images("image_folder", **{**fields, **folders, "train_rows": 20})


def test_a_broken_file_is_named_or_skipped_and_counted(folders, tmp_path):
    broken = tmp_path / "one" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "two" / "x" / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"one/bee/3\.png: cannot be decoded"):
        images.load_images("image_folder", **folders, **SMALL)
    pair = images.load_images("image_folder", **folders, **SMALL, skip_broken=True)
    assert len(pair.primary.train.labels) + len(pair.primary.held_out.labels) == 15
    assert len(pair.harmful.train.labels) + len(pair.harmful.held_out.labels) == 24
    assert "2 broken files skipped" in pair.description
    assert "bee/3.png: cannot be decoded" in pair.description
    assert "x/notes.txt: not a JPEG or PNG image" in pair.description
    for path in (tmp_path / "one" / "ant").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="class 'ant' has no training rows"):
        images.load_images("image_folder", **folders, **SMALL, skip_broken=True)


def test_folders_that_cannot_serve(folders, tmp_path):
    load = lambda **fields: images.load_images("image_folder", **{**folders, **fields})  # noqa: E731
    with pytest.raises(ValueError, match="give harmful_path=FOLDER"):
        load(harmful_path="")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load(primary_path=str(tmp_path / "nowhere"))
    make_folder(tmp_path / "single", classes=("ant",))
    with pytest.raises(ValueError, match=r"at least two classes, found \['ant'\]"):
        load(primary_path=str(tmp_path / "single"))
    with pytest.raises(ValueError, match=r"at least two classes, found \[\]"):
        load(primary_path=str(tmp_path / "single" / "ant"))
    (tmp_path / "single" / "empty").mkdir()
    with pytest.raises(ValueError, match="class 'empty' has no images"):
        load(primary_path=str(tmp_path / "single"))
    make_folder(tmp_path / "few", count=1)
    with pytest.raises(ValueError, match="few/ant: 1 image cannot be split"):
        load(primary_path=str(tmp_path / "few"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "need 1 <= size <= resize, got 0 and 256"),
        ({"size": 300}, "need 1 <= size <= resize, got 300 and 256"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must be in"),
        ({"train_rows": 0}, "train_rows must be at least 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"workers": -1}, "workers must be >= 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderConfig(**fields)
