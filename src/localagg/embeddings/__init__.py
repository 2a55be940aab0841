"""Compute embeddings, write them as a table, and search it."""
