"""The assessment: every model of a bench against every attacker, by one protocol.

Resistance, stability, trainability and generalisation (Rosati et al. 2024,
https://arxiv.org/abs/2402.16382), each with an interval and by the rule of
`jaximm.assessment.judging`; the worst case over attackers; cost to break relative to the undefended
model; certificates beside what was measured; and flags for what should not be believed. The
document is that of `jaximm.records.assessment`.

>>> import jax, jax.numpy as jnp
>>> from jaximm.types import Batch, Head
>>> key = jax.random.key(0)
>>> def rows(n, seed):  # the label is the sign of the first input
...     x = jax.random.normal(jax.random.key(seed), (n, 3))
...     return Batch(x, (x[:, 0] > 0).astype(jnp.int32))
>>> task = TaskSplits(rows(80, 1), rows(40, 2), rows(40, 3), classes=2)
>>> bench = Bench(name="signs", features_fn=lambda params, x: x @ params, harmful=task,
...               primary=task)
>>> head = Head(jnp.eye(3, 2), jnp.zeros(2))
>>> models = [Model(label="undefended", method="none", params=jnp.eye(3), benign_head=head)]
>>> level = Level(probes="quick", weight_steps=20, trial=False)
>>> found = assess(bench, models, level=level, attackers=["ridge"])
>>> found["models"][0]["break"]["attacker"]
'ridge'
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaximm
from jaximm import attacks
from jaximm.assessment import document, judging, suites, surface
from jaximm.assessment.bench import Bench, Model, TaskSplits, benign_task, check
from jaximm.assessment.cells import Store, code_of, digest
from jaximm.assessment.document import classes_of, reference_labels
from jaximm.assessment.estimates import SAID_SECONDS, about
from jaximm.assessment.level import LEVELS, Level
from jaximm.assessment.outcomes import (
    Aims,
    Outcome,
    data_identities,
    model_identity,
    repeated,
    run_outcome,
    selection_bound,
)
from jaximm.assessment.runners import Subject, execution_of
from jaximm.assessment.workers import Crew, Workers
from jaximm.attacks.grid import MAX_STEPS
from jaximm.attacks.probe.problem import Attack
from jaximm.attacks.weights.problem import WeightAttack
from jaximm.records.lease import held

__all__ = ["LEVELS", "Bench", "Level", "Model", "TaskSplits", "assess"]

Progress = Callable[[str, int, int, Mapping[str, Any]], None]
"""``progress(label, done, total, record)``. A record may say its ``unit`` (steps), and under
``says`` a line to be shown at once: how long the work will take."""

MEETS = {
    "unseen": frozenset({"plain_user", "undoes_defence"}),
    "benign": frozenset({"plain_user", "textbook"}),
}
"""Traits of which an attacker needs one to meet a task, by the beginning of the task's name.

Every attacker meets the harmful task. Ordinary ways to use a released model learn benign tasks, for
trainability, as does textbook descent, whose steps on the primary task are what conditioning should
not raise; ordinary ways and those that take a defence back meet harmful tasks that no defence has
seen.
"""


def assess(
    bench: Bench,
    models: Sequence[Model],
    *,
    level: str | Level = "standard",
    attackers: Sequence[str] | None = None,
    out: Path | None = None,
    retry_failed: bool = False,
    command: str = "",
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Attacks every model of a bench and says what held.

    Args:
      bench: the tasks.
      models: one with the method "none" is the undefended one, against which costs and changes are
        taken; without one, every model is its own reference, and a flag says so. One with the
        method "never_learned", trained as that was but without the harmful task, is what harm is
        compared with; without one, training from scratch is, if the attackers hold it.
      level: a key of `LEVELS`, budgets of one's own, or the name of one of
        `jaximm.assessment.suites`, which brings its attackers and asks for its rows.
      attackers: labels of probes and of attackers of weights (`jaximm.attacks.make_attack`); all
        that are registered if None, of a language model all of weights.
      out: folder of the cells, for resuming; nothing is kept if None.
      retry_failed: compute cells again that failed in an earlier call; otherwise they stay failed.
      command: recorded in the document.
      progress: see `Progress`.
      workers: who computes the batches of cells; None: this process. The document and the cells
        are the same.

    Returns:
      A valid document of `jaximm.records.assessment`.

    Raises:
      ValueError: an unknown level or attacker, models that do not fit the bench, or a folder in
        which another process assesses.
    """
    models = list(models)
    check(bench, models)
    cells = None if out is None else Path(out) / "cells"
    with contextlib.nullcontext() if cells is None else held(cells):
        store = Store(cells, retry_failed=retry_failed, asks=workers is not None)
        with contextlib.closing(Crew(workers, store)) as crew:
            return _assess(bench, models, level, attackers, store, crew, command, progress)


