"""The erasing immuniser: what probes find after it, what it costs, batches, devices, heads."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned
from jax.sharding import PartitionSpec

from jaximm import immunisers
from jaximm.immunisers import THETA, Head, ProbeParams, Problem
from jaximm.immunisers.erase import EraseConfig, erase, erasure_report, state_eraser
from jaximm.types import Batch, PairedBatch

pytestmark = pytest.mark.heavy

D, KEY = 9, jax.random.key(0)


def house(seed=0, n=120):
    """Two regressions on standardised, correlated columns of very different variances."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(D, D)) * np.geomspace(1, 0.1, D)[None, :]

    def task(signal):
        x = rng.normal(size=(n, D)) @ mix
        x = (x - x.mean(axis=0)) / x.std(axis=0)
        y = x @ signal + 0.3 * rng.normal(size=n)
        return Batch(jnp.asarray(x), jnp.asarray((y - y.mean()) / y.std()))

    return PairedBatch(task(rng.normal(size=D)), task(rng.normal(size=D)))


def problem_of(arrays):
    return immunisers.linear_problem(arrays, damping_primary=1e-3, damping_harmful=1e-3)


def split_batches(arrays, cuts):
    edges = [0, *cuts, arrays.primary.x.shape[0]]
    return [
        jax.tree.map(lambda rows, a=a, b=b: rows[a:b], arrays) for a, b in itertools.pairwise(edges)
    ]


def run(immuniser, params, batches):
    state = immuniser.init(params, KEY)
    update = jax.jit(immuniser.update)
    for batch in batches:
        state, info = update(state, batch, KEY)
    return state, info


def r2(features, y, ridge=0.0):
    """In-sample R^2 of ridge without intercept, against predicting zero."""
    f, y = np.asarray(features, np.float64), np.asarray(y, np.float64)
    augmented = np.concatenate([f, np.sqrt(ridge * len(y)) * np.eye(f.shape[1])])
    padded = np.concatenate([y, np.zeros(f.shape[1])])
    w = np.linalg.lstsq(augmented, padded, rcond=1e-10)[0]
    return 1 - np.mean((f @ w - y) ** 2) / np.mean(y**2)


@pytest.mark.parametrize("metric", thinned(["primary", "harmful"]))
@pytest.mark.parametrize("start", thinned([3, None]))
def test_no_ridge_probe_of_the_harmful_task_beats_zero(metric, start):
    arrays = house()
    config = EraseConfig(metric=metric)
    params = immunisers.init_params(D, None if start is None else jax.random.key(start))
    state, info = run(erase(config, problem_of(arrays)), params, [arrays])
    found = erase(config, problem_of(arrays)).finish(state)
    features = arrays.harmful.x @ found.backbone[THETA]
    for ridge in (0.0, 1e-3, 1.0):
        assert r2(arrays.harmful.x, arrays.harmful.y, ridge) > 0.5
        assert abs(r2(features, arrays.harmful.y, ridge)) < 1e-10
    # The primary task keeps what the lost direction did not carry; its head is the ridge head.
    kept = r2(arrays.primary.x @ found.backbone[THETA], arrays.primary.y)
    assert 0.2 < kept < r2(arrays.primary.x, arrays.primary.y) - 1e-3
    error = arrays.primary.x @ found.backbone[THETA] @ found.head - arrays.primary.y
    np.testing.assert_allclose(1 - np.mean(error**2), kept, atol=5e-3)
    report = erasure_report(config, state)
    assert report.rank == 1
    assert 0 < report.cost_primary < 1
    np.testing.assert_allclose(info.task_loss, 0.5, rtol=1e-10)


def test_the_primary_metric_costs_the_primary_task_least():
    arrays = house()
    costs = {}
    for metric in ("primary", "harmful"):
        config = EraseConfig(metric=metric, damping=0.0)
        immuniser = erase(config, problem_of(arrays))
        state, _ = run(immuniser, immunisers.init_params(D, None), [arrays])
        report = erasure_report(config, state)
        costs[metric] = report.cost_primary, report.cost_harmful
    assert costs["primary"][0] < costs["harmful"][0] - 1e-3
    assert costs["harmful"][1] < costs["primary"][1] - 1e-3


@pytest.mark.parametrize("deep", thinned([True, False]))
def test_many_batches_are_one(deep):
    arrays, problem, params = deep_case() if deep else linear_case()
    immuniser = erase(EraseConfig(), problem)
    whole, _ = run(immuniser, params, [arrays])
    parts, _ = run(immuniser, params, split_batches(arrays, [40, 80]))
    assert parts.step == 3
    a, b = immuniser.finish(whole), immuniser.finish(parts)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-7, atol=1e-8), a, b)


