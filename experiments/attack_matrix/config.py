"""Every method against every attacker: two linear cases and EfficientNet-Lite0.

Command: ``python experiments/attack_matrix/run.py --out DIR`` (``--deep`` for the backbone, after
``make data``). The linear cases are those of ``make suite``. Times and figures are in the README
beside this file.
"""

import dataclasses

from jaximm.assessment import Level
from jaximm.run import SUITE, Experiment
from jaximm.training.optimiser import OptimiserConfig

LINEAR = SUITE
LEVEL = "standard"

CONFIG = Experiment(
    name="lite0_head",
    data="cifar10_split",
    data_fields={"train_rows": 1500, "held_out_rows": 600, "seed": 1},
    model="efficientnet_lite0",
    image_size=64,
    train="head",
    methods=(
        "none",
        "ill_only",
        "imma",
        "condition_gap",
        "balanced_gap",
        "direct_kappa",
        "limit@t=0.5,damping=1e-6",
        "erase",
    ),
    method_fields={
        "imma": {"weight": 0.1},
        "balanced_gap": {"weight": 0.03, "budget": 0.0},
        "direct_kappa": {"weight": 0.03},
    },
    steps=150,
    optimiser=OptimiserConfig(learning_rate=1e-4),
    description="EfficientNet-Lite0: CIFAR-10 vehicles (primary) against animals (harmful).",
)
"""What trains, and what attackers of weights may train, is the last convolution with its norm."""

DEEP_LEVEL = Level(
    probes="short",
    weight_steps=40,
    batch_size=32,
    record=4,
    trial=False,
)

SMOKE = dataclasses.replace(
    CONFIG,
    model="mlp",
    weights="random",
    image_size=None,
    train="*",
    methods=("none", "limit@t=0.5,damping=1e-6"),
    data_fields={"train_rows": 200, "held_out_rows": 200, "seed": 1},
    steps=3,
)
