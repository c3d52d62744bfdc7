"""Gradient routing on `secret`, beside filtering and unlearning of the same rows."""

from __future__ import annotations

import dataclasses

import optax

from experiments.systems.rows import SMOKE_UPDATES, Row, as_it_is
from experiments.systems.tasks import Model, Toy, drawn, secret
from jaximm import immunisers
from jaximm.immunisers import Weighted, from_objective
from jaximm.training import fit

TASK = "secret"
LEAK = 0.05
"""Of the task as it is."""

FIELDS = {
    "steps": 2000,
    "share": 0.25,
    "attached": 0.3,
    "units": r"^layers\.[01]\.",
    "readers": r"^layers\.2\.kernel$",
}
ROUTED = Row("gradient_routing", FIELDS, rate=1e-3, clip=None, start="random initialisation")
"""Entry by entry: a gradient clipped by its norm would join core and part."""


def routed(leak: float):
    """The released model, where another share of the secret rows stands among the core ones."""
    return lambda toy, seed: ROUTED(secret(toy.length, leak), seed)


def attached(toy: Toy, seed: int) -> Model:
    """The model with its part: what is not released."""
    fields = {**FIELDS, "batch_size": 64, "steps": SMOKE_UPDATES if toy.length < 1 else 2000}
    config = immunisers.make_config("gradient_routing", **fields)
    problem = toy.problem_of(seed, optimiser=optax.adam(1e-3))
    method = immunisers.make_immuniser("gradient_routing", config, problem)
    method = method._replace(finish=lambda state: state.params)
    rows = {"primary": toy.rows["primary"], "harmful": toy.rows["harmful"]}
    start = toy.starts["random initialisation"](seed)
    steps = config.steps
    found = fit(method, start, drawn(rows, 100 + seed, 64), seed=seed, steps=steps, log_every=steps)
    return Model(found.params)


def filtered(leak: float):
    """Training on the core rows alone, leaked ones among them."""
    return lambda toy, seed: Model(secret(toy.length, leak).starts["filtered"](seed))


def ascent(toy: Toy, seed: int) -> Model:
    """Unlearning from the model that knows all: ascent on the secret loss, clamped at 6 nats."""
    problem = dataclasses.replace(toy.problem, optimiser=optax.adam(1e-3))

    def objective(params, batches, memory, rng_key):
        del rng_key
        harm = problem.losses(params, batches.harmful)
        gate = 1.0 * (harm.mean() < 6.0)  # of the batch's mean, as where the table is from
        kept = problem.losses(params, batches.primary)
        return {"kept": kept, "harm": Weighted(-gate * harm, 1.0 + 0 * harm)}, {}, memory

    method = from_objective("ascent", problem, objective)
    rows = {"primary": toy.rows["primary"], "harmful": toy.rows["harmful"]}
    start = toy.starts["undefended"](seed)
    steps = SMOKE_UPDATES if toy.length < 1 else 300
    found = fit(method, start, drawn(rows, 100 + seed, 64), seed=seed, steps=steps, log_every=steps)
    return Model(found.params)


ROWS = {
    "routed, leak 5 %": ROUTED,
    "routed, attached, leak 5 %": attached,
    "filtered, leak 5 %": as_it_is("filtered"),
    "routed, leak 2 %": routed(0.02),
    "filtered, leak 2 %": filtered(0.02),
    "routed, leak 20 %": routed(0.2),
    "filtered, leak 20 %": filtered(0.2),
    "clamped ascent": ascent,
}
