"""Encoders: images in, unit rows out. One file for each architecture, listed in BACKBONES."""

from .backbone import Compat
from .encoder import BACKBONES, Encoder, available_models, create_encoder

__all__ = ["BACKBONES", "Compat", "Encoder", "available_models", "create_encoder"]
