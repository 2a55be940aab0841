"""Read all images into memory, or scan their headers, before training begins."""

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import UserError
from ...io.console import ProgressCallback
from ..images.decode import READ_ERRORS, decode, image_size, read_error_reason
from ..images.headers import read_ends, read_header
from ..sources.source import Source
from .workers import iterate_in_workers

_NAMED = 3  # unreadable files named in a message

Memory = Literal["auto", "always", "never"]


class ScannedImages(NamedTuple):
    """All images of a source: their pixels if they fit in memory, sizes and read errors."""

    pixels: Tensor | None
    """uint8 [N, 3, H, W], zero where unreadable; None if sizes differ or memory is too small."""
    unreadable: dict[int, str]
    """{index: reason}. Without pixels, damage behind an image's header is not found."""
    sizes: set[tuple[int, int]]
    """(height, width) that occur."""

    @property
    def complete_pixels(self) -> Tensor | None:
        """The pixels if every image is readable, else None."""
        return None if self.unreadable else self.pixels


def load_or_scan(
    source: Source,
    *,
    upright: bool = False,
    memory: Memory = "auto",
    memory_gb: float = 2.0,
    workers: int = 0,
    on_progress: ProgressCallback = lambda done, of: None,
    serial_below: int = 4096,
    chunk: int = 256,
) -> ScannedImages:
    """Decode all images into one tensor if they fit in memory, else scan their headers.

    Args:
        source: the images.
        upright: turn images as their EXIF orientation says.
        memory: auto: load images of one size that fit ``memory_gb``; always: load at any size.
        memory_gb: GiB that the decoded images may take.
        workers: processes that scan headers.
        on_progress: called with (images done, images).
        serial_below: fewer headers are read by this process, before workers would have started.
        chunk: headers that a worker reads at a time.

    Raises:
        UserError: ``memory="always"`` with images of different sizes.
    """
    total, unreadable, sizes, done = len(source), {}, set(), 0
    load = memory != "never"
    pixels: Tensor | None = None
    while load and done < total:
        try:
            image = decode(source[done].image, upright=upright)
            sizes.add(tuple(image.shape[1:]))
            fits = memory == "always" or total * image.numel() <= memory_gb * 2**30
            load = fits and len(sizes) == 1
            if load and pixels is None:
                pixels = torch.zeros(total, *image.shape, dtype=torch.uint8)
            if load and pixels is not None:
                pixels[done] = image
        except READ_ERRORS as error:
            unreadable[done] = read_error_reason(error)
        if not load and memory == "always":
            raise UserError(
                "option-conflict",
                f"--memory always needs images of one size, but the size of {source.name(done)}"
                " differs from those before it; use --memory auto.",
            )
        done += 1
        on_progress(done, total)
    if load:
        return ScannedImages(pixels, unreadable, sizes)
    workers = 0 if total - done < serial_below else workers
    for scanned in iterate_in_workers(HeaderScan(source, done, chunk), workers):
        unreadable |= scanned.unreadable
        sizes |= scanned.sizes
        done += scanned.images
        on_progress(done, total)
    return ScannedImages(None, unreadable, sizes)


class ScannedHeaders(NamedTuple):
    """Sizes and read errors of a chunk of images."""

    sizes: set[tuple[int, int]]
    unreadable: dict[int, str]
    images: int


class HeaderScan(Dataset):
    """Item c is the :class:`ScannedHeaders` of chunk c of the images from ``first`` on."""

    def __init__(self, source: Source, first: int, chunk: int) -> None:
        self.source = source
        self.chunks = torch.arange(first, len(source)).split(chunk)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, chunk: int) -> ScannedHeaders:
        sizes, unreadable = set(), {}
        indices = self.chunks[chunk].tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about metadata that are not used
            for index in indices:
                try:
                    ends = read_ends(self.source, index)
                    if isinstance(ends, Tensor):
                        sizes.add((ends.shape[1], ends.shape[2]))
                    else:
                        sizes.add(read_header(self.source, index, ends)[0][:2])
                except READ_ERRORS as error:
                    unreadable[index] = read_error_reason(error)
        return ScannedHeaders(sizes, unreadable, len(indices))


def require_readable(source: Source, unreadable: dict[int, str], policy: str) -> None:
    """Raise an error that names unreadable images, unless the policy is to skip them.

    Args:
        source: the images.
        unreadable: {index: reason}.
        policy: "error" or "skip"; if no image of the source is readable, both raise.

    Raises:
        UserError: see above.
    """
    if not unreadable or (policy == "skip" and len(unreadable) < len(source)):
        return
    named = [f"{source.name(i)} ({unreadable[i]})" for i in sorted(unreadable)[:_NAMED]]
    more = f" and {len(unreadable) - _NAMED:,} more" if len(unreadable) > _NAMED else ""
    fix = "repair or remove them, or exclude them with --unreadable skip"
    if len(unreadable) == len(source):
        fix = "no readable image remains"
    raise UserError(
        "unreadable-images",
        f"{len(unreadable):,} of {len(source):,} images cannot be read: {'; '.join(named)}{more};"
        f" {fix}.",
    )


def typical_side(source: Source) -> int:
    """Return the median shorter side, in pixels, of up to 64 images spread over the source.

    Raises:
        UserError: none of them can be read.
    """
    sides, unreadable = [], {}
    for i in torch.linspace(0, len(source) - 1, min(64, len(source))).long().tolist():
        try:
            image = source[i].image
            size = image_size(image)[:2] if isinstance(image, bytes) else image.shape[1:]
            sides.append(min(size))
        except READ_ERRORS as error:
            unreadable[i] = read_error_reason(error)
    if not sides:
        require_readable(source, unreadable, "error")
    return sorted(sides)[len(sides) // 2]
