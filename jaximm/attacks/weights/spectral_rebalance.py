r"""The singular values of every matrix are pulled to their geometric mean, then AdamW.

    W = U S V^T,     s_i <- s_bar^strength * s_i^(1 - strength),     s_bar = (prod s_i)^(1 / k),

over the k values above rounding (`rank_rtol` times the largest); those below count as that floor,
so that at strength 1 every W becomes s_bar times an orthogonal polar factor, whatever its rank: a
direction that was erased comes back, since what the singular vectors of a zero are is all that an
orthogonal completion needs. A convolution kernel is the matrix [all axes but the last, out].
Vectors and the head stay.

It knows what a condition-number defence does. A linear backbone f = theta^T x has the Hessian
H = theta^T K theta, and theta = s_bar Q with an orthogonal Q gives

    kappa(H) = kappa(s_bar^2 Q^T K Q) = kappa(K),

that of the raw inputs. Exactly so for a square theta, up to the rounding of its SVD. (With fewer
features than inputs Q^T K Q is a compression of K, whose kappa is no larger; with more, its
non-zero eigenvalues are those of K.)
"""

from __future__ import annotations

import math
from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm.attacks.grid import Hyper, Values
from jaximm.attacks.weights.descent import EDIT_RATES, AdamW, adam_of, descent, scaled_head, tuning
from jaximm.attacks.weights.paths import over_matrices, paths_of
from jaximm.attacks.weights.problem import Access, FineTuneProblem, ModelWeights, WeightAttack
from jaximm.linalg import batched
from jaximm.linalg.extremes import rank_rtol
from jaximm.models.adapters.lora import matrix_shape

SOURCE = (
    "Higham (1986), Computing the polar decomposition, with applications, "
    "https://doi.org/10.1137/0907079; what it undoes: Zheng et al. (2025), Model immunization from "
    "a condition number perspective, https://arxiv.org/abs/2505.23760"
)


def rebalanced(matrix: Float[Array, "m n"], strength: Float[Array, ""]) -> Float[Array, "m n"]:
    """The matrix with its singular values pulled to their geometric mean; all zeros stay."""
    left, values, right = batched.svd(matrix)
    floor = rank_rtol(matrix.shape, matrix.dtype) * values[0]
    kept = values > floor
    logs = jnp.log(jnp.where(values[0] > 0, jnp.maximum(values, floor), 1.0))
    count = jnp.maximum(jnp.sum(kept), 1).astype(logs.dtype)
    mean = jnp.sum(jnp.where(kept, logs, 0.0)) / count
    pulled = jnp.where(values[0] > 0, jnp.exp(strength * mean + (1 - strength) * logs), 0.0)
    return jnp.matmul(left * pulled[None, :], right, precision="highest")


def _start(access: Access, hyper: Hyper) -> ModelWeights:
    """The weights with every matrix of the backbone rebalanced."""
    weights = scaled_head(access, hyper)

    def edit(leaf):
        matrix = leaf.reshape(matrix_shape(leaf.shape))
        return rebalanced(matrix, hyper["strength"].astype(leaf.dtype)).reshape(leaf.shape)

    return weights._replace(params=over_matrices(edit, weights.params, access.stacked))


# Built once: the same function objects each time, so that jit finds the compiled run again.
_REBALANCE = descent(adam_of, _start)


def svd_flops(problem: FineTuneProblem) -> tuple[float, float]:
    """Of the thin singular value decompositions of all matrices of the backbone, once.

    6 m n^2 + 20 n^3, m >= n: Golub and Van Loan, Matrix computations, 8.6.
    """
    total = 0.0
    params = problem.params
    for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True):
        layers = problem.stacked(path)
        if leaf.ndim - layers >= 2:
            n, m = sorted(matrix_shape(leaf.shape, layers)[layers:])
            total += math.prod(leaf.shape[:layers]) * (6.0 * m * n**2 + 20.0 * n**3)
    return total, 0.0


def spectral_rebalance(*, strengths: Values = (0.5, 1.0), **adamw: Unpack[AdamW]) -> WeightAttack:
    """AdamW after singular values are pulled to their geometric mean.

    Args:
      strengths: in (0, 1]; 1 makes all singular values of a matrix equal.
      **adamw: see `AdamW`.
    """
    return tuning(
        _REBALANCE,
        adamw,
        rates=EDIT_RATES,
        tried={"strength": (strengths, "(0, 1]")},
        bounds=(("strength", 0.0), ("strength", 1.0)),
        title="spectral rebalance",
        kind="undo",
        source=SOURCE,
        knows="that the defence is one of conditioning",
        traits=frozenset({"preconditions", "undoes_defence"}),
        needs=("matrices",),
        solve_flops=svd_flops,
    )
