"""Estimate the time of an epoch on this machine from a few seconds of training steps."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from ..config import PretrainConfig, require_resolved
from ..data.images.augment import Augment, view_uniforms
from ..data.loading.cropping import TrainingBatch, training_crops
from ..data.loading.scan import typical_side
from ..data.loading.workers import map_in_workers
from ..data.sources.open import Source, open_images
from ..engine.counter_rng import ORDER, permutation
from ..recipes.derived_settings import resolve_defaults
from .learner import Learner
from .step import take_step
from .time_shares import TimeShares

_SMALL_BATCH = 8  # images
_MOST_STEPS = 12


def epoch_time(
    config: PretrainConfig,
    data: str,
    facts: dict[str, Any],
    *,
    seconds: float = 1.5,
    step_seconds: float = 0.4,
) -> dict[str, Any]:
    """Estimate the seconds of an epoch of IR and of LA, without clusterings and measurements.

    Times training steps on random images with random clusters, and separately the workers on real
    images. On CUDA the two overlap, so the slower one counts; on a CPU they share the cores, so
    their sum counts. Images that fit in memory take no time to read. On a CPU the batch is reduced
    to ``step_seconds``, so the time of large batches is extrapolated.

    Args:
        config: configuration; missing options are derived from the images.
        data: data URI.
        facts: result of ``inspect`` for its training split.
        seconds: duration of each measurement.
        step_seconds: longest step on a CPU.

    Returns:
        {"images", "batch", "network", "image_size", "device", "workers", "held": whether images fit
        in memory, "read": seconds to read and crop, "ir", "la": seconds of the steps, "ir_epoch",
        "la_epoch": seconds of both}.

    Raises:
        UserError: the options do not fit the data, or no image is readable.
    """
    source = open_images(data)
    resolved = resolve_defaults(config, len(source), typical_side(source, config.views))
    size = len(source) - len(facts["unreadable"])
    held = _size_in_memory(resolved, facts)
    read = 0.0 if held else size * reading_seconds(resolved, source, seconds)
    learner = Learner(resolved, len(source))
    ir, la = (
        size * training_seconds(learner, aggregating, held, seconds, step_seconds)
        for aggregating in (False, True)
    )
    together: Callable[..., float] = max if learner.device.type == "cuda" else lambda a, b: a + b
    return {
        "images": size,
        "batch": require_resolved(resolved.batch_size),
        "network": resolved.encoder.model,
        "image_size": resolved.views.image_size,
        "device": learner.device.type,
        "workers": resolved.workers,
        "held": held is not None,
        "read": read,
        "ir": ir,
        "la": la,
        "ir_epoch": together(read, ir),
        "la_epoch": together(read, la),
    }


def epoch_time_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the estimate as rows of a printed table."""
    network = f"{found['network']}, batch {found['batch']:,}, views of {found['image_size']} pixels"
    read = f"{_duration(found['read'])} by {found['workers']} workers"
    return [
        ["learning", f"{network}, on {found['device']}"],
        ["reading", "held in memory" if found["held"] else read],
        ["IR", f"about {_duration(found['ir_epoch'])}"],
        ["LA", f"about {_duration(found['la_epoch'])}, without its clustering"],
    ]


def _size_in_memory(config: PretrainConfig, facts: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the images if a run would hold them in memory."""
    height, width = facts["height"], facts["width"]
    if config.memory == "never" or height is None:
        return None
    one_size = height[0] == height[2] and width[0] == width[2]
    needed = facts["images"] * 3 * height[0] * width[0]
    if not one_size or (config.memory == "auto" and needed > config.memory_gb * 2**30):
        return None
    return height[0], width[0]


def reading_seconds(config: PretrainConfig, source: Source, seconds: float) -> float:
    """Seconds to read, decode and crop one image, with all workers."""
    chunks = list(permutation(len(source), config.seed, ORDER, 0).split(_SMALL_BATCH))
    crops = functools.partial(training_crops, source, config.views, config.seed, 0)
    started, spent, done = time.perf_counter(), 0.0, 0
    for number, (batch, unreadable) in enumerate(map_in_workers(crops, chunks, config.workers)):
        if number == 0 and len(chunks) > 1:  # includes the start of the workers
            started = time.perf_counter()
            continue
        done += len(batch.index) + len(unreadable)
        spent = time.perf_counter() - started
        if spent > seconds:
            break
    return spent / done


def training_seconds(
    learner: Learner,
    aggregating: bool,
    held: tuple[int, int] | None,
    seconds: float,
    step_seconds: float = 0.4,
    enough: float = math.inf,
) -> float:
    """Seconds to train on one image, which has the size ``held`` or is cropped by a worker.

    An estimate from a small batch that exceeds ``enough`` seconds is returned at once.
    """
    config, device, images = learner.config, learner.device, len(learner.bank.rows)
    if aggregating:
        clusters = require_resolved(config.objective.clusters)
        labels = [torch.randint(k, (images,), dtype=torch.int32) for k in clusters]
        learner.labels = torch.stack(labels).to(device)
    augment = Augment(config.views, config.seed, cropped=held is None)
    shape = held or (require_resolved(config.views.image_size),) * 2
    timer = TimeShares(device)
    timer.next_step()  # on CUDA only each 20th step is timed; this is none of them

    def seconds_per_image(count: int, at_least: float) -> float:
        """The shortest of the steps after the first, over ``at_least`` seconds.

        It takes steps until two in a row are not much shorter: on a busy machine the first ones,
        and a median of few, are up to ten times too long, and a budget then trains too little.
        """
        index = torch.arange(count) % images
        pixels = torch.randint(0, 256, (count, 3, *shape), dtype=torch.uint8, device=device)
        batch = TrainingBatch(index, pixels, view_uniforms(config.seed, 0, index))
        times: list[float] = []
        while sum(times[1:]) < at_least or not _are_settled(times):
            started = time.perf_counter()
            take_step(
                learner,
                augment,
                batch,
                0,
                aggregating=aggregating,
                size=count,
                learning_rate=config.learning_rate,
                timer=timer,
            )
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:]) / count

    size = require_resolved(config.batch_size)
    if device.type == "cpu":
        first = seconds_per_image(min(size, _SMALL_BATCH), 0.0)
        if first > enough:
            return first
        size = min(size, max(_SMALL_BATCH, int(step_seconds / first)))
    return seconds_per_image(size, seconds)


def _are_settled(times: list[float]) -> bool:
    if len(times) < 4:
        return False
    return len(times) > _MOST_STEPS or min(times[-2:]) > 0.9 * min(times[1:-2])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
