"""Runs an experiment's methods and seeds, each into a folder of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jaximm import checkpoint, data, immunisers, measures, training
from jaximm.assessment.estimates import SAID_SECONDS, about
from jaximm.assessment.protocol import Progress
from jaximm.immunisers import THETA, ProbeParams, Problem, linear_params
from jaximm.immunisers.conditioning.row_space import (
    at_primary_scale,
    from_row_space,
    row_space_basis,
    to_row_space,
)
from jaximm.models import Trainable
from jaximm.models.statistics import features_with_statistics, perturbed_fn_of, sites_fn_of
from jaximm.records import files, result
from jaximm.records.lease import held
from jaximm.registry import parse_label
from jaximm.run.choose import is_selected, select_limit
from jaximm.run.config import Experiment, code_of, config_json, is_closed_form
from jaximm.run.folders import check_folder, device, read_result, run_folder, versions, write_json
from jaximm.run.measure import Immunised, describe, measure, save
from jaximm.run.prepare import TASKS, Prepared, batched, prepare
from jaximm.training.loop import Record
from jaximm.training.optimiser import make_optimiser
from jaximm.types import Batch, Json, PairedBatch, Params

CHECKPOINT_SECONDS = 180.0
"""Time after which a run's state is saved, whatever its steps: what a crash costs at most."""

MONITOR_ROWS = 256
"""Training rows of each task whose features a trajectory's condition numbers are of."""


def run_method(
    prepared: Prepared,
    label: str,
    *,
    seed: int = 0,
    checkpoints: checkpoint.TrainCheckpoints | None = None,
    resume: bool = False,
    log: training.MetricsLog | None = None,
    progress: Callable[[int, int, Record], None] | None = None,
) -> Immunised:
    """Runs one method from theta_0 and its head: the same function for every method and model."""
    config, started = prepared.config, time.perf_counter()
    method = config.method(label)
    if is_selected(prepared, label):
        method = dataclasses.replace(
            select_limit(prepared)[0], steps=method.steps, batch_size=method.batch_size
        )
    # After a network a closed form adds a neck, and sees its features.
    numbers = prepared.classes("primary") is None
    exact = prepared.exact and (numbers or not is_closed_form(label))
    closed = is_closed_form(label) and not exact
    trainable = prepared.closed if closed else prepared.trainable
    arrays = prepared.features["train"] if closed else prepared.train
    fields: Json = {
        "classes": prepared.classes("primary"),
        "harmful_classes": prepared.classes("harmful"),
        "optimiser": make_optimiser(config.optimiser, method.steps),
        "label_smoothing": config.label_smoothing,
        "accumulate": config.accumulate,
    }
    if "needs_harmful_head" in immunisers.about(parse_label(label)[0]).traits:
        fields["harmful_head"] = prepared.harmful_head
    basis = None
    if exact:
        arrays = _widened(arrays)
        # Closed forms gain nothing here; the limit's damping is relative to tr(K) / d of all
        # coordinates, and features that an erasure set to zero would be turned into others.
        if method.steps > 1 and not is_closed_form(label):
            basis = row_space_basis(arrays)
        arrays = arrays if basis is None else to_row_space(arrays, basis)
        primary, harmful = prepared.rows["train"]
        if "harmful_head" in fields:
            dtype = arrays.primary.x.dtype
            fields["harmful_head"] = _on_basis(prepared, fields["harmful_head"], basis, dtype)
        problem = immunisers.linear_problem(
            arrays, damping_primary=primary.damping, damping_harmful=harmful.damping, **fields
        )
        monitor = _factor_monitor(problem)
        start = _linear_start(prepared, arrays, basis, seed)
    else:
        problem = Problem(
            features_fn=features_with_statistics(trainable),
            sites_fn=sites_fn_of(trainable),
            perturbed_fn=perturbed_fn_of(trainable),
            width=prepared.backbone.width,
            **fields,
        )
        monitor = _row_monitor(prepared, trainable, arrays)
        start = ProbeParams(dict(trainable.params), prepared.head)
    parallel = None
    if jax.device_count() > 1 and not exact:
        # Closed forms see all rows at once, whatever number of them there is.
        rows = "whole" if method.batch_size is None else "split"
        parallel = training.make_parallel(config.parallel, rows=rows)
    on_host = jax.default_backend() == "cpu" and not exact

    def foretell(left: int, each: float) -> None:
        if progress is not None and left * each >= SAID_SECONDS:
            says = f"{about(left * each)}, {left:,} steps of {each:.2g} s"
            progress(method.steps - left, method.steps, {"says": says})

    fitted = training.fit(
        immunisers.make_immuniser(parse_label(label)[0], method, problem),
        start,
        jax.tree_util.Partial(_batch_fn(method.batch_size), arrays, jnp.uint32(seed)),
        seed=seed,
        steps=method.steps,
        log_every=max(1, method.steps // (config.log_points or 1)),
        measure_fn=monitor,
        checkpoints=checkpoints,
        checkpoint_every=None if checkpoints is None else config.checkpoint_every,
        checkpoint_seconds=None if checkpoints is None else CHECKPOINT_SECONDS,
        resume=resume,
        log=log,
        progress=None
        if progress is None
        else lambda done, record: progress(done, method.steps, record),
        foretell=foretell,
        parallel=parallel,
        loop="host" if on_host else "device",
    )
    params = fitted.params
    if exact:
        params = _finished(prepared, params, basis)
    return Immunised(
        label,
        params,
        trainable,
        method,
        [_trajectory_row(record) for record in fitted.trajectory],
        max(time.perf_counter() - started, fitted.seconds),
        fitted.step_seconds,
        fitted.steps_done,
    )


def _widened(rows: PairedBatch) -> PairedBatch:
    """Fixed rows in the default float: exact steps move kappas beyond what float32 resolves."""
    dtype = jnp.zeros(()).dtype
    return PairedBatch(*(Batch(batch.x.astype(dtype), batch.y) for batch in rows))


def _linear_start(prepared: Prepared, arrays: PairedBatch, basis, seed: int) -> ProbeParams:
    """The identity, or a random theta, and theta_0's head, in the coordinates of the rows."""
    width, dtype = arrays.primary.x.shape[1], arrays.primary.x.dtype
    # Not the keys that training draws from.
    random = prepared.config.init == "random"
    key = jax.random.fold_in(jax.random.key(seed), 2**31) if random else None
    theta = immunisers.init_params(width, key, dtype=dtype).backbone[THETA]
    return linear_params(theta, _on_basis(prepared, prepared.head, basis, dtype))


def _on_basis(prepared: Prepared, head: Params, basis, dtype) -> Params:
    """A head of theta_0 in the coordinates of the rows."""
    head = jax.tree.map(lambda leaf: leaf.astype(dtype), head)
    return head if basis is None else prepared.primary_task.lifted(head, basis.T)


def _finished(prepared: Prepared, params: ProbeParams, basis) -> ProbeParams:
    """Parameters on all coordinates, at the scale and in the dtype of the rows."""
    x, task = prepared.train.primary.x, prepared.primary_task
    if basis is not None:
        params = from_row_space(params, basis, task)
    params = at_primary_scale(params, x.astype(params.backbone[THETA].dtype), task)
    return jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)


