"""Movement between two sets of parameters, against closed forms."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import linalg
from jaximm.measures.movement import effective_rank, movement, spectrum


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def with_spectrum(values, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    k = len(values)
    return (orthonormal(rows, k, seed) * np.asarray(values)) @ orthonormal(columns, k, seed + 1).T


def test_a_scaled_kernel_moved_by_its_own_direction():
    kernel = with_spectrum([4.0, 2.0, 1.0], 7, 5)
    row = movement({"w": kernel}, {"w": 1.5 * kernel}).parameters[0]
    norm = math.sqrt(21.0)
    np.testing.assert_allclose(row.norm_before, norm, rtol=1e-12)
    np.testing.assert_allclose(row.norm_after, 1.5 * norm, rtol=1e-12)
    np.testing.assert_allclose(row.relative_norm, 0.5, rtol=1e-12)
    np.testing.assert_allclose(row.cosine, 1.0, rtol=1e-12)
    np.testing.assert_allclose(row.top_singular_values[:3], [2.0, 1.0, 0.5], rtol=1e-12)
    shares = np.array([16.0, 4.0, 1.0]) / 21
    expected = math.exp(-np.sum(shares * np.log(shares)))
    np.testing.assert_allclose(row.effective_rank, expected, rtol=1e-9)
    assert (row.shape, row.size, row.changed) == ((7, 5), 35, 35)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_effective_rank_counts_equal_directions(rank):
    kernel = with_spectrum([3.0, 2.0, 1.0, 0.5, 0.25], 9, 6)
    change = with_spectrum([1e-3] * rank, 9, 6, seed=5)
    row = movement({"w": kernel}, {"w": kernel + change}).parameters[0]
    np.testing.assert_allclose(row.effective_rank, rank, rtol=1e-6)
    np.testing.assert_allclose(row.top_singular_values[:rank], 1e-3, rtol=1e-9)
    np.testing.assert_allclose(row.norm_change, 1e-3 * math.sqrt(rank), rtol=1e-9)


def test_a_convolution_is_read_as_inputs_by_outputs():
    matrix = with_spectrum([8.0, 4.0, 2.0, 1.0], 3 * 2 * 5, 4)
    moved = with_spectrum([8.0, 4.0, 2.0, 0.01], 3 * 2 * 5, 4)
    row = movement(
        {"conv": matrix.reshape(3, 2, 5, 4)}, {"conv": moved.reshape(3, 2, 5, 4)}
    ).parameters[0]
    assert row.before is not None
    assert row.after is not None
    np.testing.assert_allclose(row.before.log_kappa, math.log(8.0), rtol=1e-12)
    np.testing.assert_allclose(row.after.log_kappa, math.log(800.0), rtol=1e-12)
    np.testing.assert_allclose((row.after.largest, row.after.smallest), (8.0, 0.01), rtol=1e-10)
    np.testing.assert_allclose(row.top_singular_values[0], 0.99, rtol=1e-9)
    assert (row.before.rank, row.after.rank) == (4, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spectra_are_those_of_linalg(dtype):
    kernel = with_spectrum([5.0, 1.0, 1e-2, 0.0], 8, 4).astype(dtype)
    found, expected = spectrum(kernel), linalg.condition_number(jnp.asarray(kernel))
    assert found is not None
    assert found.rank == int(expected.rank) == 3
    np.testing.assert_allclose(found.log_kappa, expected.log_kappa, rtol=1e-4)
    np.testing.assert_allclose(found.log_kappa, math.log(500), rtol=1e-4)
    np.testing.assert_allclose(found.tolerance, expected.tolerance, rtol=1e-5)


def test_opposite_orthogonal_and_zero_vectors():
    e1, e2, zero = np.array([2.0, 0.0]), np.array([0.0, 3.0]), np.zeros(2)
    before = {"opposite": e1, "orthogonal": e1, "born": zero, "died": e1, "still": zero}
    after = {"opposite": -e1, "orthogonal": e2, "born": e2, "died": zero, "still": zero}
    rows = {row.path: row for row in movement(before, after).parameters}
    assert rows["opposite"].cosine == -1.0
    assert rows["opposite"].relative_norm == 2.0
    assert rows["orthogonal"].cosine == 0.0
    assert rows["orthogonal"].relative_norm == pytest.approx(math.sqrt(13) / 2)
    assert rows["born"].relative_norm == math.inf
    assert math.isnan(rows["born"].cosine)
    assert rows["died"].relative_norm == 1.0
    assert rows["still"].relative_norm == 0.0
    assert all(row.top_singular_values == () and row.before is None for row in rows.values())
    assert [rows[name].changed for name in before] == [1, 2, 1, 1, 0]


def test_stages_add_up_added_and_removed_are_listed():
    rng = np.random.default_rng(0)
    before = {
        "blocks.1.kernel": rng.normal(size=(4, 3)),
        "blocks.1.bias": rng.normal(size=3),
        "blocks.11.kernel": rng.normal(size=(3, 5)),
        "classifier.kernel": rng.normal(size=(5, 2)),
        "old": np.ones(2),
    }
    after = {path: value.copy() for path, value in before.items() if path != "old"}
    after["blocks.1.kernel"] += 0.1
    after["blocks.1.bias"] *= 2
    after["neck.kernel"] = np.eye(5)
    found = movement(before, after, stage_names=("blocks.1", "blocks.11", "pool"))
    assert found.added == ("neck.kernel",)
    assert found.removed == ("old",)
    assert [row.path for row in found.stages] == ["blocks.1", "blocks.11"]
    first, eleventh = found.stages
    flat = [
        np.concatenate([side["blocks.1.kernel"].ravel(), side["blocks.1.bias"]])
        for side in (before, after)
    ]
    change = np.linalg.norm(flat[1] - flat[0])
    np.testing.assert_allclose(first.norm_change, change, rtol=1e-12)
    np.testing.assert_allclose(first.relative_norm, change / np.linalg.norm(flat[0]), rtol=1e-12)
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    np.testing.assert_allclose(first.cosine, cosine, rtol=1e-12)
    assert (first.size, first.changed) == (15, 15)
    assert (eleventh.relative_norm, eleventh.changed) == (0.0, 0)
    np.testing.assert_allclose(found.total.norm_change, change, rtol=1e-12)
    assert found.total.size == 15 + 15 + 10
    frozen = found.parameters[2]
    assert (frozen.path, frozen.before, frozen.relative_norm) == ("blocks.11.kernel", None, 0.0)


def test_half_precision_and_tiny_changes_are_measured_in_double():
    kernel = jnp.asarray(with_spectrum([1.0, 0.5], 6, 4), jnp.bfloat16)
    wide = np.asarray(kernel).astype(np.float64)
    found = movement({"w": kernel}, {"w": 2 * kernel}).parameters[0]
    np.testing.assert_allclose(found.norm_change, np.linalg.norm(wide), rtol=1e-12)
    tiny = movement({"w": wide}, {"w": wide + 1e-200}).parameters[0]
    assert tiny.changed == int(np.sum(wide + 1e-200 != wide))
    assert effective_rank(np.array([1e-200, 1e-200])) == pytest.approx(2.0)


def test_json_has_no_infinity_and_no_nan():
    found = movement(
        {"a": np.zeros((2, 3)), "b": np.full((2, 2), np.nan)},
        {"a": np.ones((2, 3)), "b": np.ones((2, 2))},
        stage_names=("a", "b"),
    )
    text = json.dumps(found.to_json(), allow_nan=False)
    back = json.loads(text)
    row = back["parameters"][0]
    assert (row["relative_norm"], row["cosine"], row["shape"]) == (None, None, [2, 3])
    assert row["before"] == {
        "largest": 0.0, "smallest": 0.0, "log_kappa": None, "rank": 0, "tolerance": 0.0
    }  # fmt: skip
    assert row["after"]["rank"] == 1
    broken = back["parameters"][1]
    assert (broken["relative_norm"], broken["cosine"], broken["before"]) == (None, None, None)
    assert back["stages"][1]["cosine"] is None


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"w has shape \(2,\) before and \(3,\)"):
        movement({"w": np.ones(2)}, {"w": np.ones(3)})
    with pytest.raises(ValueError, match=r"no parameter in common.*\['a'\].*\['b'\]"):
        movement({"a": np.ones(2)}, {"b": np.ones(2)})
