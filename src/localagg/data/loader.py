"""Order, batches and workers. Two feeds give batches of an epoch: from memory, or through workers.

The order of an epoch is a function of (seed, epoch), so any batch can be had again. Batches are
whole: the last N mod B images of an order are left out, other ones each epoch.
"""

import signal
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import PretrainConfig, UserError, ViewConfig, known, option
from ..draws import ORDER, permutation
from .augment import draw
from .crops import Boxes, crop_boxes, evaluation_boxes
from .decode import UnreadableImage, decode, decode_crops, image_size
from .sources import Source

_NAMED = 3  # unreadable files named in a message
Progress = Callable[[int, int], None]  # (done, of)
# What a source or a decoder raises about one image (a damaged record is a UserError).
FAULTS = (UnreadableImage, OSError, UserError)


class Batch(NamedTuple):
    """Images on their way to the device."""

    index: Tensor
    """int64 [B], on the CPU."""
    images: Tensor
    """uint8 [B, 3, H, W]: whole images from memory, or crops from workers. Ten crops:
    [B, 10, 3, S, S]."""


class Feed:
    """Batches of a source. ``cropped`` says whether workers have already cropped them.

    Args:
        source: the images.
        config: batch_size, seed, workers, memory, unreadable and the views.
        on_progress: called as images are read.

    Raises:
        UserError: images that cannot be read, unless they are to be skipped; fewer images than
            one batch.
    """

    def __init__(self, source: Source, config: PretrainConfig, on_progress: Progress) -> None:
        self.source, self.config = source, config
        self.pixels, self.unreadable = hold_or_scan(source, config, on_progress)
        self.cropped = self.pixels is None
        report_unreadable(source, self.unreadable, config.unreadable)
        valid = torch.ones(len(source), dtype=torch.bool)
        valid[list(self.unreadable)] = False
        self.valid = valid.nonzero().squeeze(1)
        self.batch = config.batch_size or 1
        for name in ("batch_size", "ir_batch_size"):
            if (getattr(config, name) or 0) > len(self.valid):
                raise UserError(
                    f"{option(name)} {getattr(config, name)} is more than the"
                    f" {len(self.valid):,} images; set it to at most {len(self.valid):,}."
                )
        self.steps = len(self.valid) // self.batch

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch in their order: int64 [images]."""
        return self.valid[permutation(len(self.valid), self.config.seed, ORDER, epoch)]

    def batches(self, epoch: int, first: int = 0, batch_size: int | None = None) -> Iterator[Batch]:
        """Batches ``first``.. of an epoch, of the configured size or another."""
        size = batch_size or self.batch
        chunks = self.order(epoch)[: len(self.valid) // size * size].view(-1, size)[first:]
        if self.pixels is not None:
            for index in chunks:
                yield Batch(index, self.pixels[index])
            return
        crops = _Crops(self.source, self.config.views, self.config.seed, epoch, chunks)
        skip = self.config.unreadable == "skip"
        for index, images, failed in through_workers(crops, self.config.workers):
            if failed and not skip:
                report_unreadable(self.source, failed, "error")
            self.unreadable.update(failed)
            if not len(index):
                report_unreadable(self.source, failed, "error")
            # The batch keeps its size (batch-norm counts on it): readable images stand in again.
            again = torch.arange(size) % len(index)
            yield Batch(index[again], images[again])


def report_unreadable(source: Source, failed: dict[int, str], policy: str) -> None:
    """Refuse ``failed`` images {index: reason}, unless the policy is to skip them."""
    if not failed or (policy == "skip" and len(failed) < len(source)):
        return
    named = "; ".join(f"{source.name(i)} ({failed[i]})" for i in sorted(failed)[:_NAMED])
    more = f" and {len(failed) - _NAMED:,} more" if len(failed) > _NAMED else ""
    way_out = "mend or remove them, or leave them out with --unreadable skip"
    if len(failed) == len(source):
        way_out = "none is left"
    raise UserError(
        f"{len(failed):,} of {len(source):,} images cannot be read: {named}{more}; {way_out}."
    )


def hold_or_scan(
    source: Source, config: PretrainConfig, on_progress: Progress
) -> tuple[Tensor | None, dict[int, str]]:
    """All pixels as one uint8 tensor [N, 3, H, W] if they fit, and the unreadable images.

    Where they do not fit (sizes differ, or more than ``memory_gb``) the pixels are None and every
    header has been read instead.

    Raises:
        UserError: ``memory="always"`` with images of different sizes.
    """
    size, failed, sizes = len(source), {}, set()
    hold = config.memory != "never"
    pixels: Tensor | None = None
    for i in range(size):
        try:
            image = source[i].image
            if hold:
                image = decode(image) if isinstance(image, bytes) else image
                sizes.add(tuple(image.shape[1:]))
                hold = len(sizes) == 1 and _fits(size, image, config)
                if hold and pixels is None:
                    pixels = torch.zeros(size, *image.shape, dtype=torch.uint8)
                if hold and pixels is not None:
                    pixels[i] = image
            elif isinstance(image, bytes):
                image_size(image)
        except FAULTS as error:
            failed[i] = _reason(error)
        if not hold and config.memory == "always":
            raise UserError(
                f"{source.name(i)} has another size than the images before it, so they cannot be"
                " held as one array; use --memory auto."
            )
        on_progress(i + 1, size)
    return (pixels if hold else None), failed


def decoded(source: Source, config: PretrainConfig) -> Tensor | None:
    """All pixels [N, 3, H, W] of a source to measure on, or None if they do not fit memory.

    Unreadable images keep it out of memory; :func:`evaluation_batches` leaves them out.
    """
    pixels, failed = hold_or_scan(source, config, lambda done, of: None)
    return None if failed else pixels


def typical_side(source: Source) -> int:
    """Median shorter side, in pixels, of up to 64 images spread over the source.

    Raises:
        UserError: none of them can be read.
    """
    sides, failed = [], {}
    for i in torch.linspace(0, len(source) - 1, min(64, len(source))).long().tolist():
        try:
            image = source[i].image
            size = image_size(image)[:2] if isinstance(image, bytes) else image.shape[1:]
            sides.append(min(size))
        except FAULTS as error:
            failed[i] = _reason(error)
    if not sides:
        report_unreadable(source, failed, "error")
    return sorted(sides)[len(sides) // 2]


def _fits(size: int, image: Tensor, config: PretrainConfig) -> bool:
    return config.memory == "always" or size * image.numel() <= config.memory_gb * 2**30


# --- Workers: decode and crop, by the same draws as on the device ---------------------------------


class _Crops(Dataset):
    """Item s is batch s of an epoch, decoded and randomly cropped."""

    def __init__(
        self, source: Source, views: ViewConfig, seed: int, epoch: int, chunks: Tensor
    ) -> None:
        self.source, self.views, self.seed, self.epoch = source, views, seed, epoch
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, dict[int, str]]:
        index = self.chunks[step]
        crop = draw(self.views, self.seed, self.epoch, index).crop

        def boxes(i: int, height: Tensor, width: Tensor) -> list[Boxes]:
            return [crop_boxes(self.views, crop[i : i + 1], height, width)]

        index, images, failed = _read(self.source, index, self.views, boxes)
        return index, images.squeeze(1), failed


class _Measured(Dataset):
    """Item s is batch s of all images in order, decoded and cropped: one view each, or ten."""

    def __init__(
        self, source: Source, views: ViewConfig, chunks: list[Tensor], ten_crop: bool
    ) -> None:
        self.source, self.views, self.chunks, self.ten_crop = source, views, chunks, ten_crop

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, dict[int, str]]:
        def boxes(i: int, height: Tensor, width: Tensor) -> list[Boxes]:
            return evaluation_boxes(self.views, height, width, ten_crop=self.ten_crop)

        index, images, failed = _read(self.source, self.chunks[step], self.views, boxes)
        if self.ten_crop:
            return index, torch.cat([images, images.flip(4)], dim=1), failed
        return index, images.squeeze(1), failed


def _read(
    source: Source,
    index: Tensor,
    views: ViewConfig,
    boxes: Callable[[int, Tensor, Tensor], list[Boxes]],
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """(index, crops [B, V, 3, S, S], failed) of the readable ones among ``index``."""
    size = known(views.image_size)
    resize = "area" if views.augmentation == "reference" else "bilinear"
    images, kept, failed = [], [], {}
    for i, row in enumerate(index.tolist()):
        try:
            data = source[row].image
            if not isinstance(data, bytes):
                data = _encode(data)
            height, width, _ = image_size(data)
            found = []
            for box in boxes(i, torch.tensor([height]), torch.tensor([width])):
                top, left, h, w = (int(value) for value in box)
                found.append((left, top, left + w, top + h))
            images.append(decode_crops(data, found, size, resize=resize))
            kept.append(row)
        except FAULTS as error:
            failed[row] = _reason(error)
    none = torch.empty(0, 1, 3, size, size, dtype=torch.uint8)
    stacked = torch.stack(images) if images else none
    return torch.tensor(kept, dtype=torch.int64), stacked, failed


def _reason(error: Exception) -> str:
    """Why an image cannot be read, without the path that the message names anyway."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _encode(pixels: Tensor) -> bytes:
    """Decoded pixels as PNG, so that the few decoded sources take the same path."""
    from torchvision.io import encode_png

    return encode_png(pixels.contiguous()).numpy().tobytes()


