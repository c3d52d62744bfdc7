import os
import zipfile

import numpy as np
import pytest

from jaximm import data

RNG = np.random.default_rng(5)
ARRAYS = {
    "primary_x": RNG.standard_normal((8, 3)),
    "primary_y": RNG.standard_normal(8),
    "harmful_x": RNG.standard_normal((12, 3)),
    "harmful_y": RNG.standard_normal(12),
}


def test_npz_round_trip(tmp_path):
    path = tmp_path / "tasks.npz"
    held_out = {"harmful_x_held_out": np.ones((2, 3)), "harmful_y_held_out": np.ones(2)}
    np.savez(path, **ARRAYS, **held_out)
    pair = data.load("arrays", path=str(path), held_out_fraction=0.5)
    np.testing.assert_array_equal(pair.primary.train.x, ARRAYS["primary_x"][:4])
    np.testing.assert_array_equal(pair.primary.held_out.y, ARRAYS["primary_y"][4:])
    np.testing.assert_array_equal(pair.harmful.train.y, ARRAYS["harmful_y"])
    np.testing.assert_array_equal(pair.harmful.held_out.x, np.ones((2, 3)))
    assert pair.description == "two tasks from tasks.npz"
    assert pair.primary.kind == "regression"


def test_damaged_or_wrong_npz(tmp_path):
    path = tmp_path / "tasks.npz"
    with pytest.raises(ValueError, match=r"tasks.npz: cannot be read as .npz"):
        data.load("arrays", path=str(path))
    np.savez(path, **ARRAYS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot be read as .npz"):
        data.load("arrays", path=str(path))
    np.savez(path, primary_x=np.ones((2, 2)), labels=np.ones(2))
    with pytest.raises(ValueError, match=r"missing arrays \['primary_y'.*unknown arrays \['labels"):
        data.load("arrays", path=str(path))
    np.savez(path, **{**ARRAYS, "harmful_x": np.full((12, 3), np.nan)})
    with pytest.raises(ValueError, match=r"tasks.npz: harmful_x: row 0, column 0 is nan \(36"):
        data.load("arrays", path=str(path))
    np.savez(path, **{**ARRAYS, "harmful_x": np.array([["a"]], object)})
    with pytest.raises(
        ValueError, match=r"npz: harmful_x: expected a table of numbers, got .*object"
    ):
        data.load("arrays", path=str(path))


def csv_files(tmp_path, primary, harmful):
    paths = {"path": tmp_path / "primary.csv", "harmful_path": tmp_path / "harmful.csv"}
    for path, text in zip(paths.values(), (primary, harmful), strict=True):
        path.write_text(text)
    return {key: str(path) for key, path in paths.items()}


def test_csv_pair(tmp_path):
    paths = csv_files(
        tmp_path, "a,area,b,price\n1,10,2,7\n3,30,4,8\n", "a,area,b,price\n5,50,6,9\n0,0,1e1,-1\n"
    )
    pair = data.load("arrays", **paths, primary_target="area", held_out_fraction=0.5)
    # Neither task sees the other's target.
    np.testing.assert_array_equal(pair.primary.train.x, [[1, 2]])
    np.testing.assert_array_equal(pair.primary.held_out.y, [30])
    np.testing.assert_array_equal(pair.harmful.train.x, [[5, 6]])
    np.testing.assert_array_equal(pair.harmful.held_out.x, [[0, 10]])
    np.testing.assert_array_equal(pair.harmful.train.y, [9])


@pytest.mark.parametrize(
    ("primary", "harmful", "fields", "message"),
    [
        ("a,y\n1,2\n3,red\n", "a,y\n1,2\n", {}, r"row 1, column 'y' is 'red', not a number"),
        ("a,y\n1,2\n3\n", "a,y\n1,2\n", {}, "row 1 has 1 fields, the header has 2"),
        ("a,y\n", "a,y\n1,2\n", {}, "expected a header line and at least one row"),
        ("a,a\n1,2\n", "a,y\n1,2\n", {}, "two columns have the same name"),
        ("a,y\n1,2\n3,4\n", "b,y\n1,2\n3,4\n", {}, r"only one of them has \['a', 'b'\]"),
        ("a,b,y\n1,2,3\n", "b,a,y\n1,2,3\n", {}, "their order differs"),
        ("a,y\n1,2\n", "a,y\n1,2\n", {"primary_target": "z"}, "no column 'z'; it has"),
        ("y\n1\n", "y\n1\n", {}, "no feature column"),
        (
            "a,y\n1,2\n3,nan\n4,4\n",
            "a,y\n1,2\n3,4\n",
            {},
            r"primary.csv: row 1, column 'y' is nan \(1 such",
        ),
    ],
)
def test_bad_csv_files(tmp_path, primary, harmful, fields, message):
    with pytest.raises(ValueError, match=message):
        data.load("arrays", **csv_files(tmp_path, primary, harmful), **fields)


def test_missing_paths(tmp_path):
    with pytest.raises(ValueError, match=r"give path=FILE.npz"):
        data.load("arrays")
    with pytest.raises(ValueError, match="give harmful_path as well"):
        data.load("arrays", path="x.csv")
    with pytest.raises(ValueError, match=r"x.csv: cannot be read as CSV"):
        data.load("arrays", path=str(tmp_path / "x.csv"), harmful_path="y.csv")
    with pytest.raises(ValueError, match="held_out_fraction"):
        data.make_config("arrays", held_out_fraction=0.0)


# More kinds of files: each is read right, or refused by name before anything is computed.


def save(tmp_path, name="tasks.npz", **changes):
    path = tmp_path / name
    with open(path, "wb") as stream:
        np.savez(stream, **{**ARRAYS, **changes})
    return str(path)


@pytest.mark.parametrize("name", ["tasks.NPZ", "tasks.Npz", "my tasks.nPz"])
def test_suffixes_count_whatever_their_case(tmp_path, name):
    pair = data.load("arrays", path=save(tmp_path, name))
    np.testing.assert_array_equal(pair.primary.train.x, ARRAYS["primary_x"][:6])


@pytest.mark.parametrize(
    "stored",
    [
        lambda x: x.astype(">f8"),
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: x.astype(np.float16),
        lambda x: x.astype(">f4"),
        lambda x: x.astype(np.longdouble),
        lambda x: (100 * x).astype(">i2"),
        lambda x: (100 * x).astype(np.int64),
        lambda x: x > 0,
    ],
)
def test_numbers_of_any_width_and_order_are_read_as_they_are(tmp_path, stored):
    x = stored(ARRAYS["harmful_x"])
    pair = data.load("arrays", path=save(tmp_path, harmful_x=x))
    found = np.concatenate([pair.harmful.train.x, pair.harmful.held_out.x])
    np.testing.assert_array_equal(found, x.astype(float))
    assert found.dtype == np.dtype("=f8")


def test_one_column_of_targets_is_a_row_of_them(tmp_path):
    y = ARRAYS["primary_y"][:, None]
    pair = data.load("arrays", path=save(tmp_path, primary_y=y))
    np.testing.assert_array_equal(pair.primary.train.y, ARRAYS["primary_y"][:6])
    assert pair.primary.held_out.y.shape == (2,)


@pytest.mark.parametrize(
    ("labels", "negative"),
    [
        (np.arange(8) % 2 == 1, False),
        (np.arange(8) % 2, 0),
        (np.arange(8) % 2 * 2.0 - 1, -1),
        (np.where(np.arange(8) % 2, 8, 3)[:, None].astype(">u2"), 3),
    ],
)
def test_two_labels_are_a_binary_task(tmp_path, labels, negative):
    pair = data.load("arrays", path=save(tmp_path, primary_y=labels))
    assert (pair.primary.kind, pair.harmful.kind) == ("binary", "regression")
    y = np.concatenate([pair.primary.train.y, pair.primary.held_out.y])
    np.testing.assert_array_equal(y, np.where(labels.ravel() == negative, -1, 1))
    said = data.load("arrays", path=save(tmp_path, primary_y=labels), kind="regression")
    assert said.primary.kind == "regression"
    np.testing.assert_array_equal(said.primary.train.y, labels.ravel()[:6].astype(float))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primary_y": np.arange(8) % 3}, "primary_y: 3 different whole .*kind='regression'"),
        ({"harmful_y": np.arange(12) % 4 + 1.0}, "harmful_y: 4 different whole numbers"),
        ({"harmful_y": np.arange(12) % 5 * 10}, r"harmful_y: 5 different .* \(0, 10, 20, ...\)"),
        ({"primary_y": np.ones(8)}, "primary_y: every target is 1: nothing.*kind='constant'"),
        ({"primary_y": np.eye(8)[:, :3]}, r"primary_y must have one target a row.*\(8, 3\)"),
        ({"primary_y": np.arange(8) >= 4}, "primary_y: the rows are sorted by label"),
        ({"primary_y": np.arange(8) >= 6}, "primary_y: the 6 training rows hold one of the two"),
        ({"harmful_x": np.zeros((12, 3))}, "harmful_x: all 9 training rows are 0"),
        ({"primary_x": np.full((8, 3), 7)}, "primary_x: all 6 training rows are the same"),
        (
            {"harmful_x_held_out": np.zeros((4, 3)), "harmful_y_held_out": np.arange(4) / 3},
            "harmful_x_held_out: all 4 held-out rows are 0",
        ),
        ({"harmful_x": np.zeros((0, 3)), "harmful_y": np.zeros(0)}, "harmful_x: no rows"),
        ({"harmful_x": np.zeros((12, 0))}, "harmful_x: no rows or no columns"),
        ({"harmful_x": RNG.normal(size=(12, 4))}, "primary task has 3 features but the harmful"),
        ({"harmful_x": RNG.normal(size=(12, 3, 1))}, r"harmful_x: expected 2 axes.*reshape"),
        (
            {"harmful_x": np.ones((12, 3), complex)},
            "harmful_x: expected numbers, got dtype complex",
        ),
        ({"harmful_x": np.full((12, 3), "1")}, "harmful_x: expected numbers, got dtype <U1"),
        ({"harmful_x": np.zeros((12, 3), "M8[s]")}, "harmful_x: expected numbers, got dtype dat"),
        ({"harmful_x": np.zeros(12, "f8,i4")}, "harmful_x: expected a table of numbers"),
        ({"harmful_x": np.zeros((12, 3), "V0")}, "harmful_x: expected a table of numbers"),
        ({"primary_y": np.full(8, np.inf)}, r"primary_y: row 0, column 0 is inf \(8 such"),
        ({"harmful_x": np.full((12, 3), np.longdouble("1e4000"))}, "harmful_x: row 0.*is inf"),
        ({"primary_y": 3.0}, "primary_y: expected 1 or 2 axes"),
    ],
)
def test_bad_arrays_in_a_file_are_refused_by_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.load("arrays", path=save(tmp_path, **changes))
    assert "tasks.npz: " in str(caught.value)
    assert "\n" not in str(caught.value)


