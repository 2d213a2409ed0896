"""Prompts or everything in, masks out: predictor, mask generation and pipelines."""
