"""The distance from noise against its definition, and RepNoise's step against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collapse_case import KEY, KEYS, TASKS, loss, made, sites_fn, slope, stated

from jaximm.immunisers.collapse.repnoise import noise_distance

pytestmark = pytest.mark.heavy


def defined(x, z, numpy=np):
    """The V-statistic as it is defined: kernels of all pairs, then four means."""
    both, n = numpy.concatenate([x, z]), len(x)
    squares = numpy.sum((both[:, None] - both[None]) ** 2, axis=-1)
    width = jax.lax.stop_gradient(squares.sum() / (2 * n * (2 * n - 1))) / 4
    kernel = numpy.stack([numpy.exp(-squares / (width * 2**s)) for s in range(5)]).sum(axis=0)
    blocks = kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]
    return blocks.mean()


def samples():
    return jax.random.normal(KEYS[5], (64, 16)), jax.random.normal(KEYS[0], (64, 16))


@jax.jit
def distance(x, z):
    return noise_distance(x, z)


def test_the_distance_is_that_of_its_definition():
    x, z = samples()
    for moved in (x, x + 1, 3 * x):
        expected = defined(np.asarray(moved), np.asarray(z))
        assert float(distance(moved, z)) == pytest.approx(float(expected), rel=1e-10)
    assert float(distance(x, z)) == pytest.approx(0.10, abs=5e-3)
    assert float(distance(x + 1, z)) == pytest.approx(1.11, abs=5e-3)
    assert float(distance(x, x)) == pytest.approx(0, abs=1e-14)


def test_rows_that_do_not_count_are_left_out():
    x, z = samples()
    counted = jnp.arange(64) % 3 > 0
    found = jax.jit(noise_distance)(x, z, counted)
    assert float(found) == pytest.approx(float(defined(x[counted], z[counted])), rel=1e-10)
    assert float(jax.jit(noise_distance)(x, z, jnp.zeros(64, bool))) == 0


def test_a_step_descends_the_formula():
    harmful = TASKS.harmful

    def objective(params):
        sites, distances = sites_fn(params.backbone, harmful.x), []
        for number, name in enumerate(("features", "first")):
            key = jax.random.fold_in(KEY, number)
            noise = jax.random.normal(key, sites[name].shape)
            distances.append(defined(sites[name], noise, jnp))
        noise = sum(distances) / 2
        return loss(params, TASKS.primary) + 0.5 * noise - 0.3 * jnp.log1p(loss(params, harmful))

    value, expected = stated(objective)
    found, info = slope("repnoise", noise_weight=0.5, ascent_weight=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-11)
    assert float(info.loss) == pytest.approx(float(value), rel=1e-12)


@pytest.mark.parametrize("name", ["noise_weight", "ascent_weight"])
def test_bad_settings_are_refused(name):
    with pytest.raises(ValueError, match=name):
        made("repnoise", **{name: -1.0})
