"""Encoded bytes to uint8 pixels. The one place that decides which decoder reads what.

JPEG files in gray or color are decoded by simplejpeg, which takes libjpeg-turbo's own interface:
the pixels are those of Pillow, which uses the same library by the same settings (accurate integer
transform, smooth upsampling), in four fifths of the time. torchvision's decoder is as fast, but
takes two seconds to load and writes libjpeg's warnings to stderr. Pillow reads all other formats
and CMYK, and has the last word on whatever simplejpeg finds fault with, so every pixel is the same
without simplejpeg. One fault is final: data that end before the image does, though the file's end
is in place, are refused; libjpeg would fill in gray, and Pillow does not hear its warning. For that
simplejpeg is asked about CMYK files too, which are rare enough to be decoded twice.
"""

import io
import struct
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info

from ...errors import UserError
from ...io.console import notify
from .crops import Boxes
from .reference_views import resample

# A picture of more pixels (half a gigabyte decoded) is refused by its header: an image bomb is a
# small file that fills the memory. It is the limit at which Pillow itself refuses.
PIXEL_LIMIT = 178_956_970

# Of Pillow's formats those that hold photographs. Others run programs (EPS: Ghostscript) or rarely
# tested parsers, on whatever bytes a data set happens to hold.
FORMATS = (
    "JPEG",
    "MPO",  # JPEG with further pictures behind the first
    "PNG",
    "WEBP",
    "AVIF",  # where this Pillow has it
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
)

# Pillow's modes of JPEG files -> what simplejpeg is asked for. Of CMYK only its judgment counts:
# Pillow knows whether it is inverted, and what color it is.
JPEG_COLORS = {"RGB": "RGB", "L": "RGB", "CMYK": "CMYK"}

ORIENTATION = 0x0112  # EXIF's tag
_BITS_PER_SAMPLE = 0x0102  # TIFF's


class UnreadableImage(Exception):
    """Bytes that are not a whole image; the message says why, in a few words."""


# Errors of a source or a decoder about one image (a damaged record is a UserError).
READ_ERRORS = (UnreadableImage, OSError, UserError)


def read_error_reason(error: Exception) -> str:
    """Return why an image cannot be read, without its path, which messages name anyway."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@cache
def simplejpeg_module() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        if get_worker_info() is None:  # workers inherit the answer, or keep silent
            notify(
                "simplejpeg is not installed; Pillow decodes JPEG files, at four fifths the speed."
            )
        return None
    return simplejpeg


def open_image(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of metadata that are not used
            image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        kind = "empty file" if not data else "not an image"
        raise UnreadableImage(kind) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more pixels than the limit of {PIXEL_LIMIT:,}") from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble on
        raise _unreadable(error) from None
    if image.width * image.height > PIXEL_LIMIT:
        raise UnreadableImage(
            f"{image.width:,} x {image.height:,} pixels, more than the limit of {PIXEL_LIMIT:,}"
        )
    if image.format in ("JPEG", "MPO"):
        simplejpeg_module()  # what it says is said by the main process, before workers start
    return image


def _unreadable(error: Exception) -> UnreadableImage:
    return UnreadableImage(str(error) or type(error).__name__)


def image_size(data: bytes, *, upright: bool = False) -> tuple[int, int, str]:
    """(height, width, format) from the header alone.

    Args:
        data: encoded image, or as much of it as holds the header.
        upright: as it will be once turned by its EXIF orientation.

    Raises:
        UnreadableImage: the header is not an image's, or tells more than ``PIXEL_LIMIT`` pixels.
    """
    image = open_image(data)
    height, width = image.height, image.width
    if upright and _orientation(image) > 4:
        height, width = width, height
    return height, width, image.format or "?"


def decoded_size(data: bytes | Tensor, *, upright: bool = False) -> tuple[int, int]:
    """(height, width) of what :func:`decode` gives; of a plain JPEG file in a thirtieth of the time
    of :func:`image_size`.

    Args:
        data: encoded image.
        upright: as for :func:`decode`.

    Raises:
        UnreadableImage: as :func:`image_size`.
    """
    if isinstance(data, Tensor):
        return data.shape[1], data.shape[2]
    plain = None if upright else _plain_jpeg_size(data)
    return plain or image_size(data, upright=upright)[:2]


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file that simplejpeg can decode; None where Pillow has to look."""
    if not data.startswith(b"\xff\xd8\xff") or (jpeg := simplejpeg_module()) is None:
        return None
    try:
        height, width, colors, _ = jpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    plain = colors in ("Gray", "YCbCr", "RGB") and height * width <= PIXEL_LIMIT
    return (height, width) if plain else None


