"""Cosines of weight changes and shares of them, in closed form."""

import math

import numpy as np
import pytest

from jaximm.measures.task_vectors import low_rank_share, task_vector_cosine


def trees(*values):
    return [{"a": np.array(one[:2]), "b": {"c": np.array(one[2:])[None]}} for one in values]


def test_the_cosine_is_over_all_parameters_at_once():
    start, released, tuned = trees([1.0, 2.0, 3.0], [2.0, 2.0, 5.0], [2.0, 7.0, 3.0])
    # The defence moved by (1, 0, 2), tuning by (0, 5, -2).
    expected = -4 / math.sqrt(5 * 29)
    found = task_vector_cosine(start=start, released=released, tuned=tuned)
    assert found == pytest.approx(expected, rel=1e-12)
    back = task_vector_cosine(start=start, released=released, tuned=start)
    assert back == pytest.approx(-1, abs=1e-12)
    assert math.isnan(task_vector_cosine(start=start, released=released, tuned=released))


def test_the_share_is_that_of_a_projection():
    rng = np.random.default_rng(0)
    defence, change = rng.normal(size=(6, 4)), rng.normal(size=(6, 5))
    u = np.linalg.svd(defence)[0][:, :2]
    expected = np.sum((u @ u.T @ change) ** 2) / np.sum(change**2)
    assert low_rank_share(change, defence, rank=2) == pytest.approx(expected, rel=1e-12)
    assert 0.05 < expected < 0.95
    values = np.linalg.svd(defence, compute_uv=False) ** 2
    own = low_rank_share(defence, defence, rank=3)
    assert own == pytest.approx(values[:3].sum() / values.sum(), rel=1e-12)
    assert math.isnan(low_rank_share(0 * change, defence, rank=1))
    with pytest.raises(ValueError, match=r"got \(6, 5\) and \(4, 6\)"):
        low_rank_share(change, defence.T, rank=1)
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        low_rank_share(change, defence, rank=0)
