"""Metrics for the `evaluate` library, a folder each that stands alone."""
