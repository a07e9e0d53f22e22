"""Every attention method beside dense, same prompts and noise: ``python -m dit_accel.shapes.methods --out FILE``."""
