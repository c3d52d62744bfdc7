"""Locks on `halves`: what each obstructs, and under which attackers."""

from __future__ import annotations

from typing import Literal

from experiments.systems.rows import Lock, Row
from experiments.systems.tasks import Attempt, Model, Toy, digit_features
from jaximm.immunisers.locks import keyed_subspace, specdef
from jaximm.immunisers.locks.keyed_subspace import HiddenAxis

TASK = "halves"
LAYERS = ("layers.0.kernel", "layers.1.kernel")
HIDDEN = [HiddenAxis("layers.0.kernel", "layers.1.kernel", "layers.0.bias")]
SHOTS = 100


def deformed_features(params, x):
    """The released model of SpecDef, also as what a probe sees."""
    return digit_features(specdef.fuse(params), x)


def deformed(alpha: float, *, fused: bool = False) -> Lock:
    """SpecDef of both layers, k = 10; `fused`: an attacker who multiplies out first."""

    def lock(toy: Toy, seed: int) -> Model:
        start = toy.starts["undefended"](seed)
        released = specdef.specdef(start.backbone, LAYERS, k=10, alpha=alpha)
        if fused:
            return Model(start._replace(backbone=specdef.fuse(released)))
        params = start._replace(backbone=released)
        return Model(params, deformed_features, deformed_features)

    return lock


def keyed(flavour: Literal["rotation", "permutation"]) -> Lock:
    """The hidden axis of the first layer under a key that the attacker does not have."""

    def lock(toy: Toy, seed: int) -> Model:
        start = toy.starts["undefended"](seed)
        key = keyed_subspace.make_key(2**100 + seed, start.backbone, HIDDEN, flavour)
        return Model(start._replace(backbone=keyed_subspace.lock(start.backbone, key, HIDDEN)))

    return lock


NEVER = "clips=1e30"
FINE = "learning_rates=1e-6|1e-5|1e-4|1e-3|1e-2"
ATTEMPTS = {
    "SGD": Attempt(f"fine_tune_sgd@learning_rates=1e-8|1e-6|1e-4|1e-3|1e-2|1e-1,{NEVER}", SHOTS),
    "SGD, tiny": Attempt(f"fine_tune_sgd@learning_rates=1e-12|1e-11|1e-10,{NEVER}", SHOTS),
    "SGD, clipped": Attempt(
        "fine_tune_sgd@learning_rates=1e-7|1e-6|1e-5|1e-4|1e-3|1e-2|1e-1", SHOTS
    ),
    "Adam": Attempt(f"fine_tune_adam@{FINE}", SHOTS),
}
PMP = {"steps": 1500, "search_steps": 50}
ROWS = {
    "PMP .1": Row("pmp", {**PMP, "density": 0.1}, rate=1e-3, start="random initialisation"),
    "PMP .3": Row("pmp", {**PMP, "density": 0.3}, rate=1e-3, start="random initialisation"),
    "SpecDef 1e3": deformed(1e3),
    "SpecDef 1e5": deformed(1e5),
    "SpecDef 1e5, fused": deformed(1e5, fused=True),
    "permutation, no key": keyed("permutation"),
    "rotation, no key": keyed("rotation"),
}
