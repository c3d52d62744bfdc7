"""Built-in experiments: by name, as `jaximm demo`, and as `jaximm suite`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaximm import attacks, compilation, registry
from jaximm.assessment import Level
from jaximm.assessment.workers import ended, interrupts_ignored
from jaximm.run.assess import assess
from jaximm.run.config import Experiment, read_config
from jaximm.run.immunise import Progress, immunise
from jaximm.training.optimiser import OptimiserConfig
from jaximm.types import Fields, Json

# The released code makes 210 updates (30 epochs of 7 batches); ours each see all rows.
# Rates: tuned on training rows of 3-8, 4-9 and 0-1, see experiments/mnist_pairs/README.md.
_DIGIT_RUNS: Mapping[str, Fields] = {
    "condition_gap": {"steps": 210},
    "ill_only": {"steps": 210},
    "imma": {"steps": 210},
    "balanced_gap": {"steps": 210, "rate": 0.45, "final_rate": 0.1},
    "direct_kappa": {"steps": 210, "learning_rate": 0.01},
}


_METHODS = (
    "none",
    "ill_only",
    "imma",
    "condition_gap",
    "balanced_gap",
    "direct_kappa",
    "limit",
)

EXPERIMENTS: dict[str, Experiment] = {
    config.name: config
    for config in (
        Experiment(
            name="house_price",
            data="house_prices",
            methods=_METHODS,
            description="House prices: lot area (primary) against sale price (harmful), d = 79.",
        ),
        Experiment(
            name="mnist_pair",
            data="mnist_pairs",
            methods=_METHODS,
            method_fields=_DIGIT_RUNS,
            description="Images of one digit against another, constant labels, as in the paper.",
        ),
        Experiment(
            name="mnist_slant",
            data="mnist_pairs",
            data_fields={"target": "slant"},
            methods=_METHODS,
            method_fields=_DIGIT_RUNS,
            description="The same images with a real target: the slant of the digit.",
        ),
        Experiment(
            name="mnist_one_vs_rest",
            data="mnist_pairs",
            data_fields={"target": "one_vs_rest"},
            methods=("none", "condition_gap", "limit@t=0"),
            method_fields={"condition_gap": {"steps": 30}},
            description="Two labels on the same images: conditioning cannot separate them.",
        ),
    )
}
"""Built-in experiments. Folders of `experiments/` build theirs from these."""


def load_experiment(name_or_path: str) -> Experiment:
    """A built-in experiment by name, a suite's case as ``vision-1.0:lite0_animals``, or one from a
    ``config.json`` or a file with ``CONFIG``.

    A ``.py`` file is code, and runs (`jaximm.registry.run_file`); a ``config.json`` runs none.

    Raises:
      ValueError: neither a known name nor such a file; or what the file holds is refused.
    """
    if name_or_path in EXPERIMENTS:
        return EXPERIMENTS[name_or_path]
    cases = {f"{suite}:{name}": one for suite, own in CASES.items() for name, one in own.items()}
    if name_or_path in cases:
        return cases[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".json" and path.is_file():
        return read_config(path)
    if path.suffix == ".py" and path.is_file():
        config = registry.run_file(path)[0].get("CONFIG")
        if not isinstance(config, Experiment):
            raise ValueError(f"{path} must define CONFIG, an Experiment.")
        return config
    raise ValueError(
        f"unknown experiment {name_or_path!r}; choose from {sorted(EXPERIMENTS)}, of a suite from "
        f"{sorted(cases)}, or give a config.json or a .py file that defines CONFIG."
    )


DEMO_METHODS = (*EXPERIMENTS["house_price"].methods, "limit@t=1", "erase")
"""What `jaximm demo` compares."""


def demo(
    out: Path, *, resume: bool = False, command: str = "", progress: Progress | None = None
) -> Json:
    """The main job on house prices: every method, assessed at the quick level by every probe.

    Returns:
      The assessment.
    """
    config = dataclasses.replace(EXPERIMENTS["house_price"], methods=DEMO_METHODS)
    immunise(config, out, resume=resume, command=command, progress=progress)
    (assessment,) = assess(
        [out],
        out / "assessment",
        level="quick",
        as_configured=True,
        command=command,
        progress=progress,
    )
    return assessment


SUITE: dict[str, Experiment] = {
    "house_price": dataclasses.replace(EXPERIMENTS["house_price"], methods=DEMO_METHODS),
    "mnist_slant": dataclasses.replace(
        EXPERIMENTS["mnist_slant"],
        data_fields={"target": "slant", "pool": 4, "train_rows": 300},
        methods=(*EXPERIMENTS["mnist_slant"].methods, "limit@t=1", "erase"),
        description="Digits at 7 x 7: the slant of a 0 (primary) against that of a 1 (harmful).",
    ),
}
"""The linear cases of `make suite`."""

_LITE0 = Experiment(
    name="lite0_animals",
    data="cifar10_split",
    data_fields={"train_rows": 1500, "held_out_rows": 1200, "seed": 1},
    model="efficientnet_lite0",
    image_size=64,
    train="head",
    methods=("none", "condition_gap", "limit@t=1,damping=1e-6", "erase"),
    steps=150,
    optimiser=OptimiserConfig(learning_rate=1e-4),
    description="EfficientNet-Lite0: CIFAR-10 vehicles (primary) against animals (harmful).",
)

VISION: dict[str, Experiment] = {
    "lite0_animals": _LITE0,
    "lite0_fashion": dataclasses.replace(
        _LITE0,
        name="lite0_fashion",
        data="cifar10_fashion",
        description="EfficientNet-Lite0: CIFAR-10 (primary) against Fashion-MNIST (harmful).",
    ),
}
"""The cases of ``vision-1.0``: weights of ImageNet, 64 pixels, the last convolution trains."""

CASES: dict[str, dict[str, Experiment]] = {"linear-1.0": SUITE, "vision-1.0": VISION}
"""The experiments of each suite with a name."""

DOMINATED = (
    "benign_drift",
    "hypernetwork",
    "latent_perturbation",
    "lora",
    "muon",
    "prune_then_tune",
    "random_subspace",
    "spsa",
)
"""Of all 18 models of these cases none is broken most cheaply, nor most, by one of these, and they
took more than a third of the time (`BUILD_NOTES.md`): only the level "full" and the suite have
them."""


def suite(
    out: Path,
    *,
    level: str | Level = "standard",
    attackers: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    command: str = "",
    progress: Progress | None = None,
) -> list[Json]:
    """Immunises the linear cases by every method and assesses them; resumes what is in `out`.

    Without `attackers`, all are taken, up to the level "standard" without those of `DOMINATED`.
    `seeds` are those of the methods. On CPUs the cases run in processes of their own, two at a
    time: most of the time goes into compiling, which uses one core.
    """
    if attackers is None and level in ("quick", "standard"):
        attackers = [
            name for name in (*attacks.REGISTRY, *attacks.WEIGHT_REGISTRY) if name not in DOMINATED
        ]
    names = SUITE if cases is None else dict.fromkeys(cases)
    jobs = [(name, Path(out), level, attackers, tuple(seeds), command) for name in names]
    if len(jobs) < 2 or jax.default_backend() != "cpu" or (os.cpu_count() or 1) < 2:
        return [suite_case(*case, progress=progress) for case in jobs]
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    pool = concurrent.futures.ProcessPoolExecutor(
        2, context, initializer=_start_case, initargs=(told,)
    )
    with pool, ended():  # whose end comes first: the pool waits for its workers
        with interrupts_ignored():  # by the workers, which inherit it
            waiting = [pool.submit(_told_case, *case) for case in jobs]
        rest = set(waiting)
        while rest:
            done, rest = concurrent.futures.wait(rest, timeout=SHOWN_SECONDS)
            while not told.empty():
                message = told.get()
                if progress is not None:
                    progress(*message)
            for future in done:
                future.result()  # raises what the case raised
        return [future.result() for future in waiting]


SHOWN_SECONDS = 0.5
"""Between two looks at what the processes of a suite have told."""


def suite_case(
    name: str,
    out: Path,
    level: str | Level,
    attackers: Sequence[str] | None,
    seeds: tuple[int, ...],
    command: str,
    *,
    progress: Progress | None = None,
) -> Json:
    """One case of `suite`."""
    runs = out / "runs" / name
    config = dataclasses.replace(SUITE[name], seeds=seeds)
    immunise(config, runs, resume=True, command=command, progress=progress)
    (assessment,) = assess(
        [runs], out, level=level, attackers=attackers, command=command, progress=progress
    )
    return assessment


_told: list[Any] = []
"""Of a process of the suite: the queue that its progress goes into."""


def _start_case(told: Any) -> None:
    """A worker computes in float64 and has entries from outside, as the command line does.

    It compiles more than it runs.
    """
    _told[:] = [told]
    compilation.compile_quickly()
    jax.config.update("jax_enable_x64", True)
    registry.load_entry_points()


def _told_case(name: str, *case: Any) -> Json:
    """`suite_case` in a process of its own, whose progress is told with the name of the case."""

    def progress(label: str, done: int, total: int, record: Mapping[str, Any]) -> None:
        said = {key: record[key] for key in ("unit", "says") if key in record}
        _told[0].put((f"{name}, {label}", done, total, said))

    return suite_case(name, *case, progress=progress)
