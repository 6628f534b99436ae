"""Attention kernels, and what they compute in plain torch. Importing the package loads no triton."""
