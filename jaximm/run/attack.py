"""Attacks on finished runs: probes on features, and fine-tuning of what trains."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaximm import attacks, checkpoint, measures, models
from jaximm.immunisers import THETA
from jaximm.models import Backbone
from jaximm.records import files, result
from jaximm.run.config import Experiment, read_config
from jaximm.run.folders import load_results, run_folders
from jaximm.run.immunise import Progress
from jaximm.run.prepare import SPLITS, TASKS, Prepared, batched, prepare
from jaximm.types import Params


def attack(
    run_dir: Path,
    *,
    suite: str | None = None,
    attackers: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Attacks every finished run at or below a directory and rewrites its result.

    Probes fit both tasks' training rows by least squares without weight decay, on theta_0's
    features ("before") and on the immunised ones ("after"); attackers of weights fine-tune what
    trains on the harmful task. Each result gets rows, Krylov floors and flags; rows of the same
    attackers from an earlier call are replaced, others kept.

    Args:
      run_dir: a run directory, or one that holds several.
      suite: budgets and grids; None takes the experiment's.
      attackers: names; None takes the experiment's, or all probes.
      seeds: of the attackers' starts; 0 is w = 0.
      progress: see `Progress`.

    Raises:
      ValueError: unknown names; no runs.
      CheckpointError: a damaged backbone.
    """
    results = []
    folders = run_folders(Path(run_dir))
    load_results([run_dir])  # so that a damaged one is reported before hours of work
    undefended: dict[str, tuple[Prepared, Attacked]] = {}
    for number, folder in enumerate(folders):
        config = read_config(folder / "config.json")
        content = result.read(folder / "result.json")
        label = f"attack {content['method']} s{content['seed']}"
        if progress is not None:
            progress(label, 0, 1, {"run": number + 1, "runs": len(folders)})
        started = time.perf_counter()
        _attack_one(folder, config, content, suite, attackers, seeds, undefended)
        timing = content["timing"]
        timing["attack_s"] = time.perf_counter() - started
        timing["total_s"] = sum(
            timing[part] or 0 for part in ("immunise_s", "measure_s", "attack_s")
        )
        content = files.plain(content)
        content["flags"] = measures.flags_of(content)
        result.write(folder / "result.json", content)
        results.append(content)
        if progress is not None:
            progress(label, 1, 1, {"run": number + 1, "runs": len(folders)})
    return results


def _attack_one(folder, config, content, suite, attackers, seeds, undefended) -> None:
    """Adds attack rows and Krylov floors to a result, in place."""
    if content["data"]["harmful"]["kind"] == "constant":
        return  # nothing to fit; the flag says so
    suite = config.suite if suite is None else suite
    probes, weights = attack_names(config, attackers)
    # theta_0 is the same for every method of an experiment: attack it once a call.
    same = dataclasses.replace(config, methods=("none",), seeds=(0,), method_fields={})
    key = json.dumps([same.to_json(), suite, sorted([*probes, *weights]), list(seeds)])
    options = {"suite": suite, "probes": probes, "weights": weights, "seeds": seeds}
    if key not in undefended:
        prepared = prepare(config)
        undefended[key] = prepared, attack_backbone(prepared, None, **options)
    prepared, before = undefended[key]
    immunised = load_run(folder, prepared).backbone
    after = attack_backbone(prepared, immunised, undefended=before.rows, **options)
    names = {*probes, *weights}
    kept = [row for row in content["attacks"] if row["attacker"] not in names]
    content["attacks"] = kept + before.rows + after.rows
    if before.floors:
        others = [row for row in content["certificates"] if row["name"] != "krylov_floor"]
        content["certificates"] = others + before.floors + after.floors


def load_run(folder: Path, prepared: Prepared) -> checkpoint.Immunised:
    """The backbone of a run and its head; those of tables also as version 1 wrote them.

    Raises:
      CheckpointError: damaged.
    """
    path, template = folder / "backbone", prepared.backbone
    if prepared.config.is_table:
        tree, metadata = checkpoint.load_backbone(path)
        if set(tree) == {"backbone", "head"}:
            backbone = template.replace({THETA: jnp.asarray(tree["backbone"])})
            head = {"kernel": jnp.asarray(tree["head"])}
            return checkpoint.Immunised(backbone, head, metadata)
    return checkpoint.load_immunised(path, template=template)


