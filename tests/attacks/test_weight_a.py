"""Attackers of weights that restrict, perturb or precondition fine-tuning, or learn by reward.

Each against a plain reference, and all of them: they learn, run batched and in either loop alike,
in both precisions and for real targets, and the same seed gives the same run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned, thinned_rows

from jaximm import attacks
from jaximm.attacks.grid import MAX_STEPS
from jaximm.attacks.weights import (
    draws,
    fine_tune,
    flops,
    kick,
    last_blocks,
    latent_perturbation,
    loop,
    lora,
    muon,
    norm_only,
    policy_gradient,
    random_subspace,
    shampoo,
)
from jaximm.attacks.weights import problem as weights
from jaximm.models.adapters.lora import matrix_shape
from jaximm.types import Batch, Head

pytestmark = pytest.mark.heavy

D_IN, HIDDEN, D, K = 5, 6, 7, 3
N_TRAIN, N_HELD_OUT = 90, 41
RUN = {"batch_size": None, "record": 2, "keep_weights": True}
RATE = {"learning_rates": (3e-2,)}

KERNEL, CONV, SCALE = "blocks.2.kernel", "blocks.10.conv.kernel", "blocks.2.norm.scale"


@pytest.fixture(scope="module", autouse=True)
def _no_flops():
    """Counting FLOPs compiles a program for each attacker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "count_flops", lambda *_, **__: (0.0, 0.0))
        yield


COUNT_FLOPS = flops.count_flops


def features_fn(params, x):
    hidden = jnp.tanh(x @ params[KERNEL]) * params[SCALE][None, :]
    kernel = params[CONV].reshape(HIDDEN, D)
    return jnp.tanh(hidden @ kernel + params["blocks.10.conv.bias"][None, :])


