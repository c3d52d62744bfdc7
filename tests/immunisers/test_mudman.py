"""MUDMAN against NumPy: the mask, the length of a step, the fork."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.immunisers import unlearning_cases as cases

pytestmark = pytest.mark.heavy

RATE, RETAIN, ADVERSARY, MOMENTUM = 0.3, 0.2, 0.1, 0.5


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@jax.jit
def gradients(theta, phi):
    def kept(theta):
        return jnp.mean(cases.losses(theta, cases.PAIR.primary))

    def harm(phi):
        return jnp.mean(cases.losses(phi, cases.PAIR.harmful, cases.HARMFUL_HEAD))

    return jax.grad(kept)(theta), jax.grad(harm)(phi), harm(phi)


def test_steps_are_those_of_the_algorithm():
    one = cases.method(
        "mudman",
        unlearn_rate=RATE,
        retain_rate=RETAIN,
        adversary_rate=ADVERSARY,
        retain_momentum=MOMENTUM,
        fork_every=2,
    )
    state, update = one.init(cases.params(), cases.KEY), jax.jit(one.update)
    momentum = np.zeros_like(flat(cases.params()))
    for step in range(3):
        theta = state.params
        phi = theta if step % 2 == 0 else state.adversary
        retain, relearn, value = gradients(theta, phi)
        state, info = update(state, cases.PAIR, cases.KEY)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * flat(retain)
        g = -flat(relearn)
        masked = np.where(np.sign(g) == np.sign(momentum), g, 0)
        length = np.linalg.norm(g)
        expected = flat(theta) - RETAIN * momentum - RATE / length * masked
        np.testing.assert_allclose(flat(state.params), expected, rtol=1e-9, atol=1e-12)
        expected = flat(phi) - ADVERSARY * flat(relearn)
        np.testing.assert_allclose(flat(state.adversary), expected, rtol=1e-9, atol=1e-12)
        assert float(info.adversary_loss) == pytest.approx(float(value), rel=1e-10)
        passed = np.linalg.norm(masked) / length
        assert 0.1 < passed < 0.95  # the mask lets some through, not all
        assert float(info.passed) == pytest.approx(passed, rel=1e-9)
        chosen = masked != 0  # where it moves, it moves down the retain loss too
        assert np.all(masked[chosen] * momentum[chosen] > 0)


def test_rows_without_losses_are_refused():
    with pytest.raises(ValueError, match="mudman descends losses of rows"):
        cases.method("mudman", cases.problem(classes=None))
