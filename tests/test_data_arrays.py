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
