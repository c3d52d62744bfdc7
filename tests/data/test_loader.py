import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaximm.data import loader as loaders
from jaximm.data.batches import batch_indices, paired_arrays, paired_batch
from jaximm.data.loader import ArraySource, image_loader, paired_loader
from jaximm.data.tasks import Split, Task, TaskPair

N = 37


@functools.partial(jax.jit, static_argnames=("batch_size",))
def expected_rows(seed, step, *, batch_size):
    return batch_indices(seed, step, n=N, batch_size=batch_size)


def make_split(n=N, seed=0):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (n, 3, 4, 3)).astype(np.uint8), np.arange(n, dtype=np.int32))


def labels_of(loader, steps):
    return [np.asarray(next(loader).y) for _ in range(steps)]


@pytest.fixture
def source():
    return ArraySource(make_split())


def test_streamed_batches_are_those_of_memory():
    splits = make_split(), make_split(23, seed=1)
    pair = TaskPair(
        "p",
        *(Task(str(len(split.y)), split, split, "classes", ("a", "b")) for split in splits),
        description="",
        source="",
    )
    arrays = paired_arrays(pair)
    stream = paired_loader(*map(ArraySource, splits), seed=5, batch_size=8, workers=2)
    in_memory = jax.jit(lambda step: paired_batch(arrays, 5, step, batch_size=8))
    for step in range(8):  # over the border of an epoch of both
        assert stream.step == step
        expected = in_memory(np.int32(step))
        for one, other in zip(
            jax.tree.leaves(next(stream)), jax.tree.leaves(expected), strict=True
        ):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    stream.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_processes_parts_are_the_batch(source, processes):
    streams = [
        image_loader(
            source,
            seed=3,
            batch_size=8,
            process_index=index,
            process_count=processes,
            workers=index % 3,  # how many threads decode is nobody's business
        )
        for index in range(processes)
    ]
    for step in range(6):
        parts = [next(stream) for stream in streams]
        assert all(part.x.shape == (8 // processes, 3, 4, 3) for part in parts)
        rows = np.concatenate([part.y for part in parts])
        np.testing.assert_array_equal(rows, expected_rows(3, step, batch_size=8))
        found = np.concatenate([part.x for part in parts])
        np.testing.assert_array_equal(found, make_split().x[rows])


def test_a_restored_stream_goes_on_exactly_on_other_processes(source):
    whole = labels_of(image_loader(source, seed=1, batch_size=8, workers=2), 9)
    first = image_loader(source, seed=1, batch_size=8, workers=2, ahead=3)
    assert len(labels_of(first, 4)) == 4
    state = first.get_state()
    assert state == {"step": 4, "seed": 1, "batch_size": 8, "rows": N}
    second = [
        image_loader(source, seed=1, batch_size=8, process_index=i, process_count=2, workers=1)
        for i in range(2)
    ]
    for stream in second:
        stream.set_state(state)
    rest = [np.concatenate(parts) for parts in zip(*(labels_of(s, 5) for s in second), strict=True)]
    np.testing.assert_array_equal(rest, whole[4:])
    np.testing.assert_array_equal(labels_of(first, 5), whole[4:])  # and it disturbed nothing
    first.set_state({**state, "step": 0})  # back
    np.testing.assert_array_equal(labels_of(first, 2), whole[:2])
    later = image_loader(source, seed=1, batch_size=8, start_step=7, workers=0)
    np.testing.assert_array_equal(labels_of(later, 2), whole[7:])


def test_a_late_step_needs_no_run_up(source):
    step = 2**31 - 40
    stream = image_loader(source, seed=1, batch_size=8, start_step=step, workers=0, ahead=0)
    for number in range(3):
        expected = expected_rows(1, step + number, batch_size=8)
        np.testing.assert_array_equal(next(stream).y, expected)


def test_a_position_of_another_stream_is_refused(source):
    stream = image_loader(source, seed=1, batch_size=8, workers=0)
    state = stream.get_state()
    for name in ("seed", "batch_size", "rows"):
        with pytest.raises(ValueError, match=rf"{name} = {state[name] + 1}, this loader"):
            stream.set_state({**state, name: state[name] + 1})
    with pytest.raises(ValueError, match=r"expected a data position with .* got \['step'\]"):
        stream.set_state({"step": 3})
    with pytest.raises(ValueError, match="step must be in"):
        stream.set_state({**state, "step": -1})
    pair = paired_loader(source, source, seed=1, batch_size=8, workers=0)
    state = pair.get_state()
    next(pair)
    assert pair.get_state()["harmful"]["step"] == 1
    pair.set_state(state)
    assert pair.step == 0
    with pytest.raises(ValueError, match=r"positions of \['harmful', 'primary'\], got \['step'\]"):
        pair.set_state({"step": 0})


def test_batches_lie_where_the_sharding_says(source):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    stream = image_loader(source, seed=2, batch_size=16, workers=1, sharding=sharding)
    for step in range(2):
        batch = next(stream)
        assert batch.x.sharding == batch.y.sharding == sharding
        assert {shard.data.shape for shard in batch.x.addressable_shards} == {(2, 3, 4, 3)}
        rows = expected_rows(2, step, batch_size=16)
        np.testing.assert_array_equal(batch.y, rows)
        np.testing.assert_array_equal(batch.x, make_split().x[np.asarray(rows)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_comes_out_of_next_with_its_name(workers):
    split = make_split()
    bad = int(expected_rows(0, 2, batch_size=8)[3])

    class Source(ArraySource):
        def __getitem__(self, row):
            if row == bad:
                raise ValueError(f"row {row}.jpg: cannot be decoded")
            return super().__getitem__(row)

    stream = image_loader(Source(split), seed=0, batch_size=8, workers=workers, ahead=0)
    for _ in range(2):
        next(stream)
    with pytest.raises(ValueError, match=rf"row {bad}\.jpg: cannot be decoded"):
        next(stream)
    stream.close()


def test_batches_are_decoded_ahead_but_not_without_end(source):
    asked = []

    class Source(ArraySource):
        def __getitem__(self, row):
            asked.append(row)
            return super().__getitem__(row)

    stream = image_loader(Source(make_split()), seed=0, batch_size=8, workers=2, ahead=2)
    next(stream)
    stream.close()
    # Three batches are on the device; two more may be in work, and what threads had begun.
    assert 24 <= len(asked) <= 24 + 16 + 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be in \[1, 37\] for 37 images, got 0"),
        ({"batch_size": 38}, r"batch_size must be in \[1, 37\]"),
        ({"process_count": 3}, "batch_size 8 is not a multiple of 3 processes"),
        ({"process_index": 2, "process_count": 2}, "got 2 of 2 processes"),
        ({"workers": -1}, "workers must be >= 0"),
        ({"ahead": -1}, "ahead must be >= 0"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**32}, "seed must be in"),
        ({"start_step": 2**31}, "step must be in"),
    ],
)
def test_bad_arguments(source, fields, message):
    with pytest.raises(ValueError, match=message):
        image_loader(source, **{"seed": 0, "batch_size": 8, "process_index": 0, **fields})


def test_task_seeds_differ():
    assert loaders.task_seed(0, 0) != loaders.task_seed(0, 1)
