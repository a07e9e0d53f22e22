"""The web front end.

It is not part of this release: the folder holds its place in the package.  Until it comes, use the command line
(`dit-accel render`) or `dit_accel.accelerate` in Python.
"""
