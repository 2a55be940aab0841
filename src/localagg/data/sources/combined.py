"""Sources made of others: several splits as one, some images of one."""

import hashlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from .source import Sample, Source


def locate(index: int, starts: list[int]) -> tuple[int, int]:
    """Return the part that an index lies in, and its place there.

    Args:
        index: of all images.
        starts: of each part, and the number of all images.

    Raises:
        IndexError: there is no such image.
    """
    if not 0 <= index < starts[-1]:
        raise IndexError(index)
    part = bisect_right(starts, index) - 1
    return part, index - starts[part]


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

    def __getitem__(self, index: int) -> Sample:
        part, row = locate(index, self._starts)
        return Sample(index, self._sources[part][row].image, self.label(index))

    def name(self, index: int) -> str:
        """Return the image's name in its split, after the name of the split."""
        part, row = locate(index, self._starts)
        return f"{[*self.parts][part]}: {self._sources[part].name(row)}"

    def file(self, index: int) -> Path | None:
        """Return the file that holds this image alone, or None."""
        part, row = locate(index, self._starts)
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