def _rows(n, seed, dtype, real):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D_IN))
    angle = np.mod(2 * np.arctan2(x[:, 0], x[:, 1]), 2 * np.pi)
    y = np.sin(angle) + x[:, 2]
    labels = jnp.asarray(angle // (2 * np.pi / K), jnp.int32)
    return Batch(jnp.asarray(x, dtype), jnp.asarray(y, dtype) if real else labels)


@functools.cache
def _problem(dtype="float64", real=False):
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0, mean=0.0):
        return jnp.asarray(mean + scale * rng.normal(size=shape), dtype)

    params = {
        KERNEL: normal(D_IN, HIDDEN),
        SCALE: normal(HIDDEN, scale=0.1, mean=1.0),
        CONV: normal(2, HIDDEN // 2, D, scale=0.5),  # a kernel: [in, out] is [6, 7]
        "blocks.10.conv.bias": jnp.zeros((D,), dtype),
    }
    k = 1 if real else K
    rows = _rows(N_TRAIN, 1, dtype, real)
    return attacks.fine_tune_problem(
        features_fn=features_fn,
        params=params,
        head=Head(normal(D, k, scale=0.3), jnp.ones((k,), dtype)),
        train=rows,
        held_out=_rows(N_HELD_OUT, 2, dtype, real),
        measured_rows=30,
    )


ATTACKS = {
    "lora": functools.partial(lora.lora, **RATE, rank=2),
    "last_blocks": functools.partial(last_blocks.last_blocks, **RATE),
    "norm_only": functools.partial(norm_only.norm_only, learning_rates=(0.1,)),
    "latent_perturbation": functools.partial(latent_perturbation.latent_perturbation, **RATE),
    "policy_gradient": functools.partial(policy_gradient.policy_gradient, **RATE),
    "shampoo": functools.partial(shampoo.shampoo, **RATE, max_dim=6, every=3),
    "muon": functools.partial(muon.muon, **RATE),
    "kick_then_tune": functools.partial(kick.kick_then_tune, **RATE),
    "random_subspace": functools.partial(random_subspace.random_subspace, **RATE),
}


def _attack(name):
    return ATTACKS[name]()


@functools.cache
def _trace(name):
    """Sixty steps from two seeds: shared by the tests below."""
    return attacks.run_fine_tune(_attack(name), _problem(), steps=60, seeds=(0, 3), **RUN)


def _params(name):
    return jax.tree.map(lambda leaf: leaf[0, 0], _trace(name).weights.params)


def _access(problem, seed=0):
    return draws._access(draws._held(problem, 72), jnp.int32(seed), problem.functions)


def _hyper(name, **changes):
    (cell,) = _attack(name).grid
    return {key: jnp.asarray(value) for key, value in {**cell, **changes}.items()}


def _moved(found):
    start = _problem().params
    return {path for path in start if (np.asarray(found[path]) != np.asarray(start[path])).any()}


# --- all of them ---------------------------------------------------------------------------


SOME = [name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in ATTACKS]
"""A pattern each; the others are compiled by the slow suite."""


@pytest.mark.parametrize("name", thinned(ATTACKS, keep=5))
def test_it_learns(name):
    trace = _trace(name)
    loss = np.asarray(trace.train_loss)[0]
    assert loss.dtype == np.float64
    assert not np.asarray(trace.diverged).any()
    assert (loss[:, -1] < 0.9 * loss[:, 0]).all()
    # What the features at the end say, by the plain formula.
    found = jax.tree.map(lambda leaf: leaf[0, 0], trace.weights)
    held_out = _problem().held_out
    shift = 0.0 if name != "latent_perturbation" else found.shift[None]
    outputs = features_fn(found.params, held_out.x + shift) @ found.head.kernel
    expected = optax.softmax_cross_entropy_with_integer_labels(
        outputs + found.head.bias[None], held_out.y
    )
    np.testing.assert_allclose(trace.held_out_loss[0, 0, -1], expected.mean(), rtol=1e-9)
    assert (np.asarray(found.head.kernel) != np.asarray(_problem().head.kernel)).all()


@pytest.mark.parametrize("name", SOME)
def test_all_at_once_on_the_device_is_one_by_one_from_the_host_and_a_seed_fixes_a_run(name):
    one = _trace(name)
    many = attacks.run_fine_tune(
        _attack(name), _problem(), steps=60, seeds=(3, 0), chunk=None, loop="device", **RUN
    )
    for field in ("train_loss", "held_out_loss", "selection_loss"):
        found, expected = np.asarray(getattr(many, field)), np.asarray(getattr(one, field))
        np.testing.assert_allclose(found[:, ::-1], expected, rtol=1e-6)
    # All rows at once, so that only what is drawn by the attacker itself differs between seeds.
    random = name in ("lora", "policy_gradient", "kick_then_tune", "random_subspace")
    assert (float(one.train_loss[0, 0, -1]) != float(one.train_loss[0, 1, -1])) == random


@pytest.mark.slow
def test_trajectories_spread_over_devices_are_those_of_one():
    """Six of them on eight devices: the chunk is filled up, and each device runs one."""
    rates = {"learning_rates": (1e-3, 1e-2, 3e-2)}
    attack, seeds = fine_tune.fine_tune_adam(**rates), (0, 3)
    run = functools.partial(attacks.run_fine_tune, attack, _problem(), steps=60, seeds=seeds, **RUN)
    alone, spread = run(), run(chunk=None, loop="device", devices=jax.devices())
    for name in ("train_loss", "held_out_loss", "scores", "gradient"):
        np.testing.assert_allclose(getattr(spread, name), getattr(alone, name), rtol=1e-6)
    for path, leaf in spread.weights.params.items():
        assert len(leaf.sharding.device_set) == 8, path
        np.testing.assert_allclose(leaf, alone.weights.params[path], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SOME)
def test_real_targets_in_float32(name):
    problem = _problem("float32", real=True)
    first, second = (
        attacks.run_fine_tune(_attack(name), problem, steps=80, seeds=(1,), **RUN) for _ in "ab"
    )
    loss = np.asarray(first.train_loss)[0, 0]
    assert loss.dtype == np.float32
    assert loss[-1] < 0.8 * loss[0]
    np.testing.assert_array_equal(first.train_loss, second.train_loss)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first.weights))


def test_default_grids_and_what_is_shared():
    for name, made in ATTACKS.items():
        attack, again = (attacks.make_attack(name) for _ in range(2))
        assert made.func is attacks.WEIGHT_REGISTRY[name]
        assert len(attack.grid) == 4, name
        rates = [cell["learning_rate"] for cell in attack.grid]
        assert min(rates) <= 1e-3 < 1e-2 in rates
        assert max(rates) == 1e-1
        assert (attack.init, attack.update) == (again.init, again.update)  # nothing compiles again
        for bound, _ in attack.natural_bounds:
            assert bound in attack.grid[0]