def header(descr="<f8", shape="(8, 3)", order="False"):
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}}}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (header() + bytes(100), "says 24 entries of 8 bytes, but 100 bytes follow"),
        (header(shape="(10**6, 10**9)"), "cannot be read"),
        (header(shape="(1000000000000, 8)"), "but 0 bytes follow"),
        (header(shape="(-8, -3)") + bytes(192), "negative lengths"),
        (header(shape="(4611686018427387904, 8)"), "but 0 bytes follow"),
        (header(descr="|O") + b"cos\nsystem\n", "expected a table of numbers"),
        (header(descr="<q9"), "cannot be read as an array"),
        (header(shape="(" * 3000), "cannot be read as an array"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"-" * 65535, "cannot be read as an array"),
        (b"\x93NUMPY\x03\x00" + bytes(20), "an array of format"),
        (b"cos\nsystem\n(S'true'\ntR.", "cannot be read as an array"),
        (b"", "cannot be read as an array"),
    ],
)
def test_hostile_headers_allocate_nothing(tmp_path, member, message):
    path = tmp_path / "tasks.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("primary_x.npy", member)
    with pytest.raises(ValueError, match=r"tasks\.npz: primary_x: .*" + message):
        data.load("arrays", path=str(path))


def test_archives_that_are_no_plain_npz(tmp_path):
    path = tmp_path / "tasks.npz"
    load = lambda **fields: data.load("arrays", path=str(path), **fields)  # noqa: E731
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("primary_x.npy", header(shape="(9437184, 1)") + bytes(72 * 2**20))
    with pytest.raises(ValueError, match=r"tasks.npz: \d+ bytes would unpack .* np.savez rather"):
        load()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("primary_x.npy", header() + bytes(192))
    with pytest.raises(ValueError, match="primary_x: packed in another way"):
        load()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("primary_x.npy", header() + bytes(192))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("primary_x.npy", header() + bytes(192))
    with pytest.raises(ValueError, match="primary_x: two arrays of this name"):
        load()
    np.savez(path, **ARRAYS)
    content = bytearray(path.read_bytes())
    content[content.index(ARRAYS["harmful_x"].tobytes()) + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"harmful_x: cannot be read as an array .*CRC"):
        load()
    np.save(path.open("wb"), ARRAYS["primary_x"])
    with pytest.raises(ValueError, match=r"tasks.npz: cannot be read as .npz"):
        load()
    np.savez(path, **ARRAYS)
    for field in ("harmful_path", "primary_target", "harmful_target"):
        with pytest.raises(ValueError, match=f"holds both tasks.*leave {field} empty"):
            load(**{field: "y"})
    with pytest.raises(ValueError, match="unknown kind 'classes'; choose from"):
        load(kind="classes")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ValueError, match=r"folder.npz: a folder, expected a file"):
        data.load("arrays", path=str(tmp_path / "folder.npz"))
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match=r"pipe.npz: a pipe or a device"):
        data.load("arrays", path=str(tmp_path / "pipe.npz"))


