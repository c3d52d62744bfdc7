import numpy as np
import pytest

from jaximm import data
from jaximm.data.tasks import Split, Task, TaskPair, check_pair, check_task

X = np.arange(12.0).reshape(4, 3)
Y = np.arange(4.0)


def make_pair(**changes):
    arrays = dict(primary_x=X, primary_y=Y, harmful_x=X[::-1] ** 2, harmful_y=Y)
    return data.task_pair_from_arrays(**{**arrays, **changes})


def with_entry(value):
    x = X.copy()
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harmful_x": with_entry(np.nan)}, r"harmful train x: row 2, column 1 is nan \(1 such"),
        ({"primary_x": with_entry(-np.inf)}, "primary train x: row 2, column 1 is -inf"),
        ({"primary_y": [0.0, np.nan, 2.0, np.nan]}, r"primary train y: row 1, column 0 .*\(2 such"),
        ({"primary_x": X[:0], "primary_y": Y[:0]}, "primary train x: no rows"),
        ({"primary_x": X[:, :0]}, "primary train x: no rows or no columns"),
        ({"harmful_x": X[:, :2]}, "primary task has 3 features but the harmful task has 2"),
        ({"harmful_y": Y[:3]}, "harmful train: x has 4 rows but y has 3"),
        ({"harmful_x": X[0]}, r"harmful train x: expected 2 axes, got shape \(3,\)"),
        ({"primary_x": X.astype(complex)}, "primary train x: expected numbers, got dtype complex"),
        (
            {"primary_x": np.array([[1, 2], [3, "red"]], object), "primary_y": Y[:2]},
            r"row 1, column 1 is 'red'.*encode",
        ),
        ({"primary_x": [["a", "1"]] * 4}, r"dtype <U1 \(row 0, column 0 is 'a'\)"),
        ({"primary_x": [[1.0, 2.0], [3.0]]}, "rows have different lengths"),
        ({"primary_x": X[:1], "primary_y": Y[:1]}, "1 row cannot be split"),
        ({"primary_x_held_out": X}, "give both primary_x_held_out and primary_y_held_out"),
        (
            {"primary_x_held_out": X[:, :2], "primary_y_held_out": Y},
            "3 features in the training rows but 2 in the held-out rows",
        ),
        (
            {"harmful_x_held_out": with_entry(np.inf), "harmful_y_held_out": Y},
            "harmful held-out x: row 2, column 1 is inf",
        ),
        ({"harmful_x_held_out": X, "harmful_y_held_out": X}, "only the number of rows may differ"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must be in"),
        ({"kind": "ordinal"}, "unknown kind 'ordinal'; choose from"),
        ({"kind": "binary"}, "targets must be -1 or"),
    ],
)
def test_bad_arrays_are_refused_with_the_place(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_pair(**changes)
    assert "\n" not in str(caught.value)


def test_good_arrays_pass_unchanged_as_float64():
    pair = make_pair(primary_x=X.astype(np.float32), harmful_y=Y.astype(int), held_out_fraction=0.5)
    np.testing.assert_array_equal(pair.primary.train.x, X[:2])
    np.testing.assert_array_equal(pair.primary.held_out.x, X[2:])
    np.testing.assert_array_equal(pair.harmful.held_out.y, Y[2:])
    assert all(
        values.dtype == np.float64
        for task in (pair.primary, pair.harmful)
        for split in (task.train, task.held_out)
        for values in split
    )
    many = make_pair(primary_y=X, harmful_y=X)  # several targets a row
    assert many.primary.train.y.shape == (3, 3)


@pytest.mark.parametrize(("fraction", "held_out"), [(1e-6, 1), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_a_split_leaves_a_row_on_each_side(fraction, held_out):
    pair = make_pair(held_out_fraction=fraction)
    assert len(pair.primary.held_out.x) == held_out
    assert len(pair.primary.train.x) == 4 - held_out


def test_checks_reach_hand_made_pairs():
    good = make_pair()
    bad = good._replace(harmful=good.harmful._replace(train=Split(X, Y[:1])))
    with pytest.raises(ValueError, match="harmful train: x has 4 rows but y has 1"):
        check_pair(bad)
    with pytest.raises(ValueError, match="binary task"):
        check_task(Task("t", Split(X, Y), Split(X, Y), "binary"))
    assert check_task(Task("t", Split(X, np.sign(Y - 0.5)), Split(X, -(Y**0)), "binary"))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_inputs_shared_sees_equal_grams_whatever_the_rows(factor):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 5))
    rotation = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    split = lambda rows: Split(rows, np.zeros(len(rows)))  # noqa: E731
    task = lambda rows: Task("t", split(rows), split(rows), "regression")  # noqa: E731
    # Other rows, same X^T X up to the factor; and n doubled, which the mean convention absorbs.
    other = np.concatenate([rotation @ x, x]) * np.sqrt(factor)
    verdict = data.inputs_shared(TaskPair("p", task(x), task(other), "", ""))
    assert verdict.shared
    assert "ratio is 1" in verdict.message
    assert ("up to the factor 3" in verdict.message) == (factor == 3.0)
    # One entry of the Gram matrix moved by 1e-4 is enough to tell the two apart.
    moved = other.copy()
    moved[:, 2] *= 1 + 1e-4
    assert not data.inputs_shared(TaskPair("p", task(x), task(moved), "", "")).shared


def test_inputs_shared_with_all_zero_inputs():
    good = make_pair()
    zero = Split(np.zeros_like(X), Y)
    verdict = data.inputs_shared(good._replace(harmful=good.harmful._replace(train=zero)))
    assert not verdict.shared
    assert "all zero" in verdict.message


@pytest.mark.parametrize("name", ["house_prices", "mnist_pairs"])
def test_loading_twice_gives_the_same_pair(name):
    first, second = data.load(name), data.load(name)
    assert first.name == name
    for task in ("primary", "harmful"):
        for split in ("train", "held_out"):
            one, two = (getattr(getattr(pair, task), split) for pair in (first, second))
            np.testing.assert_array_equal(one.x, two.x)
            np.testing.assert_array_equal(one.y, two.y)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown data set 'mnits'.*'mnist_pairs'"):
        data.load("mnits")
    with pytest.raises(ValueError, match=r"unknown data set 'mnits'"):
        data.load("mnits", data.make_config("house_prices"))
    with pytest.raises(ValueError, match=r"unknown config key 'rows'.*'train_rows'"):
        data.load("house_prices", rows=3)
    with pytest.raises(ValueError, match="expected a HousePricesConfig, got a MnistPairConfig"):
        data.load("house_prices", data.make_config("mnist_pairs"))
    with pytest.raises(ValueError, match="not both"):
        data.load("house_prices", data.make_config("house_prices"), train_rows=3)
