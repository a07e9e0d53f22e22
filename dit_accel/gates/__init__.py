"""Block gates: what they learn from, how they are trained, and the files that keep them."""
