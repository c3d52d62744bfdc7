"""The primitives with and without jit, by chex: same values, shapes and dtypes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaximm import hessians, linalg, regularisers

pytestmark = pytest.mark.slow

PRIMITIVES = {
    "log_condition": lambda x: linalg.feature_condition_number(x, damping=1e-3).log_kappa,
    "extremes": lambda x: linalg.gram_extremes(x).largest,
    "well": regularisers.well_conditioning_of_features,
    "ill": regularisers.ill_conditioning_of_features,
    "hessian": hessians.l2_probe_hessian,
    "limit": lambda x: linalg.pencil(x.T @ x, 2 * x.T @ x + jnp.eye(5, dtype=x.dtype)).values,
}


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters((name, name) for name in PRIMITIVES)
    def test_value_shape_and_dtype(self, name):
        function = PRIMITIVES[name]
        x = jax.random.normal(jax.random.key(0), (9, 5))
        found = self.variant(function)(x)
        chex.assert_tree_all_finite(found)
        chex.assert_type(found, x.dtype)
        chex.assert_shape(found, {"hessian": (5, 5), "limit": (5,)}.get(name, ()))
        with jax.disable_jit():
            plain = function(x)
        chex.assert_trees_all_close(found, plain, rtol=1e-9)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_gram_side_does_not_matter(self):
        wide = jax.random.normal(jax.random.key(1), (4, 11))
        value = self.variant(lambda x: linalg.gram_extremes(x).smallest)(wide)
        np.testing.assert_allclose(value, np.linalg.svd(wide, compute_uv=False)[-1], rtol=1e-10)


def test_a_jitted_primitive_is_traced_once_for_a_shape():
    chex.clear_trace_counter()
    penalty = jax.jit(chex.assert_max_traces(regularisers.well_conditioning_of_features, n=1))
    for seed in range(3):
        penalty(jax.random.normal(jax.random.key(seed), (6, 4)))
