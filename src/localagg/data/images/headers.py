"""What an image tells before it is decoded: its header, and whether its end is there.

Of a file only the first 32 KB and the last bytes are read, so that a million files take minutes.
An image whose end is not that of its format, or not where its header tells, is decoded to be sure;
damage in its middle shows only when it is decoded.
"""

import os
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..sources.image_files import open_file
from ..sources.source import Source
from .decode import UnreadableImage, decode, open_image

HEAD = 32 * 1024  # bytes read from the beginning of a file; a header that is longer is read whole
_TAIL = 1024  # and from its end, which may be padded with zeros
_TIFF_PARTS = ((273, 279), (324, 325))  # tags of offsets and byte counts, of strips and tiles


class Header(NamedTuple):
    """What stands at the beginning of an image."""

    height: int
    width: int
    format: str
    """Pillow's name of it, or "decoded" where the source has pixels."""
    mode: str
    """Pillow's: RGB, L, P, CMYK, I;16, ..."""


class FileEnds(NamedTuple):
    """The two ends of encoded bytes, which of short ones are all of them."""

    head: bytes
    tail: bytes
    size: int

    @property
    def whole(self) -> bool:
        """Whether ``head`` is all there is."""
        return len(self.head) == self.size


def read_ends(source: Source, index: int) -> FileEnds | Tensor:
    """The ends of a stored image, or its pixels where the source has them decoded.

    Raises:
        OSError, UserError: it cannot be read.
    """
    if (path := source.file(index)) is None:
        image = source[index].image
        return image if isinstance(image, Tensor) else FileEnds(image, image[-_TAIL:], len(image))
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = tail = file.read(HEAD)
        if size > len(head):
            file.seek(-_TAIL, os.SEEK_END)
            tail = file.read(_TAIL)
    return FileEnds(head, tail[-_TAIL:], size)


def read_header(source: Source, index: int, ends: FileEnds) -> tuple[Header, bool, dict[Any, Any]]:
    """The header, whether the end is missing although all pixels are there, and Pillow's ``info``
    (EXIF and so on).

    Raises:
        UnreadableImage: the header is not an image's, or the image is cut.
        OSError, UserError: it cannot be read.
    """
    try:
        image = open_image(ends.head)
    except UnreadableImage:
        if ends.whole:
            raise
        # The header is longer, or the format wants all of it.
        image = open_image(stored_bytes(source, index, ends))
    if image.format == "TIFF" and not ends.whole and _tiff_end(image) == 0:
        image = open_image(stored_bytes(source, index, ends))  # its tags lie behind
    header = Header(image.height, image.width, image.format or "?", image.mode)
    cut = _is_cut(image, ends)
    if cut:
        decode(stored_bytes(source, index, ends))
    return header, cut, image.info


def stored_bytes(source: Source, index: int, ends: FileEnds) -> bytes:
    """All bytes of the image with these ends.

    Raises:
        OSError, UserError: it cannot be read.
    """
    if ends.whole:
        return ends.head
    image = source[index].image
    assert isinstance(image, bytes)
    return image


def _is_cut(image: Image.Image, ends: FileEnds) -> bool:
    """Whether the end of the format is missing. PPM written as text shows none."""
    tail = ends.tail.rstrip(b"\0")
    match image.format:
        case "JPEG" | "MPO":
            return not tail.endswith(b"\xff\xd9")
        case "PNG":
            return not tail.endswith(b"IEND\xaeB`\x82")
        case "GIF":
            return not tail.endswith(b";")
        case "WEBP":
            return int.from_bytes(ends.head[4:8], "little") + 8 > ends.size
        case "BMP":
            told = int.from_bytes(ends.head[2:6], "little")
            return not 0 < told <= ends.size
        case "TIFF":
            return _tiff_end(image) > ends.size
        case "PPM":
            return _ppm_end(image) > ends.size
        case "JPEG2000":
            end = _box_end(ends.head, b"jp2c")
            return not tail.endswith(b"\xff\xd9") if end is None else end > ends.size
        case "AVIF":
            return (_box_end(ends.head, b"mdat") or 0) > ends.size
    return False


def _tiff_end(image: Image.Image) -> int:
    """Where the last strip or tile of a TIFF ends, as far as its tags tell."""
    tags: Any = getattr(image, "tag_v2", {})
    ends = [0]
    try:
        for offsets, counts in _TIFF_PARTS:
            ends += map(sum, zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False))
        return int(max(ends))
    except (TypeError, ValueError, ArithmeticError):  # damaged tags: text, or a ratio by zero
        return 0


def _ppm_end(image: Image.Image) -> int:
    """Where the pixels of a PPM end; 0 where they are written as text."""
    opened: Any = image
    codec, _, start, arguments = opened.tile[0]
    if codec == "ppm_plain":
        return 0
    deep = image.mode == "I" or (codec == "ppm" and arguments[1] > 255)
    bits = 1 if image.mode == "1" else 32 if image.mode == "F" else 16 if deep else 8
    return start + (image.width * len(image.getbands()) * bits + 7) // 8 * image.height


def _box_end(head: bytes, pixels: bytes) -> int | None:
    """Where the box of the pixels ends in a JPEG 2000 or AVIF file; None where it goes on to the
    end of the file or is not to be seen, and in bare JPEG 2000, which has no boxes."""
    start = 0
    while head[:4] != b"\xff\x4f\xff\x51" and start + 16 <= len(head):
        length, kind = int.from_bytes(head[start : start + 4]), head[start + 4 : start + 8]
        if length == 1:
            length = int.from_bytes(head[start + 8 : start + 16])
        if length < 8:
            return None
        start += length
        if kind == pixels:
            return start
    return None
