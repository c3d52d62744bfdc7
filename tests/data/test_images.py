import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import data
from jaximm.data import tasks
from jaximm.data.images import rows as image_rows
from jaximm.data.tasks import Split, Task, TaskPair


def make_split(n, *, side=4, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, side, side + 1, 3)).astype(np.uint8)
    return Split(pixels, (np.arange(n) % classes).astype(np.int64))


def make_task(name="t", **changes):
    task = Task(name, make_split(6, seed=1), make_split(4, seed=2), "classes", ("cat", "dog"))
    return task._replace(**changes)


def make_pair(primary=None, harmful=None):
    return TaskPair("p", primary or make_task("one"), harmful or make_task("two"), "", "")


GOOD = make_split(6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": GOOD._replace(x=GOOD.x / 255)}, r"t train: expected uint8.*float64"),
        (
            {"train": GOOD._replace(x=GOOD.x[..., 0])},
            r"expected RGB.*\(6, 4, 5\); repeat",
        ),
        ({"train": GOOD._replace(x=GOOD.x[..., :1])}, r"expected RGB.*\(6, 4, 5, 1\)"),
        ({"train": Split(GOOD.x[:0], GOOD.y[:0])}, "t train: no images"),
        ({"held_out": GOOD._replace(y=GOOD.y[:5])}, "held-out: 6 images but 5 labels"),
        ({"train": GOOD._replace(y=GOOD.y * 1.0)}, "one whole number a row.*float64"),
        ({"train": GOOD._replace(y=GOOD.y[:, None])}, "one whole number a row"),
        ({"train": GOOD._replace(y=GOOD.y + 1)}, r"row 1 has label 2.*\(3 such rows"),
        ({"train": GOOD._replace(y=GOOD.y - 1)}, "row 0 has label -1, expected 0 to 1"),
        ({"train": GOOD._replace(y=GOOD.y * 0)}, r"class 'dog' has no training rows \(1"),
        ({"held_out": make_split(2, side=5)}, r"training images are \(4, 5, 3\), held-out.*\(5, 6"),
        ({"classes": ("cat",), "train": GOOD._replace(y=0 * GOOD.y)}, "at least two"),
        ({"classes": ("cat", "cat")}, "two classes have one name"),
    ],
)
def test_bad_tasks_are_refused_with_the_place(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        tasks.check_pair(make_pair(make_task(**changes)))
    assert "\n" not in str(caught.value)


def test_a_good_pair_passes_with_int32_labels_and_may_have_two_sizes():
    large = make_task("two", train=make_split(6, side=7), held_out=make_split(3, side=7))
    pair = tasks.check_pair(make_pair(harmful=large))
    for task in (pair.primary, pair.harmful):
        assert task.train.y.dtype == task.held_out.y.dtype == np.int32
    np.testing.assert_array_equal(pair.primary.train.x, make_split(6, seed=1).x)


def test_a_class_may_be_missing_from_the_held_out_rows():
    held_out = make_split(4)._replace(y=np.zeros(4, np.int32))
    tasks.check_task(make_task(held_out=held_out))


def test_shared_images_are_detected_and_said():
    one = make_task("one")
    shuffled = Split(one.train.x[::-1], 1 - one.train.y)  # other labels: no matter
    twice = Split(np.concatenate([one.train.x] * 2), np.tile(one.train.y, 2))
    for train in (shuffled, twice):
        verdict = data.inputs_shared(make_pair(one, make_task("two", train=train)))
        assert verdict.shared
        assert verdict.overlap == len(train.y)
        assert "ratio is 1" in verdict.message
    # The same six images, one of them twice as often: other proportions, another Hessian.
    skewed = Split(np.concatenate([one.train.x, one.train.x[:1]]), np.arange(7) % 2)
    assert not data.inputs_shared(make_pair(one, make_task("two", train=skewed))).shared
    half = Split(np.concatenate([one.train.x[:2], make_split(4, seed=9).x]), one.train.y)
    verdict = data.inputs_shared(make_pair(one, make_task("two", train=half)))
    assert (verdict.shared, verdict.overlap) == (False, 2)
    assert "2 of the 6 harmful training images" in verdict.message
    verdict = data.inputs_shared(make_pair(one, make_task("two", train=make_split(6, seed=9))))
    assert (verdict.shared, verdict.overlap) == (False, 0)


def test_images_of_other_shape_and_equal_bytes_are_not_the_same():
    flat = make_split(6, seed=1).x  # [6, 4, 5, 3]
    turned = make_task(
        "two",
        train=Split(flat.reshape(6, 5, 4, 3), np.arange(6) % 2),
        held_out=Split(flat.reshape(6, 5, 4, 3), np.arange(6) % 2),
    )
    assert data.inputs_shared(make_pair(make_task("one"), turned)).overlap == 0


def test_balanced_rows_are_balanced_nested_and_keyed():
    labels = np.random.default_rng(4).permutation(np.repeat([0, 1, 2], [50, 40, 30]))
    draw = lambda rows, seed=0: image_rows.balanced_rows(labels, rows, seed=seed, where="t")  # noqa: E731
    for rows in (3, 20, 61, 90):
        chosen = draw(rows)
        assert len(set(chosen)) == rows
        counts = np.bincount(labels[chosen])
        assert counts.max() - counts.min() <= 1
        assert set(chosen) <= set(draw(rows + (rows < 90)))  # a smaller subset is part of a larger
    np.testing.assert_array_equal(draw(20), draw(20))
    assert set(draw(20)) != set(draw(20, seed=1))
    np.testing.assert_array_equal(np.sort(draw(None)), np.arange(120))
    assert (draw(None) != np.arange(120)).any()
    with pytest.raises(ValueError, match=r"t: asked for 93 rows, 31 of class 2, which has 30"):
        draw(93)
    with pytest.raises(ValueError, match="2 rows cannot hold each of 3 classes"):
        draw(2)


def test_take_classes_renumbers_in_the_order_asked_for():
    split = make_split(40, classes=4)
    taken = image_rows.take_classes(split, (3, 1), 6, seed=0, where="t")
    assert taken.y.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(taken.y), [3, 3])
    for image, label in zip(taken.x, taken.y, strict=True):
        (row,) = np.flatnonzero((split.x == image).all(axis=(1, 2, 3)))
        assert split.y[row] == (3, 1)[label]


