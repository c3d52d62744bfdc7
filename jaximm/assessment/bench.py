"""What an assessment takes: models, tasks, and a level of effort.

Anything with ``features_fn(params, inputs) -> [n, d]`` can be assessed: a linear map, the trained
blocks of a backbone on activations, a model of the user's own. Targets are integer labels or real
numbers; what is measured is then accuracy or R^2. So can a language model, whose `features_fn`
gives the outputs themselves (`jaximm.objectives.Unembedded`) and whose targets are tokens
(`jaximm.objectives.TokenRows`): one model does all tasks without heads, attackers are those of
weights, and what is measured is the share of right tokens, a row being one example.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaximm import objectives
from jaximm.attacks.grid import Attacker
from jaximm.attacks.weights.problem import check_head
from jaximm.data.rows import FileRows, all_finite
from jaximm.types import Batch, Head


class Limits(NamedTuple):
    """Between which numbers a reading is that of a sound model."""

    least: float = -math.inf
    most: float = math.inf


class TaskSplits(NamedTuple):
    """Rows of one task: to train on, to choose hyper-parameters on, to report.

    `x` [n, ...] as `features_fn` takes it, `y` [n] integer labels, real targets, or `TokenRows`.
    `classes` is None for the latter two.

    `few`: where features are linear in x, few rows with the moments of the many of `train`
    (`jaximm.data.rows.condensed`), y [m] or for labels [m, k]: a least-squares probe is that of the
    many. None: there are none.
    """

    train: Batch
    selection: Batch
    held_out: Batch
    classes: int | None = None
    few: Batch | None = None

    @property
    def objective(self) -> objectives.Objective:
        """What the targets are."""
        return objectives.of_targets(self.train.y)

    @property
    def is_tokens(self) -> bool:
        """Whether rows are texts, which no head reads off one vector a row."""
        return isinstance(self.train.y, objectives.TokenRows)

    @property
    def metric(self) -> str:
        """ "accuracy" or "r2"."""
        return self.objective.metric

    @property
    def chance(self) -> float:
        """Quality of the best constant answer on held-out rows: its class's share, or 0."""
        return self.objective.chance(self.held_out.y)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """One model to attack.

    Attributes:
      label: its name in the report.
      method: what made it; "none" is the undefended model, "never_learned" one of the same
        architecture that was trained without the harmful task.
      seed: of the method.
      params: what `Bench.features_fn` takes; of one structure, and nothing compiles twice.
      benign_head: the head that does the primary task; () where the targets are tokens.
      harmful_head: a head for the harmful task that comes with the model; None: the attacker starts
        from zeros.
      public: parameters of a public model that the attacker has too, or None.
      conditioning: what is known of its condition numbers, for the report.
      features_fn: of a model whose frozen part is not that of the bench; None: the bench's.
      entry_fn: of such a model, `Bench.entry_fn`.
      frozen: arrays that such a function holds, for the hash of the model.
      readings_fn: of such a model, `Bench.readings_fn`.
      chosen_on_held_out: whether the method's settings were chosen on rows that are reported.
    """

    label: str
    method: str
    seed: int = 0
    params: Any
    benign_head: Any
    harmful_head: Head | None = None
    public: Any = None
    conditioning: Mapping[str, Any] | None = None
    features_fn: Callable[[Any, Any], Any] | None = None
    entry_fn: Callable[[jax.Array], jax.Array] | None = None
    frozen: Any = ()
    readings_fn: Callable[..., Any] | None = None
    chosen_on_held_out: bool = False


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """Tasks on which models are compared.

    Attributes:
      name: of the experiment.
      description: one line.
      source: of the data.
      features_fn: ``features_fn(params, x) -> [n, d]``; one object for all runs of one shape.
      entry_fn: what enters the part of the model that attackers may change, from inputs: the frozen
        front, if `features_fn` begins with one. None: the inputs themselves.
      harmful: what should be hard.
      primary: what the model must go on doing.
      benign: tasks that should stay easy to learn, by name; the primary task from a fresh head is
        always one.
      unseen: harmful tasks that no defence has seen, by name.
      refresh_fn: see `jaximm.attacks.FineTuneProblem`.
      convolutions: whether `features_fn` has any: loops over steps then stay on the host on a CPU.
      inputs_shared: whether both tasks have the same inputs.
      posed: further fields of `jaximm.attacks.FineTuneProblem` that say what the model is: stacked,
        takes_adapters, scale_path, row_flops, canonical_fn.
      readings_fn: ``readings_fn(params) -> {name: number}``, what is followed of an attacked model
        beside harm and utility, by names of `jaximm.records.assessment.READINGS`; see
        `jaximm.attacks.FineTuneProblem`. None: nothing.
      limits: of each reading, between what it is that of a model that still does its work.
      documents: whose each held-out row of the primary task is, where rows of one document are not
        independent; None: each its own.
    """

    name: str
    description: str = ""
    source: str = ""
    features_fn: Callable[[Any, Any], Any]
    entry_fn: Callable[[jax.Array], jax.Array] | None = None
    harmful: TaskSplits
    primary: TaskSplits
    benign: Mapping[str, TaskSplits] = dataclasses.field(default_factory=dict)
    unseen: Mapping[str, TaskSplits] = dataclasses.field(default_factory=dict)
    refresh_fn: Callable[[Any, jax.Array], Any] | None = None
    convolutions: bool = False
    inputs_shared: bool = False
    posed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    readings_fn: Callable[..., Any] | None = None
    limits: Mapping[str, Limits] = dataclasses.field(default_factory=dict)
    documents: np.ndarray | None = None

    def tasks(self) -> dict[str, TaskSplits]:
        """Every task that attackers learn, by the name that rows carry."""
        return (
            {"harmful": self.harmful}
            | {f"unseen:{name}": rows for name, rows in self.unseen.items()}
            | {"benign:primary": self.primary}
            | {f"benign:{name}": rows for name, rows in self.benign.items()}
        )


