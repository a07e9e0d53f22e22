"""Whether attention maps are real: peaked, local, and weaker with distance, so that sparse methods find something.

``python -m dit_accel.shapes.attention --model shapes-wan --out FILE.json`` renders held-out prompts and prints tables.
"""

from ...inspect.recorder import AttentionStatisticsRecorder
from ...inspect.statistics import call_statistics
from .table import attention_tables

__all__ = ["AttentionStatisticsRecorder", "attention_tables", "call_statistics"]
