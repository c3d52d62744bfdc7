"""Suites: a budget in steps and a grid for every attacker of a probe, by how hard it tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaximm.types import Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Budgets and grids by registry name.

    Attributes:
      steps: budget in steps for each attacker.
      default_steps: budget of attackers that `steps` does not name (those registered by users).
      options: arguments of the attacker's factory that differ from its defaults.
    """

    steps: Mapping[str, int]
    default_steps: int
    options: Mapping[str, Fields] = dataclasses.field(default_factory=dict)

    def budget(self, name: str) -> int:
        """Steps for the attacker `name`."""
        return self.steps.get(name, self.default_steps)


# Fixed-step descent is evaluated in closed form, so its budget is free; conjugate gradients,
# L-BFGS and the solves stop by themselves long before theirs.
SUITES: dict[str, Suite] = {
    # For a thousand features and more, where a step outside the eigenbasis takes milliseconds.
    "short": Suite(
        steps={
            "gd": 10**6,
            "gd_best_step": 10**6,
            "gd_line_search": 2_000,
            "heavy_ball": 2_000,
            "nesterov": 2_000,
            "adam": 500,
            "conjugate_gradients": 500,
            "lbfgs": 100,
            "ridge": 1,
            "whitened_gd": 100,
            "jacobi_gd": 500,
        },
        default_steps=500,
        options={
            "gd_best_step": {"step_scales": (0.5, 0.9, 1.0, 1.03)},
            "heavy_ball": {"curvatures": (0.0, 0.25, 0.5, 0.75, 1.0)},
            "nesterov": {"curvatures": (0.0, 0.25, 0.5, 0.75, 1.0)},
            "adam": {"learning_rates": (1e-3, 1e-2, 1e-1, 1.0)},
            "jacobi_gd": {"step_scales": (0.5, 1.0, 1.95, 2.05)},
        },
    ),
    "quick": Suite(
        steps={
            "gd": 10**6,
            "gd_best_step": 10**6,
            "gd_line_search": 20_000,
            "heavy_ball": 10_000,
            "nesterov": 10_000,
            "adam": 3_000,
            "conjugate_gradients": 3_000,
            "lbfgs": 500,
            "ridge": 1,
            "whitened_gd": 100,
            "jacobi_gd": 10_000,
        },
        default_steps=3_000,
        options={
            "gd_best_step": {"step_scales": (0.5, 0.9, 1.0, 1.03)},
            "heavy_ball": {"curvatures": (0.0, 0.25, 0.5, 0.75, 1.0)},
            "nesterov": {"curvatures": (0.0, 0.25, 0.5, 0.75, 1.0)},
            "adam": {"learning_rates": (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)},
            "jacobi_gd": {"step_scales": (0.5, 1.0, 1.95, 2.05)},
        },
    ),
    "standard": Suite(
        steps={
            "gd": 10**7,
            "gd_best_step": 10**7,
            "gd_line_search": 200_000,
            "heavy_ball": 50_000,
            "nesterov": 50_000,
            "adam": 20_000,
            "conjugate_gradients": 20_000,
            "lbfgs": 2_000,
            "ridge": 1,
            "whitened_gd": 1_000,
            "jacobi_gd": 50_000,
        },
        default_steps=20_000,
        options={"lbfgs": {"memories": (500, 100)}},
    ),
    "full": Suite(
        steps={
            "gd": 10**9,
            "gd_best_step": 10**9,
            "gd_line_search": 10**6,
            "heavy_ball": 300_000,
            "nesterov": 300_000,
            "adam": 100_000,
            "conjugate_gradients": 100_000,
            "lbfgs": 5_000,
            "ridge": 1,
            "whitened_gd": 10_000,
            "jacobi_gd": 500_000,
        },
        default_steps=100_000,
        options={
            "gd_best_step": {
                "step_scales": (0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.999, 1.0, 1.001, 1.03)
            },
            "heavy_ball": {"curvatures": tuple(i / 16 for i in range(17))},
            "nesterov": {"curvatures": tuple(i / 16 for i in range(17))},
            "adam": {
                "learning_rates": tuple(float(v) for v in np.geomspace(1e-3, 1e2, 16)),
                "first_decays": (0.0, 0.9, 0.99),
            },
            "lbfgs": {"memories": (1000, 100)},
        },
    ),
}
