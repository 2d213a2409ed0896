"""CUDA kernels for Hopper GPUs, compiled with NVRTC when they are first needed."""
