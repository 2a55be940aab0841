"""The reference's formulas against plain loops, colorsys, and themselves on other batches."""

import colorsys
import itertools

import numpy as np
import pytest
import torch

from localagg.config import ViewConfig, override
from localagg.data.images.augment import (
    Augment,
    evaluation_view,
    random_views,
    ten_crop_views,
    view_draws,
    view_uniforms,
)
from localagg.data.images.crops import Boxes, crop_boxes
from localagg.data.images.reference_views import (
    area_means,
    brightness,
    contrast,
    grayscale,
    hue,
    resample,
    saturation,
)

CONFIG = ViewConfig(image_size=32, eval_crop=0.875, augmentation="reference")


def naive_area(image, size):
    """Mean over the source under each output pixel, in float64."""
    channels, height, width = image.shape
    means = np.zeros((channels, size, size))

    def covered(length):
        edges = np.linspace(0, length, size + 1)
        pixel = np.arange(length)
        share = np.minimum(pixel + 1, edges[1:, None]) - np.maximum(pixel, edges[:-1, None])
        return share.clip(0) * size / length

    rows, columns = covered(height), covered(width)
    for channel in range(channels):
        means[channel] = rows @ image[channel].astype(np.float64) @ columns.T
    return means


BOXES = Boxes(*(torch.tensor(side) for side in ([0, 3, 9], [0, 11, 2], [48, 40, 7], [48, 29, 39])))


@pytest.mark.parametrize("size", [5, 16, 48, 61])
def test_area_resize_is_the_mean_of_what_lies_under_a_pixel(images, size):
    found = area_means(images[:3], BOXES, size)
    for i in range(3):
        top, left, h, w = (int(side[i]) for side in BOXES)
        image = images[i, :, top : top + h, left : left + w].numpy()
        # Positions up to 48 in single precision, relative to weights of at least 7 / 61.
        bound = 255 * 48 * 2**-24 / (7 / 61)
        assert np.abs(found[i].numpy() - naive_area(image, size)).max() < bound


@pytest.mark.parametrize("size", [5, 16, 48, 61])
def test_resized_crops_do_not_depend_on_the_batch(images, size):
    """Boxes of their own and a box for all go different ways to the same pixels."""
    together = resample(images[:3], BOXES, size)
    shared = Boxes(*(side[:1].expand(3) for side in BOXES))
    alike = resample(images[:3], shared, size)
    for i in range(3):
        own = Boxes(*(side[i : i + 1] for side in BOXES))
        assert torch.equal(together[i], resample(images[i : i + 1], own, size)[0])
        first = Boxes(*(side[:1] for side in BOXES))
        assert torch.equal(alike[i], resample(images[i : i + 1], first, size)[0])
    assert torch.equal(together, together.floor())


def single(value):
    return np.float32(value)


def naive_gray(pixel):
    """One pixel's luma, each step in single precision."""
    red, green, blue = (single(value) for value in pixel)
    return int(single(0.299) * red + single(0.587) * green + single(0.114) * blue + single(1e-6))


def blend(pixel, other, factor):
    factor = single(factor)
    mixed = (single(value) * factor + single(other) * (1 - factor) for value in pixel)
    return [int(min(max(value, single(0)), single(255)) + single(1e-6)) for value in mixed]


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3])
def test_blends_are_those_of_a_loop_over_pixels(images, factor):
    small = images[:3, :, ::5, ::5].float()
    factors = torch.tensor([1.0, factor, 0.8])
    found = {f.__name__: f(small, factors)[1] for f in (brightness, saturation, contrast)}
    gray = grayscale(small)[1, 0]
    mean = int(np.mean([naive_gray(small[1, :, y, x]) for y in range(10) for x in range(10)]))
    for y in range(10):
        for x in range(10):
            pixel = small[1, :, y, x].tolist()
            assert gray[y, x] == naive_gray(pixel)
            assert found["brightness"][:, y, x].tolist() == blend(pixel, 0, factor)
            assert found["saturation"][:, y, x].tolist() == blend(pixel, gray[y, x], factor)
            assert found["contrast"][:, y, x].tolist() == blend(pixel, mean, factor)


def test_no_turn_of_the_hue_changes_no_level():
    levels = torch.arange(256.0)
    images = torch.stack([levels, levels.flip(0), levels.roll(99)]).view(1, 3, 16, 16)
    assert torch.equal(hue(images, torch.zeros(1)), images)
    gray = levels.view(1, 1, 16, 16).expand(-1, 3, -1, -1)
    assert torch.equal(hue(gray, torch.tensor([0.3])), gray)


