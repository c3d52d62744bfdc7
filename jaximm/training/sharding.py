r"""Parameters spread over devices: rules by path, and the memory of a step in advance.

A rule is a pattern of paths and what the axes of such an array lie along:

``("layers.*.kernel", P(None, "fsdp", None))``

The first rule whose pattern fits the end of a leaf's dotted path holds, so that the moments of an
optimiser, whose paths end alike, lie where their parameters do; what no rule fits is replicated.
`FSDP` cuts every matrix of a decoder along its inputs (fully sharded data parallel: rows of a batch
lie along the same axis, a layer's weights are gathered as the loop over layers comes to it), and
`TENSOR` heads and hidden units (every device computes its part of each layer); `FSDP_TENSOR` does
both, on a mesh of two axes. The functions that are compiled stay plain: where collectives go is the
compiler's part. `make_sharded` gives what `jaximm.training.fit` and `step_fn` take as `parallel`.

`dry_run` lowers and compiles a step from shapes alone, for devices that need not have the memory,
and returns the bytes that one of them would take.

Zhao et al. (2023), PyTorch FSDP, https://arxiv.org/abs/2304.11277; Shoeybi et al. (2019),
Megatron-LM, https://arxiv.org/abs/1909.08053; Xu et al. (2021), GSPMD,
https://arxiv.org/abs/2105.04663.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaximm.training.parallel import Device, Parallel, step_fn
from jaximm.types import AnyBatch, Immuniser, Params, Tree

Rules = Sequence[tuple[str, P]]
"""Patterns, as of file names ("*" fits dots too), with the axes of arrays whose paths fit."""

_INTO_HEADS = ("query", "key", "value", "gate", "up")
_OUT_OF_HEADS = ("output", "down")

FSDP: Rules = (
    ("layers.*.kernel", P(None, "fsdp", None)),
    ("*.table", P("fsdp", None)),
)
"""Every matrix of a decoder along its inputs, tables along the vocabulary; norms are everywhere."""

TENSOR: Rules = (
    *((f"layers.{name}.kernel", P(None, None, "tensor")) for name in _INTO_HEADS),
    *((f"layers.{name}.bias", P(None, "tensor")) for name in _INTO_HEADS),
    *((f"layers.{name}.kernel", P(None, "tensor", None)) for name in _OUT_OF_HEADS),
    ("*.table", P("tensor", None)),
)
"""Heads and hidden units of a decoder, tables along the vocabulary."""

FSDP_TENSOR: Rules = (
    *((f"layers.{name}.kernel", P(None, "fsdp", "tensor")) for name in _INTO_HEADS),
    *((f"layers.{name}.bias", P(None, "tensor")) for name in _INTO_HEADS),
    *((f"layers.{name}.kernel", P(None, "tensor", "fsdp")) for name in _OUT_OF_HEADS),
    ("*.table", P("tensor", "fsdp")),
)
"""Both: on a mesh with the axes "fsdp" and "tensor"."""


def make_mesh(axes: Mapping[str, int], devices: Sequence[Device] | None = None) -> Mesh:
    """Devices in a grid, by the name and length of its axes.

    >>> make_mesh({"fsdp": 1}).shape["fsdp"]
    1

    Raises:
      ValueError: fewer devices than the grid has places, or an axis below 1.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(axes.values())
    count = math.prod(shape)
    if min(shape, default=0) < 1 or count > len(devices):
        raise ValueError(
            f"a mesh {dict(axes)} needs {count} devices, of {len(devices)} that there are; give "
            "axes of length >= 1 whose product is at most that."
        )
    grid = np.array(devices[:count]).reshape(shape)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