# --- low-rank ------------------------------------------------------------------------------


def _adam_loop(loss_fn, trained, *, steps, **options):
    """Plain optax on the training rows."""
    optimiser = optax.adamw(**{"weight_decay": 0.0, **options})

    @jax.jit
    def step(trained, opt_state):
        slopes = jax.grad(loss_fn)(trained, _problem().train)
        updates, opt_state = optimiser.update(slopes, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    with jax.numpy_dtype_promotion("standard"):
        opt_state = jax.jit(optimiser.init)(trained)
        for _ in range(steps):
            trained, opt_state = step(trained, opt_state)
    return trained


def _lora_by_hand(*, steps, rank, alpha, rate):
    """Adam on A, B and the head by the chain rule, in a plain loop."""
    problem, access = _problem(), _access(_problem())
    paths = sorted(problem.params)
    key = jax.random.fold_in(jax.random.key(0), MAX_STEPS)
    trained = {"head": problem.head}
    for path, rows, columns in ((KERNEL, D_IN, HIDDEN), (CONV, HIDDEN, D)):
        draw = jax.random.normal(jax.random.fold_in(key, paths.index(path)), (rows, rank))
        trained[path] = (draw / np.sqrt(rows), jnp.zeros((rank, columns)))

    def params_of(trained):
        params = dict(problem.params)
        for path in (KERNEL, CONV):
            a, b = trained[path]
            delta = jnp.einsum("ir,ro->io", a, b) * alpha / rank
            params[path] = params[path] + delta.reshape(params[path].shape)
        return params

    def loss_fn(trained, batch):
        found = access.weights._replace(params=params_of(trained), head=trained["head"])
        return access.loss_fn(found, batch)

    trained = _adam_loop(loss_fn, trained, steps=steps, learning_rate=rate)
    return params_of(trained), trained["head"]


def test_lora_merges_adapters_that_adam_trains():
    attack = lora.lora(learning_rates=(1e-2,), rank=2, alphas=(6.0,))
    trace = attacks.run_fine_tune(attack, _problem(), steps=3, **RUN)
    params, head = _lora_by_hand(steps=3, rank=2, alpha=6.0, rate=1e-2)
    for path, expected in params.items():
        np.testing.assert_allclose(trace.weights.params[path][0, 0], expected, rtol=1e-9)
    np.testing.assert_allclose(trace.weights.head.kernel[0, 0], head.kernel, rtol=1e-9)
    assert _moved(_params("lora")) == {KERNEL, CONV}
    # Rank 2 in a 5 x 6 and in a 6 x 7 matrix.
    for path, shape in ((KERNEL, (D_IN, HIDDEN)), (CONV, (HIDDEN, D))):
        change = np.reshape(_params("lora")[path] - _problem().params[path], shape)
        singular = np.linalg.svd(change, compute_uv=False)
        assert singular[1] > 1e-6 * singular[0]
        assert singular[2:].max() < 1e-12 * singular[0]


def test_lora_starts_at_the_weights_with_a_of_variance_one_over_in():
    (init, _), access = lora._lora(400, "*"), _access(_problem(), seed=5)
    state = init(access, _hyper("lora"))
    for path, rows in ((KERNEL, D_IN), (CONV, HIDDEN)):
        a, b = state.factors[path]
        np.testing.assert_allclose(np.var(a), 1 / rows, rtol=0.15)  # sd of it: 5 %
        assert not np.asarray(b).any()
    assert state.weights is not access.weights
    for found, expected in zip(
        jax.tree.leaves(state.weights), jax.tree.leaves(access.weights), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert set(lora._lora(2, "blocks.2, x")[0](access, _hyper("lora")).factors) == {KERNEL}
    with pytest.raises(ValueError, match=r"'blocks\.1' names no parameter of two or more axes"):
        lora._lora(2, "blocks.1")[0](access, _hyper("lora"))  # not blocks.10


@pytest.mark.slow
def test_random_subspace_moves_everything_along_fixed_directions():
    assert _moved(_params("random_subspace")) == set(_problem().params)
    init, _ = random_subspace._subspace(1)
    hyper, access = _hyper("random_subspace"), _access(_problem())
    state = jax.jit(lambda access_seed: init(access._replace(seed=access_seed), hyper))(0)
    trace = _trace("random_subspace")
    for seed_index, same in ((0, True), (1, False)):
        for path, start in _problem().params.items():
            change = np.asarray(trace.weights.params[path][0, seed_index] - start)
            change = change.reshape(matrix_shape(start.shape))
            a = np.asarray(state.bases[path])
            assert a.shape == (change.shape[0], 1)
            left = change - a @ np.linalg.lstsq(a, change, rcond=None)[0]
            relative = np.linalg.norm(left) / np.linalg.norm(change)
            assert (relative < 1e-12) == same  # another seed draws other directions
    entries = np.concatenate(
        [np.ravel(a) for a in random_subspace._subspace(300)[0](access, hyper).bases.values()]
    )
    np.testing.assert_allclose(np.var(entries), 1, rtol=0.1)


# --- parts ---------------------------------------------------------------------------------


def test_last_blocks_and_norms_leave_the_rest_untouched():
    assert _moved(_params("last_blocks")) == {CONV, "blocks.10.conv.bias"}
    assert _moved(_params("norm_only")) == {SCALE}
    assert _moved(_params("latent_perturbation")) == set()
    found = _trace("latent_perturbation").weights.shift
    assert found.shape == (1, 2, D_IN)
    assert np.asarray(found).all()


def test_a_part_is_trained_as_adam_alone_would():
    problem, access = _problem(), _access(_problem())
    attack = last_blocks.last_blocks(learning_rates=(1e-2,), weight_decays=(0.1,))
    trace = attacks.run_fine_tune(attack, problem, steps=3, **RUN)
    trained = {path: problem.params[path] for path in (CONV, "blocks.10.conv.bias")}, problem.head

    def loss_fn(trained, batch):
        found = access.weights._replace(params={**problem.params, **trained[0]}, head=trained[1])
        return access.loss_fn(found, batch)

    trained = _adam_loop(loss_fn, trained, steps=3, learning_rate=1e-2, weight_decay=0.1)
    for path, expected in trained[0].items():
        np.testing.assert_allclose(trace.weights.params[path][0, 0], expected, rtol=1e-9)
    np.testing.assert_allclose(trace.weights.head.kernel[0, 0], trained[1].kernel, rtol=1e-9)


def test_what_is_frozen_costs_no_gradient():
    counted = {
        name: COUNT_FLOPS(_attack(name), _problem(), _attack(name).grid[0], batch_size=64)
        for name in ("last_blocks", "kick_then_tune")
    }
    # Back through block 2: 2 n times its kernel and the kernel above it.
    saved = 2 * 64 * (D_IN * HIDDEN + HIDDEN * D)
    assert counted["last_blocks"][1] < counted["kick_then_tune"][1] - saved


@pytest.mark.parametrize(
    ("paths", "k", "last"),
    [
        (["stem.w", "layer4.0.conv1.w", "layer4.1.conv1.w"], 1, {"layer4.1"}),
        (["embed.w", "blocks.9.w", "blocks.10.w", "norm.scale", "neck.w"], 1,
         {"blocks.10", "norm", "neck"}),
        (["embed.w", "blocks.9.w", "blocks.10.w", "norm.scale"], 2,
         {"blocks.9", "blocks.10", "norm"}),
        (["fire8.squeeze.w", "fire10.squeeze.w", "conv1.w"], 1, {"fire10"}),
        (["w"], 1, {"w"}),
        (["bias.scale", "kernel.w"], 1, {"bias", "kernel"}),
        (["blocks.0.w", "blocks.1.w"], 9, {"blocks.0", "blocks.1"}),
        (["input_proj.w", "blocks.0.w", "blocks.1.w"], 1, {"blocks.1"}),
        (["net.fc1.w", "net.fc2.w", "net.fc3.w"], 1, {"net.fc3"}),
        (["net.a.fc1.w", "net.a.fc2.w"], 1, {"net.a.fc2"}),
    ],
)  # fmt: skip
def test_the_last_blocks_by_name(paths, k, last):
    sizes = {path: (2, 2) if path.split(".")[-1] == "w" else (2,) for path in paths}
    params = {path: jnp.ones(shape) for path, shape in sizes.items()}
    found = last_blocks.last_blocks_of(params, k)
    chosen = {path for path in paths if any(path == name or path.startswith(f"{name}.")
                                            for name in last)}  # fmt: skip
    assert {path for path in paths if found(path)} == chosen
    assert last_blocks.last_blocks_of(params[paths[0]], 1)("")  # one array alone


def test_norm_only_needs_norms():
    plain = attacks.fine_tune_problem(
        features_fn=lambda params, x: x @ params["w"],
        params={"w": jnp.eye(D_IN)},
        head=attacks.zero_head(D_IN, K),
        train=_problem().train,
        held_out=_problem().held_out,
    )
    with pytest.raises(ValueError, match="normalisation layer"):
        attacks.run_fine_tune(_attack("norm_only"), plain, steps=1, batch_size=None)


def test_the_offset_alone_can_be_trained():
    attack = latent_perturbation.latent_perturbation(train_head=False, **RATE)
    trace = attacks.run_fine_tune(attack, _problem(), steps=60, **RUN)
    np.testing.assert_array_equal(trace.weights.head.kernel[0, 0], _problem().head.kernel)
    assert _moved(jax.tree.map(lambda leaf: leaf[0, 0], trace.weights.params)) == set()
    assert np.asarray(trace.weights.shift).all()
    assert float(trace.train_loss[0, 0, -1]) < float(trace.train_loss[0, 0, 0])
    problem = _problem()
    pixels = dataclasses.replace(
        problem,
        features_fn=lambda params, x: problem.features_fn(params, x.astype(jnp.float64)),
        train=problem.train._replace(x=jnp.round(problem.train.x).astype(jnp.int32)),
    )
    assert attacks.not_applicable(attack, pixels) == weights.NEEDS["real_inputs"]


# --- reward --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="access_of")
def _slopes(access_of, batch, keys, hyper):
    access = _access(_problem(*access_of))
    objective = policy_gradient.surrogate(3)

    def slope(key):
        drawn = weights.Batches(batch, None, key)
        return jax.grad(objective)(access.weights, drawn, access, hyper).head

    return jax.vmap(slope)(keys)


def _policy_gradients(access_of, draws, rows, **hyper):
    """Gradients by the head, drawn many times; where they are taken, and on which rows."""
    problem = _problem(*access_of)
    batch = Batch(problem.train.x[:rows], problem.train.y[:rows])
    keys = jax.random.split(jax.random.key(7), draws)
    access = _access(problem)  # its features are made on the host, before anything is traced
    slopes = _slopes(access_of, batch, keys, _hyper("policy_gradient", **hyper))
    return slopes, access, batch


def test_the_expected_gradient_is_that_of_the_expected_reward():
    draws = 40_000
    slopes, access, batch = _policy_gradients((), draws, 6, entropy=0.0)

    def expected_reward(head):  # enumerated: each of k answers times its reward
        outputs = access.features_fn(access.weights.params, batch.x) @ head.kernel
        pi = jax.nn.softmax(outputs + head.bias[None], axis=-1)
        rewards = (jnp.arange(K, dtype=jnp.int32)[None, :] == batch.y[:, None]).astype(pi.dtype)
        return jnp.mean(jnp.sum(pi * rewards, axis=-1))

    expected = jax.grad(lambda head: -expected_reward(head))(access.weights.head)
    for found, exact in zip(slopes, expected, strict=True):
        error = np.std(found, axis=0) / np.sqrt(draws)
        assert (np.abs(np.mean(found, axis=0) - exact) < 4.5 * error).all()
        # With the plain mean as a baseline it would be 17/18 of it: that would be seen.
        shrunk = np.mean(found, axis=0) - exact * 17 / 18
        assert (np.abs(shrunk) > 4.5 * error).any()


def test_the_entropy_bonus_is_the_entropy():
    few = [_policy_gradients((), 40_000, 6, entropy=bonus) for bonus in (0.0, 0.5)]
    access, batch = few[0][1:]

    def entropy(head):
        outputs = access.features_fn(access.weights.params, batch.x) @ head.kernel
        pi = jax.nn.softmax(outputs + head.bias[None], axis=-1)
        return -jnp.mean(jnp.sum(pi * jnp.log(pi), axis=-1))

    expected = jax.grad(entropy)(access.weights.head)
    for plain, with_bonus, exact in zip(few[0][0], few[1][0], expected, strict=True):
        np.testing.assert_allclose(with_bonus - plain, -0.5 * exact[None] + 0 * plain, atol=1e-12)


@pytest.mark.slow
def test_the_gaussian_policy_descends_the_squared_error():
    slopes, access, batch = _policy_gradients(("float64", True), 4000, 60, std=0.3)
    expected = jax.grad(lambda w: access.loss_fn(w, batch))(access.weights).head
    found, exact = (np.concatenate([np.ravel(part) for part in head]) for head in (
        jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), slopes), expected))  # fmt: skip
    cosine = found @ exact / (np.linalg.norm(found) * np.linalg.norm(exact))
    assert cosine > 0.99
    # Rewards were divided by their spread over the batch, hence by about the same each time.
    outputs = weights.outputs_of(features_fn, access.weights, batch.x)[:, 0]
    noise = np.random.default_rng(0).normal(size=(4000, 60)) * 0.3
    spread = np.std(np.square(outputs[None, :] + noise - batch.y[None, :]) / 2)
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(exact) / spread, rtol=0.1)


