"""Weights in from the reference program, and out to others."""

from .tf_weights import TFReport, load_tf_checkpoint

__all__ = ["TFReport", "load_tf_checkpoint"]
