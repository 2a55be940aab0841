import pytest
import torch
import torchvision.transforms.v2.functional as V

from localagg.data.images.decode import decode
from localagg.data.sources.open import open_images


@pytest.fixture(scope="module")
def images(pictures):
    """Photographs uint8 [12, 3, 48, 48]."""
    source = open_images(pictures)
    return torch.stack([V.resize(decode(source[i].image), [48, 48]) for i in range(12)])
