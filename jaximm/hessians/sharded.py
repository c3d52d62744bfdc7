"""Gram matrices of features that are spread over devices, and their products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaximm.hessians.rows import (
    Matvec,
    as_vector,
    check_rows,
    divisor_of,
    in_one_dtype,
    in_two_units,
    no_empty,
    ridge_of,
    row_product,
)
from jaximm.linalg.arrays import as_square, column_exponents, times_power_of_two


def _divide(length: int, mesh: Mesh, axis: str | None, what: str) -> None:
    """Refuse what is no mesh, an axis that it lacks, or one that does not divide a length."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}.")
    if axis is None:
        return
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has axes {list(mesh.shape)}, got {axis!r}.")
    if length % mesh.shape[axis]:
        raise ValueError(
            f"{length} {what} do not divide by the {mesh.shape[axis]} devices of axis {axis!r}; "
            "pad with zeros, which adds eigenvalues 0."
        )


def sharded_l2_probe_operator(
    features: Float[Array, "n d"],
    mesh: Mesh,
    *,
    rows: str | None = None,
    columns: str | None = None,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Matvec:
    r"""`l2_probe_operator` for features spread over devices by rows, by columns, or by both.

    Every device holds its part of X and nothing larger; vectors [d] are whole on each. A matvec
    costs one all-reduce for each axis that is given:

    - rows: of the result, v -> sum over devices of X_i^T (X_i v), [d];
    - columns: of the image, X v = sum of X_j v_j, [n]; the result stays spread over `columns`
      (JAX gathers it where it is needed whole).

    For use outside ``shard_map``, as a function of whole arrays; inside ``jit`` for speed. Under
    ``jit`` `l2_probe_operator` of features placed with a ``NamedSharding`` does the same by the
    compiler's choice.

    Args:
      features: X [n, d]; placed as the axes say, or to be placed so.
      mesh: of ``AxisType.Auto`` axes.
      rows: mesh axis over which n is spread, or None.
      columns: mesh axis over which d is spread, or None.
      convention: ``"mean"`` or ``"sum"``.
      damping: in units of the mean-convention Hessian.

    Raises:
      ValueError: as `l2_probe_operator`; no mesh, an unknown axis, one axis twice, or a length that
        does not divide by its devices.
    """
    features = check_rows(features, convention)
    n, d = features.shape
    _divide(n, mesh, rows, "rows")
    _divide(d, mesh, columns, "columns")
    if rows is not None and rows == columns:
        raise ValueError(f"rows and columns must be different axes, got {rows!r} for both.")
    divisor, ridge = divisor_of(convention, n), ridge_of(damping, convention, n, features.dtype)

    def per_device(x, v):
        image = jnp.matmul(x, v, precision="highest")
        image = image if columns is None else lax.psum(image, columns)
        # Divided first: the sum may not fit where the mean does.
        result = row_product(x, image[:, None] / divisor)[:, 0]
        return result if rows is None else lax.psum(result, rows)

    spread = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(PartitionSpec(rows, columns), PartitionSpec(columns)),
        out_specs=PartitionSpec(columns),
    )

    def matvec(vector: Float[Array, "d"]) -> Float[Array, "d"]:
        x, v, lam = in_one_dtype(features, as_vector(vector, d), ridge)
        return spread(x, v) + lam * v

    return matvec


def dual_gram(
    features: Float[Array, "n d"], mesh: Mesh, *, columns: str, convention: str = "mean"
) -> Float[Array, "n n"]:
    """X X^T / n (or X X^T) of features whose columns are spread over devices: one all-reduce.

    Its eigenvalues are those of the l2-probe Hessian, but for the d - n zeros of the latter.

    Raises:
      ValueError: as `sharded_l2_probe_operator`.
    """
    features = check_rows(features, convention)
    n, d = features.shape
    _divide(d, mesh, columns, "columns")

    def per_device(x):
        return lax.psum(row_product(x.T, x.T), columns)

    exponents = no_empty(column_exponents(features.T))
    gram = jax.shard_map(
        per_device, mesh=mesh, in_specs=PartitionSpec(None, columns), out_specs=PartitionSpec()
    )(times_power_of_two(features, -exponents[:, None]))
    return in_two_units(gram / divisor_of(convention, n), exponents, exponents)


def column_sharded_gram(
    features: Float[Array, "n d"],
    mesh: Mesh,
    *,
    axis: str,
    convention: str = "mean",
    damping: float | Float[Array, ""] = 0.0,
) -> Float[Array, "d d"]:
    r"""`l2_probe_hessian` with columns spread over devices: each holds K[:, block], [d, d / N].

    Rows of X may arrive spread over the same axis; one all-gather makes X whole on each device,
    which then multiplies with its own columns: the work is divided by N, and no device ever has
    more than X and its block. Over a stream, add up the results of the batches (sum convention).

    Args:
      features: X [n, d], d and n divisible by the devices of `axis`.
      mesh: of ``AxisType.Auto`` axes.
      axis: the mesh axis.
      convention: ``"mean"`` or ``"sum"``.
      damping: in units of the mean-convention Hessian.

    Returns:
      A global [d, d] array with sharding ``PartitionSpec(None, axis)``.

    Raises:
      ValueError: as `sharded_l2_probe_operator`.
    """
    features = check_rows(features, convention)
    n, d = features.shape
    _divide(n, mesh, axis, "rows")
    _divide(d, mesh, axis, "columns")
    block = d // mesh.shape[axis]
    ridge = ridge_of(damping, convention, n, features.dtype)

    exponents = no_empty(column_exponents(features))

    def per_device(x, exponents, ridge):
        whole = lax.all_gather(x, axis, tiled=True)
        first = lax.axis_index(axis) * block
        mine = lax.dynamic_slice_in_dim(whole, first, block, axis=1)
        gram = row_product(whole, mine) / divisor_of(convention, n)
        own = lax.dynamic_slice_in_dim(exponents, first, block)
        gram = in_two_units(gram, exponents, own)
        column = first + jnp.arange(block, dtype=first.dtype)
        diagonal = jnp.arange(d, dtype=first.dtype)[:, None] == column[None, :]
        return gram + jnp.where(diagonal, ridge, 0)

    return jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(PartitionSpec(axis), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, axis),
    )(times_power_of_two(features, -exponents[None, :]), exponents, ridge)


def column_sharded_operator(gram: Float[Array, "d d"], mesh: Mesh, *, axis: str) -> Matvec:
    """v -> K v for a symmetric K as `column_sharded_gram` gives it: one all-reduce of [d].

    Raises:
      ValueError: K not square, or as `sharded_l2_probe_operator`.
    """
    gram = as_square(gram, name="gram")
    _divide(gram.shape[1], mesh, axis, "columns")

    def per_device(block, part):
        return lax.psum(jnp.matmul(block, part, precision="highest"), axis)

    spread = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(PartitionSpec(None, axis), PartitionSpec(axis)),
        out_specs=PartitionSpec(),
    )
    return lambda vector: spread(*in_one_dtype(gram, as_vector(vector, gram.shape[0])))
