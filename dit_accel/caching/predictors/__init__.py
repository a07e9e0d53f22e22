"""Predictors: what stands in for the value of a skipped unit."""

from .base import Kept, Place, Predictor
from .clip import Clipped
from .dmd import DMD
from .heun import Heun
from .linear import AdaptiveLinear
from .reuse import Reuse
from .settled import Settled
from .taylor import Taylor

__all__ = ["DMD", "AdaptiveLinear", "Clipped", "Heun", "Kept", "Place", "Predictor", "Reuse", "Settled", "Taylor"]
