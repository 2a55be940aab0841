"""Inspect a source before training."""