@functools.lru_cache(maxsize=16)
def _batch_fn(batch_size: int | None):
    """One function object a batch size, so that data sets of one shape share a compilation."""

    def batch(arrays: PairedBatch, seed, step, part=None) -> PairedBatch:
        return data.paired_batch(arrays, seed, step, batch_size=batch_size, part=part)

    return batch


def _factor_monitor(problem: Problem) -> Callable[[ProbeParams], dict[str, float]]:
    """Damped condition numbers of all training rows as theta moves, relative to the identity."""
    factors = problem.factors
    assert factors is not None
    width, dtype = factors.primary.shape[0], factors.primary.dtype
    raw = measures.log_kappas(*factors, jnp.eye(width, dtype=dtype))

    def monitor(params: ProbeParams) -> dict[str, float]:
        logged = measures.log_kappas(*factors, params.backbone[THETA])
        return _with_ratios(logged, {task: raw[f"log_kappa_{task}"] for task in TASKS})

    return monitor


def _row_monitor(
    prepared: Prepared, trainable: Trainable, arrays: PairedBatch
) -> Callable[[ProbeParams], dict[str, float]]:
    """Condition numbers of some training rows' features, relative to theta_0.

    Damped after theta, as `jaximm.measures.conditioning` has it: the features are as shipped.
    """
    damping = prepared.config.damping
    rtol = prepared.config.tolerance

    def log_kappas(features) -> dict[str, jax.Array]:
        logged: dict[str, jax.Array] = {}
        for task, x in zip(TASKS, features, strict=True):
            for key, number in _log_kappas(x, damping, rtol=rtol).items():
                logged[f"{key}_{task}"] = number
        return logged

    start = log_kappas([task.x[:MONITOR_ROWS] for task in prepared.features["train"]])
    before = {task: start[f"log_kappa_{task}"] for task in TASKS}

    features_fn = features_with_statistics(trainable)

    def monitor(params: ProbeParams) -> dict[str, float]:
        features = [
            batched(features_fn, params.backbone, task.x, count=MONITOR_ROWS) for task in arrays
        ]
        return _with_ratios(log_kappas(features), before)

    return monitor


@functools.partial(jax.jit, static_argnames="rtol")
def _log_kappas(features, damping, *, rtol: float | None) -> dict[str, jax.Array]:
    kappas = measures.kappas(measures.task_rows(features, damping=damping), rtol=rtol)
    return {
        "log_kappa": kappas.shipped.log_kappa,
        "rank": kappas.shipped.rank,
        "scale": jnp.mean(kappas.eigenvalues),
    }


