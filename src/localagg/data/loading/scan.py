"""Read all images into memory, or scan their headers, before training begins."""

import functools
import warnings
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...config import ViewConfig
from ...errors import UserError
from ...io.console import ProgressCallback
from ..images.decode import READ_ERRORS, decode, decoded_size, read_error_reason
from ..images.headers import read_ends, read_header
from ..images.levels import STORED, Levels, levels_for_sizes
from ..sources.pages import count_pages
from ..sources.source import ImagePage, Source
from .workers import map_in_workers

_NAMED = 3  # unreadable files named in a message

Memory = Literal["auto", "always", "never"]


class ScannedImages(NamedTuple):
    """Images of a source: their pixels if they fit in memory, sizes and read errors."""

    pixels: Tensor | None
    """uint8 [N, 3, H, W], zero where unreadable; None if sizes differ or memory is too small."""
    unreadable: dict[int, str]
    """{index: reason}. Without pixels, damage behind an image's header is not found."""
    sizes: set[tuple[int, int]]
    """(height, width) that occur."""
    pages: int = 0
    """Further pages and frames of files, which are not read."""

    @property
    def complete_pixels(self) -> Tensor | None:
        """The pixels if every image is readable, else None."""
        return None if self.unreadable else self.pixels


def load_or_scan(
    source: Source,
    *,
    upright: bool = False,
    levels: Levels = STORED,
    memory: Memory = "auto",
    memory_gb: float = 2.0,
    workers: int = 0,
    on_progress: ProgressCallback = lambda done, total: None,
    serial_below: int = 4096,
    chunk: int = 256,
) -> ScannedImages:
    """Decode all images into one tensor if they fit in memory, else scan their headers.

    Args:
        source: the images.
        upright: turn images by their EXIF orientation.
        levels: mapping of deep samples and of bands.
        memory: "auto": load images of one size that fit ``memory_gb``; "always": any number.
        memory_gb: GiB that the decoded images may take.
        workers: processes that scan headers.
        on_progress: called with (images done, images).
        serial_below: fewer headers are read by this process, before workers would have started.
        chunk: headers that a worker reads at a time.

    Raises:
        UserError: ``memory="always"`` with images of different sizes.
    """
    found, done = ScannedImages(None, {}, set()), 0
    if memory != "never":
        load = functools.partial(_load, upright=upright, levels=levels, on_progress=on_progress)
        found, done = load(source, None if memory == "always" else memory_gb * 2**30)
    total, unreadable, pages = len(source), found.unreadable, found.pages
    if total and done == total:
        return found
    workers = 0 if total - done < serial_below else workers
    chunks = [range(first, min(first + chunk, total)) for first in range(done, total, chunk)]
    scan = functools.partial(scan_headers, source, levels=levels)
    for indices, scanned in zip(chunks, map_in_workers(scan, chunks, workers), strict=True):
        unreadable |= scanned.unreadable
        found.sizes.update(scanned.sizes)
        pages += scanned.pages
        on_progress(indices.stop, total)
    return ScannedImages(None, unreadable, found.sizes, pages)


def _load(
    source: Source,
    most: float | None,
    *,
    upright: bool,
    levels: Levels,
    on_progress: ProgressCallback,
) -> tuple[ScannedImages, int]:
    """Decode images while they have one size and, where ``most`` is given, fit so many bytes.

    Returns:
        The scan, with pixels if all images are loaded; and the number of images done.

    Raises:
        UserError: different sizes, with ``most`` None.
    """
    total, found, pages = len(source), ScannedImages(None, {}, set()), 0
    pixels: Tensor | None = None
    for done in range(total):
        try:
            stored = source[done].image
            pages += _further_pages(stored)
            image = decode(stored, upright=upright, levels=levels)
        except READ_ERRORS as error:
            found.unreadable[done] = read_error_reason(error)
            on_progress(done + 1, total)
            continue
        found.sizes.add((image.shape[1], image.shape[2]))
        if len(found.sizes) > 1 and most is None:
            raise UserError(
                "option-conflict",
                f"--memory always needs images of one size, but the size of {source.name(done)}"
                " differs from those before it; use --memory auto.",
            )
        on_progress(done + 1, total)
        if len(found.sizes) > 1 or (most is not None and total * image.numel() > most):
            return found._replace(pages=pages), done + 1
        if pixels is None:
            pixels = torch.zeros(total, *image.shape, dtype=torch.uint8)
        pixels[done] = image
    return found._replace(pixels=pixels, pages=pages), total


def scan_headers(source: Source, indices: range, levels: Levels = STORED) -> ScannedImages:
    """Return sizes and read errors of some images by their headers, without pixels."""
    found, pages = ScannedImages(None, {}, set()), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata that are not used
        for index in indices:
            try:
                ends = read_ends(source, index)
                if isinstance(ends, Tensor):
                    found.sizes.add((ends.shape[1], ends.shape[2]))
                else:
                    header = read_header(source, index, ends, levels)[0]
                    found.sizes.add(header[:2])
                    pages += 0 if isinstance(ends.head, ImagePage) else header.pages - 1
            except READ_ERRORS as error:
                found.unreadable[index] = read_error_reason(error)
    return found._replace(pages=pages)


def _further_pages(image: bytes | Tensor) -> int:
    if not isinstance(image, bytes) or isinstance(image, ImagePage):
        return 0
    return count_pages(image) - 1


def require_readable(source: Source, unreadable: dict[int, str], policy: str = "") -> None:
    """Raise an error that names unreadable images {index: reason}, unless ``policy`` is "skip".

    Args:
        source: the images.
        unreadable: the reasons.
        policy: the option --unreadable. Default: the caller has no such option.

    Raises:
        UserError: unreadable images and the policy "error"; or no image is readable.
    """
    if not unreadable or (policy == "skip" and len(unreadable) < len(source)):
        return
    named = [f"{source.name(i)} ({unreadable[i]})" for i in sorted(unreadable)[:_NAMED]]
    more = f" and {len(unreadable) - _NAMED:,} more" if len(unreadable) > _NAMED else ""
    fix = "repair or remove them"
    if policy:
        fix += ", or exclude them with --unreadable skip"
    if len(unreadable) == len(source):
        fix = "no readable image remains"
    raise UserError(
        "unreadable-images",
        f"{len(unreadable):,} of {len(source):,} images cannot be read: {'; '.join(named)}{more};"
        f" {fix}.",
    )


def typical_side(source: Source, views: ViewConfig) -> int:
    """Return the median shorter side, in pixels, of up to 64 images spread over the source.

    Raises UserError if none of them can be read.
    """
    sides, unreadable, levels = [], {}, levels_for_sizes(views)
    for i in np.linspace(0, len(source) - 1, min(64, len(source))).astype(int).tolist():
        try:
            sides.append(min(decoded_size(source[i].image, levels=levels)))
        except READ_ERRORS as error:
            unreadable[i] = read_error_reason(error)
    if not sides:
        require_readable(source, unreadable, "error")
    return sorted(sides)[len(sides) // 2]