def test_grey_to_rgb_is_a_view_and_what_is_taken_from_it_is_not():
    grey = np.random.default_rng(0).integers(0, 256, (10, 3, 4)).astype(np.uint8)
    view = image_rows.grey_to_rgb(grey)
    assert np.shares_memory(view, grey)
    split = Split(view, np.arange(10) % 2)
    taken = image_rows.take_classes(split, None, None, seed=0, where="t")
    assert taken.x.flags.c_contiguous
    assert taken.x.flags.writeable
    for channel in range(3):
        np.testing.assert_array_equal(
            np.sort(taken.x[..., channel].reshape(10, -1), axis=0),
            np.sort(grey.reshape(10, -1), axis=0),
        )


def test_paired_arrays_are_arrays_of_the_device():
    pair = tasks.check_pair(make_pair())
    for split in ("train", "held_out"):
        batch = data.paired_arrays(pair, split=split)
        rows = getattr(pair.harmful, split)
        assert batch.harmful.x.dtype == jnp.uint8
        assert batch.harmful.y.dtype == jnp.int32
        np.testing.assert_array_equal(batch.harmful.x, rows.x)
        np.testing.assert_array_equal(batch.harmful.y, rows.y)
    with pytest.raises(ValueError, match="split must be"):
        data.paired_arrays(pair, split="test")


def test_read_source_keeps_the_order_and_passes_errors_on():
    class Source:
        def __init__(self, broken=-1):
            self.broken = broken

        def __len__(self):
            return 50

        def __getitem__(self, row):
            if row == self.broken:
                raise ValueError(f"row {row} is broken")
            return np.full((2, 3, 3), row, np.uint8), row % 7

    split = image_rows.read_source(Source(), workers=4)
    np.testing.assert_array_equal(split.x[:, 1, 2, 0], np.arange(50))
    np.testing.assert_array_equal(split.y, np.arange(50) % 7)
    with pytest.raises(ValueError, match="row 31 is broken"):
        image_rows.read_source(Source(broken=31), workers=4)
    with pytest.raises(ValueError, match="no images"):
        image_rows.read_source([], workers=1)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown data set 'cifar'.*'cifar10_fashion'"):
        data.load("cifar")
    with pytest.raises(ValueError, match=r"unknown data set 'cifar'"):
        data.load("cifar", data.make_config("cifar10_split"))
    with pytest.raises(ValueError, match=r"unknown config key 'rows'.*'train_rows'"):
        data.load("cifar10_split", rows=3)
    with pytest.raises(ValueError, match="expected a Cifar10SplitConfig, got a Cifar10FashionC"):
        data.load("cifar10_split", data.make_config("cifar10_fashion"))
    config = data.make_config("cifar10_split")
    with pytest.raises(ValueError, match="not both"):
        data.load("cifar10_split", config, train_rows=3)