def _assess(
    bench: Bench,
    models: Sequence[Model],
    level: str | Level,
    attackers: Sequence[str] | None,
    store: Store,
    crew: Crew,
    command: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """`assess`, with a store and a crew of its own."""
    name, effort, attackers = _level(level, attackers, bench)
    chosen = suites.chosen(effort, attackers)
    data = data_identities(bench)
    codes = {attacker: code_of(attack) for attacker, (attack, _) in chosen.items()}
    execution = store.plan(
        {"data": data["harmful"], "level": name, "devices": jax.device_count()},
        lambda: execution_of(bench, models[0], effort),
    )
    allowed = {task: _allowed(task, chosen) for task in bench.tasks()}
    identities = {model.label: model_identity(bench, model) for model in models}
    bounds = {
        model.label: selection_bound(bench, model, effort.utility_fraction) for model in models
    }
    # Before any attack, and of the harmful task: what an attack shows depends on it.
    surfaces = {
        model.label: _surface(
            Subject(bench, model, "harmful"),
            store,
            identities[model.label] | {"data": data["harmful"]},
        )
        for model in models
    }
    jobs = {
        (model.label, task, name): _updates(*chosen[name], effort)
        for model in models
        for task, names in allowed.items()
        for name in names
    }
    told = _Told(bench.name, jobs, progress)
    twins = {} if bench.harmful.is_tokens else repeated(chosen)

    def first_of(model: Model, task: str, attacker: str) -> str:
        """The attacker that is run for one: another that would do the same."""
        other = twins.get(attacker, attacker)
        has_head = task == "harmful" and model.harmful_head is not None
        return attacker if has_head or other not in allowed[task] else other

    def attacked(
        wanted: Sequence[Model],
        task: str,
        basis: judging.Basis | None = None,
        aims: Aims | None = None,
    ) -> dict[str, dict[str, Outcome]]:
        """Outcomes of models on a task by attacker; with a basis, by as many steps as it asks."""

        @functools.lru_cache(maxsize=1)
        def subject_of(label: str) -> Subject:
            return Subject(
                bench, next(candidate for candidate in wanted if candidate.label == label), task
            )

        def outcome_of(model: Model, attacker: str) -> Outcome:
            attack, budget = chosen[attacker]
            run = functools.partial(
                run_outcome,
                subject_of(model.label),
                attacker,
                attack,
                level=effort,
                execution=execution,
                store=store,
                identity=identities[model.label] | {"data": data[task], "code": codes[attacker]},
                bound=bounds[model.label],
                aims=aims,
            )
            job = (model.label, task, attacker)
            told.begin()
            computed, started = store.computed, time.perf_counter()
            outcome = run(steps=budget)
            told.took(job, time.perf_counter() - started if store.computed > computed else 0.0)
            more = 0
            if basis is not None and not _is_solve(attack):
                more = judging.missing_steps(outcome, basis, effort.patience)
            outcome = run(steps=min(more, MAX_STEPS)) if more else outcome
            told.done(job)
            return outcome

        run = {
            (model.label, attacker): functools.partial(outcome_of, model, attacker)
            for model in wanted
            for attacker in chosen
            if attacker in allowed[task] and first_of(model, task, attacker) == attacker
        }
        by_pair = dict(zip(run, crew.all(list(run.values())), strict=True))
        outcomes: dict[str, dict[str, Outcome]] = {model.label: {} for model in wanted}
        for model in wanted:
            for attacker in (name for name in chosen if name in allowed[task]):
                first = first_of(model, task, attacker)
                outcome = by_pair[model.label, first]
                if first != attacker:
                    told.took((model.label, task, attacker), 0.0)
                    told.done((model.label, task, attacker))
                    outcome = outcome._replace(attacker=attacker, same_as=first)
                outcomes[model.label][attacker] = outcome
        return outcomes

    outcomes: dict[tuple[str, str], dict[str, Outcome]] = {}
    bare, learned = reference_labels(models)
    for task in bench.tasks():
        basis, aims, left = None, None, models
        if not benign_task(task):
            ends = [model for model in models if model.label in (bare, learned)]
            first = attacked(ends, task)
            basis, aims = _against(bench, task, chosen, first, bare, learned, effort)
            if bare is not None:  # what it costs there says what others are to have
                undefended = [model for model in models if model.label == bare]
                first |= attacked(undefended, task, None, aims)
                outcomes[bare, task] = first[bare]
                basis, _ = _against(bench, task, chosen, first, bare, learned, effort)
                left = [model for model in models if model.label != bare]
        for label, by_attacker in attacked(left, task, basis, aims).items():
            outcomes[label, task] = by_attacker
    return document.assemble(
        bench,
        models,
        [
            outcome
            for model in models
            for task in bench.tasks()
            for outcome in outcomes[model.label, task].values()
        ],
        level=effort,
        chosen=chosen,
        header={
            "name": bench.name,
            "level": name,
            "command": command,
            "code": digest(codes),
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "jaximm": jaximm.__version__,
                "numpy": np.__version__,
            },
            "device": {
                "platform": jax.devices()[0].platform,
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "xla_flags": os.environ.get("XLA_FLAGS", ""),  # the last digits depend on them
            },
        },
        hashes={label: identity["model"] for label, identity in identities.items()},
        execution=execution,
        surfaces=surfaces,
    )


