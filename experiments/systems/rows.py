"""A defence of a table: a registered method with its settings, made by the library's own `fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax

from experiments.systems.tasks import Model, Toy, drawn, trained
from jaximm import immunisers
from jaximm.training import fit

SMOKE_UPDATES = 5
"""Of a method on a task that is shortened, for tests."""

Lock = Callable[[Toy, int], Model]
"""``lock(toy, seed)``: what is released, however it is made."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A registered method.

    Attributes:
      method: of `jaximm.immunisers.REGISTRY`.
      fields: of its configuration, ``steps`` among them; ``batch_size`` is 64 where it is not
        given, and all rows of a method in closed form.
      rate: of Adam.
      clip: longest gradient over all parameters; None: any.
      start: which of the task's models it begins with.
      after: another row or lock, whose model it goes on with in place of that one.
      problem: further fields of `jaximm.immunisers.Problem`, an optimiser among them.
      batches: further batches of a step: what the method calls them, and which of the task's rows
        they are.
    """

    method: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    rate: float = 5e-4
    clip: float | None = 1.0
    start: str = "undefended"
    after: Lock | None = None
    problem: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batches: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, toy: Toy, seed: int) -> Model:
        """The model that the method releases from a seed."""
        fields = dict(self.fields)
        closed_form = "closed_form" in immunisers.about(self.method).traits
        if not closed_form:
            fields.setdefault("batch_size", 64)
        if toy.length < 1 and not closed_form:
            fields["steps"] = SMOKE_UPDATES
        config = immunisers.make_config(self.method, **fields)
        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        given = {"optimiser": optax.chain(clip, optax.adam(self.rate)), **self.problem}
        method = immunisers.make_immuniser(self.method, config, toy.problem_of(seed, **given))
        rows = {name: toy.rows[which] for name, which in
                {"primary": "primary", "harmful": "harmful", **self.batches}.items()}  # fmt: skip
        done = fit(
            method,
            toy.starts[self.start](seed) if self.after is None else self.after(toy, seed).params,
            drawn(rows, 100 + seed, config.batch_size),
            seed=seed,
            steps=config.steps,
            log_every=config.steps,
        )
        return Model(done.params)


def more_training(
    *, steps: int, rate: float = 5e-4, batch_size: int = 128, start: str = "undefended"
) -> Lock:
    """The control of every method: its start, trained on the primary rows alone for as long."""

    def made(toy: Toy, seed: int) -> Model:
        return Model(
            trained(
                toy.problem,
                toy.starts[start](seed),
                toy.rows["primary"],
                steps=SMOKE_UPDATES if toy.length < 1 else steps,
                rate=rate,
                batch_size=batch_size,
                seed=100 + seed,
            )
        )

    return made


def as_it_is(start: str) -> Lock:
    """A model of the task, untouched."""
    return lambda toy, seed: Model(toy.starts[start](seed))
