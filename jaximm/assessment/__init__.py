"""The protocol: what held against which attacker, at what cost, and how far to believe it."""

from jaximm.assessment.bench import Bench, Limits, Model, TaskSplits, of_few_harmful_rows
from jaximm.assessment.level import LEVELS, Level
from jaximm.assessment.protocol import assess
from jaximm.assessment.workers import Workers

__all__ = [
    "LEVELS",
    "Bench",
    "Level",
    "Limits",
    "Model",
    "TaskSplits",
    "Workers",
    "assess",
    "of_few_harmful_rows",
]
