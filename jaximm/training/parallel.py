"""The same step on one device or on many: ``jit``, ``jax.pmap`` or ``jax.shard_map``.

An immuniser's update is written per device, with the axis ``"data"`` bound (see
`jaximm.collectives`). `Parallel` says which devices run it and under which transformation:

``"shard_map"``  ``jax.jit(jax.shard_map(...))`` over a mesh: the form of current JAX.
``"pmap"``       ``jax.pmap``: the same over a leading axis of devices; much code still uses it.
``"jit"``        ``jax.jit`` with rows spread by sharding; no axis is bound, the compiler puts the
                 collectives in. On one device it is plain ``jit``.

All three give the same parameters up to the order of sums. What an array looks like differs: under
"pmap" everything has a leading axis over this process's devices, otherwise arrays are global and
replicated. `Parallel.put`, `put_rows`, `one_copy` and `replicated` go between the forms.

In a run of several processes every process makes the same calls in the same order, each with the
rows of its own devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaximm import collectives
from jaximm.types import AnyBatch, Immuniser, Info, Params, State, Tree, as_argument

Device = Any
"""One of `jax.devices()`."""

KINDS = ("jit", "pmap", "shard_map")
ROWS = ("split", "whole")

_WHOLE_AXIS = "whole"  # not "data": nothing is gathered where every device has every row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """Where and how steps run; make it with `make_parallel`.

    Attributes:
      kind: "jit", "pmap" or "shard_map".
      devices: all devices of the run, those of other processes included.
      rows: "split": each device sees its part of a batch. "whole": every device sees every row and
        does the same arithmetic, without any collective: for methods whose step costs more in d
        than in rows, and for whole-data batches whose rows the devices do not divide.
    """

    kind: Literal["jit", "pmap", "shard_map"]
    devices: tuple[Device, ...]
    rows: Literal["split", "whole"] = "split"

    @property
    def axis(self) -> str:
        """Name of the axis that is bound inside a step (pmap and shard_map)."""
        return collectives.AXIS if self.rows == "split" else _WHOLE_AXIS

    @property
    def mesh(self) -> Mesh:
        """All devices along one axis. Its type is Auto: explicit axes refuse un-placed arrays."""
        return Mesh(np.array(self.devices), (self.axis,), axis_types=(AxisType.Auto,))

    @property
    def local_devices(self) -> list[Device]:
        """Those of `devices` that belong to this process, in order."""
        return [device for device in self.devices if device.process_index == jax.process_index()]

    @property
    def row_parts(self) -> int:
        """Into how many parts the rows of a batch fall."""
        return 1 if self.rows == "whole" else len(self.devices)

    def put(self, tree: Tree) -> Tree:
        """Copies a tree of arrays (the same in every process) onto every device.

        Under "pmap" the leaves come back as [local devices, ...], otherwise in their own shape.
        The caller's arrays stay valid when the copies are donated.
        """
        return over_arrays(lambda array: self._put(array, copy=True), tree)

    def put_shared(self, tree: Tree) -> Tree:
        """`put` for data that is never donated: a device that holds an array already keeps it."""
        return over_arrays(lambda array: self._put(array, copy=False), tree)

    def _put(self, array: jax.Array, *, copy: bool) -> jax.Array:
        may_alias = False if copy or self.kind == "pmap" else None
        copies = [
            jax.device_put(array, device, may_alias=may_alias) for device in self.local_devices
        ]
        if self.kind == "pmap":
            return self._stack(copies)
        return jax.make_array_from_single_device_arrays(
            array.shape, NamedSharding(self.mesh, P()), copies
        )

    def _stack(self, copies: list[jax.Array]) -> jax.Array:
        """One array per local device -> the form that pmap takes and gives."""
        sharding = NamedSharding(_line_mesh(tuple(self.local_devices), self.axis), P(self.axis))
        shape = (len(copies), *copies[0].shape)
        return jax.make_array_from_single_device_arrays(
            shape, sharding, [jnp.expand_dims(copy, 0) for copy in copies]
        )

    def put_rows(self, batch: Tree) -> Tree:
        """Spreads this process's rows of a batch over its devices.

        Args:
          batch: a tree of arrays with rows first. With one process: all rows. With several: the
            rows of this process's devices, as many in every process; the global batch is their
            concatenation in the order of devices. With ``rows="whole"``: all rows, everywhere.

        Returns:
          Global arrays [n, ...] sharded on rows; under "pmap" [local devices, rows each, ...].

        Raises:
          ValueError: rows that the devices do not divide.
        """
        if self.rows == "whole":
            return self.put_shared(batch)
        return jax.tree.map(self._put_rows, batch)

    def _put_rows(self, leaf: jax.Array) -> jax.Array:
        local = self.local_devices
        n = leaf.shape[0]
        if n % len(local):
            raise ValueError(
                f"{n} rows do not divide by the {len(local)} devices of this process; choose "
                'another batch size, or rows="whole".'
            )
        if self.kind == "pmap":
            stacked = leaf.reshape(len(local), n // len(local), *leaf.shape[1:])
            mesh = _line_mesh(tuple(local), self.axis)
            return jax.device_put(stacked, NamedSharding(mesh, P(self.axis)))
        sharding = NamedSharding(self.mesh, P(self.axis))
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        shape = (n // len(local) * len(self.devices), *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), shape)

    def one_copy(self, tree: Tree) -> Tree:
        """A replicated tree as plain arrays on one device of this process.

        Except under "pmap" they share memory with ``tree``, so a step that takes ``tree`` ends
        their life: read them before it.
        """

        def take(array):
            # Indexing the array itself would copy it to every device first.
            first = array.addressable_shards[0].data
            return first[0] if self.kind == "pmap" else first

        return over_arrays(take, tree)

    def replicated(self, tree: Tree) -> Tree:
        """A replicated tree as global arrays without a leading axis, as checkpoints store it."""
        if self.kind != "pmap":
            return tree

        def join(array):
            copies = [shard.data[0] for shard in array.addressable_shards]
            return jax.make_array_from_single_device_arrays(
                array.shape[1:], NamedSharding(self.mesh, P()), copies
            )

        return over_arrays(join, tree)

    def from_replicated(self, tree: Tree) -> Tree:
        """What `replicated` gave, or a checkpoint restored, back in the form of steps."""
        if self.kind != "pmap":
            return tree
        return over_arrays(
            lambda array: self._stack([shard.data for shard in array.addressable_shards]), tree
        )

    def abstract(self, tree: Params) -> Params:
        """Shapes, dtypes and this run's replicated sharding of a tree of arrays on one device."""
        sharding = NamedSharding(self.mesh, P())
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    def part(self) -> tuple[jax.Array, int] | None:
        """Inside a step: which part of a batch is this device's, as ``(index, count)``.

        None where a step sees whole batches: under "jit", on one device, with ``rows="whole"``.
        """
        if self.kind == "jit" or self.rows == "whole" or len(self.devices) == 1:
            return None
        return lax.axis_index(self.axis), len(self.devices)

    def compiled(self, fun: Callable, specs: tuple[P, ...]) -> Callable:
        """`fun` under `jax.jit`, for `wrap`; its arguments have `specs`."""
        return jax.jit(
            fun,
            donate_argnums=1,
            in_shardings=tuple(NamedSharding(self.mesh, spec) for spec in specs),
            out_shardings=NamedSharding(self.mesh, P()),
        )

    def spread(self, batch: Tree) -> Tree:
        """Inside a "jit" step: tells the compiler to spread a batch's rows over the devices."""
        if self.kind != "jit" or self.rows == "whole":
            return batch
        return lax.with_sharding_constraint(batch, NamedSharding(self.mesh, P(self.axis)))


