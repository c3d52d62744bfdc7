"""Batches that are a function of (seed, step) and of nothing else.

There is no iterator and so nothing to save: a resumed run, on any number of processes or devices,
draws the same rows at the same step. Everything here is jit-able with a traced step.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, UInt32

from jaximm.data.rows import all_finite, all_zero, largest
from jaximm.data.tasks import TaskPair
from jaximm.types import Batch, PairedBatch

Part = tuple[int | Integer[Array, ""], int]
"""``(index, count)``: one of ``count`` equal parts of a batch; the index may be traced."""


def paired_arrays(pair: TaskPair, *, split: str = "train", dtype=None) -> PairedBatch:
    """All rows of a split of both tasks as JAX arrays.

    What `paired_batch` draws from. Of classes x is as it is (uint8 images) and y int32.

    Args:
      pair: the tasks.
      split: ``"train"`` or ``"held_out"``.
      dtype: of numbers; by default JAX's default float (float64 only where x64 is on).

    Raises:
      ValueError: another split; values that `dtype` holds as infinite, or inputs that it holds as
        zeros alone.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}.")
    dtype = jnp.zeros(()).dtype if dtype is None else dtype

    def cast(values, where):
        with np.errstate(over="ignore", under="ignore"):
            held = np.asarray(values, dtype)
        if not all_finite(held) or (where.endswith("x") and all_zero(held)):
            raise ValueError(
                f"{where}: entries up to {largest(values):.3g} in size cannot be held as "
                f"{np.dtype(dtype)}; scale them, or turn on jax_enable_x64."
            )
        return jnp.asarray(held)

    def batch(task):
        rows = task.train if split == "train" else task.held_out
        if task.kind == "classes":
            return Batch(jnp.asarray(rows.x), jnp.asarray(rows.y, jnp.int32))
        where = f"{task.name} {split.replace('_', '-')}"
        return Batch(cast(rows.x, f"{where} x"), cast(rows.y, f"{where} y"))

    return PairedBatch(batch(pair.primary), batch(pair.harmful))


def batch_indices(
    seed: int | Integer[Array, ""],
    step: int | Integer[Array, ""],
    *,
    n: int,
    batch_size: int | None,
    part: Part | None = None,
) -> Int[Array, "batch"]:
    """Which rows batch `step` holds.

    The rows come as one stream of epochs, each a permutation of all n rows keyed by (seed, epoch);
    batch t is entries ``t b .. (t + 1) b - 1`` of the stream. So every row comes once an epoch, no
    rows are dropped, and a batch across the border of two epochs may hold a row twice.

    >>> first_epoch = [batch_indices(0, step, n=6, batch_size=2) for step in range(3)]
    >>> sorted(int(row) for batch in first_epoch for row in batch)
    [0, 1, 2, 3, 4, 5]

    Args:
      seed: fixes the stream.
      step: non-negative int32 (or a Python int below 2^31); may be traced.
      n: number of rows.
      batch_size: rows a batch, at most n; None: all rows, in order, whatever the step.
      part: ``(index, count)``: only the index-th of ``count`` equal parts of that batch, at the
        cost of that part alone; the index may be traced. None: the whole batch.

    Returns:
      int32 [batch_size], or [n]; with ``part``, a ``count``-th of it.

    Raises:
      ValueError: n or batch_size out of range, or rows that ``count`` does not divide.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if batch_size is None:
        return _places(n, part)
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size must be in [1, {n}] for a task of {n} rows, got {batch_size}; "
            "use None for all rows."
        )
    return stream_indices(seed, step, stream(n), batch_size=batch_size, part=part)


class Stream(NamedTuple):
    """What `stream_indices` needs to know of a number of rows: data, so one program serves any."""

    n: Int[Array, ""] | np.int32
    low_mask: UInt32[Array, ""] | np.uint32
    high_mask: UInt32[Array, ""] | np.uint32
    low_bits: UInt32[Array, ""] | np.uint32


def stream(n: int) -> Stream:
    """The stream of epochs of n rows.

    Raises:
      ValueError: n below 1, or 2^29 and more.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if n >= 2**29:
        raise ValueError(f"n must be below 2^29, got {n}.")
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low, high = 2**low_bits - 1, 2 ** (bits - low_bits) - 1
    return Stream(np.int32(n), np.uint32(low), np.uint32(high), np.uint32(low_bits))


