"""Optimisers from a configuration: the schedule is really applied."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm.training.optimiser import OptimiserConfig, make_optimiser, make_schedule


def steps_taken(config, steps):
    """Sizes of the updates of a constant gradient."""
    optimiser = make_optimiser(config, steps)
    params = jnp.ones(3)
    state = optimiser.init(params)
    sizes = []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            updates, state = optimiser.update(jnp.ones(3), state, params)
            sizes.append(-float(updates[0]))
    return np.array(sizes)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_plain_descent_takes_steps_of_the_schedules_size(schedule):
    config = OptimiserConfig(
        name="sgd", learning_rate=0.5, momentum=0, schedule=schedule, warmup=0.25, clip_norm=None
    )
    rates = np.array([float(make_schedule(config, 8)(step)) for step in range(8)])
    np.testing.assert_allclose(steps_taken(config, 8), rates, rtol=1e-6)
    np.testing.assert_allclose(rates[:3], [0, 0.25, 0.5])
    if schedule == "linear":
        np.testing.assert_allclose(rates[2:], 0.5 * (1 - np.arange(6) / 6), rtol=1e-6)
    if schedule == "cosine":
        expected = 0.25 * (1 + np.cos(np.pi * np.arange(6) / 6))
        np.testing.assert_allclose(rates[2:], expected, rtol=1e-6)


def test_adamw_is_optax_adamw():
    config = OptimiserConfig(
        learning_rate=0.1, weight_decay=0.3, schedule="constant", warmup=0, clip_norm=None
    )
    ours, theirs = make_optimiser(config, 5), optax.adamw(0.1, weight_decay=0.3)
    params = jnp.array([1.0, -2.0])
    with jax.numpy_dtype_promotion("standard"):
        for optimiser in (ours, theirs):
            state, moved = optimiser.init(params), params
            for step in range(5):
                updates, state = optimiser.update(moved * (step + 1), state, moved)
                moved = optax.apply_updates(moved, updates)
            if optimiser is ours:
                found = moved
    np.testing.assert_allclose(found, moved, rtol=1e-6)


def test_clipping_bounds_the_whole_gradient():
    config = OptimiserConfig(
        name="sgd", learning_rate=1.0, momentum=0, schedule="constant", warmup=0, clip_norm=0.1
    )
    assert steps_taken(config, 1)[0] == pytest.approx(0.1 / np.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "lion"},
        {"schedule": "step"},
        {"learning_rate": 0.0},
        {"momentum": 1.0},
        {"warmup": 1.0},
        {"weight_decay": -1.0},
        {"clip_norm": 0.0},
    ],
)
def test_a_bad_optimiser_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        OptimiserConfig(**fields)
    with pytest.raises(ValueError, match="steps"):
        make_optimiser(OptimiserConfig(), 0)