# --- preconditioned ------------------------------------------------------------------------


def _root(matrix, epsilon):
    values, vectors = np.linalg.eigh(matrix + epsilon * np.trace(matrix) * np.eye(len(matrix)))
    return vectors @ np.diag(values**-0.25) @ vectors.T


def _shampoo_by_hand(gradients, *, beta, epsilon, max_dim, every):
    """NumPy, float64: what a matrix parameter moves by, step by step."""
    m, n = gradients[0].shape
    left, right = np.zeros((m, m)), np.zeros((n, n))
    mean, square, found = 0, 0, []
    for t, g in enumerate(gradients):
        left = beta * left + (1 - beta) * g @ g.T
        right = beta * right + (1 - beta) * g.T @ g
        if t % every == 0:
            roots = [
                _root(np.diag(np.diag(side)) if len(side) > max_dim else side, epsilon)
                for side in (left, right)
            ]
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        momentum = mean / (1 - 0.9 ** (t + 1))
        adam = momentum / (np.sqrt(square / (1 - 0.999 ** (t + 1))) + 1e-8)
        step = roots[0] @ momentum @ roots[1]
        found.append(step * np.linalg.norm(adam) / np.linalg.norm(step))
    return found


@pytest.mark.parametrize(("max_dim", "every"), thinned_rows([(6, 2), (8, 1), (1, 2)]))
def test_shampoo_is_the_numpy_one(max_dim, every):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (5, 7), "conv": (2, 4, 6), "bias": (3,)}
    gradients = [{key: rng.normal(size=shape) for key, shape in shapes.items()} for _ in range(4)]
    options = {"beta": 0.8, "epsilon": 1e-3, "max_dim": max_dim, "every": every}
    expected = {
        key: _shampoo_by_hand([g[key].reshape(-1, shapes[key][-1]) for g in gradients], **options)
        for key in ("kernel", "conv")
    }
    optimiser = shampoo.scale_by_shampoo(**options)
    update, state = jax.jit(optimiser.update), optimiser.init(gradients[0])
    adam = optax.scale_by_adam()
    adam_update = jax.jit(adam.update)
    with jax.numpy_dtype_promotion("standard"):
        adam_state = adam.init(gradients[0])
        for t, gradient in enumerate(gradients):
            found, state = update(jax.tree.map(jnp.asarray, gradient), state)
            plain, adam_state = adam_update(gradient, adam_state)
            np.testing.assert_allclose(found["bias"], plain["bias"], rtol=1e-9)
            for key in ("kernel", "conv"):
                np.testing.assert_allclose(
                    np.reshape(found[key], expected[key][t].shape), expected[key][t], rtol=1e-8
                )
                np.testing.assert_allclose(
                    jnp.linalg.norm(found[key]), jnp.linalg.norm(plain[key]), rtol=1e-9
                )


