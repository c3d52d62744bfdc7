"""Streams batches of images that do not fit in memory, the same ones as in memory.

Row for row, batch t is what `jaximm.data.batches` draws: a function of (seed, t) and of nothing
else. With P processes, process i decodes rows ``i b / P .. (i + 1) b / P - 1`` of it, so the
processes' parts, one after the other, are that batch for every P. There is nothing random to save:
the position of a stream is the number of its next step.

grain's threads read, decode and crop ahead (Pillow lets go of the interpreter lock while it does);
finished batches are moved to the device one or two steps before they are asked for.
"""

from __future__ import annotations

import collections
import functools
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaximm.data.batches import batch_indices
from jaximm.data.images.rows import ImageSource
from jaximm.data.tasks import Split
from jaximm.types import Batch, PairedBatch

_MAX_STEPS = 2**31 - 1  # of `batch_indices`


class ArraySource:
    """Rows that are in memory already, as an `ImageSource`."""

    def __init__(self, split: Split):
        self._split = split

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._split.y)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        """One image and its label."""
        return self._split.x[row], int(self._split.y[row])


class ImageLoader(Iterator[Batch]):
    """An endless stream of batches of one task; made by `image_loader`.

    Each `Batch` holds x uint8 [rows, h, w, 3] and y int32 [rows], on the device. An exception in a
    decoding thread (a broken file, named) comes out of `next`. One thread at a time may iterate.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        order: _Order,
        workers: int,
        sharding: jax.sharding.Sharding | None,
        ahead: int,
    ):
        self._source, self._order, self._workers = source, order, workers
        self._sharding, self._ahead = sharding, ahead
        self._batches: Any = None
        self._start(0)

    def __next__(self) -> Batch:
        """The batch of the next step."""
        while len(self._queue) <= self._ahead:
            images, labels = next(self._batches)
            # Returns at once; the copy runs beside the step that the caller has started.
            self._queue.append(Batch(self._place(images), self._place(labels)))
        batch = self._queue.popleft()
        self._step += 1
        return batch

    @property
    def step(self) -> int:
        """Number of the batch that `next` gives."""
        return self._step

    def get_state(self) -> dict[str, int]:
        """Where the stream is, for a checkpoint: plain integers.

        Batches that were decoded ahead and not handed out are not counted. The number of processes
        and devices is not part of it: a run may go on with others.
        """
        return {"step": self._step, **self._order.identity()}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from where `get_state` was called, perhaps in another process.

        Raises:
          ValueError: the state of a stream with another seed, batch size or number of rows, which
            would go on with other rows without a word.
        """
        expected = self._order.identity()
        if set(state) != {"step", *expected}:
            raise ValueError(
                f"expected a data position with {sorted({'step', *expected})}, got {sorted(state)}."
            )
        for name, value in expected.items():
            if int(state[name]) != value:
                raise ValueError(
                    f"the saved data position has {name} = {state[name]}, this loader {value}; "
                    "make the loader with the saved one's fields."
                )
        self._start(int(state["step"]))

    def close(self) -> None:
        """Stops the threads; they also stop when the loader is garbage."""
        if self._batches is not None:
            self._batches.close()
            self._queue.clear()

    def _start(self, step: int) -> None:
        """(Re)starts the threads at `step`."""
        import grain

        if not 0 <= step < _MAX_STEPS:
            raise ValueError(f"step must be in [0, {_MAX_STEPS}), got {step}.")
        self.close()
        self._step = step
        self._queue: collections.deque[Batch] = collections.deque()
        rows = _Stream(self._source, self._order, step)
        each = self._order.local_rows
        # The buffer is counted in images: enough for the batch in work and the one after it.
        reading = grain.ReadOptions(
            num_threads=self._workers, prefetch_buffer_size=max(self._workers, 2 * each)
        )
        dataset = grain.MapDataset.source(rows).to_iter_dataset(reading)
        self._batches = iter(dataset.batch(each, drop_remainder=True, batch_fn=_stack))

    def _place(self, local: np.ndarray) -> jax.Array:
        """This process's rows on its devices."""
        if self._sharding is None:
            return jax.device_put(local)
        return jax.make_array_from_process_local_data(self._sharding, local)


class PairedLoader(Iterator[PairedBatch]):
    """Two loaders in step; made by `paired_loader`."""

    def __init__(self, primary: ImageLoader, harmful: ImageLoader):
        self._loaders = {"primary": primary, "harmful": harmful}

    def __next__(self) -> PairedBatch:
        """Batch ``step`` of both tasks."""
        return PairedBatch(*(next(loader) for loader in self._loaders.values()))

    @property
    def step(self) -> int:
        """Number of the batch that `next` gives."""
        return self._loaders["primary"].step

    def get_state(self) -> dict[str, dict[str, int]]:
        """Where both streams are; see `ImageLoader.get_state`."""
        return {name: loader.get_state() for name, loader in self._loaders.items()}

    def set_state(self, state: dict[str, dict[str, int]]) -> None:
        """Goes on from where `get_state` was called; see `ImageLoader.set_state`."""
        if set(state) != set(self._loaders):
            raise ValueError(
                f"expected the positions of {sorted(self._loaders)}, got {sorted(state)}."
            )
        for name, loader in self._loaders.items():
            loader.set_state(state[name])

    def close(self) -> None:
        """Stops the threads of both."""
        for loader in self._loaders.values():
            loader.close()


