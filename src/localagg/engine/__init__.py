"""Exact nearest rows, sums over them, and k-means: search in front, back-ends behind."""
