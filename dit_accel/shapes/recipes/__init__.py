"""The parts of the shapes pipelines, untrained: sizes are chosen here and nowhere else."""
