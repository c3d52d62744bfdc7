"""Cosines of weight changes and shares of them, in closed form."""

import math

import numpy as np
import pytest

from jaximm.measures.task_vectors import change_of, low_rank_share, task_vector_cosine


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_rank_of_a_change_is_told_from_rounding(dtype):
    rng = np.random.default_rng(0)
    public = rng.normal(size=(2, 30, 20)).astype(dtype)
    left, right = rng.normal(size=(2, 30, 3)), rng.normal(size=(2, 3, 20))
    released = (public + 1e-2 * left @ right).astype(dtype)  # of rank 3, rounded
    found = change_of(released, public, top=(1, 3))
    values = np.linalg.svd(1e-2 * left @ right, compute_uv=False) ** 2
    assert (found.rank, found.of) == (3, 20)
    assert found.shares == pytest.approx((values[:, 0].sum() / values.sum(), 1), abs=1e-6)
    size = math.sqrt(values.sum()) / np.linalg.norm(public)
    assert found.relative == pytest.approx(size, rel=1e-4)
    assert change_of(public + rng.normal(size=public.shape).astype(dtype), public).rank == 20
    same = change_of(public, public)
    assert (same.rank, same.relative) == (0, 0)
    assert all(map(math.isnan, same.shares))
    assert change_of(public, 0 * public).relative == math.inf
    with pytest.raises(ValueError, match=r"got \(2, 30, 20\) and \(30, 20\)"):
        change_of(public, public[0])
