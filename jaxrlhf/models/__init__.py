"""One decoder for every family, and its import and export. Flax NNX lives here and nowhere else."""
