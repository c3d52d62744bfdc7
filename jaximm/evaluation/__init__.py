"""The protocol: conditioning on every footing, utility, certificates, flags."""

from jaximm.evaluation.bench import LEVELS, Bench, Level, Model, TaskSplits
from jaximm.evaluation.certificates import krylov_rows, limit_certificate
from jaximm.evaluation.conditioning import (
    DEFINITIONS,
    TaskRows,
    conditioning,
    kappas,
    log_kappas,
    log_rir_limit,
)
from jaximm.evaluation.flags import RULES, flags_of
from jaximm.evaluation.protocol import assess
from jaximm.evaluation.utility import (
    PENALTIES,
    Accuracies,
    Rows,
    best_classifier_accuracy,
    best_head,
    best_head_quality,
    utility,
)

__all__ = [
    "DEFINITIONS",
    "LEVELS",
    "PENALTIES",
    "RULES",
    "Accuracies",
    "Bench",
    "Level",
    "Model",
    "Rows",
    "TaskRows",
    "TaskSplits",
    "assess",
    "best_classifier_accuracy",
    "best_head",
    "best_head_quality",
    "conditioning",
    "flags_of",
    "kappas",
    "krylov_rows",
    "limit_certificate",
    "log_kappas",
    "log_rir_limit",
    "utility",
]
