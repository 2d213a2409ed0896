"""Masks as results, run lengths, boxes, drawings and files; nothing here needs a model."""
