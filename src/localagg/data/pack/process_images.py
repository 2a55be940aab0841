"""The images of a pack: read, checked, hashed and shrunk by workers, and gathered into files."""

import functools
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...errors import UserError
from ...io.console import ProgressCallback
from ...io.files import atomic_write
from ..images.decode import ORIENTATION, UnreadableImage, decode, image_size, orientation
from ..loading.workers import map_in_workers
from ..sources.source import ImageRecord, Source, encoded_bytes
from .formats import Format
from .partial_folder import PartialFolder

_CHUNK = 16  # images that a worker takes at a time
_SAMPLED = 64  # images shrunk to estimate the size of all
_MARGIN = 1.1  # of that estimate
_JPEG_LIMIT = 65_500  # pixels on a side


class Shrink(NamedTuple):
    """How images are made smaller."""

    size: int
    """Of the shorter side, in pixels; smaller images stay as they are."""
    quality: int
    """Of the JPEG."""


class _Item(NamedTuple):
    """What becomes of an image."""

    image: bytes
    label: int | None
    format: str
    fault: str | None
    """Why it cannot be decoded, or read."""
    lost: bool
    """Not even its bytes could be read."""
    shrunk: bool
    digest: bytes


def _process_chunk(source: Source, shrink: Shrink | None, chunk: range) -> list[_Item]:
    return [_item(source, index, shrink) for index in chunk]


def _item(source: Source, index: int, shrink: Shrink | None) -> _Item:
    try:
        _, image, label = source[index]
        image, fault, lost = encoded_bytes(image), None, False
    except (OSError, UserError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        image, fault, lost = b"", reason, True
        label = None if source.labels is None else int(source.labels[index])
    format, shrunk = "", False
    if not lost:
        try:
            format = image_size(image)[2]
            pixels = decode(image)
            smaller = shrink and _shrunk(pixels.permute(1, 2, 0).numpy(), shrink, image)
            if smaller:
                image, format, shrunk = smaller, "JPEG", True
        except UnreadableImage as error:
            fault = str(error)
    return _Item(image, label, format, fault, lost, shrunk, hashlib.sha256(image).digest())


def _shrunk(pixels: np.ndarray, shrink: Shrink, image: bytes) -> bytes | None:
    """Pixels [H, W, 3] as a smaller JPEG, with the EXIF orientation of the image that they are of;
    None where they are small enough."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    to = [max(1, round(side * shrink.size / shorter)) for side in (width, height)]
    if shorter <= shrink.size or max(to) > _JPEG_LIMIT:
        return None
    file = io.BytesIO()
    smaller = Image.fromarray(pixels).resize((to[0], to[1]), Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[ORIENTATION] = turn = orientation(image)
    smaller.save(file, "JPEG", quality=shrink.quality, exif=exif if turn > 1 else b"")
    return file.getvalue()


def estimate(source: Source, shrink: Shrink | None) -> int:
    """About how many bytes the images will have: as they are, or by shrinking some of them."""
    size = source.stored_bytes()
    if shrink is None:
        return size
    before = after = 0
    for i in np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int).tolist():
        try:
            before += len(encoded_bytes(source[i].image))
        except (OSError, UserError):
            continue
        after += len(_item(source, i, shrink).image)
    return int(size * _MARGIN * after / before) if before else size


def pack_images(
    source: Source,
    files: list[str],
    format: Format,
    shrink: Shrink | None,
    workers: int,
    partial: PartialFolder,
    show: ProgressCallback,
) -> None:
    """Write those files of a split that are not finished.

    Raises:
        UserError: none of several images in a row can be read.
        OSError: a file cannot be written.
    """
    rows = [format.rows(len(source), number, len(files)) for number in range(len(files))]
    todo = [number for number in range(len(files)) if files[number] not in partial.finished]
    chunks = {n: [rows[n][i : i + _CHUNK] for i in range(0, len(rows[n]), _CHUNK)] for n in todo}
    inputs = [chunk for n in todo for chunk in chunks[n]]
    stream = map_in_workers(functools.partial(_process_chunk, source, shrink), inputs, workers)
    before = len(source) - sum(len(rows[n]) for n in todo)
    for number in todo:
        tally = _Tally(source)
        path = partial.folder / files[number]
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as beside:
            format.write(beside, tally.records(chunks[number], stream, before, show), source)
        before += len(rows[number])
        partial.add(files[number], tally.facts, tally.digests)


class _Tally:
    """What is noted of the images of a file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.paths: Sequence[str] | None = getattr(source, "paths", None)
        self.formats: Counter[str] = Counter()
        self.unreadable: list[dict[str, Any]] = []
        self.bytes = self.shrunk = self.lost = 0
        self.digests: list[bytes] = []

    def records(
        self, chunks: list[range], stream: Iterator, before: int, show: ProgressCallback
    ) -> Iterator[ImageRecord]:
        """The images of a file, as they come from the workers."""
        for chunk in chunks:
            items: list[_Item] = next(stream)
            if len(items) > 1 and all(item.lost for item in items):
                raise UserError(
                    "TODO",
                    f"{self.source.name(chunk[0])} and the {len(items) - 1} images behind it cannot"
                    f" be read ({items[0].fault}); see that the data are there.",
                )
            for index, item in zip(chunk, items, strict=True):
                self._note(index, item)
                path = self.paths[index] if self.paths is not None else None
                name = self.source.name(index)
                yield ImageRecord(index, name, item.image, item.label, path, item.format)
                show(before + len(self.digests), len(self.source))

    def _note(self, index: int, item: _Item) -> None:
        self.bytes += len(item.image)
        self.shrunk += item.shrunk
        self.lost += item.lost
        self.digests.append(item.digest)
        if item.format:
            self.formats[item.format] += 1
        if item.fault is not None:
            name = self.source.name(index)
            self.unreadable.append({"index": index, "name": name, "reason": item.fault})

    @property
    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "bytes": self.bytes,
            "shrunk": self.shrunk,
            "lost": self.lost,
            "formats": dict(self.formats),
            "unreadable": self.unreadable,
        }


def _chunk_digests(source: Source, chunk: range) -> list[bytes]:
    """Hashes of images; an empty one of an unreadable image."""
    found = []
    for index in chunk:
        try:
            found.append(hashlib.sha256(encoded_bytes(source[index].image)).digest())
        except (OSError, UserError):
            found.append(b"")
    return found


def digests(source: Source, workers: int) -> Iterator[bytes]:
    """Yield the hash of each image of a source, in order."""
    chunks = [range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK)]
    for found in map_in_workers(functools.partial(_chunk_digests, source), chunks, workers):
        yield from found
