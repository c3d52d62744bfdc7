"""EfficientNet-Lite0 with its ImageNet weights: CIFAR-10 kept, Fashion-MNIST or animals made hard.

Command: ``python experiments/efficientnet_cifar/run.py --out DIR`` after ``make data``; the quick
variant, SqueezeNet, with ``--quick``. Times and figures are in the README beside this file.
"""

import dataclasses

from jaximm.run import Experiment
from jaximm.training.optimiser import OptimiserConfig

METHODS = (
    "none",
    "condition_gap@primary_weight=0,harmful_weight=0",
    "ill_only",
    "imma",
    "condition_gap",
    "balanced_gap",
    "direct_kappa",
    "limit@t=1,damping=1e-6",
    "erase",
)
"""The second is fine-tuning on the primary task alone: what any training does to both kappas."""

FIELDS = {
    "imma": {"weight": 0.1},
    "balanced_gap": {"weight": 0.03, "budget": 0.0},
    "direct_kappa": {"weight": 0.03},
}

ATTACKERS = (
    "gd",
    "nesterov",
    "adam",
    "conjugate_gradients",
    "lbfgs",
    "whitened_gd",
    "ridge",
)

FASHION = Experiment(
    name="lite0_cifar10_fashion",
    data="cifar10_fashion",
    data_fields={"train_rows": 3000, "held_out_rows": 3000, "seed": 1},
    model="efficientnet_lite0",
    image_size=128,
    train="blocks.15,head",
    methods=METHODS,
    method_fields=FIELDS,
    steps=200,
    optimiser=OptimiserConfig(learning_rate=1e-4),
    attackers=ATTACKERS,
    fine_tune_steps=60,
    description="EfficientNet-Lite0: CIFAR-10 (primary) against Fashion-MNIST (harmful).",
)
SPLIT = dataclasses.replace(
    FASHION,
    name="lite0_vehicles_animals",
    methods=(*METHODS, "condition_gap@harmful_weight=3"),
    data="cifar10_split",
    attackers=("gd", "adam", "conjugate_gradients", "ridge"),
    weight_attackers=("fine_tune_adam",),
    description="EfficientNet-Lite0: CIFAR-10 vehicles (primary) against animals (harmful).",
)
QUICK = dataclasses.replace(
    FASHION,
    name="squeezenet_cifar10_fashion",
    methods=(*METHODS, "condition_gap@harmful_weight=3", "limit@t=0.5,damping=1e-6"),
    model="squeezenet1_1",
    train="fire9",
    data_fields={"train_rows": 1500, "held_out_rows": 4000, "seed": 1},
    description="SqueezeNet 1.1: CIFAR-10 (primary) against Fashion-MNIST (harmful).",
)
CONFIG = FASHION
SMOKE = dataclasses.replace(
    QUICK,
    data_fields={"train_rows": 200, "held_out_rows": 200, "seed": 1},
    methods=("none", "condition_gap", "limit@t=1,damping=1e-6"),
    steps=4,
    attackers=("ridge",),
    weight_attackers=(),
    group_rows=50,
    groups=2,
)
