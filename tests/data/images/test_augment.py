"""Batched views against torchvision, image by image, with its random draws replaced by ours."""

import itertools
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as V
from scipy.stats import binom, chisquare, ks_2samp
from torchvision.transforms import v2

from localagg.config import ViewConfig
from localagg.data.images.augment import (
    Augment,
    ViewDraws,
    brightness,
    color_jitter,
    contrast,
    evaluation_view,
    hue,
    random_views,
    resample,
    saturation,
    view_draws,
    view_uniforms,
)
from localagg.data.images.crops import Boxes, crop_boxes

CONFIG = ViewConfig(image_size=32, eval_crop=0.875)


@pytest.mark.parametrize("size", [16, 48, 61])
def test_crops_are_torchvisions(images, size):
    index = torch.arange(12)
    views = images.float() / 255
    boxes = crop_boxes(
        CONFIG,
        view_draws(CONFIG, view_uniforms(0, 0, index)).crop,
        torch.tensor(48),
        torch.tensor(48),
    )
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


def test_gray_views_skip_saturation_and_hue(images):
    """Which would change nothing but their rounding: to the bit, they are not applied."""
    index = torch.arange(12)
    draws = view_draws(replace(CONFIG, gray=0.5), view_uniforms(0, 0, index))
    views = random_views(images, draws, CONFIG)
    assert 0 < draws.gray.sum() < 12
    assert (views.amax(dim=1) - views.amin(dim=1)).amax(dim=(1, 2))[draws.gray].max() == 0
    plain = random_views(images, draws, replace(CONFIG, jitter=(0.4, 0.4, 0.0, 0.0)))
    assert [torch.equal(*pair) for pair in zip(views, plain, strict=True)] == draws.gray.tolist()
    for i in range(12):  # the same bits in any company
        alone = ViewDraws(*(drawn[i : i + 1] for drawn in draws))
        assert torch.equal(random_views(images[i : i + 1], alone, CONFIG)[0], views[i])


# --- Whole views with forced parameters -----------------------------------------------------------

ORDERS = list(itertools.permutations(range(4)))


