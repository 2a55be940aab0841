"""Encoders: images in, unit rows out. One file for each architecture."""

from .backbone import Compat
from .encoder import (
    Encoder,
    available_models,
    create_encoder,
    encoder_from_json,
    spec_to_json,
)

__all__ = [
    "Compat",
    "Encoder",
    "available_models",
    "create_encoder",
    "encoder_from_json",
    "spec_to_json",
]
