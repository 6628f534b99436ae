"""Every byte on disk: what is read and written, and nothing else."""
