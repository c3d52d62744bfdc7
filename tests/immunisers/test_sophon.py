"""SOPHON's bounded losses, and an update of it written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.immunisers.meta.sophon import inverse_cross_entropy
from tests.immunisers import meta_cases as cases

pytestmark = pytest.mark.heavy


def test_the_inverse_cross_entropy_is_flat_where_the_label_is_unlikely():
    p = jnp.array([0.9, 0.5, 1e-6])
    found, slope = jax.vmap(jax.value_and_grad(inverse_cross_entropy))(-jnp.log(p))
    np.testing.assert_allclose(found, -np.log1p(-np.asarray(p)), rtol=1e-9)
    np.testing.assert_allclose(slope, -p / (1 - p), rtol=1e-9)  # in log(1 / p)
    surest = inverse_cross_entropy(jnp.zeros(1, jnp.float32))
    assert 10 < float(surest[0]) < 20  # of what float32 tells from 1


def uniform(backbone, head, batch):
    logs = jax.nn.log_softmax(cases.logits(backbone, head, batch.x))
    return -jnp.mean(jnp.log(2.0) + logs)


def inverse(backbone, head, batch):
    p = jax.nn.softmax(cases.logits(backbone, head, batch.x))
    return -jnp.mean(jnp.log(1 - jnp.take_along_axis(p, batch.y[:, None], axis=1)))


@pytest.mark.parametrize(("name", "suppressed"), [("uniform", uniform), ("inverse", inverse)])
def test_an_update_descends_the_loss_of_the_attacked_model(name, suppressed):
    rate, (attack, held_out) = 0.4, cases.halves()

    def slopes(params):
        held = (params.backbone, cases.HARMFUL_HEAD)
        for _ in range(2):
            moves = jax.grad(lambda both: cases.loss(both[0], both[1], attack))(held)
            held = jax.tree.map(lambda leaf, move: leaf - rate * move, held, moves)
        value, slope = jax.value_and_grad(suppressed)(held[0], held[1], held_out)
        kept = jax.grad(lambda b: cases.loss(b, params.head, cases.rows().primary))
        return value, jax.tree.map(lambda s, k: 3 * s + k, slope, kept(params.backbone))

    one = cases.method(
        "sophon",
        **{"suppression": name, "suppression_weight": 3.0, "inner_steps": 2},
        inner_rates=(rate,),
        fresh_head=False,
    )
    state, info = cases.stepped(one)
    value, slope = jax.jit(slopes)(cases.start())
    expected = jax.tree.map(jnp.subtract, cases.start().backbone, slope)
    chex.assert_trees_all_close(state.params.backbone, expected, rtol=1e-9, atol=1e-12)
    assert float(info.suppression) == pytest.approx(3 * float(value), rel=1e-10)


def test_the_divergence_needs_predictions():
    whole = cases.problem(losses_fn=lambda params, batch: batch.x[:, 0])
    with pytest.raises(ValueError, match="divergences_fn"):
        cases.method_on(whole, "sophon", suppression="uniform")
