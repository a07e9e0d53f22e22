"""The evaluator: reads clips and images of the shapes world, without a neural network, and judges them.

:func:`observe` reads, :func:`judge` compares with a prompt's words, :func:`score` does both. The truth measures for
edits are in :mod:`dit_accel.shapes.evaluate.measures`.
"""

from .judgement import SLOTS, Score, judge, score
from .observation import Observation, ObservedObject, observe
from .redraw import redraw

__all__ = ["SLOTS", "Observation", "ObservedObject", "Score", "judge", "observe", "redraw", "score"]
