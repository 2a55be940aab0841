"""Every page or frame of a file as an image, and how many a file has."""

import hashlib
import io
import warnings
from itertools import accumulate
from typing import Any

import torch
from PIL import Image, TiffImagePlugin

from .combined import locate
from .file_kinds import HEAD, kind_of
from .source import ImagePage, Sample, Source


class Pages(Source):
    """Every page of multi-page TIFF files, and every frame of animations, as an image."""

    def __init__(self, source: Source) -> None:
        self.uri, self.source, self.classes = source.uri, source, source.classes
        counts = [_pages_of(source, index) for index in range(len(source))]
        self._starts = [0, *accumulate(counts)]
        self.labels = None
        if source.labels is not None:
            self.labels = source.labels.repeat_interleave(torch.tensor(counts))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        number, page = locate(index, self._starts)
        image = self.source[number].image
        if isinstance(image, bytes) and self._starts[number + 1] - self._starts[number] > 1:
            image = ImagePage(image, page)
        return Sample(index, image, self.label(index))

    def name(self, index: int) -> str:
        """Return the file's name and the number of the page, from 1."""
        image, page = locate(index, self._starts)
        several = self._starts[image + 1] - self._starts[image] > 1
        return self.source.name(image) + (f" page {page + 1}" if several else "")

    def fingerprint(self) -> str:
        """Hash the source and the numbers of pages."""
        return hashlib.sha256(f"{self.source.fingerprint()}{self._starts}".encode()).hexdigest()

    def stored_bytes(self) -> int:
        """Return the size of all files in bytes."""
        return self.source.stored_bytes()


def _pages_of(source: Source, index: int) -> int:
    """Return the pages of an image; 1 if it cannot be read, which decoding reports."""
    try:
        data = source[index].image
    except OSError:
        return 1
    return count_pages(data) if isinstance(data, bytes) else 1


def count_pages(data: bytes) -> int:
    """Return the pages of a TIFF file, or the frames of a GIF, PNG, WebP or DICOM file; else 1.

    Further pictures of an MPO file are previews.
    """
    if data[:2] in (b"II", b"MM"):
        return count_tiff_pages(data)
    if kind_of(data[:HEAD]) == "DICOM":
        return _count_dicom_frames(data)
    if not may_have_frames(data):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("GIF", "PNG", "WEBP")) as image:
                return max(1, getattr(image, "n_frames", 1))
    except Exception:  # Pillow's parsers raise errors of any kind
        return 1


def may_have_frames(head: bytes) -> bool:
    """Return whether these are the first bytes of a GIF or DICOM file, or of an animated PNG or
    WebP file."""
    animated_webp = (
        head[:4] == b"RIFF" and head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2 > 0
    )
    animated_png = head[:4] == b"\x89PNG" and b"acTL" in head[:4096]
    return head[:4] == b"GIF8" or animated_webp or animated_png or kind_of(head) == "DICOM"


def _count_dicom_frames(data: bytes) -> int:
    try:
        import pydicom

        tag = "NumberOfFrames"
        header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=[tag])
        return max(1, int(header.get(tag) or 1))
    except Exception:  # it is missing, which decoding reports, or its parser raises
        return 1


def count_tiff_pages(data: bytes) -> int:
    """Return the pages of a TIFF file; 1 if they cannot be counted, and at most 100,000."""
    try:
        file, big = io.BytesIO(data), data[2:4] in (b"+\0", b"\0+")
        tags: Any = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if big else 8))
        pages, seen = 0, set[int]()
        while tags.next and tags.next not in seen and pages < 100_000:
            seen.add(tags.next)
            file.seek(tags.next)
            tags.load(file)
            pages += 1
        return max(1, pages)
    except Exception:  # Pillow's parser raises errors of any kind
        return 1
