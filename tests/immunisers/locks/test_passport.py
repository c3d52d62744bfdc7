"""Passports: the affine map and the sign loss by hand, and the attacker who has no passport."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.immunisers.locks import passport
from tests import lock_cases


def passports(seed):
    return jax.random.normal(jax.random.key(seed), (2, 3, 24))


def test_scale_and_shift_are_means_of_what_the_layer_makes_of_the_passports():
    weights = np.random.default_rng(0).standard_normal((24, 16))
    scale, shift = passports(0)
    found = passport.passport_affine(jnp.asarray(weights), scale, shift)
    for part, secret in zip(found, (scale, shift), strict=True):
        expected = [np.mean([row @ weights[:, j] for row in np.asarray(secret)]) for j in range(16)]
        np.testing.assert_allclose(part, expected, rtol=1e-12)


def test_the_sign_loss_by_hand_and_its_slope():
    gamma, bits = jnp.array([0.5, 0.05, -0.2]), jnp.array([1.0, 1.0, 1.0])
    expected = 0.05 + 0.3 + 1e-5 * (0.25 + 0.0025 + 0.04)
    assert float(passport.sign_loss(gamma, bits)) == pytest.approx(expected, rel=1e-12)
    slope = jax.grad(passport.sign_loss)(gamma, bits)
    np.testing.assert_allclose(slope, 2e-5 * gamma - jnp.array([0, 1.0, 1.0]), rtol=1e-9)
    for _ in range(60):
        gamma = gamma - 0.05 * jax.grad(passport.sign_loss)(gamma, -bits)
    assert passport.read_bits(gamma).tolist() == [-1.0, -1.0, -1.0]
    assert passport.read_bits(jnp.zeros(1)).tolist() == [1.0]


def layer(params, x, affine):
    """A hidden layer under a passport, normalised over units."""
    z = jax.nn.relu(x @ params["0.kernel"] + params["0.bias"][None, :]) @ params["1.kernel"]
    z = (z - z.mean(axis=1, keepdims=True)) / (z.std(axis=1, keepdims=True) + 1e-6)
    return jax.nn.relu(affine.gamma[None, :] * z + affine.beta[None, :])


@pytest.mark.heavy
def test_the_ambiguity_attack_brings_a_locked_layer_back_without_its_passports():
    """The breaker: scale and shift are tuned as free parameters, on a few rows, nothing else."""
    secret = passports(1)

    def with_passports(params, x):
        return layer(params, x, passport.passport_affine(params["1.kernel"], *secret))

    train, held = lock_cases.digits()
    settings = {"optimiser": lock_cases.ADAM[None], "steps": 150}
    start = lock_cases.start()
    (params, kernel), accuracies = lock_cases.tuned(
        start,
        lock_cases.head(10),
        train,
        held,
        0.02,
        lock_cases.ones(start),
        features=with_passports,
        **settings,
    )
    owner = float(accuracies[-1])

    def other(seed):
        affine = passport.passport_affine(params["1.kernel"], *passports(seed))
        return float(lock_cases.accuracy(layer(params, held.x, affine) @ kernel, held.y))

    forged = [other(seed) for seed in range(2, 22)]
    assert np.mean(forged) < owner - 0.3

    free = {**params, "affine": passport.Affine(jnp.ones(16), jnp.zeros(16))}
    moves = jax.tree.map(jnp.zeros_like, free) | {"affine": lock_cases.ones(free["affine"])}
    few = jax.tree.map(lambda leaf: leaf[:100], train)
    _, accuracies = lock_cases.tuned(
        free,
        kernel,
        few,
        held,
        0.1,
        moves,
        features=lambda params, x: layer(params, x, params["affine"]),
        **settings,
    )
    assert float(accuracies[-1]) > owner - 0.15
