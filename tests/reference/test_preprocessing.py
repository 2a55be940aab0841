"""Crops, resizing and color of the reference program, against its recorded arrays."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from localagg.config import ViewConfig
from localagg.data.images.augment import (
    color_jitter,
    view_draws,
    view_uniforms,
)
from localagg.data.images.crops import Boxes, crop_boxes, evaluation_boxes
from localagg.data.images.reference_views import (
    JITTER,
    area_means,
    brightness,
    contrast,
    grayscale,
    hue,
    resample,
    saturation,
)
from localagg.data.loading.cropping import evaluation_batches
from localagg.data.sources.open import open_images
from localagg.models import create_encoder

pytestmark = pytest.mark.reference
REFERENCE = ViewConfig(image_size=224, eval_crop=0.875, augmentation="reference")
ALEXNET = ViewConfig(image_size=224, crop="fixed", augmentation="reference")


@pytest.fixture(scope="module")
def folder(fixtures):
    return fixtures / "preprocessing"


def load(path):
    with np.load(path) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


def channels_first(images):
    return images.movedim(-1, -3)


# --- Boxes ----------------------------------------------------------------------------------------


def test_center_and_ten_crop_boxes_are_exact_on_every_size(folder):
    recorded = load(folder / "crop_boxes.npz")
    height, width = recorded["size_hw"].T
    boxes = evaluation_boxes(REFERENCE, height, width, ten_crop=True)
    found = torch.stack([torch.stack(box, dim=1) for box in boxes], dim=1).int()
    assert len(found) == 401
    assert torch.equal(found, recorded["ten_crop"])
    assert torch.equal(found[:, 0], recorded["center"])
    single = evaluation_boxes(REFERENCE, height, width)[0]
    assert torch.equal(torch.stack(single, dim=1).int(), recorded["center"])


def test_alexnet_crops_span_the_recorded_ranges(folder):
    recorded = load(folder / "crop_boxes.npz")
    height, width = recorded["size_hw"].T
    top_first, top_end, left_first, left_end, *size = recorded["alexnet_random"].T
    for u, top, left in (
        (0.0, top_first, left_first),
        (1 - 2**-53, top_end - 1, left_end - 1),  # the largest draw
    ):
        crop = torch.full((len(height), 1, 4), u, dtype=torch.float64)
        found = torch.stack(crop_boxes(ALEXNET, crop, height, width), dim=1).int()
        assert torch.equal(found, torch.stack([top, left, *size], dim=1))


def test_alexnet_crops_are_uniform_over_their_range():
    crop = view_draws(ALEXNET, view_uniforms(0, 0, torch.arange(20_000))).crop
    boxes = crop_boxes(ALEXNET, crop, torch.tensor(69), torch.tensor(761))
    for start, first, count in ((boxes.top, 0, 10), (boxes.left, 346, 10)):
        counts = (start.int() - first).bincount(minlength=count)
        assert len(counts) == count
        low, high = binom.interval(1 - 1e-6, 20_000, 1 / count)
        assert ((counts >= low) & (counts <= high)).all()


# --- Pixels ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded_views(folder):
    """{image: (ten views, their widths compared)} of the accurate decoder, uint8 [10, 3, S, S]."""
    found = {}
    for name in json.loads((folder / "images.json").read_text()):
        arrays = load(folder / f"{name}.npz")
        five = torch.cat([arrays["center_accurate"][None], arrays["corners_accurate"]])
        five = channels_first(five)
        found[name] = torch.cat([five, five.flip(3)])
    return found


def test_center_and_ten_crops_are_the_recorded_pixels(folder, recorded_views):
    """The columns at the edge that the fixtures' README names are not left out, but allowed 3."""
    source = open_images(folder / "jpeg")
    centers = {source.name(i): image for b in evaluation_batches(source, REFERENCE, batch=2)
               for i, image in zip(b.index.tolist(), b.images, strict=True)}  # fmt: skip
    batches = evaluation_batches(source, REFERENCE, batch=2, ten_crop=True)
    seen = 0
    for batch in batches:
        for i, found in zip(batch.index.tolist(), batch.images, strict=True):
            name = source.name(i)
            expected = recorded_views[name.split("/")[-1].removesuffix(".JPEG")]
            assert found.shape == (10, 3, 224, 224)
            assert found.dtype == torch.uint8
            difference = (found.int() - expected.int()).abs()
            assert difference.max() <= 3
            assert difference.float().mean(dim=(1, 2, 3)).max() <= 1
            assert not difference[..., 3:-3].any()  # the README's columns are the outer three
            assert torch.equal(centers[name], found[0])
            seen += 1
    assert seen == 3


