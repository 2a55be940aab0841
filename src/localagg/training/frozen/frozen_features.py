"""Features of a frozen backbone for a few views of each image: computed once, cached, resumable.

An entry of the cache (read-outs use the folder too, see ``evaluation.readouts.feature_cache``)::

    CACHE/KEY/features.npy    float16 [N, 1 + V, C], memory-mapped; view 0 is the measured one
    CACHE/KEY/facts.json      the key is the hash of these facts; also the unreadable images

The key hashes all that the values depend on: backbone, every byte of every image, views, seed,
precision, device and version, so no entry can be stale. Until it is whole, an entry is named
``.KEY.tmp``; each rank marks its finished chunks in ``done-RANK.json`` and a later call computes
only the others.

Legend of shape suffixes: b images of a chunk, V random views, C channels of the backbone.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checkpoint import write_json
from ...config import PretrainConfig, require_resolved, to_dict
from ...data.images.augment import Augment
from ...data.loading.cropping import TrainingBatch, all_view_crops
from ...data.loading.loader import Feed
from ...data.loading.workers import map_in_workers
from ...data.sources.source import Source
from ...distributed.collectives import World
from ...distributed.signals import handle_stop_signals
from ...engine.counter_rng import CACHED_VIEW, integers
from ...errors import UserError
from ...evaluation.readouts.feature_cache import FeatureCache, entry_key, hash_images, rename_entry
from ...io.console import notify, show_progress
from ...io.files import atomic_write
from ...io.machine import cores
from ...io.run_lock import lock_run
from ...models import Encoder
from ...models.inference import CPU_BATCH, backbone_digest, inference_copy

_CHUNK = 16  # images
_SAVE_SECONDS = 5.0  # between marks of finished chunks


@dataclass(frozen=True)
class FrozenFeatures:
    """Cached features of all images under all views."""

    values: np.ndarray
    """float16 [N, 1 + V, C], memory-mapped."""
    unreadable: dict[int, str]
    """{index: reason}; their rows are zeros."""
    seed: int

    def measured(self, index: Tensor) -> Tensor:
        """Return the features float32 [B, C] of images ``index`` under the measured view."""
        return torch.from_numpy(self.values[index.numpy(), 0]).float()

    def random(self, epoch: int, index: Tensor) -> Tensor:
        """Return the features float32 [B, C] of the random view of each image in an epoch."""
        drawn = integers(self.values.shape[1] - 1, self.seed, CACHED_VIEW, epoch, index, count=1)
        return torch.from_numpy(self.values[index.numpy(), 1 + drawn.squeeze(1).numpy()]).float()

    def pair(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of the measured view and of a random view that no epoch draws by."""
        return self.measured(index), self.random(-1, index)

    def batches(self, feed: Feed, epoch: int, first: int, size: int) -> Iterator[TrainingBatch]:
        """Yield this rank's share of the batches of :meth:`Feed.batches`, with features [b, C]."""
        part = feed.world.part(size)
        order = feed.order(epoch)
        for chunk in order[: len(order) // size * size].split(size)[first:]:
            index = chunk[part.start : part.stop]
            yield TrainingBatch(index, self.random(epoch, index), torch.empty(len(index), 0))


class _Chunk(NamedTuple):
    index: Tensor
    """int64 [b]: the readable images."""
    features: Tensor
    """float16 [b, 1 + V, C]."""
    unreadable: dict[int, str]


class _Extractor:
    """Compute the features of a chunk of images; on a CPU within a worker process."""

    def __init__(self, encoder: Encoder, config: PretrainConfig, dtype: torch.dtype) -> None:
        self.encoder, self.views, self.seed = encoder, config.views, config.seed
        self.count, self.dtype = config.adapt.feature_views, dtype
        self.augment = Augment(config.views, config.seed, cropped=True)
        self.device = next(encoder.parameters()).device

    def from_files(self, source: Source, index: Tensor) -> _Chunk:
        return self.from_crops(all_view_crops(source, self.views, self.seed, self.count, index))

    @torch.no_grad()
    def from_crops(self, crops: Any) -> _Chunk:
        (index, images), unreadable = crops
        if not len(index):
            return _Chunk(index, torch.empty(0, 1 + self.count, 0).half(), unreadable)
        images = images.to(self.device)
        random = (self.augment(images[:, 1 + n], n, index) for n in range(self.count))
        views = torch.stack([images[:, 0].float() / 255, *random], dim=1)
        flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        step = CPU_BATCH if self.device.type == "cpu" else len(flat)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = [self.encoder.pooled(part).float() for part in flat.split(max(1, step))]
        features = torch.cat(found).view(len(index), 1 + self.count, -1)
        return _Chunk(index, features.half().cpu(), unreadable)


def frozen_features(
    encoder: Encoder, config: PretrainConfig, feed: Feed, dtype: torch.dtype = torch.float32
) -> FrozenFeatures:
    """Return the frozen features of a run's images, from the cache or computed now.

    Each rank computes a share of the images. Images that turn out to be unreadable are excluded
    from ``feed``.

    Args:
        encoder: on its device; it stays as it is.
        config: resolved; its views, seed, workers and cache.
        feed: the images.
        dtype: of the backbone's arithmetic.

    Raises:
        UserError: the features exceed ``--cache-gb`` or the disk, or no image can be read, or one
            cannot with the policy "error".
        Interrupted: Ctrl-C or a signal to stop; finished images are kept.
    """
    source, world, options = feed.source, feed.world, config.adapt
    shape = len(source), 1 + options.feature_views, encoder.backbone.channels
    needed = check_size(encoder, config, len(source))
    facts = _identity(encoder, config, feed, dtype)
    cache = FeatureCache(options.cache, options.cache_gb)
    key = entry_key(facts)
    entry, unfinished = cache.folder / key, cache.folder / f".{key}.tmp"
    if not world.gather_objects(_is_whole(entry, shape))[0]:
        with _convert_cache_errors(cache.folder):
            if world.rank == 0:
                _make_room(cache, key, needed, unfinished)
                text = f"{len(source):,} images x {shape[1]} views: {needed / 2**20:,.0f} MiB"
                notify(f"Frozen features of {text} in '{cache.folder}'.")
            world.barrier()
            with lock_run(unfinished) if world.rank == 0 else contextlib.nullcontext():
                size = require_resolved(config.views.image_size)
                example = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
                fast = inference_copy(encoder, example.to(encoder.mean.device))
                workers = config.workers and max(config.workers, cores() // world.size)
                _compute(unfinished, _Extractor(fast, config, dtype), source, shape, world, workers)
                if world.rank == 0:
                    facts["unreadable"] = _finished(unfinished)[1]
                    write_json(unfinished / "facts.json", facts)
                    rename_entry(unfinished, entry)
            world.barrier()
    with _convert_cache_errors(cache.folder):  # another process may just have removed it
        os.utime(entry)  # used now
        unreadable = json.loads((entry / "facts.json").read_text())["unreadable"]
        values = np.load(entry / "features.npy", mmap_mode="r")
    found = {int(index): reason for index, reason in unreadable.items()}
    feed.exclude(found)
    return FrozenFeatures(values, found, config.seed)


def _identity(
    encoder: Encoder, config: PretrainConfig, feed: Feed, dtype: torch.dtype
) -> dict[str, Any]:
    """Return all that the features depend on."""
    digest = hash_images(feed.source, config.views)[0] if feed.world.rank == 0 else ""
    return {
        "version": version("localagg"),
        "backbone": backbone_digest(encoder),
        "images": feed.world.gather_objects(digest)[0],
        "views": to_dict(config.views),
        "feature_views": config.adapt.feature_views,
        "seed": config.seed,
        "precision": str(dtype),
        "device": encoder.mean.device.type,
    }


def check_size(encoder: Encoder, config: PretrainConfig, images: int) -> int:
    """Return the bytes of the features of a run; 0 if it has none.

    Raises:
        UserError: they exceed ``--cache-gb``.
    """
    if not config.adapt.feature_views:
        return 0
    limit, view = config.adapt.cache_gb, images * encoder.backbone.channels * 2  # float16
    needed = view * (1 + config.adapt.feature_views)
    if needed > limit * 2**30:
        fewer = int(limit * 2**30 / view) - 1
        less = f", or use --feature-views {fewer}" if fewer > 0 else ""
        raise UserError(
            "too-large",
            f"Frozen features of {images:,} images need {needed / 2**30:.2f} GiB, more than"
            f" --cache-gb {limit:g}; set --cache-gb {math.ceil(needed / 2**30)}{less}.",
        )
    return needed


def _is_whole(entry: Path, shape: tuple[int, int, int]) -> bool:
    try:
        found = np.load(entry / "features.npy", mmap_mode="r")
        dict(json.loads((entry / "facts.json").read_text())["unreadable"])
    except (OSError, ValueError, EOFError, KeyError, TypeError):  # missing, or damaged
        return False
    return (found.shape, found.dtype) == (shape, np.float16)


def _make_room(cache: FeatureCache, key: str, needed: int, unfinished: Path) -> None:
    """Remove other features where the limit requires it.

    Raises:
        UserError: the features do not fit beside files that cannot be removed, or on the disk.
    """
    more = 0 if (unfinished / "features.npy").exists() else needed
    if not cache.make_room(more, {key: needed}):
        free = shutil.disk_usage(cache.folder).free / 2**30
        raise UserError(
            "too-large",
            f"Frozen features of {needed / 2**30:.2f} GiB do not fit into '{cache.folder}' (half of"
            f" {free:.2f} GiB of free disk, other features within --cache-gb"
            f" {cache.budget / 2**30:g}); name another --cache.",
        )


def _compute(
    folder: Path,
    extractor: _Extractor,
    source: Source,
    shape: tuple[int, int, int],
    world: World,
    workers: int,
) -> None:
    """Compute this rank's share of the chunks that are not finished yet."""
    path, mine = folder / "features.npy", folder / f"done-{world.rank}.json"
    if world.rank == 0 and not _has_shape(path, shape):
        for mark in folder.glob("done-*.json"):
            mark.unlink()
        with atomic_write(path) as beside, open(beside, "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + math.prod(shape) * 2)  # zeros
    world.barrier()
    values = np.load(path, mmap_mode="r+")
    chunks = list(torch.arange(len(source)).split(_CHUNK))
    finished = _finished(folder)[0]
    left = [number for number in range(len(chunks)) if number not in finished]
    own = world.part(len(left))
    left = left[own.start : own.stop]
    done, unreadable = (_finished(folder, mine.name)) if mine.exists() else (set(), {})
    world.barrier()  # all have read the marks
    saved, share = time.monotonic(), len(left)
    before = sum(len(chunks[number]) for number in finished)

    def save() -> None:
        values.flush()
        write_json(mine, {"chunks": sorted(done), "unreadable": unreadable})

    found = _extract(extractor, source, [chunks[number] for number in left], workers)
    with handle_stop_signals() as stop, show_progress("computing features") as show:
        show(before, len(source))
        for number, chunk in zip(left, found, strict=True):
            if not chunk.features.isfinite().all():
                raise UserError(
                    "not-finite",
                    f"The frozen features of {source.name(int(chunk.index[0]))} or the images after"
                    " it are not finite in float16; use other --weights.",
                )
            values[chunk.index.numpy()] = chunk.features.numpy()
            done.add(number)
            unreadable |= chunk.unreadable
            share -= 1
            show(len(source) - share * _CHUNK * world.size, len(source))
            if stop.requested or time.monotonic() - saved > _SAVE_SECONDS:
                save()
                saved = time.monotonic()
            if stop.requested:
                raise stop.error("Stopped while frozen features were computed; they are kept.")
        save()
    world.barrier()


def _extract(
    extractor: _Extractor, source: Source, chunks: list[Tensor], workers: int
) -> Iterator[_Chunk]:
    """Yield the features of chunks. On a CPU each worker process runs the whole backbone."""
    if extractor.device.type == "cpu":
        function = functools.partial(extractor.from_files, source)
        yield from map_in_workers(function, chunks, workers)
        return
    views = extractor.views, extractor.seed, extractor.count
    crops = functools.partial(all_view_crops, source, *views)
    yield from map(extractor.from_crops, map_in_workers(crops, chunks, workers))


def _has_shape(path: Path, shape: tuple[int, int, int]) -> bool:
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return (found.shape, found.dtype) == (shape, np.float16)


def _finished(folder: Path, marks: str = "done-*.json") -> tuple[set[int], dict[str, str]]:
    """Return (numbers of the finished chunks, {index: reason} of unreadable images)."""
    chunks: set[int] = set()
    unreadable: dict[str, str] = {}
    for mark in folder.glob(marks):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: computed again
            found = json.loads(mark.read_text())
            marked, failed = {*map(int, found["chunks"])}, dict(found["unreadable"])
            chunks |= marked
            unreadable |= failed
    return chunks, unreadable


@contextlib.contextmanager
def _convert_cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            "environment",
            f"Features cannot be cached in '{folder}' ({error.strerror or error}); name another"
            " --cache.",
        ) from None
