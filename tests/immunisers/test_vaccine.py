"""Vaccine's two passes against the same written out; what it asks of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collapse_case import (
    KEY,
    START,
    TASKS,
    cross_entropy,
    features_fn,
    loss,
    made,
    perturbed_losses,
    slope,
    stated,
)
from jax.flatten_util import ravel_pytree

from jaximm.immunisers import Problem, make_config, make_immuniser

pytestmark = pytest.mark.heavy

RHO = 2.0


def worst_offsets():
    """Both sites' gradients of the mean loss, of one norm."""
    primary = TASKS.primary
    zeros = {"first": jnp.zeros((40, 32)), "features": jnp.zeros((40, 16))}
    pull = jax.jit(jax.grad(lambda e: jnp.mean(perturbed_losses(START, primary, e))))(zeros)
    size = np.linalg.norm(ravel_pytree(pull)[0])
    return jax.tree.map(lambda leaf: RHO * leaf / size, pull)


def test_a_step_descends_the_loss_at_the_worst_offsets():
    offsets = worst_offsets()
    value, expected = stated(lambda p: jnp.mean(perturbed_losses(p, TASKS.primary, offsets)))
    found, info = slope("vaccine", rho=RHO)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert float(info.perturbed_loss) == pytest.approx(float(value), rel=1e-12)
    clean = float(loss(START, TASKS.primary))
    assert float(info.task_loss) == pytest.approx(clean, rel=1e-12)
    assert float(value) > clean + 0.05


def test_without_a_model_that_adds_them_the_features_alone_are_moved():
    found, _ = slope("vaccine", rho=RHO, problem_fields={"perturbed_fn": None})
    x, y = TASKS.primary

    def at(params, offset):
        features = features_fn(params.backbone, x) + offset
        return jnp.mean(cross_entropy(features @ params.head.kernel + params.head.bias[None], y))

    pull = jax.grad(lambda offset: at(START, offset))(jnp.zeros((40, 16)))
    _, expected = stated(lambda params: at(params, RHO * pull / jnp.linalg.norm(pull)))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_losses_of_its_own_need_a_model_that_adds_offsets():
    problem = Problem(
        features_fn=features_fn,
        losses_fn=lambda params, batch: cross_entropy(features_fn(params, batch.x), batch.y),
        optimiser=optax.sgd(1.0),
    )
    one = make_immuniser("vaccine", make_config("vaccine"), problem)
    backbone = START.backbone
    with pytest.raises(ValueError, match="give the problem a perturbed_losses_fn"):
        jax.eval_shape(one.update, one.init(backbone, KEY), TASKS, KEY)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="rho"):
        made("vaccine", rho=0.0)
