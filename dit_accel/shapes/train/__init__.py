"""Training of the shapes pipelines: ``python -m dit_accel.shapes.train --help``."""
