"""Crop batches in worker processes: read, place boxes by the headers, decode, cut and resize.

Boxes use the uniform draws that ``augment`` uses for color, so workers, their number and the order
of batches change no pixel.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import ViewConfig, require_resolved
from ..images.augment import view_draws, view_uniforms
from ..images.crops import Boxes, crop_boxes, evaluation_boxes
from ..images.decode import READ_ERRORS, decode_crops, decoded_size, read_error_reason
from ..images.levels import levels_of
from ..sources.source import Source
from .workers import map_in_workers


class TrainingBatch(NamedTuple):
    """Images of a training batch, and the uniform draws of their random views."""

    index: Tensor
    """int64 [B], always on the CPU."""
    images: Tensor
    """uint8 [B, 3, H, W]: whole images from memory, or random crops from workers."""
    uniforms: Tensor
    """float64 [B, 50] on the CPU; see :func:`augment.view_uniforms`."""


class LoadedBatch(NamedTuple):
    """Images of an evaluation batch."""

    index: Tensor
    """int64 [B], always on the CPU."""
    images: Tensor
    """uint8 [B, 3, S, S]: central views. Ten crops: [B, 10, 3, S, S]."""


def training_crops(
    source: Source, views: ViewConfig, seed: int, epoch: int, index: Tensor
) -> tuple[TrainingBatch, dict[int, str]]:
    """Return random crops of images ``index``, and {index: reason} of unreadable ones."""
    uniforms = view_uniforms(seed, epoch, index)
    crop = view_draws(views, uniforms).crop

    def boxes(rows: Tensor, height: Tensor, width: Tensor) -> list[Boxes]:
        return [crop_boxes(views, crop[rows], height, width)]

    rows, images, unreadable = _crop(source, index, views, boxes)
    return TrainingBatch(index[rows], images.squeeze(1), uniforms[rows]), unreadable


def evaluation_crops(
    source: Source, views: ViewConfig, ten_crop: bool, index: Tensor
) -> tuple[LoadedBatch, dict[int, str]]:
    """Return fixed crops of images ``index``, and {index: reason} of unreadable ones."""

    def boxes(_: Tensor, height: Tensor, width: Tensor) -> list[Boxes]:
        return evaluation_boxes(views, height, width, ten_crop=ten_crop)

    rows, images, unreadable = _crop(source, index, views, boxes)
    images = torch.cat([images, images.flip(4)], dim=1) if ten_crop else images.squeeze(1)
    return LoadedBatch(index[rows], images), unreadable


def all_view_crops(
    source: Source, views: ViewConfig, seed: int, count: int, index: Tensor
) -> tuple[LoadedBatch, dict[int, str]]:
    """Return the central crop of images ``index`` and the random crops of epochs 0..count-1.

    Returns:
        (images uint8 [b, 1 + count, 3, S, S] of the readable images, {index: reason} of the rest).
    """
    draws = [view_draws(views, view_uniforms(seed, n, index)).crop for n in range(count)]

    def boxes(rows: Tensor, height: Tensor, width: Tensor) -> list[Boxes]:
        central = evaluation_boxes(views, height, width)
        return [*central, *(crop_boxes(views, crop[rows], height, width) for crop in draws)]

    rows, images, unreadable = _crop(source, index, views, boxes)
    return LoadedBatch(index[rows], images), unreadable


def evaluation_batches(
    source: Source,
    views: ViewConfig,
    *,
    batch: int = 256,
    workers: int = 0,
    ten_crop: bool = False,
    part: slice = slice(None),
) -> Iterator[LoadedBatch]:
    """Yield the central view of every readable image, in order.

    Args:
        source: the images. Compare its indices with those of the batches to find unreadable ones.
        views: augmentation, image_size and eval_crop.
        batch: images a batch.
        workers: processes that decode.
        ten_crop: yield the ten views of :func:`augment.ten_crop_views` instead.
        part: the batches to yield.
    """
    crop = functools.partial(evaluation_crops, source, views, ten_crop)
    chunks = torch.arange(len(source)).split(batch)[part]
    for loaded, _ in map_in_workers(crop, chunks, workers):
        if len(loaded.index):
            yield loaded


def _crop(
    source: Source,
    index: Tensor,
    views: ViewConfig,
    boxes: Callable[[Tensor, Tensor, Tensor], list[Boxes]],
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Return (readable rows int64 [b], crops uint8 [b, V, 3, S, S], {index: reason}).

    ``boxes`` takes rows of the batch and their heights and widths, and returns V boxes of each."""
    indices, upright = index.tolist(), views.exif_orientation
    levels = levels_of(views)
    rows, stored, sizes, unreadable = [], [], [], {}
    for row, i in enumerate(indices):
        try:
            image = source[i].image
            sizes.append(decoded_size(image, upright=upright, levels=levels))
            stored.append(image)
            rows.append(row)
        except READ_ERRORS as error:
            unreadable[i] = read_error_reason(error)
    size = require_resolved(views.image_size)
    resize = "area" if views.augmentation == "reference" else "bilinear"
    kept, crops = [], []
    height, width = torch.tensor(sizes, dtype=torch.float64).view(-1, 2).unbind(dim=1)
    corners = [box.corners() for box in boxes(torch.tensor(rows).long(), height, width)]
    for row, image, cut in zip(rows, stored, torch.stack(corners, dim=1).tolist(), strict=True):
        try:
            crop = decode_crops(image, cut, size, resize=resize, upright=upright, levels=levels)
            crops.append(crop)
            kept.append(row)
        except READ_ERRORS as error:
            unreadable[indices[row]] = read_error_reason(error)
    stacked = torch.stack(crops) if crops else torch.empty(0, len(corners), 3, size, size).byte()
    return torch.tensor(kept, dtype=torch.int64), stacked, unreadable
