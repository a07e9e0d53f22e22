"""Plans: which blocks a method keeps, when it runs dense, and what that should save."""

from __future__ import annotations

from .policy import PlanPolicy
from .radial import radial_plan
from .simulate import pipeline_speedup, predicted_speedup

__all__ = ["PlanPolicy", "pipeline_speedup", "predicted_speedup", "radial_plan"]
