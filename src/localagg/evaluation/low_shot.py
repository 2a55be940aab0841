"""How far few labels go: read-outs and fine-tuning on small parts of the training images.

A part is drawn anew for each seed, class by class. Measured are linear heads on the frozen encoder
(``quick``) and the encoder fine-tuned with a head (``transfer``), both on all held-out images.
"""

import hashlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import check_new, weights_digest, write_json
from ..config import TransferConfig, require_resolved
from ..data.sources.open import Source
from ..data.sources.source import Sample
from ..errors import UserError
from ..io.console import notify
from ..models import Encoder
from .linear import protocol, read_out
from .logistic_regression import stratified_folds
from .quick_readout import OPTIONS as QUICK_OPTIONS
from .quick_readout import FrozenFeatures, fit_heads, freeze, quick_protocol
from .readout_inputs import LabeledSplits, open_labeled, take_encoder

OPTIONS = (QUICK_OPTIONS | {"finetune"}) - {"ten_crop"}
"""Names of the options of :class:`TransferConfig` and its views that few labels heed."""
NOT_TUNING = frozenset({"ten_crop", "eval_every", "checkpoint_seconds"})
"""Names of those that mean nothing with fine-tuning either, which is measured once at its end."""


class Subset(Source):
    """Some images of a source, as a source.

    Args:
        source: all of them.
        index: int64 [n], which.
    """

    def __init__(self, source: Source, index: Tensor) -> None:
        self.source, self.index = source, index
        self.uri, self.classes = source.uri, source.classes
        self.labels: Tensor | None = None if source.labels is None else source.labels[index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        found = self.source[int(self.index[index])]
        return Sample(index, found.image, found.label)

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.sources.source.Source`."""
        return self.source.name(int(self.index[index]))

    def fingerprint(self) -> str:
        """See :class:`~localagg.data.sources.source.Source`."""
        whole = self.source.fingerprint().encode()
        return hashlib.sha256(whole + self.index.numpy().tobytes()).hexdigest()

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.sources.source.Source`; estimated by its share of the images."""
        return round(self.source.stored_bytes() * len(self) / len(self.source))


def draw_fraction(labels: Tensor, index: Tensor, fraction: float, seed: int) -> Tensor:
    """A stratified part of images; a function of (seed, fraction, images).

    Each class gives its share, rounded (halves up), and at least one image, so that none is lost;
    the part may be larger than ``fraction`` for that.

    Args:
        labels: int64 [n], of the images.
        index: int64 [n], the images to draw from.
        fraction: in 0-1, above 0.
        seed: of the draws.

    Returns:
        int64, the images drawn, increasing.
    """
    _, place, count = stratified_folds(labels, index, seed, repr(float(fraction)))
    wanted = (count * fraction + 0.5).floor().clamp(min=1)
    return index[place < wanted].sort().values


def draw_per_class(
    labels: Tensor, index: Tensor, number: int, seed: int, classes: Sequence[str]
) -> Tensor:
    """``number`` images of each class that there is; otherwise as :func:`draw_fraction`.

    Raises:
        UserError: a class has fewer.
    """
    _, place, count = stratified_folds(labels, index, seed, f"{number} per class")
    if (count < number).any():
        label = int(labels[count.argmin()])
        raise UserError(
            "TODO",
            f"--per-class {number} is more than the {int(count.min()):,} training images of class"
            f" '{classes[label]}'; set it to at most {int(count.min()):,}.",
        )
    return index[place < number].sort().values


def low_shot_accuracy(
    config: TransferConfig,
    weights: str | Path | Encoder,
    data: str,
    out: str | Path | None = None,
    *,
    few: Sequence[float] = (0.01, 0.1),
    per_class: Sequence[int] = (),
    seeds: int = 5,
    finetune: bool = True,
    finetune_epochs: int = 10,
) -> dict[str, Any]:
    """Accuracy from few labels, its mean and 95 % interval over draws of the labelled images.

    Linear: quick heads on ``config.layers`` (None: on the last alone). Fine-tuned: the whole
    network with one head on the last of these layers, by SGD under random views, as
    :func:`transfer.transfer` with ``finetune`` does it. The interval is Student's t over the seeds:
    it tells how much the draw matters, not how much the held-out images do.

    Args:
        config: of the read-outs; the seeds count from ``config.seed``.
        weights: as for :func:`transfer.transfer`.
        data: as for :func:`transfer.transfer`.
        out: folder to make, for results.json. None: nothing is written but kept features.
        few: shares of the training images; see :func:`draw_fraction`.
        per_class: numbers of images of each class; see :func:`draw_per_class`.
        seeds: how many draws of each.
        finetune: measure the fine-tuned network too.
        finetune_epochs: of fine-tuning, over the part.

    Returns:
        {"subsets": [{"few": share or "per_class": number, "images": labelled images, "linear":
        {layer: {"top1": M, "top5": M}}, "finetuned": the same, for one layer}], "seeds": [...],
        "protocol": {"linear", "finetuned": one line each}, "data", "run", "weights_digest",
        "measured", "unreadable", "classes", "seconds"}, where M is {"mean", "interval": half its
        width, None of one seed, "values": one a seed}.

    Raises:
        UserError: as :func:`transfer.transfer`; or parts that cannot be drawn.
    """
    started = time.monotonic()
    _check(few, per_class, seeds, finetune_epochs)
    run = None if out is None else Path(out)
    if run is not None:
        check_new(run)
    encoder, path = take_encoder(weights)
    digest = weights_digest(encoder)
    layers = config.layers or (encoder.layers[-1],)
    labelled = open_labeled(data)
    frozen = freeze(replace(config, layers=layers), encoder, path, labelled)
    numbers = range(config.seed, config.seed + seeds)
    parts = [{"few": share} for share in few] + [{"per_class": number} for number in per_class]
    drawn = [{seed: _draw(frozen, part, seed) for seed in numbers} for part in parts]
    protocols = {"linear": quick_protocol(frozen.config, ten_crop=False)}
    tuning = None
    if finetune:
        tuning = _tuning(config, frozen, finetune_epochs)
        protocols["finetuned"] = protocol(tuning)
    results = {
        "subsets": [
            _measure(frozen, part, index, encoder, path, tuning)
            for part, index in zip(parts, drawn, strict=True)
        ],
        "seeds": list(numbers),
        "protocol": protocols,
        "data": data,
        "run": None if path is None else str(path),
        "weights_digest": digest,
        "measured": len(frozen.held_out.index),
        "unreadable": frozen.unreadable,
        "classes": labelled.classes,
        "seconds": round(time.monotonic() - started, 2),
    }
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "results.json", results)
    return results


def _measure(
    frozen: FrozenFeatures,
    part: dict[str, Any],
    drawn: dict[int, Tensor],
    encoder: Encoder,
    path: Path | None,
    tuning: TransferConfig | None,
) -> dict[str, Any]:
    """One entry of "subsets", of images by seed; without ``tuning`` nothing is fine-tuned."""
    images = len(next(iter(drawn.values())))
    notify(f"{_named(part)}: {images:,} labelled images, drawn {len(drawn)} times.")
    heads = [fit_heads(frozen, index, seed) for seed, index in drawn.items()]
    found = {**part, "images": images, "linear": summary([frozen.measure(head) for head in heads])}
    if tuning is not None:
        tuned = [
            _finetuned(replace(tuning, seed=seed), encoder, path, frozen.labelled, index)
            for seed, index in drawn.items()
        ]
        found["finetuned"] = summary(tuned)
    return found


def _tuning(config: TransferConfig, frozen: FrozenFeatures, epochs: int) -> TransferConfig:
    """Of fine-tuning: one head on the last layer, measured once, at the end."""
    layers, views = require_resolved(frozen.config.layers), frozen.config.views
    return replace(
        config,
        layers=layers[-1:],
        views=views,
        finetune=True,
        epochs=epochs,
        ten_crop=False,
        eval_every=0,
    )


def _check(few: Sequence[float], per_class: Sequence[int], seeds: int, epochs: int) -> None:
    if not few and not per_class:
        raise UserError("TODO", "Name what part of the labels to use with --few or --per-class.")
    for share in few:
        if not 0 < share <= 1:
            raise UserError(
                "TODO", f"--few is {share:g}; a share lies in 0-1, above 0, as 0.01 for 1 %."
            )
    for name, value in (
        *(("--per-class", number) for number in per_class),
        ("--seeds", seeds),
        ("--epochs", epochs),
    ):
        if value < 1:
            raise UserError("TODO", f"{name} is {value}; it must be at least 1.")


def _draw(frozen: FrozenFeatures, part: dict[str, Any], seed: int) -> Tensor:
    index = frozen.train.index
    labels = frozen.labelled.labels[index]
    if "few" in part:
        return draw_fraction(labels, index, part["few"], seed)
    names = frozen.labelled.source.classes or []
    return draw_per_class(labels, index, part["per_class"], seed, names)


def _named(part: dict[str, Any]) -> str:
    return f"{100 * part['few']:g} %" if "few" in part else f"{part['per_class']} of each class"


def _finetuned(
    config: TransferConfig,
    encoder: Encoder,
    path: Path | None,
    labelled: LabeledSplits,
    index: Tensor,
) -> dict[str, dict[str, float]]:
    """Accuracies by layer of the encoder fine-tuned on training images ``index``."""
    subset = Subset(labelled.source, index)
    part = labelled._replace(source=subset, labels=labelled.labels[index])
    copied, _ = take_encoder(encoder)
    return read_out(config, copied, path, part)["layers"]


def summary(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{layer: {measure: {"mean", "interval", "values"}}} of the accuracies of several seeds."""
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
    """Half the width of the 95 % interval of a mean, by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
