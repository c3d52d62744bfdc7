import io
import os

import numpy as np
import pytest
from PIL import Image

from jaximm import data
from jaximm.data.images import image_folder
from jaximm.data.images.image_folder import ImageFolderConfig, decode_image

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
    pair = data.load("image_folder", **folders, **SMALL)
    assert pair.primary.classes == ("ant", "bee")
    assert pair.harmful.classes == ("x", "y", "z")
    assert pair.primary.train.x.shape == (12, 4, 4, 3)
    np.testing.assert_array_equal(np.bincount(pair.harmful.train.y), [6, 6, 6])
    np.testing.assert_array_equal(np.bincount(pair.harmful.held_out.y), [2, 2, 2])
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
    pair = data.load("image_folder", **{**fields, **folders})
    np.testing.assert_array_equal(np.bincount(pair.harmful.train.y), [2, 2, 2])
    np.testing.assert_array_equal(np.bincount(pair.harmful.held_out.y), [1, 1, 1])
    assert data.inputs_shared(pair).shared  # one folder given twice is said
    with pytest.raises(ValueError, match=r"two train: asked for 20 rows, 7 of class 0, which has"):
        data.load("image_folder", **{**fields, **folders, "train_rows": 20})


def test_a_broken_file_is_named_or_skipped_and_counted(folders, tmp_path):
    broken = tmp_path / "one" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "two" / "x" / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"one/bee/3\.png: cannot be decoded"):
        data.load("image_folder", **folders, **SMALL)
    pair = data.load("image_folder", **folders, **SMALL, skip_broken=True)
    assert len(pair.primary.train.y) + len(pair.primary.held_out.y) == 15
    assert len(pair.harmful.train.y) + len(pair.harmful.held_out.y) == 24
    assert "2 broken files skipped" in pair.description
    assert "bee/3.png: cannot be decoded" in pair.description
    assert "x/notes.txt: not a JPEG or PNG image" in pair.description
    for path in (tmp_path / "one" / "ant").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="class 'ant' has no training rows"):
        data.load("image_folder", **folders, **SMALL, skip_broken=True)


def test_folders_that_cannot_serve(folders, tmp_path):
    load = lambda **fields: data.load("image_folder", **{**folders, **fields})  # noqa: E731
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


# Parts of a split, links, names.

LAYOUTS = [
    ("Training", "Testing"),
    ("TRAIN", "Val"),
    ("train_set", "test_set"),
    ("training-images", "Validation_Images"),
    ("train2017", "val2017"),
    ("trainset", "testset"),
    ("TrainData", "DevData"),
    ("train", "dev"),
    ("01_train", "02_eval"),
    ("train", "held-out"),
    ("seg_train", "seg_test"),
    ("trn", "tst"),
]


def four_classes(folder, *parts):
    for number, part in enumerate(parts):
        make_folder(folder / part, classes=("a", "b", "c", "d"), count=2, seed=number)
    return folder


@pytest.mark.parametrize("parts", LAYOUTS)
def test_usual_names_of_parts_are_parts(tmp_path, parts):
    folder = four_classes(tmp_path / "one", *parts)
    task = image_folder.folder_task(folder, ImageFolderConfig(**SMALL))
    assert task.classes == ("a", "b", "c", "d")
    assert {path.parts[-3] for path in task.train.files} == {parts[0]}
    assert {path.parts[-3] for path in task.held_out.files} == {parts[1]}
    assert len(task.train) == len(task.held_out) == 8


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("train", "Train"), "look like the parts of a split"),
        (("train1", "train2"), "look like the parts of a split"),
        (("test", "val"), "call them train and val"),
        (("train", "val", "valid"), "look like the parts of a split"),
        (("a_train", "a_test", "b_train", "b_test"), "look like the parts of a split"),
        (("fold0", "fold1"), r"fold0, fold1 hold the same sub-folders \(a, b, c, d\)"),
        (("lern", "pruef"), "hold the same sub-folders"),
        (("2019", "2020", "2021"), "2019, 2020 hold the same sub-folders"),
    ],
)
def test_what_looks_like_parts_is_never_read_as_classes(tmp_path, parts, message):
    folder = four_classes(tmp_path / "one", *parts)
    with pytest.raises(ValueError, match=rf"one: .*{message}"):
        image_folder.folder_task(folder, ImageFolderConfig(**SMALL))


def test_parts_that_hold_no_classes_or_lack_some(tmp_path):
    config = ImageFolderConfig(**SMALL)
    for part in ("train", "test"):
        write(tmp_path / "flat" / part / "0.png", 0)
    with pytest.raises(ValueError, match=r"flat/train: looks like a part of a split, but holds no"):
        image_folder.folder_task(tmp_path / "flat", config)
    folder = make_folder(tmp_path / "one" / "Train", classes=("a", "b", "c")).parent
    make_folder(folder / "Test", classes=("a", "b"))
    with pytest.raises(ValueError, match=r"one/Train: class 'c' is not in .*one/Test \(1 such"):
        image_folder.folder_task(folder, config)


