"""What the attention of a model looks like, head by head, and which sparse method suits it: ``dit-accel inspect``."""

from .inspection import InspectionRecorder
from .recorder import AttentionStatisticsRecorder
from .statistics import call_statistics

__all__ = ["AttentionStatisticsRecorder", "InspectionRecorder", "call_statistics"]
