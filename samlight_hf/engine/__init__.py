"""Image encoder and mask decoder for inference: fused, replayed from CUDA graphs, within a memory budget."""
