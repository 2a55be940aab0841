"""Crops of a batch, against the same made image by image."""

import io
import shutil
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as V
from PIL import Image, ImageOps

from localagg.config import ViewConfig
from localagg.data.images.augment import (
    Augment,
    evaluation_view,
    ten_crop_views,
    view_draws,
    view_uniforms,
)
from localagg.data.images.crops import crop_boxes
from localagg.data.images.decode import decode
from localagg.data.loading.cropping import evaluation_batches, evaluation_crops, training_crops
from localagg.data.loading.loader import Feed
from localagg.data.loading.scan import load_or_scan
from localagg.data.sources.open import open_images
from localagg.data.sources.source import Sample

VIEWS = ViewConfig(image_size=24, eval_crop=0.875)


class Listed:
    """Images given as bytes or pixels."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Sample(index, self.images[index], None)


@pytest.fixture(scope="module")
def source(pictures):
    """48 photographs of six sizes, PNG and JPEG."""
    return open_images(pictures)


def test_crops_are_cut_by_the_draws(source):
    chunk = torch.tensor([5, 0, 17])
    (index, images, uniforms), failed = training_crops(source, VIEWS, 3, 2, chunk)
    assert torch.equal(index, chunk)
    assert torch.equal(uniforms, view_uniforms(3, 2, chunk))
    assert not failed
    for i, found in zip(index, images, strict=True):
        pixels = decode(source[int(i)].image)
        drawn = view_draws(VIEWS, view_uniforms(3, 2, i.view(1))).crop
        height, width = (torch.tensor([side]) for side in pixels.shape[1:])
        box = (int(side) for side in crop_boxes(VIEWS, drawn, height, width))
        assert torch.equal(found, V.resized_crop(pixels, *box, [24, 24], antialias=True))


@pytest.mark.parametrize("augmentation", ["torchvision", "reference"])
def test_neither_workers_nor_batches_nor_order_change_a_pixel(source, augmentation):
    """Views of each image, through 0 and 2 workers, in batches of 5 and 12, and alone."""
    views = replace(VIEWS, augmentation=augmentation)
    seen = {}
    for workers, batch in ((0, 12), (2, 5), (0, 1)):
        feed = Feed(source, views, workers=workers, batch_size=batch, memory="never", seed=4)
        augment = Augment(views, 4, cropped=True)
        for index, images, uniforms in feed.batches(1):
            made = augment(images, 1, index, uniforms)
            for i, crop, view in zip(index.tolist(), images, made, strict=True):
                first = seen.setdefault(i, (crop, view))
                assert torch.equal(crop, first[0])
                torch.testing.assert_close(view, first[1], atol=2e-6, rtol=0)
    assert len(seen) == 48


def test_unreadable_images_are_named_and_the_others_kept(source):
    whole = [source[i].image for i in range(4)]
    damaged = Listed([*whole, whole[1][:200], b"", whole[0][: len(whole[0]) // 2]])
    chunk = torch.tensor([6, 0, 4, 3, 5])
    for (index, images, *_), failed in (
        training_crops(damaged, VIEWS, 0, 0, chunk),
        evaluation_crops(damaged, VIEWS, False, chunk),
    ):
        assert index.tolist() == [0, 3]
        assert len(images) == 2
        assert sorted(failed) == [4, 5, 6]
        assert failed[5] == "empty file"
    (index, images, _), failed = training_crops(damaged, VIEWS, 0, 0, torch.tensor([4, 5]))
    assert (len(index), images.shape, len(failed)) == (0, (0, 3, 24, 24), 2)
    (_, images), _ = evaluation_crops(damaged, VIEWS, True, torch.tensor([4, 5]))
    assert images.shape == (0, 10, 3, 24, 24)


@pytest.mark.parametrize("augmentation", ["torchvision", "reference"])
def test_crops_of_pixels_are_those_of_their_files(source, augmentation):
    views = replace(VIEWS, augmentation=augmentation)
    encoded = [source[i].image for i in range(3)]
    crops = [
        training_crops(Listed(images), views, 0, 0, torch.arange(3))[0].images
        for images in (encoded, [decode(data) for data in encoded])
    ]
    assert torch.equal(*crops)


def test_images_are_turned_upright_where_asked(source):
    image = Image.open(io.BytesIO(source[1].image)).convert("RGB").resize((64, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, upright = io.BytesIO(), io.BytesIO()
    image.save(turned, "PNG", exif=exif)
    ImageOps.exif_transpose(Image.open(turned)).save(upright, "PNG")
    sources = [Listed([data.getvalue()]) for data in (turned, upright)]
    asked = replace(VIEWS, exif_orientation=True)
    one = torch.tensor([0])
    for make in (
        lambda source, views: training_crops(source, views, 0, 0, one)[0].images,
        lambda source, views: evaluation_crops(source, views, True, one)[0].images,
        lambda source, views: load_or_scan(source, upright=views.exif_orientation).pixels,
    ):
        found, expected = make(sources[0], asked), make(sources[1], VIEWS)
        assert torch.equal(found, expected)
        plain = make(sources[0], VIEWS)
        assert plain.shape != expected.shape or not torch.equal(plain, expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", ["torchvision", "reference"])
def test_evaluation_through_workers_equals_that_in_memory(one_size, augmentation, workers):
    views = replace(VIEWS, augmentation=augmentation)
    pixels = torch.stack([decode(one_size[i].image) for i in range(4)])
    for ten_crop, expected in (
        (False, evaluation_view(pixels, views)),
        (True, ten_crop_views(pixels, views)),
    ):
        batches = evaluation_batches(one_size, views, batch=3, workers=workers, ten_crop=ten_crop)
        found = torch.cat([batch.images for batch in batches])
        assert found.dtype == torch.uint8
        assert found.shape == expected.shape == ((4, 10, 3, 24, 24) if ten_crop else (4, 3, 24, 24))
        tolerance = 1.01 if augmentation == "torchvision" else 1e-4
        assert (found - expected * 255).abs().max() < tolerance


def test_evaluation_yields_each_readable_image_once_in_order(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "data")
    (tmp_path / "data" / "flower" / "02.jpg").write_bytes(b"broken")
    source = open_images(tmp_path / "data")
    (tmp_path / "data" / "flower" / "00.png").unlink()
    for ten_crop in (False, True):
        batches = list(evaluation_batches(source, VIEWS, batch=7, ten_crop=ten_crop))
        index = torch.cat([batch.index for batch in batches])
        assert index.tolist() == [i for i in range(48) if i not in (0, 2)]
        assert len(batches[0].images) == 5
    empty = list(evaluation_batches(source, VIEWS, batch=1))
    assert [int(batch.index) for batch in empty] == index.tolist()
