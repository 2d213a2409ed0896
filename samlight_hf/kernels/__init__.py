"""Triton kernels, each beside its reference in plain PyTorch, and the choice between the two."""
