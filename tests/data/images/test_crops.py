"""Boxes against scalar loops, torchvision, and what the reference's rules promise."""

import math

import numpy as np
import torch
from scipy.stats import binom, ks_2samp
from torchvision.transforms import v2

from localagg.config import ViewConfig
from localagg.data.images.augment import view_draws, view_uniforms
from localagg.data.images.crops import crop_boxes, evaluation_boxes
from localagg.engine.counter_rng import uniform

SIZES = np.random.RandomState(0).randint(2, 900, size=(300, 2))


def config(**options):
    return ViewConfig(image_size=224, eval_crop=0.875, **options)


def side(height, width):
    """The reference's side of a 224 crop in single precision, one image at a time."""
    scale = np.float32(256) / np.float32(min(height, width))
    return max(1, int(np.float32(224) / scale))


def test_reference_squares_are_truncated_in_single_precision():
    assert side(120, 411) == 104  # 105 in exact arithmetic
    height, width = torch.from_numpy(SIZES).T
    reference = config(augmentation="reference")
    found = evaluation_boxes(reference, height, width, ten_crop=True)
    for i, (H, W) in enumerate(SIZES.tolist()):
        s = side(H, W)
        corners = [(0, 0), (0, W - s), (H - s, 0), (H - s, W - s)]
        for box, (top, left) in zip(found, [((H - s) // 2, (W - s) // 2), *corners], strict=True):
            assert [int(value[i]) for value in box] == [top, left, s, s]


def test_torchvisions_ten_crops_lie_where_its_five_crop_does():
    height, width = torch.tensor([80.0]), torch.tensor([112.0])
    boxes = evaluation_boxes(config(), height, width, ten_crop=True)
    image = torch.arange(80 * 112).view(1, 80, 112)
    *corners, center = v2.functional.five_crop(image, [70, 70])
    for box, expected in zip(boxes, [center, *corners], strict=True):
        top, left, h, w = (int(value) for value in box)
        assert torch.equal(image[:, top : top + h, left : left + w], expected)


def test_fixed_crops_are_torchvisions_random_crop_and_stay_inside():
    count = 4000
    crop = view_draws(config(), view_uniforms(0, 0, torch.arange(count))).crop
    boxes = crop_boxes(config(crop="fixed"), crop, torch.tensor(80), torch.tensor(200))
    assert set(boxes.height.tolist()) == set(boxes.width.tolist()) == {70.0}
    torch.manual_seed(0)
    oracle = v2.RandomCrop(70)
    drawn = [oracle.make_params([torch.empty(3, 80, 200)]) for _ in range(count)]
    for found, name in ((boxes.top, "top"), (boxes.left, "left")):
        assert ks_2samp(found, [params[name] for params in drawn]).pvalue > 1e-3
    assert boxes.left.max() == 130


def test_reference_fixed_crops_stay_in_the_central_square():
    reference = config(crop="fixed", augmentation="reference")
    crop = view_draws(reference, view_uniforms(0, 0, torch.arange(5000))).crop
    boxes = crop_boxes(reference, crop, torch.tensor(80), torch.tensor(200))
    assert set(boxes.height.tolist()) == {70.0}
    assert sorted(set(boxes.top.tolist())) == list(range(11))
    assert sorted(set(boxes.left.tolist())) == list(range(60, 71))


def test_center_crops_are_the_measured_ones():
    for augmentation in ("torchvision", "reference"):
        centered = config(crop="center", augmentation=augmentation)
        height, width = torch.from_numpy(SIZES[:50]).T
        crop = view_draws(centered, view_uniforms(0, 0, torch.arange(50))).crop
        found = crop_boxes(centered, crop, height, width)
        expected = evaluation_boxes(centered, height, width)[0]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def distorted(crop, H, W, area=(0.2, 1.0), aspects=(3 / 4, 4 / 3)):
    """sample_distorted_bounding_box from given draws, in plain Python; None if no try fits."""
    for u_height, u_aspect, u_top, u_left in crop:
        aspect = float(np.float32(aspects[0] + (aspects[1] - aspects[0]) * u_aspect))
        least, most = area[0] * H * W, area[1] * H * W
        height, highest = round(math.sqrt(least / aspect)), round(math.sqrt(most / aspect))
        if round(highest * aspect) > W:
            highest = int((W + 0.5 - 1e-7) / aspect)
            highest -= round(highest * aspect) > W
        highest = min(highest, H)
        height = min(height, highest)
        height += math.floor(u_height * (highest - height + 1))
        if height * round(height * aspect) < least:
            height += 1
        if height * round(height * aspect) > most:
            height -= 1
        width = round(height * aspect)
        fits = least <= height * width <= most
        if fits and 0 < width <= W and 0 < height <= H:
            return math.floor(u_top * (H - height)), math.floor(u_left * (W - width)), height, width
    return None


def test_reference_random_crops_are_those_of_a_scalar_loop():
    reference = config(augmentation="reference")
    crop = view_draws(reference, view_uniforms(0, 0, torch.arange(300))).crop
    height, width = torch.from_numpy(SIZES).T
    found = torch.stack(crop_boxes(reference, crop, height, width), dim=1)
    differ, squares = 0, 0
    for i, (H, W) in enumerate(SIZES.tolist()):
        more = uniform(int(crop[i, 0, 0] * 2**53), count=360).view(90, 4)
        box = distorted(torch.cat([crop[i], more]).tolist(), H, W)
        if box is None:  # a random square of the shorter side
            s = min(H, W)
            u_top, u_left = crop[i, 0, 2:].tolist()
            box = math.floor(u_top * (H - s + 1)), math.floor(u_left * (W - s + 1)), s, s
            squares += 1
        differ += found[i].int().tolist() != list(box)
    assert squares > 10
    assert differ <= 3  # single precision decides the last pixel now and then


def test_an_image_too_long_for_any_crop_gives_squares_anywhere():
    reference = config(augmentation="reference")
    crop = view_draws(reference, view_uniforms(0, 0, torch.arange(4000))).crop
    top, left, height, width = crop_boxes(reference, crop, torch.tensor(400), torch.tensor(20))
    assert set(height.tolist()) == set(width.tolist()) == {20.0}
    assert not left.any()
    counts = (top // 127).int().bincount()
    low, high = binom.interval(1 - 1e-6, 4000, 1 / 3)
    assert len(counts) == 3
    assert ((counts >= low) & (counts <= high)).all()


def test_a_hundred_tries_find_what_ten_do_not():
    """Of a 3:1 image only aspects close to the limit leave a fifth of the area."""
    reference = config(augmentation="reference", crop_area=(0.43, 1.0))
    crop = view_draws(reference, view_uniforms(0, 0, torch.arange(2000))).crop
    boxes = crop_boxes(reference, crop, torch.tensor(100), torch.tensor(300))
    fit = boxes.width > boxes.height
    first = sum(distorted(tries, 100, 300, (0.43, 1.0)) is not None for tries in crop.tolist())
    assert first < 0.75 * len(crop)
    assert fit.float().mean() > 0.9
