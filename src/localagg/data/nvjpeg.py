"""JPEG files of a batch decoded together on the GPU, by torchvision's nvJPEG (``--nvjpeg``).

Workers read and send the encoded bytes with their boxes; decoding, cropping and resizing happen
where the batch is moved to. nvJPEG's transform and upsampling are not libjpeg-turbo's, so levels
differ a little; measurements (``evaluation_batches``) never use it. On a CPU the same path runs
through torchvision's libjpeg-turbo, which is how it is tested: no measurement on a GPU was made.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..config import UserError, ViewConfig, known
from .decode import Box, UnreadableImage, decode, on_gpu
from .headers import FAULTS, reason

if TYPE_CHECKING:
    from .cropping import Read


class EncodedCrops:
    """Stands in a batch where uint8 crops [B, 3, S, S] will be: ``to`` makes them.

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

    def pin_memory(self) -> "EncodedCrops":
        """Itself: bytes are not pinned."""
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """The crops on a device, uint8 [B, 3, S, S].

        Raises:
            UserError: an image cannot be decoded.
        """
        device = torch.device(device)
        crops = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8, device=device)
        for crop, image, box in zip(crops, self._decoded(device), self.boxes, strict=True):
            left, top, right, bottom = box
            part = image[None, :, top:bottom, left:right].float()
            resized = interpolate(part, (self.size, self.size), mode="bilinear", antialias=True)
            crop.copy_(resized[0].round_().clamp_(0, 255))
        return crops

    def _decoded(self, device: torch.device) -> list[Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg

        encoded = {i: image for i, image in enumerate(self.images) if isinstance(image, bytes)}
        pixels = {i: image for i, image in enumerate(self.images) if isinstance(image, Tensor)}
        data = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in encoded.values()]
        try:
            found = decode_jpeg(data, mode=ImageReadMode.RGB, device=device) if data else []
        except RuntimeError:  # one of them; libjpeg-turbo says which, or reads what nvJPEG does not
            found = [_alone(image) for image in encoded.values()]
        pixels |= dict(zip(encoded, found, strict=True))
        return [pixels[i].to(device) for i in range(len(self))]


def _alone(data: bytes) -> Tensor:
    try:
        return decode(data)
    except UnreadableImage as error:
        raise UserError(
            f"An image of a batch cannot be decoded ({error}); localagg inspect --decode names it,"
            " and without --nvjpeg it can be left out by --unreadable skip."
        ) from None


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
    crops = EncodedCrops(images, boxes, known(views.image_size))
    return torch.tensor(kept, dtype=torch.int64), crops, failed
