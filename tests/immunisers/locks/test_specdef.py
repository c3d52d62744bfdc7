"""SpecDef: the function stays, plain gradient descent is blocked, and what brings it back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.immunisers.locks import specdef
from tests import lock_cases

K, PATHS = 6, ["0.kernel", "1.kernel"]
RATES = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1)
"""Of plain descent, as far down as the table goes that reports it blocked."""


def released_fn(params, x):
    """The released model: two layers where one was, in their product."""
    return lock_cases.features_fn(specdef.fuse(params), x)


def deformed(alpha, dtype=jnp.float64):
    params = {path: leaf.astype(dtype) for path, leaf in lock_cases.taught()[0].items()}
    return specdef.specdef(params, PATHS, k=K, alpha=alpha), params


def test_the_largest_singular_values_grow_and_the_product_is_the_matrix():
    released, params = deformed(1e4)
    for path in PATHS:
        before, after = (np.linalg.svd(p[path], compute_uv=False) for p in (params, released))
        expected = np.sort(before * np.where(np.arange(before.size) < K, 1e4, 1))[::-1]
        np.testing.assert_allclose(after, expected, rtol=1e-8)
        undo = released[f"{path}.compensation"]
        assert undo.shape == (params[path].shape[1],) * 2
        np.testing.assert_allclose(undo, undo.T, atol=1e-12)
        np.testing.assert_allclose(released[path] @ undo, params[path], rtol=0, atol=1e-10)
    assert specdef.fuse(released).keys() == params.keys()


def test_a_wide_matrix_is_compensated_on_all_of_its_outputs():
    wide = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((3, 7)))}
    released = specdef.specdef(wide, ["w"], k=2, alpha=100.0)
    undo = released["w.compensation"]
    np.testing.assert_allclose(specdef.fuse(released)["w"], wide["w"], rtol=0, atol=1e-12)
    values = np.linalg.eigvalsh(undo)
    np.testing.assert_allclose(values, [0.01, 0.01, 1, 1, 1, 1, 1], rtol=1e-9)


def test_the_function_is_preserved_and_float32_loses_digits_with_alpha():
    x, drifts = lock_cases.digits()[1].x, {}
    for dtype in (jnp.float64, jnp.float32):
        for alpha in (10.0, 1e3, 1e5):
            released, params = deformed(alpha, dtype)
            rows = x.astype(dtype)
            expected = lock_cases.features_fn(params, rows)
            drifts[dtype, alpha] = float(jnp.abs(released_fn(released, rows) - expected).max())
    assert max(drifts[jnp.float64, alpha] for alpha in (10.0, 1e3, 1e5)) < 1e-8
    single = [drifts[jnp.float32, alpha] for alpha in (10.0, 1e3, 1e5)]
    assert single[0] < 1e-4 < 1e-3 < single[2]  # alpha times the precision
    assert single[0] < single[1] < single[2]


def test_gradients_grow_with_alpha_and_fusing_restores_them():
    train = lock_cases.harmful(lock_cases.digits()[0])
    kernel = lock_cases.head(2)

    def loss_fn(params):
        logits = released_fn(params, train.x) @ kernel
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(train.y.size), train.y])

    slope = jax.grad(loss_fn)
    released, params = deformed(1e3)
    plain, restored, grown = slope(params), slope(specdef.fuse(released)), slope(released)
    for path in PATHS:
        np.testing.assert_allclose(restored[path], plain[path], rtol=0, atol=1e-10)
        # d/dC = W~^T g: alpha times as large along the directions that grew.
        assert np.linalg.norm(grown[f"{path}.compensation"]) > 50 * np.linalg.norm(plain[path])


@pytest.mark.heavy
def test_plain_descent_is_blocked_above_its_rate_and_four_ways_are_not():
    """The breakers: a smaller rate, clipping, Adam, fusing; each the best of its rates."""
    released, params = deformed(1e5)
    sgd, adam = lock_cases.SGD, lock_cases.ADAM

    def best(params, optimiser, rates, features=released_fn):
        return lock_cases.attacked(
            params, features=features, optimiser=optimiser, rates=rates, steps=100
        )

    undefended = best(params, sgd[None], RATES, lock_cases.features_fn)
    blocked = best(released, sgd[None], RATES)
    smaller = best(released, sgd[None], (1e-11, 3e-11))
    clipped = best(released, sgd[1.0], (1e-6, 1e-5, 1e-4))
    adaptive = best(released, adam[None], (1e-6, 1e-5, 1e-4))
    fused = best(specdef.fuse(released), sgd[None], RATES, lock_cases.features_fn)
    assert undefended > 0.83
    assert blocked < 0.6
    assert min(smaller, clipped, adaptive) > undefended - 0.07, (smaller, clipped, adaptive)
    assert fused == pytest.approx(undefended, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 0}, r"k must be in \[1, 24\]"),
        ({"k": 25}, r"k must be in \[1, 24\]"),
        ({"alpha": 0.0}, "alpha must be finite"),
        ({"alpha": float("inf")}, "alpha must be finite"),
        ({"paths": ["0.bias"]}, "must be a matrix that is not deformed; choose from"),
        ({"paths": ["2.kernel"]}, "'2.kernel' must be a matrix"),
        ({"paths": ["0.kernel", "0.kernel"]}, "not deformed"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    settings = {"paths": ["0.kernel"], "k": 1, "alpha": 2.0, **settings}
    with pytest.raises(ValueError, match=words):
        specdef.specdef(lock_cases.start(), settings.pop("paths"), **settings)
