"""UNDO: its noise, the step at which the student starts, and what it descends from then on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm.immunisers.unlearning.undo import noised
from jaximm.models import llama
from tests import language
from tests.immunisers import unlearning_cases as cases

pytestmark = pytest.mark.heavy


def test_noise_is_glorot_for_kernels_and_vectors_shrink():
    tree = {
        "kernel": jnp.full((300, 200), 2.0),
        "conv": jnp.zeros((3, 3, 20, 30)),
        "bias": jnp.ones(4),
    }
    found = noised(tree, 0.6, 0.1, cases.KEY)
    np.testing.assert_allclose(found["bias"], 0.4)
    for path, fans in (("kernel", 500), ("conv", 3 * 3 * 20 + 30)):
        noise = (np.asarray(found[path]) - 0.4 * np.asarray(tree[path])) / 0.06
        edge = np.sqrt(6 / fans)
        assert edge * 0.99 < np.max(np.abs(noise)) <= edge * (1 + 1e-6)
        assert np.std(noise) == pytest.approx(edge / np.sqrt(3), rel=0.02)
    weights = llama.last_layers(language.params(), 1)
    moved = noised(weights, 1.0, 0.0, cases.KEY)
    chex.assert_trees_all_equal(moved.frozen, weights.frozen)
    assert all(not np.any(leaf) for leaf in moved.trained.values())


def test_it_unlearns_then_distils_the_teacher_into_a_noised_copy():
    posed = cases.problem(optimiser=optax.sgd(0.1))
    fields = {"unlearn_steps": 2, "steps": 4, "noise_share": 0.3, "noise_scale": 0.5}
    one, npo = cases.method("undo", posed, **fields), cases.method("npo", posed)
    state, other = one.init(cases.params(), cases.KEY), npo.init(cases.params(), cases.KEY)
    update, npo_update = jax.jit(one.update), jax.jit(npo.update)
    for _ in range(2):
        state, _ = update(state, cases.PAIR, cases.KEY)
        other, _ = npo_update(other, cases.PAIR, cases.KEY)
    teacher = state.params
    chex.assert_trees_all_close(teacher, other.params, rtol=1e-12)
    chex.assert_trees_all_equal(state.memory[0], cases.params())

    def objective(theta):
        total = 0.0
        for batch in cases.PAIR:  # both through the head that is released
            ours, theirs = (
                jax.nn.log_softmax(cases.logits(model, batch)) for model in (theta, teacher)
            )
            total += jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1))
        return total

    state, info = update(state, cases.PAIR, cases.KEY)
    student = noised(teacher, 0.3, 0.5, cases.KEY)
    value, slope = jax.value_and_grad(objective)(student)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, student, slope)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-10, atol=1e-12)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-10)
    chex.assert_trees_all_equal(state.memory[0], teacher)
    _, later = update(state, cases.PAIR, cases.KEY)
    assert float(later.loss) < float(info.loss)


def test_adapters_are_refused():
    one = cases.method("undo", cases.problem(losses_fn=lambda params, batch: batch.x[:, 0]))
    adapted = llama.with_adapters(language.params(), jax.random.key(0), rank=2)
    with pytest.raises(ValueError, match=r"undo works on the weights themselves.*merge"):
        one.init(adapted, cases.KEY)