def _surface(subject: Subject, store: Store, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The surface of a model; None where it could not be measured, which a flag says."""
    address = {**identity, "surface": digest(Path(surface.__file__).read_text(encoding="utf-8"))}
    batch = store.get(address, [({}, 0)], lambda: surface.measure(subject))
    return batch["found"]


def _updates(attack: Attack | WeightAttack, steps: int, level: Level) -> int:
    """Updates of an attacker of weights on a task of a model; of a probe, which is cheap, none."""
    if isinstance(attack, Attack):
        return 0
    cells = max(1, len(tuple(attack.grid)))
    return steps * (cells * len(level.select_seeds) + len(level.report_seeds))


Job = tuple[str, str, str]
"""Label of a model, task, attacker."""


class _Told:
    """Tells how many attacks are done, each counted once, and early how long the rest will take.

    Args:
      name: of the bench.
      jobs: updates of each attack.
      progress: who is told.
    """

    def __init__(self, name: str, jobs: Mapping[Job, int], progress: Progress | None):
        self._label, self._total, self._progress = f"assess {name}", len(jobs), progress
        self._left = {job: updates for job, updates in jobs.items() if updates}
        self._is_foretold = False
        self._done: set[Job] = set()

    def took(self, job: Job, seconds: float) -> None:
        """After an attack; 0 seconds if it was kept from before, or computed by others."""
        updates = self._left.pop(job, 0)
        if self._progress is None or self._is_foretold or not (updates and seconds):
            return
        self._is_foretold = True  # by the first of the weights, compilation and measuring included
        left = sum(self._left.values()) * seconds / updates
        if left >= SAID_SECONDS:
            says = f"{about(left)} for {len(self._left)} more attacks on weights, as {job[2]} took"
            record = {"unit": "attacks", "says": f"{says} {seconds:.0f} s"}
            self._progress(self._label, len(self._done), self._total, record)

    def begin(self) -> None:
        if not self._done:
            self._tell(0)

    def done(self, job: Job) -> None:
        if job not in self._done:
            self._done.add(job)
            self._tell(len(self._done))

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(self._label, done, self._total, {"unit": "attacks"})


def _against(
    bench: Bench,
    task: str,
    chosen: Mapping[str, tuple[Attack | WeightAttack, int]],
    first: Mapping[str, Mapping[str, Outcome]],
    bare: str | None,
    learned: str | None,
    level: Level,
) -> tuple[judging.Basis, Aims | None]:
    """What a harmful task is judged against, and the levels whose cost is asked for."""
    rows = bench.tasks()[task]
    done = {
        label: {name: outcome for name, outcome in outcomes.items() if outcome.status == "done"}
        for label, outcomes in first.items()
    }
    ends = done.get(bare or "", {}), done.get(learned or "", {})
    basis = judging.basis_of(
        rows.chance,
        classes_of(chosen),
        *ends,
        bare_label=bare,
        learned_label=learned,
        break_fraction=level.break_fraction,
    )
    sizes = [part.x.shape[0] for part in (rows.held_out, rows.selection)]
    aims = judging.aims_of(
        basis,
        *ends,
        selection_chance=rows.objective.chance(rows.selection.y),
        shrink=(sizes[0] / sizes[1]) ** 0.5,
    )
    return basis, aims


def _is_solve(attack: Attack | WeightAttack) -> bool:
    """Whether an attacker is done after one step, so that more are no more effort."""
    return isinstance(attack, Attack) and "solves" in attack.traits


def _level(
    level: str | Level, attackers: Sequence[str] | None, bench: Bench
) -> tuple[str, Level, Sequence[str]]:
    """The name of what is asked for, the budgets and the attackers; a suite brings both."""
    if isinstance(level, str) and level in suites.names():
        suite = suites.load(level)
        if attackers is not None:
            raise ValueError(f"{level} names its attackers; leave yours out, or give a level.")
        suites.check(suite, bench)
        return level, suite.level, list(suite.attackers)
    if isinstance(level, str) and (table := suites.table(level)) is not None:
        if attackers is not None:
            raise ValueError(f"{level} names its attackers; leave yours out, or give a level.")
        return level, *table
    if attackers is None:
        of_heads = [] if bench.harmful.is_tokens else attacks.REGISTRY  # of one vector a row
        attackers = [*of_heads, *attacks.WEIGHT_REGISTRY]
    if isinstance(level, Level):
        return "custom", level, attackers
    if level not in LEVELS:
        raise ValueError(
            f"unknown level {level!r}; choose from {sorted(LEVELS)}, or a suite: {suites.names()}."
        )
    return level, LEVELS[level], attackers


def _allowed(task: str, chosen: Mapping[str, tuple[Attack | WeightAttack, int]]) -> set[str]:
    """Attackers that a task meets: all on the harmful one, a part of them on the others."""
    wanted = MEETS.get(task.partition(":")[0])
    if wanted is None:
        return set(chosen)
    return {name for name, (attack, _) in chosen.items() if attack.traits & wanted} or set(chosen)
