import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import thinned, thinned_rows
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaximm import data
from jaximm.data import batches
from jaximm.types import Batch, PairedBatch

pytestmark = pytest.mark.heavy


@functools.partial(jax.jit, static_argnames=("n", "batch_size"))
def draw_all(seed, steps, *, n, batch_size):
    return jax.vmap(lambda step: batches.batch_indices(seed, step, n=n, batch_size=batch_size))(
        steps
    )


def stream(seed, n, batch_size, steps):
    """The rows of the first batches, one after the other, from one compiled call."""
    rows = draw_all(jnp.uint32(seed), jnp.arange(steps), n=n, batch_size=batch_size)
    return np.asarray(rows).reshape(-1)


@pytest.mark.parametrize(
    ("n", "batch_size"), thinned_rows([(11, 4), (1, 1), (12, 4), (5, 1), (9, 8)], keep=2)
)
def test_every_row_comes_once_an_epoch(n, batch_size):
    steps = 3 * n // math.gcd(n, batch_size)  # a whole number of epochs
    epochs = stream(0, n, batch_size, steps).reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1)))
    if n > 5:  # the order is drawn again each epoch
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_another_seed_is_another_stream():
    assert not np.array_equal(stream(7, 12, 4, 9), stream(8, 12, 4, 9))


@pytest.mark.parametrize("n", thinned([13, 5]))
def test_places_and_neighbours_are_spread_evenly(n):
    """Chi-square over 1,000 epochs: where row 0 comes, and which row follows it."""
    epochs = stream(2, n, n, 1000)
    epochs = epochs.reshape(1000, n)
    place = np.argmin(epochs, axis=1)
    follower = epochs[np.arange(1000), (place + 1) % n]
    for counts in (np.bincount(place, minlength=n), np.bincount(follower, minlength=n)[1:]):
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_a_permutation_with_many_rows():
    rows = np.asarray(batches.batch_indices(1, 3, n=60_001, batch_size=60_001))
    np.testing.assert_array_equal(np.sort(rows), np.arange(60_001))
    # Rank correlation with the identity has standard deviation 1 / sqrt(n) under a fair shuffle.
    assert abs(np.corrcoef(rows, np.arange(60_001))[0, 1]) < 4 / np.sqrt(60_001)


def test_plain_jit_and_scan_agree_and_a_resumed_run_draws_the_same():
    draw = functools.partial(batches.batch_indices, n=11, batch_size=4)
    steps, seed = jnp.arange(6), jnp.uint32(3)

    @jax.jit
    def scanned(seed, steps):  # seed and step both traced
        return jax.lax.scan(lambda carry, step: (carry, draw(seed, step)), None, steps)[1]

    rows = np.asarray(scanned(seed, steps))
    np.testing.assert_array_equal(rows.reshape(-1), stream(3, 11, 4, 6))
    np.testing.assert_array_equal(rows[4:], scanned(seed, steps[4:]))
    for step in (2, 5):  # 2 crosses the border of two epochs
        plain = draw(3, step)
        np.testing.assert_array_equal(plain, rows[step])
        assert plain.dtype == jnp.int32


@pytest.mark.slow
@hypothesis.given(
    step=st.integers(0, 2**31 - 1), n=st.integers(1, 2**29 - 1), share=st.floats(0.0, 1.0)
)
def test_epoch_and_offset_do_not_overflow_int32(step, n, share):
    batch_size = max(1, round(share * n))
    with jax.disable_jit():
        found = batches._epoch_and_offset(jnp.int32(step), n, batch_size)
    assert tuple(map(int, found)) == divmod(step * batch_size, n)
    assert all(value.dtype == jnp.int32 for value in found)


def test_all_rows_when_no_batch_size_is_given():
    np.testing.assert_array_equal(batches.batch_indices(0, 5, n=4, batch_size=None), np.arange(4))


@pytest.mark.parametrize(
    ("n", "batch_size", "message"),
    [
        (0, None, "n must be at least 1, got 0"),
        (4, 5, r"batch_size must be in \[1, 4\].*got 5; use None"),
        (4, 0, r"batch_size must be in \[1, 4\]"),
        (2**29, 3, "n must be below"),
    ],
)
def test_sizes_out_of_range(n, batch_size, message):
    with pytest.raises(ValueError, match=message):
        batches.batch_indices(0, 0, n=n, batch_size=batch_size)


