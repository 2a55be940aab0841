"""Encoded bytes to uint8 pixels. The one place that decides which decoder reads what."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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


def decode_resized(data: bytes, box: tuple[float, float, float, float], size: int) -> Tensor:
    """A crop of the image, resized by Pillow's antialiased bilinear filter.

    Args:
        data: encoded image.
        box: left, top, right, bottom in pixels.
        size: side of the result.

    Returns:
        uint8 [3, size, size], RGB.

    Raises:
        UnreadableImage: as :func:`decode`.
    """
    return _tensor(_whole(data).resize((size, size), Image.Resampling.BILINEAR, box=box))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
