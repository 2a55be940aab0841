"""Named configurations, and the rule that fits one to the number of images."""

from dataclasses import dataclass

from .config import (
    EncoderConfig,
    PretrainConfig,
)


@dataclass(frozen=True)
class Recipe:
    """A configuration with its purpose and its price."""

    config: PretrainConfig
    about: str
    cost: str


_SMALL_IMAGES_HALF_STRIDE = EncoderConfig(
    model="resnet18_small", width=32, blocks=(1, 1, 1, 1), stem_stride=2
)

RECIPES: dict[str, Recipe] = {}
