"""Decode images: encoded bytes to uint8 pixels. The one place that selects decoders.

simplejpeg decodes gray and color JPEG: it uses libjpeg-turbo with Pillow's settings (accurate
integer transform, smooth upsampling), so the pixels are Pillow's, in four fifths of the time.
torchvision's decoder is as fast, but takes two seconds to load and prints libjpeg's warnings.
Pillow decodes all other formats and CMYK, and whatever simplejpeg finds damaged, so no pixel
depends on simplejpeg. One fault is final: JPEG data that end early, although the end marker is
there, raise an error; libjpeg would fill in gray, and Pillow hides its warning. To find these,
simplejpeg also decodes CMYK files, which are rare.
"""

import io
import logging
import struct
import warnings
from collections.abc import Sequence
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
from ..sources.file_kinds import HEAD, IMAGE_KINDS, describe, kind_of
from .crops import Boxes
from .levels import STORED, Levels, Samples, UnreadableImage, to_rgb_levels
from .reference_views import resample
from .samples import TiffTags, dicom_window, read_dicom, read_samples, read_tiff

# Pillow's own lines about damaged files: a million images would be a million lines.
for _name in ("PIL", "tifffile", "pydicom"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
    logging.getLogger(_name).propagate = False

# Images of more pixels (half a gigabyte decoded) raise an error by their header: an image bomb is a
# small file that fills the memory. Pillow has the same limit.
PIXEL_LIMIT = 178_956_970

# Pillow's formats of photographs (MPO: JPEG with further pictures behind the first). Its others run
# programs (EPS: Ghostscript) or rarely tested parsers on untrusted bytes.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "HEIF")

# Pillow's modes of JPEG files -> simplejpeg's colorspace. CMYK pixels are only checked: Pillow
# detects whether they are inverted, and converts their colors.
JPEG_COLORS = {"RGB": "RGB", "L": "RGB", "CMYK": "CMYK"}

ORIENTATION = 0x0112  # EXIF's tag
_BITS_PER_SAMPLE = 0x0102  # TIFF's
_JPEG_END = b"\xff\xd9"

Box = Sequence[int]
"""left, top, right, bottom in pixels."""


# Errors of a source or a decoder about one image (a damaged record is a UserError).
READ_ERRORS = (UnreadableImage, OSError, UserError)


def read_error_reason(error: Exception) -> str:
    """Return why an image cannot be read, without its path, which messages name anyway."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


@cache
def simplejpeg_module() -> ModuleType | None:
    """Return simplejpeg, or None after a notice if it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        if get_worker_info() is None:  # workers inherit the answer, or keep silent
            notify("simplejpeg is not installed; Pillow decodes JPEG at four fifths the speed.")
        return None
    return simplejpeg


@cache
def _formats(heif: bool) -> list[str]:
    if heif:
        try:
            import pillow_heif
        except ImportError:
            raise UnreadableImage("HEIC needs pip install 'localagg[heic]'") from None
        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow


def open_image(data: bytes, levels: Levels = STORED) -> Image.Image:
    """Open an image, and read its header.

    Pillow opens most images, and decodes them later. Those of more samples than it reads right are
    decoded here: then ``info["samples"]`` describes them.

    Args:
        data: the image, or a page of it (:class:`~localagg.data.sources.source.ImagePage`).
        levels: mapping of deep samples and of bands.

    Raises:
        UnreadableImage: not an image of :data:`FORMATS`, or more than ``PIXEL_LIMIT`` pixels.
    """
    kind, page = kind_of(data[:HEAD]), getattr(data, "page", 0)
    if kind == "DICOM":
        return _open_dicom(data, page, levels)
    if kind == "TIFF" and not TiffTags(data, page).is_pillows:
        return _as_image(read_tiff(data, page), levels, "TIFF")
    if levels != STORED and kind in ("TIFF", "PNG") and (samples := _deep_samples(data, levels)):
        return _as_image(samples, levels, kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about metadata that are not used
            image = Image.open(io.BytesIO(data), formats=_formats(kind == "HEIC"))
            image.seek(page)
    except Image.UnidentifiedImageError:
        if kind == "TIFF":
            return _as_image(read_tiff(data, page), levels, kind)
        known = kind in IMAGE_KINDS
        raise UnreadableImage(f"damaged {kind}" if known else describe(data[:HEAD])) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more pixels than the limit of {PIXEL_LIMIT:,}") from None
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's parsers raise errors of any kind
        raise _unreadable(error) from None
    _check_size(image.width, image.height)
    if _is_jpeg(image):
        simplejpeg_module()  # its notice is printed by the main process, before workers start
    return image


def _deep_samples(data: bytes, levels: Levels) -> Samples | None:
    """Return samples that the mapping changes; None where Pillow's 8 bits are used as they are."""
    if (samples := read_samples(data)) is None and levels.bands is not None:
        return read_tiff(data, getattr(data, "page", 0)) if kind_of(data) == "TIFF" else None
    return samples


def _open_dicom(data: bytes, page: int, levels: Levels) -> Image.Image:
    samples = read_dicom(data, page)
    deep = samples.values.dtype != np.uint8 and not samples.color
    if deep and levels.range is None and (window := dicom_window(data)):
        levels = levels._replace(range=window)
    return _as_image(samples, levels, "DICOM")


def _as_image(samples: Samples, levels: Levels, format: str) -> Image.Image:
    _check_size(*samples.values.shape[1::-1])
    image = Image.fromarray(_turn(to_rgb_levels(samples, levels), samples.turn))
    image.format, image.info["samples"] = format, samples.text
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT:
        raise UnreadableImage(
            f"{width:,} x {height:,} pixels, more than the limit of {PIXEL_LIMIT:,}"
        )


def _unreadable(error: Exception) -> UnreadableImage:
    return UnreadableImage(str(error) or type(error).__name__)


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def decoded_size(
    image: bytes | Tensor, *, upright: bool = False, levels: Levels = STORED
) -> tuple[int, int]:
    """Return (height, width) after :func:`decode`, by the header.

    Raises:
        UnreadableImage: as :func:`open_image`.
    """
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    if not upright and (plain := _plain_jpeg_size(image)):
        return plain  # in a thirtieth of Pillow's time
    opened = open_image(image, levels)
    exchanged = upright and orientation(opened) > 4
    return (opened.width, opened.height) if exchanged else (opened.height, opened.width)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file that simplejpeg can decode, or None."""
    if not data.startswith(b"\xff\xd8\xff") or (jpeg := simplejpeg_module()) is None:
        return None
    try:
        height, width, colors, _ = jpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    plain = colors in ("Gray", "YCbCr", "RGB") and height * width <= PIXEL_LIMIT
    return (height, width) if plain else None


def decode(image: bytes | Tensor, *, upright: bool = False, levels: Levels = STORED) -> Tensor:
    """Decode an image; return pixels as they are.

    Gray becomes three equal channels. Alpha is dropped, which shows the color beneath it. The upper
    8 bits of 16 are kept, and of 12 if the file declares 12. Of an animation the first frame is
    decoded. Color profiles are not applied. The EXIF orientation is ignored, as in the reference;
    Pillow applies TIFF's own.

    Args:
        image: encoded image, or pixels.
        upright: turn the image by its EXIF orientation, if that can be read.
        levels: mapping of deep samples and of bands.

    Returns:
        uint8 [3, H, W], RGB.

    Raises:
        UnreadableImage: not an image, truncated, more than ``PIXEL_LIMIT`` pixels, or samples of 32
            bits, which have no agreed range unless ``levels`` has one.
    """
    if isinstance(image, Tensor):
        return image
    return _as_tensor(_decode(image, upright, levels)).contiguous()


def decode_crops(
    image: bytes | Tensor,
    boxes: Sequence[Box],
    size: int,
    *,
    resize: Literal["bilinear", "area"],
    upright: bool = False,
    levels: Levels = STORED,
) -> Tensor:
    """Cut crops out of one image and resize them. Pixels outside of a box have no influence.

    The image is decoded whole: to stop below the crop would save a tenth of the time, and hide that
    a file is truncated.

    Args:
        image: encoded image, or pixels.
        boxes: the crops, in the image after turning.
        size: side of the results.
        resize: "bilinear": torch's antialiased filter on levels, which is torchvision's and within
            one level of Pillow's; "area": the reference's area means, truncated.
        upright: as for :func:`decode`, which raises the same errors, and so ``levels``.

    Returns:
        uint8 [crops, 3, size, size], RGB.
    """
    if isinstance(image, Tensor):  # in the layout of decoded files, so that the results are equal
        pixels = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    else:
        pixels = _as_tensor(_decode(image, upright, levels))
    crops = torch.empty(len(boxes), 3, size, size, dtype=torch.uint8)
    for crop, (left, top, right, bottom) in zip(crops, boxes, strict=True):
        part = pixels[None, :, top:bottom, left:right]
        if resize == "bilinear":
            resized = interpolate(part, size=(size, size), mode="bilinear", antialias=True)
        else:
            zero, height, width = (torch.tensor([side]) for side in (0, *part.shape[2:]))
            resized = resample(part, Boxes(zero, zero, height, width), size)
        crop.copy_(resized[0])
    return crops


def _as_tensor(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] as a tensor [3, H, W] of the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode(data: bytes, upright: bool, levels: Levels) -> np.ndarray:
    """uint8 [H, W, 3], RGB. Truncated data raise an error, and never become gray pixels."""
    image = None if not upright and _plain_jpeg_size(data) else open_image(data, levels)
    pixels, colors = None, "RGB"
    if image is not None:
        colors = JPEG_COLORS.get(image.mode) if _is_jpeg(image) else None
    if colors is not None and (jpeg := simplejpeg_module()) is not None:
        try:
            pixels = jpeg.decode_jpeg(data, colorspace=colors, strict=True)
        except ValueError as error:  # other damage may be harmless to Pillow
            if "premature end" in str(error).lower() and data.rstrip(b"\0").endswith(_JPEG_END):
                raise UnreadableImage("its data end before the image does") from None
    if pixels is None or colors == "CMYK":
        image = image or open_image(data, levels)
        try:
            pixels = np.array(_to_rgb(image))
        except UnreadableImage:
            if image.format != "TIFF":
                raise
            pixels = _decode_by_tifffile(data, levels)
    return _turned(pixels, image) if upright and image is not None else pixels


def _decode_by_tifffile(data: bytes, levels: Levels) -> np.ndarray:
    """Decode a TIFF whose compression Pillow lacks."""
    samples = read_tiff(data, getattr(data, "page", 0))
    return _turn(to_rgb_levels(samples, levels), samples.turn)


def decode_opened(image: Image.Image, *, upright: bool = False) -> Tensor:
    """Decode an image that Pillow opened or made, by the rules of :func:`decode`.

    Raises:
        UnreadableImage: truncated, or samples of 32 bits.
    """
    pixels = np.array(_to_rgb(image))
    return _as_tensor(_turned(pixels, image) if upright else pixels).contiguous()


def _turned(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Pixels [H, W, 3] after turning by the image's EXIF orientation."""
    return _turn(pixels, orientation(image))


def _turn(pixels: np.ndarray, turn: int) -> np.ndarray:
    pixels = np.flip(pixels, _TURNS.get(turn, ()))
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if turn > 4 else pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode with Pillow, in any format and mode."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise UnreadableImage("32 bits a sample have no agreed range; map them with --range")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
        if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip to white
            upper = np.asarray(image) >> (_sample_bits(image) - 8)
            return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
        if image.mode == "CMYK" and _is_jpeg(image) and "adobe" not in image.info:
            image = ImageChops.invert(image)  # Pillow assumes Adobe's convention, inverted values
        if image.mode in ("P", "PA", "RGBa"):  # alpha of a palette, or multiplied into the color
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise _unreadable(error) from None


def _sample_bits(image: Image.Image) -> int:
    """Significant bits of 16-bit samples: 12 if a TIFF declares it. Pillow scales those of PPM."""
    tags: Any = getattr(image, "tag_v2", {})
    return 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (leave as is) if there is none that can be read."""
    if image.format in ("TIFF", "HEIF", "DICOM"):  # their decoders have already turned it
        return 1
    try:
        number = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, LookupError, TypeError, struct.error):
        return 1
    return number if number in _TURNS else 1


# EXIF orientation -> axes to reverse; above 4, height and width are exchanged afterwards.
_TURNS = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (0,), 7: (0, 1), 8: (1,)}
