"""Read, check, hash and shrink the images of a pack in workers, and write them into files."""

import functools
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ...errors import UserError
from ...io.console import ProgressCallback
from ...io.files import atomic_write
from ..images.decode import (
    ORIENTATION,
    READ_ERRORS,
    decode,
    open_image,
    orientation,
    read_error_reason,
)
from ..loading.workers import map_in_workers
from ..sources.source import ImagePage, ImageRecord, Source, encoded_bytes
from .formats import PackFormat
from .partial_folder import PartialFolder

_CHUNK = 16  # images that a worker takes at a time
_SAMPLES = 64  # images shrunk to estimate the size of all
_MARGIN = 1.1  # factor on that estimate
_JPEG_LIMIT = 65_500  # pixels on a side


class ShrinkOptions(NamedTuple):
    """How images are made smaller."""

    size: int  # pixels of the shorter side; smaller images stay unchanged
    quality: int  # of the JPEG, 1 to 100


class ProcessedImage(NamedTuple):
    """An image as it is packed."""

    image: bytes
    label: int | None
    format: str  # Pillow's name; empty if unreadable
    error: str | None  # why the image cannot be read or decoded
    lost: bool  # not even its bytes could be read
    shrunk: bool
    sha256: bytes


def split_into_chunks(images: range, size: int = _CHUNK) -> list[range]:
    """Split image indices into the chunks that a worker takes at a time."""
    return [images[i : i + size] for i in range(0, len(images), size)]


def _process_chunk(
    source: Source, shrink: ShrinkOptions | None, chunk: range
) -> list[ProcessedImage]:
    return [process_image(source, index, shrink) for index in chunk]


def process_image(source: Source, index: int, shrink: ShrinkOptions | None) -> ProcessedImage:
    """Read, check and hash an image, and shrink it if it is larger than asked."""
    label = None if source.labels is None else int(source.labels[index])
    image, format, shrunk, error = b"", "", False, None
    lost = True
    try:
        sample = source[index]
        image, label, lost = packed_bytes(sample.image), sample.label, False
        format = open_image(image).format or "?"
        pixels = decode(image)
        if shrink and (smaller := _shrink(pixels.permute(1, 2, 0).numpy(), shrink, image)):
            image, format, shrunk = smaller, "JPEG", True
    except READ_ERRORS as failure:
        error = read_error_reason(failure)
    return ProcessedImage(image, label, format, error, lost, shrunk, hashlib.sha256(image).digest())


def packed_bytes(image: bytes | Tensor) -> bytes:
    """Return encoded bytes unchanged; decoded pixels, and a page of several, as PNG.

    Raises:
        UnreadableImage: the page cannot be decoded.
    """
    return encoded_bytes(decode(image) if isinstance(image, ImagePage) else image)


def _shrink(pixels: np.ndarray, shrink: ShrinkOptions, image: bytes) -> bytes | None:
    """Return pixels [H, W, 3] as a smaller JPEG with the image's EXIF orientation; None if they are
    small enough."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    to = [max(1, round(side * shrink.size / shorter)) for side in (width, height)]
    if shorter <= shrink.size or max(to) > _JPEG_LIMIT:
        return None
    file = io.BytesIO()
    smaller = Image.fromarray(pixels).resize((to[0], to[1]), Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[ORIENTATION] = turn = orientation(open_image(image))
    smaller.save(file, "JPEG", quality=shrink.quality, exif=exif if turn > 1 else b"")
    return file.getvalue()


def estimate_bytes(source: Source, shrink: ShrinkOptions | None) -> int:
    """Return the approximate bytes of all images, from shrinking some of them."""
    size = source.stored_bytes()
    if shrink is None:
        return size
    before = after = 0
    for i in np.linspace(0, len(source) - 1, min(_SAMPLES, len(source))).astype(int).tolist():
        try:
            before += len(packed_bytes(source[i].image))
        except READ_ERRORS:
            continue
        after += len(process_image(source, i, shrink).image)
    return int(size * _MARGIN * after / before) if before else size


def pack_images(
    source: Source,
    files: list[str],
    format: PackFormat,
    shrink: ShrinkOptions | None,
    workers: int,
    partial: PartialFolder,
    on_progress: ProgressCallback,
) -> None:
    """Write the unfinished files of a split.

    Raises:
        UserError: none of several images in a row can be read.
        OSError: a file cannot be written.
    """
    rows = {name: format.rows(len(source), n, len(files)) for n, name in enumerate(files)}
    rows = {name: images for name, images in rows.items() if name not in partial.finished}
    chunks = {name: split_into_chunks(images) for name, images in rows.items()}
    process = functools.partial(_process_chunk, source, shrink)
    results = map_in_workers(process, list(chain(*chunks.values())), workers)
    done = len(source) - sum(map(len, rows.values()))
    for name in rows:
        path = partial.folder / name
        path.parent.mkdir(exist_ok=True)
        summary = FileSummary(source, lambda new, done=done: on_progress(done + new, len(source)))
        with atomic_write(path) as beside:
            format.write(beside, summary.iterate_records(chunks[name], results), source)
        done += len(rows[name])
        partial.add(name, summary.facts(), summary.digests)


class FileSummary:
    """Counts, errors and hashes of the images that go into one file."""

    def __init__(self, source: Source, on_image: Callable[[int], None]) -> None:
        self.source, self.on_image = source, on_image
        self.counts: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.unreadable: list[dict[str, Any]] = []
        self.digests: list[bytes] = []

    def iterate_records(
        self, chunks: list[range], results: Iterator[list[ProcessedImage]]
    ) -> Iterator[ImageRecord]:
        """Yield the file's records as they come from the workers."""
        paths = getattr(self.source, "paths", None)
        for chunk in chunks:
            images = next(results)
            if len(images) > 1 and all(image.lost for image in images):
                raise UserError(
                    "unreadable-images",
                    f"{self.source.name(chunk[0])} and the {len(images) - 1} images after it cannot"
                    f" be read ({images[0].error}); check that the data are available.",
                )
            for index, image in zip(chunk, images, strict=True):
                name = self.source.name(index)
                self._add(index, name, image)
                path = None if paths is None else paths[index]
                yield ImageRecord(index, name, image.image, image.label, path, image.format)
                self.on_image(len(self.digests))

    def _add(self, index: int, name: str, image: ProcessedImage) -> None:
        sizes = {"bytes": len(image.image), "shrunk": int(image.shrunk), "lost": int(image.lost)}
        self.counts.update(sizes)
        self.digests.append(image.sha256)
        if image.format:
            self.formats[image.format] += 1
        if image.error is not None:
            self.unreadable.append({"index": index, "name": name, "reason": image.error})

    def facts(self) -> dict[str, Any]:
        """Return {"bytes", "shrunk", "lost", "formats", "unreadable"} for the report."""
        counts = {name: self.counts[name] for name in ("bytes", "shrunk", "lost")}
        return {**counts, "formats": dict(self.formats), "unreadable": self.unreadable}


def hash_images(source: Source, workers: int) -> Iterator[bytes]:
    """Yield the SHA-256 of each image of a source in order; empty if it cannot be read."""
    chunks = split_into_chunks(range(len(source)))
    for digests in map_in_workers(functools.partial(_hash_chunk, source), chunks, workers):
        yield from digests


def _hash_chunk(source: Source, chunk: range) -> list[bytes]:
    return [_hash_image(source, index) for index in chunk]


def _hash_image(source: Source, index: int) -> bytes:
    try:
        return hashlib.sha256(packed_bytes(source[index].image)).digest()
    except READ_ERRORS:
        return b""
