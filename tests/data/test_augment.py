"""Batched views against torchvision, image by image, with its random draws replaced by ours."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as V
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from localagg.config import ViewConfig
from localagg.data.augment import (
    Augment,
    Boxes,
    brightness,
    central_boxes,
    color_jitter,
    contrast,
    crop_boxes,
    draw,
    evaluation_view,
    hue,
    resample,
    saturation,
)
from localagg.data.decode import decode
from localagg.data.sources import open_images

CONFIG = ViewConfig(image_size=32, eval_crop=0.875)


@pytest.fixture(scope="module")
def images(pictures):
    """Photographs uint8 [12, 3, 48, 48]."""
    source = open_images(pictures)
    return torch.stack([V.resize(decode(source[i].image), [48, 48]) for i in range(12)])


@pytest.mark.parametrize("size", [16, 48, 61])
def test_crops_are_torchvisions(images, size):
    index = torch.arange(12)
    views = images.float() / 255
    boxes = crop_boxes(CONFIG, draw(CONFIG, 0, 0, index).crop, torch.tensor(48), torch.tensor(48))
    flip = index % 3 == 0
    found = resample(views, boxes, size, flip)
    for i in range(12):
        top, left, height, width = (int(value[i]) for value in boxes)
        expected = V.resized_crop(views[i], top, left, height, width, [size, size], antialias=True)
        expected = V.hflip(expected) if flip[i] else expected
        torch.testing.assert_close(found[i], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (brightness, V.adjust_brightness, [0.0, 0.6, 1.0, 1.4]),
        (contrast, V.adjust_contrast, [0.0, 0.6, 1.0, 1.4]),
        (saturation, V.adjust_saturation, [0.0, 0.6, 1.0, 1.4]),
        (hue, V.adjust_hue, [-0.5, -0.13, 0.0, 0.31]),
    ],
)
def test_color_operations_are_torchvisions(images, ours, theirs, factors):
    views = images[: len(factors)].float() / 255
    views[:, :, :8] = torch.rand(3, 1, 1)  # flat colors
    views[:, :, 8:12] = 0.4  # and gray, whose hue is undefined
    found = ours(views.clone(), torch.tensor(factors))
    for i, factor in enumerate(factors):
        torch.testing.assert_close(found[i], theirs(views[i], factor), atol=1e-4, rtol=0)


def test_each_sample_has_its_own_order_of_jitter(images):
    views = images[:3].float() / 255
    factors = torch.tensor([[0.7, 1.3, 0.6, 0.2]]).expand(3, -1)
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
    found = color_jitter(views.clone(), factors, order, (0.4, 0.4, 0.4, 0.4))
    operations = [
        lambda x: V.adjust_brightness(x, 0.7),
        lambda x: V.adjust_contrast(x, 1.3),
        lambda x: V.adjust_saturation(x, 0.6),
        lambda x: V.adjust_hue(x, 0.2),
    ]
    for i in range(3):
        expected = views[i]
        for number in order[i].tolist():
            expected = operations[number](expected)
        torch.testing.assert_close(found[i], expected, atol=2e-4, rtol=0)
    untouched = color_jitter(views.clone(), factors, order, (0.0, 0.0, 0.0, 0.0))
    assert torch.equal(untouched, views)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 120), (400, 20)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    count = 4000
    crop = draw(CONFIG, 0, 0, torch.arange(count)).crop
    ours = torch.stack(crop_boxes(CONFIG, crop, torch.tensor(height), torch.tensor(width)), dim=1)
    torch.manual_seed(0)
    oracle = v2.RandomResizedCrop(32, scale=CONFIG.crop_area, ratio=CONFIG.crop_aspect)
    blank = torch.empty(3, height, width)
    drawn = [oracle.make_params([blank]) for _ in range(count)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    area = [(o[:, 2] * o[:, 3]).double() for o in (ours, theirs)]
    assert ks_2samp(*area).pvalue > 1e-3


def test_rates_and_strengths_are_as_asked():
    config = ViewConfig(image_size=32, gray=0.2, flip=0.5, jitter=(0.4, 0.3, 0.2, 0.1))
    chosen = draw(config, 1, 2, torch.arange(20_000))
    assert chosen.gray.double().mean() == pytest.approx(0.2, abs=0.012)
    assert chosen.flip.double().mean() == pytest.approx(0.5, abs=0.015)
    for number, (center, strength) in enumerate(zip((1, 1, 1, 0), config.jitter, strict=True)):
        column = chosen.factors[:, number]
        assert column.min() >= center - strength - 1e-6
        assert column.max() <= center + strength + 1e-6
        assert column.std() == pytest.approx(2 * strength / math.sqrt(12), rel=0.03)
    first = chosen.order[:, 0].bincount() / 20_000
    torch.testing.assert_close(first, torch.full((4,), 0.25), atol=0.015, rtol=0)


def test_a_view_depends_on_seed_epoch_and_index_alone(images):
    augment, index = Augment(CONFIG, seed=3), torch.arange(12)
    views = augment(images, 5, index)
    assert views.shape == (12, 3, 32, 32)
    assert views.min() >= 0
    assert views.max() <= 1
    few = augment(images[[7, 2]], 5, torch.tensor([7, 2]))
    torch.testing.assert_close(few, views[[7, 2]], atol=1e-6, rtol=0)
    assert not torch.equal(augment(images, 6, index), views)
    assert not torch.equal(Augment(CONFIG, seed=4)(images, 5, index), views)


def test_gray_makes_gray_and_zero_switches_everything_off(images):
    gray = Augment(ViewConfig(image_size=32, gray=1.0, jitter=(0, 0, 0, 0)), 0)
    views = gray(images, 0, torch.arange(12))
    torch.testing.assert_close(views[:, 0], views[:, 2])
    off = ViewConfig(
        image_size=48, crop_area=(1, 1), crop_aspect=(1, 1), gray=0, jitter=(0, 0, 0, 0), flip=0
    )
    torch.testing.assert_close(Augment(off, 0)(images, 0, torch.arange(12)), images / 255)


def test_the_measured_view_is_the_resized_center(images):
    found = evaluation_view(images, CONFIG)
    expected = V.resize(V.center_crop(images / 255, [42, 42]), [32, 32], antialias=True)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    whole = evaluation_view(images, ViewConfig(image_size=48, eval_crop=1.0))
    assert torch.equal(whole, images.float() / 255)
    assert [float(v) for v in central_boxes(0.5, torch.tensor(10.0), torch.tensor(21.0))] == [
        2.0, 8.0, 5.0, 5.0,
    ]  # fmt: skip
    assert Boxes._fields == ("top", "left", "height", "width")
