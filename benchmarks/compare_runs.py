"""How far the numbers of two sets of runs are apart: a line a method.

python benchmarks/compare_runs.py BEFORE AFTER

Both are folders that hold runs of the same experiment, seeds and data, by two versions of the code,
say. Differences of logarithms are absolute, those of other numbers relative above one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECTIONS = ("conditioning", "trajectory", "spectra", "groups", "utility", "harmful_utility")


def numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every number below a value, with its place."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers(one, f"{path}/{key}")
    elif isinstance(value, list):
        for place, one in enumerate(value):
            yield from numbers(one, f"{path}[{place}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def results(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Results by method and seed."""
    read = [json.loads(file.read_text()) for file in sorted(folder.rglob("result.json"))]
    return {(result["method"], result["seed"]): result for result in read}


def apart(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, str]:
    """The largest difference, and where."""
    largest = 0.0, ""
    for section in SECTIONS:
        there = dict(numbers(after.get(section), section))
        for path, value in numbers(before.get(section), section):
            if path not in there or "/damping_" in path or path.endswith("_s"):
                continue
            scale = 1.0 if "/log_" in path else max(1.0, abs(value))
            largest = max(largest, (abs(value - there[path]) / scale, path))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description="How far two sets of runs are apart.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    before, after = results(args.before), results(args.after)
    if not before.keys() & after.keys():
        raise SystemExit("no run of one method and seed in both folders.")
    for method, seed in sorted(before.keys() & after.keys()):
        difference, path = apart(before[method, seed], after[method, seed])
        print(f"{method} s{seed}: {difference:.1e} {path}")


if __name__ == "__main__":
    main()
