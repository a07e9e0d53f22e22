"""Training of the shipped shapes models: ``python -m dit_accel.shapes.train --help``."""
