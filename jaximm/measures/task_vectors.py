r"""Whether fine-tuning walks a defence's change of the weights back, and how much of it is left.

With theta_0 the weights before the defence, theta those released and theta' those after someone's
fine-tuning,

    cosine         cos(theta' - theta, theta - theta_0)         over all parameters
    share in U_k   |U_k U_k^T D|_F^2 / |D|_F^2,  of one matrix D, U_k the k strongest left singular
                   directions of the defence's change of that matrix

A cosine below 0 says that fine-tuning undoes the change (-0.41 is reported for NPO, +0.09 for ILU).
The share of D = theta - theta_0 is R_align of LoX, that of D = theta' - theta_0 its R_ft. Of how
many directions the change itself is, `change_of` says: one of few is an edit that somebody who has
theta_0 can find and take away.

Wang et al. (2025), https://arxiv.org/abs/2506.01339; Perin et al. (2025),
https://arxiv.org/abs/2506.15606.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaximm.types import Params


def task_vector_cosine(*, start: Params, released: Params, tuned: Params) -> float:
    """cos(tuned - released, released - start), in float64; NaN where one of them is zero.

    >>> start, released, tuned = ({"w": np.array(w)} for w in ([0.0, 0.0], [2.0, 0.0], [1.0, 1.0]))
    >>> round(task_vector_cosine(start=start, released=released, tuned=tuned), 12)
    -0.707106781187
    """
    changes = [
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.tree.map(_change, *pair))])
        for pair in ((tuned, released), (released, start))
    ]
    norms = [float(np.linalg.norm(change)) for change in changes]
    if 0.0 in norms:
        return math.nan
    return float(np.clip((changes[0] / norms[0]) @ (changes[1] / norms[1]), -1, 1))


class Change(NamedTuple):
    """A matrix less that of a public model; of several layers, of all of them together.

    Attributes:
      rank: singular values above what rounding can make of equal matrices; the most of any layer.
      of: the rank that it could have, min(m, n).
      relative: |D|_F / |public|_F; infinity for a change of zeros.
      shares: of |D|_F^2 in the `top` strongest directions of each layer; NaN where D is zero.
    """

    rank: int
    of: int
    relative: float
    shares: tuple[float, ...]


def change_of(
    released: Float[np.ndarray, "*layers m n"],
    public: Float[np.ndarray, "*layers m n"],
    *,
    top: Sequence[int] = (1, 4, 16),
) -> Change:
    """Of which rank a change is, and how much of it is in its strongest directions, in float64.

    A singular value counts above eps * max(|released|_F, |public|_F), with eps of the coarser of
    both dtypes: the norm of what storing the weights rounds away is no larger.

    >>> public = np.eye(3)
    >>> found = change_of(public + np.outer([1, 2, 0], [0, 1, 1]), public)
    >>> found.rank, found.of, [round(share, 9) for share in found.shares]
    (1, 3, [1.0, 1.0, 1.0])

    Raises:
      ValueError: arrays of other shapes than each other, or that are no matrices.
    """
    if released.shape != public.shape or released.ndim < 2:
        raise ValueError(
            f"expected two arrays of matrices of one shape, got {released.shape} and "
            f"{public.shape}."
        )
    eps = max(float(jnp.finfo(array.dtype).eps) for array in (released, public))
    ours, theirs = (np.asarray(array, np.float64) for array in (released, public))
    values = np.linalg.svd(ours - theirs, compute_uv=False)
    sizes = [np.linalg.norm(array, axis=(-2, -1)) for array in (ours, theirs)]
    counted = values > eps * np.maximum(*sizes)[..., None]
    squares = values**2
    total, size = float(np.sum(squares)), float(np.linalg.norm(theirs))
    return Change(
        rank=int(np.max(np.sum(counted, axis=-1), initial=0)),
        of=values.shape[-1],
        relative=math.sqrt(total) / size if size else (math.inf if total else 0.0),
        shares=tuple(float(np.sum(squares[..., :r])) / total if total else math.nan for r in top),
    )


def low_rank_share(
    change: Float[np.ndarray, "m n"], defence: Float[np.ndarray, "m n"], *, rank: int
) -> float:
    """Share of |change|_F^2 in the strongest left singular directions of a defence's change.

    >>> defence = np.diag([3.0, 1.0])
    >>> low_rank_share(defence, defence, rank=1), low_rank_share(np.eye(2), defence, rank=2)
    (0.9, 1.0)

    Returns:
      In [0, 1]; NaN where `change` is zero.

    Raises:
      ValueError: arrays that are no matrices of one number of rows, or a rank below 1.
    """
    change, defence = (np.asarray(each).astype(np.float64) for each in (change, defence))
    if change.ndim != 2 or defence.ndim != 2 or len(change) != len(defence):
        raise ValueError(
            f"both must be matrices with as many rows, got {change.shape} and {defence.shape}."
        )
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}.")
    total = float(np.sum(change**2))
    if total == 0:
        return math.nan
    left = np.linalg.svd(defence, full_matrices=False)[0][:, :rank]
    return float(np.clip(np.sum((left.T @ change) ** 2) / total, 0, 1))


def _change(after: Any, before: Any) -> np.ndarray:
    return np.asarray(after).astype(np.float64) - np.asarray(before).astype(np.float64)
