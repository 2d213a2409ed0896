"""Image encoder and mask decoder as they run for inference: fused, replayed from CUDA graphs, within a memory budget."""