def test_classes_that_only_look_a_little_like_parts(tmp_path):
    for number, classes in enumerate(
        [
            ("bullet_train", "steam_train"),
            ("test_tube", "train_station"),
            ("trainer", "tester"),
            ("valley", "testament"),
            ("car", "train"),
        ]
    ):
        folder = make_folder(tmp_path / str(number), classes=classes, count=4)
        task = image_folder.folder_task(folder, ImageFolderConfig(**SMALL))
        assert set(task.classes) == set(classes)
    for name in ("ant", "bee"):  # as in Tiny ImageNet
        make_folder(tmp_path / "deep" / name, classes=("images",), count=4)
    assert len(image_folder.folder_task(tmp_path / "deep", ImageFolderConfig(**SMALL)).train) == 6


def test_links_are_followed_once_and_what_is_passed_over_is_named(folders, tmp_path):
    one = tmp_path / "one"
    elsewhere = make_folder(tmp_path / "elsewhere", classes=("more",), count=4, seed=7)
    (one / "ant" / "linked").symlink_to(elsewhere / "more")
    (one / "ant" / "again").symlink_to(elsewhere / "more")
    (one / "ant" / "self").symlink_to(one / "ant")  # leads back: each folder once
    (one / "wasp").symlink_to(elsewhere / "more")
    (one / "bee" / ".DS_Store").write_bytes(b"x")
    (one / ".git").mkdir()
    (one / "labels.csv").write_text("x")
    pair = data.load("image_folder", **folders, **SMALL)
    assert pair.primary.classes == ("ant", "bee", "wasp")
    counts = sum(np.bincount(part.y) for part in (pair.primary.train, pair.primary.held_out))
    np.testing.assert_array_equal(counts, [12, 8, 4])
    assert "3 entries passed over: .git, bee/.DS_Store, labels.csv" in pair.description
    (one / "bee" / "gone.png").symlink_to(one / "nothing.png")
    with pytest.raises(ValueError, match=r"bee/gone\.png: cannot be read as a file \(No such"):
        data.load("image_folder", **folders, **SMALL)
    os.mkfifo(one / "bee" / "pipe.png")
    pair = data.load("image_folder", **folders, **SMALL, skip_broken=True)
    assert "2 broken files skipped" in pair.description
    assert "pipe.png: a pipe or a device" in pair.description
    for name in ("gone.png", "pipe.png"):
        (one / "bee" / name).unlink()
    (tmp_path / "two" / "x" / "ok.gif").write_bytes(encode(Image.new("L", (9, 9)), "GIF"))
    with pytest.raises(ValueError, match=r"ok\.gif: not a JPEG or PNG image; replace it or"):
        data.load("image_folder", **folders, **SMALL)


def test_unused_parts_are_named(tmp_path):
    folder = four_classes(tmp_path / "one", "train", "val", "test")
    (folder / "README").write_text("x")
    (folder / ".git").mkdir()
    task = image_folder.folder_task(folder, ImageFolderConfig(**SMALL))
    assert {path.parts[-3] for path in task.held_out.files} == {"val"}
    assert task.passed_over == (".git", "README", "test")


def test_skipping_never_empties_a_class_of_one_part(folders, tmp_path):
    config = ImageFolderConfig(**SMALL)
    for path in image_folder.folder_task(tmp_path / "one", config).held_out.files:
        if path.parent.name == "bee":
            path.write_bytes(b"")
    with pytest.raises(ValueError, match="class 'bee' has no held-out rows, since none of its 2"):
        data.load("image_folder", **folders, **SMALL, skip_broken=True)


def test_file_names_that_are_not_utf_8(folders, tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    make_folder(tmp_path / "one", classes=(odd,))
    for index in range(8):
        write(tmp_path / "one" / "bee" / f"{odd}{index}.png", index)
    pair = data.load("image_folder", **folders, **SMALL)
    assert pair.primary.classes == ("ant", "bee", r"caf\xe9")
    assert len(pair.primary.train.y) == 24
    (tmp_path / "one" / "bee" / f"{odd}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bee/caf\\xe9\.png: not a JPEG"):
        data.load("image_folder", **folders, **SMALL)
    with pytest.raises(ValueError, match=r"caf\\xe9: no such folder"):
        data.load("image_folder", **{**folders, "primary_path": odd})


# EXIF whose types are not the usual ones.

SIZES_OF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 99: 1}


def exif_block(entries):
    """A big-endian EXIF block of (tag, type, values as bytes) in one directory."""
    entries = sorted(entries)
    head = b"Exif\0\0MM\0*\0\0\0\x08" + len(entries).to_bytes(2, "big")
    rows, rest, start = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, values in entries:
        count = len(values) // SIZES_OF_TYPES[kind]
        rows += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + count.to_bytes(4, "big")
        if len(values) > 4:
            rows += (start + len(rest)).to_bytes(4, "big")
            rest += values
        else:
            rows += values.ljust(4, b"\0")
    return head + rows + bytes(4) + rest


