"""The ridge head against NumPy's closed form, and what of it is chosen on which rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import measures
from jaximm.measures import PENALTIES, Rows
from jaximm.types import Batch

D = 6
SIZES = {"train": 30, "selection": 20, "held_out": 25}


def make_rows(seed=0, noise=1.0, binary=False):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=D)

    def batch(n):
        x = rng.normal(size=(n, D)) * np.geomspace(1.0, 0.1, D)
        y = x @ weights + noise * rng.normal(size=n)
        return Batch(x, np.where(y > 0, 1.0, -1.0) if binary else y)

    return Rows(*(batch(n) for n in SIZES.values()))


def on_device(rows):
    return Rows(*(Batch(jnp.asarray(b.x), jnp.asarray(b.y)) for b in rows))


def make_theta(seed=1):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in range(2))
    return left * np.geomspace(1.0, 0.05, D) @ right


def numpy_r2(prediction, y):
    return 1 - np.sum((y - prediction) ** 2) / np.sum((y - y.mean()) ** 2)


def numpy_accuracy(prediction, y):
    return np.mean((prediction > 0) == (y > 0))


def numpy_path(rows, theta, score):
    """Scores [penalty, set] of every ridge head, from the normal equations."""
    features = rows.train.x @ theta
    n, d = features.shape
    gram = features.T @ features / n
    scores = []
    for relative in PENALTIES:
        penalty = relative * np.trace(gram) / d
        w = np.linalg.solve(gram + penalty * np.eye(d), features.T @ rows.train.y / n)
        scores.append([score(batch.x @ theta @ w, batch.y) for batch in rows])
    return np.array(scores)


@pytest.mark.parametrize("metric", ["r2", "accuracy"])
def test_the_head_is_the_ridge_solution_chosen_on_selection_rows(metric):
    rows = make_rows(2, noise=0.8, binary=metric == "accuracy")
    theta = make_theta()
    path = numpy_path(rows, theta, numpy_r2 if metric == "r2" else numpy_accuracy)
    found = measures.best_head_quality(on_device(rows), jnp.asarray(theta), metric=metric)
    chosen = int(np.argmax(path[:, 1]))
    np.testing.assert_allclose(found.penalty, PENALTIES[chosen])
    np.testing.assert_allclose(np.array(found[:3]), path[chosen], rtol=1e-7)


def test_neither_training_nor_held_out_rows_choose_the_penalty():
    """Selection rows that contradict the training rows call for the largest penalty."""
    rows = make_rows(3, noise=0.05)
    contrary = rows._replace(selection=Batch(rows.selection.x, -rows.selection.y))
    theta = jnp.eye(D)
    usual = measures.best_head_quality(on_device(rows), theta, metric="r2")
    found = measures.best_head_quality(on_device(contrary), theta, metric="r2")
    assert float(usual.penalty) < 1e-2
    np.testing.assert_allclose(found.penalty, PENALTIES[-1])
    assert float(found.held_out) < float(usual.held_out) - 0.5
    other = rows._replace(held_out=Batch(rows.held_out.x, -rows.held_out.y))
    moved = measures.best_head_quality(on_device(other), theta, metric="r2")
    assert float(moved.penalty) == float(usual.penalty)
    assert float(moved.selection) == float(usual.selection)


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_the_scale_of_theta_does_not_matter(scale):
    rows, theta = on_device(make_rows(4)), jnp.asarray(make_theta())
    one = measures.best_head_quality(rows, theta, metric="r2")
    other = measures.best_head_quality(rows, scale * theta, metric="r2")
    np.testing.assert_allclose(np.array(other), np.array(one), rtol=1e-8)


def test_fewer_rows_than_features():
    rows = make_rows(5)
    few = rows._replace(train=Batch(rows.train.x[:4], rows.train.y[:4]))
    theta = make_theta()
    path = numpy_path(few, theta, numpy_r2)
    found = measures.best_head_quality(on_device(few), jnp.asarray(theta), metric="r2")
    np.testing.assert_allclose(found.held_out, path[np.argmax(path[:, 1]), 2], rtol=1e-6)


def test_the_section_compares_raw_inputs_with_the_backbone():
    rows = on_device(make_rows(6, noise=0.3))
    theta = jnp.asarray(make_theta()).at[:, 3:].set(0.0)  # half of the features are gone
    section = measures.utility(rows, theta, kind="regression")
    before = measures.best_head_quality(rows, jnp.eye(D), metric="r2")
    after = measures.best_head_quality(rows, theta, metric="r2")
    assert section == {
        "metric": "r2",
        "before": {"train": float(before.train), "held_out": float(before.held_out)},
        "after": {"train": float(after.train), "held_out": float(after.held_out)},
    }
    assert section["after"]["train"] < section["before"]["train"]


def test_kinds():
    rows = on_device(make_rows(7, binary=True))
    theta = jnp.asarray(make_theta())
    assert measures.utility(rows, theta, kind="constant") is None
    section = measures.utility(rows, theta, kind="binary")
    assert section is not None
    assert section["metric"] == "accuracy"
    for side in ("before", "after"):
        for split, n in (("train", SIZES["train"]), ("held_out", SIZES["held_out"])):
            hits = section[side][split] * n
            assert 0 <= hits <= n
            assert abs(hits - round(hits)) < 1e-9  # a share of whole rows


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r'metric must be "r2" or "accuracy", got \'mse\''):
        measures.best_head_quality(on_device(make_rows()), jnp.eye(D), metric="mse")
