"""A hypernetwork: its formula in NumPy, its budget, and what has a gradient in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.models.adapters.hypernetwork import HyperSize, hyper_apply, hyper_init
from jaximm.models.adapters.lora import merged

pytestmark = pytest.mark.heavy

SIZE = HyperSize(width=8, rank=2, heads=2)
N, WIDE, LAYERS = 5, 3, 2


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


PARAMS = {"0": normal(0, WIDE, 4), "layers": normal(1, LAYERS, 4, 6), "bias": normal(2, 6)}
KERNELS = {path: PARAMS[path] for path in ("0", "layers")}
ROWS = {"features": normal(3, N, 7), "layers": normal(4, LAYERS, N, 4)}
STACKED = {"layers": 1}


def phi_of(first=1.0):
    widths = {"features": 7, "layers": 4}
    return hyper_init(jax.random.key(0), KERNELS, widths, SIZE, stacked=STACKED, first=first)


write = jax.jit(
    lambda phi, rows, budget, counted=None: hyper_apply(
        phi, rows, KERNELS, SIZE, budget, counted=counted
    )
)


def by_hand(phi, rows, place, top):
    """A and B before the budget, with loops."""

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    z = norm(np.asarray(rows) @ phi.enter[str(rows.shape[1])])
    mixed = []
    for head in np.split(np.arange(8), 2):
        query, key, value = (
            (z @ phi.attention[name])[:, head] for name in ("query", "key", "value")
        )
        scores = np.exp(query @ key.T / 2)  # the root of 8 / 2
        mixed.append(scores / scores.sum(1, keepdims=True) @ value)
    z = z + np.concatenate(mixed, axis=1) @ phi.attention["output"]
    ((up, down),) = phi.blocks
    z = z + np.asarray(jax.nn.gelu(norm(z) @ up)) @ down
    e = norm(z.mean(0) + place)
    return (e @ top.a).reshape(-1, 2), (e @ top.b).reshape(2, -1)


def test_it_is_the_formula_and_layers_read_their_own_rows():
    phi = phi_of()
    found = write(phi, ROWS, 1e3)  # a budget that holds nobody
    a, b = by_hand(phi, ROWS["features"], phi.tops["0"].place, phi.tops["0"])
    np.testing.assert_allclose(found["0"].a, a, rtol=1e-10)
    np.testing.assert_allclose(found["0"].b, b, rtol=1e-10)
    top = phi.tops["layers"]
    for layer in range(LAYERS):
        a, b = by_hand(phi, ROWS["layers"][layer], top.place[layer], top)
        np.testing.assert_allclose(found["layers"].a[layer], a, rtol=1e-10)
        np.testing.assert_allclose(found["layers"].b[layer], b, rtol=1e-10)


@pytest.mark.parametrize("budget", [1e-3, 0.5])
def test_no_patch_is_above_its_budget(budget):
    patch = jax.tree.map(jnp.subtract, merged(PARAMS, write(phi_of(), ROWS, budget)), PARAMS)
    np.testing.assert_array_equal(patch["bias"], 0)
    pairs = [(patch["0"], PARAMS["0"])]
    pairs += list(zip(patch["layers"], PARAMS["layers"], strict=True))
    for moved, kernel in pairs:
        ratio = np.linalg.norm(moved) / np.linalg.norm(kernel)
        assert 0 < ratio <= budget * (1 + 1e-12)
        if budget < 0.1:  # what it would write is larger
            assert ratio == pytest.approx(budget, rel=1e-9)


def test_rows_that_do_not_count_and_the_order_of_rows_change_nothing():
    phi, counted = phi_of(), jnp.array([True, True, False, True, False])
    one = write(phi, ROWS, 0.5, counted)
    other = {name: jnp.where(counted[:, None], rows, 9.0) for name, rows in ROWS.items()}
    for pair in zip(*map(jax.tree.leaves, (one, write(phi, other, 0.5, counted))), strict=True):
        np.testing.assert_allclose(*pair, rtol=1e-10)
    turned = {name: rows[..., ::-1, :] for name, rows in ROWS.items()}
    for pair in zip(
        *map(jax.tree.leaves, (write(phi, ROWS, 0.5), write(phi, turned, 0.5))), strict=True
    ):
        np.testing.assert_allclose(*pair, rtol=1e-9, atol=1e-12)
    assert not np.allclose(one["0"].b, write(phi, ROWS, 0.5)["0"].b)


def test_a_zero_start_is_the_model_and_has_a_gradient_that_kernels_have_not():
    phi = phi_of(first=0.0)

    def loss(phi, kernels):
        patched = merged(PARAMS, hyper_apply(phi, ROWS, kernels, SIZE, 0.5))
        return jnp.sum(jnp.sin(patched["0"])) + jnp.sum(patched["layers"] ** 3)

    for path, leaf in merged(PARAMS, write(phi, ROWS, 0.5)).items():
        np.testing.assert_array_equal(leaf, PARAMS[path])
    slopes, of_kernels = jax.jit(jax.grad(loss, argnums=(0, 1)))(phi, KERNELS)
    for top in slopes.tops.values():
        assert np.isfinite(top.b).all()
        assert np.abs(top.b).max() > 1e-3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_kernels))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"width": 6}, "width 6 must divide by 4 heads"),
        ({"blocks": 1.5}, "blocks must be an integer"),
    ],
)
def test_sizes_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        HyperSize(**fields)


def test_kernels_without_rows_are_refused():
    with pytest.raises(ValueError, match="kernel '0' has no rows to read"):
        hyper_init(jax.random.key(0), KERNELS, {"layers": 4}, SIZE, stacked=STACKED)
    with pytest.raises(ValueError, match="got none"):
        hyper_init(jax.random.key(0), {}, {"features": 4}, SIZE)