def numbered(n_primary, n_harmful):
    """Rows that carry their own number."""
    rows = lambda n: Batch(jnp.arange(float(n))[:, None] * jnp.ones((1, 3)), jnp.arange(float(n)))  # noqa: E731
    return PairedBatch(rows(n_primary), rows(n_harmful))


def test_paired_batch_keeps_rows_together_and_tasks_apart():
    arrays = numbered(12, 12)
    draw = jax.jit(functools.partial(batches.paired_batch, batch_size=6))
    both = [draw(arrays, 0, step) for step in (0, 1)]
    for batch in (both[0].primary, both[1].harmful):
        np.testing.assert_array_equal(batch.x[:, 0], batch.y)
    assert not np.array_equal(both[0].primary.y, both[0].harmful.y)
    for task in range(2):
        rows = np.concatenate([batch[task].y for batch in both])
        np.testing.assert_array_equal(np.sort(rows), np.arange(12))
    assert not np.array_equal(both[0].primary.y, draw(arrays, 1, 0).primary.y)
    everything = batches.paired_batch(arrays, 0, 9, batch_size=None)
    np.testing.assert_array_equal(everything.harmful.x, arrays.harmful.x)
    with pytest.raises(ValueError, match="for a task of 5 rows"):
        batches.paired_batch(numbered(12, 5), 0, 0, batch_size=6)


@pytest.mark.parametrize(
    ("batch_size", "count"), thinned_rows([(6, 2), (None, 4), (6, 1), (6, 6)], keep=2)
)
def test_the_parts_of_a_batch_are_the_batch(batch_size, count):
    arrays = numbered(12, 8)
    draw = jax.jit(
        functools.partial(batches.paired_batch, batch_size=batch_size),
        static_argnames="part",
    )
    traced = jax.jit(
        lambda step, index: batches.paired_batch(
            arrays, 3, step, batch_size=batch_size, part=(index, count)
        )
    )
    for step in (0, 1, 5):  # with 6 of 8 rows, batch 1 crosses the border of two epochs
        expected = draw(arrays, 3, step)
        parts = [traced(step, jnp.int32(index)) for index in range(count)]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        jax.tree.map(np.testing.assert_array_equal, joined, expected)
        assert parts[0].primary.x.shape[0] == expected.primary.x.shape[0] // count
    assert draw(arrays, 3, 0, part=(1, 2)).primary.y.shape == ((batch_size or 12) // 2,)


def test_parts_must_be_equal():
    for batch_size, rows in ((6, 6), (None, 12)):
        with pytest.raises(ValueError, match=f"{rows} rows does not divide by 5 devices"):
            batches.paired_batch(numbered(12, 12), 0, 0, batch_size=batch_size, part=(0, 5))


def test_the_same_rows_on_one_and_on_eight_devices():
    arrays = numbered(16, 24)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    draw = jax.jit(functools.partial(batches.paired_batch, batch_size=8))
    expected = draw(arrays, 4, 5)
    placed = jax.device_put(arrays, NamedSharding(mesh, P("data")))
    jax.tree.map(np.testing.assert_array_equal, draw(placed, 4, 5), expected)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_paired_arrays(dtype):
    x = np.arange(12.0).reshape(4, 3)
    pair = data.task_pair_from_arrays(
        primary_x=x, primary_y=x[:, 0], harmful_x=-x, harmful_y=x[:, 1]
    )
    arrays = batches.paired_arrays(pair, dtype=dtype)
    assert arrays.primary.x.dtype == (jnp.float64 if dtype is None else dtype)
    np.testing.assert_array_equal(arrays.harmful.x, -x[:3])
    held_out = batches.paired_arrays(pair, split="held_out", dtype=dtype)
    np.testing.assert_array_equal(held_out.harmful.y, x[3:, 1])
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        batches.paired_arrays(pair, split="test")


def test_a_batch_with_other_than_one_target_a_row_is_refused():
    rows = Batch(jnp.ones((6, 2)), jnp.ones(6))
    short = PairedBatch(rows, rows._replace(y=jnp.ones(5)))
    with pytest.raises(ValueError, match="harmful task needs as many targets as rows"):
        data.paired_batch(short, 0, 0, batch_size=3)