def orientation(data: bytes) -> int:
    """How ``upright`` turns an image: EXIF's number, 1 (not at all) to 8.

    Raises:
        UnreadableImage: the header is not an image's.
    """
    return _orientation(open_image(data))


def decode(data: bytes | Tensor, *, upright: bool = False) -> Tensor:
    """All pixels.

    Gray images are repeated to three channels; alpha is dropped, which shows the color beneath it;
    of 16 bits a sample the upper 8 are kept, and of 12 where the file says that it has 12; of an
    animation the first frame is taken; color profiles are not applied. The EXIF orientation is
    ignored, as in the reference; TIFF's own is heeded, as Pillow does.

    Args:
        data: encoded image.
        upright: turn it as its EXIF orientation says, if it has one that can be read.

    Returns:
        uint8 [3, H, W], RGB.

    Raises:
        UnreadableImage: not an image, truncated, of samples that have no agreed range (32 bits), or
            of more than ``PIXEL_LIMIT`` pixels.
    """
    if isinstance(data, Tensor):
        return data
    return _tensor(_pixels(data, upright)).contiguous()


Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""


def decode_crops(
    data: bytes | Tensor,
    boxes: Sequence[Box],
    size: int,
    *,
    resize: Literal["bilinear", "area"],
    upright: bool = False,
) -> Tensor:
    """Crops of one image, resized. Pixels outside of a box do not show.

    The image is decoded whole: stopping below the crop would save a tenth of the time, and leave
    truncated files unnoticed.

    Args:
        data: encoded image.
        boxes: what to cut out.
        size: side of the results.
        resize: torch's antialiased bilinear filter on levels, which is torchvision's and within one
            level of Pillow's; or the reference's area means, truncated.
        upright: as for :func:`decode`; boxes are of the turned image.

    Returns:
        uint8 [crops, 3, size, size], RGB.

    Raises:
        UnreadableImage: as :func:`decode`.
    """
    if isinstance(data, Tensor):
        image = data.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # the layout of decoded files
    else:
        image = _tensor(_pixels(data, upright))
    resized = _bilinear if resize == "bilinear" else _area
    crops = torch.empty(len(boxes), 3, size, size, dtype=torch.uint8)
    for crop, (left, top, right, bottom) in zip(crops, boxes, strict=True):
        crop.copy_(resized(image[None, :, top:bottom, left:right], size)[0])
    return crops


def _bilinear(crop: Tensor, size: int) -> Tensor:
    return interpolate(crop, size=(size, size), mode="bilinear", antialias=True)


def _area(crop: Tensor, size: int) -> Tensor:
    zero, height, width = (torch.tensor([side]) for side in (0, *crop.shape[2:]))
    return resample(crop, Boxes(zero, zero, height, width), size)


def _tensor(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] as a tensor [3, H, W] of the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pixels(data: bytes, upright: bool) -> np.ndarray:
    """uint8 [H, W, 3], RGB. Truncated data is an error, never gray pixels (as libjpeg gives)."""
    image = None if not upright and _plain_jpeg_size(data) else open_image(data)
    pixels, colors = None, "RGB"
    if image is not None:
        colors = JPEG_COLORS.get(image.mode) if image.format in ("JPEG", "MPO") else None
    if colors is not None and (jpeg := simplejpeg_module()) is not None:
        try:
            pixels = jpeg.decode_jpeg(data, colorspace=colors, strict=True)
        except ValueError as error:  # or something odd that Pillow may put up with
            if "premature end" in str(error).lower() and data.rstrip(b"\0").endswith(b"\xff\xd9"):
                raise UnreadableImage("its data end before the image does") from None
            pixels = None
    if pixels is None or colors == "CMYK":
        pixels = np.array(_rgb(image or open_image(data)))
    if upright and image is not None:
        pixels = np.ascontiguousarray(_TURNS[_orientation(image)](pixels))
    return pixels


def _rgb(image: Image.Image) -> Image.Image:
    """By Pillow, whatever the format and mode."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise UnreadableImage("32 bits a sample have no agreed range; save it with 8 or 16")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
        if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip to white
            upper = np.asarray(image) >> (_bits(image) - 8)
            return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
        if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
            image = ImageChops.invert(image)  # Pillow takes all to be inverted, as Adobe's are
        if image.mode in ("P", "PA", "RGBa"):  # alpha of a palette, or multiplied into the color
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise _unreadable(error) from None


def _bits(image: Image.Image) -> int:
    """Of a sample in 16: TIFF's BitsPerSample, which may be 12; Pillow scales those of PPM."""
    tags: Any = getattr(image, "tag_v2", {})
    return 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or none that can be read."""
    if image.format == "TIFF":  # its own tag, by which Pillow turns it
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, LookupError, TypeError, struct.error):
        return 1
    return orientation if orientation in _TURNS else 1


_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
