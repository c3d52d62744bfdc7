"""What the collapse methods share: micro-batches are the batch, zeros have no direction."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collapse_case import KEY, START, TASKS, made
from helpers import thinned

from jaximm.immunisers.collapse import common

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    "name", thinned(["vaccine", "booster", "t_vaccine", "repnoise", "seam", "ctrap"])
)
def test_micro_batches_are_the_batch(name):
    found = []
    for parts in (1, 4):
        one = made(name, problem_fields={"accumulate": parts})
        found.append(jax.jit(one.update)(one.init(START, KEY), TASKS, KEY))
    (whole, info), (in_parts, same) = found
    chex.assert_trees_all_close(whole.params, in_parts.params, rtol=0, atol=1e-12)
    chex.assert_trees_all_close(info, same, rtol=1e-10)


@pytest.mark.parametrize("exact", [False, True])
def test_where_the_loss_is_flat_no_step_is_made(exact):
    def after(theta):
        return common.one_step(lambda theta: 0.0 * jnp.sum(theta), theta, 0.5, exact=exact)

    theta = jnp.array([1.0, -2.0])
    np.testing.assert_array_equal(after(theta), theta)
    np.testing.assert_array_equal(jax.jacobian(after)(theta), jnp.eye(2))
