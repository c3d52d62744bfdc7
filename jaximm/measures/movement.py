r"""Which layers of a backbone moved, by how much and in which directions.

Two flat parameter dicts are compared leaf by leaf, W before and W' after, with D = W' - W:

    relative norm   |D|_F / |W|_F
    cosine          <W, W'> / (|W|_F |W'|_F)
    effective rank  exp(-sum p_i log p_i),  p_i = s_i^2 / sum s_j^2,  s the singular values of D

A kernel is read as the matrix [inputs..., outputs] -> [prod(inputs), outputs] that its layer
applies; a vector (a bias, a scale) as one row. The effective rank (Roy and Vetterli 2007, with
squared singular values, so that it counts shares of |D|_F^2) is 1 for a change in one direction and
min(shape) for one that is equally strong in all. The condition number of a kernel is that of
`jaximm.linalg.condition_number`, with its rank and tolerance.

Everything is computed in float64 on the host: parameters of one layer are small, their differences
smaller, and no jit compiles once a shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaximm.linalg import rank_rtol

DIRECTIONS = 5
"""Singular values of a change that are listed."""

LARGEST_SIDE = 4096
"""Matrices whose smaller side is larger than this get no singular values: only norms."""


class Spectrum(NamedTuple):
    """Singular values of one kernel, as far as they are told.

    Attributes:
      largest: sigma_1.
      smallest: the smallest singular value above `tolerance`; 0 where there is none.
      log_kappa: log(largest / smallest) in nats; inf for a zero kernel.
      rank: number of singular values above `tolerance`.
      tolerance: max(shape) eps of the stored dtype, times `largest`.
    """

    largest: float
    smallest: float
    log_kappa: float
    rank: int
    tolerance: float


class LayerMovement(NamedTuple):
    """One parameter, or one stage as a whole, before and after.

    Attributes:
      path: dotted path, or the name of the stage.
      shape: of the parameter; () for a stage.
      size: how many numbers.
      norm_before: |W|_F.
      norm_after: |W'|_F.
      norm_change: |D|_F.
      relative_norm: |D|_F / |W|_F; 0 where nothing moved, inf where W is zero and D is not.
      cosine: of the angle between W and W'; NaN where one of them is zero.
      changed: how many numbers differ.
      top_singular_values: of D as a matrix, the largest `DIRECTIONS`, descending; empty for a
        stage, for a vector, and for matrices above `LARGEST_SIDE`.
      effective_rank: of D, in [1, min(shape)]; NaN where nothing moved or D has no spectrum.
      before: spectrum of W; None for a stage, for what is no matrix, and for what did not move.
      after: spectrum of W', likewise.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    norm_before: float
    norm_after: float
    norm_change: float
    relative_norm: float
    cosine: float
    changed: int
    top_singular_values: tuple[float, ...]
    effective_rank: float
    before: Spectrum | None
    after: Spectrum | None