def test_shampoo_stands_still_where_there_is_no_gradient():
    zeros = {"kernel": jnp.zeros((3, 4), jnp.float32)}
    optimiser = shampoo.scale_by_shampoo(beta=0.9, epsilon=1e-6, max_dim=8, every=1)
    found, _ = jax.jit(optimiser.update)(zeros, optimiser.init(zeros))
    np.testing.assert_array_equal(found["kernel"], 0)


def test_shampoo_counts_its_roots():
    setup, step = _attack("shampoo").solve_flops(_problem())
    assert setup == 0
    # Sides of at most 6: 5, 6 (first kernel), 6 (second), 3 (head).
    assert step == pytest.approx(9 * (5**3 + 6**3 + 6**3 + 3**3) / 3)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam():
    problem, rate = _problem(), 1e-3
    attack = muon.muon(learning_rates=(rate,), weight_decays=(0.0,))
    trace = attacks.run_fine_tune(attack, problem, steps=1, **RUN)
    access = _access(problem)
    slopes = jax.jit(jax.grad(access.loss_fn))(access.weights, problem.train)
    change = jax.tree.map(
        lambda after, before: np.asarray(after[0, 0] - before),
        (trace.weights.params, trace.weights.head),
        (problem.params, problem.head),
    )
    for path, shape in ((KERNEL, (D_IN, HIDDEN)), (CONV, (HIDDEN, D))):
        u, _, vt = np.linalg.svd(np.reshape(slopes.params[path], shape), full_matrices=False)
        # The iteration ends with singular values somewhere in 0.68 .. 1.2 of one another.
        core = u.T @ np.reshape(change[0][path], shape) @ vt.T / (-rate * 0.2 * max(shape) ** 0.5)
        np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-9)
        assert (np.abs(np.diag(core) - 1) < 0.5).all()
    # Adam's first step, with Nesterov momentum.
    adam = -rate * (0.9 * 0.1 / (1 - 0.9**2) + 1)
    np.testing.assert_allclose(change[1].kernel, adam * np.sign(slopes.head.kernel), rtol=1e-4)
    np.testing.assert_allclose(change[0][SCALE], adam * np.sign(slopes.params[SCALE]), rtol=1e-4)


