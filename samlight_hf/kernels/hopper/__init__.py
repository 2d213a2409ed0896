"""CUDA kernels for Hopper GPUs, compiled with NVRTC on first use."""
