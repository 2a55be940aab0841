import io

import numpy as np
import pytest
import torch
from PIL import Image

from localagg.report import thumbnails
from localagg.report.thumbnails import SIDES, draw_thumbnails


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tile(found, number):
    """Pixels of a thumbnail, without the rest of its tile."""
    columns = 1024 // found.side
    sheet = np.array(Image.open(io.BytesIO(found.sheets[number // columns**2])))
    row, column = divmod(number % columns**2, columns)
    width, height = found.sizes[number].tolist()
    top, left = row * found.side, column * found.side
    return sheet[top : top + height, left : left + width]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_thumbnail_is_whole_and_upright(kind):
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, :60, 0] = 255  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: shown with the left side up
    turned = encoded(Image.fromarray(pixels), kind, exif=exif)
    found = draw_thumbnails([turned], 100_000)
    assert found.side == SIDES[0]
    assert found.sizes.tolist() == [[60, 120]]
    shown = tile(found, 0).astype(int)
    assert shown[10:50, 3:-3, 0].min() > 200
    assert shown[70:110, 3:-3, 0].max() < 50


def test_thumbnails_are_as_large_as_the_budget_allows():
    draws = np.random.default_rng(0)
    images = [encoded(Image.fromarray(draws.integers(0, 255, (90, 90, 3), np.uint8), "RGB"))] * 20
    sides = [draw_thumbnails(images, budget).side for budget in (10**7, 70_000, 30_000, 10)]
    assert sides == sorted(sides, reverse=True)
    assert sides[0] == SIDES[0]
    assert sides[-1] == SIDES[-1]
    assert sum(map(len, draw_thumbnails(images, 30_000).sheets)) < 33_000


def test_unreadable_images_leave_an_empty_tile():
    red = torch.zeros(3, 40, 40, dtype=torch.uint8)
    red[0] = 250
    cut = encoded(Image.new("RGB", (90, 90), (9, 200, 9)), "JPEG")[:-200]
    gray = encoded(Image.fromarray(np.full((50, 50), 40_000, np.uint16)))
    found = draw_thumbnails([b"", red, cut, b"no image", gray], 10**6)
    assert (found.sizes[:, 0] > 0).tolist() == [False, True, False, False, True]
    assert abs(tile(found, 1).astype(int)[3:-3, 3:-3] - (250, 0, 0)).max() < 12
    assert abs(tile(found, 4).astype(int)[3:-3, 3:-3] - 40_000 // 256).max() < 6


def test_workers_draw_the_same(monkeypatch):
    images = [torch.full((3, 20, 30), i % 250, dtype=torch.uint8) for i in range(1100)]
    alone = draw_thumbnails(images, 10)
    monkeypatch.setattr(thumbnails, "_WORKERS_FROM", 1)
    found = draw_thumbnails(images, 10)
    assert len(found.sheets) == 2
    assert found.sheets == alone.sheets
    assert np.array_equal(found.sizes, alone.sizes)


def test_the_budget_holds_where_the_images_of_the_estimate_are_small():
    draws = np.random.default_rng(0)
    noise = [draws.integers(0, 255, (160, 160, 3), np.uint8) for _ in range(120)]
    for number in np.linspace(0, 119, 48).astype(int):
        noise[number] = np.zeros_like(noise[number])
    images = [encoded(Image.fromarray(pixels)) for pixels in noise]
    found = draw_thumbnails(images, 500_000)
    assert sum(map(len, found.sheets)) <= 500_000
    assert found.side > SIDES[-1]
