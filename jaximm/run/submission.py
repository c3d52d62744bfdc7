"""Bundles: a defence as others send it, weights and a card, for a suite with a name.

A bundle is a folder: ``card.json`` (`jaximm.records.submission`), and for each case of the suite a
folder of that name with ``seed-N.safetensors`` for every seed of the card. A file holds what trains
in the case's model, by path, and ``head.kernel`` and ``head.bias`` of the primary task where that
is a classifier. Architecture, features, frozen part and rows are the case's, so a bundle holds
numbers and no code.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaximm import assessment
from jaximm.assessment import Bench, Model, suites
from jaximm.assessment.protocol import Progress
from jaximm.assessment.workers import Workers
from jaximm.models.flat import under
from jaximm.models.weights.errors import WeightFileError
from jaximm.models.weights.readers import read_weights
from jaximm.records import assessment as assessment_record
from jaximm.records import submission
from jaximm.records.submission import CARD
from jaximm.run.assess import FILE, bench_of_tasks, in_order, load_run, model_of, params_of
from jaximm.run.cases import CASES
from jaximm.run.config import Experiment, read_config
from jaximm.run.folders import read_result, run_folders
from jaximm.run.prepare import Prepared, prepare
from jaximm.types import Head

HEAD = "head"


def is_bundle(path: Path) -> bool:
    """Whether a folder has a card."""
    return (path / CARD).is_file()


def check(path: Path) -> dict[str, Any]:
    """The card of a bundle, once every weight of it was read and fits.

    Raises:
      ResultError: a card that is missing, damaged or not complete.
      ValueError: too few seeds, an unknown suite, files that are missing or too many, weights that
        do not fit the case's model; the message names the file and what to do.
    """
    card = submission.read(path / CARD)
    for case in cases_of(path, card):
        prepared = prepare(CASES[card["suite"]][case])
        for seed in card["seeds"]:
            read_seed(path, case, seed, prepared)
    return card


def cases_of(path: Path, card: Mapping[str, Any]) -> list[str]:
    """The cases of a card's suite, each with the files of every seed.

    Raises:
      ValueError: see `check`.
    """
    suite = suites.load(card["suite"])
    if len(card["seeds"]) < suite.seeds:
        raise ValueError(
            f"{path / CARD}: {suite.name} asks for {suite.seeds} seeds of the defence or more, got "
            f"{card['seeds']}: make it from more seeds."
        )
    wanted = {f"{case}/seed-{seed}.safetensors" for case in suite.cases for seed in card["seeds"]}
    there = {str(file.relative_to(path)) for file in path.rglob("*.safetensors")}
    if wanted != there:
        missing, more = sorted(wanted - there), sorted(there - wanted)
        what = (
            f"lacks {missing[0]}" if missing else f"holds {more[0]}, which the card does not name"
        )
        raise ValueError(f"{path}: it {what}; a bundle has CASE/seed-N.safetensors for each.")
    return list(suite.cases)


def read_seed(
    path: Path, case: str, seed: int, prepared: Prepared
) -> tuple[dict[str, np.ndarray], Head | None]:
    """What trains, of one seed, in the dtype that the case computes in; and the primary head.

    Raises:
      WeightFileError: not such a file, or other paths, shapes or numbers than the case's.
    """
    file = path / case / f"seed-{seed}.safetensors"
    arrays = dict(read_weights(file))
    head = {key: arrays.pop(f"{HEAD}.{key}", None) for key in ("kernel", "bias")}
    template = params_of(prepared, None)
    necks = {key for key in arrays if under(key, "neck")}
    if set(arrays) - necks != set(template) - necks:
        different = sorted(set(arrays) ^ set(template))
        raise WeightFileError(
            f"{file}: what trains in {case} is {sorted(template)}, a neck and the head; it differs "
            f"in {different[0]}."
        )
    for key, value in arrays.items():
        wanted = list(template[key].shape) if key in template else "of a map's kernel or bias"
        fits = value.ndim <= 2 if isinstance(wanted, str) else list(value.shape) == wanted
        if not fits or value.dtype.kind == "c" or not np.isfinite(value).all():
            raise WeightFileError(
                f"{file}: {key} must be finite real numbers {wanted}, got {value.dtype.name} "
                f"{list(value.shape)}."
            )
    dtype = prepared.train.primary.x.dtype
    trained = {key: np.asarray(value, dtype) for key, value in arrays.items()}
    if prepared.classes("primary") is None:
        return trained, None
    if head["kernel"] is None or head["bias"] is None:
        raise WeightFileError(
            f"{file}: the primary task's classifier is {HEAD}.kernel and {HEAD}.bias; give both."
        )
    return trained, Head(jnp.asarray(head["kernel"]), jnp.asarray(head["bias"]))


def bench_of(path: Path, case: str) -> tuple[Bench, list[Model]]:
    """The bench of a case of a bundle, and its seeds as models, the undefended one first.

    Raises:
      ValueError: what `check` refuses.
    """
    card = submission.read(path / CARD)
    prepared = prepare(CASES[card["suite"]][case])
    bench = bench_of_tasks(prepared)
    models = [model_of(prepared, bench, None, head=prepared.head)]
    for seed in card["seeds"]:
        arrays, head = read_seed(path, case, seed, prepared)
        backbone = prepared.backbone.replace(
            {key: jnp.asarray(value) for key, value in arrays.items()}
        )
        label = card["name"] if seed == 0 else f"{card['name']} s{seed}"
        models.append(
            model_of(prepared, bench, backbone, head=head, label=label, method=card["name"],
                     seed=seed)
        )  # fmt: skip
    return bench, in_order(models)


def assess(
    path: Path,
    out: Path,
    *,
    level: str | None = None,
    retry_failed: bool = False,
    command: str = "",
    progress: Progress | None = None,
    executor: Callable[[], Executor] | None = None,
) -> list[dict[str, Any]]:
    """Assesses a bundle on every case of its suite.

    Args:
      path: the bundle.
      out: gets ``CASE/assessment.json``, ``CASE/cells`` and a copy of the card in each.
      level: the card's suite, or a level to try it at; by default the suite.
      retry_failed, command, progress: see `jaximm.assessment.assess`.
      executor: see `jaximm.run.assess.assess`.

    Raises:
      ValueError: what `check` or `jaximm.assessment.assess` refuses; a level that is another suite.
    """
    card = submission.read(path / CARD)
    if level in suites.names() and level != card["suite"]:
        raise ValueError(f"{path / CARD} is for {card['suite']}, not {level}.")
    documents = []
    for case in cases_of(path, card):
        rebuild = functools.partial(bench_of, path.absolute(), case)
        bench, models = rebuild()
        where = out / bench.name
        where.mkdir(parents=True, exist_ok=True)
        document = assessment.assess(
            bench, models, level=level or card["suite"], out=where, retry_failed=retry_failed,
            command=command, progress=progress,
            workers=None if executor is None else Workers(executor, rebuild),
        )  # fmt: skip
        assessment_record.write(where / FILE, document)
        submission.write(where / CARD, card)
        documents.append(document)
    return documents


def make(out: Path, runs: Sequence[Path], card: Mapping[str, Any]) -> Path:
    """A bundle from finished runs of one method on every case of a suite; checked.

    Args:
      out: a new folder.
      runs: run folders, or folders that hold some.
      card: of `jaximm.records.submission`, without schema and seeds, which are those of the runs.

    Raises:
      ValueError: a folder that is there; runs of other experiments than the suite's, or of several
        methods; what `check` refuses. Nothing is left then.
    """
    from safetensors.numpy import save_file

    if out.exists():
        raise ValueError(f"{out} is there already; give a new folder.")
    submission.validate({"schema": submission.SCHEMA_VERSION, "seeds": [0], **card})
    folders = [folder for path in runs for folder in run_folders(Path(path))]
    read = [(folder, read_result(folder)) for folder in folders]
    wanted = [(folder, result) for folder, result in read if result["method"] == card["method"]]
    if not wanted:
        methods = sorted({result["method"] for _, result in read})
        raise ValueError(f"there is no run of {card['method']!r}; there are {methods}.")
    try:
        seeds = sorted({result["seed"] for _, result in wanted})
        prepared: dict[str, Prepared] = {}
        for folder, result in wanted:
            config = read_config(folder / "config.json")
            case = _case_of(config, folder, card["suite"])
            prepared.setdefault(case, prepare(config))
            loaded = load_run(folder, prepared[case])
            arrays = params_of(prepared[case], loaded.backbone)
            if prepared[case].classes("primary") is not None:
                assert loaded.head is not None  # a run saves its head
                arrays |= {f"{HEAD}.{key}": value for key, value in loaded.head.items()}
            file = out / case / f"seed-{result['seed']}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, file)
        whole = {"schema": submission.SCHEMA_VERSION, **card, "seeds": seeds}
        submission.write(out / CARD, whole)
        check(out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


ROWS_AND_MODEL = (
    *("data", "data_fields", "image_size", "preprocess"),
    *("model", "model_fields", "weights", "train"),
)
"""Fields of an experiment that a case fixes; the others are the defence's own business."""


def _case_of(config: Experiment, folder: Path, suite: str) -> str:
    for case, experiment in CASES[suites.load(suite).name].items():
        if all(getattr(config, key) == getattr(experiment, key) for key in ROWS_AND_MODEL):
            return case
    raise ValueError(
        f"{folder}: its experiment {config.name!r} has other rows or another model than the cases "
        f"{sorted(CASES[suite])} of {suite}; immunise {suite}:CASE for each of them."
    )
