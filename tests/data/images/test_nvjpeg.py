"""The path of ``--nvjpeg`` on the CPU, where torchvision decodes by libjpeg-turbo."""

import shutil

import pytest
import torch
from damage import middle_lost

from localagg.config import PretrainConfig, ViewConfig, override
from localagg.data.images import nvjpeg
from localagg.data.images.decode import UnreadableImage, decode
from localagg.data.images.nvjpeg import EncodedCrops
from localagg.data.loading.cropping import Crops
from localagg.data.loading.loader import Feed, on_device
from localagg.data.sources.open import open_images
from localagg.errors import UserError

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
    made, unreadable = crops.decoded("cpu")
    assert not unreadable
    assert made.dtype == torch.uint8
    assert (made.int() - expected.int()).abs().max() <= 1
    rows = torch.tensor([3, 3, 0])
    assert torch.equal(crops[rows].decoded("cpu")[0], made[rows])


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
    batches = [on_device(feed.batches(0), torch.device("cpu"), feed.fail) for feed in feeds]
    for plain, made in zip(*batches, strict=True):
        assert torch.equal(plain.index, made.index)
        assert (plain.images.int() - made.images.int()).abs().max() <= 1


# --- What it refuses, and what it does not notice ----------------------------------------------


@pytest.fixture
def jpeg(source):
    return next(source[i].image for i in range(9) if source[i].image[:2] == b"\xff\xd8")


def test_what_cannot_be_decoded_is_told_by_row_and_the_others_are_as_they_were(jpeg):
    half = jpeg[: len(jpeg) // 2]
    images, boxes = [jpeg, jpeg[:2] + jpeg[40:], jpeg, half], [(0, 0, 9, 9)] * 4
    crops, failed = EncodedCrops(images, boxes, 8).decoded("cpu")
    alone, _ = EncodedCrops([jpeg], boxes[:1], 8).decoded("cpu")
    assert torch.equal(crops[[0, 2]], alone[[0, 0]])
    assert failed.keys() == {1, 3}
    assert "truncated" in failed[3]


def test_missing_data_before_an_end_marker_are_not_noticed(jpeg):
    """As docs/data.md says; without --nvjpeg they are."""
    cut = jpeg[: len(jpeg) // 2] + b"\xff\xd9"
    assert not EncodedCrops([cut], [(0, 0, 9, 9)], 8).decoded("cpu")[1]
    with pytest.raises(UnreadableImage, match="its data end before the image does"):
        decode(cut)


def refused(monkeypatch, *images):
    """Have nvJPEG refuse a batch with one of these in it; what it was asked for is returned."""
    real, asked = nvjpeg._nvjpeg, []

    def picky(batch, device):
        asked.append(len(batch))
        if any(image in images for image in batch):
            raise RuntimeError("nvjpegDecode failed: 3")
        return real(batch, device)

    monkeypatch.setattr(nvjpeg, "_nvjpeg", picky)
    return asked


def test_what_nvjpeg_refuses_the_processor_decodes(jpeg, source, monkeypatch):
    other = source[2].image
    asked = refused(monkeypatch, other)
    crops, failed = EncodedCrops([jpeg, other], [(0, 0, 30, 30)] * 2, 30).decoded("cpu")
    assert asked == [2, 1, 1]
    assert not failed
    assert torch.equal(crops[1], decode(other)[:, :30, :30])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_policy_decides_on_what_fails_on_the_device(pictures, tmp_path, monkeypatch, workers):
    """Damage that only decoding shows, in two of 48 images."""
    folder = tmp_path / "data"
    shutil.copytree(pictures / "train", folder)
    bad = []
    for name in ("flower/01.jpg", "temple/06.jpg"):
        bad.append(middle_lost((folder / name).read_bytes()))
        (folder / name).write_bytes(bad[-1])
    refused(monkeypatch, *bad)
    config = PretrainConfig(views=ASKED, workers=workers, batch_size=8, memory="never")

    def batches(feed, epoch):
        return list(on_device(feed.batches(epoch), torch.device("cpu"), feed.fail))

    source = open_images(folder)
    strict = Feed(source, config, lambda done, of: None)
    with pytest.raises(UserError, match=r"cannot be read: .*0[16].jpg .its data end .*skip"):
        batches(strict, 0)
    feed = Feed(source, override(config, unreadable="skip"), lambda done, of: None)
    lost = {i for i in range(48) if source.name(i) in ("flower/01.jpg", "temple/06.jpg")}
    assert not feed.unreadable
    for epoch in (0, 1):  # in the second they are not even read
        plain = override(config, nvjpeg=False, unreadable="skip")
        due = Feed(source, plain, lambda done, of: None)
        due.unreadable = dict(feed.unreadable)
        for batch, expected in zip(batches(feed, epoch), batches(due, epoch), strict=True):
            assert not lost & set(batch.index.tolist())
            assert torch.equal(batch.index, expected.index)
            assert (batch.images.int() - expected.images.int()).abs().max() <= 1
        assert feed.unreadable.keys() == lost


def test_the_references_levels_are_not_promised():
    with pytest.raises(UserError, match="--nvjpeg"):
        override(ASKED, augmentation="reference")
