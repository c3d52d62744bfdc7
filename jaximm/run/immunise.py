"""An experiment from its configuration to its results: data, immunise, measure, attack, record.

A run directory holds ``config.json``, ``metrics.jsonl``, ``checkpoints/`` (training state),
``backbone/`` (the immunised backbone) and ``result.json``; one for each method and seed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaximm import attacks, checkpoint, data, immunisers, measures, training
from jaximm.data import TaskPair
from jaximm.immunisers import ProbeParams
from jaximm.immunisers.conditioning.row_space import (
    at_primary_scale,
    from_row_space,
    row_space_basis,
    to_row_space,
)
from jaximm.records import files, result
from jaximm.run import deep as run_deep
from jaximm.run.choose import is_selected, select_limit
from jaximm.run.config import (
    DeepConfig,
    ExperimentConfig,
    code_of,
    config_json,
    method_config,
    parse_label,
    read_config,
)
from jaximm.run.folders import (
    check_folder,
    device,
    load_results,
    run_folder,
    run_folders,
    versions,
    write_json,
)
from jaximm.types import Batch, PairedBatch

Progress = Callable[[str, int, int, Mapping[str, Any]], None]
"""``progress(label, done, total, record)``, called as a run advances."""


class Prepared(NamedTuple):
    """A task pair as arrays, with held-out rows halved: one half selects, the other is reported.

    ``damping_*`` are the absolute lam of the measure; ``log_kappa_*`` the raw damped ones.
    """

    pair: TaskPair
    train: PairedBatch
    selection: PairedBatch
    held_out: PairedBatch
    damping_primary: Float[Array, ""]
    damping_harmful: Float[Array, ""]


def prepare(pair: TaskPair, *, damping: float) -> Prepared:
    """Arrays of a pair. Even held-out rows are the selection rows, odd ones the reported ones.

    Raises:
      ValueError: fewer than two held-out rows in a task, or more than one target a row.
    """
    train = data.paired_arrays(pair)
    rest = data.paired_arrays(pair, split="held_out")
    for task, batch in zip(("primary", "harmful"), rest, strict=True):
        if batch.y.ndim != 1:
            raise ValueError(
                f"the {task} task must have one target a row, got targets of shape {batch.y.shape}."
            )
        if batch.x.shape[0] < 2:
            raise ValueError(
                f"the {task} task needs at least 2 held-out rows (one half selects, the other is "
                f"reported), got {batch.x.shape[0]}."
            )
    selection, held_out = (
        PairedBatch(*(Batch(batch.x[start::2], batch.y[start::2]) for batch in rest))
        for start in (0, 1)
    )
    return Prepared(
        pair,
        train,
        selection,
        held_out,
        immunisers.relative_damping(train.primary.x, damping),
        immunisers.relative_damping(train.harmful.x, damping),
    )


class Immunised(NamedTuple):
    """A method's outcome on a prepared pair."""

    params: ProbeParams  # on the raw inputs, scaled to tr H_P = tr K_P
    config: Any
    trajectory: list[dict[str, Any]]
    seconds: float
    steps: int


