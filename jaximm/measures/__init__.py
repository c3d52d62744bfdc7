"""Pure functions of arrays and rows: conditioning, utility, intervals, costs, flags."""

from jaximm.measures.conditioning import (
    DEFINITIONS,
    Kappas,
    TaskRows,
    Tasks,
    conditioning,
    kappas,
    log_kappas,
    log_rir_limit,
    task_rows,
    without_zeros,
)
from jaximm.measures.flags import RULES, flags_of
from jaximm.measures.streams import RowStream, add_rows, joined, row_stream, stream_rows
from jaximm.measures.utility import (
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
    "PENALTIES",
    "RULES",
    "Accuracies",
    "Kappas",
    "RowStream",
    "Rows",
    "TaskRows",
    "Tasks",
    "add_rows",
    "best_classifier_accuracy",
    "best_head",
    "best_head_quality",
    "conditioning",
    "flags_of",
    "joined",
    "kappas",
    "log_kappas",
    "log_rir_limit",
    "row_stream",
    "stream_rows",
    "task_rows",
    "utility",
    "without_zeros",
]
