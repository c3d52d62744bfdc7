"""What `jaximm assess` takes: two small models by eight attackers, beside another checkout.

python benchmarks/bench_assess.py [--against CHECKOUT] [--rounds R] [--case linear|deep]

Every run is a process of its own, from its imports to its page. *Cold*: nothing is kept from an
earlier call. *Warm*: the programs of an earlier call are on disk; a checkout without a cache of its
own gets JAX's, with no least size. The two checkouts take turns, and ratios are of one round; CPU
time is that of the process and its children. Runs are made once, by each checkout's own
`immunise`. Printed last: what a second assessment of the same shapes compiles in one process.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).absolute().parents[1]
ATTACKERS = (
    "gd", "conjugate_gradients", "adam", "ridge",
    "fine_tune_adam", "fresh_head_adam", "solved_head", "lora",
)  # fmt: skip
DEEP = """
try:
    from jaximm.run import DeepConfig
except ImportError:
    from jaximm.run import Experiment
    names, make = ("data", "data_fields", "model", "model_fields"), Experiment
else:
    names, make = ("images", "image_fields", "backbone", "backbone_fields"), DeepConfig
values = (
    "image_folder",
    {{"primary_path": "{root}/primary", "harmful_path": "{root}/harmful", "size": 8, "resize": 8}},
    "mlp",
    {{"input_shape": (8, 8, 3), "widths": (64, 32)}},
)
CONFIG = make(
    name="tiny", weights="random", train="*", methods=("none", "condition_gap"), steps=7,
    batch_size=32, **dict(zip(names, values)),
)
"""
AGAIN = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_enable_x64", True)
count = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: count.append(name) if "backend_compile" in name else None
)
from jaximm.run import assess
for part in ("first", "second"):
    count.clear()
    out = Path(sys.argv[2]) / part
    assess.assess([Path(sys.argv[1])], out, level="quick", attackers=sys.argv[3:])
    print(part, len(count))
"""


def main() -> None:
    """Runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--case", choices=("linear", "deep"), action="append")
    args = parser.parse_args()
    checkouts = {"this": HERE} | ({"other": args.against.absolute()} if args.against else {})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_images(root)
        for case in args.case or ("linear", "deep"):
            compare(case, checkouts, args.rounds, root / case)


def compare(case: str, checkouts: dict[str, Path], rounds: int, root: Path) -> None:
    """One case: times by checkout and cache, ratios, and what a second assessment compiles."""
    for name, checkout in checkouts.items():
        (root / name).mkdir(parents=True)
        experiment = "house_price"
        if case == "deep":
            experiment = str(root / name / "deep.py")
            Path(experiment).write_text(DEEP.format(root=root.parent))
        methods = [] if case == "deep" else ["--method", "none", "--method", "limit@t=1"]
        words = ["immunise", experiment, *methods, "--out", root / name / "runs"]
        jaximm(checkout, words, cache=root / name / "cache")
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(rounds):
        for kind in ("cold", "warm"):
            for name, checkout in checkouts.items():
                # The cold run fills what the warm one finds.
                cache = root / name / f"cache-{number}"
                words = ["assess", root / name / "runs", "--level", "quick"]
                words += ["--out", root / name / f"{kind}-{number}"]
                words += [word for attacker in ATTACKERS for word in ("--attack", attacker)]
                took = jaximm(checkout, words, cache=cache)
                times.setdefault((kind, name), []).append(took)
    print(f"{case}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for (kind, name), took in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*took, strict=True))
        line = f"  {kind} {name:6} {wall:7.1f} s wall {cpu:7.1f} s CPU"
        if "other" in checkouts and name == "this":
            parts = zip(took, times[kind, "other"], strict=True)
            ratios = [[one / two for one, two in zip(*pair, strict=True)] for pair in parts]
            wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
            line += f"   of the other: {wall:.2f} wall, {cpu:.2f} CPU"
        print(line, flush=True)
    runs, out = str(root / "this" / "runs"), str(root / "again")
    again = [sys.executable, "-c", AGAIN, runs, out, *ATTACKERS]
    found = subprocess.run(again, env=environment(HERE), check=True, capture_output=True, text=True)
    print("  compiled by assessments in one process:", ", ".join(found.stdout.split("\n")[:2]))


def environment(checkout: Path, **more: str) -> dict[str, str]:
    """Of a process that imports a checkout, without settings of this one."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "XLA_FLAGS",
             "PYTHONDONTWRITEBYTECODE")  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if key not in unset}
    return kept | {"PYTHONPATH": str(checkout), "OPENBLAS_NUM_THREADS": "1"} | more


def jaximm(checkout: Path, words: list, *, cache: Path) -> tuple[float, float]:
    """Seconds that a command takes, by the clock and of CPU."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    command = [sys.executable, "-m", "jaximm.cli", *map(str, words)]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    env = environment(checkout, **settings)
    subprocess.run(command, env=env, cwd=cache.parent.parent, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu


def draw_images(root: Path) -> None:
    """Two tasks of four classes, 60 noisy images each."""
    rng = np.random.default_rng(0)
    for task in ("primary", "harmful"):
        for label in range(4):
            pattern = rng.uniform(0, 255, (8, 8))
            folder = root / task / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(60):
                pixels = (pattern + rng.uniform(0, 255, (8, 8))) / 2
                image = np.repeat(pixels.astype(np.uint8)[..., None], 3, axis=2)
                Image.fromarray(image).save(folder / f"{number}.png")


if __name__ == "__main__":
    main()
