"""Fit a run into minutes of the measured device: network, image size and epochs follow.

Trying the candidates takes some seconds. The result names each choice as an option, so a resumed
run keeps it, and the run is a function of its options alone.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ..config import EncoderConfig, PretrainConfig, override, require_resolved
from ..data.images.decode import READ_ERRORS, decoded_size
from ..data.images.levels import levels_for_sizes
from ..data.loading.scan import typical_side
from ..data.sources.open import Source
from ..engine.device import make_fabric
from ..errors import UserError, counted
from ..io.console import notify, show_progress
from ..models.encoder import GIVEN
from ..recipes.derived_settings import resolve_defaults
from .epoch_time import reading_seconds, training_seconds
from .learner import Learner

CPU_MINUTES = 30.0
_OVERHEAD = 1.2  # clusterings, measurements and checkpoints, beside reading and steps
_SECONDS = 0.3  # of a measurement
_STEP_SECONDS = 1.0  # of its longest step: small batches would count their fixed costs too often
_HOPELESS = 4.0  # times the budget by steps of IR alone: the candidate is not measured further. A
# small batch, measured first, counts its fixed costs too often, by less than this.
# Networks by falling cost: (width, blocks, stem stride, side of views).
_NETWORKS = (
    (32, (1, 1, 1, 1), 2, 64),
    (16, (1, 1, 1, 1), 2, 48),
    (16, (1, 1, 1), 2, 32),
)
_NETWORK_OPTIONS = {"model", "width", "blocks", "stem_stride"}


def fit_budget(
    config: PretrainConfig, source: Source, typed: Iterable[str] = (), processes: int = 1
) -> PretrainConfig:
    """Return the configuration with network, image size and epochs that fit its budget.

    The first candidate that trains for all epochs of the rule within the budget is chosen: the
    network of the rule, then smaller ones on smaller images. If none does, the last one trains for
    fewer epochs. Options that were set stay. The budget is ``--minutes``, or half an hour on a CPU
    where neither epochs nor minutes are set. The forecast is printed.

    Args:
        config: as the user set it; it is returned as it is without a budget.
        source: the training images.
        typed: names of options that were set even if they equal a default.
        processes: number of processes; GPUs share the work, processes of a CPU its cores.

    Raises:
        UserError: ``--minutes`` where nothing is left to choose, or options that do not fit.
    """
    device = make_fabric(config.device).device.type
    unknown = config.adapt.feature_views > 0 or (config.encoder.model or "").startswith(GIVEN)
    if config.minutes is None and (config.epochs is not None or device != "cpu" or unknown):
        return config
    if unknown and config.adapt.feature_views == 0:
        raise UserError(
            "option-conflict",
            f"--minutes {config.minutes:g} has no effect with backbone=; set epochs instead.",
        )
    minutes = CPU_MINUTES if config.minutes is None else config.minutes
    side = typical_side(source, config.views)
    candidates = list(_candidates(config, side, typed))
    if len(candidates) == 1 and config.epochs is not None:
        raise UserError(
            "option-conflict",
            f"--minutes {minutes:g} has no effect: network, image size and epochs are set, by"
            " options or by the recipe; omit it, or use the recipe folder.",
        )
    shared = processes if device == "cuda" else 1
    resolved, seconds = _first_that_fits(candidates, source, side, 60 * minutes * shared)
    epochs, seconds = require_resolved(resolved.epochs), seconds / shared
    if config.epochs is None:
        epochs = max(1, config.ir_epochs or 0, int(min(epochs, 60 * minutes / seconds)))
    encoder, views = resolved.encoder, resolved.views
    fitted = replace(
        config,
        encoder=encoder,
        views=replace(config.views, image_size=views.image_size, eval_crop=views.eval_crop),
        epochs=epochs,
    )
    _report(fitted, resolved, epochs * seconds / 60, minutes, device)
    return fitted


def _first_that_fits(
    candidates: list[PretrainConfig], source: Source, side: int, budget: float
) -> tuple[PretrainConfig, float]:
    """Return the first candidate within the seconds of the budget, or the last, and its epoch's."""
    resolved, seconds = candidates[0], math.inf
    with show_progress("measuring speed") as show:
        for number, candidate in enumerate(candidates):
            show(number, len(candidates))
            resolved = resolve_defaults(candidate, len(source), side)
            last = number == len(candidates) - 1
            most = budget / require_resolved(resolved.epochs)
            seconds = _epoch_seconds(resolved, source, math.inf if last else most)
            if seconds <= most:
                break
    return resolved, seconds


def _candidates(
    config: PretrainConfig, side: int, typed: Iterable[str]
) -> Iterator[PretrainConfig]:
    """Yield the configuration itself, then cheaper ones in what was left to choose."""
    yield config
    encoder = config.encoder
    usual = replace(EncoderConfig(), dim=encoder.dim, head_layers=encoder.head_layers)
    if encoder != usual or _NETWORK_OPTIONS & set(typed):
        return
    for width, blocks, stride, most in _NETWORKS:
        yield override(
            config,
            model="resnet18_small",
            width=width,
            blocks=blocks,
            stem_stride=stride,
            image_size=config.views.image_size or min(side, most),
        )


def _epoch_seconds(config: PretrainConfig, source: Source, most: float) -> float:
    """Return the expected seconds of an epoch, clusterings and measurements included.

    Returns infinity where steps of IR alone show that they far exceed ``most``.
    """
    size = len(source)
    held = _held_size(config, source)
    learner = Learner(config, size)
    ir_share = require_resolved(config.ir_epochs) / require_resolved(config.epochs)
    enough = _HOPELESS * most / (_OVERHEAD * size)
    ir = training_seconds(learner, False, held, _SECONDS, _STEP_SECONDS, enough)
    if ir > enough:
        return math.inf
    la = training_seconds(learner, True, held, _SECONDS, _STEP_SECONDS)
    step = ir_share * ir + (1 - ir_share) * la
    read = 0.0 if held else reading_seconds(config, source, _SECONDS)
    together: Any = max if learner.device.type == "cuda" else lambda a, b: a + b
    return _OVERHEAD * size * together(read, step)


def _held_size(config: PretrainConfig, source: Source) -> tuple[int, int] | None:
    """Return (height, width) of the images if a run would hold them in memory."""
    sizes, levels = set(), levels_for_sizes(config.views)
    for index in range(0, len(source), max(1, len(source) // 16)):
        try:
            sizes.add(decoded_size(source[index].image, levels=levels))
        except READ_ERRORS:
            continue
    if config.memory == "never" or len(sizes) != 1:
        return None
    height, width = sizes.pop()
    fits = config.memory == "always" or 3 * height * width * len(source) <= config.memory_gb * 2**30
    return (height, width) if fits else None


def _report(
    fitted: PretrainConfig, chosen: PretrainConfig, expected: float, minutes: float, device: str
) -> None:
    """Print the forecast, and that training is short where the budget is too small."""
    encoder, rule = fitted.encoder, require_resolved(chosen.epochs)
    network = f"{encoder.model}"
    if encoder.model == "resnet18_small":
        network += f" (width {encoder.width}, blocks {' '.join(map(str, encoder.blocks))})"
    notify(
        f"Forecast: about {expected:.2g} minutes on this {device.upper()}, at most --minutes"
        f" {minutes:g}: {counted(require_resolved(fitted.epochs), 'epoch')} of {network}, views of"
        f" {fitted.views.image_size} pixels."
    )
    if require_resolved(fitted.epochs) < rule:
        notify(
            f"The budget is short: the rule is {counted(rule, 'epoch')}; use more --minutes or a"
            " GPU."
        )
