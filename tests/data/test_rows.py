"""Rows by blocks: from files, and the few that stand for many."""

import itertools

import numpy as np
import pytest

from jaximm import data
from jaximm.data import rows
from jaximm.data.tables import arrays
from jaximm.data.tasks import in_few_rows, task_pair_from_arrays

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((50, 3)), RNG.standard_normal((50, 2))
PIECES = (0, 7, 8, 31, 50)


def parts(folder, x=X, pieces=PIECES):
    folder.mkdir()
    for number, (start, stop) in enumerate(itertools.pairwise(pieces)):
        np.save(folder / f"part-{number:03d}.npy", x[start:stop])
    return folder


@pytest.mark.parametrize("stored", [np.float64, np.float32, ">f8", np.int16, bool])
def test_rows_of_parts_are_those_of_the_table(tmp_path, stored):
    x = (10 * X).astype(stored)
    found = rows.opened(parts(tmp_path / "x", x))
    assert found.shape == (50, 3)
    np.testing.assert_array_equal(np.asarray(found), x.astype(float))
    for place in (slice(5, 9), slice(None, 31), slice(31, None), slice(3, 3), slice(8, 45)):
        np.testing.assert_array_equal(np.asarray(found[place]), x[place].astype(float))
    np.testing.assert_array_equal(np.asarray(found[6:40][3:30]), x[6:40][3:30].astype(float))
    with pytest.raises(ValueError, match="one after the other"):
        found[::2]


def test_one_file_is_rows_too(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.testing.assert_array_equal(np.asarray(rows.opened(tmp_path / "x.npy")), X)
    np.save(tmp_path / "y.npy", Y[:, 0])
    np.testing.assert_array_equal(rows.read_targets(tmp_path / "y.npy"), Y[:, 0])
    np.testing.assert_array_equal(rows.read_targets(parts(tmp_path / "y", Y)), Y)


def infinite(folder):
    x = X[8:31].copy()
    x[4, 1] = np.inf
    np.save(folder / "part-002.npy", x)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "part-001.npy").unlink(), "part-001.npy missing; parts are numbered"),
        (lambda f: (f / "part-000.npy").unlink(), "part-000.npy missing"),
        (lambda f: [one.unlink() for one in f.iterdir()], "no rows in this folder"),
        (lambda f: np.save(f / "part-01.npy", X), "part-001.npy, part-01.npy have one number"),
        (lambda f: np.save(f / "rest.npy", X), "rest.npy: a folder of rows holds part-000.npy"),
        (lambda f: np.save(f / "part-002.npy", X[:, :2]), "part-002.npy: columns 2, but .* has 3"),
        (
            lambda f: np.save(f / "part-002.npy", X.astype("f4")),
            "part-002.npy: dtype float32, but .*part-000.npy has float64",
        ),
        (infinite, "part-002.npy: row 4, column 1 is inf"),
        (lambda f: np.save(f / "part-002.npy", X[:, 0]), r"expected a table .* got shape \(50,\)"),
        (lambda f: np.save(f / "part-002.npy", X.astype(str)), "expected numbers, got dtype <U"),
        (
            lambda f: np.save(f / "part-002.npy", np.asfortranarray(X)),
            "part-002.npy: its columns lie one after the other",
        ),
        (
            lambda f: (f / "part-002.npy").write_bytes((f / "part-002.npy").read_bytes()[:-8]),
            "part-002.npy: its header says 69 entries of 8 bytes, but 544",
        ),
        (lambda f: (f / "part-002.npy").write_bytes(b"no"), "part-002.npy: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, damage, message):
    folder = parts(tmp_path / "x")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        rows.opened(folder)


@pytest.mark.parametrize("targets", [Y, Y[:, 0]])
def test_few_rows_have_the_moments_of_many(monkeypatch, targets):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 8 * 3 * 7)  # eight blocks, the last one shorter
    x = X * [1.0, 1e-6, 1e5] + [0.0, 3.0, 1.0]
    few = rows.condensed(x, targets)
    m = 4 + targets.size // 50
    assert few.x.shape == (m, 3)
    assert few.y.shape == (m, *targets.shape[1:])
    table = np.column_stack([np.ones(50), x, targets])
    small = np.column_stack([np.ones(len(few.x)), few.x, few.y])
    scale = np.sqrt(np.mean(table**2, axis=0))
    expected = table.T @ table / 50 / np.outer(scale, scale)
    found = small.T @ small / len(small) / np.outer(scale, scale)
    np.testing.assert_allclose(found, expected, atol=1e-14)


