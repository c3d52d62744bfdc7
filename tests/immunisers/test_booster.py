"""Booster's two gradients against the formula, and what the published one drops."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collapse_case import KEY, START, TASKS, loss, made, slope, stated
from jax.flatten_util import ravel_pytree

from jaximm.immunisers.collapse.common import one_step
from jaximm.types import Batch

pytestmark = pytest.mark.heavy

WEIGHT, ALPHA = 5.0, 0.3


def after(params, alpha=ALPHA):
    """theta - alpha g / |g|, written on one vector."""
    flat, unflatten = ravel_pytree(params)
    gradient = jax.grad(lambda flat: loss(unflatten(flat), TASKS.harmful))(flat)
    return unflatten(flat - alpha * gradient / jnp.linalg.norm(gradient))


def fall(params):
    harmful = TASKS.harmful
    return loss(params, harmful) - loss(after(params), harmful)


def test_the_exact_gradient_is_that_of_the_formula():
    value, expected = stated(lambda p: loss(p, TASKS.primary) + WEIGHT * fall(p))
    found, info = slope("booster", weight=WEIGHT, alpha=ALPHA, exact=True)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-12)
    here, there = float(info.harmful_loss), float(info.harmful_loss_stepped)
    assert float(info.penalty) == pytest.approx(WEIGHT * (here - there), rel=1e-9)
    assert there < here


@pytest.mark.slow
def test_the_published_gradient_takes_the_direction_as_constant():
    stepped = after(START)

    @jax.jit
    def published():
        gradient = jax.grad(loss)
        parts = (START, TASKS.primary), (START, TASKS.harmful), (stepped, TASKS.harmful)
        f, here, there = (ravel_pytree(gradient(*part))[0] for part in parts)
        return f + WEIGHT * (here - there)

    found, _ = slope("booster", weight=WEIGHT, alpha=ALPHA)
    np.testing.assert_allclose(found, published(), rtol=1e-9, atol=1e-12)


def test_what_is_dropped_grows_with_the_step():
    """The figures of the module: .7, 7.6 and 77 % at alpha .01, .1 and 1."""

    def harmful_loss(theta):
        return loss(theta, TASKS.harmful)

    @jax.jit
    def dropped(alpha):
        def fall(params, exact):
            return harmful_loss(params) - harmful_loss(
                one_step(harmful_loss, params, alpha, exact=exact)
            )

        exact, published = (
            ravel_pytree(jax.grad(fall)(START, exact))[0] for exact in (True, False)
        )
        return jnp.linalg.norm(published - exact) / jnp.linalg.norm(exact)

    found = [float(dropped(jnp.asarray(alpha))) for alpha in (0.01, 0.1, 1.0)]
    np.testing.assert_allclose(found, [0.007, 0.076, 0.77], rtol=0.08)


class Batches(NamedTuple):
    primary: Batch
    harmful: Batch
    attack: Batch


def test_a_caller_may_give_the_rows_of_the_step():
    one, (primary, harmful) = made("booster", alpha=ALPHA), TASKS
    update, state = jax.jit(one.update), one.init(START, KEY)
    own, other = (
        update(state, Batches(primary, harmful, attack), KEY)[1] for attack in (harmful, primary)
    )
    assert float(own.harmful_loss) == float(other.harmful_loss)
    assert float(own.harmful_loss_stepped) < float(other.harmful_loss_stepped) - 0.1


@pytest.mark.parametrize(
    ("fields", "words"), [({"weight": -1.0}, "weight"), ({"alpha": 0.0}, "alpha")]
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        made("booster", **fields)
