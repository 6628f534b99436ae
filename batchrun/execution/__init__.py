"""One loop, two workers: the same steps, run by arithmetic or by a model."""
