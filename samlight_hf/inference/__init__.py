"""Masks for prompts and of everything in an image: predictor, mask generator and pipeline."""
