"""SEAM's cosine and step against automatic differentiation of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collapse_case import START, TASKS, cross_entropy, loss, made, sites_fn, slope, stated
from jax.flatten_util import ravel_pytree

from jaximm.immunisers.collapse.seam import gradient_cosine

pytestmark = pytest.mark.heavy


def harmful_loss(params):
    return loss(params, TASKS.harmful)


def benign_loss(params):
    return loss(params, TASKS.primary)


def cosine(params):
    """Differentiated through both gradients."""
    one, other = (ravel_pytree(jax.grad(f)(params))[0] for f in (harmful_loss, benign_loss))
    return one @ other / (jnp.linalg.norm(one) * jnp.linalg.norm(other))


def test_two_products_are_the_gradient_of_the_cosine():
    value, expected = stated(cosine)
    found_value, found = stated(lambda p: gradient_cosine(harmful_loss, benign_loss, p))
    assert float(found_value) == pytest.approx(float(value), rel=1e-12)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 1e-13


def test_a_step_descends_the_formula():
    value, expected = stated(
        lambda p: -jnp.log1p(harmful_loss(p)) + 0.7 * benign_loss(p) + 0.3 * cosine(p)
    )
    found, info = slope("seam", align_weight=0.7, cosine_weight=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-12)
    assert float(info.cosine) == pytest.approx(float(cosine(START)), rel=1e-12)


@pytest.mark.slow
def test_layers_of_the_head_s_width_are_read_by_the_head():
    """A third site as wide as the features: the harmful loss is the mean of two readings."""

    def wider(backbone, x):
        sites = sites_fn(backbone, x)
        return sites | {"extra": jnp.tanh(2 * sites["features"])}

    _, info = slope("seam", problem_fields={"sites_fn": wider})
    params, (x, y) = START, TASKS.harmful
    features = sites_fn(params.backbone, x)["features"]
    read = [
        jnp.mean(cross_entropy(layer @ params.head.kernel + params.head.bias[None], y))
        for layer in (features, jnp.tanh(2 * features))
    ]
    assert float(info.harmful_loss) == pytest.approx(float(sum(read) / 2), rel=1e-12)


def test_a_gradient_of_zero_gives_a_cosine_of_zero():
    value, found = stated(lambda p: gradient_cosine(harmful_loss, lambda _: jnp.zeros(()), p))
    assert float(value) == 0
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("name", ["align_weight", "cosine_weight"])
def test_bad_settings_are_refused(name):
    with pytest.raises(ValueError, match=name):
        made("seam", **{name: -1.0})
