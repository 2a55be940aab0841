"""Encoded bytes to uint8 pixels. The one place that decides which decoder reads what."""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .crops import Boxes
from .reference_views import resample

# A picture larger than this is refused before it is decoded (Pillow's own limit only warns).
PIXEL_LIMIT = 178_956_970


class UnreadableImage(Exception):
    """Bytes that are not a whole image; the message says why, in a few words."""


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        kind = "empty file" if not data else "not an image"
        raise UnreadableImage(kind) from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble on
        raise UnreadableImage(str(error) or type(error).__name__) from None
    if image.width * image.height > PIXEL_LIMIT:
        raise UnreadableImage(f"{image.width} x {image.height} pixels are too many")
    return image


def image_size(data: bytes) -> tuple[int, int, str]:
    """(height, width, format) from the header alone.

    Raises:
        UnreadableImage: the header is not an image's.
    """
    image = _open(data)
    return image.height, image.width, image.format or "?"


def _whole(data: bytes) -> Image.Image:
    """The whole image as RGB. Truncated data is an error, never gray pixels (as libjpeg gives)."""
    image = _open(data)
    try:
        if image.mode.startswith("I;16"):  # Pillow clips 16-bit gray to white instead of scaling it
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode == "P":  # a palette entry may carry alpha, which is dropped like any other
            image = image.convert("RGBA")
        return image.convert("RGB")
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None


def decode(data: bytes) -> Tensor:
    """All pixels.

    Gray images are repeated to three channels, alpha is dropped, of an animation the first frame
    is taken; EXIF orientation is ignored, as in the reference.

    Returns:
        uint8 [3, H, W], RGB.

    Raises:
        UnreadableImage: not an image, truncated, or over ``PIXEL_LIMIT``.
    """
    return _tensor(_whole(data))


Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""


def decode_crops(
    data: bytes, boxes: Sequence[Box], size: int, *, resize: Literal["bilinear", "area"]
) -> Tensor:
    """Crops of one image, resized. Pixels outside of a box do not show.

    Args:
        data: encoded image.
        boxes: what to cut out.
        size: side of the results.
        resize: Pillow's antialiased bilinear filter, or the reference's area means, truncated.

    Returns:
        uint8 [crops, 3, size, size], RGB.

    Raises:
        UnreadableImage: as :func:`decode`.
    """
    image = _whole(data)
    resized = _bilinear if resize == "bilinear" else _area
    # Cut first: Pillow's resize(box=...) blends pixels beyond the box into its rim.
    return torch.stack([resized(image.crop(box), size) for box in boxes])


def _bilinear(crop: Image.Image, size: int) -> Tensor:
    return _tensor(crop.resize((size, size), Image.Resampling.BILINEAR))


def _area(crop: Image.Image, size: int) -> Tensor:
    zero, height, width = (torch.tensor([side]) for side in (0, crop.height, crop.width))
    pixels = _tensor(crop).unsqueeze(0)
    return resample(pixels, Boxes(zero, zero, height, width), size)[0].to(torch.uint8)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
