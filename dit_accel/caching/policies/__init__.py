"""Rules that say, call by call, whether to compute or to reuse."""

from .base import Judge, Moment, Policy, Sight
from .codebook import CODEBOOKS, Codebook, MotionRegularization
from .combine import AllOf, AnyOf
from .magnitude import Magnitude, magnitude_ratios, token_norms
from .polynomial import Polynomial
from .probe import ProbeDiff
from .prune import UnitDiff
from .scm import SCM_MASKS, ScmMask, scm_mask
from .snr import SnrGap
from .spectral import Spectral
from .static import Interval, Shrinking, Static
from .transform import Transform

__all__ = [
    "CODEBOOKS",
    "SCM_MASKS",
    "AllOf",
    "AnyOf",
    "Codebook",
    "Interval",
    "Judge",
    "Magnitude",
    "Moment",
    "MotionRegularization",
    "Policy",
    "Polynomial",
    "ProbeDiff",
    "ScmMask",
    "Shrinking",
    "Sight",
    "SnrGap",
    "Spectral",
    "Static",
    "Transform",
    "UnitDiff",
    "magnitude_ratios",
    "scm_mask",
    "token_norms",
]
