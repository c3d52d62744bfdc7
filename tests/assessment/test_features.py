"""Condition numbers of deep features against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.linalg import DOMINANCE
from jaximm.measures import best_classifier_accuracy
from jaximm.measures import groups as row_groups
from jaximm.measures.conditioning import FEATURE_DAMPING, FEATURE_RTOL, kappas, task_rows
from jaximm.types import Batch

NOISE = np.random.default_rng(3).normal(size=(40, 1))


def log_kappa(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    return 2 * np.log(values[0] / values[-1])


@pytest.mark.heavy
@pytest.mark.parametrize(("n", "d"), [(40, 6), (5, 9)])
def test_every_footing_is_numpys(n, d):
    rng = np.random.default_rng(n)
    features = rng.normal(size=(n, d)) * np.geomspace(1, 1e-2, d) + 0.5
    neck, bias = rng.normal(size=(d, d)), rng.normal(size=d)
    lam = FEATURE_DAMPING * np.sum(features**2) / features.size
    rows = task_rows(features, damping=FEATURE_DAMPING)
    assert float(rows.damping) == pytest.approx(lam)
    found = kappas(rows, jnp.asarray(neck), jnp.asarray(bias), rtol=FEATURE_RTOL)
    factor = np.concatenate([features / np.sqrt(n), np.sqrt(lam) * np.eye(d)]) @ neck
    moved = features @ neck + bias
    assert float(found.damped.log_kappa) == pytest.approx(log_kappa(factor), rel=1e-6)
    assert float(found.pseudo_inverse.log_kappa) == pytest.approx(log_kappa(moved), rel=1e-6)
    assert int(found.pseudo_inverse.rank) == int(found.damped.rank) == min(n, d)
    values = np.zeros(d)
    values[: min(n, d)] = np.linalg.svd(moved, compute_uv=False) ** 2 / n
    reference = np.log((values[0] + 1e-6) / (values[-1] + 1e-6))
    assert float(found.reference.log_kappa) == pytest.approx(reference, rel=1e-5)
    expected = np.linalg.svd(factor, compute_uv=False) ** 2
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-6)


@pytest.mark.heavy
def test_a_dead_feature_leaves_the_rank_and_not_the_damped_kappa():
    features = np.random.default_rng(0).normal(size=(50, 4))
    features[:, 2] = 0
    found = kappas(task_rows(features, damping=FEATURE_DAMPING), rtol=FEATURE_RTOL)
    assert int(found.pseudo_inverse.rank) == 3
    assert np.isfinite(float(found.damped.log_kappa))
    assert float(found.damped.log_kappa) > float(found.pseudo_inverse.log_kappa)


@pytest.mark.heavy
def test_a_direction_that_a_float32_neck_removes_is_rounding():
    rng = np.random.default_rng(2)
    rows = task_rows(rng.normal(size=(60, 5)), damping=FEATURE_DAMPING)
    gone = rng.normal(size=5)
    projection = np.eye(5) - np.outer(gone, gone) / (gone @ gone)
    kept = kappas(rows, jnp.asarray(np.eye(5), jnp.float32), rtol=FEATURE_RTOL)
    lost = kappas(rows, jnp.asarray(projection, jnp.float32), rtol=FEATURE_RTOL)
    assert DOMINANCE[int(kept.damped.dominated_by)] != "rounding"
    assert DOMINANCE[int(lost.damped.dominated_by)] == "rounding"


def test_groups_are_consecutive_rows():
    features = np.random.default_rng(1).normal(size=(47, 8)) + 1
    found = row_groups.group_log_kappas(features, groups=4, size=10)
    expected = [log_kappa(features[10 * g : 10 * (g + 1)]) for g in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert len(row_groups.group_log_kappas(features, groups=20, size=10)) == 4
    with pytest.raises(ValueError, match="a group needs 100 rows"):
        row_groups.group_log_kappas(features, size=100)


def test_group_summary_is_the_mean_of_log_ratios():
    before = {"harmful": np.array([1.0, 2.0]), "primary": np.array([3.0, 5.0])}
    after = {"harmful": np.array([4.0, 6.0]), "primary": np.array([3.0, 4.0])}
    found = row_groups.group_summary(before, after, size=7)
    assert found["log_rir"] == {"mean": 4.0, "sd": pytest.approx(np.sqrt(2))}
    assert found["log_ratio_primary"]["mean"] == -0.5
    assert (found["groups"], found["rows"]) == (2, 7)


@pytest.mark.parametrize(("n", "d"), [(60, 5), (12, 20)])
def test_the_classifier_is_ridge_on_one_hot_labels(n, d):
    rng = np.random.default_rng(d)
    labels = rng.integers(0, 3, 3 * n)
    x = rng.normal(size=(3 * n, d)) + 2 * np.eye(3, d)[labels]
    parts = [Batch(x[i::3], jnp.asarray(labels[i::3], jnp.int32)) for i in range(3)]
    found = best_classifier_accuracy(*parts, classes=3)
    train, unseen = np.asarray(parts[0].x), np.asarray(parts[2].x)
    targets = np.eye(3)[np.asarray(parts[0].y)]
    centred = train - train.mean(0)
    lam = found.penalty * np.sum(centred**2) / d
    kernel = np.linalg.solve(centred.T @ centred + lam * np.eye(d), centred.T @ targets)
    logits = (unseen - train.mean(0)) @ kernel + targets.mean(0)
    assert found.held_out == pytest.approx(np.mean(logits.argmax(1) == np.asarray(parts[2].y)))
    assert found.selection > 0.6


@pytest.mark.heavy
def test_equal_scores_share_the_guess():
    labels = jnp.asarray(np.arange(40) % 4, jnp.int32)
    rows = Batch(1e-9 * jax.nn.one_hot(labels, 4, dtype=float) + 1.0, labels)
    features = rows._replace(x=jnp.concatenate([rows.x, jnp.asarray(NOISE)], axis=1))
    found = best_classifier_accuracy(features, features, features, classes=4)
    assert found.train < 0.5  # what is left is noise, fitted by least squares
    constant = Batch(jnp.ones((40, 2)) + 1e-12 * rows.x[:, :2], labels)
    assert best_classifier_accuracy(constant, constant, constant, classes=4).held_out == 0.25
