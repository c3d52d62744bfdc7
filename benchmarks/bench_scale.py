"""Time and memory of the linear path against rows and columns: immunised, then attacked.

Each size is a process of its own, so that its peak is its own. Rows are written as .npy files
first; `--door command` runs `jaximm immunise` and `jaximm assess` on their folder, `--door python`
`jaximm.immunise` and `jaximm.attack` on arrays in memory, `--door mapped` the same on them
memory-mapped. Printed are seconds on the clock, CPU seconds of all threads, and the peak of
resident memory less what importing takes, in multiples of the rows in float64 (both tasks); ratios
are to the first size of the run.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

METHODS = ("condition_gap", "limit", "erase")
ATTACKERS = ("ridge", "gd", "adam")
NAMES = ("primary_x", "primary_y", "harmful_x", "harmful_y")


def write(folder: Path, n: int, d: int) -> None:
    """Two tasks of n rows: scales in opposite order, another column to predict."""
    for seed, (task, first, last) in enumerate((("primary", 1, 0.1), ("harmful", 0.1, 1))):
        rng = np.random.default_rng(seed)
        x = np.lib.format.open_memmap(folder / f"{task}_x.npy", "w+", np.float64, (n, d))
        y = np.empty(n)
        for start in range(0, n, 2**14):
            block = rng.standard_normal((min(2**14, n - start), d)) * np.geomspace(first, last, d)
            x[start : start + len(block)] = block
            y[start : start + len(block)] = block[:, seed] / first
        np.save(folder / f"{task}_y.npy", y + 0.5 * rng.standard_normal(n))


def measured(folder: str, door: str, method: str) -> None:
    """Runs one size in this process; prints its figures as JSON."""
    import jaximm.cli
    import jaximm.face

    def peak() -> float:
        # Not ru_maxrss: a new process begins with that of the one that started it.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    imported, figures = peak(), {}
    rows = 8 * sum(np.load(f"{folder}/{name}.npy", mmap_mode="r").size for name in NAMES[::2])

    def timed(label, call):
        wall, cpu = time.perf_counter(), time.process_time()
        found = call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        figures[label] = [wall, cpu, (peak() - imported) / rows]
        return found

    def command(line):
        if jaximm.cli.main(line):
            raise SystemExit(f"failed: {line}")

    if door == "command":
        out = tempfile.mkdtemp(dir=folder)
        given = ["--data", "arrays", "--set", f"data.path={folder}/pair", "--seed", "0"]
        run = ["immunise", "house_price", *given, "--method", method, "--out", f"{out}/run"]
        timed(method, lambda: command(run))
        for attacker in ATTACKERS:
            line = ["assess", f"{out}/run", "--level", "quick", "--attack", attacker]
            timed(
                attacker,
                lambda line=line, a=attacker: command([*line, "--out", f"{out}/{a}"]),
            )
    else:
        mode = "r" if door == "mapped" else None
        arrays = {name: np.load(f"{folder}/{name}.npy", mmap_mode=mode) for name in NAMES}
        tasks = {
            task: (arrays[f"{task}_x"], arrays[f"{task}_y"]) for task in ("primary", "harmful")
        }
        done = timed(
            method,
            lambda: jaximm.immunise(tasks["primary"], harmful=tasks["harmful"], method=method),
        )
        for attacker in ATTACKERS:
            timed(attacker, lambda a=attacker: jaximm.attack(done, attackers=[a]))
    print("figures", json.dumps(figures))


def main() -> None:
    """The sizes, one process each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--door", choices=("python", "mapped", "command"), default="python")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sizes", nargs="+", help="as ROWSxCOLUMNS, such as 1000000x100")
    parser.add_argument("--measured", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measured:
        measured(*args.measured)
        return
    usual = ("50000x20", "100000x20", "50000x40")
    if not args.quick:
        usual = ("250000x100", "500000x100", "1000000x100", "250000x200")
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; door: {args.door}")
    first: dict[str, list[float]] = {}
    for size in args.sizes or usual:
        n, d = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "pair").mkdir()
            write(Path(folder) / "pair", n, d)
            for name in NAMES:
                (Path(folder) / f"{name}.npy").symlink_to(Path(folder) / "pair" / f"{name}.npy")
            for method in args.methods:
                ran = subprocess.run(
                    [sys.executable, __file__, "--measured", folder, args.door, method],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                line = next(line for line in ran.stdout.splitlines() if line.startswith("figures "))
                for label, (wall, cpu, memory) in json.loads(line.removeprefix("figures ")).items():
                    key = f"{method}, {label}" if label != method else method
                    base = first.setdefault(key, [cpu, memory * n * d, n, d])
                    print(
                        f"n {n:>8} (x {n / base[2]:.0f})  d {d:>4} (x {d / base[3]:.0f})  "
                        f"{key:24} {wall:6.1f} s, CPU {cpu:6.1f} s (x {cpu / base[0]:.2f})  "
                        f"peak {memory:.2f} of the rows (bytes x {memory * n * d / base[1]:.2f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
