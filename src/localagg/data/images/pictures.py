"""Images as they are looked at: samples and bands are mapped as for the network."""

import torch
from torch import Tensor

from ..sources.combined import SourceSubset
from ..sources.source import Sample, Source
from .decode import decode
from .levels import STORED, Levels


def picture_at_levels(image: bytes | Tensor, levels: Levels) -> bytes | Tensor:
    """Return an image that programs for 8 bits and three bands show as ``levels`` maps it.

    JPEG files, which have 8 bits, stay encoded: they are drawn small without decoding them whole.

    Raises:
        UnreadableImage: see :func:`decode`.
    """
    if levels == STORED or isinstance(image, Tensor) or image.startswith(b"\xff\xd8"):
        return image
    return decode(image, upright=True, levels=levels)


def at_levels(source: Source, levels: Levels) -> Source:
    """Return a source whose images are to be looked at."""
    return source if levels == STORED else AtLevels(source, levels)


class AtLevels(SourceSubset):
    """All images of a source, to be looked at: samples and bands are mapped as for training."""

    def __init__(self, source: Source, levels: Levels) -> None:
        super().__init__(source, torch.arange(len(source)))
        self.levels = levels

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample._replace(image=picture_at_levels(sample.image, self.levels))
