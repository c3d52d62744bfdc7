"""A ViT-S/14 of DINOv2's shape and published weights: CIFAR-10 kept, other images made hard.

Command: ``python experiments/dinov2/run.py --out DIR`` after ``make data``. Times, figures and what
the weights are stand in the README beside this file.
"""

import dataclasses

from jaximm.run import Experiment
from jaximm.training.optimiser import OptimiserConfig

METHODS = (
    "none",
    "condition_gap",
    "condition_gap@harmful_weight=3",
    "limit@t=1,damping=1e-6",
    "erase",
    "condition_gap@primary_weight=0,harmful_weight=0",
)
"""The last is fine-tuning on the primary task alone: what any training does to both kappas."""

ATTACKED = METHODS[:2] + METHODS[3:5]
"""Those that meet attackers."""

ATTACK_ROWS = 250
"""Of each task, that choose and that are reported: scoring is most of what a short attack costs."""

TOLERANCE = 1e-5
"""Singular values below this part of the largest are left out of kappas compared at one rank.

What a layer norm gives has one direction that does not vary: ``f . (1 / scale) = bias . (1 /
scale)``. Here its singular value is 2e-6 to 4e-6 of the largest, the next one 1e-3: at the usual
1e-6 it decides kappa before a method, and may be left out after it.
"""

SIZES = (56, 70, 98, 112)
"""Pixels a side, multiples of the patch, at which ``--sizes`` probes the untouched model."""

FASHION = Experiment(
    name="dinov2_cifar10_fashion",
    data="cifar10_fashion",
    data_fields={"train_rows": 1500, "held_out_rows": 1500, "seed": 1},
    model="dinov2_s14",
    image_size=98,
    train="blocks.11",
    methods=METHODS,
    method_fields={"condition_gap": {"batch_size": 64}},
    steps=120,
    batch_size=32,
    optimiser=OptimiserConfig(learning_rate=1e-4),
    attackers=("gd", "adam", "conjugate_gradients", "ridge"),
    weight_attackers=(
        "fine_tune_adam@learning_rates=1e-4|1e-3|1e-2",
        "solved_head@learning_rates=1e-4,penalties=1e-5|1e-2",
    ),
    fine_tune_steps=30,
    log_points=6,
    description="ViT-S/14, last block: CIFAR-10 (primary) against Fashion-MNIST (harmful).",
)
SPLIT = dataclasses.replace(
    FASHION,
    name="dinov2_vehicles_animals",
    data="cifar10_split",
    methods=ATTACKED,
    weight_attackers=(),
    description="ViT-S/14, last block: CIFAR-10 vehicles (primary) against animals (harmful).",
)
TWO_FASHION, TWO_SPLIT = (
    dataclasses.replace(
        config,
        name=f"{config.name}_two",
        train="blocks.10,blocks.11",
        methods=METHODS[1:2],
        steps=40,
        weight_attackers=(),
        description=config.description.replace("last block", "last two blocks"),
    )
    for config in (FASHION, SPLIT)
)
CONFIG = FASHION
SMOKE = dataclasses.replace(
    FASHION,
    data_fields={"train_rows": 200, "held_out_rows": 200, "seed": 1},
    image_size=56,
    methods=("none", "condition_gap", "limit@t=1,damping=1e-6"),
    steps=4,
    attackers=("ridge",),
    weight_attackers=(),
    group_rows=50,
    groups=2,
)
