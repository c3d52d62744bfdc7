"""One timer for every benchmark: interleaved repeats, ratios within a round, medians over rounds.

Import it before jax: it sets one BLAS thread and one XLA thread, unless the environment says
otherwise, so that a busy machine changes the numbers less.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """One contestant of a comparison."""

    label: str
    wall_ms: float  # median over rounds
    cpu_ms: float  # process CPU time, median over rounds
    wall_ratio: float  # median over rounds of (this / the reference of the same round)
    cpu_ratio: float


def interleave(contestants: Mapping[str, Callable[[], Any]], *, repeats: int) -> list[Timing]:
    """Run every contestant once a round, in turn; the first is the reference of the ratios.

    Each is called once beforehand, so that compilation is outside the figures.
    """
    for run in contestants.values():
        jax.block_until_ready(run())
    wall: dict[str, list[float]] = {label: [] for label in contestants}
    cpu: dict[str, list[float]] = {label: [] for label in contestants}
    for _ in range(repeats):
        for label, run in contestants.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            cpu[label].append(1e3 * (time.process_time() - cpu_start))
            wall[label].append(1e3 * (time.perf_counter() - wall_start))
    reference = next(iter(contestants))

    def ratio(times: dict[str, list[float]], label: str) -> float:
        pairs = zip(times[label], times[reference], strict=True)
        return statistics.median(one / max(other, 1e-6) for one, other in pairs)

    return [
        Timing(
            label,
            statistics.median(wall[label]),
            statistics.median(cpu[label]),
            ratio(wall, label),
            ratio(cpu, label),
        )
        for label in contestants
    ]


def print_table(title: str, rows: Sequence[Timing]) -> None:
    """One comparison, as plain text."""
    width = max(len(row.label) for row in rows)
    print(f"\n{title}")
    print(f"  {'':{width}}  {'wall ms':>10} {'cpu ms':>10} {'x wall':>8} {'x cpu':>8}")
    for row in rows:
        print(
            f"  {row.label:{width}}  {row.wall_ms:10.3f} {row.cpu_ms:10.3f} "
            f"{row.wall_ratio:8.2f} {row.cpu_ratio:8.2f}",
            flush=True,
        )


def parse(description: str | None) -> argparse.Namespace:
    """``--quick`` and ``--repeats``, the same for every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (default by size)")
    return parser.parse_args()


def print_header() -> None:
    """What the figures were made on."""
    print(
        f"jax {jax.__version__}, {jax.devices()[0].platform}, load average "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; "
        "ratios are to the first row, medians over interleaved rounds"
    )
