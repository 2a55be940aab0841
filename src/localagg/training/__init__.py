"""Runs, the training loop and its parts."""
