"""The schedule of a generation as a picture, SVG or PNG."""

from .page import MOST_ROWS, schedule
from .png import schedule_png
from .svg import schedule_svg

__all__ = ["MOST_ROWS", "schedule", "schedule_png", "schedule_svg"]