def linear_case():
    arrays = house()
    return arrays, problem_of(arrays), immunisers.init_params(D, None)


CLASSES, HARMFUL, WIDTH = 4, 3, 6


def network(params, inputs):
    features = jnp.tanh(inputs @ params["body.kernel"])
    if "neck.kernel" in params:
        features = features @ params["neck.kernel"] + params["neck.bias"][None, :]
    return features


def deep_case(dtype=jnp.float64, neck=False, n=120):
    rng = np.random.default_rng(1)

    def task(classes):
        y = np.arange(n) % classes
        x = rng.normal(size=(n, D)) + rng.normal(size=(classes, D))[y]
        return Batch(jnp.asarray(x, dtype), jnp.asarray(y, jnp.int32))

    arrays = PairedBatch(task(CLASSES), task(HARMFUL))
    backbone = {"body.kernel": jnp.asarray(rng.normal(size=(D, WIDTH)) / 3, dtype)}
    if neck:
        kernel = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), dtype)
        backbone |= {"neck.kernel": kernel, "neck.bias": jnp.ones(WIDTH, dtype)}
    head = Head(jnp.asarray(rng.normal(size=(WIDTH, CLASSES)), dtype), jnp.ones(CLASSES, dtype))
    problem = Problem(
        features_fn=network,
        width=WIDTH,
        classes=CLASSES,
        harmful_classes=HARMFUL,
        optimiser=optax.sgd(0.1),
    )
    return arrays, problem, ProbeParams(backbone, head)


def gradient_at_the_constant(features, labels):
    """Largest gradient of softmax regression with an intercept, at the best constant."""
    f = np.asarray(features, np.float64)
    hot = np.eye(HARMFUL)[np.asarray(labels)]
    return np.abs(f.T @ (hot.mean(axis=0)[None, :] - hot) / len(f)).max()


@pytest.mark.parametrize("metric", thinned(["primary", "harmful"]))
@pytest.mark.parametrize("neck", thinned([True, False]))
@pytest.mark.parametrize("dtype", thinned([jnp.float32, jnp.float64]))
def test_a_deep_backbone_gets_an_erasing_neck(metric, neck, dtype):
    arrays, problem, params = deep_case(dtype, neck)
    config = EraseConfig(metric=metric)
    immuniser = erase(config, problem)
    state, _ = run(immuniser, params, [arrays])
    found = immuniser.finish(state)
    assert set(found.backbone) == {"body.kernel", "neck.kernel", "neck.bias"}
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(found.backbone["body.kernel"], params.backbone["body.kernel"])
    before = network(params.backbone, arrays.harmful.x)
    after = network(found.backbone, arrays.harmful.x)
    assert gradient_at_the_constant(before, arrays.harmful.y) > 1e-2
    eps = float(jnp.finfo(dtype).eps)
    assert gradient_at_the_constant(after, arrays.harmful.y) < 100 * eps
    # As the eraser says, the earlier neck included.
    eraser = state_eraser(config, state)
    expected = before.astype(jnp.float64) @ eraser.matrix + eraser.bias[None, :]
    np.testing.assert_allclose(after, expected, rtol=1e3 * eps, atol=1e3 * eps)