def params_of(prepared: Prepared, backbone: Backbone | None) -> dict[str, Any]:
    """What trains, and a neck where there is one, of an immunised backbone; None: of theta_0."""
    params = dict(prepared.trainable.params)
    if backbone is None:
        return params
    necks = {path for path in backbone.params if models.under(path, models.NECK)}
    params = {path: backbone.params[path] for path in necks | set(params)}
    if prepared.exact:  # a run in float32 is read in float64, too
        dtype = prepared.train.primary.x.dtype
        params = {path: value.astype(dtype) for path, value in params.items()}
    return params


def attack_names(
    config: Experiment, attackers: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Probes and attackers of weights among the names; the experiment's own where there are none.

    Attackers of weights are for images; `jaximm assess` has them for tables too.

    Raises:
      ValueError: an unknown name.
    """
    of_weights = () if config.is_table else attacks.WEIGHT_REGISTRY
    if attackers is None:
        probes = attacks.REGISTRY if config.attackers is None else config.attackers
        return list(probes), list(config.weight_attackers or ())
    unknown = sorted(set(attackers) - set(attacks.REGISTRY) - set(of_weights))
    if unknown:
        raise ValueError(
            f"unknown attack {unknown[0]!r}; choose from "
            f"{sorted([*attacks.REGISTRY, *of_weights])}."
        )
    return (
        [name for name in attackers if name in attacks.REGISTRY],
        [name for name in attackers if name in of_weights],
    )


class Attacked(NamedTuple):
    """Attack rows and Krylov floors of one backbone."""

    rows: list[dict[str, Any]]
    floors: list[dict[str, Any]]


def attack_backbone(
    prepared: Prepared,
    immunised: Backbone | None,
    *,
    suite: str,
    probes: Sequence[str],
    weights: Sequence[str],
    seeds: Sequence[int] = (0,),
    undefended: Sequence[Mapping[str, Any]] = (),
) -> Attacked:
    """Probe attackers on both tasks' features; on the harmful task, fine-tuning of trained stages.

    Probes fit numbers or one-hot labels by least squares without weight decay or intercept: the
    quadratic whose Hessian is conditioned. Fine-tuning starts from a head of zeros, trains the
    stages that the experiment's pattern names and a neck where there is one, and is measured by
    cross-entropy.

    Args:
      prepared: of the experiment.
      immunised: the backbone to attack; None: theta_0.
      suite: budgets and grids of the probes.
      probes: names.
      weights: names of attackers of weights.
      seeds: of the attackers' starts and batches.
      undefended: rows of the same attackers on theta_0, which set the targets of those of weights.
    """
    side = "before" if immunised is None else "after"
    params = params_of(prepared, immunised)
    problems, unseen = {}, {}
    for task in TASKS if probes else ():
        found = _features(prepared, params, task)
        classes = prepared.classes(task)
        problems[task, side] = attacks.probe_problem(
            found["train"], getattr(prepared.train, task).y, classes=classes
        )
        unseen[task, side] = found["held_out"], getattr(prepared.held_out, task).y
    rows = []
    if probes:
        rows += attacks.run_suite(
            problems,
            attacks.suite_attacks(suite, probes),
            steps=attacks.suite_steps(suite, probes),
            seeds=seeds,
            held_out=unseen,
        )
    if weights:
        rows += _fine_tuned(prepared, params, side, weights, seeds, undefended)
    return Attacked(rows, measures.krylov_rows(problems))


def _features(prepared: Prepared, params: Params, task: str) -> dict[str, Any]:
    """Training and held-out features of a task in the default float."""
    dtype = jnp.zeros(()).dtype  # float64 where x64 is on
    return {
        split: jnp.asarray(
            batched(
                prepared.trainable.features_fn, params, getattr(prepared.activations[split], task).x
            ),
            dtype,
        )
        for split in ("train", "held_out")
    }


def _fine_tuned(prepared, params, side, names, seeds, undefended) -> list[dict[str, Any]]:
    """Rows of attackers of weights on the harmful task."""
    config = prepared.config
    train, _, held_out = (prepared.activations[split].harmful for split in SPLITS)
    classes = prepared.classes("harmful")
    problem = attacks.fine_tune_problem(
        features_fn=prepared.trainable.features_fn,
        params=params,
        head=attacks.zero_head(prepared.backbone.width, classes, jnp.float32),
        train=train,
        held_out=held_out,
    )
    batch_size = config.batch_size
    if batch_size is not None:  # as far as there are rows: some are set aside to choose settings
        batch_size = min(batch_size, problem.train.x.shape[0])
    return attacks.run_fine_tune_suite(
        {("harmful", side): problem},
        names,
        steps=config.fine_tune_steps,
        seeds=seeds,
        batch_size=batch_size,
        references=attacks.references_of(undefended),
    )
