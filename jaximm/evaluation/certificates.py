"""Certificates: numbers that no method, or no attacker of a named class, can beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaximm import linalg
from jaximm.attacks import ProbeProblem
from jaximm.result import TARGETS


def limit_certificate(log_rir_limit: float) -> dict[str, Any]:
    """The limit of RIR as a certificate row."""
    return {
        "name": "rir_limit",
        "threat_model": "any invertible linear backbone, damped footing, training rows",
        "value": log_rir_limit,
        "unit": "nats of log RIR",
        "task": "harmful",
        "backbone": "after",
        "target": None,
    }


def krylov_rows(problems: Mapping[tuple[str, str], ProbeProblem]) -> list[dict[str, Any]]:
    """The least number of gradient steps of any Krylov-span attacker, per problem and loss gap.

    Args:
      problems: keyed (task, backbone).
    """
    rows = []
    for (task, backbone), problem in problems.items():
        eigenvalues = np.asarray(problem.eigenvalues)
        coefficients = np.asarray(problem.error_coefficients)
        for target in TARGETS:
            found = linalg.krylov_certificate(eigenvalues, coefficients, relative_gap=float(target))
            rows.append(
                {
                    "name": "krylov_floor",
                    "threat_model": (
                        "iterates from w = 0 in the span of gradients: gradient descent with any "
                        "schedule, momentum, Nesterov, conjugate gradients; not a preconditioner"
                    ),
                    "value": int(found.steps),
                    "unit": "steps",
                    "task": task,
                    "backbone": backbone,
                    "target": f"relative excess loss {target}",
                }
            )
    return rows