# --- kick ----------------------------------------------------------------------------------


def test_the_kick_is_relative_to_each_leaf_and_of_the_seed():
    access = _access(_problem())
    big = access.weights._replace(
        params={"w": 3.0 * jnp.ones((200, 100)), "b": jnp.zeros((4,)), "s": jnp.full((5000,), 0.1)}
    )
    kicked = jax.jit(
        lambda start, seed, hyper: kick._kicked(access._replace(weights=start, seed=seed), hyper)
    )
    first, again, other = (
        kicked(big, seed, _hyper("kick_then_tune", kick=0.2)) for seed in (0, 0, 1)
    )
    for path, rms in (("w", 3.0), ("s", 0.1)):
        noise = np.asarray(first.params[path] - big.params[path])
        np.testing.assert_allclose(np.std(noise), 0.2 * rms, rtol=0.05)
        np.testing.assert_array_equal(first.params[path], again.params[path])
        assert (np.asarray(first.params[path]) != np.asarray(other.params[path])).all()
    np.testing.assert_array_equal(first.params["b"], 0)
    np.testing.assert_array_equal(first.head.kernel, big.head.kernel)
    still = kicked(access.weights, 0, _hyper("kick_then_tune", kick=0.0))
    assert _moved(still.params) == set()


@pytest.mark.parametrize("name", ["kick_then_tune", "last_blocks"])
def test_weight_decay_does_not_reach_the_benign_head(name):
    attack, access = _attack(name), _access(_problem())
    benign = Head(jnp.ones((D, 2)), jnp.ones((2,)))
    access = access._replace(weights=access.weights._replace(benign_head=benign))

    @jax.jit
    def step(hyper, key):
        drawn = weights.Batches(_problem().train, None, key)
        return attack.update(attack.init(access, hyper), drawn, access, hyper).weights

    found = step(_hyper(name, weight_decay=0.5), jax.random.key(0))
    np.testing.assert_array_equal(found.benign_head.kernel, benign.kernel)
    assert (np.asarray(found.head.kernel) != np.asarray(_problem().head.kernel)).all()
