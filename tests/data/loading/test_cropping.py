"""What workers make of a batch, against the same made image by image."""

import io

import pytest
import torch
import torchvision.transforms.v2.functional as V
from PIL import Image, ImageOps

from localagg.config import ViewConfig, override
from localagg.data.images.augment import Augment, view_draws, view_uniforms
from localagg.data.images.crops import crop_boxes
from localagg.data.images.decode import decode
from localagg.data.loading.cropping import EvaluationCrops, TrainingCrops
from localagg.data.loading.loader import Feed
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

    def name(self, index):
        return f"image {index}"


@pytest.fixture(scope="module")
def source(pictures):
    """48 photographs of six sizes, PNG and JPEG."""
    return open_images(pictures)


def test_crops_are_cut_where_the_draws_say(source):
    chunks = [torch.tensor([5, 0, 17]), torch.tensor([30])]
    crops = TrainingCrops(source, VIEWS, 3, 2, chunks)
    for step, chunk in enumerate(chunks):
        (index, images, _), failed = crops[step]
        assert index.tolist() == chunk.tolist()
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
    views = override(VIEWS, augmentation=augmentation)
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
    damaged = [*whole, whole[1][:200], b"", whole[0][: len(whole[0]) // 2]]
    chunk = torch.tensor([6, 0, 4, 3, 5])
    for dataset in (
        TrainingCrops(Listed(damaged), VIEWS, 0, 0, [chunk]),
        EvaluationCrops(Listed(damaged), VIEWS, [chunk], ten_crop=False),
    ):
        (index, images, *_), failed = dataset[0]
        assert index.tolist() == [0, 3]
        assert len(images) == 2
        assert sorted(failed) == [4, 5, 6]
        assert failed[5] == "empty file"
    (index, images, _), failed = TrainingCrops(
        Listed(damaged), VIEWS, 0, 0, [torch.tensor([4, 5])]
    )[0]
    assert (len(index), images.shape, len(failed)) == (0, (0, 3, 24, 24), 2)


def test_decoded_sources_take_the_same_path(source):
    encoded = [source[i].image for i in range(3)]
    index = torch.arange(3)
    found = TrainingCrops(Listed([decode(data) for data in encoded]), VIEWS, 0, 0, [index])[0]
    expected = TrainingCrops(Listed(encoded), VIEWS, 0, 0, [index])[0]
    assert torch.equal(found[0].images, expected[0].images)


def test_images_are_turned_upright_where_asked(source):
    image = Image.open(io.BytesIO(source[1].image)).convert("RGB").resize((64, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, upright = io.BytesIO(), io.BytesIO()
    image.save(turned, "PNG", exif=exif)
    ImageOps.exif_transpose(Image.open(turned)).save(upright, "PNG")
    sources = [Listed([data.getvalue()]) for data in (turned, upright)]
    asked = override(VIEWS, exif_orientation=True)
    one = torch.tensor([0])
    for make in (
        lambda source, views: TrainingCrops(source, views, 0, 0, [one])[0][0].images,
        lambda source, views: EvaluationCrops(source, views, [one], ten_crop=True)[0][0].images,
        lambda source, views: Feed(source, views, batch_size=1, memory="always").pixels,
    ):
        found, expected = make(sources[0], asked), make(sources[1], VIEWS)
        assert torch.equal(found, expected)
        plain = make(sources[0], VIEWS)
        assert plain.shape != expected.shape or not torch.equal(plain, expected)
