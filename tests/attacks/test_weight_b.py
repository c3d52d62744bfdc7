"""Attackers of weights that mix tasks, or edit, undo or solve for something before fine-tuning.

Each against a plain NumPy or optax reference, and all of them: they learn, run batched and in
either loop alike, in both precisions and for real targets, and the same seed gives the same run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned

from jaximm import attacks
from jaximm.attacks.weights import (
    benign_drift,
    direction_ablation,
    draws,
    factor_insert,
    fine_tune,
    flops,
    logit_rescale,
    merge,
    mixed_loss,
    poison_mix,
    prune,
    quantise,
    refresh_statistics,
    solved_head,
    spectral_rebalance,
)
from jaximm.attacks.weights import problem as weights
from jaximm.objectives import objective
from jaximm.types import Batch, Head

pytestmark = pytest.mark.heavy

D_IN, HIDDEN, D, K = 5, 6, 7, 3
N, N_BENIGN, N_HELD_OUT = 90, 50, 41
N_TRAIN = 72  # of which are left after selection
RUN = {"batch_size": None, "record": 2, "keep_weights": True}
RATE = {"learning_rates": (3e-2,)}

KERNEL, SCALE = "blocks.2.kernel", "blocks.2.norm.scale"
CONV = "blocks.10.conv.kernel"
MEAN, VAR = "blocks.2.norm.mean", "blocks.2.norm.var"


def features_fn(params, x):
    """A batch norm whose statistics may come with the parameters, then a 1 x 2 "convolution"."""
    hidden = x @ params[KERNEL]
    mean = params.get(MEAN, jnp.zeros((HIDDEN,), x.dtype))
    var = params.get(VAR, jnp.ones((HIDDEN,), x.dtype))
    hidden = jnp.tanh((hidden - mean[None, :]) / jnp.sqrt(var)[None, :]) * params[SCALE][None, :]
    return jnp.tanh(hidden @ params[CONV].reshape(HIDDEN, D))


def refresh_fn(params, x):
    hidden = x @ params[KERNEL]
    return {**params, MEAN: jnp.mean(hidden, axis=0), VAR: jnp.var(hidden, axis=0)}


def _rows(n, seed, dtype, real):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D_IN))
    angle = np.mod(2 * np.arctan2(x[:, 0], x[:, 1]), 2 * np.pi)
    y = np.sin(angle) + x[:, 2]
    labels = jnp.asarray(angle // (2 * np.pi / K), jnp.int32)
    return Batch(jnp.asarray(x, dtype), jnp.asarray(y, dtype) if real else labels)


def _params(seed, dtype):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        KERNEL: jax.random.normal(keys[0], (D_IN, HIDDEN), dtype),
        SCALE: 1 + 0.1 * jax.random.normal(keys[1], (HIDDEN,), dtype),
        CONV: 0.5 * jax.random.normal(keys[2], (2, HIDDEN // 2, D), dtype),
    }


@functools.cache
def _problem(dtype="float64", real=False):
    keys = jax.random.split(jax.random.key(7), 2)
    k = 1 if real else K
    benign = _rows(N_BENIGN, 3, dtype, False).x + 0.5
    labels = (benign[:, 0] > 0).astype(jnp.int32)
    return attacks.fine_tune_problem(
        features_fn=features_fn,
        params=_params(0, dtype),
        head=Head(0.3 * jax.random.normal(keys[0], (D, k), dtype), jnp.ones((k,), dtype)),
        train=_rows(N, 1, dtype, real),
        held_out=_rows(N_HELD_OUT, 2, dtype, real),
        measured_rows=30,
        benign=weights.Benign(
            head=Head(jax.random.normal(keys[1], (D, 2), dtype), jnp.zeros((2,), dtype)),
            train=Batch(benign, labels),
            held_out=Batch(benign[:20], labels[:20]),
        ),
        public=_params(1, dtype),
        refresh_fn=refresh_fn,
    )


ATTACKS = {
    "mixed_loss": functools.partial(mixed_loss.mixed_loss, **RATE),
    "poison_mix": functools.partial(poison_mix.poison_mix, **RATE, fractions=(0.8,)),
    "benign_drift": functools.partial(benign_drift.benign_drift, **RATE, drift_steps=(20,)),
    "direction_ablation": functools.partial(direction_ablation.direction_ablation, **RATE),
    "spectral_rebalance": functools.partial(
        spectral_rebalance.spectral_rebalance, **RATE, strengths=(1.0,)
    ),
    "factor_insert": functools.partial(factor_insert.factor_insert, **RATE),
    "solved_head": functools.partial(
        solved_head.solved_head, **RATE, penalties=(1e-3,), logit_scales=(3.0,)
    ),
    "quantise_then_tune": functools.partial(quantise.quantise_then_tune, **RATE, bits=(4,)),
    "prune_then_tune": functools.partial(prune.prune_then_tune, **RATE, fractions=(0.5,)),
    "merge_with_public": functools.partial(merge.merge_with_public, **RATE, mixes=(0.25,)),
    "refresh_statistics": functools.partial(refresh_statistics.refresh_statistics, **RATE),
    "logit_rescale": functools.partial(logit_rescale.logit_rescale, **RATE, head_scales=(0.05,)),
}
BOTH_TASKS = ("mixed_loss", "poison_mix", "benign_drift")


@functools.cache
def _problem_of(name, dtype="float64", real=False):
    """Without a benign task where it is not used: less to compile."""
    problem = _problem(dtype, real)
    if "benign" in _attack(name).needs:
        return problem
    return dataclasses.replace(problem, benign=None)


def _attack(name):
    return ATTACKS[name]()


@functools.cache
def _trace(name):
    """Sixty steps from two seeds: shared by the tests below."""
    return attacks.run_fine_tune(_attack(name), _problem_of(name), steps=60, seeds=(0, 3), **RUN)


def _access(problem, seed=0):
    return draws._access(
        draws._held(problem, problem.train.x.shape[0]),
        jnp.int32(seed),
        problem.functions,
    )


def _cell(name, **changes):
    (cell,) = _attack(name).grid
    return {key: jnp.asarray(float(value)) for key, value in {**cell, **changes}.items()}


def _start(name, problem=None, **changes):
    """The state at step 0."""
    access = _access(_problem_of(name) if problem is None else problem)
    return _attack(name).init(access, _cell(name, **changes))


def _descended(attack, problem, *, steps):
    """Weights of each cell after steps on all rows, by one loop that measures nothing."""
    access = _access(problem)
    rows = weights.Batches(problem.train, problem.benign and problem.benign.train, access.seed)

    @jax.jit
    def run(cell):
        def body(_, state):
            return attack.update(state, rows, access, cell)

        return jax.lax.fori_loop(0, steps, body, attack.init(access, cell)).weights

    return [
        run({key: jnp.asarray(float(value)) for key, value in cell.items()}) for cell in attack.grid
    ]


def _first(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf[0, 0]), tree)


def _same(found, expected, rtol=1e-9, atol=1e-12):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for got, leaf in pairs:
        np.testing.assert_allclose(got, leaf, rtol=rtol, atol=atol)


def _harmful(found, batch):
    logits = features_fn(found.params, batch.x) @ found.head.kernel + found.head.bias[None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


def _benign(found, batch):
    return _harmful(found._replace(head=found.benign_head), batch)


@functools.partial(jax.jit, static_argnums=0)
def _adam_step(loss, found, opt_state, batch, rate):
    slopes = jax.grad(loss)(found, batch)
    updates, opt_state = optax.adam(rate).update(slopes, opt_state)
    return optax.apply_updates(found, updates), opt_state


def _adam(loss, found, batches, rate=3e-2):
    """Plain Adam from some weights, a batch a step."""
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optax.adam(rate).init(found)
        for batch in batches:
            found, opt_state = _adam_step(loss, found, opt_state, batch, rate)
    return found


# --- all of them ---------------------------------------------------------------------------


SOME = [
    name if name == "mixed_loss" else pytest.param(name, marks=pytest.mark.slow) for name in ATTACKS
]
"""A pattern each; the others are compiled by the slow suite."""


@pytest.mark.parametrize("name", thinned(ATTACKS, keep=5))
def test_it_learns_and_moves_the_benign_head_only_if_it_trains_it(name):
    trace = _trace(name)
    loss = np.asarray(trace.train_loss)[0]
    assert loss.dtype == np.float64
    assert (loss[:, -1] < 0.9 * loss[:, 0]).all()
    assert not np.asarray(trace.diverged).any()
    found = _first(trace.weights)
    held_out = _problem().held_out
    outputs = features_fn(found.params, held_out.x) @ found.head.kernel
    expected = optax.softmax_cross_entropy_with_integer_labels(
        outputs + found.head.bias[None], held_out.y
    )
    np.testing.assert_allclose(trace.held_out_loss[0, 0, -1], expected.mean(), rtol=1e-9)
    if "benign" in _attack(name).needs:
        kept = np.array_equal(found.benign_head.kernel, _problem().benign.head.kernel)
        assert kept == (name not in BOTH_TASKS)


@pytest.mark.parametrize("name", SOME)
def test_all_at_once_on_the_device_is_one_by_one_from_the_host_and_a_seed_fixes_a_run(name):
    one = _trace(name)
    many = attacks.run_fine_tune(
        _attack(name), _problem_of(name), steps=60, seeds=(3, 0), chunk=None, loop="device", **RUN
    )
    for field in ("train_loss", "held_out_loss", "selection_loss"):
        found, expected = np.asarray(getattr(many, field)), np.asarray(getattr(one, field))
        np.testing.assert_allclose(found[:, ::-1], expected, rtol=1e-6)
    # All rows at once, and nothing else is drawn: seeds idle.
    np.testing.assert_allclose(one.train_loss[:, 0], one.train_loss[:, 1], rtol=1e-12)
    assert one.step_flops > 0


@pytest.mark.parametrize("name", SOME)
def test_real_targets_in_float32(name):
    # What is computed in a step on them is shared: all but the start is only traced here.
    problem, attack = _problem("float32", real=True), _attack(name)
    access = _access(problem)
    rows = weights.Batches(problem.train, problem.benign.train, jax.random.key(0))
    cell = {key: value.astype(jnp.float32) for key, value in _cell(name).items()}
    state = attack.init(access, cell)
    loss = access.loss_fn(state.weights, problem.train)
    assert loss.dtype == jnp.float32
    assert np.isfinite(loss)
    assert state.weights.head.kernel.shape == (D, 1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.weights))
    after = jax.eval_shape(lambda state: attack.update(state, rows, access, cell), state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


@pytest.mark.slow
def test_real_targets_run_in_float32_and_again_the_same():
    problem = _problem_of("factor_insert", "float32", real=True)
    first, second = (
        attacks.run_fine_tune(_attack("factor_insert"), problem, steps=40, seeds=(1,), **RUN)
        for _ in "ab"
    )
    loss = np.asarray(first.train_loss)[0, 0]
    assert loss[-1] < 0.5 * loss[0]
    np.testing.assert_array_equal(first.train_loss, second.train_loss)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first.weights))


EDITS = (
    "direction_ablation",
    "spectral_rebalance",
    "solved_head",
    "quantise_then_tune",
    "prune_then_tune",
    "merge_with_public",
    "refresh_statistics",
    "logit_rescale",
)


@pytest.mark.parametrize("name", thinned(EDITS))
def test_after_the_edit_it_is_plain_adam(name):
    start = _start(name).weights
    loss, statistics = _harmful, {}
    if name == "refresh_statistics":
        params = dict(start.params)
        statistics = {path: params.pop(path) for path in (MEAN, VAR)}
        start = start._replace(params=params)

        def loss(found, batch):
            return _harmful(found._replace(params={**found.params, **statistics}), batch)

    found = _first(_trace(name).weights)
    for path, expected in statistics.items():
        np.testing.assert_allclose(found.params.pop(path), expected, rtol=1e-12)
    _same(found, _adam(loss, start, [_problem().train] * 60), rtol=1e-6, atol=1e-9)
    whole = start._replace(params={**start.params, **statistics})
    np.testing.assert_allclose(
        _trace(name).train_loss[0, 0, 0], _harmful(whole, _problem().measured), rtol=1e-9
    )


def test_default_grids_and_what_is_shared():
    for name, made in ATTACKS.items():
        attack, again = (attacks.make_attack(name) for _ in range(2))
        six = {"merge_with_public", "logit_rescale", "prune_then_tune"}
        six |= {"quantise_then_tune", "spectral_rebalance"}
        cells = {"solved_head": 10}  # from the smallest penalty that float32 tells from none
        assert len(attack.grid) == cells.get(name, 6 if name in six else 4), name
        assert made.func is attacks.WEIGHT_REGISTRY[name]
        assert (attack.init, attack.update) == (again.init, again.update)  # nothing compiles again
        for bound, _ in attack.natural_bounds:
            assert bound in attack.grid[0] or bound == "momentum"
    step = fine_tune.fine_tune_adam().update
    for name in (
        "direction_ablation",
        "logit_rescale",
        "merge_with_public",
        "prune_then_tune",
        "quantise_then_tune",
        "solved_head",
        "spectral_rebalance",
    ):  # one program for all
        assert _attack(name).update is step


@pytest.mark.parametrize(
    ("names", "without", "reason"),
    [
        ((*BOTH_TASKS, "direction_ablation"), {"benign": None}, "no benign task"),
        (("merge_with_public",), {"public": None}, "no public model"),
        (("refresh_statistics",), {"refresh_fn": None}, "no batch statistics"),
    ],
)
def test_what_a_problem_lacks_is_said(names, without, reason):
    problem = dataclasses.replace(_problem(), **without)
    for name in ATTACKS:
        expected = attacks.not_applicable(_attack(name), problem)
        assert (expected is None) == (name not in names)
    for name in names:
        with pytest.raises(ValueError, match=f"cannot be run here: .*{reason}"):
            attacks.run_fine_tune(_attack(name), problem, steps=1, batch_size=None)


# --- both tasks ----------------------------------------------------------------------------


def test_mixed_loss_is_adam_on_the_weighted_sum():
    def loss(found, batch):
        return _harmful(found, batch) + 2.5 * _benign(found, _problem().benign.train)

    expected = _adam(loss, _access(_problem()).weights, [_problem().train] * 3)
    attack = mixed_loss.mixed_loss(**RATE, benign_weights=(2.5,))
    trace = attacks.run_fine_tune(attack, _problem(), steps=3, **RUN)
    _same(_first(trace.weights), expected)


def test_poison_counts_the_first_rows_only():
    np.testing.assert_array_equal(
        poison_mix.row_weights(10, jnp.asarray(0.32)), [1 / 3] * 3 + [0] * 7
    )
    np.testing.assert_array_equal(poison_mix.row_weights(3, jnp.asarray(0.01)), [1, 0, 0])
    np.testing.assert_array_equal(poison_mix.row_weights(3, jnp.asarray(1.0)), [1 / 3] * 3)
    first = Batch(*(part[:58] for part in _problem().train))  # round(.8 * 72) = 58

    def loss(found, batch):
        return 0.8 * _harmful(found, batch) + 0.2 * _benign(found, _problem().benign.train)

    expected = _adam(loss, _access(_problem()).weights, [first] * 60)
    _same(_first(_trace("poison_mix").weights), expected, rtol=1e-6, atol=1e-9)


def test_drift_leaves_the_harmful_head_alone_and_then_starts_anew():
    attack = benign_drift.benign_drift(
        **RATE, weight_decays=(0.0, 0.1), drift_steps=(5,), head_scales=(0.5,)
    )
    access = _access(_problem())
    half = Head(*(0.5 * part for part in access.weights.head))
    benign = _problem().benign.train
    drifted = _adam(_benign, access.weights._replace(head=half), [benign] * 5)
    for steps in (4, 5, 8):
        trace = attacks.run_fine_tune(attack, _problem(), steps=steps, **RUN)
        if steps < 6:
            for cell in range(2):  # nor does weight decay move it
                _same(jax.tree.map(lambda leaf, c=cell: leaf[c, 0], trace.weights.head), half)
            moved = np.asarray(trace.weights.benign_head.kernel)
            assert (moved != np.asarray(_problem().benign.head.kernel)).all()
        if steps == 5:
            _same(_first(trace.weights), drifted)
    expected = _adam(_harmful, drifted, [_problem().train] * 3)
    _same(_first(trace.weights), expected)
    assert (np.asarray(expected.head.kernel) != half.kernel).all()
    with_decay = jax.tree.map(lambda leaf: leaf[1, 0], trace.weights.benign_head)
    assert (np.asarray(with_decay.kernel) != drifted.benign_head.kernel).any()  # decayed before


def _conflict():
    """Two features of two inputs, both read by the benign task along input 0; harmful: input 1."""
    x = jax.random.normal(jax.random.key(5), (200, 2))
    benign, harmful = ((x[:, i] > 0).astype(jnp.int32) for i in (0, 1))
    logits = jnp.array([[-3.0, 3.0], [-3.0, 3.0]])
    return attacks.fine_tune_problem(
        features_fn=lambda params, x: x @ params["w"],
        params={"w": jnp.array([[1.0, 0.5], [0.1, 0.0]])},
        head=Head(logits, jnp.zeros((2,))),
        train=Batch(x, harmful),
        held_out=Batch(x[:50], harmful[:50]),
        benign=weights.Benign(
            head=Head(logits, jnp.zeros((2,))),
            train=Batch(x, benign),
            held_out=Batch(x[:50], benign[:50]),
        ),
    )


@pytest.mark.slow
def test_mixed_loss_keeps_the_utility_that_plain_fine_tuning_loses():
    problem = _conflict()
    plain = fine_tune.fine_tune_adam(learning_rates=(0.03,))

    def accuracies(found):
        kept = found._replace(head=found.benign_head)
        return [
            float(jnp.mean(objective("classes").scores(
                weights.outputs_of(problem.features_fn, which, rows.x), rows.y)))
            for which, rows in ((found, problem.held_out), (kept, problem.benign.held_out))
        ]  # fmt: skip

    start = _access(problem).weights
    harmful, utility = accuracies(start)
    assert harmful < 0.75
    assert utility > 0.9
    (found,) = _descended(plain, problem, steps=200)
    harmful, utility = accuracies(found)
    assert harmful > 0.95
    assert utility < 0.75
    (found,) = _descended(_attack("mixed_loss"), problem, steps=200)
    harmful, utility = accuracies(found)
    assert harmful > 0.95
    assert utility > 0.95


# --- edits ---------------------------------------------------------------------------------


def test_ablation_takes_the_mean_difference_out_of_kernels_and_head():
    access = _access(_problem())
    gap = np.mean(access.features.x, axis=0) - np.mean(access.benign_features.x, axis=0)
    direction = gap / np.linalg.norm(gap)
    np.testing.assert_allclose(direction_ablation.mean_difference(access), direction, rtol=1e-9)
    found = _start("direction_ablation").weights
    start = _problem()
    projector = np.eye(D) - np.outer(direction, direction)
    np.testing.assert_allclose(found.params[CONV], start.params[CONV] @ projector, atol=1e-12)
    np.testing.assert_allclose(found.head.kernel, projector @ start.head.kernel, atol=1e-12)
    np.testing.assert_allclose(np.asarray(found.params[CONV]) @ direction, 0, atol=1e-12)
    np.testing.assert_allclose(direction @ np.asarray(found.head.kernel), 0, atol=1e-12)
    for path in (KERNEL, SCALE):  # another width, or a vector
        np.testing.assert_array_equal(found.params[path], start.params[path])
    _same(found.head.bias, start.head.bias)
    _same(found.benign_head, start.benign.head)
    alike = access._replace(benign_features=access.features)
    np.testing.assert_array_equal(direction_ablation.mean_difference(alike), np.zeros(D))


def test_ablated_linear_features_no_longer_tell_the_tasks_apart():
    conflict = _conflict()
    problem = dataclasses.replace(
        conflict, benign=dataclasses.replace(conflict.benign, train=Batch(
            conflict.train.x + jnp.array([[1.0, 2.0]]), conflict.benign.train.y[: N * 2 - 20]))
    )  # fmt: skip
    found = _start("direction_ablation", problem).weights

    def gap(params):
        features = [problem.features_fn(params, batch.x) for batch in (
            problem.train, problem.benign.train)]  # fmt: skip
        return np.linalg.norm(np.mean(features[0], axis=0) - np.mean(features[1], axis=0))

    assert gap(problem.params) > 1
    assert gap(found.params) < 1e-12


@pytest.mark.parametrize(("d_in", "d"), [(6, 6), (6, 4), (4, 6)])
def test_rebalancing_gives_a_linear_backbone_the_kappa_of_its_inputs(d_in, d):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, d_in)) * np.geomspace(1, 30, d_in)
    theta = rng.normal(size=(d_in, d)) * np.geomspace(1, 1e4, d)
    raw = x.T @ x

    def kappa(theta):
        values = np.linalg.svd(x @ theta, compute_uv=False)[: min(d_in, d)]
        return (values[0] / values[-1]) ** 2

    found = np.asarray(spectral_rebalance.rebalanced(jnp.asarray(theta), jnp.asarray(1.0)))
    assert kappa(theta) > 1e3 * np.linalg.cond(raw)
    if d >= d_in:
        np.testing.assert_allclose(kappa(found), np.linalg.cond(raw), rtol=1e-9)
    else:  # a compression
        assert kappa(found) <= np.linalg.cond(raw)
    left, values, right = np.linalg.svd(theta, full_matrices=False)
    mean = np.exp(np.mean(np.log(values)))
    np.testing.assert_allclose(found, mean * left @ right, rtol=1e-7, atol=1e-9 * mean)
    half = np.asarray(spectral_rebalance.rebalanced(jnp.asarray(theta), jnp.asarray(0.5)))
    expected = left * np.sqrt(mean * values) @ right
    np.testing.assert_allclose(half, expected, rtol=1e-7, atol=1e-9 * mean)


def test_rebalancing_leaves_vectors_and_takes_kernels_as_matrices():
    rng = np.random.default_rng(1)
    low = rng.normal(size=(7, 2)) @ rng.normal(size=(2, 5))
    found = spectral_rebalance.rebalanced(jnp.asarray(low), jnp.asarray(1.0))
    values = np.linalg.svd(low, compute_uv=False)
    after = np.linalg.svd(found, compute_uv=False)
    # The directions that were lost come back as strong as the others.
    np.testing.assert_allclose(after, np.sqrt(values[0] * values[1]), rtol=1e-9)
    half = spectral_rebalance.rebalanced(jnp.asarray(low), jnp.asarray(0.5))
    assert np.linalg.svd(half, compute_uv=False)[2:].max() < 1e-6 * values[0]
    zero = spectral_rebalance.rebalanced(jnp.zeros((3, 4)), jnp.asarray(1.0))
    np.testing.assert_array_equal(zero, np.zeros((3, 4)))
    start, edited = _problem().params, _start("spectral_rebalance").weights.params
    for path in (KERNEL, CONV):
        matrix = np.reshape(start[path], (-1, start[path].shape[-1]))
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        expected = np.exp(np.mean(np.log(values))) * left @ right
        np.testing.assert_allclose(edited[path], expected.reshape(start[path].shape), atol=1e-9)
    np.testing.assert_array_equal(edited[SCALE], start[SCALE])
    setup, step = spectral_rebalance.svd_flops(_problem())
    assert setup == 6 * 6 * 5**2 + 20 * 5**3 + 6 * 7 * 6**2 + 20 * 6**3  # 5 x 6, and 6 x 7
    assert step == 0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantisation_has_its_levels_a_channel(bits):
    start, edited = _problem().params, _start("quantise_then_tune", bits=bits).weights.params
    for path in (KERNEL, CONV):
        weight = np.asarray(start[path]).reshape(-1, start[path].shape[-1])
        found = np.asarray(edited[path]).reshape(weight.shape)
        delta = np.abs(weight).max(axis=0) / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(found, np.round(weight / delta) * delta, rtol=1e-12)
        levels = found / delta
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-9)
        assert np.abs(levels).max() == pytest.approx(2 ** (bits - 1) - 1)
        assert (np.abs(found - weight) <= delta / 2 * (1 + 1e-9)).all()
    np.testing.assert_array_equal(edited[SCALE], start[SCALE])
    zeros = quantise.quantised(jnp.zeros((3, 2)), jnp.asarray(8.0))
    np.testing.assert_array_equal(zeros, np.zeros((3, 2)))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_pruning_zeroes_a_fraction_of_the_smallest(fraction):
    start, edited = _problem().params, _start("prune_then_tune", fraction=fraction).weights.params
    for path in (KERNEL, CONV):
        weight, found = np.asarray(start[path]), np.asarray(edited[path])
        count = round(fraction * weight.size)
        gone = found == 0
        assert gone.sum() == count
        np.testing.assert_array_equal(found[~gone], weight[~gone])
        if count:
            assert np.abs(weight[gone]).max() < np.abs(weight[~gone]).min()
    np.testing.assert_array_equal(edited[SCALE], start[SCALE])
    tied = prune.pruned(jnp.ones((2, 3)), jnp.asarray(0.5))
    np.testing.assert_array_equal(tied, [[0, 0, 0], [1, 1, 1]])


def test_merging_is_the_average():
    edited = _start("merge_with_public", mix=0.25).weights
    for path, ours in _problem().params.items():
        expected = 0.75 * np.asarray(ours) + 0.25 * np.asarray(_problem().public[path])
        np.testing.assert_allclose(edited.params[path], expected, rtol=1e-12)
    _same(_start("merge_with_public", mix=1.0).weights.params, _problem().public)
    _same(edited.head, _problem().head)


def test_statistics_are_those_of_the_harmful_rows_and_are_not_trained():
    found = _first(_trace("refresh_statistics").weights).params
    hidden = np.asarray(_problem().train.x @ _problem().params[KERNEL])
    np.testing.assert_allclose(found[MEAN], hidden.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found[VAR], hidden.var(0), rtol=1e-9)
    for path, start in _problem().params.items():
        assert (found[path] != np.asarray(start)).all()
    attack = refresh_statistics.refresh_statistics(
        learning_rates=(1e-2,), weight_decays=(0.5,), rows=10
    )
    trace = attacks.run_fine_tune(attack, _problem_of("refresh_statistics"), steps=2, **RUN)
    spread = hidden[np.arange(10) * N_TRAIN // 10]
    np.testing.assert_allclose(_first(trace.weights).params[VAR], spread.var(0), rtol=1e-9)


def test_rescaling_divides_the_logits():
    trace = _trace("logit_rescale")
    start = _start("logit_rescale").weights
    _same(start.head, Head(*(0.05 * part for part in _problem().head)))
    logits = features_fn(_problem().params, _problem().measured.x) @ _problem().head.kernel
    logits = 0.05 * (logits + _problem().head.bias[None])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, _problem().measured.y)
    np.testing.assert_allclose(trace.train_loss[0, 0, 0], expected.mean(), rtol=1e-9)


# --- factor and solve ----------------------------------------------------------------------


def test_behind_the_factor_features_are_white_and_outputs_the_same():
    state = _start("factor_insert", damping=1e-12, head_scale=0.5)
    features = np.asarray(_access(_problem()).features.x)
    white = (features - np.asarray(state.mean)) @ np.asarray(state.root)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(D), atol=1e-6)
    covariance = np.cov(features.T, bias=True)
    np.testing.assert_allclose(state.root @ covariance @ state.root, np.eye(D), atol=1e-6)
    np.testing.assert_allclose(state.root, state.root.T, rtol=1e-9)
    half = Head(*(0.5 * np.asarray(part) for part in _problem().head))
    outputs = white @ np.asarray(state.whitened.kernel) + np.asarray(state.whitened.bias)
    np.testing.assert_allclose(outputs, features @ half.kernel + half.bias, rtol=1e-6)
    _same(state.weights.head, half)
    merged = factor_insert.merged_head(state.whitened, state.mean, state.root)
    _same(merged, half, rtol=1e-6)
    trace = attacks.run_fine_tune(
        _attack("factor_insert"), _problem_of("factor_insert"), steps=1, **RUN
    )
    expected = _harmful(_access(_problem()).weights, _problem().measured)
    np.testing.assert_allclose(trace.train_loss[0, 0, 0], expected, rtol=1e-9)


def test_a_step_behind_the_factor_is_adam_in_its_coordinates():
    state = _start("factor_insert")

    def loss(found, batch):
        params, whitened = found
        features = features_fn(params, batch.x)
        white = (features - state.mean[None]) @ state.root
        outputs = white @ whitened.kernel + whitened.bias[None]
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch.y).mean()

    start = state.weights.params, state.whitened
    params, whitened = _adam(loss, start, [_problem().train] * 3)
    trace = attacks.run_fine_tune(
        _attack("factor_insert"), _problem_of("factor_insert"), steps=3, **RUN
    )
    found = _first(trace.weights)
    _same(found.params, params, rtol=1e-6, atol=1e-9)
    kernel = state.root @ whitened.kernel
    _same(found.head, Head(kernel, whitened.bias - state.mean @ kernel), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [30, 5])
def test_the_spectrum_is_that_of_the_covariance_also_of_few_rows(n):
    features = np.random.default_rng(3).normal(size=(n, D)) * np.geomspace(1, 1e3, D) + 10
    found = factor_insert.feature_spectrum(jnp.asarray(features))
    covariance = np.cov(features.T, bias=True)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        found.function(found.variances), covariance, atol=1e-9 * covariance.max()
    )
    np.testing.assert_allclose(found.directions.T @ found.directions, np.eye(D), atol=1e-9)
    damped = found.damped(jnp.asarray(1e-3))
    expected = covariance + 1e-3 * np.trace(covariance) / D * np.eye(D)
    values, vectors = np.linalg.eigh(expected)
    root = vectors / np.sqrt(values) @ vectors.T
    np.testing.assert_allclose(found.function(1 / jnp.sqrt(damped)), root, rtol=1e-6, atol=1e-9)
    single = factor_insert.feature_spectrum(jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(  # a covariance in float32 would have none of these digits
        np.sqrt(single.variances[: min(n - 1, D)]),
        np.sqrt(found.variances[: min(n - 1, D)]),
        rtol=3e-3,
    )
    same = factor_insert.feature_spectrum(jnp.ones((n, D))).damped(jnp.asarray(1e-3))
    np.testing.assert_allclose(same, 1e-3)


def test_ill_conditioned_features_are_learnt_behind_the_factor():
    rng = np.random.default_rng(4)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    x = rng.normal(size=(120, D)) * np.geomspace(1, 1e-3, D) @ turn
    y = (x @ turn.T)[:, -1] * 1e3  # the smallest direction
    problem = attacks.fine_tune_problem(
        features_fn=lambda params, x: x,
        params={},
        head=attacks.zero_head(D, 1, jnp.float64),
        train=Batch(jnp.asarray(x), jnp.asarray(y)),
        held_out=Batch(jnp.asarray(x), jnp.asarray(y)),
    )

    def unexplained(attack):
        heads = [found.head for found in _descended(attack, problem, steps=100)]
        outputs = [x @ np.asarray(head.kernel)[:, 0] + float(head.bias[0]) for head in heads]
        return min(np.mean((found - y) ** 2) / np.var(y) for found in outputs)

    plain = fine_tune.fine_tune_adam(learning_rates=(1e-3, 1e-2, 1e-1))
    assert unexplained(plain) > 0.9
    assert unexplained(_attack("factor_insert")) < 0.05


@pytest.mark.parametrize("real", [False, True])
def test_the_solved_head_is_the_ridge_solution(real):
    problem = _problem("float64", real=real)
    found = _start("solved_head", problem, penalty=0.02).weights
    features = np.asarray(_access(problem).features.x)
    y = np.asarray(problem.train.y)
    targets = y[:, None] if real else np.eye(K)[y]
    centred = features - features.mean(0)
    covariance = centred.T @ centred / len(y)
    damped = covariance + 0.02 * np.trace(covariance) / D * np.eye(D)
    kernel = np.linalg.solve(damped, centred.T @ (targets - targets.mean(0)) / len(y))
    bias = targets.mean(0) - features.mean(0) @ kernel
    scale = 1 if real else 3
    np.testing.assert_allclose(found.head.kernel, scale * kernel, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.head.bias, scale * bias, rtol=1e-7, atol=1e-9)
    _same(found.params, problem.params)


def test_few_rows_and_constant_features_are_solved_too():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, D)))
    y = jnp.array([0.0, 1.0, 3.0, -1.0])
    head = solved_head.ridge_head(Batch(x, y), 1, jnp.asarray(1e-9))
    np.testing.assert_allclose((x @ head.kernel)[:, 0] + head.bias, y, atol=1e-5)  # interpolates
    flat = solved_head.ridge_head(Batch(jnp.ones((4, D)), y), 1, jnp.asarray(1e-6))
    np.testing.assert_array_equal(flat.kernel, np.zeros((D, 1)))
    np.testing.assert_allclose(flat.bias, [0.75])


def test_factorisations_are_in_the_price():
    solve = factor_insert.spectrum_flops(_problem())[0]
    assert solve == 2 * N_TRAIN * D * D + 12 * D**3
    for name in ("factor_insert", "solved_head"):
        attack = _attack(name)
        counted = flops.count_flops(attack, _problem(), attack.grid[0], batch_size=None)
        free = dataclasses.replace(attack, solve_flops=None, passes=0.0)
        before = flops.count_flops(free, _problem(), attack.grid[0], batch_size=None)
        forward = 2 * N_TRAIN * (D_IN * HIDDEN + HIDDEN * D)
        assert counted[0] - before[0] > solve + forward
        assert counted[0] - before[0] < solve + 2 * forward


def test_without_a_head_the_last_block_sets_the_scale_of_the_logits():
    headless = dataclasses.replace(_problem(), head=attacks.zero_head(D, K, jnp.float64))
    for problem in (_problem(), headless):
        start = _start("logit_rescale", problem, head_scale=0.05).weights
        scaled = problem is headless
        np.testing.assert_allclose(start.head.kernel, 0.05 * problem.head.kernel)
        np.testing.assert_allclose(
            start.params[CONV], (0.05 if scaled else 1.0) * problem.params[CONV]
        )
        np.testing.assert_array_equal(start.params[KERNEL], problem.params[KERNEL])


def test_tasks_draw_rows_of_their_own():
    """Equal row counts, and no common stream: tasks that share inputs do not meet in pairs."""
    problem = _problem()
    benign = dataclasses.replace(
        problem.benign, train=Batch(problem.train.x, jnp.zeros_like(problem.train.y))
    )
    held = draws._held(dataclasses.replace(problem, benign=benign), 16)
    drawn = draws._draw(held, np.int32(3), np.int32(0), batch_size=16, batched=False)
    assert drawn.harmful.shape == drawn.benign.shape
    same = np.mean(np.asarray(drawn.harmful) == np.asarray(drawn.benign))
    assert same < 0.1
