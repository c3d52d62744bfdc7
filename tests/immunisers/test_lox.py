"""LoX: what is added is the best low-rank part of what alignment has changed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaximm.immunisers.collapse.lox import extrapolated
from jaximm.models import llama
from tests import language
from tests.immuniser_cases import gaussian
from tests.immunisers import unlearning_cases as cases

pytestmark = pytest.mark.heavy


def test_kernels_are_extrapolated_along_their_strongest_directions():
    base = {
        "kernel": gaussian(1, 6, 5),
        "conv": gaussian(2, 3, 3, 2, 4),
        "bias": gaussian(3, 4),
    }
    aligned = {path: leaf + gaussian(9, *leaf.shape) for path, leaf in base.items()}
    found = extrapolated(*jax.tree.map(jnp.asarray, (aligned, base)), 2, 1.25)
    np.testing.assert_array_equal(found["bias"], aligned["bias"])
    for path in ("kernel", "conv"):
        change = (aligned[path] - base[path]).reshape(-1, base[path].shape[-1])
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        added = 1.25 * (u[:, :2] * s[:2]) @ vt[:2]
        wanted = aligned[path] + added.reshape(base[path].shape)
        np.testing.assert_allclose(found[path], wanted, rtol=1e-10, atol=1e-12)
    whole = extrapolated(*jax.tree.map(jnp.asarray, (aligned, base)), 99, 1.0)
    np.testing.assert_allclose(whole["kernel"], 2 * aligned["kernel"] - base["kernel"], rtol=1e-10)


@pytest.mark.slow
def test_the_layers_of_a_language_model_are_each_extrapolated():
    weights = llama.last_layers(language.params(), 2)
    aligned = jax.tree.map(lambda leaf: leaf + gaussian(3, *leaf.shape), weights)
    found = extrapolated(aligned, weights, 1, 1.0)
    path = "layers.gate.kernel"
    for layer in range(2):
        added = np.asarray(found.trained[path][layer] - aligned.trained[path][layer])
        change = np.asarray(aligned.trained[path][layer] - weights.trained[path][layer])
        values = np.linalg.svd(added, compute_uv=False)
        assert values[0] == pytest.approx(np.linalg.norm(change, 2), rel=1e-9)
        assert values[1] < 1e-9
    chex.assert_trees_all_equal(found.frozen, aligned.frozen)
    norms = [path for path in aligned.trained if "norm" in path]
    assert norms
    for path in norms:
        np.testing.assert_array_equal(found.trained[path], aligned.trained[path])


def test_with_a_reference_nothing_trains_and_without_one_it_aligns_first():
    with jax.numpy_dtype_promotion("standard"):
        optimiser = optax.adamw(0.1, weight_decay=0.5)
    start, base = cases.moved(), cases.params()
    given = cases.method("lox", cases.problem(reference=base, optimiser=optimiser), rank=1)
    state, info = cases.stepped(given, start, cases.PAIR, start)
    chex.assert_trees_all_equal(state.params, start)
    chex.assert_trees_all_close(given.finish(state), extrapolated(start, base, 1, 1.25), rtol=1e-12)
    assert float(info.task_loss) > 0

    aligning = cases.method("lox", rank=1)
    state, info = cases.stepped(aligning, base, cases.PAIR)
    value, expected = cases.descended(
        lambda theta: jnp.mean(cases.losses(theta, cases.PAIR.primary)), base
    )
    chex.assert_trees_all_close(state.params, expected, rtol=1e-10, atol=1e-12)
    assert float(info.task_loss) == pytest.approx(float(value), rel=1e-10)
    released = aligning.finish(state)
    chex.assert_trees_all_close(released, extrapolated(expected, base, 1, 1.25), rtol=1e-9)