def test_blocks_are_all_rows_in_order(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 8 * 3 * 7)
    for x in (X, rows.opened(parts(tmp_path / "x"))):
        found = list(rows.blocks(x))
        assert [len(block) for block in found] == [7] * 7 + [1]
        np.testing.assert_array_equal(np.concatenate(found), X)
        assert rows.largest(x) == np.abs(X).max()
        assert not rows.all_zero(x)
        assert not rows.all_alike(x)
        np.testing.assert_array_equal(rows.spaced(x, 20), X[np.arange(20) * 50 // 20])
        np.testing.assert_array_equal(rows.spaced(x, 50), X)
    last = np.zeros((50, 3))
    last[-1, 2] = np.nan
    assert rows.all_alike(last[:-1])
    assert rows.all_zero(last[:-1])
    assert not rows.all_finite(last)
    assert not rows.all_zero(last)


def folder_of(tmp_path, **changes):
    content = {"primary_x": X, "primary_y": Y[:, 0], "harmful_x": 2 * X, "harmful_y": Y[:, 1:]}
    folder = tmp_path / "pair"
    folder.mkdir()
    for name, values in (content | changes).items():
        if values is not None:
            np.save(folder / f"{name}.npy", values)
    return folder


def test_a_folder_is_a_pair(tmp_path):
    folder = folder_of(tmp_path, harmful_x=None, harmful_y=None)
    parts(folder / "harmful_x", 2 * X)
    parts(folder / "harmful_y", Y[:, 1:])
    pair = data.load("arrays", path=str(folder), held_out_fraction=0.2)
    np.testing.assert_array_equal(pair.primary.train.x, X[:40])
    np.testing.assert_array_equal(pair.harmful.train.x, 2 * X[:40])
    np.testing.assert_array_equal(pair.harmful.held_out.y, Y[40:, 1])


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"harmful_y": None}, {}, r"missing arrays \['harmful_y'\], unknown arrays \[\]"),
        ({"labels": Y}, {}, r"unknown arrays \['labels'\]"),
        ({"harmful_y": Y[:49, 0]}, {}, "x has 50 rows but y has 49"),
        ({"harmful_y": np.full(50, np.nan)}, {}, "harmful_y.npy: row 0, column 0 is nan"),
        ({"harmful_x": X[:, :2]}, {}, "3 features but the harmful task has 2"),
        ({}, {"harmful_path": "x.csv"}, "a folder holds both tasks"),
    ],
)
def test_a_folder_that_is_no_pair(tmp_path, changes, fields, message):
    with pytest.raises(ValueError, match=message):
        data.load("arrays", path=str(folder_of(tmp_path, **changes)), **fields)


def many(n=rows.MANY + 1000):
    """More rows than are kept, of which the last ones are held out."""
    x = RNG.standard_normal((n, 2))
    return x, np.where(x[:, 0] > 0, 1.0, -1.0)


def test_many_rows_stay_in_their_files_and_are_few_with_their_moments(tmp_path):
    (x, y), folder = many(2 * rows.MANY), tmp_path / "pair"
    folder.mkdir()
    parts(folder / "primary_x", x, (0, 10_000, len(x)))
    np.save(folder / "primary_y.npy", y)
    np.save(folder / "harmful_x.npy", 2 * X[:, :2])
    np.save(folder / "harmful_y.npy", Y[:, 0])
    pair = arrays.load(arrays.ArraysConfig(path=str(folder)))
    assert isinstance(pair.primary.train.x, rows.FileRows)
    assert isinstance(pair.harmful.train.x, np.ndarray)
    assert pair.primary.kind == "binary"
    few, cut = in_few_rows(pair), 3 * len(x) // 4
    assert few.primary.train.x.shape == (4, 2)
    np.testing.assert_array_equal(few.primary.held_out.x, x[cut:])
    assert few.harmful.train is pair.harmful.train
    np.testing.assert_allclose(
        few.primary.train.x.T @ few.primary.train.y / 4, x[:cut].T @ y[:cut] / cut, atol=1e-13
    )
    assert not data.inputs_shared(pair).shared


def test_many_rows_are_looked_at_as_few_are():
    x, y = many()
    given = {"primary_x": x, "primary_y": y, "harmful_x": x, "harmful_y": y}
    assert data.inputs_shared(task_pair_from_arrays(**given)).shared
    bad = x.copy()
    bad[-30_000, 1] = np.nan
    with pytest.raises(ValueError, match=f"row {len(x) - 30_000}, column 1 is nan"):
        task_pair_from_arrays(**given | {"primary_x": bad})
    with pytest.raises(ValueError, match="training rows are the same"):
        task_pair_from_arrays(**given | {"primary_x": np.ones_like(x)})
    with pytest.raises(ValueError, match="0 in every entry"):
        task_pair_from_arrays(**given | {"primary_x": np.zeros_like(x)})


def test_of_very_many_held_out_rows_some_are_measured():
    x, y = many(2 * rows.MANY + 5)
    pair = task_pair_from_arrays(
        primary_x=x, primary_y=y, harmful_x=X[:, :2], harmful_y=Y[:, 0],
        primary_x_held_out=x, primary_y_held_out=y,
    )  # fmt: skip
    held_out = in_few_rows(pair).primary.held_out
    assert len(held_out.x) == len(held_out.y) == 2 * rows.MANY
    np.testing.assert_array_equal(np.where(held_out.x[:, 0] > 0, 1.0, -1.0), held_out.y)
    assert held_out.x[-1, 0] in x[-5:, 0]
