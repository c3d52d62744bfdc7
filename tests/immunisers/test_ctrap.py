"""CTRAP's step against the formula, and the rows of its one answer."""

import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest
from collapse_case import CLASSES, START, TASKS, loss, made, slope, stated
from jax.flatten_util import ravel_pytree

from jaximm.immunisers.collapse.ctrap import one_answer

pytestmark = pytest.mark.heavy

WEIGHT, ALPHA, TOKEN = 0.7, 0.3, 2


def collapse(params):
    primary = TASKS.primary
    return loss(params, primary._replace(y=jnp.full_like(primary.y, TOKEN)))


@pytest.mark.parametrize("exact", [False, True])
def test_a_step_descends_the_formula(exact):
    def objective(params):
        flat, unflatten = ravel_pytree(params)
        gradient = jax.grad(lambda flat: loss(unflatten(flat), TASKS.harmful))(flat)
        step = ALPHA * gradient / jnp.linalg.norm(gradient)
        step = step if exact else jax.lax.stop_gradient(step)
        return loss(params, TASKS.primary) + WEIGHT * collapse(unflatten(flat - step))

    value, expected = stated(objective)
    found, info = slope("ctrap", weight=WEIGHT, alpha=ALPHA, token=TOKEN, exact=exact)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-12)
    assert float(info.collapse) != pytest.approx(float(collapse(START)), rel=1e-3)


def test_the_answer_of_texts_keeps_which_tokens_count():
    texts = language.rows(4)
    found = one_answer(texts, 5)
    assert np.all(np.asarray(found.y.tokens) == 5)
    np.testing.assert_array_equal(found.y.mask, texts.y.mask)
    np.testing.assert_array_equal(found.x, texts.x)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": -1.0}, "weight"),
        ({"alpha": 0.0}, "alpha"),
        ({"token": -1}, "token"),
        ({"token": CLASSES}, f"one of {CLASSES} classes, got {CLASSES}"),
    ],
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        made("ctrap", **fields)