def make_parallel(
    kind: str, devices: Sequence[Device] | None = None, *, rows: str = "split"
) -> Parallel:
    """How steps run, checked.

    Args:
      kind: "jit", "pmap" or "shard_map".
      devices: by default all there are, those of other processes included. Every process must give
        the same ones in the same order, and own as many of them as every other.
      rows: see `Parallel`.

    Raises:
      ValueError: an unknown kind or rows; no, repeated or unevenly owned devices.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose from {list(KINDS)}.")
    if rows not in ROWS:
        raise ValueError(f"rows must be one of {list(ROWS)}, got {rows!r}.")
    chosen = tuple(jax.devices() if devices is None else devices)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"devices must be at least one and distinct, got {list(chosen)}.")
    owned = [
        sum(device.process_index == process for device in chosen)
        for process in range(jax.process_count())
    ]
    if len(set(owned)) > 1:
        raise ValueError(
            f"every process must own as many of the devices, got {owned} by process; "
            "use jax.devices() or the same number of each process."
        )
    return Parallel(kind=cast(Any, kind), devices=chosen, rows=cast(Any, rows))


def step_fn(immuniser: Immuniser, parallel: Parallel) -> Callable[..., tuple[State, Info]]:
    """One update as a compiled function, for batches that come from the host.

    Returns:
      ``step(state, batch, rng_key) -> (state, info)``. Place the arguments first:
      ``parallel.put(state)``, ``parallel.put_rows(batch)``, ``parallel.put(rng_key)``; the key is
      the same on every device. ``state`` is donated. Read results through ``parallel.one_copy``.
      The function is compiled once for one shape, and shared by equal (update, parallel).
      ``step.lower(...)`` gives its compiled text; what that compiles takes ``*step.args`` first.

    With more simulated CPU devices than cores, wait for each step (``jax.block_until_ready``)
    before the next: steps dispatched ahead compete for the threads that a collective waits for, and
    the runtime aborts a collective that waits too long.
    """
    compiled = wrap(_step, parallel, rows=(False, False, True, False))
    update = parallel.put_shared(as_argument(immuniser.update))
    step = functools.partial(compiled, update)
    return _with_lower(step, functools.partial(compiled.lower, update))


def _step(
    update: Callable, state: State, batch: AnyBatch, rng_key: jax.Array
) -> tuple[State, Info]:
    return update(state, batch, rng_key)


def _with_lower(step: Any, lower: Callable) -> Callable:
    step.lower = lower
    return step


@functools.lru_cache(maxsize=64)
def wrap(fun: Callable, parallel: Parallel, *, rows: tuple[bool, ...]) -> Any:
    """``fun(update, donated, *arguments)`` compiled for a `Parallel`; its results are replicated.

    Args:
      fun: run once on every device ("pmap", "shard_map"), or once on global arrays ("jit"). Its
        second argument is donated.
      parallel: devices and transformation.
      rows: for each argument, whether it is a batch (see `Parallel.put_rows`) rather than
        replicated (`Parallel.put`).
    """
    if parallel.kind == "pmap":
        return jax.pmap(
            fun,
            axis_name=parallel.axis,
            devices=parallel.devices,
            donate_argnums=1,
        )
    mesh, spread = parallel.mesh, parallel.rows == "split"
    specs = tuple(P(parallel.axis) if is_rows and spread else P() for is_rows in rows)
    if parallel.kind == "jit":
        return parallel.compiled(fun, specs)

    # check_vma=False: a gathered array is the same on every device, which that check cannot see;
    # with it, gradients would arrive summed over devices already.
    mapped = jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(mapped, donate_argnums=1)


def _line_mesh(devices: tuple[Device, ...], axis: str) -> Mesh:
    return Mesh(np.array(devices), (axis,), axis_types=(AxisType.Auto,))


def over_arrays(fun: Callable[[jax.Array], jax.Array], tree: Tree) -> Tree:
    """`fun` of every leaf as an array; of a typed PRNG key, which no device takes, of its words."""

    def moved(leaf):
        array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return fun(array)
        words = fun(jax.random.key_data(array))
        return jax.random.wrap_key_data(words, impl=str(jax.random.key_impl(array)))

    return jax.tree.map(moved, tree)
