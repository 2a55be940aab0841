"""The interface of image sources, and helpers that all kinds of sources share."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ...errors import UserError

_FINGERPRINT_SAMPLES = 64


class ImagePage(bytes):
    """Encoded bytes of a file with several pages, of which one is meant."""

    page: int
    """From 0."""

    def __new__(cls, data: bytes, page: int) -> "ImagePage":
        """Return the bytes with the number of a page."""
        found = super().__new__(cls, data)
        found.page = page
        return found

    def __reduce__(self) -> tuple[type, tuple[bytes, int]]:
        return type(self), (bytes(self), self.page)


class Sample(NamedTuple):
    """One image of a source."""

    index: int
    """Row in the memory bank, 0..N-1."""
    image: bytes | Tensor
    """Encoded bytes, or decoded uint8 [3, H, W]."""
    label: int | None


class ImageRecord(NamedTuple):
    """One image to be written into a packed file."""

    index: int
    name: str
    """Name for messages."""
    image: bytes
    label: int | None
    path: str | None = None
    """Path relative to the source's folder; None without a file of its own."""
    format: str = ""
    """Pillow's name (``JPEG``); empty if unknown."""


class Source(Protocol):
    """Random access to N images. Picklable, so that worker processes can read it."""

    uri: str
    classes: list[str] | None
    """Class names by label; None without labels."""
    labels: Tensor | None
    """int64 [N]; -1 for an image without a label. None without labels."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str:
        """Return the image's name for messages: its path or record."""
        ...

    def file(self, index: int) -> Path | None:
        """Return the file that holds this image alone, which can be read in part, or None."""
        return None

    def label(self, index: int) -> int | None:
        """Return the image's label, or None without labels."""
        return None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """Return a hash that stays the same only while every index means the same image."""
        ...

    def stored_bytes(self) -> int:
        """Return the size of all images as they are stored, in bytes."""
        ...


def content_hash(source: Source, facts: Iterable[str | np.ndarray]) -> str:
    """Hash the number of images, the facts, and the bytes of 64 images.

    Args:
        source: the images.
        facts: a line for each image, arrays over all images, or both.
    """
    digest = hashlib.sha256(f"{len(source)}\n".encode())
    for fact in facts:
        if isinstance(fact, str):
            digest.update(fact.encode("utf-8", "surrogateescape") + b"\n")
        else:
            digest.update(np.ascontiguousarray(fact).data)
    for i in np.linspace(0, len(source) - 1, min(_FINGERPRINT_SAMPLES, len(source))).astype(int):
        try:
            image = source[int(i)].image
        except (OSError, UserError):  # a missing or damaged file changes the content
            image = b"\0missing"
        digest.update(image if isinstance(image, bytes) else image.numpy().tobytes())
    return digest.hexdigest()


def encoded_bytes(image: bytes | Tensor) -> bytes:
    """Return encoded bytes unchanged, and decoded pixels [3, H, W] as PNG."""
    if isinstance(image, bytes):
        return image
    from torchvision.io import encode_png

    return encode_png(image.contiguous()).numpy().tobytes()
