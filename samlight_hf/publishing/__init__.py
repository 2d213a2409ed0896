"""Checkpoint folders for the Hub: built, checked, verified, described by a model card, and uploaded."""
