"""What worker processes do: read a batch, place its boxes by the headers, decode, cut and resize.

Boxes come from the same draws as on the device (``augment.draw``), so workers, their number and the
order of batches change no pixel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...config import ViewConfig, require_resolved
from ..images.augment import draw
from ..images.crops import Boxes, crop_boxes, evaluation_boxes
from ..images.decode import Box, decode_crops, decoded_size
from ..images.headers import FAULTS, reason
from ..images.nvjpeg import EncodedCrops, encoded_crops
from ..sources.source import Source

Item = tuple[Tensor, Tensor, dict[int, str]]
"""(index int64 [b] of the readable images, crops uint8 [b, ...], {index: why it is unreadable})."""


class Crops(Dataset):
    """Item s is batch s of an epoch, decoded and randomly cropped: uint8 [b, 3, S, S].

    With ``views.nvjpeg`` the crops are :class:`nvjpeg.EncodedCrops`, to be decoded on the device.
    """

    def __init__(
        self, source: Source, views: ViewConfig, seed: int, epoch: int, chunks: list[Tensor]
    ) -> None:
        self.source, self.views, self.seed, self.epoch = source, views, seed, epoch
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor | EncodedCrops, dict[int, str]]:
        index = self.chunks[step]
        crop = draw(self.views, self.seed, self.epoch, index).crop

        def boxes(rows: Tensor, height: Tensor, width: Tensor) -> list[Boxes]:
            return [crop_boxes(self.views, crop[rows], height, width)]

        read = _read(self.source, index, self.views, boxes)
        if self.views.nvjpeg:
            return encoded_crops(read, self.views)
        index, images, failed = _crop(read, self.views)
        return index, images.squeeze(1), failed


class Measured(Dataset):
    """Item s is batch s of all images in order, decoded and cropped: uint8 [b, 3, S, S], or the ten
    crops [b, 10, 3, S, S]."""

    def __init__(
        self, source: Source, views: ViewConfig, chunks: list[Tensor], ten_crop: bool
    ) -> None:
        self.source, self.views, self.chunks, self.ten_crop = source, views, chunks, ten_crop

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, step: int) -> Item:
        def boxes(_: Tensor, height: Tensor, width: Tensor) -> list[Boxes]:
            return evaluation_boxes(self.views, height, width, ten_crop=self.ten_crop)

        index, images, failed = _crop(
            _read(self.source, self.chunks[step], self.views, boxes), self.views
        )
        if self.ten_crop:
            return index, torch.cat([images, images.flip(4)], dim=1), failed
        return index, images.squeeze(1), failed


class Read(NamedTuple):
    """A batch as it is stored, and what is to be cut out of it."""

    index: list[int]
    encoded: list[bytes]
    boxes: list[list[Box]]
    """Of each image."""
    failed: dict[int, str]


def _read(
    source: Source,
    index: Tensor,
    views: ViewConfig,
    boxes: Callable[[Tensor, Tensor, Tensor], list[Boxes]],
) -> Read:
    """Bytes and boxes of a batch; ``boxes`` gets rows of the batch and their sizes, all at once."""
    read, rows, sizes, failed = [], [], [], {}
    for row, i in enumerate(index.tolist()):
        try:
            data = source[i].image
            data = data if isinstance(data, bytes) else _encode(data)
            sizes.append(decoded_size(data, upright=views.exif_orientation))
            read.append((i, data))
            rows.append(row)
        except FAULTS as error:
            failed[i] = reason(error)
    if not read:
        return Read([], [], [], failed)
    height, width = torch.tensor(sizes, dtype=torch.float64).unbind(dim=1)
    found = [
        torch.stack([box.left, box.top, box.left + box.width, box.top + box.height], dim=1)
        for box in boxes(torch.tensor(rows), height, width)
    ]
    cut = torch.stack(found, dim=1).long().tolist()
    boxes_of = [[(left, top, right, bottom) for left, top, right, bottom in few] for few in cut]
    return Read([i for i, _ in read], [data for _, data in read], boxes_of, failed)


def _crop(read: Read, views: ViewConfig) -> Item:
    """(index, crops uint8 [b, V, 3, S, S], failed) of what was read."""
    size = require_resolved(views.image_size)
    resize = "area" if views.augmentation == "reference" else "bilinear"
    images, kept, failed = [], [], dict(read.failed)
    for i, data, boxes in zip(read.index, read.encoded, read.boxes, strict=True):
        try:
            images.append(
                decode_crops(data, boxes, size, resize=resize, upright=views.exif_orientation)
            )
            kept.append(i)
        except FAULTS as error:
            failed[i] = reason(error)
    none = torch.empty(0, 1, 3, size, size, dtype=torch.uint8)
    stacked = torch.stack(images) if images else none
    return torch.tensor(kept, dtype=torch.int64), stacked, failed


def _encode(pixels: Tensor) -> bytes:
    """Decoded pixels as PNG, so that the few decoded sources take the same path."""
    from torchvision.io import encode_png

    return encode_png(pixels.contiguous()).numpy().tobytes()
