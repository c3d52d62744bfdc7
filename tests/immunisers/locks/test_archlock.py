"""ArchLock: each zero-cost score by its definition, ranks, simulated targets, and the search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.immunisers.locks import archlock
from jaximm.immunisers.locks.archlock import SPACE, Cell
from jaximm.types import Batch

ROWS, INPUTS, CLASSES = 12, 10, 3


def batch(seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, ROWS)
    return Batch(jnp.asarray(draw.standard_normal((ROWS, INPUTS))), jnp.asarray(labels, jnp.int32))


def test_the_space_and_its_codes():
    assert len(set(SPACE)) == len(SPACE) == 3 * 3 * 4 * 2 * 2
    codes = {tuple(archlock.encoding(cell)) for cell in SPACE}
    assert len(codes) == len(SPACE)
    assert archlock.encoding(Cell(2, 64, "sin", skip=True, pooled=False)).tolist() == [
        *(0, 1, 0),
        *(0, 0, 1),
        *(0, 0, 1, 0),
        *(1, 0),
    ]


def test_a_cell_is_its_formula():
    cell = Cell(2, 16, "tanh", skip=True, pooled=True)
    params = archlock.init_cell(cell, INPUTS, CLASSES, jax.random.key(0))
    assert [leaf.shape for leaf in params] == [(5, 16), (16, 16), (16, CLASSES)]
    x = np.asarray(batch().x)
    first = np.tanh((x[:, ::2] + x[:, 1::2]) / 2 @ np.asarray(params[0]))
    second = np.tanh(first @ np.asarray(params[1])) + first
    found = archlock.features(cell, params, batch().x)
    for layer, expected in zip(found, (first, second), strict=True):
        np.testing.assert_allclose(layer, expected, rtol=1e-10, atol=1e-12)


def test_zero_cost_scores_are_their_definitions():
    cell, rows, key = Cell(1, 16, "tanh", skip=False, pooled=False), batch(), jax.random.key(1)
    found = dict(
        zip(archlock.SCORES, archlock.zero_cost_scores(cell, rows, CLASSES, key), strict=True)
    )
    w, v = (np.asarray(leaf) for leaf in archlock.init_cell(cell, INPUTS, CLASSES, key))
    x, y = np.asarray(rows.x), np.asarray(rows.y)
    a = np.tanh(x @ w)
    p = np.exp(a @ v) / np.exp(a @ v).sum(axis=1, keepdims=True)
    wrong = p - np.eye(CLASSES)[y]
    back = wrong @ v.T  # dl_i / da_i
    slope_v, slope_w = a.T @ wrong / ROWS, x.T @ (back * (1 - a**2)) / ROWS
    assert found["fisher"] == pytest.approx(np.sum(np.sum(a * back, axis=0) ** 2), rel=1e-9)
    assert found["flops"] == 2 * (w.size + v.size)
    norm = np.sqrt(np.sum(slope_v**2) + np.sum(slope_w**2))
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-9)
    snip = np.abs(v * slope_v).sum() + np.abs(w * slope_w).sum()
    assert found["snip"] == pytest.approx(snip, rel=1e-9)
    signs = a > 0
    agree = [[np.sum(one == other) for other in signs] for one in signs]
    assert found["nwot"] == pytest.approx(np.linalg.slogdet(agree)[1], rel=1e-9)
    rows_of = ((1 - a**2) * v.sum(axis=1)) @ w.T
    values = np.clip(np.linalg.eigvalsh(np.corrcoef(rows_of)), 0, None) + 1e-5
    assert found["jacobian"] == pytest.approx(-np.sum(np.log(values) + 1 / values), rel=1e-3)

    def slopes(scale):  # theta . dL at theta + scale dL
        params = [jnp.asarray(w + scale * slope_w), jnp.asarray(v + scale * slope_v)]
        g = jax.grad(lambda p: jnp.mean(archlock.losses(cell, p, rows)))(params)
        return float(np.sum(w * np.asarray(g[0])) + np.sum(v * np.asarray(g[1])))

    difference = (slopes(1e-5) - slopes(-1e-5)) / 2e-5
    assert found["grasp"] == pytest.approx(-difference, rel=1e-5)


def test_simulated_targets_are_at_their_cosine_and_length():
    source = np.random.default_rng(0).standard_normal(16)
    found = archlock.simulate_targets(source, 5, 0.9, seed=1)
    lengths, length = np.linalg.norm(found, axis=1), np.linalg.norm(source)
    np.testing.assert_allclose(lengths, 0.9 * length, rtol=1e-12)
    np.testing.assert_allclose(found @ source / lengths / length, 0.9, rtol=1e-12)
    assert np.linalg.matrix_rank(found) == 5
    for cosine, vector in ((0.0, source), (1.1, source), (0.5, 0 * source)):
        with pytest.raises(ValueError, match="cosine must be in"):
            archlock.simulate_targets(vector, 2, cosine, seed=0)


@functools.cache
def searched():
    """A predictor of a made-up rule: wide is better on the source, deep on the target."""
    source, target = (np.asarray(task, np.float32) for task in ([1, 0, 0], [0, 1, 0]))
    pairs = []
    cells = SPACE[::4]
    for task, field in ((source, "width"), (target, "depth")):
        quality = np.array([getattr(cell, field) for cell in cells], float)
        pairs.append(archlock.labelled_pairs(cells, np.tile(quality[:, None], 7), task))
    both = archlock.Pairs(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))
    psi = archlock.fit_predictor(both, rng_key=jax.random.key(0))
    return psi, source, target


def test_the_majority_of_scores_labels_a_pair():
    cells = SPACE[:2]
    scores = np.array([[1.0] * 4 + [0.0] * 3, [0.0] * 4 + [1.0] * 3])
    pairs = archlock.labelled_pairs(cells, scores, np.zeros(2))
    assert pairs.wins.tolist() == [1.0, 0.0]
    assert pairs.inputs.shape == (2, 2 * 12 + 2)


@pytest.mark.heavy
def test_ranks_follow_the_rule_on_architectures_that_were_not_seen():
    psi, source, target = searched()
    cells = [cell for cell in SPACE if cell not in SPACE[::4]][:40]
    for task, field in ((source, "width"), (target, "depth")):
        ranks = archlock.ranks(psi, cells, task)
        values = np.array([getattr(cell, field) for cell in cells])
        means = [ranks[values == value].mean() for value in sorted(set(values))]
        assert means == sorted(means, reverse=True)  # the largest is beaten least
    with pytest.raises(ValueError, match="sample <= population"):
        archlock.SearchConfig(sample=11)


@pytest.mark.heavy
def test_the_search_finds_what_serves_the_source_and_not_the_target():
    psi, source, target = searched()
    config = archlock.SearchConfig(rounds=60)
    found = archlock.evolve(psi, source, target[None], config)
    assert (found.cell.depth, found.cell.width) == (1, 64)
    assert len(found.history) == 70
    assert archlock.evolve(psi, source, target[None], config) == found
