"""Images a second that the loader delivers, against what a training step eats.

python benchmarks/bench_loader.py [--quick] [--repeats R] [--batch B] [--workers W]
                                  [--model NAME | --step-ms MS]

Photographs of 500 x 375 pixels are made and kept as JPEG in a temporary folder; each is read,
decoded, resized to 256 and cropped to 224, as for ImageNet. The step is value and gradient of a
random network of `jaximm.models` at that batch, unless its time is given (of an accelerator, say).
"""

from __future__ import annotations

import _timing  # noqa: F401  first: it sets the threads

# isort: split
import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaximm.data.images.image_folder import FileSource
from jaximm.data.images.rows import read_source
from jaximm.data.loader import ArraySource, ImageLoader, image_loader


class Rate(NamedTuple):
    """Images a second, median over rounds, by wall clock and by processor time."""

    label: str
    wall: float
    cpu: float


def make_photographs(folder: Path, count: int) -> FileSource:
    """Smooth colour fields with grain: about as many bytes a pixel as photographs have."""
    from PIL import Image

    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        image = np.asarray(
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.int16
        )
        image = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
        files.append(folder / f"{number:04}.jpg")
        Image.fromarray(image).save(files[-1], quality=90)
    return FileSource(files=tuple(files), labels=(0,) * count)


def measure(label: str, run: Callable[[], int], repeats: int) -> Rate:
    """`run` returns how many images it went through."""
    run()  # opens files, starts threads, compiles
    wall, cpu = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        count = run()
        wall.append(count / (time.perf_counter() - start))
        cpu.append(count / max(time.process_time() - cpu_start, 1e-9))
    return Rate(label, statistics.median(wall), statistics.median(cpu))


def drain(loader: ImageLoader, batches: int) -> Callable[[], int]:
    """Takes batches and does nothing with them."""

    def run() -> int:
        count = 0
        for _ in range(batches):
            batch = jax.block_until_ready(next(loader))
            count += batch.x.shape[0]
        return count

    return run


def make_step(model: str) -> Callable[[jax.Array], jax.Array]:
    """Mean square feature of a random network and its gradient in all parameters, jitted."""
    from jaximm import models

    backbone = models.create(model, rng_key=jax.random.key(0))

    def loss(params, images):
        return jnp.mean(jnp.square(backbone.features(params, backbone.preprocess(images))))

    grad = jax.jit(jax.value_and_grad(loss))
    return lambda images: grad(backbone.params, images)[0]


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time of a call, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images, few repeats")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None, help="rows (default 64, quick 16)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding threads")
    parser.add_argument("--model", default="squeezenet1_1", help="a key of jaximm.models.REGISTRY")
    parser.add_argument(
        "--step-ms", type=float, default=None, help="time of a step, measured elsewhere"
    )
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 5)
    batch = options.batch or (16 if options.quick else 64)
    batches = 2 if options.quick else 4
    count = batch * batches
    print(
        f"jax {jax.__version__}, {jax.devices()[0].platform}, load average "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; medians of {repeats} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        source = make_photographs(Path(folder), count)
        size = statistics.mean(path.stat().st_size for path in source.files)
        print(f"{count} JPEG files, 500 x 375, {size / 1024:.0f} KiB on average; batch {batch}")

        def one_by_one() -> int:
            for row in range(count):
                source[row]
            return count

        loader = image_loader(source, seed=0, batch_size=batch, workers=options.workers)
        in_memory = ArraySource(read_source(source))
        rates = [
            measure("decode, resize, crop, one thread", one_by_one, repeats),
            measure(f"loader, {options.workers} threads", drain(loader, batches), repeats),
            measure(
                "loader, images in memory",
                drain(image_loader(in_memory, seed=0, batch_size=batch, workers=0), batches),
                repeats,
            ),
        ]
        print(f"\n  {'':34} {'images/s':>10} {'per cpu s':>10}")
        for rate in rates:
            print(f"  {rate.label:34} {rate.wall:10.0f} {rate.cpu:10.0f}")
        delivered = rates[1].wall
        if options.step_ms is not None:
            eaten = batch / (options.step_ms / 1e3)
            print(f"\n  a step of {options.step_ms:g} ms eats {eaten:.0f} images/s")
            print(f"  loader delivers {delivered / eaten:.2f} x that")
            return
        step = make_step(options.model)
        fixed = next(loader).x
        alone = seconds(lambda: step(fixed), repeats)
        fed = seconds(lambda: step(next(loader).x), repeats)
        eaten = batch / alone
        print(f"\n  step of {options.model}, {1e3 * alone:.0f} ms, eats {eaten:.0f} images/s")
        print(f"  loader delivers {delivered / eaten:.2f} x that")
        print(f"  step fed by the loader takes {fed / alone:.2f} x the step on one fixed batch")
        loader.close()


if __name__ == "__main__":
    main()
