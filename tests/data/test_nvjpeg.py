"""The path of ``--nvjpeg`` on the CPU, where torchvision decodes by libjpeg-turbo."""

import pytest
import torch

from localagg.config import PretrainConfig, UserError, ViewConfig, override
from localagg.data.cropping import Crops
from localagg.data.loader import Feed, on_device
from localagg.data.nvjpeg import EncodedCrops
from localagg.data.sources import open_images

VIEWS = ViewConfig(image_size=24)
ASKED = override(VIEWS, nvjpeg=True)


@pytest.fixture(scope="module")
def source(pictures):
    """48 photographs, a quarter of them PNG."""
    return open_images(pictures)


def test_crops_are_within_a_level_of_the_workers(source):
    index = torch.arange(16)
    _, expected, _ = Crops(source, VIEWS, 0, 1, [index])[0]
    found_index, crops, failed = Crops(source, ASKED, 0, 1, [index])[0]
    assert not failed
    assert torch.equal(found_index, index)
    assert sum(isinstance(image, bytes) for image in crops.images) == 12  # the JPEG files
    made = crops.to("cpu")
    assert made.dtype == torch.uint8
    assert (made.int() - expected.int()).abs().max() <= 1
    rows = torch.tensor([3, 3, 0])
    assert torch.equal(crops[rows].to("cpu"), made[rows])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_as_crops(source, workers):
    feeds = [
        Feed(
            source,
            PretrainConfig(views=views, workers=workers, batch_size=8, memory="never"),
            lambda done, of: None,
        )
        for views in (VIEWS, ASKED)
    ]
    batches = [on_device(feed.batches(0), torch.device("cpu")) for feed in feeds]
    for plain, made in zip(*batches, strict=True):
        assert torch.equal(plain.index, made.index)
        assert (plain.images.int() - made.images.int()).abs().max() <= 1


def test_damage_that_shows_on_the_device_is_told(source):
    data = next(source[i].image for i in range(9) if source[i].image[:2] == b"\xff\xd8")
    cut = data[: len(data) // 2] + b"\xff\xd9"
    EncodedCrops([data], [(0, 0, 9, 9)], 8).to("cpu")
    broken = data[:2] + data[40:]
    for image in (broken, data[: len(data) // 2]):
        with pytest.raises(UserError, match="cannot be decoded"):
            EncodedCrops([data, image], [(0, 0, 9, 9)] * 2, 8).to("cpu")
    assert EncodedCrops([cut], [(0, 0, 9, 9)], 8).to("cpu").shape == (1, 3, 8, 8)


def test_the_references_levels_are_not_promised():
    with pytest.raises(UserError, match="--nvjpeg"):
        override(ASKED, augmentation="reference")
