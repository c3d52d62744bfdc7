r"""The rank of a matrix of floats, exactly: elimination modulo primes.

Every float is m 2^e, so a matrix of floats is a matrix of rationals and has residues modulo every
odd prime. Reduction modulo p is a ring homomorphism: a minor that vanishes over the rationals
vanishes modulo p. So

    rank modulo p <= rank,    with equality unless p divides every minor of order rank.

No singular value decomposition can tell an exact zero from 1e-20 of the largest; this can. The
largest of the ranks modulo four primes is a proven lower bound on the rank. That it is the rank
rests on chance: for residues that behave like random ones, all four fall short with a probability
of about 2^-59 (product of the 1 / p; Kaltofen and Saunders 1991,
https://doi.org/10.1007/3-540-54522-0_93). The primes are in no way special, so that data made of
powers of two and small numbers do not meet them.

Arithmetic is in uint32 alone, so that it is the same with x64 on or off: products of residues below
2^15 are reduced as in Montgomery (1985), https://doi.org/10.1090/S0025-5718-1985-0777282-X, by
R = 2^16, without a division.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from jaximm.linalg.arrays import as_matrix, one_program

PRIMES = (32749, 32719, 31699, 30707)
"""Primes below 2^15, the modulus at which `_product` works."""


@one_program
def modular_rank(
    matrix: Float[Array, "n d"], *, enough: int | Int[Array, ""] | None = None
) -> Int[Array, ""]:
    """The exact rank of the matrix as stored; never above it, below it with probability ~2^-59.

    Subnormal entries count as they are. Cost: some n d min(n, d) multiplications a prime, and
    the memory of a few square matrices of the short side.

    Args:
      matrix: any float dtype.
      enough: stop once the rank is known to be above this number; the result is then only known to
        be above it. None: never.

    Returns:
      int32; -1 where the matrix has an entry that is NaN or inf. Constant under differentiation.

    Raises:
      ValueError: if `matrix` is not a non-empty float (n, d) array.

    >>> int(modular_rank(jnp.array([[1.0, 1.0], [1.0, 1.0 + 2.0**-20], [0.0, 0.0]])))
    2
    """
    matrix = lax.stop_gradient(as_matrix(matrix))
    columns = min(matrix.shape)
    enough = jnp.minimum(columns if enough is None else enough, columns - 1)
    primes = np.array(PRIMES, np.uint32)
    # -1 / p modulo 2^16, which Montgomery's reduction multiplies by.
    inverses = np.array([-pow(p, -1, 2**16) % 2**16 for p in PRIMES], np.uint32)
    powers = np.array([[pow(2, i, p) for i in range(2048)] for p in PRIMES], np.uint32)

    def of_prime(carry):
        index, best = carry
        rank = _rank(
            matrix,
            jnp.asarray(primes)[index],
            jnp.asarray(inverses)[index],
            jnp.asarray(powers)[index],
            enough,
        )
        return index + 1, jnp.maximum(best, rank)

    # A zero that comes from the data varies over a mesh as they do, as shard_map wants of a carry.
    zero = jnp.zeros_like(matrix[0, 0], jnp.int32)
    rank = lax.while_loop(
        lambda carry: (carry[0] < len(PRIMES)) & (carry[1] <= enough), of_prime, (zero, zero)
    )[1]
    return jnp.where(jnp.all(jnp.isfinite(matrix)), rank, -1)


def _rank(matrix, prime, inverse, powers, enough) -> Int[Array, ""]:
    """Rank modulo `prime`, from blocks along the long side; stops above `enough`."""
    long, columns = max(matrix.shape), min(matrix.shape)
    axis = 0 if matrix.shape[0] == long else 1
    # Four times the basis: little is eliminated twice, and a block still fits a cache.
    size = min(long, 4 * columns)

    def next_block(carry):
        start, basis, _ = carry
        # The last slice is moved back to where it fits: rows seen twice change no rank.
        block = lax.dynamic_slice_in_dim(matrix, start, size, axis)
        residues = _residues(block if axis == 0 else block.T, prime, powers)
        if size < long:
            residues = jnp.concatenate([basis, residues])
        return start + size, *_echelon(residues, prime, inverse, enough)

    zero = jnp.zeros_like(matrix[0, 0], jnp.int32)
    basis = jnp.broadcast_to(zero.astype(jnp.uint32), (columns, columns))
    return lax.while_loop(
        lambda carry: (carry[0] < long) & (carry[2] <= enough), next_block, (zero, basis, zero)
    )[2]


def _echelon(residues: UInt32[Array, "n d"], prime, inverse, enough):
    """A basis [d, d] of the rows modulo `prime`, zeros below it, and their rank."""

    def eliminate(carry):
        left, column, basis, rank = carry
        factors = left[:, column]
        row = left[jnp.argmax(factors != 0)]
        pivot = row[column]
        is_pivot = pivot != 0
        basis = basis.at[rank].set(jnp.where(is_pivot, row, basis[rank]))
        # Cross-multiplied: no inverse is needed, and the pivot's own row becomes zero. Montgomery's
        # factor 1 / R is common to all entries, so it changes no rank.
        kept = _product(left, jnp.where(is_pivot, pivot, 1), prime, inverse)
        taken = _product(factors[:, None], row[None, :], prime, inverse)
        left = _reduced(kept + (prime - taken), prime)
        return left, column + 1, basis, rank + is_pivot.astype(jnp.int32)

    zero = jnp.zeros_like(residues[0, 0], jnp.int32)
    columns = residues.shape[1]
    basis = jnp.zeros_like(residues[:columns])
    _, _, basis, rank = lax.while_loop(
        lambda carry: (carry[1] < columns) & (carry[3] <= enough),
        eliminate,
        (residues, zero, basis, zero),
    )
    return basis, rank


def _residues(matrix, prime, powers: UInt32[Array, "e"]) -> UInt32[Array, "n d"]:
    """matrix * 2^c modulo `prime` from the bits, c one number for all entries.

    From the bits, since arithmetic on subnormal numbers may flush them to zero.
    """
    bits = lax.bitcast_convert_type(matrix, jnp.uint32)  # of float64: [n, d, 2], low word first
    if matrix.dtype == jnp.float32:
        high, fraction, low = bits, 23, None
    else:
        high, fraction, low = bits[..., 1], 20, bits[..., 0]
    exponent = (high & 0x7FFFFFFF) >> fraction
    hidden = jnp.where(exponent > 0, jnp.uint32(2**fraction), 0)
    residue = ((high & (2**fraction - 1)) | hidden) % prime
    if low is not None:
        residue = (residue * powers[32] + low % prime) % prime
    residue = residue * powers[jnp.maximum(exponent, 1)] % prime
    return jnp.where(high >> 31 == 1, _reduced(prime - residue, prime), residue)


def _product(a, b, prime, inverse):
    """a b / 2^16 modulo `prime`, for a, b below it."""
    full = a * b
    multiple = ((full & 0xFFFF) * inverse) & 0xFFFF
    return _reduced((full + multiple * prime) >> 16, prime)


def _reduced(value, prime):
    """`value` modulo `prime`, for a value below twice the prime."""
    return jnp.where(value >= prime, value - prime, value)