@pytest.mark.parametrize("turns", [-0.5, -0.13, 0.0, 0.31, 0.4])
def test_hue_is_colorsyss(images, turns):
    small = images[:2, :, ::6, ::6].float()
    small[0, :, 0] = torch.tensor([[0.0], [128], [255]])  # pure colors and gray
    small[0, :, 1] = 77.0
    found = hue(small, torch.tensor([turns, 0.2]))[0]
    for y in range(8):
        for x in range(8):
            h, s, v = colorsys.rgb_to_hsv(*(small[0, :, y, x] / 255).tolist())
            exact = 255.5 * torch.tensor(colorsys.hsv_to_rgb((h + turns) % 1, s, v))
            on_the_edge = (exact - exact.round()).abs() < 1e-3  # single precision decides
            assert ((found[:, y, x] == exact.floor()) | on_the_edge).all()
            assert (found[:, y, x] - exact).abs().max() < 1.01


def test_views_are_whole_levels_and_do_not_depend_on_the_batch(images):
    augment, index = Augment(CONFIG, seed=3), torch.arange(12)
    views = augment(images, 5, index)
    assert views.shape == (12, 3, 32, 32)
    assert views.dtype == torch.float32
    assert ((views * 255) - (views * 255).round()).abs().max() < 1e-4
    few = augment(images[[7, 2]], 5, torch.tensor([7, 2]))
    assert torch.equal(few, views[[7, 2]])
    assert not torch.equal(augment(images, 6, index), views)


def test_both_kinds_of_views_are_alike_but_not_the_same(images):
    """Same draws of color and mirror on the same central crop."""
    index = torch.arange(12)
    center = override(CONFIG, crop="center", jitter=(0.4, 0.4, 0.4, 0.1))
    ours = Augment(center, 0)(images, 0, index)
    theirs = Augment(override(center, augmentation="torchvision"), 0)(images, 0, index)
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).abs().mean() < 0.02


def test_zero_switches_everything_off(images):
    off = override(CONFIG, crop="center", gray=0.0, jitter=(0.0, 0.0, 0.0, 0.0), flip=0.0)
    views = Augment(off, 0)(images, 0, torch.arange(12))
    assert torch.equal(views, evaluation_view(images, off))
    mirrored = Augment(override(off, flip=1.0), 0)(images, 0, torch.arange(12))
    assert torch.equal(mirrored, views.flip(3))
    gray = Augment(override(off, gray=1.0), 0)(images, 0, torch.arange(12))
    assert torch.equal(gray[:, 0], gray[:, 2])
    assert torch.equal((gray[:, :1] * 255).round(), grayscale((views * 255).round()))


def test_forced_views_are_the_formulas_one_after_the_other(images):
    """Every order of the jitter, each image alone: none of 24 views differs by a level."""
    orders = torch.tensor(list(itertools.permutations(range(4))))
    drawn = view_draws(CONFIG, view_uniforms(0, 0, torch.arange(24)))
    chosen = drawn._replace(
        gray=torch.arange(24) % 5 == 0, flip=torch.arange(24) % 2 == 0, order=orders
    )
    many = images.repeat(2, 1, 1, 1)
    found = random_views(many, chosen, CONFIG) * 255
    box = crop_boxes(CONFIG, chosen.crop, torch.tensor(48), torch.tensor(48))
    for i in range(24):
        view = resample(many[i : i + 1], Boxes(*(side[i : i + 1] for side in box)), 32)
        view = grayscale(view).expand(-1, 3, -1, -1) if chosen.gray[i] else view
        for number in orders[i].tolist():
            operation = (brightness, contrast, saturation, hue)[number]
            view = operation(view, chosen.factors[i : i + 1, number])
        view = view.flip(3) if chosen.flip[i] else view
        assert torch.equal(found[i].round(), view[0])


@pytest.mark.parametrize("augmentation", ["torchvision", "reference"])
def test_ten_crops_are_center_corners_and_their_mirrors(images, augmentation):
    config = override(CONFIG, augmentation=augmentation, image_size=42)  # 42 = 7/8 of 48
    views = ten_crop_views(images, config) * 255
    corners = [images[:, :, y : y + 42, x : x + 42] for y in (0, 6) for x in (0, 6)]
    five = torch.stack([images[:, :, 3:45, 3:45], *corners], dim=1)
    expected = torch.cat([five, five.flip(4)], dim=1).float()
    torch.testing.assert_close(views, expected, atol=2e-4, rtol=0)
    smaller = override(config, image_size=20)
    assert torch.equal(ten_crop_views(images, smaller)[:, 0], evaluation_view(images, smaller))
