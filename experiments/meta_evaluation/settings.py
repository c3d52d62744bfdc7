"""Does an assessment tell information that is absent from information that is hard to reach?

Command: ``python experiments/meta_evaluation/run.py --out DIR``. What is planted, the time and the
numbers to expect are in the README beside this file. Not a ``config.py``: nothing is immunised,
so `jaximm immunise` has no use for it.
"""

import dataclasses

from jaximm.assessment import Level


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """Models with planted truth, and the effort of their assessment.

    Attributes:
      seeds: one world each: its pattern, attribute, rows and network.
      suite: budgets and grids of the probes.
      attackers: probes and attackers of weights.
      weight_steps: budget of the latter.
      batch_size: rows a step.
      report_seeds: how many fresh seeds report.
      record: points of a curve; 3 puts one at step 1000 of a million.
      pool: side of the squares of pixels that become one; images are 28 x 28.
      train_rows: of each task, for the attackers.
      selection_rows: on which they choose hyper-parameters.
      held_out_rows: that are reported.
      defender_rows: on which the network is trained and doctored; attackers never see them.
      hidden: width of the network's hidden layer.
      features: d.
      training_steps: of the network on its benign task.
      amplitude: norm of the planted pattern; images have a norm of about 5.
      squeeze: factor on the direction of the features that carries the attribute.
      front_squeeze: factor on the planted pixels in a frozen front, ahead of a bottleneck; 0 leaves
        that class out.
      beyond: the same, where attackers of this level no longer reach it.
    """

    seeds: tuple[int, ...] = tuple(range(8))
    suite: str = "quick"
    attackers: tuple[str, ...] = (
        "gd",
        "adam",
        "conjugate_gradients",
        "ridge",
        "whitened_gd",
        "fine_tune_sgd",
        "fine_tune_adam",
        "fresh_head_adam",
        "probe_then_fine_tune",
        "solved_head",
        "spectral_rebalance",
    )
    weight_steps: int = 200
    batch_size: int = 100
    report_seeds: int = 5
    record: int = 3
    pool: int = 2
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
        """The effort of the attackers, for `jaximm.assessment.assess`."""
        return Level(
            probes=self.suite,
            weight_steps=self.weight_steps,
            batch_size=self.batch_size,
            report_seeds=tuple(range(101, 101 + self.report_seeds)),
            record=self.record,
            trial=False,
        )


CONFIG = PlantedConfig()
SMOKE = dataclasses.replace(
    CONFIG,
    seeds=(0,),
    attackers=("gd", "ridge", "whitened_gd", "fresh_head_adam"),
    weight_steps=100,
    front_squeeze=0.0,
    beyond=0.0,
)
"""One seed, attackers that compile quickly, and no benign task among them."""
