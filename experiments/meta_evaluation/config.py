"""Does an assessment tell information that is absent from information that is hard to reach?

Command: ``python experiments/meta_evaluation/run.py --out DIR``. What is planted, the time and the
numbers to expect are in the README beside this file.
"""

import dataclasses

from jaximm.evaluation import Level
from jaximm.run import ExperimentConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedConfig(ExperimentConfig):
    """Models with planted truth. Of `ExperimentConfig`, data, seeds, suite and attackers count.

    Attributes:
      weight_attackers: attackers that fine-tune the network.
      weight_steps: their budget.
      report_seeds: how many fresh seeds report.
      batch_size: rows a step.
      record: points of a curve; 3 puts one at step 1000 of a million.
      train_rows: of each task, for the attackers.
      selection_rows: on which they choose hyper-parameters.
      held_out_rows: that are reported.
      defender_rows: on which the network is trained and doctored; attackers never see them.
      hidden: width of the network's hidden layer.
      features: d.
      training_steps: of the network on its benign task.
      amplitude: norm of the planted pattern; images have a norm of about 5.
      squeeze: factor on the direction of the features that carries the attribute.
      front_squeeze: factor on the planted pixels in a frozen front, ahead of a bottleneck.
      beyond: the same, where attackers of this level no longer reach it; 0 leaves the class out.
    """

    weight_attackers: tuple[str, ...] = ()
    weight_steps: int = 200
    report_seeds: int = 4
    batch_size: int = 100
    record: int = 3
    train_rows: int = 500
    selection_rows: int = 300
    held_out_rows: int = 500
    defender_rows: int = 1000
    hidden: int = 64
    features: int = 32
    training_steps: int = 150
    amplitude: float = 2.0
    squeeze: float = 1e-3
    front_squeeze: float = 1e-2
    beyond: float = 1e-3

    def level(self) -> Level:
        """The effort of the attackers, for `jaximm.evaluation.assess`."""
        return Level(
            probes=self.suite,
            weight_steps=self.weight_steps,
            batch_size=self.batch_size,
            report_seeds=tuple(range(101, 101 + self.report_seeds)),
            record=self.record,
            trial=False,
        )


CONFIG = PlantedConfig(
    name="meta_evaluation",
    data="mnist_pairs",
    data_fields={"pool": 2},
    methods=("none",),
    seeds=tuple(range(8)),
    attackers=("gd", "adam", "conjugate_gradients", "ridge", "whitened_gd"),
    weight_attackers=(
        "fine_tune_sgd",
        "fine_tune_adam",
        "fresh_head_adam",
        "probe_then_fine_tune",
        "solved_head",
        "spectral_rebalance",
    ),
    description="Planted attributes on MNIST digits, absent or hard to reach.",
)

SMOKE = dataclasses.replace(
    CONFIG,
    seeds=(0,),
    attackers=("gd", "ridge", "whitened_gd"),
    weight_attackers=("fresh_head_adam",),
    weight_steps=100,
    front_squeeze=0.0,
    beyond=0.0,
)
