"""Inspect one image: header, end, digest and, on demand, all pixels."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..images.decode import JPEG_COLORS, READ_ERRORS, decode, read_error_reason, simplejpeg_module
from ..images.headers import Header, read_ends, read_header, stored_bytes
from ..images.levels import Levels, Samples, to_rgb_levels
from ..images.metadata import broken_checksum, odd_metadata
from ..images.samples import used_levels
from ..sources.source import Source
from .identical_images import digest

_EMPTY_SHARE, _EMPTY_LEVELS, _EMPTY_GRID = 0.99, 8, 64


class InspectedImage(NamedTuple):
    """Facts of one image."""

    index: int
    size: int = 0  # bytes as stored
    digest: bytes = b""
    header: Header | None = None
    error: str | None = None  # why the image is unreadable
    oddity: str | None = None  # a problem of an image that can be decoded
    decoded: bool = False  # all pixels were decoded
    nearly_empty: bool = False
    levels: tuple[str, float, float] | None = None  # kind of deep samples, lowest and highest


def inspect_chunk(source: Source, sampled: frozenset[int], chunk: range) -> list[InspectedImage]:
    """Inspect images; decode those that are sampled or look suspicious."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata: reported as oddities
        return [inspect_image(source, index, index in sampled) for index in chunk]


def inspect_image(source: Source, index: int, whole: bool) -> InspectedImage:
    """Inspect an image; decode it if asked (``whole``) or if it looks suspicious."""
    found = InspectedImage(index)
    try:
        ends = read_ends(source, index)
        if isinstance(ends, Tensor):
            header = Header(ends.shape[1], ends.shape[2], "decoded", "RGB")
            key = digest(ends.numpy().tobytes())
            empty = is_nearly_empty(ends)
            return InspectedImage(index, ends.numel(), key, header, None, None, True, empty)
        page = bytes([0] * getattr(ends.head, "page", 0))  # pages of one file are not identical
        found = found._replace(
            size=ends.size, digest=digest(ends.head, ends.tail + page, ends.size)
        )
        header, cut, info = read_header(source, index, ends)
        # A JPEG of one color takes some 620 bytes, and another one for each 36 to 64 pixels.
        whole = whole or ends.size < 700 + header.height * header.width // 24
        oddity = "its end is not that of its format, though all pixels are there" if cut else None
        oddity = oddity or odd_metadata(source.name(index), header.format, info)
        empty = False
        if whole:
            data = stored_bytes(source, index, ends)
            pixels, damage = _decode_strictly(data, header)
            if used := used_levels(data):
                found, pixels = _add_levels(found, *used)
            oddity, empty = oddity or damage, is_nearly_empty(pixels)
        return found._replace(
            header=header, oddity=oddity, decoded=whole or header.decoded, nearly_empty=empty
        )
    except READ_ERRORS as error:
        found = found._replace(error=read_error_reason(error))
        if "--range" in str(found.error) and (used := used_levels(_read_bytes(source, index))):
            found, _ = _add_levels(found, *used)
        return found


def _read_bytes(source: Source, index: int) -> bytes:
    image = source[index].image
    assert isinstance(image, bytes)
    return image


def _add_levels(
    found: InspectedImage, samples: Samples, low: float, high: float
) -> tuple[InspectedImage, Tensor]:
    """Return the image with the levels that it uses, and its pixels stretched over them."""
    one = samples._replace(values=samples.values[:, :, :1], color=False)
    pixels = to_rgb_levels(one, Levels(range=(low, max(high, low + 1e-9))))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)
    return found._replace(levels=(samples.text, low, high)), pixels


def _decode_strictly(data: bytes, header: Header) -> tuple[Tensor, str | None]:
    """Return the pixels, and any damage that the decoder tolerates."""
    if header.format in ("JPEG", "MPO") and header.mode in JPEG_COLORS:
        if (jpeg := simplejpeg_module()) is None:
            return decode(data), None
        colors = JPEG_COLORS[header.mode]
        try:
            pixels = jpeg.decode_jpeg(data, colorspace=colors, strict=True)
        except ValueError:
            return decode(data), "libjpeg warns that its data are damaged"
        if colors != "CMYK":
            return torch.from_numpy(pixels).permute(2, 0, 1), None
    pixels = decode(data)
    wrong = header.format == "PNG" and broken_checksum(data)
    return pixels, "a checksum in it is wrong" if wrong else None


def is_nearly_empty(pixels: Tensor) -> bool:
    """Return whether at least 99 % of an image [3, H, W] uint8 has one color.

    Each channel's values lie within 8 levels of the channel's median, at 99 % of the points of a
    grid of some 64 x 64.
    """
    step_y, step_x = (max(1, side // _EMPTY_GRID) for side in pixels.shape[1:])
    grid = pixels[:, ::step_y, ::step_x].reshape(len(pixels), -1).numpy().astype(np.int16)
    near = np.abs(grid - np.median(grid, axis=1, keepdims=True)) <= _EMPTY_LEVELS
    return bool(near.all(axis=0).mean() >= _EMPTY_SHARE)
