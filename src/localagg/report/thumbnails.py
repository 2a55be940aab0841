"""Draw images small onto WebP sheets, as large as a budget of bytes allows."""

import io
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.images.decode import READ_ERRORS, decode, open_image
from ..data.loading.workers import map_in_workers
from ..data.sources.source import Source
from ..io.console import show_progress
from ..io.machine import cores

SIDES = (160, 128, 96, 64, 48, 32)
"""Possible sides of a thumbnail in pixels, the largest that fits the budget is used."""
_SHEET = 1024  # pixels; each side of a sheet is at most this
_QUALITY = 72
_TRIED = 48  # images that the size of all is estimated from
_WORKERS_FROM = 2000  # images; fewer are drawn before workers would have started


class Images(Protocol):
    """Random access to encoded bytes or uint8 pixels [3, H, W]. Picklable."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> bytes | Tensor: ...


class Thumbnails(NamedTuple):
    """Thumbnails of N images, row by row on square sheets."""

    side: int
    """Side of a tile in pixels; a sheet has 1024 // side tiles in a row, and as many rows."""
    sheets: list[bytes]
    """WebP files."""
    sizes: np.ndarray
    """uint8 [N, 2]: width and height within the tile; 0 where the image cannot be read."""


def draw_thumbnails(images: Images, budget: int) -> Thumbnails:
    """Draw all images, upright and whole, in the largest of :data:`SIDES` that fits.

    Args:
        images: the images; unreadable ones get an empty tile.
        budget: bytes that the sheets may take. The smallest side is used however large it is.
    """
    drawn = _draw(images, _fitting_side(images, budget))
    while sum(map(len, drawn.sheets)) > budget and drawn.side > SIDES[-1]:  # a wrong estimate
        drawn = _draw(images, SIDES[SIDES.index(drawn.side) + 1])
    return drawn


def _draw(images: Images, side: int) -> Thumbnails:
    total = len(images)
    tiles = (_SHEET // side) ** 2
    numbers = [range(first, min(first + tiles, total)) for first in range(0, total, tiles)]
    workers = min(cores(), 16) if total >= _WORKERS_FROM else 0
    sheets, sizes = [], [np.zeros((0, 2), np.uint8)]
    with show_progress("drawing thumbnails") as show:
        for sheet, size in map_in_workers(partial(_draw_sheet, images, side), numbers, workers):
            sheets.append(sheet)
            sizes.append(size)
            show(min(len(sheets) * tiles, total), total)
    return Thumbnails(side, sheets, np.concatenate(sizes))


def _fitting_side(images: Images, budget: int) -> int:
    chosen = np.unique(np.linspace(0, len(images) - 1, min(_TRIED, len(images))).astype(int))
    small = [thumbnail(images, int(number), SIDES[0]) for number in chosen]
    for side in SIDES:
        shown = [image.resize(_fit(image.size, side)) for image in small if image is not None]
        sheet, _ = _paste(shown, side)
        if len(sheet) * len(images) <= budget * max(1, len(shown)):
            return side
    return SIDES[-1]


def _draw_sheet(images: Images, side: int, numbers: Sequence[int]) -> tuple[bytes, np.ndarray]:
    return _paste([thumbnail(images, number, side) for number in numbers], side)


def _paste(images: Sequence[Image.Image | None], side: int) -> tuple[bytes, np.ndarray]:
    """Return (WebP file, sizes uint8 [n, 2]) of at most a sheet of images."""
    columns = _SHEET // side
    rows = max(1, -(-len(images) // columns))
    sheet = Image.new("RGB", (min(columns, max(1, len(images))) * side, rows * side), "#888")
    sizes = np.zeros((len(images), 2), np.uint8)
    for number, image in enumerate(images):
        if image is not None:
            sheet.paste(image, (number % columns * side, number // columns * side))
            sizes[number] = image.size
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=_QUALITY, method=3)
    return file.getvalue(), sizes


def thumbnail(images: Images, number: int, side: int) -> Image.Image | None:
    """Return an image fitted into a square, or None if it cannot be read."""
    try:
        data = images[number]
        opened = open_image(data) if isinstance(data, bytes) else None
        if opened is not None and opened.format == "JPEG" and opened.mode in ("RGB", "L"):
            turned = opened.getexif().get(0x0112, 1)
            opened.draft("RGB", (2 * side, 2 * side))  # decodes at a fraction of the size
            image = ImageOps.exif_transpose(opened) if turned != 1 else opened
        else:
            pixels = decode(data, upright=True)
            image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        box = Image.Resampling.BOX if max(image.size) < side else Image.Resampling.LANCZOS
        return image.convert("RGB").resize(_fit(image.size, side), box)
    except (*READ_ERRORS, ValueError, SyntaxError):
        return None


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Scale a size to a longer side of ``side``; small images grow by a whole number."""
    longest = max(size)
    scale = side // longest if longest <= side else side / longest
    width, height = (min(side, max(1, round(each * scale))) for each in size)
    return width, height


class SourceImages:
    """Images of a source by their numbers, for :func:`draw_thumbnails`."""

    def __init__(self, source: Source, index: Sequence[int] | Tensor) -> None:
        self.source, self.index = source, torch.as_tensor(index).tolist()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> bytes | Tensor:
        return self.source[self.index[number]].image