def variants(step=1):
    tags = (0x10E, 0x10F, 0x110, 0x11A, 0x11B, 0x128, 0x131, 0x132, 0x13E, 0x213, 0x8298, 0x8769)
    tags += (0x8825, 0x9000, 0x927C, 0xA002, 0xA005, 0x1)
    every = [(tag, kind, n) for tag in tags for kind in SIZES_OF_TYPES for n in (0, 1, 2, 4)]
    return every[::step]


def check_variants(chosen):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    stored = np.ascontiguousarray(np.rot90(pixels, 1))  # orientation 6
    for tag, kind, n in chosen:
        values = bytes(range(72, 72 + SIZES_OF_TYPES[kind] * n))
        block = exif_block([(0x112, 3, b"\0\6"), (tag, kind, values)])
        found = decode_image(encode(stored, exif=block), size=6, resize=6, name=f"{tag} {kind}")
        np.testing.assert_array_equal(found, pixels, err_msg=f"tag {tag:#x} type {kind} n {n}")
        content = encode(stored, "JPEG", quality=100, subsampling=0, exif=block)
        found = decode_image(content, size=6, resize=6, name=f"{tag} {kind}")
        np.testing.assert_allclose(found, pixels, atol=40, err_msg=f"{tag:#x} {kind} {n}")


def test_only_the_orientation_of_exif_counts():
    check_variants(variants(9))


@pytest.mark.slow
def test_only_the_orientation_of_exif_counts_for_every_tag_and_type():
    assert len(variants()) > 340
    check_variants(variants())


@pytest.mark.parametrize(
    ("kind", "values", "turned"),
    [
        (3, b"\0\6", True),
        (4, b"\0\0\0\6", True),
        (1, b"\6", True),
        (3, b"\0\6\0\6", True),
        (8, b"\0\6", True),
        (2, b"6\0", False),
        (3, b"\0\0", False),
        (3, b"\0\x63", False),
        (5, bytes(8), False),
        (3, b"", False),
    ],
)
def test_orientations_of_other_types(kind, values, turned):
    pixels = np.random.default_rng(1).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    content = encode(pixels, exif=exif_block([(0x112, kind, values)]))
    expected = np.rot90(pixels, -1) if turned else pixels
    np.testing.assert_array_equal(decode_image(content, size=6, resize=6), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF|Truncated|Metadata")
def test_exif_blocks_that_cannot_be_read_leave_the_image_as_it_is():
    pixels = np.random.default_rng(2).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    whole = exif_block([(0x112, 3, b"\0\6"), (0x10E, 2, b"a camera")])
    for block in (b"Exif\0\0", b"Exif\0\0XX", whole[:14], b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        content = encode(pixels, exif=block)
        np.testing.assert_array_equal(decode_image(content, size=6, resize=6), pixels)


def test_animations_and_sizes_at_the_border(monkeypatch):
    pixels = np.random.default_rng(3).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    frames = [Image.fromarray(255 - pixels)]
    animated = encode(Image.fromarray(pixels), save_all=True, append_images=frames)
    np.testing.assert_array_equal(decode_image(animated, size=6, resize=6), pixels)
    one = decode_image(encode(pixels[:1, :1]), size=6, resize=6)
    np.testing.assert_array_equal(one, np.broadcast_to(pixels[0, 0], (6, 6, 3)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # 36 pixels: Pillow itself only warns
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"b: cannot be decoded \(36 pixels exceeds limit of 30"),
    ):
        decode_image(encode(pixels), size=6, resize=6, name="b")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    np.testing.assert_array_equal(decode_image(encode(pixels), size=6, resize=6), pixels)
    empty = bytearray(encode(pixels))
    empty[16:20] = bytes(4)  # a width of 0
    with pytest.raises(ValueError, match=r"^image: (not a JPEG|cannot be decoded)"):
        decode_image(bytes(empty), size=6, resize=6)


def test_scans_without_end_are_refused():
    # Each takes 95 bytes of the file and a pass over all pixels: 1 MB would take ten minutes.
    whole = encode(np.full((4096, 4096), 128, np.uint8), "JPEG", progressive=True)
    decode_image(whole, size=8, resize=8)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match=r"bomb: cannot be decoded .* scans of 16777216 pixels"):
        decode_image(whole[:-2] + 300 * last + whole[-2:], size=8, resize=8, name="bomb")


def test_bytes_that_only_look_like_scans_are_none():
    # Those of a comment, and all that follows the image.
    plain = encode(np.full((16, 16), 128, np.uint8), "JPEG")
    comment = b"\xff\xfe" + (60_000).to_bytes(2, "big") + 29_999 * b"\xff\xda"
    assert image_folder._scans(plain[:2] + comment + plain[2:] + 1000 * b"\xff\xda") == 1
