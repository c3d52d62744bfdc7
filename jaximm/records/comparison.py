"""Two checkpoints side by side, as plain JSON values: what `jaximm.run.compare` makes.

A is the reference and B what is measured against it: (i), (ii) and RIR are B over A.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

SCHEMA = "jaximm.comparison/2"
"""The value of the key ``schema`` of a comparison."""

Task = Literal["harmful", "primary"]
Side = Literal["a", "b"]

TASKS: tuple[Task, ...] = ("harmful", "primary")
SIDES: dict[Side, Literal["before", "after"]] = {"a": "before", "b": "after"}
"""The two, and the names that rows of condition numbers use for them."""


class Checkpoint(TypedDict):
    """What a checkpoint is; all but `width` and `primary_accuracy` is what its record says."""

    path: str | None
    model: str
    model_config: dict[str, Any]
    method: str
    config: dict[str, Any]
    content_hash: str
    conditioning: Any
    width: int
    primary_accuracy: float | None  # of the stored head on the rows; None without one or labels


class Fitting(TypedDict):
    """What a probe takes on one side: `jaximm.attacks.fit_of`, FLOPs of set-up and of a step."""

    fit: dict[str, Any]
    setup_flops: float
    step_flops: float


class ProbeRow(TypedDict):
    """One probe on one task, within `steps`."""

    attacker: str
    title: str
    kind: str
    task: str
    steps: int
    a: Fitting
    b: Fitting


class Comparison(TypedDict):
    """Everything about two checkpoints; see `jaximm.run.compare.compare_features`."""

    schema: str
    a: Checkpoint
    b: Checkpoint
    same_numbers: bool  # bitwise the same arrays
    movement: dict[str, Any] | None  # `jaximm.measures.movement.Movement.to_json`
    movement_note: str  # why there is none
    conditioning: dict[str, dict[str, Any]]  # by footing, as `jaximm.measures.conditioning_rows`
    attacks: list[ProbeRow]
    rows: dict[str, int]  # by task
    data: str  # what the rows are, in words
