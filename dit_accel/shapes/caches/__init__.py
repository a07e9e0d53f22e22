"""Every cache beside dense, same prompts and noise: ``python -m dit_accel.shapes.caches --out FILE``."""
