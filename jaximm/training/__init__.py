"""Training: the one loop that runs every immuniser."""

from jaximm.training.loop import FitResult, MetricsLog, fit, read_metrics

__all__ = ["FitResult", "MetricsLog", "fit", "read_metrics"]
