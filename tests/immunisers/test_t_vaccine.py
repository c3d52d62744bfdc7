"""T-Vaccine: how layers are drawn, and that only those move."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collapse_case import KEY, START, TASKS, features_fn, loss, made, perturbed_losses
from jax.flatten_util import ravel_pytree

from jaximm.immunisers import Problem, make_config, make_immuniser
from jaximm.immunisers.collapse.t_vaccine import draw, slopes_of

pytestmark = pytest.mark.heavy


def test_layers_are_drawn_one_after_the_other_by_their_share():
    slopes, draws = np.array([1.0, 2.0, 5.0]), 4000
    keys = jax.random.split(jax.random.key(0), draws)
    drawn = jax.jit(jax.vmap(lambda key: draw(key, jnp.asarray(slopes), 2)))(keys)
    assert np.all(np.sum(drawn, axis=1) == 2)
    for pair in itertools.combinations(range(3), 2):
        expected = sum(
            slopes[a] / slopes.sum() * slopes[b] / (slopes.sum() - slopes[a])
            for a, b in itertools.permutations(pair)
        )
        share = np.mean(np.all(drawn[:, list(pair)], axis=1))
        assert share == pytest.approx(expected, abs=4 * (expected / draws) ** 0.5)


def test_a_layer_is_as_steep_as_the_gradient_of_its_parameters():
    gradient = jax.grad(lambda params: loss(params, TASKS.harmful))(START).backbone
    kernels, biases = (
        [float(np.linalg.norm(gradient[f"{name}.{part}"])) for name in ("first", "second")]
        for part in ("kernel", "bias")
    )
    expected = np.hypot(kernels, biases)
    np.testing.assert_allclose(slopes_of(gradient), expected, rtol=1e-12)


def test_drawn_layers_move_and_the_others_do_not():
    one = made("t_vaccine", share=0.5, refresh=3, optimiser=optax.sgd(0.1, momentum=0.9))
    state, update = one.init(START, KEY), jax.jit(one.update)
    seen = []
    for step in range(24):
        before = state.params
        state, _ = update(state, TASKS, jax.random.fold_in(KEY, step))
        seen.append(tuple(np.asarray(state.memory.layers)))
        assert sum(seen[-1]) == 1
        for name, drawn in zip(("first", "second"), seen[-1], strict=True):
            same = np.array_equal(
                before.backbone[f"{name}.kernel"], state.params.backbone[f"{name}.kernel"]
            )
            assert same != drawn
        assert not np.array_equal(before.head.kernel, state.params.head.kernel)
    assert all(len(set(seen[start : start + 3])) == 1 for start in range(0, 24, 3))
    assert len(set(seen)) == 2


def test_offsets_of_the_drawn_sites_have_the_norm():
    """With every layer drawn it is Vaccine, but for the site of no layer's name."""
    whole, part = (
        made(name, **more) for name, more in (("vaccine", {}), ("t_vaccine", {"share": 1.0}))
    )
    found = [
        ravel_pytree(jax.jit(one.update)(one.init(START, KEY), TASKS, KEY)[0].params)[0]
        for one in (whole, part)
    ]
    np.testing.assert_allclose(*found, rtol=1e-10)
    one = made("t_vaccine", share=0.5)
    state, info = jax.jit(one.update)(one.init(START, KEY), TASKS, KEY)
    first = state.memory.layers[0]
    primary = TASKS.primary
    zeros = {"first": jnp.zeros((40, 32)), "features": jnp.zeros((40, 16))}
    pull = jax.grad(lambda e: jnp.mean(perturbed_losses(START, primary, e)))(zeros)
    pull["first"] = pull["first"] * first.astype(float)
    size = np.linalg.norm(ravel_pytree(pull)[0])
    worst = jax.tree.map(lambda leaf: 2.0 * leaf / size, pull)
    expected = float(jnp.mean(perturbed_losses(START, primary, worst)))
    assert float(info.perturbed_loss) == pytest.approx(expected, rel=1e-10)


def test_what_it_cannot_do_is_refused():
    for fields, words in (
        ({"rho": 0.0}, "rho"),
        ({"share": 0.0}, "share"),
        ({"refresh": 0}, "refresh"),
    ):
        with pytest.raises(ValueError, match=words):
            made("t_vaccine", **fields)
    problem = Problem(
        features_fn=features_fn,
        losses_fn=lambda params, batch: batch.x[:, 0],
        optimiser=optax.sgd(1.0),
    )
    one = make_immuniser("t_vaccine", make_config("t_vaccine"), problem)
    with pytest.raises(ValueError, match="got ProbeParams and not a dict by path; use vaccine"):
        one.init(START, KEY)