def _with_ratios(
    logged: Mapping[str, jax.Array], before: Mapping[str, jax.Array]
) -> dict[str, float]:
    """What a trajectory holds: numbers, and log kappas relative to those before."""
    numbers = {key: array.item() for key, array in logged.items()}
    for task in TASKS:
        numbers[f"log_ratio_{task}"] = numbers[f"log_kappa_{task}"] - before[task].item()
    return numbers


def _trajectory_row(record: Record) -> Json:
    """Last values, without means over the steps since the record before."""
    row = {key: number for key, number in record.items() if not key.endswith("_mean")}
    return row | {f"rank_{task}": int(row[f"rank_{task}"]) for task in TASKS}


def immunise(
    config: Experiment,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    source: str = "",
    progress: Progress | None = None,
) -> list[Json]:
    """Runs every method and seed of an experiment into ``out/METHOD-sSEED/``.

    In a run of several processes (`jaximm.training.initialise`) every one calls this alike; the
    first writes the results, in a folder that all of them see.

    Args:
      config: the experiment.
      out: directory of the run directories; made if missing.
      resume: continue unfinished runs and keep finished ones, whose config must be the same.
      command: recorded in the results.
      source: the file that the configuration was read from, if any. It is recorded in
        ``config.json`` with whatever else of its code came from outside
        (`jaximm.run.config.code_of`).
      progress: see `Progress`.

    Returns:
      The results, in the order of methods and seeds.

    Raises:
      ValueError: without ``resume``, a run directory that holds something; with it, one of another
        configuration or other code; a batch that the training rows or the devices do not allow.
    """
    out = Path(out)
    runs = [(label, seed) for label in config.methods for seed in config.seeds]
    code = code_of(config, source)
    folders = [out / run_folder(label, seed) for label, seed in runs]
    first = jax.process_index() == 0  # of several processes, the one that writes
    if first:
        for folder in folders:
            check_folder(folder, config, code, resume)
    training.barrier("before the first run")
    finished = [resume and (folder / "result.json").exists() for folder in folders]
    training.barrier("all have looked at what is there")
    if all(finished):
        return [read_result(folder) for folder in folders]
    told = progress if first else None
    prepared = prepare(config, train=True, progress=told)
    results = []
    for (label, seed), folder, is_finished in zip(runs, folders, finished, strict=True):
        if is_finished:
            results.append(read_result(folder))
            continue
        own = dataclasses.replace(config, methods=(label,), seeds=(seed,))
        with held(folder) if first else contextlib.nullcontext():
            if first:
                check_folder(folder, config, code, resume)  # another process may have been here
                files.sweep(folder)
                write_json(folder / "config.json", config_json(own, code), of="config")
            results.append(_run_into(folder, prepared.alone(own), resume, command, told))
    return results


def _run_into(
    folder: Path,
    prepared: Prepared,
    resume: bool,
    command: str,
    progress: Progress | None,
) -> Json:
    config = prepared.config
    (label,), (seed,) = config.methods, config.seeds

    def tell(done, total, record):
        if progress is not None:
            progress(f"{label} s{seed}", done, total, record)

    with checkpoint.TrainCheckpoints(folder / "checkpoints") as checkpoints:
        immunised = run_method(
            prepared,
            label,
            seed=seed,
            checkpoints=checkpoints,
            resume=resume,
            log=training.MetricsLog(folder / "metrics.jsonl"),
            progress=tell,
        )
        content = result_of(prepared, immunised, command=command, progress=progress)
        if not (folder / "backbone").exists():
            save(folder / "backbone", prepared, immunised, content["conditioning"])
    if jax.process_index() == 0:
        result.write(folder / "result.json", content)
    return content


def result_of(
    prepared: Prepared,
    immunised: Immunised,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> Json:
    """Measures a method's outcome: what ``result.json`` holds.

    Args:
      prepared: the experiment, of one method and seed.
      immunised: the outcome.
      command: recorded in the result.
      progress: of the features of all rows, where they take long.
    """
    config = prepared.config
    (label,), (seed,) = config.methods, config.seeds
    started = time.perf_counter()
    sections = measure(prepared, immunised, progress=progress)
    details = describe(prepared, immunised)
    measure_seconds = time.perf_counter() - started
    content = files.plain(
        {
            "schema": result.SCHEMA_VERSION,
            "experiment": config.name,
            "method": label,
            "seed": seed,
            "config": config.to_json()
            | {
                "method_config": dataclasses.asdict(immunised.config),
                "chosen_on_held_out": is_selected(prepared, label),
            },
            "command": command,
            "versions": versions(),
            "device": device(),
            **details,
            **sections,
            "trajectory": immunised.trajectory,
            "flags": [],
            "timing": {
                "immunise_s": immunised.seconds,
                "measure_s": measure_seconds,
                "total_s": immunised.seconds + measure_seconds,
                "steps": immunised.steps,
                "s_per_step": immunised.step_seconds,
            },
        }
    )
    content["flags"] = measures.flags_of(content)
    return content