def spec_of(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules) -> P:
    """What the axes of an array lie along.

    Raises:
      ValueError: a rule with an axis that the mesh does not have, with more axes than the array,
        or that does not divide it.
    """
    for pattern, spec in rules:
        if not (fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")):
            continue
        if len(spec) > len(shape):
            raise ValueError(f"the rule {pattern!r} has {len(spec)} axes, {path!r} {len(shape)}.")
        for axis, names in zip(shape, spec, strict=False):
            named = () if names is None else (names,) if isinstance(names, str) else tuple(names)
            unknown = sorted(set(named) - set(mesh.axis_names))
            if unknown:
                raise ValueError(
                    f"the rule {pattern!r} wants a mesh axis {unknown[0]!r}; this one has "
                    f"{list(mesh.axis_names)}."
                )
            pieces = math.prod(mesh.shape[name] for name in named)
            if axis % pieces:
                raise ValueError(
                    f"{path!r} {list(shape)} cannot be cut into {pieces} along an axis of {axis}; "
                    "choose another mesh or other rules."
                )
        return spec
    return P()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharded(Parallel):
    """A `Parallel` in which arrays lie where rules put them; make it with `make_sharded`.

    States, results and what `measure_fn` of a run sees stay spread: nothing is gathered.

    Attributes:
      axes: names and lengths of the axes of the mesh.
      rules: where arrays of a state lie.
      row_axis: the axis along which rows of a batch lie; "": every device sees all rows.
    """

    axes: tuple[tuple[str, int], ...]
    rules: tuple[tuple[str, P], ...]
    row_axis: str

    @property
    def axis(self) -> str:
        """That of the rows."""
        return self.row_axis

    @property
    def mesh(self) -> Mesh:
        """The devices in a grid."""
        return make_mesh(dict(self.axes), self.devices)

    @property
    def row_parts(self) -> int:
        """Into how many parts the rows of a batch fall."""
        return dict(self.axes).get(self.row_axis, 1)

    def put(self, tree: Tree) -> Tree:
        """Arrays (the same in every process) where the rules put them."""
        return jax.tree.map(_placed, tree, self.shardings(tree))

    def put_shared(self, tree: Tree) -> Tree:
        """`put` for data that is never donated: what lies where it should is not copied."""
        return jax.tree.map(
            lambda leaf, sharding: _placed(leaf, sharding, copy=False), tree, self.shardings(tree)
        )

    def put_rows(self, batch: Tree) -> Tree:
        """The rows of a batch along their axis; with several processes, each gives its own.

        Raises:
          ValueError: rows that the axis does not divide.
        """
        if not self.row_axis:
            return self.put_shared(batch)
        sharding = NamedSharding(self.mesh, P(self.row_axis))

        def rows(leaf):
            if leaf.shape[0] % self.row_parts and jax.process_count() == 1:
                raise ValueError(
                    f"{leaf.shape[0]} rows do not divide by the {self.row_parts} devices along "
                    f"{self.row_axis!r}; choose another batch size."
                )
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

        return jax.tree.map(rows, batch)

    def one_copy(self, tree: Tree) -> Tree:
        """The tree itself: it stays spread."""
        return tree

    def abstract(self, tree: Params) -> Params:
        """Shapes, dtypes and shardings: what a checkpoint is restored into.

        Raises:
          ValueError: as `spec_of`.
        """
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def sharding(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """Where an array lies, by its dotted path.

        Raises:
          ValueError: as `spec_of`.
        """
        mesh = self.mesh
        return NamedSharding(mesh, spec_of(path, shape, mesh, self.rules))

    def shardings(self, tree: Params) -> Params:
        """The tree with the sharding of each leaf in its place.

        Raises:
          ValueError: as `spec_of`.
        """

        def of(parts, leaf):
            path = jax.tree_util.keystr(parts, simple=True, separator=".")
            return self.sharding(path, leaf.shape)

        return jax.tree_util.tree_map_with_path(of, tree)

    def compiled(self, fun: Callable, specs: tuple[P, ...]) -> Callable:
        """`fun` under `jax.jit`, of arguments that lie where they should; its results do too."""
        del specs

        def constrained(*arguments):
            results = fun(*arguments)
            return jax.lax.with_sharding_constraint(results, self.shardings(results))

        return jax.jit(constrained, donate_argnums=1)


def make_sharded(
    axes: Mapping[str, int],
    rules: Rules,
    *,
    rows: str | None,
    devices: Sequence[Device] | None = None,
) -> Sharded:
    """How steps run on arrays that are spread by rules, checked.

    Args:
      axes: of the mesh: {"fsdp": 8}, or {"fsdp": 4, "tensor": 2}.
      rules: `FSDP`, `TENSOR`, `FSDP_TENSOR`, or your own.
      rows: the axis along which rows of a batch lie: "fsdp" with `FSDP`; None: every device sees
        all of them.
      devices: by default the first of all there are.

    Raises:
      ValueError: as `make_mesh`; rows along an axis that is not there.
    """
    mesh = make_mesh(axes, devices)
    if rows is not None and rows not in axes:
        raise ValueError(f"rows={rows!r} is no axis of the mesh {list(axes)}.")
    return Sharded(
        kind="jit",
        devices=tuple(mesh.devices.flat),
        rows="whole" if rows is None else "split",
        axes=tuple(axes.items()),
        rules=tuple(rules),
        row_axis=rows or "",
    )


def _placed(leaf: jax.Array, sharding: NamedSharding, *, copy: bool = True) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = _placed(jax.random.key_data(leaf), sharding, copy=copy)
        return jax.random.wrap_key_data(words, impl=str(jax.random.key_impl(leaf)))
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding, may_alias=None if not copy else False)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


class StepMemory(NamedTuple):
    """Bytes that one device needs for a step, as the compiler plans them.

    `arguments` and `outputs` share the bytes of `aliased`: a donated state is updated in place.
    """

    devices: int
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    parameters: int  # how many numbers the model has, on all devices together

    @property
    def peak(self) -> int:
        """All at once: arguments, temporaries, and outputs that are not aliased."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


def dry_run(immuniser: Immuniser, params: Params, batch: AnyBatch, sharded: Sharded) -> StepMemory:
    """The memory of a step, without allocating anything: it is lowered and compiled from shapes.

    Args:
      immuniser: a method.
      params: shapes of what it starts from (`jax.eval_shape` of whatever makes them).
      batch: shapes of the whole step's batch.
      sharded: as many devices as the run will have; simulated ones serve.

    Raises:
      ValueError: as `spec_of`; rows that their axis does not divide; a back end that does not plan
        memory in advance.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(immuniser.init, params, key)
    odd = [leaf.shape[0] % sharded.row_parts for leaf in jax.tree.leaves(batch)]
    if any(odd):
        raise ValueError(
            f"the rows of a step do not divide by the {sharded.row_parts} devices along "
            f"{sharded.row_axis!r}; choose another batch size."
        )
    at = NamedSharding(sharded.mesh, P(sharded.row_axis) if sharded.row_axis else P())
    rows = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), batch
    )
    step: Any = step_fn(immuniser, sharded)
    planned = step.lower(sharded.abstract(state), rows, key).compile().memory_analysis()
    if planned is None:
        raise ValueError(f"the back end {jax.default_backend()!r} does not plan memory in advance.")
    return StepMemory(
        devices=len(sharded.devices),
        arguments=planned.argument_size_in_bytes,
        outputs=planned.output_size_in_bytes,
        temporaries=planned.temp_size_in_bytes,
        aliased=planned.alias_size_in_bytes,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
    )