@pytest.mark.parametrize("deep", thinned([True, False]))
def test_no_float64_probe_finds_the_label_in_float32_features(deep):
    """Held-out R^2 of least squares on what the shipped backbone gives, rows far from zero too."""
    rng = np.random.default_rng(0)

    def task(n=400):
        x = rng.normal(size=(n, D)) + (20 if deep else 0)
        y = x[:, 0] + x[:, 1] + rng.normal(size=n)
        return x.astype(np.float32), y

    (primary, _), (harmful, y) = task(), task()
    fitted, unseen = slice(0, 300), slice(300, None)
    labels = (y > np.median(y)).astype(np.int32) if deep else (y - y.mean()).astype(np.float32)
    rows = jnp.asarray(harmful)
    other = Batch(jnp.asarray(primary[fitted]), jnp.asarray(labels[fitted]))
    arrays = PairedBatch(other, Batch(rows[fitted], jnp.asarray(labels[fitted])))
    if deep:
        features_fn = necked
        head = Head(jnp.ones((D, 2), jnp.float32), jnp.zeros(2, jnp.float32))
        problem = Problem(
            features_fn=features_fn,
            width=D,
            classes=2,
            harmful_classes=2,
            optimiser=optax.sgd(0.1),
        )
        params = ProbeParams({"body.kernel": jnp.eye(D, dtype=jnp.float32)}, head)
    else:
        features_fn = immunisers.linear_features
        problem, params = problem_of(arrays), immunisers.init_params(D, None, dtype=jnp.float32)
    immuniser = erase(EraseConfig(), problem)
    state, _ = run(immuniser, params, [arrays])
    found = immuniser.finish(state)

    def held_out(backbone):
        f = np.asarray(features_fn(backbone, rows), np.float64)
        f, z = f - f[fitted].mean(0), labels - labels[fitted].mean()
        weights = np.linalg.lstsq(f[fitted], z[fitted], rcond=1e-15)[0]
        return 1 - np.sum((f[unseen] @ weights - z[unseen]) ** 2) / np.sum(z[unseen] ** 2)

    after = features_fn(found.backbone, rows)
    assert after.dtype == jnp.float32
    assert np.sum(~np.asarray(after).any(axis=0)) == 1
    assert held_out(params.backbone) > 0.3
    assert held_out(found.backbone) < 0.05


def necked(params, inputs):
    features = inputs @ params["body.kernel"]
    if "neck.kernel" in params:
        features = features @ params["neck.kernel"] + params["neck.bias"][None, :]
    return features


@pytest.mark.parametrize("metric", ["primary", "harmful"])
def test_the_head_changes_the_primary_logits_least(metric):
    arrays, problem, params = deep_case()
    config = EraseConfig(metric=metric, damping=0.0, head_damping=1e-6)
    immuniser = erase(config, problem)
    state, _ = run(immuniser, params, [arrays])
    found = immuniser.finish(state)
    logits = np.asarray(network(params.backbone, arrays.primary.x) @ params.head.kernel) + 1
    features = np.asarray(network(found.backbone, arrays.primary.x))
    rows = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    best = rows @ np.linalg.lstsq(rows, logits, rcond=1e-10)[0]
    mine = features @ np.asarray(found.head.kernel) + np.asarray(found.head.bias)
    np.testing.assert_allclose(mine, best, atol=1e-4)
    assert np.abs(best - logits).max() > 1e-2  # what is lost cannot be made up for
    # In the primary metric the head behind r(x) keeps its kernel, and y @ lift is r(x).
    eraser = state_eraser(config, state)
    expected = np.where(eraser.removed[:, None], 0, eraser.lift @ params.head.kernel)
    moved = np.abs(found.head.kernel - expected).max()
    assert moved < 1e-8 if metric == "primary" else moved > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("deep", thinned([True, False]))
def test_eight_devices_agree_with_one_all_reduce(deep):
    arrays, problem, params = deep_case() if deep else linear_case()
    immuniser = erase(EraseConfig(), problem)
    state = immuniser.init(params, KEY)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, none = PartitionSpec("data"), PartitionSpec()
    mapped = jax.jit(
        jax.shard_map(
            lambda state, batch: immuniser.update(state, batch, KEY),
            mesh=mesh,
            in_specs=(none, data),
            out_specs=none,
            check_vma=False,
        )
    )
    compiled = mapped.lower(state, arrays).compile()
    text = compiled.as_text() or ""
    assert len(re.findall(r"= .* all-reduce(?:-start)?\(", text)) == 1
    assert not re.search(r"all-gather", text)
    got, got_info = compiled(state, arrays)
    expected, info = jax.jit(immuniser.update)(state, arrays, KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12),
        (got, got_info),
        (expected, info),
    )
    assert got.harmful.count == arrays.harmful.x.shape[0]


def test_update_keeps_the_state_and_traces_once():
    arrays, problem, params = deep_case()
    immuniser = erase(EraseConfig(), problem)
    traces = []

    @jax.jit
    def update(state, batch):
        traces.append(1)
        return immuniser.update(state, batch, KEY)[0]

    first = immuniser.init(params, KEY)
    second = update(first, arrays)
    third = update(second, arrays)
    assert len(traces) == 1
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s) for s in (first, third)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "both"}, "metric"),
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"head_damping": 0.0}, "head_damping"),
        ({"steps": 0}, "steps"),
    ],
)
def test_senseless_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EraseConfig(**fields)


def test_a_backbone_that_is_not_linear_needs_a_deep_problem():
    with pytest.raises(ValueError, match="classes"):
        erase(EraseConfig(), immunisers.Problem(features_fn=network))
