"""Judges shapes pipelines on prompts they never saw: ``python -m dit_accel.shapes.report --out docs/shapes/wan``."""
