"""Encoders: images in, unit rows out. One file for each architecture, listed in BACKBONES."""

from .backbone import Compat, Normalization
from .encoder import BACKBONES, Encoder, available_models, create_encoder, offers_weights
from .module_backbone import encoder_of
from .weights import WeightsReport, load_weights

__all__ = [
    "BACKBONES",
    "Compat",
    "Encoder",
    "Normalization",
    "WeightsReport",
    "available_models",
    "create_encoder",
    "encoder_of",
    "load_weights",
    "offers_weights",
]
