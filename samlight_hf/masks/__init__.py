"""Masks as results, run lengths, boxes, drawings and files; no model is needed for any of it."""