def run_method(
    prepared: Prepared,
    label: str,
    *,
    seed: int = 0,
    init: str = "identity",
    method_fields: Mapping[str, Mapping[str, Any]] | None = None,
    log_points: int = 50,
    checkpoints: checkpoint.TrainCheckpoints | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    log: training.MetricsLog | None = None,
    progress: Callable[[int, int, Mapping[str, Any]], None] | None = None,
) -> Immunised:
    """Runs one method on a prepared pair: the same function for every method and both starts."""
    name, _ = parse_label(label)
    config = method_config(label, method_fields or {})
    started = time.perf_counter()
    if is_selected(label, method_fields or {}):
        config = dataclasses.replace(
            select_limit(prepared)[0], steps=config.steps, batch_size=config.batch_size
        )
    # The closed form measures its damping by tr(K) / d of all coordinates, and gains nothing here.
    reducible = config.steps > 1 and name != "limit"
    basis = row_space_basis(prepared.train) if reducible else None
    arrays = prepared.train if basis is None else to_row_space(prepared.train, basis)
    width, dtype = arrays.primary.x.shape[1], arrays.primary.x.dtype
    problem = immunisers.linear_problem(
        arrays,
        damping_primary=prepared.damping_primary,
        damping_harmful=prepared.damping_harmful,
    )
    factors = problem.whole_data("run_method")
    raw = measures.log_kappas(*factors, jnp.eye(width, dtype=dtype))

    def measure(params: ProbeParams) -> dict[str, float]:
        found = measures.log_kappas(*factors, params.backbone)
        found = {key: value.item() for key, value in found.items()}
        for task in ("primary", "harmful"):
            key = f"log_kappa_{task}"
            found[f"log_ratio_{task}"] = found[key] - raw[key].item()
        return found

    # Not the keys that training draws from.
    key = None if init == "identity" else jax.random.fold_in(jax.random.key(seed), 2**31)
    fitted = training.fit(
        immunisers.make_immuniser(name, config, problem),
        immunisers.init_params(width, key, dtype=dtype),
        jax.tree_util.Partial(_batch_fn(config.batch_size), arrays, jnp.uint32(seed)),
        seed=seed,
        steps=config.steps,
        log_every=max(1, config.steps // log_points),
        measure_fn=measure,
        checkpoints=checkpoints,
        checkpoint_every=checkpoint_every,
        resume=resume,
        log=log,
        progress=None
        if progress is None
        else lambda done, record: progress(done, config.steps, record),
    )
    params = fitted.params if basis is None else from_row_space(fitted.params, basis)
    seconds = time.perf_counter() - started
    return Immunised(
        at_primary_scale(params, prepared.train.primary.x),
        config,
        [_trajectory_row(row) for row in fitted.trajectory],
        max(seconds, fitted.seconds),
        fitted.steps_done,
    )


@functools.lru_cache(maxsize=16)
def _batch_fn(batch_size: int | None):
    """One function object a batch size, so that data sets of one shape share a compilation."""

    def batch(arrays: PairedBatch, seed, step, part=None) -> PairedBatch:
        return data.paired_batch(arrays, seed, step, batch_size=batch_size, part=part)

    return batch


def _trajectory_row(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if not key.endswith("_mean")}
    for key in ("rank_primary", "rank_harmful"):
        kept[key] = int(kept[key])
    return kept


def measure(prepared: Prepared, immunised: Immunised) -> dict[str, Any]:
    """The sections conditioning, spectra, utility, harmful_utility of a result."""
    theta = immunised.params.backbone
    found = {
        split: measures.conditioning(
            measures.TaskRows(rows.primary.x, prepared.damping_primary),
            measures.TaskRows(rows.harmful.x, prepared.damping_harmful),
            theta,
        )
        for split, rows in (("train", prepared.train), ("held_out", prepared.held_out))
    }
    qualities = {
        task: measures.utility(
            measures.Rows(
                getattr(prepared.train, task),
                getattr(prepared.selection, task),
                getattr(prepared.held_out, task),
            ),
            theta,
            kind=getattr(prepared.pair, task).kind,
        )
        for task in ("primary", "harmful")
    }
    return {
        "conditioning": {
            footing: {split: found[split].rows[footing] for split in found}
            for footing in measures.DEFINITIONS
        },
        "spectra": found["train"].spectra,
        "utility": qualities["primary"],
        "harmful_utility": qualities["harmful"],
    }


def immunise(
    config: ExperimentConfig | DeepConfig,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    source: str = "",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
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
    prepared = _prepared(config, train=not all(finished))
    results = []
    for (label, seed), folder, is_finished in zip(runs, folders, finished, strict=True):
        if is_finished:
            results.append(result.read(folder / "result.json"))
            continue
        one = dataclasses.replace(config, methods=(label,), seeds=(seed,))
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", config_json(one, code))
        results.append(_run_into(folder, one, prepared, resume, command, progress))
    return results


def _prepared(
    config: ExperimentConfig | DeepConfig, *, train: bool
) -> Prepared | run_deep.DeepPrepared:
    if isinstance(config, DeepConfig):
        return run_deep.prepare(config, train=train)
    found = prepare(data.load(config.data, **config.data_fields), damping=config.damping)
    if train:
        for label in config.methods:
            method = method_config(label, config.method_fields)
            data.check_batches(found.train, method.batch_size, label=label)
    return found


def _run_into(folder, config, prepared, resume, command, progress) -> dict[str, Any]:
    (label,), (seed,) = config.methods, config.seeds

    def tell(done, total, record):
        if progress is not None:
            progress(f"{label} s{seed}", done, total, record)

    outcome_of = _deep_outcome if isinstance(config, DeepConfig) else _linear_outcome
    with checkpoint.TrainCheckpoints(folder / "checkpoints") as checkpoints:
        outcome = outcome_of(
            prepared,
            config,
            folder / "backbone",
            label=label,
            seed=seed,
            checkpoints=checkpoints,
            resume=resume,
            log=training.MetricsLog(folder / "metrics.jsonl"),
            progress=tell,
        )
    immunised, sections = outcome.immunised, outcome.sections
    found = {
        "schema": result.SCHEMA_VERSION,
        "experiment": config.name,
        "method": label,
        "seed": seed,
        "config": config.to_json()
        | {
            "method_config": dataclasses.asdict(immunised.config),
            "chosen_on_held_out": outcome.chosen_on_held_out,
        },
        "command": command,
        "versions": versions(),
        "device": device(),
        **outcome.details,
        **sections,
        "trajectory": immunised.trajectory,
        "attacks": [],
        "certificates": _certificates(sections),
        "flags": [],
        "timing": {
            "immunise_s": immunised.seconds,
            "measure_s": outcome.measure_seconds,
            "attack_s": None,
            "total_s": immunised.seconds + outcome.measure_seconds,
            "steps": immunised.steps,
            "s_per_step": immunised.seconds / max(immunised.steps, 1),
        },
    }
    found = files.plain(found)
    found["flags"] = measures.flags_of(found)
    if jax.process_index() == 0:
        result.write(folder / "result.json", found)
    return found


class _Outcome(NamedTuple):
    """A method's run, measured and saved."""

    immunised: Immunised | run_deep.DeepImmunised
    sections: dict[str, Any]  # conditioning, spectra, utility, ...
    details: dict[str, Any]  # init, dtype, data, ...
    chosen_on_held_out: bool
    measure_seconds: float


def _linear_outcome(prepared, config, path, *, label, **arguments) -> _Outcome:
    immunised = run_method(
        prepared,
        label,
        init=config.init,
        method_fields=config.method_fields,
        log_points=config.log_points,
        checkpoint_every=config.checkpoint_every,
        **arguments,
    )
    started = time.perf_counter()
    sections = measure(prepared, immunised)
    details = _save_and_describe(path, config, prepared, immunised, sections)
    chosen = is_selected(label, config.method_fields)
    return _Outcome(immunised, sections, details, chosen, time.perf_counter() - started)


def _deep_outcome(prepared, config, path, *, label, **arguments) -> _Outcome:
    immunised = run_deep.run_method(prepared, label, config, **arguments)
    started = time.perf_counter()
    sections = run_deep.measure(prepared, immunised, config)
    details = run_deep.save_and_describe(path, prepared, immunised, sections)
    return _Outcome(immunised, sections, details, False, time.perf_counter() - started)


def _save_and_describe(path, config, prepared, immunised, sections) -> dict[str, Any]:
    """Writes the backbone, unless a resumed run finds it there; what a result says of both."""
    if not path.exists():
        (label,), (seed,) = config.methods, config.seeds
        checkpoint.save_backbone(
            path,
            immunised.params._asdict(),
            {
                "model": "linear",
                "method": label,
                "seed": seed,
                "config": config.to_json(),
                "conditioning": sections["conditioning"]["damped"],
            },
        )
    return {
        "init": config.init,
        "dtype": str(immunised.params.backbone.dtype),
        "data": describe_data(prepared),
    }


def _certificates(sections: Mapping[str, Any]) -> list[dict[str, Any]]:
    limit = sections["conditioning"]["damped"]["train"]["log_rir_limit"]
    return [] if limit is None else [measures.limit_certificate(limit)]


def attack(
    run_dir: Path,
    *,
    suite: str | None = None,
    attackers: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Attacks every finished run at or below a directory and rewrites its result.

    Attackers fit both tasks' training rows by least squares without weight decay, on raw features
    ("before") and on the immunised ones ("after"). Each result gets rows, Krylov floors and flags;
    rows of the same attackers from an earlier call are replaced, others kept.

    Args:
      run_dir: a run directory, or one that holds several.
      suite: budgets and grids; None takes the experiment's.
      attackers: names; None takes the experiment's, or all.
      seeds: of the attackers' starts; 0 is w = 0.
      progress: see `Progress`.

    Raises:
      ValueError: unknown names; no runs.
      CheckpointError: a damaged backbone.
    """
    results = []
    folders = run_folders(Path(run_dir))
    load_results([run_dir])  # so that a damaged one is reported before hours of work
    raw_rows: dict[str, Any] = {}
    for number, folder in enumerate(folders):
        config = read_config(folder / "config.json")
        found = result.read(folder / "result.json")
        label = f"attack {found['method']} s{found['seed']}"
        if progress is not None:
            progress(label, 0, 1, {"run": number + 1, "runs": len(folders)})
        started = time.perf_counter()
        _attack_one(folder, config, found, suite, attackers, seeds, raw_rows)
        timing = found["timing"]
        timing["attack_s"] = time.perf_counter() - started
        timing["total_s"] = sum(
            timing[part] or 0 for part in ("immunise_s", "measure_s", "attack_s")
        )
        found = files.plain(found)
        found["flags"] = measures.flags_of(found)
        result.write(folder / "result.json", found)
        results.append(found)
        if progress is not None:
            progress(label, 1, 1, {"run": number + 1, "runs": len(folders)})
    return results


def _attack_one(folder, config, found, suite, attackers, seeds, raw_rows) -> None:
    """Adds attack rows and Krylov floors to a result, in place."""
    suite = config.suite if suite is None else suite
    if isinstance(config, DeepConfig):
        names, (before, after) = _attack_deep(folder, config, suite, attackers, seeds, raw_rows)
    elif found["data"]["harmful"]["kind"] == "constant":
        return  # nothing to fit; the flag says so
    else:
        names, (before, after) = _attack_linear(folder, config, suite, attackers, seeds, raw_rows)
    kept = [row for row in found["attacks"] if row["attacker"] not in names]
    found["attacks"] = kept + before.rows + after.rows
    if before.floors:
        others = [row for row in found["certificates"] if row["name"] != "krylov_floor"]
        found["certificates"] = others + before.floors + after.floors


def _attack_deep(folder, config, suite, attackers, seeds, cache):
    """Names of the attackers, and what they did to theta_0 and to the immunised backbone."""
    names = [name for group in run_deep.attack_names(config, attackers) for name in group]
    # theta_0 is the same for every method of an experiment: attack it once a call.
    same = dataclasses.replace(config, methods=("none",), seeds=(0,))
    key = json.dumps([same.to_json(), suite, sorted(names), list(seeds)])
    options = {"suite": suite, "attackers": names, "seeds": seeds}
    if key not in cache:
        prepared = run_deep.prepare(config)
        cache[key] = prepared, run_deep.attack(prepared, None, config, **options)
    prepared, before = cache[key]
    loaded = checkpoint.load_immunised(folder / "backbone", template=prepared.backbone)
    after = run_deep.attack(prepared, loaded.backbone, config, undefended=before.rows, **options)
    return names, (before, after)


def _attack_linear(folder, config, suite, attackers, seeds, cache):
    """The same for a linear backbone."""
    names = config.attackers if attackers is None else attackers
    chosen = attacks.suite_attacks(suite, names)
    params, _ = checkpoint.load_backbone(folder / "backbone")
    prepared = prepare(data.load(config.data, **config.data_fields), damping=config.damping)
    theta = jnp.asarray(params["backbone"], prepared.train.primary.x.dtype)
    key = json.dumps([config.data, files.plain(config.data_fields), suite, sorted(chosen)])
    if key not in cache:
        cache[key] = _attack_backbone(prepared, None, chosen, suite, names, seeds)
    return chosen, (cache[key], _attack_backbone(prepared, theta, chosen, suite, names, seeds))


def _attack_backbone(prepared, theta, chosen, suite, names, seeds):
    backbone = "before" if theta is None else "after"
    problems, held_out = {}, {}
    for task in ("primary", "harmful"):
        train, rest = getattr(prepared.train, task), getattr(prepared.held_out, task)
        features, unseen = (train.x, rest.x) if theta is None else (train.x @ theta, rest.x @ theta)
        problems[task, backbone] = attacks.probe_problem(features, train.y)
        held_out[task, backbone] = (unseen, rest.y)
    rows = attacks.run_suite(
        problems,
        chosen,
        steps=attacks.suite_steps(suite, names),
        seeds=seeds,
        held_out=held_out,
    )
    return run_deep.Attacked(rows, measures.krylov_rows(problems))


def describe_data(prepared: Prepared) -> dict[str, Any]:
    """The data section of a result."""
    pair = prepared.pair
    section: dict[str, Any] = {
        "name": pair.name,
        "description": pair.description,
        "source": pair.source,
        "inputs_shared": data.inputs_shared(pair).shared,
    }
    for task in ("primary", "harmful"):
        one = getattr(pair, task)
        section[task] = {
            "name": one.name,
            "kind": one.kind,
            "n_train": len(one.train.x),
            "n_selection": getattr(prepared.selection, task).x.shape[0],
            "n_held_out": getattr(prepared.held_out, task).x.shape[0],
            "d": one.train.x.shape[1],
        }
    return section
