"""Read the headers of stored images, and check that their ends are there.

Only the first 32 KB and the last bytes of a file are read, so that a million files take minutes. An
image without the end of its format, or of a format without a fixed end, is decoded whole. Other
damage between header and end is only found by decoding.
"""

import os
from typing import Any, NamedTuple

from torch import Tensor

from ..sources.image_files import open_file
from ..sources.pages import count_pages, may_have_frames
from ..sources.source import Source
from .decode import UnreadableImage, decode, open_image, orientation
from .levels import STORED, Levels

HEAD = 32 * 1024  # bytes read from the beginning of a file; a longer header is read whole
_TAIL = 1024  # bytes read from its end, which may be padded with zeros
_ENDS = {
    "JPEG": b"\xff\xd9",
    "MPO": b"\xff\xd9",
    "PNG": b"IEND\xaeB`\x82",
    "GIF": b";",
}


class Header(NamedTuple):
    """Size and kind of an image."""

    height: int
    width: int
    format: str
    """Pillow's name, or "decoded" if the source stores pixels."""
    mode: str
    """Pillow's mode: RGB, L, P, CMYK, I;16, ..."""
    decoded: bool = False
    """Whether all pixels had to be decoded, because the end of the format is not there."""
    pages: int = 1
    """Pages of a TIFF file, frames of a GIF, PNG, WebP or DICOM file."""
    turn: int = 1
    """EXIF orientation; above 1 the image is turned or mirrored."""
    samples: str = ""
    """Bands and bits of an image that Pillow does not read: ``4 bands of 16 bits``."""


class FileEnds(NamedTuple):
    """Both ends of encoded bytes; ``head`` holds all of a short file."""

    head: bytes
    tail: bytes
    size: int

    @property
    def whole(self) -> bool:
        """Whether ``head`` holds all bytes."""
        return len(self.head) == self.size


def read_ends(source: Source, index: int) -> FileEnds | Tensor:
    """Read the ends of a stored image, or its pixels if the source stores them decoded.

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


def read_header(
    source: Source, index: int, ends: FileEnds, levels: Levels = STORED
) -> tuple[Header, bool, dict[Any, Any]]:
    """Read the header of an image, and decode the image if its end does not show that it is whole.

    Returns:
        (header, whether the end of the format is missing although the image can be decoded,
        Pillow's ``info``: EXIF and other metadata).

    Raises:
        UnreadableImage: the header is not an image's, or the image is truncated.
        OSError, UserError: it cannot be read.
    """
    try:
        image = open_image(ends.head, levels)
    except UnreadableImage:
        if ends.whole:
            raise
        image = open_image(stored_bytes(source, index, ends), levels)  # its header is longer
    found, data = _has_end(image.format or "?", ends), ends.head
    if not found:
        data = stored_bytes(source, index, ends)
        image = open_image(data, levels)
        decode(data, levels=levels)
    if may_have_frames(ends.head):  # they lie behind the head
        data = stored_bytes(source, index, ends)
    pages = count_pages(data)
    header = Header(
        image.height,
        image.width,
        image.format or "?",
        image.mode,
        not found,
        pages,
        orientation(image) if "exif" in image.info else 1,
        image.info.get("samples", ""),
    )
    return header, found is False, image.info


def stored_bytes(source: Source, index: int, ends: FileEnds) -> bytes:
    """Return all bytes of the image with these ends.

    Raises:
        OSError, UserError: it cannot be read.
    """
    if ends.whole:
        return ends.head
    image = source[index].image
    assert isinstance(image, bytes)
    return image


def _has_end(format: str, ends: FileEnds) -> bool | None:
    """Whether the end of the format is there; None for formats without a fixed end."""
    if format in _ENDS:
        return ends.tail.rstrip(b"\0").endswith(_ENDS[format])
    if format == "WEBP":
        return int.from_bytes(ends.head[4:8], "little") + 8 <= ends.size
    if format == "BMP":
        return 0 < int.from_bytes(ends.head[2:6], "little") <= ends.size
    return None
