"""Sources made of others: several splits as one, some images of one, every page of a file."""

import hashlib
import io
import warnings
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .source import ImagePage, Sample, Source

_PAGED = ("TIFF", "GIF", "WEBP", "PNG")  # further pictures of MPO are previews


class CombinedSplits(Source):
    """The images of several splits, one after another. Images of a split without labels have -1."""

    def __init__(self, uri: str, parts: dict[str, Source]) -> None:
        self.uri, self.parts = uri, parts
        self._starts = [0, *accumulate(map(len, parts.values()))]
        self._sources = [*parts.values()]
        named = [part.classes for part in self._sources if part.classes is not None]
        self.classes = list(dict.fromkeys(name for names in named for name in names)) or None
        self.labels: Tensor | None = None
        if self.classes is not None:
            number = {name: label for label, name in enumerate(self.classes)}
            self.labels = torch.cat([_renumbered(part, number) for part in self._sources])

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def __getitem__(self, index: int) -> Sample:
        part, row = self._find(index)
        return Sample(index, self._sources[part][row].image, self.label(index))

    def name(self, index: int) -> str:
        """Return the image's name in its split, after the name of the split."""
        part, row = self._find(index)
        return f"{[*self.parts][part]}: {self._sources[part].name(row)}"

    def file(self, index: int) -> Path | None:
        """Return the file that holds this image alone, or None."""
        part, row = self._find(index)
        return self._sources[part].file(row)

    def fingerprint(self) -> str:
        """Hash the fingerprints of all splits."""
        lines = "\n".join(part.fingerprint() for part in self._sources)
        return hashlib.sha256(lines.encode()).hexdigest()

    def stored_bytes(self) -> int:
        """Return the size of all images in bytes."""
        return sum(part.stored_bytes() for part in self._sources)


def _renumbered(part: Source, number: dict[str, int]) -> Tensor:
    """Return the labels of a split, int64 [n], in the numbers of all splits."""
    if part.labels is None or part.classes is None:
        return torch.full((len(part),), -1)
    return torch.tensor([*(number[name] for name in part.classes), -1])[part.labels]


class SourceSubset(Source):
    """Some images of a source, as a source.

    Args:
        source: all images.
        index: int64 [n], the images of the subset.
    """

    def __init__(self, source: Source, index: Tensor) -> None:
        self.source, self.index = source, index
        self.uri, self.classes = source.uri, source.classes
        self.labels: Tensor | None = None if source.labels is None else source.labels[index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.index[index])]._replace(index=index)

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        return self.source.name(int(self.index[index]))

    def file(self, index: int) -> Path | None:
        """Return the file that holds an image alone, or None."""
        return self.source.file(int(self.index[index]))

    def fingerprint(self) -> str:
        """Return a hash of the source's fingerprint and the subset."""
        whole = self.source.fingerprint().encode()
        return hashlib.sha256(whole + self.index.numpy().tobytes()).hexdigest()

    def stored_bytes(self) -> int:
        """Return the stored bytes, estimated by the share of the images."""
        return round(self.source.stored_bytes() * len(self) / len(self.source))


class Pages(Source):
    """Every page of multi-page TIFF files, and every frame of animations, as an image."""

    def __init__(self, source: Source) -> None:
        self.uri, self.source, self.classes = source.uri, source, source.classes
        counts = [_count_pages(source, index) for index in range(len(source))]
        self._starts = [0, *accumulate(counts)]
        self.labels = None
        if source.labels is not None:
            self.labels = source.labels.repeat_interleave(torch.tensor(counts))

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = bisect_right(self._starts, index) - 1
        return image, index - self._starts[image]

    def __getitem__(self, index: int) -> Sample:
        number, page = self._find(index)
        image = self.source[number].image
        if isinstance(image, bytes) and self._starts[number + 1] - self._starts[number] > 1:
            image = ImagePage(image, page)
        return Sample(index, image, self.label(index))

    def name(self, index: int) -> str:
        """Return the file's name and the number of the page, from 1."""
        image, page = self._find(index)
        several = self._starts[image + 1] - self._starts[image] > 1
        return self.source.name(image) + (f" page {page + 1}" if several else "")

    def fingerprint(self) -> str:
        """Hash the source and the numbers of pages."""
        return hashlib.sha256(f"{self.source.fingerprint()}{self._starts}".encode()).hexdigest()

    def stored_bytes(self) -> int:
        """Return the size of all files in bytes."""
        return self.source.stored_bytes()


def _count_pages(source: Source, index: int) -> int:
    """Return the pages of an image; 1 if it cannot be read, which decoding reports."""
    try:
        data = source[index].image
        if not isinstance(data, bytes):
            return 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_PAGED) as image:
                return max(1, getattr(image, "n_frames", 1))
    except Exception:  # Pillow's parsers raise errors of any kind
        return 1
