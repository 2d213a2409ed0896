"""Triton kernels, each beside the plain PyTorch that it must equal, and the choice between them."""
