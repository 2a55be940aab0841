"""JPEG files of a batch decoded together on the GPU, by torchvision's nvJPEG (``--nvjpeg``).

Workers read and send the encoded bytes with their boxes; decoding, cropping and resizing happen
where the batch is moved to. nvJPEG's transform and upsampling are not libjpeg-turbo's, so levels
differ a little; measurements (``evaluation_batches``) never use it. What nvJPEG refuses is decoded
by the processor, which says why if it cannot be. What nvJPEG does not notice stays unnoticed: data
that end early though the end marker is there. On a CPU the same path runs through torchvision's
libjpeg-turbo, which is how it is tested: no measurement on a GPU was made.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...config import ViewConfig, require_resolved
from .decode import Box, UnreadableImage, decode, on_gpu
from .headers import FAULTS, reason

if TYPE_CHECKING:
    from ..loading.cropping import Read


class EncodedCrops:
    """Stands in a batch where uint8 crops [B, 3, S, S] will be: ``decoded`` makes them.

    Args:
        images: encoded bytes, or decoded pixels uint8 [3, H, W] of what nvJPEG does not read.
        boxes: one for each.
        size: S.
    """

    def __init__(self, images: list[bytes | Tensor], boxes: list[Box], size: int) -> None:
        self.images, self.boxes, self.size = images, boxes, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> "EncodedCrops":
        chosen = rows.tolist()
        images, boxes = [self.images[i] for i in chosen], [self.boxes[i] for i in chosen]
        return EncodedCrops(images, boxes, self.size)

    def decoded(self, device: torch.device | str) -> tuple[Tensor, dict[int, str]]:
        """The crops on a device, uint8 [B, 3, S, S], and {row: why it cannot be decoded}, of rows
        that hold nothing."""
        device, failed = torch.device(device), {}
        crops = torch.zeros(len(self), 3, self.size, self.size, dtype=torch.uint8, device=device)
        for row, (image, box) in enumerate(zip(self._pixels(device), self.boxes, strict=True)):
            if isinstance(image, str):
                failed[row] = image
                continue
            left, top, right, bottom = box
            part = image[None, :, top:bottom, left:right].to(device).float()
            resized = interpolate(part, (self.size, self.size), mode="bilinear", antialias=True)
            crops[row] = resized[0].round_().clamp_(0, 255)
        return crops, failed

    def _pixels(self, device: torch.device) -> list[Tensor | str]:
        """Of each image, or why it cannot be decoded."""
        found: dict[int, Tensor | str] = {
            i: image for i, image in enumerate(self.images) if isinstance(image, Tensor)
        }
        encoded = {i: image for i, image in enumerate(self.images) if isinstance(image, bytes)}
        try:
            together = _nvjpeg(list(encoded.values()), device) if encoded else []
        except RuntimeError:  # one of them
            together = [_alone(image, device) for image in encoded.values()]
        found |= dict(zip(encoded, together, strict=True))
        return [found[i] for i in range(len(self))]


def _nvjpeg(images: list[bytes], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
    return list(decode_jpeg(data, mode=ImageReadMode.RGB, device=device))


def _alone(image: bytes, device: torch.device) -> Tensor | str:
    """As in a batch, or else by the processor, which reads more, and has the last word."""
    try:
        return _nvjpeg([image], device)[0]
    except RuntimeError:
        pass
    try:
        return decode(image)
    except UnreadableImage as error:
        return reason(error)


def encoded_crops(read: "Read", views: ViewConfig) -> tuple[Tensor, EncodedCrops, dict[int, str]]:
    """What :class:`cropping.Crops` gives, with the JPEG files still encoded."""
    images, boxes, kept, failed = [], [], [], dict(read.failed)
    upright = views.exif_orientation
    for i, data, few in zip(read.index, read.encoded, read.boxes, strict=True):
        try:
            images.append(data if on_gpu(data, upright=upright) else decode(data, upright=upright))
            boxes.append(few[0])
            kept.append(i)
        except FAULTS as error:
            failed[i] = reason(error)
    crops = EncodedCrops(images, boxes, require_resolved(views.image_size))
    return torch.tensor(kept, dtype=torch.int64), crops, failed
