"""Order, batches and workers. Two feeds give batches of an epoch: from memory, or through workers.

The order of an epoch is a function of (seed, epoch), so any batch can be had again. Batches are
whole: the last N mod B images of an order are left out, other ones each epoch.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import PretrainConfig, ViewConfig, flag
from ...distributed.collectives import World
from ...engine.counter_rng import ORDER, permutation
from ...errors import UserError
from ..images.decode import decode, image_size
from ..images.headers import FAULTS, Headers, reason
from ..images.nvjpeg import EncodedCrops
from ..sources.open import Source
from .cropping import Crops, Measured
from .workers import Progress, Throttle, through_workers

__all__ = [
    "FAULTS",
    "Batch",
    "Crops",
    "Feed",
    "Progress",
    "Throttle",
    "evaluation_batches",
    "on_device",
]

_NAMED = 3  # unreadable files named in a message
_FEW = 4096  # headers that are read sooner than worker processes start


class Batch(NamedTuple):
    """Images on their way to the device."""

    index: Tensor
    """int64 [B], on the CPU."""
    images: Tensor
    """uint8 [B, 3, H, W]: whole images from memory, or crops from workers. Ten crops:
    [B, 10, 3, S, S]. With ``--nvjpeg``, until they are on the device: EncodedCrops."""


Fail = Callable[[dict[int, str]], None]
"""Called with {index: reason} of images that cannot be read."""


class Feed:
    """Batches of a source. ``cropped`` says whether workers have already cropped them.

    An unreadable image keeps its index and its bank row. Those known when the run begins are left
    out of ``valid``, from which the epochs are drawn. One that fails later (its damage shows only
    when it is decoded) is not read again: readable images of its batch stand in for it, so that
    batches and epochs stay as long as they were, and a resumed run draws the same ones.

    Each of several ranks reads its share of each batch. What stands in for an image that fails
    later is then of the share, not of the batch.

    Args:
        source: the images.
        config: batch_size, seed, workers, memory, unreadable and the views.
        on_progress: called as images are read.
        before: {"left_out", "unreadable"} of the run that goes on, as :meth:`state` gave them.
        world: the ranks, which all have the same source. None: this process alone.

    Raises:
        UserError: images that cannot be read, unless they are to be skipped; fewer images than
            one batch.
    """

    def __init__(
        self,
        source: Source,
        config: PretrainConfig,
        on_progress: Progress,
        *,
        before: dict[str, list[int]] | None = None,
        world: World | None = None,
    ) -> None:
        self.source, self.config, self.world = source, config, world or World()
        self.pixels, self.unreadable, self.sizes = _hold_or_scan(source, config, on_progress)
        self.cropped = self.pixels is None
        report_unreadable(source, self.unreadable, config.unreadable)
        left_out = list(self.unreadable)
        if before is not None:
            left_out = before["left_out"]
            earlier = dict.fromkeys(before["unreadable"], "unreadable earlier in this run")
            self.unreadable = earlier | self.unreadable
        valid = torch.ones(len(source), dtype=torch.bool)
        valid[left_out] = False
        self.valid = valid.nonzero().squeeze(1)
        self.batch = config.batch_size or 1
        for name in ("batch_size", "ir_batch_size"):
            if (getattr(config, name) or 0) > len(self.valid):
                raise UserError(
                    "TODO",
                    f"{flag(name)} {getattr(config, name)} is more than the"
                    f" {len(self.valid):,} images; set it to at most {len(self.valid):,}.",
                )
        self.steps = len(self.valid) // self.batch

    def state(self) -> dict[str, list[int]]:
        """What a resumed run has to know: images never drawn, and all that cannot be read."""
        self.agree()
        left_out = torch.ones(len(self.source), dtype=torch.bool)
        left_out[self.valid] = False
        never = left_out.nonzero().squeeze(1).tolist()
        return {"left_out": never, "unreadable": sorted(self.unreadable)}

    def agree(self) -> None:
        """Ranks tell one another which images they could not read. One exchange of objects."""
        for unreadable in self.world.gather_objects(self.unreadable):
            self.unreadable = self.unreadable | unreadable

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch in their order: int64 [images]."""
        return self.valid[permutation(len(self.valid), self.config.seed, ORDER, epoch)]

    def batches(self, epoch: int, first: int = 0, batch_size: int | None = None) -> Iterator[Batch]:
        """This rank's share of batches ``first``.. of an epoch, of their size or another."""
        size = batch_size or self.batch
        order = self.order(epoch)[: len(self.valid) // size * size]
        part = self.world.part(size)
        own = (chunk[part.start : part.stop] for chunk in order.split(size)[first:])
        chunks, size = [self._readable(chunk) for chunk in own], len(part)
        if self.pixels is not None:
            for index in chunks:
                index = _filled(index, size)
                yield Batch(index, self.pixels.index_select(0, index))  # rows as a whole
            return
        crops = Crops(self.source, self.config.views, self.config.seed, epoch, chunks)
        pin = self.config.device in ("auto", "cuda") and torch.cuda.is_available()
        for index, images, failed in through_workers(crops, self.config.workers, pin=pin):
            self.fail(failed)
            again = _filled(torch.arange(len(index)), size)
            yield Batch(index[again], images[again])

    def fail(self, failed: dict[int, str]) -> None:
        """Images {index: reason} turned out to be unreadable: refuse them, or read them no more.

        Raises:
            UserError: they are not to be skipped.
        """
        self.unreadable.update(failed)
        report_unreadable(self.source, failed, self.config.unreadable)

    def _readable(self, chunk: Tensor) -> Tensor:
        """Those of a batch that are not known to be unreadable."""
        if not self.unreadable:
            return chunk
        kept = [index for index in chunk.tolist() if index not in self.unreadable]
        return torch.tensor(kept, dtype=torch.int64)


def _filled(index: Tensor, size: int) -> Tensor:
    """``index`` [b] again from its beginning until it is [size]: batch-norm counts on the size.

    Raises:
        UserError: it is empty.
    """
    if not len(index):
        raise UserError(
            "TODO",
            f"None of the {size} images of a batch can be read; see localagg inspect --decode, and"
            " begin a new run without them.",
        )
    return index[torch.arange(size) % len(index)]


def on_device(batches: Iterable[Batch], device: torch.device, fail: Fail) -> Iterator[Batch]:
    """Batches moved to a device, on CUDA by a stream of its own, while the last one is computed.

    Args:
        batches: of a feed.
        device: where to.
        fail: the feed's; called with images that turn out to be unreadable on the device.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _moved(batch, device, fail)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = _moved(batch, device, fail)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for part in moved:
            part.record_stream(computing)  # its memory is not given away before it has been used
        yield moved


def _moved(batch: Batch, device: torch.device, fail: Fail) -> Batch:
    """A batch on a device, where readable images stand in for what cannot be decoded there."""
    index, images = batch
    if isinstance(images, EncodedCrops):
        crops, failed = images.decoded(device)
        if failed:
            fail({int(index[row]): why for row, why in failed.items()})
            good = torch.tensor([row for row in range(len(index)) if row not in failed])
            rows = _filled(good.long(), len(index))
            index, crops = index[rows], crops[rows.to(device)]
        return Batch(index.to(device), crops)
    if device.type != "cuda":
        return Batch(index.to(device), images.to(device))
    return Batch(*(part.pin_memory().to(device, non_blocking=True) for part in batch))


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
        "TODO",
        f"{len(failed):,} of {len(source):,} images cannot be read: {named}{more}; {way_out}.",
    )


def hold_or_scan(
    source: Source, config: PretrainConfig, on_progress: Progress
) -> tuple[Tensor | None, dict[int, str]]:
    """All pixels as one uint8 tensor [N, 3, H, W] if they fit, and the unreadable images.

    Where they do not fit (sizes differ, or more than ``memory_gb``) the pixels are None and every
    header has been looked at instead (``headers``), by ``workers`` processes.

    Raises:
        UserError: ``memory="always"`` with images of different sizes.
    """
    pixels, failed, _ = _hold_or_scan(source, config, on_progress)
    return pixels, failed


def _hold_or_scan(
    source: Source, config: PretrainConfig, on_progress: Progress
) -> tuple[Tensor | None, dict[int, str], set[tuple[int, int]]]:
    """As :func:`hold_or_scan`, and the (height, width) that occur."""
    size, failed, sizes, done = len(source), {}, set(), 0
    hold = config.memory != "never"
    pixels: Tensor | None = None
    while hold and done < size:
        try:
            image = source[done].image
            if isinstance(image, bytes):
                image = decode(image, upright=config.views.exif_orientation)
            sizes.add(tuple(image.shape[1:]))
            hold = len(sizes) == 1 and _fits(size, image, config)
            if hold and pixels is None:
                pixels = torch.zeros(size, *image.shape, dtype=torch.uint8)
            if hold and pixels is not None:
                pixels[done] = image
        except FAULTS as error:
            failed[done] = reason(error)
        if not hold and config.memory == "always":
            raise UserError(
                "TODO",
                f"{source.name(done)} has another size than the images before it, so they cannot"
                " be held as one array; use --memory auto.",
            )
        done += 1
        on_progress(done, size)
    if hold:
        return pixels, failed, sizes
    few = size - done < _FEW
    for checked in through_workers(Headers(source, done), 0 if few else config.workers):
        failed |= checked.failed
        sizes |= checked.sizes
        done += checked.images
        on_progress(done, size)
    return None, failed, sizes


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
            failed[i] = reason(error)
    if not sides:
        report_unreadable(source, failed, "error")
    return sorted(sides)[len(sides) // 2]


def _fits(size: int, image: Tensor, config: PretrainConfig) -> bool:
    return config.memory == "always" or size * image.numel() <= config.memory_gb * 2**30


# --- Evaluation: every image once, in order, fixed views ------------------------------------------


def evaluation_batches(
    source: Source,
    views: ViewConfig,
    *,
    batch: int = 256,
    workers: int = 0,
    ten_crop: bool = False,
    part: slice = slice(None),
) -> Iterator[Batch]:
    """The central view of every readable image, in order: uint8 [B, 3, S, S].

    Images that cannot be read are left out; compare the indices with the source to count them.

    Args:
        source: the images.
        views: augmentation, image_size and eval_crop.
        batch: images at a time.
        workers: processes that decode.
        ten_crop: the ten views of :func:`augment.ten_crop_views` instead: uint8 [B, 10, 3, S, S].
        part: which of the batches.
    """
    chunks = list(torch.arange(len(source)).split(batch))[part]
    for index, images, _ in through_workers(Measured(source, views, chunks, ten_crop), workers):
        if len(index):
            yield Batch(index, images)