class Movement(NamedTuple):
    """What moved between two sets of parameters.

    Attributes:
      parameters: one row a path that both have, in the order of ``before``.
      stages: the same numbers over all parameters of a stage, in order of stages.
      total: over all parameters that both have.
      added: paths that only ``after`` has (a neck), sorted.
      removed: paths that only ``before`` has, sorted.
    """

    parameters: tuple[LayerMovement, ...]
    stages: tuple[LayerMovement, ...]
    total: LayerMovement
    added: tuple[str, ...]
    removed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is infinite or not a number is None."""
        return _plain(self)


def movement(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    stage_names: Sequence[str] = (),
) -> Movement:
    """Compares two flat parameter dicts.

    Args:
      before: arrays by dotted path.
      after: the same of the changed model. Paths that only one has are listed, not compared.
      stage_names: dotted prefixes, for instance `Backbone.stage_names`, by which rows are summed
        up; a parameter below none of them counts in ``total`` only. Stages without parameters have
        no row.

    Raises:
      ValueError: a path with two shapes; nothing in common.

    >>> found = movement({"a.kernel": np.eye(3)}, {"a.kernel": np.diag([1.0, 1.0, 2.0])})
    >>> row = found.parameters[0]
    >>> round(row.relative_norm * 3**0.5, 12), row.top_singular_values[0], row.effective_rank
    (1.0, 1.0, 1.0)
    >>> round(row.after.log_kappa / math.log(2), 12), row.after.rank
    (1.0, 3)
    """
    common = [path for path in before if path in after]
    if not common:
        raise ValueError(
            f"the two have no parameter in common: {sorted(before)[:3]} and {sorted(after)[:3]}."
        )
    for path in common:
        if np.shape(before[path]) != np.shape(after[path]):
            raise ValueError(
                f"{path} has shape {np.shape(before[path])} before and {np.shape(after[path])} "
                "after; compare models of one architecture."
            )
    rows = {path: _layer(path, before[path], after[path]) for path in common}
    stages = []
    for stage in stage_names:
        below = [path for path in common if path == stage or path.startswith(stage + ".")]
        if below:
            stages.append(_together(stage, below, rows, before, after))
    return Movement(
        parameters=tuple(rows.values()),
        stages=tuple(stages),
        total=_together("all parameters", common, rows, before, after),
        added=tuple(sorted(set(after) - set(before))),
        removed=tuple(sorted(set(before) - set(after))),
    )


def spectrum(kernel: Any) -> Spectrum | None:
    """Largest and smallest singular value, rank and log kappa of a kernel [inputs..., outputs].

    None for fewer than two axes, for integers, for what is not finite, and where the smaller side
    exceeds `LARGEST_SIDE`.
    """
    array = np.asarray(kernel)
    matrix = _as_matrix(array)
    if matrix is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return None
    values = np.linalg.svd(matrix, compute_uv=False)
    # Below the rounding of the dtype it is stored in, a singular value says nothing.
    tolerance = rank_rtol(matrix.shape, array.dtype) * float(values[0])
    rank = int(np.sum(values > tolerance))
    if rank == 0:
        return Spectrum(float(values[0]), 0.0, math.inf, 0, tolerance)
    smallest = float(values[rank - 1])
    return Spectrum(
        largest=float(values[0]),
        smallest=smallest,
        log_kappa=math.log(float(values[0])) - math.log(smallest),
        rank=rank,
        tolerance=tolerance,
    )


def effective_rank(singular_values: Float[np.ndarray, "k"]) -> float:
    """exp of the entropy of the shares s_i^2 / sum s^2; NaN if all are zero.

    >>> round(effective_rank(np.array([2.0, 2.0, 2.0, 0.0])), 12)
    3.0
    """
    energy = np.asarray(singular_values, np.float64)
    largest = energy.max(initial=0.0)
    if not largest > 0:
        return math.nan
    shares = (energy / largest) ** 2  # scaled first: squares of small values underflow
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _layer(path: str, old: Any, new: Any) -> LayerMovement:
    first, second = np.asarray(old), np.asarray(new)
    w, moved = _wide(first), _wide(second)
    change = moved - w
    matrix = _as_matrix(change)
    values = None
    moved_at_all = bool(np.any(change))
    if matrix is not None and moved_at_all:
        values = np.linalg.svd(matrix, compute_uv=False)
    norms = [float(np.linalg.norm(array.reshape(-1))) for array in (w, moved, change)]
    inner = float(np.vdot(w.reshape(-1), moved.reshape(-1)))
    return LayerMovement(
        path=path,
        shape=tuple(first.shape),
        size=first.size,
        norm_before=norms[0],
        norm_after=norms[1],
        norm_change=norms[2],
        relative_norm=_relative(norms[2], norms[0]),
        cosine=_cosine(inner, norms[0], norms[1]),
        changed=int(np.sum(w != moved)),
        top_singular_values=() if values is None else tuple(values[:DIRECTIONS].tolist()),
        effective_rank=math.nan if values is None else effective_rank(values),
        # Most layers of a large model are frozen: their spectra would cost minutes and say nothing.
        before=spectrum(first) if moved_at_all else None,
        after=spectrum(second) if moved_at_all else None,
    )


def _together(
    name: str,
    paths: Sequence[str],
    rows: Mapping[str, LayerMovement],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> LayerMovement:
    """The parameters at ``paths`` as one long vector."""
    norms = [
        math.hypot(*(getattr(rows[path], key) for path in paths))
        for key in ("norm_before", "norm_after", "norm_change")
    ]
    inner = sum(
        float(np.vdot(_wide(before[path]).reshape(-1), _wide(after[path]).reshape(-1)))
        for path in paths
    )
    return LayerMovement(
        path=name,
        shape=(),
        size=sum(rows[path].size for path in paths),
        norm_before=norms[0],
        norm_after=norms[1],
        norm_change=norms[2],
        relative_norm=_relative(norms[2], norms[0]),
        cosine=_cosine(inner, norms[0], norms[1]),
        changed=sum(rows[path].changed for path in paths),
        top_singular_values=(),
        effective_rank=math.nan,
        before=None,
        after=None,
    )


def _wide(array: Any) -> np.ndarray:
    """Float64, from bfloat16 too."""
    return np.asarray(array).astype(np.float64)


def _as_matrix(array: np.ndarray) -> np.ndarray | None:
    """[inputs..., outputs] as [prod(inputs), outputs]; None for a vector or too large a matrix."""
    if array.ndim < 2 or array.size == 0:
        return None
    matrix = _wide(array).reshape(-1, array.shape[-1])
    usable = min(matrix.shape) <= LARGEST_SIDE and bool(np.all(np.isfinite(matrix)))
    return matrix if usable else None


def _relative(change: float, norm: float) -> float:
    if norm != 0:  # NaN gives NaN
        return change / norm
    return 0.0 if change == 0 else math.inf


def _cosine(inner: float, first: float, second: float) -> float:
    if first == 0 or second == 0:
        return math.nan
    return float(np.clip(inner / first / second, -1.0, 1.0))  # which keeps NaN


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
