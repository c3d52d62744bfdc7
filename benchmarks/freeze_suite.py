"""Makes the file of a suite with a name, as this version would run it.

python benchmarks/freeze_suite.py linear-1.0

A name is frozen once: a file that is there is compared, and left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax

from jaximm import attacks
from jaximm.assessment import LEVELS, golden, suites
from jaximm.compilation import compile_quickly
from jaximm.run.assess import bench_of_tasks
from jaximm.run.cases import SUITE
from jaximm.run.prepare import prepare

FOLDER = Path(suites.__file__).parent / "frozen"
LINEAR = "House prices and digits at 7 x 7 through a linear map, real targets, R^2."


def main() -> None:
    """Freezes, or says what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["linear-1.0"])
    name = parser.parse_args().name
    jax.config.update("jax_enable_x64", True)  # as the command line
    compile_quickly()
    if name in suites.names():
        suite = suites.load(name)
        found = suites.differences(suite) + golden.differences(suite)
        print("\n".join(found) or f"{name} is what this version runs.")
        sys.exit(bool(found))
    labels = [*attacks.REGISTRY, *attacks.WEIGHT_REGISTRY]
    benches = [bench_of_tasks(prepare(config)) for config in SUITE.values()]
    content = golden.freeze(name, LINEAR, LEVELS["standard"], labels, benches)
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{name}: {len(labels)} attackers, {len(benches)} cases.")


if __name__ == "__main__":
    main()
