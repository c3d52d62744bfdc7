"""Inputs with class labels from a user's .npz file."""

import numpy as np
import pytest

from jaximm import data
from jaximm.data.images.labelled_arrays import pair_of_arrays

RNG = np.random.default_rng(0)
X, X_HARMFUL = RNG.normal(size=(12, 3, 2)), RNG.normal(size=(9, 3, 2))
Y, Y_HARMFUL = np.arange(12) * 5 % 3 + 7, np.array(list("abbababab"))
ARRAYS = {"primary_x": X, "primary_y": Y, "harmful_x": X_HARMFUL, "harmful_y": Y_HARMFUL}


def saved(path, **arrays):
    np.savez(path / "mine.npz", **(ARRAYS | {"harmful_y": (Y_HARMFUL == "b") * 1} | arrays))
    return {"path": str(path / "mine.npz")}


def test_labels_become_numbers_of_their_classes(tmp_path):
    pair = pair_of_arrays(**ARRAYS)
    assert pair.primary.classes == ("7", "8", "9")
    assert pair.harmful.classes == ("a", "b")
    labels = np.concatenate([pair.primary.train.y, pair.primary.held_out.y])
    np.testing.assert_array_equal(labels, Y - 7)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(pair.primary.held_out.x, X[9:])
    loaded = data.load("labelled_arrays", **saved(tmp_path))
    np.testing.assert_array_equal(loaded.primary.train.x, X[:9])
    assert loaded.as_inputs


def test_names_of_classes_say_that_labels_are_their_numbers(tmp_path):
    names = np.array(["z", "10", "9"])  # in another order than sorted
    fields = saved(tmp_path, primary_y=Y - 7, primary_classes=names)
    pair = data.load("labelled_arrays", **fields)
    assert pair.primary.classes == ("z", "10", "9")
    np.testing.assert_array_equal(pair.primary.train.y, Y[:9] - 7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"primary_y": Y[:5]}, "12 inputs but 5 labels"),
        ({"primary_y": Y + 0.5}, "whole numbers or texts"),
        ({"primary_y": np.stack([Y, Y], 1)}, "one label a row"),
        ({"primary_y": np.sort(Y)}, "sorted by label"),
        ({"primary_y": np.zeros(12, int)}, "at least two classes"),
        ({"primary_y": np.arange(12)[::-1]}, "has no training rows"),
        ({"primary_x": X.astype(int)}, "expected floating inputs"),
        ({"primary_x": np.where(X[4, 1, 1] == X, np.inf, X)}, "row 4 has an entry"),
        ({"harmful_x": X_HARMFUL[:, :2]}, "one model takes one shape"),
        ({"primary_x_held_out": X}, "give held-out inputs and their labels"),
        ({"primary_classes": ["a", "b"]}, "expected 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        pair_of_arrays(**(ARRAYS | changes))


def test_a_file_that_lacks_an_array_is_named(tmp_path):
    np.savez(tmp_path / "other.npz", primary_x=X)
    with pytest.raises(ValueError, match=r"other\.npz: expected .*primary_y is missing"):
        data.load("labelled_arrays", path=str(tmp_path / "other.npz"))
    with pytest.raises(ValueError, match="give path"):
        data.load("labelled_arrays")