def image_loader(
    source: ImageSource,
    *,
    seed: int,
    batch_size: int,
    process_index: int | None = None,
    process_count: int | None = None,
    workers: int | None = None,
    start_step: int = 0,
    sharding: jax.sharding.Sharding | None = None,
    ahead: int = 1,
) -> ImageLoader:
    """An endless stream of the batches that `jaximm.data.batch_indices` names.

    Args:
      source: images of one size, decoded when asked for:
      `jaximm.data.images.image_folder.FileSource`,
        `jaximm.data.images.published.TfdsSource`, `ArraySource` or anything with ``len`` and
        ``[row]``.
      seed: fixes the order, as in `batch_indices`; in [0, 2^32).
      batch_size: rows of a batch over all processes; a multiple of their number.
      process_index: this process; None: `jax.process_index()`.
      process_count: how many there are; None: `jax.process_count()`.
      workers: decoding threads of this process; None: one a core; 0: decode when asked.
      start_step: number of the first batch.
      sharding: where the batches go, as a global array of which each process brings its part; None:
        this process's rows on its default device.
      ahead: batches that are on the device, or on the way, besides the one handed out.

    Raises:
      ValueError: an empty source, or a size, step or process number out of range.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if not 0 <= index < count:
        raise ValueError(
            f"process_index must be in [0, process_count), got {index} of {count} processes."
        )
    n = len(source)
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be in [1, {n}] for {n} images, got {batch_size}.")
    if batch_size % count:
        raise ValueError(f"batch_size {batch_size} is not a multiple of {count} processes.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}.")
    if ahead < 0:
        raise ValueError(f"ahead must be >= 0, got {ahead}.")
    threads = (os.cpu_count() or 1) if workers is None else workers
    if threads < 0:
        raise ValueError(f"workers must be >= 0 (or None), got {workers}.")
    order = _Order(seed, n=n, batch_size=batch_size, part=(index, count))
    loader = ImageLoader(source, order=order, workers=threads, sharding=sharding, ahead=ahead)
    if start_step:
        loader.set_state({**loader.get_state(), "step": start_step})
    return loader


def paired_loader(
    primary: ImageSource, harmful: ImageSource, *, seed: int, batch_size: int, **options: Any
) -> PairedLoader:
    """The batches of `jaximm.data.paired_batch`, streamed.

    Args:
      primary: images of the primary task.
      harmful: images of the harmful task.
      seed: fixes both streams, which are independent of each other.
      batch_size: rows of each task.
      options: further arguments of `image_loader`, for both tasks.

    Raises:
      ValueError: see `image_loader`.
    """
    return PairedLoader(
        *(
            image_loader(source, seed=task_seed(seed, number), batch_size=batch_size, **options)
            for number, source in enumerate((primary, harmful))
        )
    )


def task_seed(seed: int, number: int) -> int:
    """The seed of one task's stream in `jaximm.data.paired_batch`: 0 primary, 1 harmful."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return int(jax.random.bits(key, (), "uint32"))


@functools.partial(jax.jit, static_argnames=("n", "batch_size", "count"))
def _indices(seed, step, index, *, n: int, batch_size: int, count: int) -> jax.Array:
    """`batch_indices`, compiled once for all loaders of one size."""
    return batch_indices(seed, step, n=n, batch_size=batch_size, part=(index, count))


class _Order:
    """Which row comes at each place of this process's stream; threads share it."""

    def __init__(self, seed: int, *, n: int, batch_size: int, part: tuple[int, int]):
        self._seed, self._n, self._batch_size, self._part = seed, n, batch_size, part
        self.local_rows = batch_size // part[1]
        self._recent: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        try:
            # An accelerator would run this after the step it is busy with.
            self._device = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # the CPU is switched off by JAX_PLATFORMS
            self._device = jax.local_devices()[0]

    def identity(self) -> dict[str, int]:
        """What, beside the step, decides the rows."""
        return {"seed": self._seed, "batch_size": self._batch_size, "rows": self._n}

    def row(self, place: int) -> int:
        """The row at place ``step * local_rows + j``."""
        step, within = divmod(place, self.local_rows)
        return int(self.rows(step)[within])

    def rows(self, step: int) -> Int[np.ndarray, "local"]:
        """This process's rows of one batch."""
        with self._lock:
            if step not in self._recent:
                index, count = self._part
                with jax.default_device(self._device):
                    rows = np.asarray(
                        _indices(
                            np.uint32(self._seed),
                            np.int32(step),
                            np.int32(index),
                            n=self._n,
                            batch_size=self._batch_size,
                            count=count,
                        )
                    )
                while len(self._recent) >= 8:  # several batches are in work at once
                    del self._recent[min(self._recent)]
                self._recent[step] = rows
            return self._recent[step]


class _Stream:
    """This process's rows in order, decoded when asked for: what grain reads from."""

    def __init__(self, source: ImageSource, order: _Order, start_step: int):
        self._source, self._order, self._start_step = source, order, start_step

    def __len__(self) -> int:
        return (_MAX_STEPS - self._start_step) * self._order.local_rows

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        first = self._start_step * self._order.local_rows
        return self._source[self._order.row(first + int(index))]


def _stack(rows: Iterable[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(image, label) rows as one array each."""
    images, labels = zip(*rows, strict=True)
    return np.stack(images), np.asarray(labels, np.int32)
