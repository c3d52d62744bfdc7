"""Decompositions under vmap: those of one matrix, without a batched LAPACK call."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm.linalg import batched


@pytest.fixture(scope="module")
def matrices():
    drawn = jax.random.normal(jax.random.key(0), (2, 4, 7, 5))
    return drawn, jnp.einsum("abij,abik->abjk", drawn, drawn)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_batches_are_the_matrices_one_by_one(matrices, dtype):
    drawn, symmetric = (part.astype(dtype) for part in matrices)
    for function, of_numpy, given in (
        (batched.eigh, np.linalg.eigh, symmetric),
        (batched.svd, lambda a: np.linalg.svd(a, full_matrices=False), drawn),
    ):
        found = jax.jit(jax.vmap(jax.vmap(function)))(given)
        for a, b in np.ndindex(2, 4):
            alone = function(given[a, b])
            for many, one in zip(found, alone, strict=True):
                assert many.dtype == dtype
                np.testing.assert_allclose(many[a, b], one, rtol=0, atol=50 * jnp.finfo(dtype).eps)
        values = 0 if function is batched.eigh else 1
        expected = of_numpy(np.asarray(given))[values]
        np.testing.assert_allclose(
            found[values], expected, rtol=0, atol=100 * float(jnp.finfo(dtype).eps)
        )


def test_on_a_cpu_no_call_to_lapack_holds_a_batch(matrices):
    def ranks(function, given):
        """Ranks of the matrices that LAPACK gets."""
        text = jax.jit(jax.vmap(function)).lower(given).compile().as_text()
        calls = [line for line in text.splitlines() if 'target="lapack_' in line]
        assert calls
        return {len(re.findall(r"f64\[([\d,]*)\]", line)[0].split(",")) for line in calls}

    drawn, symmetric = matrices[0][0], matrices[1][0]
    assert ranks(batched.eigh, symmetric) == ranks(batched.svd, drawn) == {2}
    assert ranks(jnp.linalg.eigh, symmetric) == {3}  # what can hang, or nothing is tested here
