"""How long an epoch of a recipe takes on this machine, from a few seconds of its own steps."""

import functools
import statistics
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
from ..recipes.defaults import resolve_defaults
from .learner import Learner
from .step import take_step
from .time_shares import TimeShares

_SECONDS = 1.5  # what each part is timed for
_STEP_SECONDS = 0.4  # a step of CPU time, for which the batch is cut down
_FEWEST = 8  # images of such a batch


def epoch_time(config: PretrainConfig, data: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Estimate the seconds of an epoch of IR and of LA, without its clusterings and measurements.

    Steps of the run's own network, batch, bank and (random) clusters are timed, and apart from them
    its workers on real images. On CUDA the two overlap, so the slower one counts; on a CPU they
    share the cores, so their sum does. Images that fit in memory cost nothing to read. On a CPU
    batches are cut down to what takes 0.4 s, so the time of very large batches is extrapolated.

    Args:
        config: a recipe's; what it leaves None is derived from the images.
        data: data URI.
        facts: of its training split, by ``inspect``.

    Returns:
        {"images", "batch", "network", "image_size", "device", "workers", "held", "read": seconds to
        read and crop, "ir", "la": seconds to learn; "ir_epoch", "la_epoch": both together}.

    Raises:
        UserError: options and data do not go together, or no image can be read.
    """
    source = open_images(data)
    resolved = resolve_defaults(config, len(source), typical_side(source))
    size, batch = len(source) - len(facts["unreadable"]), require_resolved(resolved.batch_size)
    held = _held(resolved, facts)
    read = 0.0 if held else size * _reading(resolved, source)
    learner = Learner(resolved, len(source))
    overlaps = learner.device.type == "cuda"
    ir, la = (size * _learning(learner, aggregating, held) for aggregating in (False, True))
    together: Callable[[float, float], float] = max if overlaps else lambda a, b: a + b
    return {
        "images": size,
        "batch": batch,
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


def _held(config: PretrainConfig, facts: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the images if the run would hold them in memory."""
    height, width = facts["height"], facts["width"]
    if config.memory == "never" or height is None:
        return None
    one_size = height[0] == height[2] and width[0] == width[2]
    needed = facts["images"] * 3 * height[0] * width[0]
    if not one_size or (config.memory == "auto" and needed > config.memory_gb * 2**30):
        return None
    return height[0], width[0]


def _reading(config: PretrainConfig, source: Source) -> float:
    """Seconds an image takes to be read, decoded and cropped, by all workers together."""
    order = permutation(len(source), config.seed, ORDER, 0)
    chunks, workers = list(order.split(_FEWEST)), config.workers
    started, timed, done = time.perf_counter(), 0.0, 0
    crop = functools.partial(training_crops, source, config.views, 0, 0)
    for batch, failed in map_in_workers(crop, chunks, workers):
        if timed == 0.0 and len(chunks) > 1:  # not timed: the workers have started
            started, timed = time.perf_counter(), 1e-9
            continue
        done += len(batch.index) + len(failed)
        timed = time.perf_counter() - started
        if timed > _SECONDS:
            break
    return timed / done


def _learning(learner: Learner, aggregating: bool, held: tuple[int, int] | None) -> float:
    """Seconds an image takes to be learned from, in IR or in LA: of its size, or cropped."""
    config, device = learner.config, learner.device
    if aggregating:
        size, clusters = len(learner.bank.rows), require_resolved(config.objective.clusters)
        labels = [torch.randint(k, (size,), dtype=torch.int32) for k in clusters]
        learner.labels = torch.stack(labels).to(device)
    augment = Augment(config.views, config.seed, cropped=held is None)
    timer = TimeShares(device)
    shape = held or (require_resolved(config.views.image_size),) * 2

    def step(count: int) -> None:
        index = torch.arange(count) % len(learner.bank.rows)
        images = torch.randint(0, 256, (count, 3, *shape), dtype=torch.uint8, device=device)
        take_step(
            learner,
            augment,
            TrainingBatch(index, images, view_uniforms(config.seed, 0, index)),
            0,
            aggregating=aggregating,
            size=count,
            learning_rate=config.learning_rate,
            timer=timer,
        )

    batch = require_resolved(config.batch_size)
    if device.type == "cpu":
        seconds = _timed(step, min(batch, _FEWEST), 0.0)
        batch = min(batch, max(_FEWEST, int(_STEP_SECONDS / seconds)))
    return _timed(step, batch, _SECONDS)


def _timed(step: Callable[[int], None], count: int, seconds: float) -> float:
    """Seconds an image: the median of steps that follow a first one."""
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < seconds:
        started = time.perf_counter()
        step(count)
        _wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / count


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def epoch_time_rows(found: dict[str, Any]) -> list[list[str]]:
    """The estimate as rows of a printed table."""
    learned = f"{found['network']}, batch {found['batch']:,}, views of {found['image_size']} pixels"
    read = f"{_duration(found['read'])} by {found['workers']} workers"
    return [
        ["learning", f"{learned}, on {found['device']}"],
        ["reading", "held in memory" if found["held"] else read],
        ["IR", f"about {_duration(found['ir_epoch'])}"],
        ["LA", f"about {_duration(found['la_epoch'])}, without its clustering"],
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
