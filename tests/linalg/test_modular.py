import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import thinned

from jaximm.linalg.modular import PRIMES, modular_rank

pytestmark = pytest.mark.heavy

RANK = jax.jit(modular_rank)


def test_the_primes_are_primes_that_the_reduction_can_carry():
    for prime in PRIMES:
        assert all(prime % i for i in range(2, 182))
        assert prime < 2**15


@pytest.mark.parametrize("dtype", thinned(["float32", "float64"]))
@pytest.mark.parametrize(("n", "d"), [(90, 12), (12, 90), (7, 7)])
def test_integers_of_planted_rank_at_any_scale(n, d, dtype):
    rng = np.random.default_rng(0)
    k = min(n, d)
    stored, ranks = [], [0, 1, 2, k - 1, k]
    for rank in ranks:
        # Unit triangular leading blocks: the rank is as planted, whatever is drawn.
        left, right = rng.integers(-2, 3, (n, rank)), rng.integers(-2, 3, (rank, d))
        left[:rank] = np.tril(left[:rank], -1) + np.eye(rank, dtype=int)
        right[:, :rank] = np.triu(right[:, :rank], 1) + np.eye(rank, dtype=int)
        x = left[rng.permutation(n)] @ right[:, rng.permutation(d)]
        stored.append(np.ldexp(x, rng.integers(-100, 100)).astype(dtype))
    np.testing.assert_array_equal(jax.jit(jax.vmap(modular_rank))(np.stack(stored)), ranks)


def test_what_no_decomposition_sees():
    tiny, subnormal = 1e-300, 5e-324
    ones = np.ones((3, 3))
    for x, rank in [
        (np.diag([1, 0.5, tiny]), 3),
        (np.diag([1, 0.5, subnormal]), 3),
        (ones, 1),
        (ones + np.diag([0, 0, 2.0**-52]), 2),
        (np.diag([1, -tiny, 0]), 2),
        (np.diag([1.0, PRIMES[0] * PRIMES[1], PRIMES[2]]), 3),
        (np.array([[0.1, 0.2, 0.1], [0.2, 0.4, 0.2], [0.3, 0.6, 0.3]]), 1),
    ]:
        # 0.1, 0.2, 0.4 are one float doubled; 0.3, 0.6 are another.
        assert int(RANK(jnp.asarray(x))) == rank


def test_enough_stops_early_and_half_precision_is_exact_too():
    assert int(RANK(jnp.eye(7), enough=3)) == 4
    assert int(RANK(jnp.ones((7, 7)), enough=3)) == 1
    assert int(RANK(jnp.eye(4, dtype=jnp.bfloat16))) == 4
    with pytest.raises(ValueError, match="float dtype"):
        modular_rank(np.eye(2, dtype=int))


@pytest.mark.parametrize("entry", [np.nan, np.inf])
def test_an_entry_that_is_no_number_has_no_rank(entry):
    assert int(modular_rank(np.array([[1.0, entry], [0.0, 1.0]]))) == -1
