"""AntiDote on `refusal`: prompts to refuse, each with its safe and its harmful answer.

The game of the toy study: 60 rounds of 20 steps of either player, 48 pairs and 96 benign rows a
step, Adam, rates 5e-4 (defender) and 1e-3 (adversary), primary loss 1, KL 0.3, anchor 1, beta 0.5.
Each kernel's adapter is written from the kernel's own inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.systems.rows import SMOKE_UPDATES, Row
from experiments.systems.tasks import Attempt, Model, Toy, digit_sites, on_device
from jaximm import immunisers
from jaximm.immunisers.adversarial.antidote import Attack
from jaximm.training import fit
from jaximm.types import Batch

PAIRS, BENIGN, STEPS = 48, 96, 1200


def inputs(params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """What enters each of the three layers, and the features."""
    sites = digit_sites(params, x)
    first, second = sites["layers.0"], sites["features"]
    return {"layers.0": x, "layers.1": first, "layers.2": second, "features": second}


class Batches(NamedTuple):
    """Of a step: benign rows, pairs of the defender, and pairs of each step of the adversary."""

    primary: Batch
    harmful: Batch
    safe: Batch
    attack: Attack


@functools.cache
def drawn(block: int):
    """``draw(rows, seed, step)``, for so many steps of the adversary."""

    def draw(rows: Mapping[str, Batch], seed: jax.Array, step: jax.Array) -> Batches:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)

        def take(key: jax.Array, count: int, *names: str) -> list[Batch]:
            places = jax.random.randint(key, (count,), 0, rows[names[0]].y.shape[0])
            return [jax.tree.map(lambda leaf: leaf[places], rows[name]) for name in names]

        (primary,) = take(keys[0], BENIGN, "benign")
        harmful, safe = take(keys[1], PAIRS, "harmful", "safe")
        attack = Attack(*take(keys[2], block * PAIRS, "harmful", "safe"))
        return Batches(primary, harmful, safe, attack)

    return draw


@dataclasses.dataclass(frozen=True)
class Game(Row):
    """AntiDote with safe answers, and with pairs of their own for each step of the adversary."""

    def __call__(self, toy: Toy, seed: int) -> Model:
        """The model that the defender releases from a seed."""
        steps = SMOKE_UPDATES if toy.length < 1 else STEPS
        given = {"task_weight": 1.0, "own_inputs": True, "steps": steps, **self.fields}
        config = immunisers.make_config("antidote", **given)
        problem = toy.problem_of(seed, optimiser=optax.adam(self.rate), sites_fn=inputs)
        names = ("benign", "harmful", "safe")
        rows = {name: on_device(toy.rows[name]) for name in names}
        done = fit(
            immunisers.make_immuniser("antidote", config, problem),
            toy.starts[self.start](seed),
            jax.tree_util.Partial(drawn(config.block), rows, jnp.uint32(100 + seed)),
            seed=seed,
            steps=steps,
            log_every=config.block,
        )
        blocks = [(one["adversary_first"], one["adversary_last"]) for one in done.trajectory]
        fell = sum(last < first for first, last in blocks)
        margin = done.trajectory[-1]["margin"]
        print(
            f"  seed {seed}: the adversary's loss fell in {fell} of {len(blocks)} blocks, "
            f"{blocks[0][0]:.2f} -> {blocks[0][1]:.2f} in the first; margin {margin:.1f} nats",
            file=sys.stderr,
            flush=True,
        )
        return Model(done.params)


TASK = "refusal"
GAME = {"clip": None}
ROWS = {
    "no patch": Game("antidote", {**GAME, "budget": 1e-9}),
    "adversary never trained": Game("antidote", {**GAME, "adversary_rate": 0.0}),
    "AntiDote, budget 0.2": Game("antidote", {**GAME, "budget": 0.2}),
    "AntiDote, budget 0.5": Game("antidote", GAME),
    "AntiDote, budget 0.5, clip 15": Game("antidote"),
}
ATTEMPTS = {"hypernetwork": Attempt("hypernetwork@learning_rates=1e-3|3e-3|1e-2", 30)}
