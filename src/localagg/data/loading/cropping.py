"""Crop batches in worker processes: read, place boxes by the headers, decode, cut and resize.

Boxes use the uniform draws that ``augment`` uses for color, so workers, their number and the order
of batches change no pixel.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...config import ViewConfig, require_resolved
from ..images.augment import view_draws, view_uniforms
from ..images.crops import Boxes, crop_boxes, evaluation_boxes
from ..images.decode import READ_ERRORS, decode_crops, decoded_size, read_error_reason
from ..sources.source import Source
from .workers import iterate_in_workers


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


class TrainingCrops(Dataset):
    """Item s is (:class:`TrainingBatch` s of an epoch, {index: reason} of unreadable images)."""

    def __init__(
        self, source: Source, views: ViewConfig, seed: int, epoch: int, chunks: list[Tensor]
    ) -> None:
        self.source, self.views, self.seed, self.epoch = source, views, seed, epoch
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, step: int) -> tuple[TrainingBatch, dict[int, str]]:
        index = self.chunks[step]
        uniforms = view_uniforms(self.seed, self.epoch, index)
        crop = view_draws(self.views, uniforms).crop

        def boxes(rows: Tensor, height: Tensor, width: Tensor) -> list[Boxes]:
            return [crop_boxes(self.views, crop[rows], height, width)]

        rows, images, unreadable = _crop(self.source, index, self.views, boxes)
        return TrainingBatch(index[rows], images.squeeze(1), uniforms[rows]), unreadable


class EvaluationCrops(Dataset):
    """Item s is (:class:`LoadedBatch` s of all images in order, {index: reason} of unreadable)."""

    def __init__(
        self, source: Source, views: ViewConfig, chunks: list[Tensor], ten_crop: bool
    ) -> None:
        self.source, self.views, self.chunks, self.ten_crop = source, views, chunks, ten_crop

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, step: int) -> tuple[LoadedBatch, dict[int, str]]:
        def boxes(_: Tensor, height: Tensor, width: Tensor) -> list[Boxes]:
            return evaluation_boxes(self.views, height, width, ten_crop=self.ten_crop)

        index = self.chunks[step]
        rows, images, unreadable = _crop(self.source, index, self.views, boxes)
        images = torch.cat([images, images.flip(4)], dim=1) if self.ten_crop else images.squeeze(1)
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

    Unreadable images are skipped; compare the indices with the source to count them.

    Args:
        source: the images.
        views: augmentation, image_size and eval_crop.
        batch: images a batch.
        workers: processes that decode.
        ten_crop: the ten views of :func:`augment.ten_crop_views` instead.
        part: the batches to yield.
    """
    chunks = list(torch.arange(len(source)).split(batch))[part]
    for loaded, _ in iterate_in_workers(EvaluationCrops(source, views, chunks, ten_crop), workers):
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
    rows, stored, sizes, unreadable = [], [], [], {}
    for row, i in enumerate(indices):
        try:
            image = source[i].image
            sizes.append(decoded_size(image, upright=upright))
            stored.append(image)
            rows.append(row)
        except READ_ERRORS as error:
            unreadable[i] = read_error_reason(error)
    size = require_resolved(views.image_size)
    resize = "area" if views.augmentation == "reference" else "bilinear"
    kept, crops = [], []
    if rows:
        height, width = torch.tensor(sizes, dtype=torch.float64).unbind(dim=1)
        corners = [box.corners() for box in boxes(torch.tensor(rows), height, width)]
        for row, image, cut in zip(rows, stored, torch.stack(corners, dim=1).tolist(), strict=True):
            try:
                crops.append(decode_crops(image, cut, size, resize=resize, upright=upright))
                kept.append(row)
            except READ_ERRORS as error:
                unreadable[indices[row]] = read_error_reason(error)
    none = torch.empty(0, 1, 3, size, size, dtype=torch.uint8)
    stacked = torch.stack(crops) if crops else none
    return torch.tensor(kept, dtype=torch.int64), stacked, unreadable