def forced(count):
    """Parameters of ``count`` views that meet every order, extreme and ordinary factors, with and
    without gray and mirror, and crops from a fifth of the image to the whole."""
    drawn = view_draws(CONFIG, view_uniforms(7, 0, torch.arange(count)))
    factors = drawn.factors.clone()
    factors[::3, :3] = torch.tensor([0.6, 1.4, 1.4])
    factors[1::3, :3] = torch.tensor([1.4, 0.6, 0.6])
    factors[::4, 3] = torch.tensor([-0.4, 0.4]).repeat(count)[: len(factors[::4])]
    crop = drawn.crop.clone()
    crop[::5, :, 0] = 0.0
    return ViewDraws(
        crop=crop,
        gray=torch.arange(count) % 6 == 0,
        flip=torch.arange(count) % 2 == 0,
        factors=factors,
        order=torch.tensor(ORDERS).repeat(count // 24 + 1, 1)[:count],
    )


def oracle_view(image, box, chosen, i, size):
    """One view of an image in 0-1, by torchvision's functions, one after the other."""
    view = V.resized_crop(image, *(int(side[i]) for side in box), [size, size], antialias=True)
    view = V.rgb_to_grayscale(view, num_output_channels=3) if chosen.gray[i] else view
    names = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    for number in chosen.order[i].tolist():
        view = names[number](view, float(chosen.factors[i, number]))
    return V.hflip(view) if chosen.flip[i] else view


@pytest.mark.parametrize("size", [32, 112])
@pytest.mark.parametrize("cropped", [False, True])
def test_forced_views_are_torchvisions_to_a_level(images, size, cropped):
    """Views of 112 pixels are made one at a time, those of 32 in chunks."""
    count = 48
    draws, config = forced(count), ViewConfig(image_size=size)
    many = images.repeat(4, 1, 1, 1)
    box = crop_boxes(config, draws.crop, torch.tensor(48), torch.tensor(48))
    if cropped:  # uint8, by workers
        many = torch.stack([
            V.resized_crop(
                image, *(int(side[i]) for side in box), size=[size, size], antialias=True
            )
            for i, image in enumerate(many)
        ])  # fmt: skip
        box = Boxes(*(torch.tensor([side] * count) for side in (0, 0, size, size)))
    found = random_views(many, draws, config, cropped=cropped)
    for i in range(count):
        expected = oracle_view(many[i].float() / 255, box, draws, i, size)
        assert ((found[i] - expected).abs() * 255).max() < 0.1
        levels = [(view * 255).round() for view in (found[i], expected)]
        assert (levels[0] - levels[1]).abs().max() <= 1


@pytest.mark.parametrize(("alone", "chunk"), [(1, 1), (2**30, 2**30), (2**30, 7 * 3 * 32 * 32)])
def test_views_do_not_depend_on_the_chunks_of_a_batch(images, alone, chunk):
    index = torch.arange(12)
    draws = view_draws(CONFIG, view_uniforms(3, 5, index))
    found = random_views(images, draws, CONFIG, alone_above=alone, chunk_values=chunk)
    torch.testing.assert_close(found, Augment(CONFIG, 3)(images, 5, index), atol=2e-6, rtol=0)


# --- Distributions --------------------------------------------------------------------------------

DRAWS = 10_000
SHAPES = [(48, 48), (40, 120), (400, 20)]
# All comparisons below together err with probability 1e-3: two-sample Kolmogorov-Smirnov for the 7
# quantities of crops of each shape and for the 4 factors, binomial intervals for the two rates,
# chi-square for the 24 orders.
LEVEL = 1e-3 / (7 * len(SHAPES) + 4 + 2 + 1)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_crops_are_distributed_as_torchvisions(height, width):
    crop = view_draws(CONFIG, view_uniforms(0, 0, torch.arange(DRAWS))).crop
    ours = torch.stack(crop_boxes(CONFIG, crop, torch.tensor(height), torch.tensor(width)), dim=1)
    torch.manual_seed(0)
    oracle = v2.RandomResizedCrop(32, scale=CONFIG.crop_area, ratio=CONFIG.crop_aspect)
    blank = torch.empty(3, height, width)
    drawn = [oracle.make_params([blank]) for _ in range(DRAWS)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])

    def quantities(boxes):
        top, left, h, w = boxes.double().T
        return {"area": h * w, "aspect": w / h, "top": top, "left": left, "height": h,
                "y": top + h / 2, "x": left + w / 2}  # fmt: skip

    found, expected = quantities(ours), quantities(theirs)
    for name in found:
        assert ks_2samp(found[name], expected[name]).pvalue > LEVEL, name


def test_jitter_factors_and_orders_are_distributed_as_torchvisions():
    strengths = (0.4, 0.3, 0.2, 0.1)
    chosen = view_draws(
        ViewConfig(image_size=32, jitter=strengths), view_uniforms(1, 2, torch.arange(DRAWS))
    )
    torch.manual_seed(0)
    oracle = v2.ColorJitter(*strengths)
    drawn = [oracle.make_params([]) for _ in range(DRAWS)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for number, name in enumerate(names):
        theirs = [float(params[name]) for params in drawn]
        assert ks_2samp(chosen.factors[:, number], theirs).pvalue > LEVEL, name
    counts = [int((chosen.order == torch.tensor(order)).all(dim=1).sum()) for order in ORDERS]
    assert sum(counts) == DRAWS
    assert chisquare(counts).pvalue > LEVEL


def test_gray_and_mirror_rates_are_as_asked():
    chosen = view_draws(
        ViewConfig(image_size=32, gray=0.2, flip=0.5), view_uniforms(1, 2, torch.arange(DRAWS))
    )
    for found, rate in ((chosen.gray, 0.2), (chosen.flip, 0.5)):
        low, high = binom.interval(1 - LEVEL, DRAWS, rate)
        assert low <= int(found.sum()) <= high


def test_the_draws_of_a_view_are_uncorrelated():
    """Correlations of all pairs of draws; the largest of 1,225 exceeds 5.2 deviations once in
    4,000 times."""
    chosen = view_draws(CONFIG, view_uniforms(4, 1, torch.arange(DRAWS)))
    columns = [chosen.crop.flatten(1), chosen.gray.view(-1, 1), chosen.flip.view(-1, 1),
               chosen.factors, chosen.order.argsort(dim=1)]  # fmt: skip
    table = torch.cat([column.double() for column in columns], dim=1)
    related = torch.corrcoef(table.T).fill_diagonal_(0)
    related[-4:, -4:] = 0  # the places of four operations are a permutation
    assert related.abs().max() < 5.2 / DRAWS**0.5


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
