"""MLAC against its formula written out: both sides' slopes, the calibration, the two orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaximm.immunisers.meta.mlac import calibrate
from jaximm.types import Head
from tests.immunisers import meta_cases as cases

pytestmark = pytest.mark.heavy

FIELDS = {"inner_steps": 3, "calibration": "flip", "harmful_weight": 0.5, "adversary_rate": 0.01}


def harmful(backbone, head, log_rate):
    """(1/K) sum_{k=1..K} of min(CE(z), CE(-z)), clamped."""
    attack, held_out = cases.halves()
    held, total = (backbone, head), 0.0
    for _ in range(FIELDS["inner_steps"]):
        moves = jax.grad(lambda both: cases.loss(both[0], both[1], attack))(held)
        held = jax.tree.map(lambda leaf, move: leaf - jnp.exp(log_rate) * move, held, moves)
        turned = Head(-held[1].kernel, -held[1].bias)
        smaller = jnp.minimum(
            cases.loss(held[0], held[1], held_out), cases.loss(held[0], turned, held_out)
        )
        total += jnp.minimum(smaller, 1.5 * np.log(2))
    return total / FIELDS["inner_steps"]


def slope_of(state):
    """Of the harmful loss in the backbone, read off an update by plain descent at rate 1."""
    kept = jax.grad(lambda b: cases.loss(b, cases.start().head, cases.rows().primary))(
        cases.start().backbone
    )
    move = cases.start().backbone["kernel"] - state.params.backbone["kernel"]
    return (kept["kernel"] - move) / FIELDS["harmful_weight"]


def test_both_sides_move_along_their_slopes_and_the_orders_agree_at_small_rates():
    ones = {order: cases.method("mlac", order=order, **FIELDS) for order in (1, 2)}
    updates = {order: jax.jit(one.update) for order, one in ones.items()}
    reference = jax.jit(jax.value_and_grad(harmful, argnums=(0, 1, 2)))
    cosines = []
    for rate in (0.01, 2.0):
        found = {}
        for order, one in ones.items():
            state = one.init(cases.start(), cases.KEY)
            learner = state.memory.adversary._replace(log_rate=jnp.log(jnp.asarray(rate)))
            state = state._replace(memory=state.memory._replace(adversary=learner))
            found[order] = updates[order](state, cases.rows(), cases.KEY)
        value, (slope, head_slope, rate_slope) = reference(
            cases.start().backbone, learner.head, learner.log_rate
        )
        after, info = found[2]
        assert float(info.harmful_loss) == pytest.approx(float(value), rel=1e-10)
        np.testing.assert_allclose(slope_of(after), slope["kernel"], rtol=1e-8, atol=1e-10)
        # Adam's first step is along the sign.
        moved = jax.tree.map(jnp.subtract, learner, after.memory.adversary)
        np.testing.assert_allclose(
            moved.head.kernel, 0.01 * jnp.sign(head_slope.kernel), rtol=1e-4, atol=1e-6
        )
        assert float(moved.log_rate) == pytest.approx(0.01 * np.sign(float(rate_slope)), rel=1e-3)
        assert float(found[1][0].memory.adversary.log_rate) == float(learner.log_rate)
        first, second = (np.ravel(slope_of(found[order][0])) for order in (1, 2))
        cosines.append(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    assert cosines[0] > 0.99
    assert cosines[1] < 0.97


@pytest.mark.parametrize("seed", [0, 1])
def test_a_calibration_is_the_best_matrix_of_the_box(seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 40)
    logits = rng.normal(size=(40, 3)) - 3 * np.eye(3)[(y + 1) % 3]  # the wrong way round

    def loss(w):
        z = logits @ w.reshape(3, 3)
        return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(40), y]))

    best = scipy.optimize.minimize(loss, np.eye(3).ravel(), bounds=[(-1, 1)] * 9).fun
    w = np.asarray(jax.jit(calibrate)(jnp.asarray(logits), jnp.asarray(y)))
    assert np.abs(w).max() <= 1
    assert loss(w) < loss(np.eye(3)) - 0.3
    assert loss(w) == pytest.approx(best, abs=0.02)


def test_calibration_is_of_a_harmful_head():
    with pytest.raises(ValueError, match='calibration="flip" is of two classes'):
        cases.method_on(cases.problem(harmful_classes=3, harmful_head=None), "mlac", **FIELDS)
    whole = cases.problem(losses_fn=lambda params, batch: batch.x[:, 0])
    with pytest.raises(ValueError, match='take calibration="none"'):
        cases.method_on(whole, "mlac")
