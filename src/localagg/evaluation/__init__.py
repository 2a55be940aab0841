"""Measurements of an embedding, with labels and without."""
