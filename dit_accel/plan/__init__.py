"""Plans: which blocks a method keeps, when it runs dense, and what that should save."""

from __future__ import annotations

from .neighborhood import neighborhood_plan
from .radial import radial_plan
from .schedule import Schedule
from .simulate import pipeline_speedup, predicted_speedup

__all__ = ["Schedule", "neighborhood_plan", "pipeline_speedup", "predicted_speedup", "radial_plan"]