GOOD = "a,y\n1,2\n3,4.5\n"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa,y\n1,2\n3,4.5\n",
        "a,y\r\n1,2\r\n3,4.5\r\n",
        "a,y\r1,2\r3,4.5\r",
        "a,y\n1,2\n3,4.5",
        "a,y\n1,2\n3,4.5\n\n\n",
        "a,y\n1,2\n3,4.5\n   \n",
        "a,y\n1,2\n3,4.5\n,\n,\n",
        "\na,y\n\n1,2\n\n3,4.5\n",
        '"a","y"\n"1","2"\n"3","4.5"\n',
        " a , y \n 1 , 2 \n3,4.50\n",
        "a,y\n1e0,+2\n0.3e1,45e-1\n",
    ],
)
def test_csv_files_as_programs_write_them(tmp_path, text):
    paths = csv_files(tmp_path, "", GOOD)
    (tmp_path / "primary.csv").write_bytes(text.encode())
    pair = data.load("arrays", **paths, held_out_fraction=0.5)
    np.testing.assert_array_equal(pair.primary.train.x, [[1]])
    np.testing.assert_array_equal(pair.primary.held_out.x, [[3]])
    np.testing.assert_array_equal(pair.primary.held_out.y, [4.5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b",a,y\n0,1,2\n1,3,4.5\n", r"the first column has no name \(''\).*index=False"),
        (b'"",a,y\n0,1,2\n1,3,4.5\n', "the first column has no name"),
        (b"Unnamed: 0,a,y\n0,1,2\n1,3,4.5\n", r"no name \('Unnamed: 0'\): it is an index"),
        (b"a,y,\n1,2,\n3,4.5,\n", "column 2 of the header has no name"),
        (b"a,y\n0,1,2\n1,3,4.5\n", r"row 0 has 3 fields, the header has 2 .*row.names=FALSE"),
        (b"a,y\n1,2\n3,4,5\n", r"row 1 has 3 fields.*\(line 3\); quote fields that hold commas"),
        (b"a,a ,y\n1,2,3\n", "two columns have the same name, 'a'"),
        (b"1.5,2\n1,2\n3,4.5\n", "the first line holds numbers"),
        (b"a;y\n1;2\n3;4,5\n", "the fields are separated by ';', expected commas"),
        (b"a,y\n1,2\n,\n3,4\n", r"row 1, column 'a' is '', not a number \(line 3\)"),
        (b"a,y\n1,2\n1_000,4\n", "row 1, column 'a' is '1_000', not a number"),
        ("a,y\n1,2\n\uff11,4\n".encode(), "row 1, column 'a' is '\uff11', not a number"),
        (b"a,y\n1,2\n3,1e999\n", "row 1, column 'y' is inf"),
        (b'a,y\n1,2\n"3,4.5\n', r"cannot be read as CSV \(unexpected end of data\)"),
        (b'a,y\n1,2\n"3"4,4.5\n', "cannot be read as CSV"),
        (b"a,y\n1,2\n3,4\0\n", "holds null characters"),
        ("a,y\n1,2\n".encode("utf-16"), "cannot be read as CSV .*UTF-8 text"),
        ("a,y\n1,2\n".encode("utf-16-le"), "holds null characters"),
        ("caf\u00e9,y\n1,2\n".encode("latin-1"), "cannot be read as CSV .*UTF-8 text"),
        (b"a,y\n1," + b"7" * 200_000 + b"\n", "field larger than field limit"),
        (b"a,y\n1," + b"x" * 100_000 + b"\n", "row 0, column 'y' is 'xx"),
        (b"", "expected a header line and at least one row"),
        (b"\n\n", "expected a header line and at least one row"),
        (b"a,y\n\n,\n", "expected a header line and at least one row"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as CSV"),
    ],
)
def test_bad_csv_content_is_refused_with_the_file(tmp_path, content, message):
    paths = csv_files(tmp_path, "", GOOD)
    (tmp_path / "primary.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.load("arrays", **paths)
    assert f"{tmp_path}/primary.csv: " in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_numbered_columns_are_names(tmp_path):
    paths = csv_files(tmp_path, "0,1\n5,6\n7,8.5\n", "0,1\n1,2\n3,4.5\n")
    pair = data.load("arrays", **paths, held_out_fraction=0.5)
    np.testing.assert_array_equal(pair.primary.train.x, [[5]])


def test_names_of_files_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.npz")
    pair = data.load("arrays", path=save(tmp_path, name))
    assert pair.description == r"two tasks from caf\xe9\n.npz"
    with pytest.raises(ValueError, match=r"caf\\xe9\.csv: cannot be read as CSV \(No such file"):
        data.load("arrays", path=os.fsdecode(b"caf\xe9.csv"), harmful_path="b.csv")


def test_what_float32_cannot_hold_is_refused():
    pair = data.task_pair_from_arrays(**{**ARRAYS, "harmful_x": 1e200 * ARRAYS["harmful_x"]})
    assert np.isfinite(data.paired_arrays(pair, dtype=np.float64).harmful.x).all()
    with pytest.raises(ValueError, match=r"harmful train x: entries up to .*e.200.*float32"):
        data.paired_arrays(pair, dtype=np.float32)
    pair = data.task_pair_from_arrays(**{**ARRAYS, "primary_x": 1e-200 * ARRAYS["primary_x"]})
    with pytest.raises(ValueError, match=r"primary held-out x: entries up to .*e-20.*float32"):
        data.paired_arrays(pair, split="held_out", dtype=np.float32)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_inputs_shared_holds_at_any_scale(scale):
    x, y = ARRAYS["harmful_x"], ARRAYS["harmful_y"]
    make = lambda scaled: data.task_pair_from_arrays(  # noqa: E731
        primary_x=x, primary_y=y, harmful_x=scaled, harmful_y=y
    )
    assert data.inputs_shared(make(scale * x)).shared
    assert not data.inputs_shared(make(scale * x * [1, 1, 2])).shared


@pytest.mark.parametrize("name", ["primary_x", "harmful_y"])
@pytest.mark.parametrize("scale", [2.0**600, 2.0**-600])
def test_numbers_whose_squares_are_none_are_refused(tmp_path, name, scale):
    np.savez(tmp_path / "far.npz", **{**ARRAYS, name: scale * ARRAYS[name]})
    with pytest.raises(ValueError, match=rf"far.npz: {name}: the largest entry is .* other units"):
        data.load("arrays", path=str(tmp_path / "far.npz"))