def _ignore_interrupt(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def through_workers(items: Dataset, workers: int) -> Iterator:
    """The items of a dataset in order, made by ``workers`` processes (0: by this one)."""
    return iter(
        DataLoader(
            items,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_ignore_interrupt,
            prefetch_factor=4 if workers else None,
        )
    )


# --- Evaluation: every image once, in order, fixed views ------------------------------------------


def evaluation_batches(
    source: Source,
    views: ViewConfig,
    *,
    batch: int = 256,
    workers: int = 0,
    ten_crop: bool = False,
) -> Iterator[Batch]:
    """The central view of every readable image, in order: uint8 [B, 3, S, S].

    Images that cannot be read are left out; compare the indices with the source to count them.

    Args:
        source: the images.
        views: augmentation, image_size and eval_crop.
        batch: images at a time.
        workers: processes that decode.
        ten_crop: the ten views of :func:`augment.ten_crop_views` instead: uint8 [B, 10, 3, S, S].
    """
    chunks = list(torch.arange(len(source)).split(batch))
    for index, images, _ in through_workers(_Measured(source, views, chunks, ten_crop), workers):
        if len(index):
            yield Batch(index, images)


class Throttle:
    """Calls through at most every ``seconds``; progress bars need no more."""

    def __init__(self, call: Progress, seconds: float = 0.1) -> None:
        self.call, self.seconds, self.last = call, seconds, 0.0

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if done == of or now - self.last >= self.seconds:
            self.last = now
            self.call(done, of)
