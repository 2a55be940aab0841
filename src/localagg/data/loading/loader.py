"""Load the batches of an epoch in its order, from memory or through worker processes.

The order of an epoch is a function of (seed, epoch), so any batch can be loaded again. Batches are
whole: the last N mod B images of an order are dropped, different ones each epoch.
"""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ...config import ViewConfig, flag
from ...distributed.collectives import World
from ...engine.counter_rng import ORDER, permutation
from ...errors import UserError
from ...io.console import ProgressCallback, notify
from ...io.machine import keep_freed_memory
from ..images.augment import view_uniforms
from ..images.levels import levels_of
from ..sources.source import Source
from .cropping import TrainingBatch, training_crops
from .own_views import Transform, own_view_crops
from .scan import Memory, load_or_scan, require_readable
from .workers import map_in_workers


class Feed:
    """Batches of a source, of which each rank reads its share.

    An unreadable image keeps its index and its bank row. Images found unreadable at the start are
    excluded from ``valid``, from which epochs are drawn. An image that fails later (while it is
    decoded) is not read again: other images of the rank's share are repeated in its place, so that
    the lengths of batches and epochs stay, and a resumed run draws the same ones.

    Args:
        source: the images, the same on all ranks.
        views: the random views, which workers crop.
        batch_size: images a batch, over all ranks.
        seed: of the order and of the views.
        workers: processes that read and decode images that are not in memory.
        memory: see :func:`scan.load_or_scan`, also for ``memory_gb`` and ``on_progress``.
        unreadable: "error": raise on an unreadable image; "skip": exclude it.
        device: "auto" or "cuda": load batches into page-locked memory if CUDA is available.
        before: {"left_out", "unreadable"} of the resumed run, from :meth:`state`.
        world: the ranks; default: this process alone.
        transform: makes the views in place of the options; then batches have float views.

    Attributes:
        pixels: all images uint8 [N, 3, H, W] if they are held in memory, else None.
        cropped: whether workers have already cropped the images of batches.
        sizes: (height, width) that occur.
        valid: int64 [n], the images that epochs are drawn from.
        unreadable: {index: reason}.
        steps: batches an epoch.

    Raises:
        UserError: unreadable images with the policy "error", or fewer images than a batch.
    """

    def __init__(
        self,
        source: Source,
        views: ViewConfig,
        *,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        memory: Memory = "auto",
        memory_gb: float = 2.0,
        unreadable: str = "error",
        device: str = "auto",
        on_progress: ProgressCallback = lambda done, of: None,
        before: dict[str, list[int]] | None = None,
        world: World | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.source, self.views, self.batch, self.seed = source, views, batch_size, seed
        self.workers, self.memory_gb, self.policy = workers, memory_gb, unreadable
        self.pin = device in ("auto", "cuda") and torch.cuda.is_available()
        self.world, self.transform = world or World(), transform
        keep_freed_memory()
        self.pixels, self.unreadable, self.sizes, pages = load_or_scan(
            source,
            upright=views.exif_orientation,
            levels=levels_of(views),
            memory="never" if transform else memory,  # whole images go through the function
            memory_gb=memory_gb,
            workers=workers,
            on_progress=on_progress,
        )
        if pages and self.world.rank == 0:
            notify(
                f"{pages:,} further pages or frames of files are not read; --pages all reads them."
            )
        self.cropped = self.pixels is None
        self.valid = torch.arange(len(source))
        require_readable(source, self.unreadable, self.policy)
        excluded = list(self.unreadable)
        if before is not None:
            excluded = before["left_out"]
            earlier = dict.fromkeys(before["unreadable"], "unreadable earlier in this run")
            self.unreadable = earlier | self.unreadable
        self._exclude(excluded)

    def exclude(self, unreadable: dict[int, str]) -> None:
        """Exclude further unreadable images {index: reason} before the first epoch.

        Raises the errors of the constructor.
        """
        require_readable(self.source, unreadable, self.policy)
        self.unreadable.update(unreadable)
        self._exclude(list(unreadable))

    def _exclude(self, indices: list[int]) -> None:
        self.valid = self.valid[~torch.isin(self.valid, torch.tensor(indices, dtype=torch.int64))]
        self.check_batch_size(self.batch)
        self.steps = len(self.valid) // self.batch

    def check_batch_size(self, size: int, name: str = "batch_size") -> None:
        """Raise UserError, naming the option, if a batch is larger than the images."""
        if size > len(self.valid):
            raise UserError(
                "option-invalid",
                f"{flag(name)} is {size}; it must be at most {len(self.valid):,}, the number of"
                " readable images.",
            )

    def state(self) -> dict[str, list[int]]:
        """Return the state to store for a resumed run: excluded and all unreadable images."""
        self.agree()
        excluded = torch.ones(len(self.source), dtype=torch.bool).index_fill_(0, self.valid, False)
        left_out = excluded.nonzero().squeeze(1).tolist()
        return {"left_out": left_out, "unreadable": sorted(self.unreadable)}

    def agree(self) -> None:
        """Exchange the unreadable images of all ranks. One exchange of objects."""
        for unreadable in self.world.gather_objects(self.unreadable):
            self.unreadable = self.unreadable | unreadable

    def order(self, epoch: int) -> Tensor:
        """Return the images of an epoch in their order: int64 [images]."""
        return self.valid[permutation(len(self.valid), self.seed, ORDER, epoch)]

    def batches(
        self, epoch: int, first: int = 0, batch_size: int | None = None
    ) -> Iterator[TrainingBatch]:
        """Yield this rank's share of the batches of an epoch, from batch ``first`` on.

        Raises:
            UserError: an unreadable image with the policy "error", or no readable image in a batch.
        """
        size = batch_size or self.batch
        order = self.order(epoch)[: len(self.valid) // size * size]
        part = self.world.part(size)
        own = (chunk[part.start : part.stop] for chunk in order.split(size)[first:])
        chunks, size = [self._readable(chunk) for chunk in own], len(part)
        if self.pixels is not None:
            for chunk in chunks:
                index = chunk[_repeated(len(chunk), size)]
                images = self.pixels.index_select(0, index)  # copies whole images
                yield TrainingBatch(index, images, view_uniforms(self.seed, epoch, index))
            return
        crop = functools.partial(training_crops, self.source, self.views, self.seed, epoch)
        if self.transform is not None:
            keys = (self.source, self.views, self.transform, self.seed, epoch)
            crop = functools.partial(own_view_crops, *keys)
        for batch, unreadable in map_in_workers(crop, chunks, self.workers, pin=self.pin):
            self.unreadable.update(unreadable)
            require_readable(self.source, unreadable, self.policy)
            if len(batch.index) < size:
                rows = _repeated(len(batch.index), size)
                batch = TrainingBatch(*(part[rows] for part in batch))
            yield batch

    def _readable(self, chunk: Tensor) -> Tensor:
        if not self.unreadable:
            return chunk
        return chunk[~torch.isin(chunk, torch.tensor(list(self.unreadable)))]


def _repeated(count: int, size: int) -> Tensor:
    """Rows 0..count-1, repeated to [size]: the statistics of batch-norm depend on the size."""
    if not count:
        raise UserError(
            "unreadable-images",
            f"None of the {size} images of a batch can be read; list them with localagg inspect"
            " --decode, remove them, and begin a new run.",
        )
    return torch.arange(size) % count


def on_device(batches: Iterable[TrainingBatch], device: torch.device) -> Iterator[TrainingBatch]:
    """Yield batches with their images on a device; index and draws stay on the CPU.

    On CUDA a separate stream copies a batch while the previous one is computed; the index is
    page-locked, so that it can be copied without waiting.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch._replace(images=batch.images.to(device))
        return
    copying = torch.cuda.Stream(device)
    for index, images, uniforms in batches:
        with torch.cuda.stream(copying):
            images = images.pin_memory().to(device, non_blocking=True)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        images.record_stream(computing)  # its memory must not be reused before it has been read
        yield TrainingBatch(index.pin_memory(), images, uniforms)
