"""Accuracy from few labels: read-outs and fine-tuning on small subsets of the training images.

A subset is drawn for each seed, class by class. Linear heads on the frozen encoder
(``quick_readout``) and the encoder fine-tuned with a head (``linear``) are measured on all held-out
images.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint import weights_digest, write_json
from ...config import TransferConfig, require_resolved
from ...data.sources.combined import SourceSubset
from ...engine.device import describe_arithmetic
from ...errors import UserError
from ...io.console import notify
from ...models import Encoder
from ..results.protocols import linear_protocol, logistic_protocol
from .linear import read_out
from .logistic_regression import shuffle_within_classes
from .quick_readout import OPTIONS as QUICK_OPTIONS
from .quick_readout import FrozenFeatures, cache_features
from .readout_inputs import new_folder, open_labeled, take_encoder

OPTIONS = (QUICK_OPTIONS | {"finetune"}) - {"ten_crop"}
"""Names of the options of :class:`TransferConfig` and its views that have an effect here."""
NOT_TUNING = frozenset({"ten_crop", "eval_every", "checkpoint_seconds"})
"""Names of those without effect on fine-tuning either, which is measured once at its end."""

Scores = dict[str, dict[str, float]]


def draw_fraction(labels: Tensor, index: Tensor, fraction: float, seed: int) -> Tensor:
    """Draw a stratified fraction in (0, 1] of images ``index``, int64 [n], with labels int64 [n].

    Each class contributes its share, rounded half up, and at least one image. The draw, int64 and
    increasing, is a function of (seed, fraction, images).
    """
    place, count = shuffle_within_classes(labels, index, seed, repr(float(fraction)))
    wanted = (count * fraction + 0.5).floor().clamp(min=1)
    return index[place < wanted].sort().values


def draw_per_class(
    labels: Tensor, index: Tensor, number: int, seed: int, classes: Sequence[str]
) -> Tensor:
    """Draw ``number`` images of each class that occurs; otherwise as :func:`draw_fraction`.

    Raises:
        UserError: a class has fewer images.
    """
    place, count = shuffle_within_classes(labels, index, seed, f"{number} per class")
    if (count < number).any():
        name, most = classes[int(labels[count.argmin()])], int(count.min())
        raise UserError(
            "option-invalid",
            f"--per-class is {number}, but class '{name}' has only {most:,} training images; set"
            f" it to at most {most:,}.",
        )
    return index[place < number].sort().values


def draw_subset(
    labels: Tensor, index: Tensor, part: dict[str, Any], seed: int, classes: Sequence[str]
) -> Tensor:
    """Draw a part {"few": fraction} or {"per_class": number} of images ``index``."""
    if "few" in part:
        return draw_fraction(labels, index, part["few"], seed)
    return draw_per_class(labels, index, part["per_class"], seed, classes)


def low_shot_accuracy(
    config: TransferConfig,
    weights: str | Path | Encoder,
    data: str | Path,
    out: str | Path | None = None,
    *,
    few: Sequence[float] = (0.01, 0.1),
    per_class: Sequence[int] = (),
    seeds: int = 5,
    finetune: bool = True,
    finetune_epochs: int = 10,
    draw: Callable[..., Tensor] = draw_subset,
) -> dict[str, Any]:
    """Measure accuracy from few labels: mean and 95 % interval over draws of the images.

    Linear: quick heads on ``config.layers`` (default: the last one). Fine-tuned: the network with a
    head on the last of them. The interval is Student's t over seeds.

    Args:
        config, weights, data, out: as for :func:`.linear.transfer`.
        few, per_class: subsets; see :func:`draw_fraction` and :func:`draw_per_class`.
        seeds: number of draws of each subset by ``draw``, seeded from ``config.seed`` on.

    Returns:
        {"subsets": [{"few" or "per_class", "images": labeled images, "linear": {layer: {"top1": M,
        "top5": M}}, "finetuned": as "linear"}], "seeds", "protocol": {"linear", "finetuned"}, and
        fields of :func:`.linear.transfer`}; M: {"mean", "interval": half width or None, "values"}.

    Raises:
        UserError: as :func:`.linear.transfer`; or subsets that cannot be drawn.
    """
    started = time.monotonic()
    _check(few, per_class, seeds, finetune_epochs)
    run = new_folder(out)
    encoder, path = take_encoder(weights)
    digest, layers = weights_digest(encoder), config.layers or (encoder.layers[-1],)
    labeled = open_labeled(os.fspath(data))
    frozen = cache_features(replace(config, layers=layers), encoder, path, labeled)
    tuning = _tuning_config(config, frozen.config, finetune_epochs) if finetune else None
    numbers = range(config.seed, config.seed + seeds)
    parts = [*({"few": share} for share in few), *({"per_class": each} for each in per_class)]
    drawn = [_draw_all(draw, frozen, part, numbers) for part in parts]  # before hours of training
    measured = [_measure(frozen, subset, encoder, path, tuning) for subset in drawn]
    results = {
        "subsets": [part | found for part, found in zip(parts, measured, strict=True)],
        "seeds": list(numbers),
        "protocol": {"linear": logistic_protocol(frozen.config, ten_crop=False)}
        | ({"finetuned": linear_protocol(tuning)} if tuning else {}),
        "data": os.fspath(data),
        "run": None if path is None else str(path),
        "weights_digest": digest,
        **describe_arithmetic(frozen.extractor.fabric),
        "measured": len(frozen.held_out.index),
        "unreadable": frozen.unreadable,
        "classes": frozen.splits.classes,
        "seconds": round(time.monotonic() - started, 2),
    }
    _store(run, results)
    return results


def _store(run: Path | None, results: dict[str, Any]) -> None:
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "results.json", results)


def _draw_all(
    draw: Callable[..., Tensor], frozen: FrozenFeatures, part: dict[str, Any], seeds: Sequence[int]
) -> dict[int, Tensor]:
    """Return {seed: images of a part}."""
    index, splits = frozen.training.index, frozen.splits
    labels, names = splits.labels[index], splits.source.classes or []
    return {seed: draw(labels, index, part, seed, names) for seed in seeds}


def _tuning_config(config: TransferConfig, resolved: TransferConfig, epochs: int) -> TransferConfig:
    """Return the options of fine-tuning: one head on the last layer, measured once, at the end."""
    layers = require_resolved(resolved.layers)[-1:]
    once = {"ten_crop": False, "eval_every": 0}
    return replace(
        config, layers=layers, views=resolved.views, finetune=True, epochs=epochs, **once
    )


def _measure(
    frozen: FrozenFeatures,
    subset: dict[int, Tensor],
    encoder: Encoder,
    path: Path | None,
    tuning: TransferConfig | None,
) -> dict[str, Any]:
    """Measure a subset, whose images are given by seed; without ``tuning`` only linear heads."""
    images = len(next(iter(subset.values())))
    notify(f"Learning from {images:,} labeled images, drawn {len(subset)} times.")
    linear = [frozen.measure(frozen.fit_heads(index, seed)) for seed, index in subset.items()]
    found: dict[str, Any] = {"images": images, "linear": summarize(linear)}
    if tuning is not None:
        splits, tuned = frozen.splits, []
        for seed, index in subset.items():
            source = SourceSubset(splits.source, index)
            part = splits._replace(source=source, labels=splits.labels[index])
            own, _ = take_encoder(encoder)
            tuned.append(read_out(replace(tuning, seed=seed), own, path, part)["layers"])
        found["finetuned"] = summarize(tuned)
    return found


def _check(few: Sequence[float], per_class: Sequence[int], seeds: int, epochs: int) -> None:
    if not few and not per_class:
        raise UserError("option-missing", "Set the labels to use with --few or --per-class.")
    for share in few:
        if not 0 < share <= 1:
            raise UserError(
                "option-invalid", f"--few is {share:g}; it must be in 0-1, above 0: 0.01 for 1 %."
            )
    for name, value in (
        *(("--per-class", number) for number in per_class),
        ("--seeds", seeds),
        ("--epochs", epochs),
    ):
        if value < 1:
            raise UserError("option-invalid", f"{name} is {value}; it must be at least 1.")


def summarize(runs: Sequence[Scores]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {layer: {measure: {"mean", "interval", "values"}}} of the scores of several seeds."""
    return {
        layer: {
            name: {
                "mean": statistics.fmean(values := [run[layer][name] for run in runs]),
                "interval": half_width(values),
                "values": values,
            }
            for name in found
        }
        for layer, found in runs[0].items()
    }


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of a mean's 95 % interval, by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
