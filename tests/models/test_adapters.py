"""Low-rank adapters: beside the weights they do what they do merged into them."""

import functools

import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest
from language import CONFIG

from jaximm.models import llama
from jaximm.models.adapters import lora
from jaximm.models.llama import model

pytestmark = pytest.mark.heavy

PARAMS, TOKENS = language.params(), language.rows().x


@functools.partial(jax.jit, static_argnames="remat")
def states(params, adapters, remat=False):
    return llama.hidden(params, TOKENS, CONFIG, adapters=adapters, remat=remat)


def adapters_of(targets, rank=3):
    made = llama.with_adapters(PARAMS, jax.random.key(1), rank=rank, targets=targets).adapters
    keys = jax.random.split(jax.random.key(2), len(made))
    return {
        path: one._replace(b=0.3 * jax.random.normal(key, one.b.shape, one.b.dtype))
        for key, (path, one) in zip(keys, made.items(), strict=True)
    }


def test_carried_through_the_scan_they_are_the_merged_model():
    adapters = adapters_of("layers")
    assert set(adapters) == {f"layers.{name}.kernel" for name in model.LINEAR}
    assert adapters["layers.down.kernel"].a.shape == (2, 24, 3)
    assert adapters["layers.down.kernel"].b.shape == (2, 3, 16)
    merged = states(lora.merged(PARAMS, adapters), {})
    np.testing.assert_allclose(states(PARAMS, adapters), merged, rtol=1e-12, atol=1e-12)
    assert float(jnp.max(jnp.abs(merged - states(PARAMS, {})))) > 0.1
    doubled = lora.merged(PARAMS, adapters, 2.0)["layers.up.kernel"]
    once = lora.scaled(adapters, 2.0)
    np.testing.assert_array_equal(doubled, lora.merged(PARAMS, once)["layers.up.kernel"])


def test_the_start_is_the_model_and_a_has_variance_one_over_in():
    made = llama.with_adapters(PARAMS, jax.random.key(0), rank=64, targets="layers.query").adapters
    (factors,) = made.values()
    np.testing.assert_array_equal(states(PARAMS, made), states(PARAMS, {}))
    assert float(jnp.std(factors.a)) == pytest.approx(16**-0.5, rel=0.05)
    assert not np.array_equal(factors.a[0], factors.a[1])  # layers draw their own


def test_gradients_reach_adapters_alone_and_no_copy_of_the_weights_is_made():
    def loss(adapters, params):
        return jnp.sum(llama.hidden(params, TOKENS, CONFIG, adapters=adapters) ** 3)

    adapters = adapters_of("layers.value,layers.gate")
    slopes = jax.jit(jax.grad(loss))(adapters, PARAMS)
    path = "layers.gate.kernel"
    # d loss / d A = (d loss / d W) B^T where W = W_0 + A B.
    full = jax.jit(jax.grad(lambda p: loss({}, p)))(lora.merged(PARAMS, adapters))[path]
    expected = full @ jnp.swapaxes(adapters[path].b, 1, 2)
    np.testing.assert_allclose(slopes[path].a, expected, rtol=1e-9, atol=1e-9)
    text = jax.jit(jax.grad(loss)).lower(adapters, PARAMS).as_text()
    # A merged kernel, or its gradient, would be a product of this shape.
    assert "-> tensor<2x16x24xf64>" not in text


def test_what_is_no_kernel_is_refused():
    factors = lora.Factors(jnp.ones((2, 4, 1)), jnp.ones((2, 1, 1)))
    with pytest.raises(ValueError, match="of the layers has no adapter"):
        states(PARAMS, {"layers.query_norm.scale": factors})
    with pytest.raises(ValueError, match="names no kernel of a layer; there are"):
        llama.with_adapters(PARAMS, jax.random.key(0), targets="embedding")
    with pytest.raises(ValueError, match="rank of adapters must be >= 1"):
        llama.with_adapters(PARAMS, jax.random.key(0), rank=0)
    with pytest.raises(ValueError, match="targets must be"):
        lora.named_by(" , ")
