"""Makes the file of a suite with a name, as this version would run it.

python benchmarks/freeze_suite.py vision-1.0

A name is frozen once: a file that is there is compared, and left as it is. A new one takes an entry
of `SPECIFICATIONS`, its cases in `jaximm.run.cases.CASES` and a golden problem of its modality.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from jaximm import attacks
from jaximm.assessment import LEVELS, Level, golden, suites
from jaximm.compilation import compile_quickly
from jaximm.run.assess import bench_of_tasks
from jaximm.run.cases import CASES
from jaximm.run.prepare import prepare

FOLDER = Path(suites.__file__).parent / "frozen"


class Specification(NamedTuple):
    """What a name is given to.

    Attributes:
      description: one line.
      level: budgets and seeds.
      without: attackers that are left out; `docs/suites.md` says why.
    """

    description: str
    level: Level
    without: tuple[str, ...] = ()


SPECIFICATIONS = {
    "linear-1.0": Specification(
        "House prices and digits at 7 x 7 through a linear map, real targets, R^2.",
        LEVELS["standard"],
    ),
    "vision-1.0": Specification(
        "EfficientNet-Lite0 at 64 pixels: CIFAR-10 vehicles against animals, CIFAR-10 against "
        "Fashion-MNIST.",
        Level(
            probes="short",
            weight_steps=120,
            batch_size=32,
            report_seeds=(101, 102, 103),
            record=8,
            trial=False,
        ),
        without=("spsa", "hypernetwork", "rebalance", "rebalance_sgd"),
    ),
}


def main() -> None:
    """Freezes, or says what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(SPECIFICATIONS))
    name = parser.parse_args().name
    jax.config.update("jax_enable_x64", True)  # as the command line
    compile_quickly()
    if name in suites.names():
        suite = suites.load(name)
        found = suites.differences(suite) + golden.differences(suite)
        print("\n".join(found) or f"{name} is what this version runs.")
        sys.exit(bool(found))
    asked = SPECIFICATIONS[name]
    labels = [
        label
        for label in (*attacks.REGISTRY, *attacks.WEIGHT_REGISTRY)
        if label not in asked.without
    ]
    benches = [bench_of_tasks(prepare(config)) for config in CASES[name].values()]
    content = golden.freeze(name, asked.description, asked.level, labels, benches)
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{name}: {len(labels)} attackers, {len(benches)} cases.")


if __name__ == "__main__":
    main()
