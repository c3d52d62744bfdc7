"""Fine-tuning attackers against a plain optax loop, and what their rows say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned

from jaximm import attacks
from jaximm.attacks.weights import flops, measure
from jaximm.attacks.weights import loop as weight_run
from jaximm.data.batches import batch_indices
from jaximm.types import Batch

pytestmark = pytest.mark.heavy

D_IN, D, K = 5, 7, 3
N_TRAIN, N_HELD_OUT = 90, 41
RUN = {"steps": 40, "batch_size": 16, "record": 6, "seeds": (0, 3), "keep_weights": True}
KEY = jax.random.key(0)


def features_fn(params, x):
    return jnp.tanh(x @ params["hidden.kernel"] + params["hidden.bias"][None, :])


def _rows(n, seed, dtype):
    """Three classes that no linear function of x separates: sectors of a plane, doubled."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D_IN))
    angle = np.mod(2 * np.arctan2(x[:, 0], x[:, 1]), 2 * np.pi)
    return Batch(jnp.asarray(x, dtype), jnp.asarray(angle // (2 * np.pi / K), jnp.int32))


def _problem(dtype=jnp.float64, scale=1.0, **options):
    keys = jax.random.split(KEY, 3)
    params = {
        "hidden.kernel": scale * jax.random.normal(keys[0], (D_IN, D), dtype),
        "hidden.bias": jnp.zeros((D,), dtype),
    }
    head = attacks.Head(0.3 * jax.random.normal(keys[1], (D, K), dtype), jnp.ones((K,), dtype))
    return attacks.fine_tune_problem(
        **{
            "features_fn": features_fn,
            "params": params,
            "head": head,
            "train": _rows(N_TRAIN, 1, dtype),
            "held_out": _rows(N_HELD_OUT, 2, dtype),
            "measured_rows": 30,
            **options,
        }
    )


@functools.cache
def shared():
    """Made when first asked for: collecting compiles nothing."""
    return _problem()


def _loss(weights, batch):
    logits = features_fn(weights.params, batch.x) @ weights.head.kernel + weights.head.bias[None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


OPTIMISERS = {
    "fine_tune_sgd": lambda cell: optax.chain(
        optax.clip_by_global_norm(cell["clip"]),
        optax.sgd(cell["learning_rate"], momentum=cell["momentum"]),
    ),
    "fine_tune_adam": lambda cell: optax.adamw(
        cell["learning_rate"], weight_decay=cell["weight_decay"]
    ),
    "probe": lambda cell: optax.adam(cell["probe_learning_rate"]),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _optax_step(name, loss, cell, state, opt_state, batch):
    updates, opt_state = OPTIMISERS[name](cell).update(
        jax.grad(loss)(state, batch), opt_state, state
    )
    return optax.apply_updates(state, updates), opt_state


_INDICES = jax.jit(batch_indices, static_argnames=("n", "batch_size"))


def _optax_loop(name, loss, cell, state, train, *, steps, seed):
    """Plain Python: batch, gradient, update."""
    with jax.numpy_dtype_promotion("standard"):
        opt_state = OPTIMISERS[name](cell).init(state)
        for t in range(steps):
            rows = _INDICES(seed, t, n=len(train.y), batch_size=RUN["batch_size"])
            batch = Batch(train.x[rows], train.y[rows])
            state, opt_state = _optax_step(name, loss, cell, state, opt_state, batch)
    return state


def _probe_loss(head, batch):
    logits = batch.x @ head.kernel + head.bias[None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


def _start(problem=None, head_scale=1.0):
    problem = shared() if problem is None else problem
    head = attacks.Head(*(part * head_scale for part in problem.head))
    return attacks.ModelWeights(problem.params, head)


OPTIONS = {
    "fine_tune_sgd": {"learning_rates": (0.01, 0.3), "head_scales": (1, 0.5), "clips": (0.5,)},
    "fine_tune_adam": {"learning_rates": (1e-3, 3e-2), "weight_decays": (0.0, 0.1)},
}


def _best_cell(trace):
    """The cell of the lowest loss on selection rows at the end, over all seeds."""
    loss = np.sum(np.asarray(trace.selection_loss)[..., -1], axis=1)
    return int(np.argmin(np.where(np.isfinite(loss), loss, np.inf)))


@pytest.mark.parametrize("name", thinned(OPTIONS))
def test_a_run_is_a_plain_optax_loop_and_learns(name):
    attack = attacks.make_attack(name, **OPTIONS[name])
    trace = attacks.run_fine_tune(attack, shared(), **RUN)
    assert trace.weights is not None
    for c, cell in enumerate(attack.grid):
        for s, seed in list(enumerate(RUN["seeds"]))[c % 2 : c % 2 + 1]:
            start = _start(head_scale=cell["head_scale"])
            expected = _optax_loop(
                name, _loss, cell, start, shared().train, steps=RUN["steps"], seed=seed
            )
            found = jax.tree.map(lambda leaf, at=(c, s): leaf[at], trace.weights)
            for got, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(got, leaf, rtol=1e-6, atol=1e-9)
            at = (c, s, -1)
            for rows, field in ((shared().measured, "train"), (shared().held_out, "held_out")):
                np.testing.assert_allclose(
                    getattr(trace, f"{field}_loss")[at], _loss(expected, rows), rtol=1e-8
                )
            logits = features_fn(expected.params, shared().held_out.x) @ expected.head.kernel
            found = np.argmax(np.asarray(logits + expected.head.bias[None]), axis=1)
            right = found == np.asarray(shared().held_out.y)
            np.testing.assert_allclose(trace.held_out_quality[at], np.mean(right), rtol=1e-12)
            selection = _loss(expected, shared().selection)
            np.testing.assert_allclose(trace.selection_loss[c, s, -1], selection, rtol=1e-8)
    best = _best_cell(trace)
    final = np.asarray(trace.train_loss)[best, :, -1]
    assert (final < 0.8 * np.asarray(trace.train_loss)[best, :, 0]).all()
    assert trace.step.tolist() == attacks.recorded_steps(RUN["steps"], points=6).tolist()


def test_the_curve_is_read_off_one_trajectory():
    attack = attacks.make_attack("fine_tune_sgd", **OPTIONS["fine_tune_sgd"])
    trace = attacks.run_fine_tune(attack, shared(), **RUN)
    for point in (0, 3):
        steps = int(trace.step[point])
        weights_then = _optax_loop(
            "fine_tune_sgd", _loss, attack.grid[0], _start(), shared().train, steps=steps, seed=0
        )
        for field, rows in (("train", shared().measured), ("held_out", shared().held_out)):
            found = getattr(trace, f"{field}_loss")[0, 0, point]
            np.testing.assert_allclose(found, _loss(weights_then, rows), rtol=1e-9)
    steps = [0, *trace.step.tolist()[3:5], RUN["steps"]]  # the same curve where it is asked for
    asked = attacks.run_fine_tune(attack, shared(), **{**RUN, "record": steps})
    assert asked.step.tolist() == steps
    places = np.searchsorted(trace.step, steps)
    np.testing.assert_array_equal(asked.held_out_loss, trace.held_out_loss[..., places])


def test_the_backbone_is_trained_and_not_the_head_alone():
    # Nothing linear in tanh of a tiny kernel separates the classes: the features have to change.
    attack = attacks.make_attack("fine_tune_adam", **OPTIONS["fine_tune_adam"])
    trained = attacks.run_fine_tune(attack, _problem(scale=0.05), **{**RUN, "steps": 400})
    assert trained.weights is not None
    best = _best_cell(trained)
    moved = trained.weights.params["hidden.kernel"][best, 0]
    assert float(jnp.linalg.norm(moved)) > 10 * 0.05
    accuracy = float(trained.held_out_quality[best, 0, -1])
    rows = _rows(N_TRAIN, 1, jnp.float64)
    design = np.asarray(attacks.with_constant(rows.x))
    linear = np.linalg.lstsq(design, np.eye(K)[np.asarray(rows.y)], rcond=None)[0]
    held = np.asarray(attacks.with_constant(shared().held_out.x))
    plain = np.mean(np.argmax(held @ linear, axis=1) == np.asarray(shared().held_out.y))
    assert accuracy > plain + 0.1


def test_a_fresh_head_starts_from_guessing_and_a_warm_one_does_not():
    warm = attacks.make_attack("fine_tune_sgd", **OPTIONS["fine_tune_sgd"])
    fresh = attacks.make_attack("fresh_head_sgd", learning_rates=(0.01, 0.3), momenta=(0.9, 0.5))
    assert {cell["head_scale"] for cell in fresh.grid} == {0.0}
    from_zero = attacks.run_fine_tune(fresh, shared(), **RUN)
    from_head = attacks.run_fine_tune(warm, shared(), **RUN)
    np.testing.assert_allclose(from_zero.train_loss[..., 0], math.log(K), rtol=1e-12)
    assert (np.abs(np.asarray(from_head.train_loss)[..., 0] - math.log(K)) > 1e-3).any()
    assert (np.asarray(from_zero.train_loss)[0] != np.asarray(from_head.train_loss)[0]).all()
    # A head that is given as zeros is the same thing.
    given = dataclasses.replace(shared(), head=attacks.zero_head(D, K, jnp.float64))
    np.testing.assert_array_equal(
        attacks.run_fine_tune(warm, given, fresh.grid, **RUN).train_loss, from_zero.train_loss
    )


def test_a_probe_first_is_the_head_on_frozen_features_then_everything():
    attack = attacks.make_attack(
        "probe_then_fine_tune",
        learning_rates=(1e-2,),
        probe_learning_rates=(0.1,),
        probe_steps=25,
        probe_batch_size=16,
    )
    trace = attacks.run_fine_tune(attack, shared(), **{**RUN, "seeds": (3,)})
    features = features_fn(shared().params, shared().train.x)
    (cell,) = attack.grid
    head = _optax_loop(
        "probe",
        _probe_loss,
        cell,
        attacks.zero_head(D, K, jnp.float64),
        Batch(features, shared().train.y),
        steps=25,
        seed=3,
    )
    start = attacks.ModelWeights(shared().params, head)
    np.testing.assert_allclose(
        trace.train_loss[0, 0, 0], _loss(start, shared().measured), rtol=1e-9
    )
    assert float(trace.train_loss[0, 0, 0]) < 0.95 * math.log(K)
    expected = _optax_loop(
        "fine_tune_adam", _loss, cell, start, shared().train, steps=RUN["steps"], seed=3
    )
    assert trace.weights is not None
    np.testing.assert_allclose(
        trace.weights.params["hidden.kernel"][0, 0], expected.params["hidden.kernel"], rtol=1e-6
    )
    # Set-up: one pass over the rows and 25 steps of 4 b d k.
    forward = 2 * D_IN * D * len(features)
    assert trace.setup_flops > forward + 25 * 4 * RUN["batch_size"] * D * K
    assert trace.setup_flops < 2 * forward + 25 * 4 * RUN["batch_size"] * D * K


# --- how it runs ---------------------------------------------------------------------------


def test_a_second_grid_seed_problem_or_budget_compiles_nothing():
    options = OPTIONS["fine_tune_sgd"]
    attack = attacks.make_attack("fine_tune_sgd", **options)
    attacks.run_fine_tune(attack, shared(), **RUN)
    compiled = (weight_run._begin, weight_run._advance, measure._measure_block)
    before = [fun._cache_size() for fun in compiled]
    other = attacks.make_attack("fine_tune_sgd", **options | {"learning_rates": (0.02, 0.2)})
    again = attacks.run_fine_tune(
        other, _problem(scale=0.5), **{**RUN, "steps": 41, "seeds": (7, 1, 2)}
    )
    assert [fun._cache_size() for fun in compiled] == before
    assert again.train_loss.shape == (4, 3, len(attacks.recorded_steps(41, points=6)))


def test_a_seed_fixes_the_run_and_another_changes_it():
    attack = attacks.make_attack("fine_tune_sgd", **OPTIONS["fine_tune_sgd"])
    first = attacks.run_fine_tune(attack, shared(), **RUN)
    second = attacks.run_fine_tune(attack, shared(), **{**RUN, "seeds": (3, 0)})
    np.testing.assert_array_equal(first.train_loss[:, 0], second.train_loss[:, 1])
    np.testing.assert_array_equal(first.train_loss[:, 1], second.train_loss[:, 0])
    assert (np.asarray(first.train_loss)[:, 0, -1] != np.asarray(first.train_loss)[:, 1, -1]).all()


@pytest.mark.parametrize("chunk", thinned([3, None]))
def test_how_many_run_at_once_changes_no_number(chunk):
    attack = attacks.make_attack("fine_tune_sgd", **OPTIONS["fine_tune_sgd"])
    one = attacks.run_fine_tune(attack, shared(), **RUN)
    many = attacks.run_fine_tune(attack, shared(), chunk=chunk, **RUN)
    for field in ("train_loss", "held_out_loss", "selection_loss"):
        np.testing.assert_allclose(getattr(one, field), getattr(many, field), rtol=1e-9)


@pytest.mark.slow
def test_in_float32_and_with_all_rows_at_once():
    attack = attacks.make_attack("fine_tune_sgd", **OPTIONS["fine_tune_sgd"])
    problem = _problem(jnp.float32)
    trace = attacks.run_fine_tune(attack, problem, **{**RUN, "batch_size": None})
    assert trace.train_loss.dtype == jnp.float32
    np.testing.assert_array_equal(trace.train_loss[:, 0], trace.train_loss[:, 1])  # seeds idle
    # Full-batch descent with momentum at this rate falls all the way.
    assert (np.diff(np.asarray(trace.train_loss)[0, 0]) < 0).all()


def test_divergence_is_seen():
    attack = attacks.make_attack("fine_tune_sgd", **OPTIONS["fine_tune_sgd"])
    grid = attacks.grid_product(
        learning_rate=(1e6, 0.3), momentum=(0.9,), clip=(1e9,), head_scale=(1, 0.5)
    )
    trace = attacks.run_fine_tune(attack, shared(), grid, **RUN)
    np.testing.assert_array_equal(trace.diverged[:, 0], [True, True, False, False])
    broken = dataclasses.replace(
        shared(), params={**shared().params, "hidden.bias": jnp.full((D,), jnp.nan)}
    )
    lost = attacks.run_fine_tune(attack, broken, grid, **RUN)
    assert np.asarray(lost.diverged).all()
    np.testing.assert_array_equal(lost.held_out_quality, 0)  # not that of class 0


def test_flops_are_those_of_the_arithmetic(monkeypatch):
    attack = attacks.make_attack("fine_tune_sgd", **OPTIONS["fine_tune_sgd"])
    m = 16
    _, step = flops.count_flops(attack, shared(), attack.grid[0], batch_size=m)
    products = 2 * m * (D_IN * D + D * K)  # forward
    products += 2 * m * (D_IN * D + 2 * D * K)  # to both kernels, and to the features
    assert products < step < 1.5 * products

    def no_count(lowered):
        raise NotImplementedError

    flops._setup.cache_clear()
    flops._step.cache_clear()
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", no_count)
    size = D_IN * D + D + D * K + K
    counted = flops.count_flops(attack, shared(), attack.grid[0], batch_size=m)
    assert counted == (0.0, 6.0 * m * size)
    flops._setup.cache_clear()
    flops._step.cache_clear()


def test_rows_are_split_without_overlap():
    x = jnp.arange(20.0)[:, None]
    problem = attacks.fine_tune_problem(
        features_fn=lambda params, x: x * params["a"],
        params={"a": jnp.ones(())},
        head=attacks.zero_head(1, 2),
        train=Batch(np.asarray(x), np.arange(20) % 2),
        held_out=Batch(x[:3] + 100, jnp.zeros(3, jnp.int32)),
        selection_fraction=0.25,
        measured_rows=4,
    )
    parts = [np.asarray(part.x)[:, 0].astype(int) for part in (problem.train, problem.selection)]
    assert sorted(np.concatenate(parts)) == list(range(20))
    assert [len(part) for part in parts] == [15, 5]
    assert set(np.asarray(problem.measured.x)[:, 0]) <= set(parts[0])
    assert len(problem.measured.y) == 4
    np.testing.assert_array_equal(problem.train.y, parts[0] % 2)


def test_the_two_families_do_not_mix():
    assert not set(attacks.REGISTRY) & set(attacks.WEIGHT_REGISTRY)
    assert set(attacks.suite_attacks("quick")) == set(attacks.REGISTRY)
    for name in attacks.WEIGHT_REGISTRY:
        built = attacks.make_attack(name)
        assert isinstance(built, attacks.WeightAttack)
        assert len(built.grid) >= 2


def test_what_does_not_fit_is_refused():
    attack = attacks.make_attack("fine_tune_sgd", **OPTIONS["fine_tune_sgd"])
    train, y = shared().train, shared().train.y
    for call, message in [
        (lambda: attacks.run_fine_tune(attack, shared(), steps=0), "steps must be between"),
        (lambda: attacks.run_fine_tune(attack, shared(), steps=3, seeds=()), "seeds must be"),
        (lambda: attacks.run_fine_tune(attack, shared(), steps=3, seeds=(-1,)), "seeds must be"),
        (lambda: attacks.run_fine_tune(attack, shared(), steps=3, record=1), "record must be"),
        (
            lambda: attacks.run_fine_tune(attack, shared(), steps=3, record=(0, 2)),
            "rise from 0 to 3",
        ),
        (
            lambda: attacks.run_fine_tune(attack, shared(), steps=3, record=(0, 2, 2, 3)),
            "rise from",
        ),
        (lambda: attacks.run_fine_tune(attack, shared(), steps=3, chunk=0), "chunk must be"),
        (
            lambda: attacks.run_fine_tune(attack, shared(), steps=3, batch_size=99),
            "batch_size must",
        ),
        (lambda: attacks.run_fine_tune(attack, shared(), [], steps=3), "grid is empty"),
        (lambda: attacks.run_fine_tune(attack, shared(), [{"a": 1}, {"b": 1}], steps=3), "same"),
        (lambda: attacks.make_attack("lora", ranks=3), "unknown option 'ranks'"),
        (lambda: dataclasses.replace(attack, needs=("luck",)), "unknown need 'luck'"),
        (lambda: attacks.run_fine_tune(attack, shared(), steps=3, loop="gpu"), "loop must be"),
        (
            lambda: dataclasses.replace(shared(), train=Batch(train.x, y.astype(jnp.float64))),
            "train: labels must be integers",
        ),
        (lambda: dataclasses.replace(shared(), selection=Batch(train.x, y + 1)), r"0..2, got 1..3"),
        (lambda: dataclasses.replace(shared(), held_out=Batch(train.x, y[1:])), "held_out: need"),
        (
            lambda: dataclasses.replace(shared(), head=attacks.zero_head(D + 1, K)),
            r"features_fn must give \[1, 8\]",
        ),
        (lambda: _problem(selection_fraction=0.0), "selection_fraction must be"),
        (lambda: _problem(measured_rows=0), "measured_rows must be"),
        (lambda: _problem(train=Batch(train.x[:1], y[:1])), "at least 2 training rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