def of_first_rows(bench: Bench, most: int) -> Bench:
    """A bench whose harmful and primary training rows are the first few, for what looks at some."""

    def first(rows: TaskSplits) -> TaskSplits:
        return rows._replace(train=jax.tree.map(lambda leaf: leaf[:most], rows.train), few=None)

    return dataclasses.replace(bench, harmful=first(bench.harmful), primary=first(bench.primary))


def taken(batch: Batch, rows: np.ndarray) -> Batch:
    """Some rows; of files these are read, and no others."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, FileRows):
            return np.concatenate([np.asarray(leaf[row : row + 1]) for row in rows.tolist()])
        return np.asarray(leaf)[rows]

    return Batch(*(jax.tree.map(one, part) for part in batch))


def budgeted(bench: Bench, chosen: Sequence[Attacker]) -> Bench:
    """A bench with the harmful rows alone that any of some attackers has: those of the largest
    data budget; as it is if one has none."""
    limits = [
        math.inf if attacker.harmful_rows is None else attacker.harmful_rows for attacker in chosen
    ]
    if math.inf in limits or not limits:
        return bench
    most = chosen[limits.index(max(limits))]

    def few(task: TaskSplits) -> TaskSplits:
        rows = most.rows_of(task.train.x.shape[0])
        return task if rows is None else task._replace(train=taken(task.train, rows), few=None)

    unseen = {name: few(task) for name, task in bench.unseen.items()}
    return dataclasses.replace(bench, harmful=few(bench.harmful), unseen=unseen)


def benign_task(task: str) -> bool:
    """Whether learning a task is no harm, so that there is no utility to keep meanwhile."""
    return task.startswith("benign")


def of_few_harmful_rows(bench: Bench, count: int) -> Bench:
    """A bench on which attackers have only so many labelled rows of the harmful task to train on.

    Which ones depends on the bench alone, and those of a smaller count are among those of a larger
    one. Of classes, each is there about equally often. Harmful tasks that no defence has seen are
    cut in the same way. Selection rows stay, so hyper-parameters are chosen better than so few rows
    allow: an attacker here is one who knows from elsewhere how to tune. The name says the count,
    and a suite, which fixes its rows, refuses such a bench.

    Raises:
      ValueError: fewer than 2 rows, or than there are classes; or not fewer than there are.
    """

    there = bench.harmful.train.x.shape[0]
    least = max(2, bench.harmful.classes or 0)
    if not least <= count < there:
        raise ValueError(
            f"harmful rows must be {least} to {there - 1} of the {there} that {bench.name} has to "
            f"train on, got {count}."
        )

    def few(rows: TaskSplits) -> TaskSplits:
        return rows._replace(train=taken(rows.train, _in_turn(rows)[:count]), few=None)

    return dataclasses.replace(
        bench,
        name=f"{bench.name}-{count}-harmful-rows",
        harmful=few(bench.harmful),
        unseen={name: few(rows) for name, rows in bench.unseen.items()},
    )


def _in_turn(rows: TaskSplits) -> np.ndarray:
    """All training rows in a drawn order; of classes, one of each, then another of each ..."""
    drawn = np.random.Generator(np.random.PCG64(0)).permutation(rows.train.x.shape[0])
    if rows.classes is None:
        return drawn
    labels = np.asarray(rows.train.y)[drawn]
    turns = np.zeros(len(drawn), int)
    for label in range(rows.classes):
        here = labels == label
        turns[here] = np.arange(here.sum())
    return drawn[np.lexsort((labels, turns))]


def check(bench: Bench, models: list[Model]) -> None:
    """Refuses models that do not fit their bench, at the door.

    Raises:
      ValueError: no models, labels that repeat, heads that do not fit the features, rows of another
        shape or too few of them, tokens in one task and not in another, or numbers that are not
        finite.
    """
    if not models:
        raise ValueError("there is no model to assess.")
    labels = [model.label for model in models]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ValueError(f"labels of models must differ, got {repeated[0]!r} twice.")
    shape = bench.harmful.train.x.shape[1:]
    for name, rows in bench.tasks().items():
        for split in ("train", "selection", "held_out"):
            x = getattr(rows, split).x
            if x.shape[0] < 2:
                raise ValueError(f"{name}, {split}: need 2 rows or more, got {x.shape[0]}.")
            if not _finite(getattr(rows, split)):
                raise ValueError(f"{name}, {split}: inputs and targets must be finite numbers.")
            if rows.is_tokens != bench.harmful.is_tokens:
                raise ValueError(f"{name}: all tasks must have tokens as targets, or none.")
            if x.shape[1:] != shape:
                raise ValueError(
                    f"{name}, {split}: inputs have shape {getattr(rows, split).x.shape[1:]}, the "
                    f"harmful task's {shape}; one model takes one shape."
                )
    for model in models:
        if not _finite((model.params, model.benign_head)):
            raise ValueError(
                f"{model.label!r}: parameters must be finite; what made this model diverged. Leave "
                "it out, or make it again."
            )
        row_shape = features_shape(bench, model)
        if bench.harmful.is_tokens:
            if model.benign_head:
                raise ValueError(f"{model.label!r}: a model of tokens has () as its benign head.")
            continue
        d = check_head(model.benign_head, where=f"{model.label!r}: the benign head")
        if row_shape != (1, d):
            raise ValueError(
                f"{model.label!r}: features_fn gives {list(row_shape)} for one row, but the benign "
                f"head takes [1, {d}]."
            )


def features_shape(bench: Bench, model: Model) -> tuple[int, ...]:
    """Of one row: [1, d], or [1, t, d] of a text's hidden states."""
    fn = model.features_fn or bench.features_fn
    outputs = jax.eval_shape(fn, model.params, bench.harmful.train.x[:1])
    return getattr(outputs, "states", outputs).shape


def _finite(tree: Any) -> bool:
    """Whether all numbers in a tree are; rows of files were found to be when they were opened."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, FileRows))
    return all(leaf.dtype.kind != "f" or all_finite(leaf) for leaf in map(np.atleast_1d, leaves))


UNDEFENDED = "none"
"""The method of the model that sets what broken means."""