def stream_indices(
    seed: int | Integer[Array, ""],
    step: int | Integer[Array, ""],
    rows: Stream,
    *,
    batch_size: int,
    part: Part | None = None,
) -> Int[Array, "batch"]:
    """`batch_indices` of a number of rows that may be traced; at least `batch_size` of them."""
    epoch, offset = _epoch_and_offset(jnp.asarray(step, jnp.int32), rows.n, batch_size)
    key = jax.random.key(seed)
    # A batch is at most an epoch long, so it sees this epoch and perhaps the next.
    round_keys = jax.vmap(
        lambda number: jax.random.bits(jax.random.fold_in(key, number), (_ROUNDS,), "uint32")
    )(epoch + jnp.arange(2, dtype=jnp.int32))
    position, n = offset + _places(batch_size, part), jnp.int32(rows.n)
    return _permuted(position % n, round_keys[position // n], rows)


def _places(size: int, part: Part | None) -> Int[Array, "batch"]:
    """0 .. size - 1, or a part of it."""
    if part is None:
        return jnp.arange(size, dtype=jnp.int32)
    index, count = part
    if count < 1 or size % count:
        raise ValueError(
            f"a batch of {size} rows does not divide by {count} devices; choose a batch_size that "
            'does, or rows="whole" in jaximm.training.make_parallel.'
        )
    each = size // count
    return jnp.asarray(index, jnp.int32) * each + jnp.arange(each, dtype=jnp.int32)


_ROUNDS = 6


def _permuted(
    position: Int[Array, "batch"], round_keys: UInt32[Array, "batch rounds"], rows: Stream
) -> Int[Array, "batch"]:
    """Where a keyed permutation of the n rows sends each position, without forming it.

    A Feistel network permutes the next power of two: each round XORs one half of the bits with a
    keyed hash of the other half. What lands at n or above is sent on until it lands below n
    ("cycle walking", Black & Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9). A batch of b
    rows costs O(b), where sorting n random numbers costs milliseconds a step at n = 60,000.
    """
    low_mask, high_mask, shift = map(jnp.uint32, (rows.low_mask, rows.high_mask, rows.low_bits))
    bound = jnp.uint32(rows.n)

    def send(value):
        low, high = value & low_mask, value >> shift
        for number in range(_ROUNDS):
            if number % 2:
                high = high ^ (_hash(low + round_keys[:, number]) & high_mask)
            else:
                low = low ^ (_hash(high + round_keys[:, number]) & low_mask)
        return (high << shift) | low

    def walk(state):
        value, walking = state
        value = jnp.where(walking, send(value), value)
        return value, value >= bound

    start = position.astype(jnp.uint32)
    landed, _ = jax.lax.while_loop(lambda state: jnp.any(state[1]), walk, (start, start < bound))
    return landed.astype(jnp.int32)


def _hash(value: UInt32[Array, "batch"]) -> UInt32[Array, "batch"]:
    """MurmurHash3's finaliser: every input bit reaches every output bit."""
    value = (value ^ (value >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> jnp.uint32(16))


def _epoch_and_offset(step, n, batch_size: int):
    """``divmod(step * batch_size, n)`` by binary long multiplication, so int32 cannot overflow.

    The epoch itself must stay below 2^31; it does for every step below 2^31, as batch_size <= n.
    """
    n_ = jnp.int32(n)
    whole, part = step // n_, step % n_
    epoch, offset = jnp.int32(0), jnp.int32(0)
    for bit in bin(batch_size)[2:]:
        epoch, offset = 2 * epoch, 2 * offset
        if bit == "1":
            epoch, offset = epoch + whole, offset + part
        epoch, offset = epoch + offset // n_, offset % n_  # offset < 3 n < 2^31
    return epoch, offset


def paired_batch(
    arrays: PairedBatch,
    seed: int | Integer[Array, ""],
    step: int | Integer[Array, ""],
    *,
    batch_size: int | None,
    part: Part | None = None,
) -> PairedBatch:
    """Batch `step` of both tasks, from all their rows.

    The two tasks draw from independent streams (the task's number is folded into the seed's key),
    so tasks that share their rows do not share their batches.

    Args:
      arrays: all training rows, see `paired_arrays`.
      seed: fixes both streams.
      step: see `batch_indices`.
      batch_size: rows of each task; None: all rows of each.
      part: see `batch_indices`: only that part of each task's batch, as one device of several
        wants it. The parts of all devices, one after the other, are the batch.

    Raises:
      ValueError: batch_size above the rows of the smaller task, rows that the number of parts does
        not divide, or other than one target a row.
    """
    if batch_size is None and part is None:
        return arrays

    for task, batch in zip(arrays._fields, arrays, strict=True):
        chex.assert_equal_shape_prefix(
            list(batch),
            1,
            custom_message=f"the {task} task needs as many targets as rows",
            exception_type=ValueError,
        )

    def take(number: int, batch: Batch) -> Batch:
        # A seed of its own for each task, drawn from the caller's.
        task_seed = jax.random.bits(jax.random.fold_in(jax.random.key(seed), number), (), "uint32")
        rows = batch_indices(task_seed, step, n=batch.x.shape[0], batch_size=batch_size, part=part)
        return Batch(batch.x[rows], batch.y[rows])

    return PairedBatch(take(0, arrays.primary), take(1, arrays.harmful))


def check_batches(
    rows: PairedBatch,
    batch_size: int | None,
    *,
    label: str,
    devices: int = 1,
    accumulate: int = 1,
) -> None:
    """Refuses a batch that `paired_batch` or a step will refuse, before anything is run.

    Args:
      rows: the training rows; only their shapes are looked at.
      batch_size: rows of each task a step; None: all of them.
      label: of the method, for the message.
      devices: that share the rows of a step.
      accumulate: micro-batches that share a device's rows of both tasks.

    Raises:
      ValueError: too few rows, or rows that do not divide.
    """
    part = (0, devices) if devices > 1 else None
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rows)

    def draw(rows):
        return paired_batch(rows, jnp.uint32(0), jnp.int32(0), batch_size=batch_size, part=part)

    try:
        batch = jax.eval_shape(draw, shapes)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    total = sum(task.x.shape[0] for task in batch)
    if total % accumulate:
        raise ValueError(
            f"{label}: {total} rows of a step (both tasks) do not divide by "
            f"accumulate={accumulate}; choose another batch_size or accumulate."
        )