@pytest.mark.parametrize("number", range(4))
def test_area_resize(folder, number):
    recorded = load(folder / "resize_area.npz")
    image = channels_first(recorded[f"input_{number}"])[None]
    expected = channels_first(recorded[f"float_output_{number}"])
    whole = Boxes(*(torch.tensor([float(side)]) for side in (0, 0, *image.shape[2:])))
    size = expected.shape[1]
    assert torch.equal(area_means(image, whole, size)[0], expected)
    truncated = channels_first(recorded[f"output_{number}"])
    assert torch.equal(resample(image, whole, size)[0].to(torch.uint8), truncated)


# --- Color ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def color(folder):
    arrays = load(folder / "colour_ops.npz")
    return arrays | {"images": channels_first(arrays["input"]).float()}


@pytest.mark.parametrize(
    ("name", "factors", "operation"),
    [
        ("RandomBrightness", "factors", brightness),
        ("RandomSaturation", "factors", saturation),
        ("RandomContrast", "factors", contrast),
        ("hue", "hue_deltas", hue),
    ],
)
def test_color_operations(color, name, factors, operation):
    for number, factor in enumerate(color[factors]):
        found = operation(color["images"], factor.expand(4))
        assert torch.equal(found, channels_first(color[name][:, number]).float())


def test_gray(color):
    gray = grayscale(color["images"])
    assert torch.equal(gray, channels_first(color["gray"]))
    below = channels_first(color["ApplyGray_draw0.19"])
    assert torch.equal(gray.expand(-1, 3, -1, -1), below.float())
    assert torch.equal(color["ApplyGray_draw0.21"], color["input"])


def test_color_jitter_in_the_drawn_order(color):
    ours = torch.tensor([2, 0, 3, 1])  # their numbers, saturation first, as places in our order
    for number in range(4):
        order = ours[color["jitter_order"][number].long()].expand(4, -1)
        factors = torch.empty(4, 4)
        factors[:, ours] = color["jitter_params_sat_bri_hue_con"][number]
        images = color["images"].clone()
        found = color_jitter(images, factors, order, REFERENCE.jitter, JITTER)
        assert torch.equal(found, channels_first(color["ColorJitter"][:, number]).float())


def test_color_normalization_is_the_encoders(color):
    encoder = create_encoder("resnet18_small")
    normalized = (color["images"] / 255 - encoder.mean) / encoder.std
    expected = channels_first(color["ColorNormalize"])
    assert (normalized[..., ::8, ::8] - expected).abs().max() < 1e-6


# --- The distribution of training crops -----------------------------------------------------------

DRAWS, OURS = 20_000, 100_000
SIZES = ("375x500", "500x333", "120x411")
QUANTITIES = ("area_fraction", "aspect", "height", "width", "y_centre", "x_centre")
# Two empirical distributions of one law are farther apart than this with probability below 1e-3
# over all comparisons together: the two-sample Kolmogorov-Smirnov bound, divided by their number.
LEVEL = 1e-3 / (len(SIZES) * len(QUANTITIES))
BAND = math.sqrt(-math.log(LEVEL / 2) / 2 * (1 / DRAWS + 1 / OURS))


def drawn(config, size):
    height, width = (int(side) for side in size.split("x"))
    crop = view_draws(config, view_uniforms(0, 0, torch.arange(OURS))).crop
    b = crop_boxes(config, crop, torch.tensor(height), torch.tensor(width))
    found = {
        "area_fraction": b.height * b.width / (height * width),
        "aspect": b.width / b.height,
        "height": b.height,
        "width": b.width,
        "y_centre": (b.top + b.height / 2) / height,
        "x_centre": (b.left + b.width / 2) / width,
    }
    return found, (b.height == height) & (b.width == width)


def distance(values, quantiles, levels):
    """How far the distribution of ``values`` is from passing through the quantiles.

    A quantile q at level p says F(q-) <= p <= F(q); what these miss is the distance. 1e-6 relative
    allows for the quantiles' float32.
    """
    values = values.sort().values
    quantiles = quantiles.double()
    below = torch.searchsorted(values, quantiles * (1 - 1e-6)) / len(values)
    up_to = torch.searchsorted(values, quantiles * (1 + 1e-6), right=True) / len(values)
    return torch.maximum(below - levels, levels - up_to).max().item()


@pytest.mark.parametrize("size", SIZES)
def test_training_crops_are_distributed_as_recorded(folder, size):
    recorded = load(folder / "random_crop_distribution.npz")
    assert int(recorded["draws"]) == DRAWS
    values, _ = drawn(REFERENCE, size)
    for name in QUANTITIES:
        quantiles = recorded[f"{size}_{name}_quantiles"]
        assert distance(values[name], quantiles, recorded["quantile_levels"]) < BAND, name


@pytest.mark.parametrize("size", SIZES)
def test_torchvisions_crops_would_fail_that_test(folder, size):
    recorded = load(folder / "random_crop_distribution.npz")
    values, _ = drawn(ViewConfig(image_size=224), size)
    distances = [
        distance(values[name], recorded[f"{size}_{name}_quantiles"], recorded["quantile_levels"])
        for name in QUANTITIES
    ]
    assert max(distances) > 2 * BAND
